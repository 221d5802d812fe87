"""`report.html`: one self-contained page with a run's result, curves and pictures, made from its
workdir alone.
"""

import glob
import json
import os

from dsr_jax import files
from dsr_jax.reporting import html as page
from dsr_jax.reporting.charts import Chart, Series, chart
from dsr_jax.runtime import metrics as metrics_lib

# Curves that belong together: (title, unit, names). Names that a run does not have are left out;
# all others follow one by one.
CURVES = (
  (
    'Reward of pictures, R_G',
    'nats a token',
    ('generation/reward_mean', 'generation/reward_frozen'),
  ),
  (
    'Reward of texts, R_U',
    'nats a token',
    ('understanding/reward_mean', 'understanding/reward_frozen'),
  ),
  ('Loss', 'nats a pair', ('generation/loss', 'understanding/loss')),
  (
    'Pairs that the policy orders as the reward does',
    '',
    ('generation/preferred', 'understanding/preferred'),
  ),
  (
    'Margin of the chosen over the rejected',
    'nats a token',
    ('generation/margin', 'understanding/margin'),
  ),
  (
    'Spread of rewards within a group',
    'nats a token',
    ('generation/reward_spread', 'understanding/reward_spread'),
  ),
  (
    'Similarity of candidates within a group',
    '',
    ('generation/similarity', 'understanding/similarity'),
  ),
  ('Entropy of the policy', 'nats a token', ('generation/entropy', 'understanding/entropy')),
  ('Length of texts', 'tokens', ('understanding/text_length',)),
  ('Texts cut off or empty', 'of all', ('understanding/truncated', 'understanding/empty')),
  ('Gradient norm', '', ('gradient_norm',)),
  (
    'Sampler against scorer',
    'nats a token',
    ('generation/sampler_gap', 'understanding/sampler_gap'),
  ),
  ('Time of a step', 's', ('time/step_seconds',)),
)
LOWER_IS_BETTER = ('hallucination', 'unparsable')
SCHEDULES = ('learning_rate',)  # ends of names of curves without noise
MAX_TILES = 8
MAX_SHEETS = 6  # the first, the last and some between


def write(workdir):
  """Writes `report.html` into a run's workdir; returns its path."""
  curves = metrics_lib.read(workdir)
  evaluation = {key[5:]: curve for key, curve in curves.items() if key.startswith('eval/')}
  training = {key: curve for key, curve in curves.items() if not key.startswith('eval/')}
  config = files.read_json_or_none(os.path.join(workdir, 'config.json'))
  name = os.path.basename(os.path.abspath(workdir))
  whole = _whole_steps(evaluation, config)
  chief, others = _evaluation_charts(evaluation, whole)
  text = page.render(
    'run.html.j2',
    title=f'{name}: dual self-rewards',
    name=name,
    facts=_facts(training, config),
    tiles=_tiles(evaluation, whole),
    evaluations=chief,
    other_evaluations=others,
    chief_charts=_chief_charts(training),
    sheets=_sheets(workdir),
    other_charts=_other_charts(training),
    evaluation_table=_evaluation_table(evaluation),
    settings=json.dumps(config, indent=2, sort_keys=True) if config else '',
  )
  return files.write_text(os.path.join(workdir, 'report.html'), text)


def _facts(training, config) -> list[tuple]:
  """What the run is; config: what config.json holds, or None."""
  facts = []
  done = max((steps[-1] for steps, _ in training.values()), default=0)
  if config:
    m = config['config']['method']
    tasks = 'both tasks' if m['task'] == 'unified' else f'only {m["task"]}'
    facts += [
      ('Model', config['about']['model']['name']),
      ('Objective', f'{m["objective"]}, {tasks}'),
      ('A step', f'{m["inputs_per_step"]} inputs × {m["group_size"]} candidates'),
      ('Learning rate', f'{_learning_rate(m):g}'),
      ('Seed', m['seed']),
      ('Device', config['devices']),
      ('Steps', f'{done} of {m["steps"]}'),
    ]
  if 'time/step_seconds' in training:
    facts.append(('Training', _duration(sum(training['time/step_seconds'][1]))))
  return facts


def _learning_rate(method: dict) -> float:
  """Of what is trained; method: as config.json has it."""
  of_adapters = method.get('lora', {}) if method.get('trainable') == 'lora' else {}
  return of_adapters.get('learning_rate', method['learning_rate'])


def _whole_steps(evaluation, config) -> tuple[int, int]:
  """Steps that were measured on the whole lists; the others were on their beginnings."""
  if config:
    return 0, config['config']['method']['steps']
  return 0, max((steps[-1] for steps, _ in evaluation.values()), default=0)


