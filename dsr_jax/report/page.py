"""`report.html`: one self-contained page with a run's result, its samples, curves and candidates,
made only from its workdir, for finished and unfinished runs.

All comparisons on it use the same items on both sides (`same_items`).
"""

import glob
import json
import os
from typing import NamedTuple

import numpy as np

from dsr_jax import files
from dsr_jax.report import before_after, same_items
from dsr_jax.report.same_items import Compared
from dsr_jax.reporting import html as page
from dsr_jax.reporting.charts import Chart, Series, chart
from dsr_jax.runtime import metrics as metrics_lib


class Group(NamedTuple):
  """Curves that belong together. expect: how to read them. Names that a run lacks are omitted."""

  title: str
  unit: str
  names: tuple[str, ...]
  expect: str


CURVES = (
  Group(
    'Reward of images, R_G',
    'nats per token',
    ('generation/reward_mean', 'generation/reward_frozen'),
    'May fall while drawing improves, because every step has other prompts, and the policy that '
    'scores them changes. Compare the fixed list above instead.',
  ),
  Group(
    'Reward of texts, R_U',
    'nats per token',
    ('understanding/reward_mean', 'understanding/reward_frozen'),
    'Likewise: every step has other images, and the scorer changes.',
  ),
  Group('Loss', '', ('generation/loss', 'understanding/loss'), ''),
  Group(
    'Pairs that the policy orders as the reward does',
    'share',
    ('generation/preferred', 'understanding/preferred'),
    'One half at first, which is chance. It should rise slowly; near 1, the policy has nothing '
    'left to learn from its pairs.',
  ),
  Group(
    'Margin of the chosen over the rejected',
    'nats per token',
    ('generation/margin', 'understanding/margin'),
    'Measured before the update, on new samples. Should rise from about 0.',
  ),
  Group(
    'Size of the margin',
    'nats per token',
    ('generation/margin_size', 'understanding/margin_size'),
    'Without its sign. Times β σ(-γ), it is the part of the weight of a pair that depends on the '
    'policy and not on the reward; above about .05 it raises the entropy.',
  ),
  Group(
    'Share of the codes that carry the credit',
    'share',
    ('generation/credit_share',),
    'With method.credit: 1 if all codes of an image weigh the same.',
  ),
  Group(
    'Spread of rewards within a group',
    'nats per token',
    ('generation/reward_spread', 'understanding/reward_spread'),
    'How much the candidates differ. At 0, a group teaches nothing.',
  ),
  Group(
    'Similarity of candidates within a group',
    'share',
    ('generation/similarity', 'understanding/similarity'),
    'Should stay clearly below 1: at 1, all candidates are the same.',
  ),
  Group(
    'Entropy of the policy',
    'nats per token',
    ('generation/entropy', 'understanding/entropy'),
    'Falls a little as the policy becomes more certain. A drop to 0 is a collapse; a steady rise '
    'means that the policy learns noise.',
  ),
  Group(
    'Length of texts',
    'tokens',
    ('understanding/text_length',),
    'Not a goal. A steady rise to the limit, or a drop to one word, means that the reward pays '
    'for length.',
  ),
  Group(
    'Texts cut off or empty',
    'share',
    ('understanding/truncated', 'understanding/empty'),
    'Should stay near 0.',
  ),
  Group(
    'Gradient norm',
    '',
    ('gradient_norm',),
    'Before clipping. Single spikes are clipped and harmless; a steady rise is not.',
  ),
  Group(
    'Sampler against scorer',
    'nats per token',
    ('generation/sampler_gap', 'understanding/sampler_gap'),
    'The difference between two programs for the same distribution. It is only rounding, so it '
    'should stay at its first value.',
  ),
  Group('Time of a step', 's', ('time/step_seconds',), 'The first steps may be slower.'),
)
# For the loss: {objective: (unit, what to expect)}.
_PAIR = (
  'Should fall: it measures how unlikely the order of the pairs is under the policy. Each step has '
  'other pairs, so it fluctuates.'
)
_WHOLE = (
  'Minus the mean of advantages times ratios, plus the KL if there is one. It starts near 0 and '
  'does not fall while the model learns; the measured scores show what is learned.'
)
LOSSES = {
  'simpo': ('nats per pair', _PAIR),
  'simpo_linear': (
    'nats per pair',
    'Minus the margin, times a constant. It starts near 0 and should fall slowly; each step has '
    'other pairs, so it fluctuates.',
  ),
  'online_dpo': ('nats per pair', _PAIR),
  'best_of_n': (
    'nats per token',
    'Minus the log-probability of the best candidates. Should fall.',
  ),
}
OTHER_LOSS = ('no unit', _WHOLE)
# For the fixed list: {score: (title, unit, what to expect)}.
FIXED = {
  'watched/reward_generation': (
    'R_G of the fixed prompts, by the initial model',
    'nats per token',
    'The prompts, keys and scorer do not change. Should rise; if it rises while the measured '
    'scores fall, the reward is being hacked.',
  ),
  'watched/reward_understanding': (
    'R_U of the fixed images, by the initial model',
    'nats per token',
    'The images, keys and scorer do not change. Should rise.',
  ),
  'watched/entropy_generation': (
    'Entropy of drawing the fixed prompts',
    'nats per code',
    'With the guidance and temperature of sampling. Falls a little as the policy becomes more '
    'certain; near 0, all samples are the same.',
  ),
  'watched/entropy_understanding': (
    'Entropy of describing the fixed images',
    'nats per token',
    'Falls a little as the policy becomes more certain; near 0, each image has only one text left.',
  ),
  'watched/similarity_generation': (
    'Similarity of images for a fixed prompt',
    'share of codes',
    'Between two samples for a prompt. Near 1, the model always draws the same image.',
  ),
  'watched/similarity_understanding': (
    'The same text about two fixed images',
    'share of pairs',
    'Should stay near its first value: at 1, the model says the same about every image.',
  ),
  'watched/text_length': ('Length of texts about the fixed images', 'tokens', 'Not a goal.'),
  'watched/dark_pixels': (
    'Dark pixels of the fixed prompts',
    'share',
    'A safeguard: a jump means that images turn black to increase the reward.',
  ),
  'watched/edge_density': (
    'Edges in the fixed prompts',
    'share of neighbors',
    'A safeguard: near 0, images are empty; far above the first value, they are noise.',
  ),
  'watched/color_entropy': (
    'Colors of the fixed prompts',
    'nats per pixel',
    'A safeguard: near 0, images have one color.',
  ),
}
TITLES = {
  'generation/mean': 'Correct images, mean of tasks',
  'description/f1': 'Descriptions, F1',
  'description_greedy/f1': 'Descriptions, greedy, F1',
  'yesno/f1': 'Yes or no, F1',
}
SCHEDULES = ('learning_rate',)  # suffixes of the names of curves without noise
MAX_TILES = 8
MAX_SHEETS = 6  # the first, the last and some in between


