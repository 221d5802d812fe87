"""The layout of small line charts. `templates/parts.html.j2` draws them as SVG, and the stylesheet
colors them.

Coordinates are pixels of a WIDTH x HEIGHT drawing, y down.
"""

import dataclasses
import math
import statistics
from typing import NamedTuple

WIDTH, HEIGHT = 360, 216
RIGHT, TOP, BOTTOM = 10, 8, 38
DIGIT = 6.8  # pixels of a digit on an axis
LONG = 30  # curves with more points are drawn as a running median over the faint raw line
RESOLUTION = 1e-6  # of the largest value; curves that vary less are drawn as constants

# The subject of a series, which sets its color (style.css): a color has the same meaning on all
# pages. Green and red are not for series; they mean better and worse, or chosen and rejected.
ROLES = ('generation', 'understanding', 'initial', 'judge', 'other', 'second')


class Series(NamedTuple):
  """A curve.

  Attributes:
    label: in the legend.
    role: one of ROLES.
    steps, values: of equal length.
    low, high: the interval of each value, if any.
    joined: whether a line joins the points; otherwise they are hollow and not joined.
    smooth: whether a long curve may be smoothed; False for a schedule, which has no noise.
  """

  label: str
  role: str
  steps: list
  values: list
  low: list | None = None
  high: list | None = None
  joined: bool = True
  smooth: bool = True


class Tick(NamedTuple):
  """A tick. at: pixels along its axis. anchor: SVG's text-anchor."""

  at: float
  label: str
  anchor: str = 'end'


class Dot(NamedTuple):
  """A point with its interval (`low` and `high` are pixels, or None) and its tooltip."""

  x: float
  y: float
  low: float | None
  high: float | None
  words: str


class Curve(NamedTuple):
  """A curve. raw: the points of the faint line, or ''. line: the points of the thick line."""

  label: str
  role: str
  joined: bool
  raw: str
  line: str
  dots: list[Dot]


@dataclasses.dataclass(frozen=True)
class Chart:
  """What the template draws.

  note: how to read it. flat: the value of curves that do not change, as text, or ''.
  """

  title: str
  unit: str
  x_title: str
  left: float  # of the plotting area
  x_ticks: list[Tick]
  y_ticks: list[Tick]
  curves: list[Curve]
  width: int = WIDTH
  height: int = HEIGHT
  right: int = WIDTH - RIGHT
  bottom: int = HEIGHT - BOTTOM
  note: str = ''
  flat: str = ''


class _Axis(NamedTuple):
  """Maps [low, high] to the pixels from `start` to `end`."""

  low: float
  high: float
  start: float
  end: float

  def at(self, value: float) -> float:
    return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def chart(
  title: str, unit: str, series: list[Series], x_title: str = 'step', note: str = ''
) -> Chart:
  """Lays out a chart. series: at least one, each with at least one point, all finite."""
  x_values = [x for one in series for x in one.steps]
  y_values = [y for one in series for y in (*one.values, *(one.low or ()), *(one.high or ()))]

  y_marks = _y_marks(min(y_values), max(y_values))
  y_labels, exponent = tick_labels(y_marks)
  left = 10 + DIGIT * max(len(label) for label in y_labels)
  y_axis = _Axis(
    low=min(y_marks[0], min(y_values)),
    high=max(y_marks[-1], max(y_values)),
    start=HEIGHT - BOTTOM,
    end=TOP,
  )
  x_axis = _Axis(
    low=min(x_values), high=max(*x_values, min(x_values) + 1), start=left, end=WIDTH - RIGHT
  )
  return Chart(
    title=title,
    unit=' '.join(part for part in (unit, _power(exponent)) if part),
    x_title=x_title,
    left=left,
    x_ticks=_x_ticks(x_axis),
    y_ticks=[Tick(y_axis.at(y), label) for y, label in zip(y_marks, y_labels)],
    curves=[_curve(one, x_axis, y_axis) for one in series],
    note=note,
    flat=_flat(series),
  )