def _tiles(evaluation, whole) -> list[page.Tile]:
  """The chief scores (those with an interval; the first ones if none has): now, and how they
  changed where both were measured on the same lists.
  """
  chief = [key for key in evaluation if key + '_low' in evaluation] or list(evaluation)[:MAX_TILES]
  tiles = []
  for key in chief:
    steps, values = evaluation[key]
    lines, change, side = [], '', ''
    if key + '_low' in evaluation:
      low, high = (evaluation[key + end][1][-1] for end in ('_low', '_high'))
      lines.append(f'95 %: {low:.3f} to {high:.3f}')
    if steps[-1] not in whole:
      lines.append(f'so far: step {steps[-1]}, the beginning of the list')
    elif steps[0] == 0 and len(values) > 1:
      lines.append(f'{values[0]:.3f} before')
      difference = values[-1] - values[0]
      change = page.signed(difference)
      if not change.startswith('±'):
        better = (difference > 0) != any(word in key for word in LOWER_IS_BETTER)
        side = 'up' if better else 'down'
    tiles.append(page.Tile(_label(key), f'{values[-1]:.3f}', lines, change, side))
  return tiles


def _evaluation_charts(evaluation, whole) -> tuple[list[Chart], list[Chart]]:
  """Scores with intervals, and all others."""
  chief, others = [], []
  for key, (steps, values) in evaluation.items():
    if key.endswith(('_low', '_high')) or len(steps) < 2:
      continue
    interval = None
    if key + '_low' in evaluation:
      interval = [evaluation[key + end][1] for end in ('_low', '_high')]
    role = 'generation' if key.startswith('generation') else 'understanding'
    series = [
      _some(steps, values, interval, [s in whole for s in steps], 'whole list', role, True),
      _some(steps, values, interval, [s not in whole for s in steps], 'its beginning', role, False),
    ]
    found = chart(_label(key), '', [one for one in series if one.steps])
    (chief if interval else others).append(found)
  return chief, others


def _some(steps, values, interval, wanted, label, role, joined) -> Series:
  """A series of the steps that are wanted."""

  def of(row):
    return [x for x, is_wanted in zip(row, wanted) if is_wanted]

  low, high = [of(row) for row in interval] if interval else (None, None)
  return Series(label, role, of(steps), of(values), low, high, joined)


def _chief_charts(training) -> list[Chart]:
  """The curves of CURVES."""
  charts = []
  for title, unit, names in CURVES:
    found = [name for name in names if name in training]
    if found:
      series = []
      for name in found:
        role = _role(name)
        if role in [one.role for one in series]:
          role = 'second'
        series.append(Series(_series_label(name, found), role, *training[name]))
      charts.append(chart(title, unit, series))
  return charts


def _other_charts(training) -> list[Chart]:
  """A chart for every other name."""
  shown = {name for _, _, names in CURVES for name in names}
  return [
    chart(
      _label(name), '', [Series(name, _role(name), *curve, smooth=not name.endswith(SCHEDULES))]
    )
    for name, curve in training.items()
    if name not in shown
  ]


def _role(name) -> str:
  """What a curve is about: the initial model's opinion, or a task, or neither."""
  task = name.partition('/')[0]
  if name.endswith('_frozen'):
    return 'initial'
  return task if task in ('generation', 'understanding') else 'other'


def _sheets(workdir) -> list[tuple[int, str]]:
  """(step, data URL) of the first, the last and some sheets between."""
  paths = sorted(glob.glob(os.path.join(workdir, 'samples', '*.png')))
  if len(paths) > MAX_SHEETS:
    paths = [paths[round(i * (len(paths) - 1) / (MAX_SHEETS - 1))] for i in range(MAX_SHEETS)]
  sheets = []
  for path in paths:
    with open(path, 'rb') as f:
      step = int(os.path.splitext(os.path.basename(path))[0])
      sheets.append((step, page.data_uri(f.read())))
  return sheets


def _evaluation_table(evaluation) -> page.Table | None:
  if not evaluation:
    return None
  steps = sorted({step for at, _ in evaluation.values() for step in at})
  rows = []
  for key, (at, values) in evaluation.items():
    by_step = dict(zip(at, values))
    rows.append([_label(key), *(by_step.get(step, '') for step in steps)])
  return page.Table(['', *(f'step {step}' for step in steps)], rows)


def _label(name):
  words = name.replace('/', ': ').replace('_', ' ').replace('f1', 'F1')
  return words[:1].upper() + words[1:]


def _series_label(name, others):
  """What tells the curves of one chart apart: the scorer, the task, or the rest of the name."""
  task, _, rest = name.rpartition('/')
  if any('frozen' in other for other in others):
    return 'by the initial model' if 'frozen' in name else 'by the policy'
  return task if len({other.rpartition('/')[0] for other in others}) > 1 else rest.replace('_', ' ')


def _duration(seconds):
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours} h {minutes:02d} min' if hours else f'{minutes} min {seconds:02d} s'
