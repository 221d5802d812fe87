"""The study's figures, drawn with matplotlib from the existing cells. Each function returns a
Figure, or None without any cells; `svg` converts one to text.
"""

import io
import textwrap
from typing import NamedTuple

from dsr_jax.errors import InputError
from dsr_jax.scenes import grammar
from dsr_jax.study import law as law_lib
from dsr_jax.study import variants as variants_lib
from dsr_jax.study.claims import prefix_of
from dsr_jax.study.scores import MEASURES

try:
  import matplotlib
  from matplotlib.figure import Figure
  from matplotlib.patches import Patch
except ImportError:  # only the study needs matplotlib, and checks for it (`check_matplotlib`)
  matplotlib = None

FAMILIES = (variants_lib.PAPER, variants_lib.CONTROL, variants_lib.LAW)
CURVES = ('unified', 'generation', 'understanding', 'grpo', 'separate')
TASKS = law_lib.TASKS
CATEGORY_CURVES = ('unified', 'generation', 'grpo', 'judge')
COLORS = ('#1f6fb2', '#d1612a', '#2b8a57', '#8a4fb0', '#b0902b', '#5b6670', '#c23b6b', '#3aa3a3')
FAINT = '#7e8690'
GAINED = 'points gained over the base'
CAPTION_DENSITY = 16.8  # characters per inch in a line of a caption
DODGE = 0.012  # of the run's length, between curves over the same steps
LABEL_GAP = 0.052  # of a panel's height, between two names in the margin

STYLE = {
  'font.size': 8.5,
  'axes.edgecolor': FAINT,
  'axes.axisbelow': True,
  'axes.grid': True,
  'grid.color': '#e3e6ea',
  'axes.spines.top': False,
  'axes.spines.right': False,
  'legend.frameon': False,
  # Text stays text. It is laid out in DejaVu Sans, which is wider than other fonts that a reader
  # may have, so that labels never overlap.
  'font.family': 'DejaVu Sans',
  'svg.fonttype': 'none',
  'svg.hashsalt': 'dsr_jax',  # the same figure is the same file
}


class Point(NamedTuple):
  """A point: x, and y with its interval."""

  x: float
  y: float
  low: float
  high: float


def check_matplotlib():
  """InputError if the figures cannot be drawn. Called before any cell runs."""
  if matplotlib is None:
    raise InputError(
      "the study's figures need matplotlib, which is not installed; "
      "pip install 'dsr_jax[study]', or pip install matplotlib"
    )


def svg(figure) -> str:
  """A figure as the text of an SVG file; the same figure gives the same text."""
  out = io.StringIO()
  with matplotlib.rc_context(STYLE):
    figure.savefig(out, format='svg', metadata={'Date': None, 'Creator': None})
  return out.getvalue()


# The figures.


def gains(results, base):
  """Every variant's difference from the base: generation, and F1 of descriptions."""
  found = {
    measure: _differences(results, base, results.variants(base), measure)
    for measure in TASKS.values()
  }
  rows = [v for v in results.variants(base) if any(v in points for points in found.values())]
  if not rows:
    return None
  figure, panels = _figure(len(found), height=1.3 + 0.2 * len(rows), sharey=True)
  for panel, (measure, points) in zip(panels, found.items()):
    for variant, point in points.items():
      family = FAMILIES.index(variants_lib.VARIANTS[variant].group)
      _dot(panel, point._replace(x=rows.index(variant)), COLORS[family], sideways=True)
    _title(panel, MEASURES[measure].title)
    panel.set_xlabel(GAINED)
    panel.axvline(0, color=FAINT, linewidth=1)
  titles = [variants_lib.VARIANTS[v].title for v in rows]
  panels[0].set_yticks(range(len(rows)), titles)
  panels[0].set_ylim(len(rows) - 0.5, -0.5)
  _legend(figure, list(zip(FAMILIES, COLORS)))
  _caption(figure, f'Base {base}. Each variant minus the base, on the whole lists. Bars: 95 %.')
  return figure