def _flat(series: list[Series]) -> str:
  """The values of the curves if each is constant over several steps; '' if one of them changes."""
  if any(len(one.values) < 2 or max(one.values) != min(one.values) for one in series):
    return ''
  return ', '.join(f'{one.values[0]:g}' for one in series)


def smoothed(values: list) -> list:
  """Running medians over a tenth of the curve, with smaller windows at its ends.

  A mean would turn a single spike into a plateau as wide as the window.
  """
  half = max(1, len(values) // 20)
  return [statistics.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
  """Round numbers that enclose [low, high], with about `count` steps."""
  span = (high - low) or abs(high) or 1.0
  step = 10.0 ** math.floor(math.log10(span / count))
  step *= next(m for m in (1, 2, 5, 10) if m * step >= span / count * 0.999)
  first = math.floor(low / step + 1e-9)
  last = max(math.ceil(high / step - 1e-9), first + 1)
  return [i * step for i in range(first, last + 1)]


def tick_labels(values: list[float]) -> tuple[list[str], int]:
  """(labels of evenly spaced ticks, the power of ten by which to multiply all of them).

  No two labels are equal: they have as many digits as their distance requires.
  """
  largest = max(abs(value) for value in values)
  exponent = 0
  if largest >= 1e5 or largest < 1e-2:
    exponent = math.floor(math.log10(largest))
  distance = (values[1] - values[0]) / 10.0**exponent
  decimals = max(0, -math.floor(math.log10(distance) + 1e-9))
  labels = [f'{value / 10.0**exponent:.{decimals}f}' for value in values]
  # A zero that rounding made slightly negative has no sign.
  return [label.lstrip('-') if float(label) == 0 else label for label in labels], exponent


def _y_marks(low: float, high: float) -> list[float]:
  """Ticks of the y axis: around a constant, and within [0, 1] if all values are, because shares
  cannot be outside it.
  """
  share = low >= 0 and high <= 1
  if high - low <= RESOLUTION * max(abs(low), abs(high)):
    room = abs(high) / 2 or 1.0
    low, high = low - room, high + room
  marks = ticks(low, high)
  return [y for y in marks if -1e-9 <= y <= 1 + 1e-9] if share else marks


def _x_ticks(axis: _Axis) -> list[Tick]:
  """Whole numbers within the axis; the last label stays inside the drawing."""
  found = []
  count = 5 if axis.high < 1e5 else 3
  for x in ticks(axis.low, axis.high, count):
    if axis.low <= x <= axis.high and abs(x - round(x)) < 1e-9:
      label, at = str(round(x)), axis.at(x)
      beyond = at + DIGIT * len(label) / 2 > WIDTH
      found.append(Tick(WIDTH if beyond else at, label, 'end' if beyond else 'middle'))
  return found


def _curve(one: Series, x_axis: _Axis, y_axis: _Axis) -> Curve:
  def line(values):
    return ' '.join(f'{x_axis.at(x):.1f},{y_axis.at(y):.1f}' for x, y in zip(one.steps, values))

  many = len(one.values) > LONG
  smooth = many and one.smooth and one.joined
  dots = (
    [] if many and one.joined else [_dot(one, i, x_axis, y_axis) for i in range(len(one.values))]
  )
  return Curve(
    label=one.label,
    role=one.role,
    joined=one.joined,
    raw=line(one.values) if smooth else '',
    line=line(smoothed(one.values) if smooth else one.values) if one.joined else '',
    dots=dots,
  )


def _dot(one: Series, i: int, x_axis: _Axis, y_axis: _Axis) -> Dot:
  words = f'{one.label}, {one.steps[i]}: {one.values[i]:.5g}'
  low = high = None
  if one.low and one.high:
    words += f' ({one.low[i]:.5g} to {one.high[i]:.5g})'
    low, high = y_axis.at(one.low[i]), y_axis.at(one.high[i])
  return Dot(x_axis.at(one.steps[i]), y_axis.at(one.values[i]), low, high, words)


def _power(exponent: int) -> str:
  if not exponent:
    return ''
  return '× 10' + str(exponent).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))
