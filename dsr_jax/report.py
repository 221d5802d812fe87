"""`report.html`: one self-contained page with a run's result, curves and pictures. Made from what is in the workdir alone."""

import base64
import glob
import html
import json
import math
import os

from dsr_jax import metrics as metrics_lib

# Curves that belong together: (title, unit, names). Names that a run does not have are left out; all others follow one by one.
CURVES = (
    ('Reward of pictures, R_G', 'nats a token', ('generation/reward_mean', 'generation/reward_frozen')),
    ('Reward of texts, R_U', 'nats a token', ('understanding/reward_mean', 'understanding/reward_frozen')),
    ('Loss', 'nats a pair', ('generation/loss', 'understanding/loss')),
    ('Pairs that the policy orders as the reward does', '', ('generation/preferred', 'understanding/preferred')),
    ('Margin of the chosen over the rejected', 'nats a token', ('generation/margin', 'understanding/margin')),
    ('Spread of rewards within a group', 'nats a token', ('generation/reward_spread', 'understanding/reward_spread')),
    ('Similarity of candidates within a group', '', ('generation/similarity', 'understanding/similarity')),
    ('Entropy of the pairs', 'nats a token', ('generation/entropy', 'understanding/entropy')),
    ('Length of texts', 'tokens', ('understanding/text_length',)),
    ('Texts cut off or empty', 'of all', ('understanding/truncated', 'understanding/empty')),
    ('Gradient norm', '', ('gradient_norm',)),
    ('Sampler against scorer', 'nats a token', ('generation/sampler_gap', 'understanding/sampler_gap')),
    ('Time of a step', 's', ('time/step_seconds',)),
)
COLORS = ('var(--a)', 'var(--b)', 'var(--c)', 'var(--d)')
LOWER_IS_BETTER = ('hallucination',)
MAX_TILES = 8
MAX_SHEETS = 6  # pictures shown: the first, the last and some between

STYLE = """
:root { --paper:#fff; --ink:#1c2026; --faint:#68717d; --line:#e3e6ea; --card:#f7f8fa; --a:#2563c9; --b:#d9622b; --c:#16865a; --d:#8a4fc4;
  --up:#16865a; --down:#c53b33 }
@media (prefers-color-scheme: dark) { :root { --paper:#14171b; --ink:#e8eaed; --faint:#98a1ad; --line:#2b3038; --card:#1b1f25; --a:#6ea3f5;
  --b:#f0915f; --c:#4fc592; --d:#bd92ec; --up:#4fc592; --down:#f0746c } }
* { box-sizing:border-box } body { margin:0; background:var(--paper); color:var(--ink); font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif }
main { max-width:1120px; margin:0 auto; padding:40px 24px 80px } h1 { font-size:28px; margin:0 0 4px; letter-spacing:-.01em }
h2 { font-size:18px; margin:44px 0 14px } .lead { color:var(--faint); margin:0 }
.facts { display:flex; flex-wrap:wrap; gap:6px 28px; margin:18px 0 0; color:var(--faint); font-size:14px } .facts b { color:var(--ink); font-weight:600 }
.tiles { display:grid; grid-template-columns:repeat(auto-fill,minmax(200px,1fr)); gap:12px; margin-top:28px }
.tile { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:14px 16px } .tile .name { color:var(--faint); font-size:13px }
.tile .value { font-size:26px; font-weight:650; letter-spacing:-.02em; font-variant-numeric:tabular-nums } .tile .was { font-size:13px; color:var(--faint) }
.up { color:var(--up) } .down { color:var(--down) }
.charts { display:grid; grid-template-columns:repeat(auto-fill,minmax(330px,1fr)); gap:16px } figure { margin:0 }
.chart { border:1px solid var(--line); border-radius:10px; padding:12px 14px 8px } .chart figcaption { font-size:14px; font-weight:600 }
.chart .unit { color:var(--faint); font-weight:400 } .legend { font-size:12px; color:var(--faint); min-height:18px } .legend i { display:inline-block; width:14px;
  height:3px; border-radius:2px; margin:0 5px 3px 0 } .legend span { margin-right:14px } svg { width:100%; height:auto; display:block }
svg text { fill:var(--faint); font-size:11px; font-variant-numeric:tabular-nums } .grid { stroke:var(--line); stroke-width:1 }
.sheet { background:#fff; border:1px solid var(--line); border-radius:10px; padding:8px; margin-bottom:18px; overflow-x:auto } .sheet img { display:block; max-width:100% }
.sheet figcaption { color:#68717d; font-size:13px; padding:0 4px 6px } table { border-collapse:collapse; font-size:14px; width:100% } .scroll { overflow-x:auto }
th,td { text-align:left; padding:5px 14px 5px 0; border-bottom:1px solid var(--line) } td.n,th.n { text-align:right; font-variant-numeric:tabular-nums }
th { color:var(--faint); font-weight:500 } summary { cursor:pointer; color:var(--faint) } pre { background:var(--card); border:1px solid var(--line);
  border-radius:10px; padding:14px; overflow-x:auto; font-size:12.5px }
"""