def write(workdir):
  """Writes `report.html` into a run's workdir; returns its path."""
  curves = metrics_lib.read(workdir)
  evaluation = {key[5:]: curve for key, curve in curves.items() if key.startswith('eval/')}
  training = {key: curve for key, curve in curves.items() if not key.startswith('eval/')}
  config = files.read_json_or_none(os.path.join(workdir, 'config.json'))
  name = os.path.basename(os.path.abspath(workdir))
  last = _steps(curves, config)
  done = max((steps[-1] for steps, _ in training.values()), default=0)
  compared = same_items.compare(workdir, last, _chief_of(evaluation)) if evaluation else []
  order = _chief_of(evaluation)
  compared.sort(key=lambda one: order.index(one.name))
  rows = same_items.evaluations(workdir)
  chief, others = _evaluation_charts(evaluation, rows, last)
  training_charts = _training_charts(training, config)
  other_charts = _other_charts(training)
  fixed = _fixed_charts(evaluation, rows)
  flat = [one for one in (*fixed, *chief, *others, *training_charts, *other_charts) if one.flat]
  text = page.render(
    'run.html.j2',
    title=f'{name}: dual self-rewards',
    name=name,
    result=_result(compared, done, last),
    facts=_facts(training, config, done),
    fixed_list=_fixed_list(config),
    unfamiliar=same_items.unfamiliar(workdir),
    tiles=_tiles(compared),
    drawn=before_after.items(workdir, 'generation'),
    described=before_after.items(workdir, 'understanding'),
    fixed_charts=_moving(fixed),
    evaluations=_moving(chief),
    other_evaluations=_moving(others),
    training_charts=_moving(training_charts),
    sheets=_sheets(workdir),
    other_charts=_moving(other_charts),
    flat=page.Table(['', 'value'], [[one.title, one.flat] for one in flat]),
    evaluation_table=_evaluation_table(evaluation),
    settings=json.dumps(config, indent=2, sort_keys=True) if config else '',
  )
  return files.write_text(os.path.join(workdir, 'report.html'), text)


