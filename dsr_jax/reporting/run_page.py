"""`report.html`: one self-contained page with a run's result, curves and pictures, made from its
workdir alone.
"""

import glob
import html
import json
import os

from dsr_jax import files
from dsr_jax.reporting import html as page
from dsr_jax.reporting.charts import chart
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
MAX_TILES = 8
MAX_SHEETS = 6  # the first, the last and some between


def write(workdir):
  """Writes `report.html` into a run's workdir; returns its path."""
  curves = metrics_lib.read(workdir)
  evaluation = {key[5:]: curve for key, curve in curves.items() if key.startswith('eval/')}
  training = {key: curve for key, curve in curves.items() if not key.startswith('eval/')}
  config = files.read_json_or_none(os.path.join(workdir, 'config.json'))
  name = html.escape(os.path.basename(os.path.abspath(workdir)))
  body = [
    _head(name, training, config),
    _tiles(evaluation),
    _evaluation_charts(evaluation),
    _chief_charts(training),
    _sheets(workdir),
    _other_charts(training),
    _evaluation_table(evaluation),
    _settings(config),
  ]
  title = f'{os.path.basename(os.path.abspath(workdir))}: dual self-rewards'
  return files.write_text(os.path.join(workdir, 'report.html'), page.whole(title, ''.join(body)))


def _head(name, training, config):
  """Title and the facts of the run; config: what config.json holds, or None."""
  facts = []
  done = max((steps[-1] for steps, _ in training.values()), default=0)
  if config:
    m = config['config']['method']
    tasks = 'both tasks' if m['task'] == 'unified' else f'only {m["task"]}'
    facts += [
      ('Model', config['about']['model']['name']),
      ('Objective', f'{m["objective"]}, {tasks}'),
      ('A step', f'{m["inputs_per_step"]} inputs × {m["group_size"]} candidates'),
      ('Learning rate', f'{m["learning_rate"]:g}'),
      ('Seed', m['seed']),
      ('Device', config['devices']),
      ('Steps', f'{done} of {m["steps"]}'),
    ]
  if 'time/step_seconds' in training:
    facts.append(('Training', _duration(sum(training['time/step_seconds'][1]))))
  rows = ''.join(f'<span>{key} <b>{html.escape(str(value))}</b></span>' for key, value in facts)
  return (
    f'<h1>{name}</h1><p class="lead">A model that draws and describes, learning from its own '
    'reversed '
    f'likelihoods.</p><div class="facts">{rows}</div>'
  )


def _tiles(evaluation):
  """The chief scores (those with an interval; the first ones if none has): now, and how they
  changed.
  """
  chief = [key for key in evaluation if key + '_low' in evaluation] or list(evaluation)[:MAX_TILES]
  tiles = []
  for key in chief:
    steps, values = evaluation[key]
    below = []
    if key + '_low' in evaluation:
      low, high = (evaluation[key + end][1][-1] for end in ('_low', '_high'))
      below.append(f'95 %: {low:.3f} to {high:.3f}')
    if steps[0] == 0 and len(values) > 1:
      change = values[-1] - values[0]
      better = (change >= 0) != any(word in key for word in LOWER_IS_BETTER)
      below.append(
        f'{values[0]:.3f} before, <span class="{"up" if better else "down"}">{change:+.3f}</span>'
      )
    below = ''.join(f'<div class="was">{line}</div>' for line in below)
    tiles.append(
      f'<div class="tile"><div class="name">{html.escape(_label(key))}</div>'
      f'<div class="value">{values[-1]:.3f}</div>{below}</div>'
    )
  return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ''


def _evaluation_charts(evaluation):
  """The chief scores with their intervals as bands; all others folded away."""
  chief, others = [], []
  for key, (steps, values) in evaluation.items():
    if not key.endswith(('_low', '_high')) and len(steps) > 1:
      band = (
        [evaluation[key + end][1] for end in ('_low', '_high')]
        if key + '_low' in evaluation
        else None
      )
      (chief if band else others).append(
        chart(_label(key), '', [(_label(key), steps, values)], band)
      )
  note = (
    'The first and the last point are of the whole lists, those between of their beginnings; '
    'bands: 95 %.'
  )
  folded = (
    '<details><summary>Every other score</summary><div '
    f'class="charts">{"".join(others)}</div></details>'
  )
  return _section('Both tasks, measured', note, chief or others) + (
    folded if chief and others else ''
  )


def _chief_charts(training):
  """The curves of CURVES."""
  charts = []
  for title, unit, names in CURVES:
    found = [n for n in names if n in training]
    if found:
      charts.append(chart(title, unit, [(_series_label(n, found), *training[n]) for n in found]))
  return _section('Training', '', charts)


def _other_charts(training):
  """A chart for every other name."""
  shown = {name for _, _, names in CURVES for name in names}
  charts = [chart(_label(n), '', [(n, *curve)]) for n, curve in training.items() if n not in shown]
  return _section('Everything else that was logged', '', charts)


def _section(title, note, charts):
  note = f'<p class="lead">{note}</p>' if note else ''
  return f'<h2>{title}</h2>{note}<div class="charts">{"".join(charts)}</div>' if charts else ''


def _sheets(workdir):
  """The first, the last and some sheets between, as figures with the PNG inside."""
  paths = sorted(glob.glob(os.path.join(workdir, 'samples', '*.png')))
  if len(paths) > MAX_SHEETS:
    paths = [paths[round(i * (len(paths) - 1) / (MAX_SHEETS - 1))] for i in range(MAX_SHEETS)]
  figures = []
  for path in paths:
    with open(path, 'rb') as f:
      figures.append(
        page.figure(f.read(), f'Step {int(os.path.splitext(os.path.basename(path))[0])}')
      )
  note = (
    'Some inputs of a step with their candidates and self-rewards, in nats a token: '
    '<span class="up">chosen</span> is the best of a group, <span class="down">rejected</span> the '
    'worst.'
  )
  return f'<h2>Candidates</h2><p class="lead">{note}</p>{"".join(figures)}' if figures else ''


def _evaluation_table(evaluation):
  if not evaluation:
    return ''
  steps = sorted({step for at, _ in evaluation.values() for step in at})
  rows = []
  for key, (at, values) in evaluation.items():
    cells = dict(zip(at, values))
    rows.append(
      f'<tr><td>{html.escape(_label(key))}</td>'
      + ''.join(f'<td class="n">{cells[s]:.4f}</td>' if s in cells else '<td></td>' for s in steps)
      + '</tr>'
    )
  head = ''.join(f'<th class="n">step {s}</th>' for s in steps)
  return (
    '<h2>All evaluations</h2><div '
    f'class="scroll"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'
  )


def _settings(config):
  if not config:
    return ''
  text = html.escape(json.dumps(config, indent=2, sort_keys=True))
  return (
    '<h2>Settings</h2><details><summary>Every key, the data and the '
    f'versions</summary><pre>{text}</pre></details>'
  )


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
