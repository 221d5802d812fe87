"""The study's figures, drawn from whatever cells there are: each function gives the text of an SVG
file, or None without any.
"""

from dsr_jax.reporting import svg
from dsr_jax.scenes import grammar
from dsr_jax.study import variants as variants_lib
from dsr_jax.study.claims import prefix_of
from dsr_jax.study.law import SCORERS
from dsr_jax.study.scores import MEASURES

FAMILIES = (variants_lib.PAPER, variants_lib.CONTROL, variants_lib.LAW)
CURVES = ('unified', 'generation', 'understanding', 'grpo', 'separate')
TASKS = {'generation': 'generation', 'understanding': 'description/f1'}
CATEGORY_CURVES = ('unified', 'generation', 'grpo', 'judge')


def gains(results, base):
  """Every variant's difference to the base: generation, and F1 of descriptions."""
  parts = []
  for measure in TASKS.values():
    bars = []
    for variant in results.variants(base):
      difference = None if variant == 'base' else results.difference(base, variant, 'base', measure)
      if difference is not None:
        low, high = difference.interval
        v = variants_lib.VARIANTS[variant]
        bars.append(
          svg.Bar(v.title, 100 * difference.value, 100 * low, 100 * high, FAMILIES.index(v.group))
        )
    if bars:
      parts.append(
        svg.dots(MEASURES[measure].title, 'points gained over the base, with 95 % intervals', bars)
      )
  return svg.page(parts, [(name, i) for i, name in enumerate(FAMILIES)]) if parts else None


def law(points):
  """Gain against the pairwise accuracy of the reward; a colour a base, names beside the points of
  the base that has most of them.
  """
  parts, bases = (
    [],
    sorted(
      {p['base'] for p in points}, key=lambda b: next(p['skill'] for p in points if p['base'] == b)
    ),
  )
  for task in TASKS:
    of = [p for p in points if p['task'] == task]
    if not of:
      continue
    dots = [
      svg.Point(
        p['accuracy']['accuracy'],
        100 * p['gain']['value'],
        100 * p['gain']['low'],
        100 * p['gain']['high'],
        p['variant'],
        bases.index(p['base']),
      )
      for p in of
    ]
    panel = svg.Panel(
      task,
      'pairs of candidates that the reward orders as the judge does',
      'points gained',
      [0.45, 1.0, *(d.x for d in dots)],
      [0.0, *(v for d in dots for v in (d.low, d.high))],
      width=520,
      height=380,
    )
    named = [d.series for d in dots]
    panel.points(dots, max(named, key=named.count))
    parts.append((panel.svg(), panel.width, panel.height))

  def skill(b):
    return 100 * next(p['skill'] for p in points if p['base'] == b)

  return (
    svg.page(parts, [(f'{b} (base {skill(b):.0f})', i) for i, b in enumerate(bases)])
    if parts
    else None
  )


def evolution(results, base):
  """Both tasks over training, as differences to the base on the lists of quick evaluations."""
  parts, shown = [], [v for v in CURVES if len(results.steps(base, v)) > 1]
  for measure in TASKS.values():
    series = [(CURVES.index(v), _curve(results, base, v, measure)) for v in shown]
    series = [(i, points) for i, points in series if points]
    if series:
      every = [v for _, points in series for p in points for v in (p.low, p.high)]
      panel = svg.Panel(
        MEASURES[measure].title,
        'share of the run',
        'points gained over the base',
        [0, 1],
        [0.0, *every],
      )
      panel.lines(series)
      parts.append((panel.svg(), panel.width, panel.height))
  return (
    svg.page(parts, [(variants_lib.VARIANTS[v].title, CURVES.index(v)) for v in shown])
    if parts
    else None
  )


def _curve(results, base, variant, measure):
  steps = results.steps(base, variant)
  quick = [s for s in steps if s not in (0, steps[-1])]
  prefix = prefix_of(results, base, variant, quick[0], measure) if quick else None

  def at(step):
    return results.score(base, variant, measure, step=step, prefix=prefix)

  out = []
  for step in steps:
    difference = at(step) - at(0)
    low, high = difference.interval
    out.append(svg.Point(step / steps[-1], 100 * difference.value, 100 * low, 100 * high))
  return out


def scorers(orders, title):
  """orders: `law.scorers_over_training`: pairwise accuracy of live, frozen and partner
  scorers over training.
  """
  parts = []
  for task in TASKS:
    series = [
      (
        SCORERS.index(name),
        [svg.Point(p['step'], p['accuracy'], p['low'], p['high']) for p in found],
      )
      for name, found in orders.get(task, {}).items()
    ]
    if series:
      every = [v for _, points in series for p in points for v in (p.low, p.high)]
      last = max(p.x for _, points in series for p in points)
      panel = svg.Panel(
        f'{task}: {title}', 'step', 'pairs ordered as the judge does', [0, last or 1], every
      )
      panel.lines(series)
      parts.append((panel.svg(), panel.width, panel.height))
  return svg.page(parts, [(name, i) for i, name in enumerate(SCORERS)]) if parts else None


def categories(results, base):
  """Gains of each of GenEval's tasks, some variants."""
  bars = []
  for task in grammar.GENEVAL:
    for i, variant in enumerate(CATEGORY_CURVES):
      difference = results.difference(base, variant, 'base', f'generation/{task}')
      if difference is not None:
        low, high = difference.interval
        bars.append(svg.Bar(f'{task}, {variant}', 100 * difference.value, 100 * low, 100 * high, i))
  return (
    svg.page([svg.dots('gain by task', 'points gained over the base, with 95 % intervals', bars)])
    if bars
    else None
  )