def _moving(charts: list[Chart]) -> list[Chart]:
  """The charts whose curves change; the others are listed as one number each."""
  return [one for one in charts if not one.flat]


# The result.


def _steps(curves, config) -> int:
  """Steps of the whole run; if that is unknown, the steps so far."""
  if config:
    return config['config']['method']['steps']
  return max((steps[-1] for steps, _ in curves.values()), default=0)


def _result(compared: list[Compared], done: int, last: int) -> str:
  """The result in one or two sentences."""
  where = f'After all {last} steps' if done >= last else f'After {done} of {last} steps'
  chief = [one for one in compared if one.change is not None]
  if not chief:
    return f'{where}. Nothing has been measured both before and after yet.'
  better = [one for one in chief if _verdict(one) == 'up']
  worse = [one for one in chief if _verdict(one) == 'down']
  open_ = [one for one in chief if not _verdict(one)]
  parts = [
    f'{words}: {"; ".join(_title(one.name) for one in found)}'
    for words, found in (
      ('better', better),
      ('worse', worse),
      ('no significant change', open_),
    )
    if found
  ]
  said = '. '.join([parts[0], *(part[:1].upper() + part[1:] for part in parts[1:])])
  unfinished = '' if done >= last else ' This page is updated at every evaluation.'
  return f'{where}, on the same items as before: {said}.{unfinished}'


def _chief_of(evaluation) -> list[str]:
  """The scores that come first: rewards of the fixed list and scores in TITLES; if there are none,
  the first scores.
  """
  names = [name for name in FIXED if 'reward' in name] + list(TITLES)
  found = [name for name in names if name in evaluation]
  plain = [name for name in evaluation if not name.endswith(('_low', '_high'))]
  return found or plain[:MAX_TILES]


def _verdict(one: Compared) -> str:
  """'up' or 'down' if the interval of the change excludes 0 or is missing, else ''."""
  if not one.gain or (one.low is not None and one.low <= 0 <= one.high):
    return ''
  if float(f'{one.change:.3f}') == 0:
    return ''
  return 'up' if one.gain > 0 else 'down'


def _tiles(compared: list[Compared]) -> list[page.Tile]:
  """The chief scores: their values now, and their changes over the same items."""
  tiles = []
  for one in compared:
    value = one.before if one.after is None else one.after
    lines, change = [], ''
    if one.change is None:
      lines.append('before training' if one.after is None else f'step {one.step}')
      if one.after is not None:
        lines.append('not measured on the same list before')
    else:
      lines.append(f'{one.before:.3f} before')
      change = page.signed(one.change)
      if one.low is not None:
        change += f' ({page.signed(one.low)} to {page.signed(one.high)})'
    if one.items:
      lines.append(f'the same {one.items} before and after step {one.step}')
    tiles.append(page.Tile(_title(one.name), f'{value:.3f}', lines, change, _verdict(one)))
  return tiles


def _facts(training, config, done) -> list[tuple]:
  """Facts about the run. config: the content of config.json, or None."""
  facts = []
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


def _fixed_list(config) -> str:
  """A sentence about the fixed list. config: the content of config.json, or None."""
  held = ((config or {}).get('about') or {}).get('data', {}).get('held_out') or {}
  said = [f'{len(hashes)} {kind}' for kind, hashes in sorted(held.items(), reverse=True)]
  if not said:
    return ''
  return f'{" and ".join(said)} of your own are held out: the run never learns from them.'


def _learning_rate(method: dict) -> float:
  """The learning rate of the trained parameters. method: from config.json."""
  of_adapters = method.get('lora', {}) if method.get('trainable') == 'lora' else {}
  return of_adapters.get('learning_rate', method['learning_rate'])


# Charts of measurements.


def _fixed_charts(evaluation, rows) -> list[Chart]:
  """The fixed list over training."""
  charts = []
  for name, (title, unit, expect) in FIXED.items():
    if name not in evaluation or len(evaluation[name][0]) < 2:
      continue
    role = 'initial' if 'reward' in name else _role_of_list(name)
    if name in same_items.MEASURES:
      points, counted = same_items.curve(rows, name)
      series = _over_same_items(points, counted, role)
    else:
      series = None
    series = series or Series('', role, *evaluation[name])
    charts.append(chart(title, unit, [series], note=expect))
  return charts


def _role_of_list(name) -> str:
  of_texts = 'text' in name or name.endswith('understanding')
  return 'understanding' if of_texts else 'generation'