def law(points):
  """Gain against the pairwise accuracy of the reward, one color per base.

  The line fits the degraded judges (`law.line`), which differ only in accuracy. The points of the
  base with most points have their names in the margin.
  """
  if not points:
    return None
  bases = sorted({p['base'] for p in points}, key=lambda base: _skill(points, base))
  tasks = [task for task in TASKS if any(p['task'] == task for p in points)]
  named = max(bases, key=lambda base: sum(p['base'] == base for p in points))
  figure, panels = _figure(len(tasks), height=4.9, panel_width=5.4)
  for panel, task in zip(panels, tasks):
    names = []
    for p in points:
      if p['task'] != task:
        continue
      gain = p['gain']
      point = Point(
        p['accuracy']['accuracy'], *(100 * gain[key] for key in ('value', 'low', 'high'))
      )
      marker = 'o' if law_lib.is_degraded_judge(p) else 'D'
      _dot(panel, point, COLORS[bases.index(p['base'])], marker=marker)
      if p['base'] == named:
        names.append((point.x, point.y, p['variant']))
    line = law_lib.line(points, task)
    if line:
      ends = [0.45, 1.0]
      panel.plot(ends, [100 * (line['intercept'] + line['slope'] * x) for x in ends], color=FAINT)
    panel.axhline(0, color=FAINT, linewidth=1, linestyle=':')
    _title(panel, task)
    panel.set(
      xlabel='pairs of candidates that the reward orders as the judge does',
      ylabel=GAINED,
      xlim=(0.43, 1.02),
    )
    panel.margins(y=0.08)
    _names_in_margin(panel, names)
  labels = [
    (f'base {base} (scores {100 * _skill(points, base):.0f})', color)
    for base, color in zip(bases, COLORS)
  ]
  _legend(figure, labels)
  _caption(
    figure,
    'Each point is a variant on a base: how often its reward orders two candidates as the exact '
    'judge does, and how much training with it gained, with 95 % intervals. Circles are judges '
    'with some of their verdicts reversed, which differ in nothing else; the line is the '
    'least-squares fit to them. Diamonds are all other rewards, '
    f'each at its tuned learning rate. Names: base {named}.',
  )
  return figure


def evolution(results, base):
  """Both tasks over training, as differences from the base: lines for the short lists that every
  evaluation has, and at the end the whole lists, as in the tables.
  """
  shown = [v for v in CURVES if len(results.steps(base, v)) > 1]
  curves = {
    measure: {v: _curve(results, base, v, measure) for v in shown} for measure in TASKS.values()
  }
  curves = {m: {v: c for v, c in found.items() if c} for m, found in curves.items()}
  curves = {measure: found for measure, found in curves.items() if found}
  if not curves:
    return None
  figure, panels = _figure(len(curves), height=4.2)
  notes = []
  for panel, (measure, found) in zip(panels, curves.items()):
    for variant, points in found.items():
      color = COLORS[CURVES.index(variant)]
      aside = DODGE * (CURVES.index(variant) - (len(CURVES) - 1) / 2)
      _line_with_bars(panel, [point._replace(x=point.x + aside) for point in points], color)
      whole = results.difference(base, variant, 'base', measure)
      if whole is not None:
        low, high = whole.interval
        at = 1.08 + 0.03 * CURVES.index(variant)
        point = Point(at, 100 * whole.value, 100 * low, 100 * high)
        _dot(panel, point, color, hollow=True)
    panel.axhline(0, color=FAINT, linewidth=1, linestyle=':')
    _title(panel, _heading(measure))
    panel.set(xlabel='share of the run', ylabel=GAINED)
    panel.set_xticks([0, 0.25, 0.5, 0.75, 1])
    panel.set_xlim(-0.06, 1.24)
    notes.append(_lists(results, base, next(iter(found)), measure))
  titles = [variants_lib.VARIANTS[v].title for v in shown]
  _legend(figure, [(title, COLORS[CURVES.index(v)]) for title, v in zip(titles, shown)])
  _caption(
    figure,
    f'Base {base}. Lines: the short lists that all evaluations have, minus the base '
    'on the same short lists. Hollow, right of the end: the last step minus the base on the whole '
    'lists, as in the tables; where the two differ, the short lists are not representative '
    'of the whole lists. '
    f'{" ".join(notes)} Bars: 95 %; curves are shifted a little so that their bars do not '
    'overlap.',
  )
  return figure