def write(workdir):
  """Writes `report.html` into a run's workdir; returns its path."""
  curves = metrics_lib.read(workdir)
  config = _read_json(workdir, 'config.json')
  path = os.path.join(workdir, 'report.html')
  with open(path + '.new', 'w', encoding='utf-8') as f:
    f.write(_page(os.path.basename(os.path.abspath(workdir)), curves, config, _sheets(workdir)))
  os.replace(path + '.new', path)
  return path


def chart(title, unit, series, width=360, height=200):
  """One chart as HTML. series: list of (label, steps, values); long ones are smoothed, with the raw line faint behind."""
  left, right, top, bottom = 46, 8, 8, 22
  xs = [x for _, steps, _ in series for x in steps]
  ys = [y for _, _, values in series for y in values]
  x0, x1 = min(xs), max(max(xs), min(xs) + 1)
  ticks = _ticks(min(ys), max(ys))
  y0, y1 = min(ticks[0], min(ys)), max(ticks[-1], max(ys))
  px = lambda x: left + (x - x0) / (x1 - x0) * (width - left - right)
  py = lambda y: height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom)
  out = []
  for y in ticks:
    out.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>'
               f'<text x="{left - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{_number(y, ticks[1] - ticks[0])}</text>')
  for x in _ticks(x0, x1, 5):
    if x0 <= x <= x1 and x == int(x):
      out.append(f'<text x="{px(x):.1f}" y="{height - 5}" text-anchor="{"end" if px(x) > width - 20 else "middle"}">{int(x)}</text>')
  for color, (label, steps, values) in zip(COLORS, series):
    line = lambda v: ' '.join(f'{px(x):.1f},{py(y):.1f}' for x, y in zip(steps, v))
    stroke = f'fill="none" stroke="{color}" stroke-linejoin="round" stroke-linecap="round"'
    if len(values) > 30:
      out.append(f'<polyline {stroke} stroke-width="1" opacity=".28" points="{line(values)}"/>')
      out.append(f'<polyline {stroke} stroke-width="2" points="{line(smoothed(values))}"/>')
    else:
      out.append(f'<polyline {stroke} stroke-width="2" points="{line(values)}"/>')
      out += [f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="2.6" fill="{color}"><title>{html.escape(label)}, step {x}: {y:.5g}</title></circle>'
              for x, y in zip(steps, values)]
  legend = ''.join(f'<span><i style="background:{color}"></i>{html.escape(label)}</span>'
                   for color, (label, _, _) in zip(COLORS, series)) if len(series) > 1 else ''
  unit = f' <span class="unit">{html.escape(unit)}</span>' if unit else ''
  return (f'<figure class="chart"><figcaption>{html.escape(title)}{unit}</figcaption><div class="legend">{legend}</div>'
          f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">{"".join(out)}</svg></figure>')


def smoothed(values):
  """Running means over a tenth of the curve, of what there is of it at its ends."""
  half = max(1, len(values) // 20)
  windows = (values[max(0, i - half):i + half + 1] for i in range(len(values)))
  return [sum(w) / len(w) for w in windows]


def _page(name, curves, config, sheets):
  evaluation = {key[5:]: curve for key, curve in curves.items() if key.startswith('eval/')}
  training = {key: curve for key, curve in curves.items() if not key.startswith('eval/')}
  body = [_head(name, training, config), _tiles(evaluation)]
  if len({step for steps, _ in evaluation.values() for step in steps}) > 1:
    body.append('<h2>Both tasks, measured</h2><div class="charts">' + ''.join(
        chart(_label(key), '', [(key, *curve)]) for key, curve in evaluation.items()) + '</div>')
  shown, charts = set(), []
  for title, unit, names in CURVES:
    found = [n for n in names if n in training]
    if found:
      shown |= set(found)
      charts.append(chart(title, unit, [(_series_label(n, found), *training[n]) for n in found]))
  if charts:
    body.append('<h2>Training</h2><div class="charts">' + ''.join(charts) + '</div>')
  if sheets:
    body.append('<h2>Candidates</h2><p class="lead">Some inputs of a step with their candidates and self-rewards, in nats a token: '
                '<span class="up">chosen</span> is the best of a group, <span class="down">rejected</span> the worst.</p><br>' + ''.join(sheets))
  rest = [chart(_label(n), '', [(n, *curve)]) for n, curve in training.items() if n not in shown]
  if rest:
    body.append('<h2>Everything else that was logged</h2><div class="charts">' + ''.join(rest) + '</div>')
  body.append(_tables(evaluation, config))
  return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
          f'<title>{html.escape(name)}: dual self-rewards</title><style>{STYLE}</style></head><body><main>{"".join(body)}</main></body></html>\n')


def _head(name, training, config):
  facts = []
  if config:
    m = config['config']['method']
    tasks = 'both tasks' if m['task'] == 'unified' else f'only {m["task"]}'
    facts += [('Model', config['about']['model']['name']), ('Objective', f'{m["objective"]}, {tasks}'),
              ('A step', f'{m["inputs_per_step"]} inputs × {m["group_size"]} candidates'),
              ('Learning rate', f'{m["learning_rate"]:g}'), ('Seed', m['seed']), ('Device', config['devices'])]
  done = max((steps[-1] for steps, _ in training.values()), default=0)
  facts.append(('Steps', f'{done} of {config["config"]["method"]["steps"]}' if config else done))
  if 'time/step_seconds' in training:
    facts.append(('Training', _duration(sum(training['time/step_seconds'][1]))))
  rows = ''.join(f'<span>{key} <b>{html.escape(str(value))}</b></span>' for key, value in facts)
  return (f'<h1>{html.escape(name)}</h1><p class="lead">A model that draws and describes, learning from its own reversed likelihoods.</p>'
          f'<div class="facts">{rows}</div>')


def _tiles(evaluation):
  tiles = []
  for key, (steps, values) in list(evaluation.items())[:MAX_TILES]:
    was = ''
    if steps[0] == 0 and len(values) > 1:
      change = values[-1] - values[0]
      better = (change >= 0) != any(word in key for word in LOWER_IS_BETTER)
      was = f'<div class="was">{values[0]:.3f} before, <span class="{"up" if better else "down"}">{change:+.3f}</span></div>'
    tiles.append(f'<div class="tile"><div class="name">{html.escape(_label(key))}</div><div class="value">{values[-1]:.3f}</div>{was}</div>')
  return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ''


def _tables(evaluation, config):
  out = []
  if evaluation:
    steps = sorted({step for at, _ in evaluation.values() for step in at})
    rows = []
    for key, (at, values) in evaluation.items():
      cells = dict(zip(at, values))
      rows.append(f'<tr><td>{html.escape(_label(key))}</td>' + ''.join(
          f'<td class="n">{cells[s]:.4f}</td>' if s in cells else '<td></td>' for s in steps) + '</tr>')
    out.append('<h2>All evaluations</h2><div class="scroll"><table><tr><th></th>' + ''.join(f'<th class="n">step {s}</th>' for s in steps)
               + f'</tr>{"".join(rows)}</table></div>')
  if config:
    out.append(f'<h2>Settings</h2><details><summary>Every key, the data and the versions</summary><pre>'
               f'{html.escape(json.dumps(config, indent=2, sort_keys=True))}</pre></details>')
  return ''.join(out)


def _sheets(workdir):
  """The first, the last and some sheets between, as figures with the PNG inside."""
  paths = sorted(glob.glob(os.path.join(workdir, 'samples', '*.png')))
  if len(paths) > MAX_SHEETS:
    paths = [paths[round(i * (len(paths) - 1) / (MAX_SHEETS - 1))] for i in range(MAX_SHEETS)]
  figures = []
  for path in paths:
    with open(path, 'rb') as f:
      data = base64.b64encode(f.read()).decode()
    step = int(os.path.splitext(os.path.basename(path))[0])
    figures.append(f'<figure class="sheet"><figcaption>Step {step}</figcaption><img alt="candidates of step {step}" '
                   f'src="data:image/png;base64,{data}"></figure>')
  return figures


def _ticks(low, high, count=4):
  """Round numbers that enclose [low, high], about `count` apart."""
  span = (high - low) or abs(high) or 1.0
  raw = span / count
  step = 10.0 ** math.floor(math.log10(raw))
  step *= next(m for m in (1, 2, 5, 10) if m * step >= raw * 0.999)
  first = math.floor(low / step + 1e-9)
  last = max(math.ceil(high / step - 1e-9), first + 1)
  return [i * step for i in range(first, last + 1)]


def _number(value, step):
  if value and (abs(value) >= 1e5 or step < 1e-4):
    return f'{value:.1e}'
  return f'{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}'


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


def _read_json(workdir, name):
  path = os.path.join(workdir, name)
  if not os.path.exists(path):
    return None
  with open(path, encoding='utf-8') as f:
    return json.load(f)