def _over_same_items(points, counted, role) -> Series | None:
  if not points:
    return None
  steps, values, low, high = (list(column) for column in zip(*points))
  if low[0] is None:
    low = high = None
  return Series(f'{counted}, the same at every step', role, steps, values, low, high)


def _evaluation_charts(evaluation, rows, last) -> tuple[list[Chart], list[Chart]]:
  """Charts of scores with intervals, and of all others."""
  chief, others = [], []
  for key, (steps, values) in evaluation.items():
    if key.endswith(('_low', '_high')) or len(steps) < 2 or key in FIXED:
      continue
    role = 'generation' if key.startswith('generation') else 'understanding'
    has_interval = key + '_low' in evaluation
    interval = [evaluation[key + end][1] for end in ('_low', '_high')] if has_interval else None
    is_whole = [step in (0, last) for step in steps]
    series = []
    if key in same_items.MEASURES:
      found = _over_same_items(*same_items.curve(rows, key, has_interval), role)
      series += [found] if found else []
    if not series:
      beginnings = [not whole for whole in is_whole]
      series.append(_some(steps, values, interval, beginnings, 'its first part', role, True))
    # If every list was whole, the two are one curve.
    if len(series[0].values) < len(values) or not np.allclose(values, series[0].values):
      series.append(_some(steps, values, interval, is_whole, 'the whole list', role, False))
    series = [one for one in series if one.steps]
    lower = key.endswith(same_items.LOWER_IS_BETTER)
    note = 'Lower is better.' if lower else 'Higher is better.'
    if key.endswith(same_items.NEUTRAL):
      note = 'Neither is better.'
    found = chart(_title(key), '', series, note=note)
    (chief if has_interval else others).append(found)
  return chief, others


def _some(steps, values, interval, wanted, label, role, joined) -> Series:
  """A series of the wanted steps."""

  def of(row):
    return [x for x, is_wanted in zip(row, wanted) if is_wanted]

  low, high = [of(row) for row in interval] if interval else (None, None)
  return Series(label, role, of(steps), of(values), low, high, joined)


# Charts of training.


def _training_charts(training, config) -> list[Chart]:
  """Charts of CURVES."""
  objective = config['config']['method']['objective'] if config else ''
  charts = []
  for title, unit, names, expect in CURVES:
    found = [name for name in names if name in training]
    if not found:
      continue
    if title == 'Loss':
      unit, expect = LOSSES.get(objective, OTHER_LOSS) if objective else ('', '')
    series = []
    for name in found:
      role = _role(name)
      if role in [one.role for one in series]:
        role = 'second'
      series.append(Series(_series_label(name, found), role, *training[name]))
    charts.append(chart(title, unit, series, note=expect))
  return charts


def _other_charts(training) -> list[Chart]:
  """One chart for every other name."""
  shown = {name for group in CURVES for name in group.names}
  return [
    chart(
      _label(name), '', [Series(name, _role(name), *curve, smooth=not name.endswith(SCHEDULES))]
    )
    for name, curve in training.items()
    if name not in shown
  ]


def _role(name) -> str:
  """The role of a curve: the initial model's opinion, a task, or neither."""
  task = name.partition('/')[0]
  if name.endswith('_frozen'):
    return 'initial'
  return task if task in ('generation', 'understanding') else 'other'


# The rest.


def _sheets(workdir) -> list[tuple[int, str]]:
  """(step, data URL) of the first sheet, the last, and some in between."""
  folder = os.path.join(workdir, 'samples')
  paths = [os.path.join(folder, name) for name in sorted(glob.glob('*.png', root_dir=folder))]
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


def _title(name):
  """A score's title, understandable without context."""
  if name in FIXED:
    return FIXED[name][0]
  return TITLES.get(name) or _label(name)


def _label(name):
  words = name.replace('/', ': ').replace('_', ' ').replace('f1', 'F1')
  return words[:1].upper() + words[1:]


def _series_label(name, others):
  """What distinguishes the curves of one chart: the scorer, the task, or the rest of the name."""
  task, _, rest = name.rpartition('/')
  if any('frozen' in other for other in others):
    return 'by the initial model' if 'frozen' in name else 'by the policy'
  return task if len({other.rpartition('/')[0] for other in others}) > 1 else rest.replace('_', ' ')


def _duration(seconds):
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours} h {minutes:02d} min' if hours else f'{minutes} min {seconds:02d} s'