def scorers(orders, title):
  """Pairwise accuracy of live, frozen and partner scorers over training.

  orders: from `law.scorers_over_training`.
  """
  tasks = [task for task in TASKS if orders.get(task)]
  if not tasks:
    return None
  figure, panels = _figure(len(tasks), height=3.5)
  for panel, task in zip(panels, tasks):
    for name, found in orders[task].items():
      points = [Point(p['step'], p['accuracy'], p['low'], p['high']) for p in found]
      _line(panel, points, COLORS[law_lib.SCORERS.index(name)])
    _title(panel, f'{task}: {title}')
    panel.set(xlabel='step', ylabel='pairs ordered as the judge does')
  shown = [name for name in law_lib.SCORERS if any(name in orders[task] for task in tasks)]
  _legend(figure, [(name, COLORS[law_lib.SCORERS.index(name)]) for name in shown])
  _caption(
    figure,
    'How often a scorer orders two samples of the policy as the exact judge does: the policy at '
    'that step (live), the initial model (frozen), or the other of two models (partner). '
    'Bands: 95 %.',
  )
  return figure


def categories(results, base):
  """Gains in each of GenEval's tasks, for some variants."""
  figure = panel = None
  shown = []
  for i, variant in enumerate(CATEGORY_CURVES):
    measures = {task: f'generation/{task}' for task in grammar.GENEVAL}
    found = {
      task: _difference(results, base, variant, measure) for task, measure in measures.items()
    }
    found = {task: point for task, point in found.items() if point}
    if not found:
      continue
    if figure is None:
      figure, (panel,) = _figure(1, height=4.0, panel_width=7.0)
    shown.append((variants_lib.VARIANTS[variant].title, COLORS[i]))
    for task, point in found.items():
      row = list(grammar.GENEVAL).index(task) + 0.18 * (i - (len(CATEGORY_CURVES) - 1) / 2)
      _dot(panel, point._replace(x=row), COLORS[i], sideways=True)
  if figure is None:
    return None
  panel.set_yticks(range(len(grammar.GENEVAL)), grammar.GENEVAL)
  panel.set_ylim(len(grammar.GENEVAL) - 0.5, -0.5)
  _title(panel, 'gain by task')
  panel.set_xlabel(GAINED)
  panel.axvline(0, color=FAINT, linewidth=1)
  _legend(figure, shown)
  _caption(figure, f'Base {base}. Each variant minus the base, on the whole list. Bars: 95 %.')
  return figure


# The data of the figures.


def _differences(results, base, variants, measure) -> dict[str, Point]:
  found = {v: _difference(results, base, v, measure) for v in variants if v != 'base'}
  return {variant: point for variant, point in found.items() if point}


def _difference(results, base, variant, measure) -> Point | None:
  """A variant minus the base, in points."""
  difference = results.difference(base, variant, 'base', measure)
  if difference is None:
    return None
  low, high = difference.interval
  return Point(0, 100 * difference.value, 100 * low, 100 * high)


def _short_list(results, base, variant, measure) -> int | None:
  """The length of the quick evaluations: rows per task, or images. None if there are none."""
  steps = results.steps(base, variant)
  quick = [step for step in steps if step not in (0, steps[-1])]
  return prefix_of(results, base, variant, quick[0], measure) if quick else None


def _curve(results, base, variant, measure) -> list[Point]:
  """The differences from step 0, all on the same list."""
  steps = results.steps(base, variant)
  prefix = _short_list(results, base, variant, measure)
  scores = [results.score(base, variant, measure, step=s, prefix=prefix) for s in steps]
  if any(score is None for score in scores):
    return []
  points = []
  for step, score in zip(steps, scores):
    difference = score - scores[0]
    low, high = difference.interval
    points.append(Point(step / steps[-1], 100 * difference.value, 100 * low, 100 * high))
  return points


def _lists(results, base, variant, measure) -> str:
  """The lengths of both lists, and the base's score on each."""
  prefix = _short_list(results, base, variant, measure)
  if prefix is None:
    return ''
  rows = len(results.rows(base, 'base', results.seeds(base, 'base')[0])[MEASURES[measure].rows])
  short, things = prefix, 'images'
  if not measure.startswith('description'):
    short, things = prefix * len(grammar.GENEVAL), 'prompts'
  scores = [
    100 * results.score(base, 'base', measure, step=0, prefix=p).value for p in (prefix, None)
  ]
  return (
    f'{_heading(measure)}: {short} and {rows} {things}, on which the base scores '
    f'{scores[0]:.1f} and {scores[1]:.1f}.'
  )


def _heading(measure) -> str:
  return MEASURES[measure].title.replace('f1', 'F1')


def _skill(points, base) -> float:
  return next(p['skill'] for p in points if p['base'] == base)


# Drawing.


def _figure(panels: int, height: float, panel_width: float = 4.4, sharey: bool = False):
  """(Figure, its panels from left to right). Sizes are in inches."""
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(panel_width * panels, height), layout='constrained')
    axes = figure.subplots(1, panels, squeeze=False, sharey=sharey)
  return figure, axes[0]


def _title(panel, words):
  panel.set_title(words, loc='left', fontsize=10, fontweight='bold')


def _dot(panel, point, color, marker='o', hollow=False, sideways=False):
  """A point with its interval. sideways: in row x of a plot with horizontal values."""
  errors = [[point.y - point.low], [point.high - point.y]]
  style = dict(color=color, marker=marker, markersize=4.5, elinewidth=1.2, linestyle='none')
  if hollow:
    style['markerfacecolor'] = 'white'
  if sideways:
    panel.errorbar([point.y], [point.x], xerr=errors, **style)
  else:
    panel.errorbar([point.x], [point.y], yerr=errors, **style)


def _line(panel, points, color):
  """A line with its intervals as a band."""
  x, y, low, high = zip(*points)
  panel.fill_between(x, low, high, color=color, alpha=0.13, linewidth=0)
  panel.plot(x, y, color=color, linewidth=1.8, marker='o', markersize=3.5)


def _line_with_bars(panel, points, color):
  """A line with the interval of each point as a bar: bands of close curves would be unreadable."""
  x, y, low, high = zip(*points)
  panel.vlines(x, low, high, color=color, alpha=0.5, linewidth=1.1)
  panel.plot(x, y, color=color, linewidth=1.8, marker='o', markersize=3.5)


def _names_in_margin(panel, names):
  """Names of points (x, y, name) in one column right of the panel, each with a thin line."""
  low, high = panel.get_ylim()
  names = sorted(names, key=lambda item: item[1])
  rows = apart([(y - low) / (high - low) for _, y, _ in names], LABEL_GAP)
  for (x, y, name), row in zip(names, rows):
    panel.annotate(
      name,
      xy=(x, y),
      xytext=(1.03, row),
      textcoords='axes fraction',
      fontsize=7.5,
      va='center',
      arrowprops=dict(arrowstyle='-', color='#c5cad1', linewidth=0.5, shrinkA=1, shrinkB=3),
      annotation_clip=False,
    )


def apart(places: list[float], gap: float) -> list[float]:
  """Ascending places, moved to be at least `gap` apart, within [0, 1] if there is room."""
  moved = []
  for place in places:
    moved.append(max(place, moved[-1] + gap) if moved else max(place, 0.0))
  top = 1.0
  for i in reversed(range(len(moved))):
    moved[i] = min(moved[i], top)
    top = moved[i] - gap
  return moved


def _legend(figure, entries):
  """entries: (words, color)."""
  with matplotlib.rc_context(STYLE):
    handles = [Patch(color=color, label=words) for words, color in entries]
    figure.legend(handles=handles, loc='outside upper left', ncols=3, fontsize=8)


def _caption(figure, words):
  """A caption below, so that the figure can be understood alone."""
  width = round(CAPTION_DENSITY * figure.get_figwidth())
  figure.supxlabel('\n'.join(textwrap.wrap(words, width)), x=0.01, ha='left', fontsize=7.5)
