"""Figures as SVG files that stand alone: points with intervals, and lines with bands."""

import html
from typing import NamedTuple

from dsr_jax.reporting import charts

COLOURS = ('#1f6fb2', '#d1612a', '#2b8a57', '#8a4fb0', '#b0902b', '#5b6670', '#c23b6b', '#3aa3a3')
INK, FAINT, GRID = '#1c2026', '#7e8690', '#e3e6ea'
DODGE, LABEL_WIDTH, LABEL_HEIGHT = 5, 70, 11  # pixels
FONT = 'font-family="system-ui, sans-serif"'


class Point(NamedTuple):
  """x, y, the interval of y (equal to y where there is none), a label and a series (an index of
  COLOURS).
  """

  x: float
  y: float
  low: float
  high: float
  label: str = ''
  series: int = 0


class Bar(NamedTuple):
  """A row of a dot plot: label, value with its interval, series."""

  label: str
  value: float
  low: float
  high: float
  series: int = 0


class Panel:
  """A plotting area with axes; coordinates in data units."""

  def __init__(self, title, x_title, y_title, xs, ys, width=430, height=290, left=54):
    self.width, self.height, self._left, self._top, self._right, self._bottom = (
      width,
      height,
      left,
      30,
      12,
      42,
    )
    self._x_ticks, self._y_ticks = (
      charts.ticks(min(xs), max(xs), 5),
      charts.ticks(min(ys), max(ys), 5),
    )
    self._x, self._y = (self._x_ticks[0], self._x_ticks[-1]), (self._y_ticks[0], self._y_ticks[-1])
    self._out = [_text(self._left, 16, title, size=13, bold=True)]
    for y in self._y_ticks:
      self._out.append(_line(self._left, self.y(y), width - self._right, self.y(y), GRID))
      self._out.append(_text(self._left - 6, self.y(y) + 4, f'{y:g}', 'end'))
    for x in self._x_ticks:
      self._out.append(_line(self.x(x), self._top, self.x(x), height - self._bottom, GRID))
      self._out.append(_text(self.x(x), height - self._bottom + 15, f'{x:g}', 'middle'))
    if self._y[0] < 0 < self._y[1]:
      self._out.append(_line(self._left, self.y(0), width - self._right, self.y(0), FAINT))
    self._out.append(_text((self._left + width - self._right) / 2, height - 8, x_title, 'middle'))
    middle = (self._top + height - self._bottom) / 2
    self._out.append(
      f'<g transform="translate(13 {middle:.1f}) rotate(-90)">{_text(0, 0, y_title, "middle")}</g>'
    )

  def x(self, value):
    low, high = self._x
    return self._left + (value - low) / (high - low) * (self.width - self._left - self._right)

  def y(self, value):
    low, high = self._y
    return (
      self.height
      - self._bottom
      - (value - low) / (high - low) * (self.height - self._top - self._bottom)
    )

  def points(self, points, labelled=None):
    """Dots with intervals; those of one x stand beside one another, and close ones have their
    labels in one column.

    labelled: the series whose labels are written, all if None; pointing at a dot shows any dot's.
    """
    placed = []
    for group in _neighbours(sorted(points), lambda p: self.x(p.x), DODGE):
      placed += [(self.x(p.x) + DODGE * (i - (len(group) - 1) / 2), p) for i, p in enumerate(group)]
    for x, p in placed:
      colour = COLOURS[p.series % len(COLOURS)]
      self._out.append(_line(x, self.y(p.low), x, self.y(p.high), colour, 1.2))
      told = f'{p.label}: {p.x:.3g}, {p.y:+.2f} ({p.low:+.2f} … {p.high:+.2f})'
      title = f'<title>{html.escape(told)}</title>'
      self._out.append(
        f'<circle cx="{x:.1f}" cy="{self.y(p.y):.1f}" r="4" fill="{colour}">{title}</circle>'
      )
    for group in _neighbours(
      [(x, p) for x, p in placed if p.label and labelled in (None, p.series)],
      lambda item: item[0],
      LABEL_WIDTH / 2,
    ):
      left = group[-1][0] > self.width - LABEL_WIDTH
      beside, anchor = (group[0][0] - 6, 'end') if left else (group[-1][0] + 6, 'start')
      for row, (_, p) in zip(_apart([self.y(p.y) + 4 for _, p in group], LABEL_HEIGHT), group):
        self._out.append(
          _text(beside, row, p.label, anchor, size=10, colour=COLOURS[p.series % len(COLOURS)])
        )

  def lines(self, series):
    """series: [(index of a colour, [Point])], each a line with its intervals as a band."""
    for index, points in series:
      colour = COLOURS[index % len(COLOURS)]
      around = [(p.x, p.high) for p in points] + [(p.x, p.low) for p in points[::-1]]
      self._out.append(f'<polygon fill="{colour}" opacity="0.13" points="{self._path(around)}"/>')
      self._out.append(
        f'<polyline fill="none" stroke="{colour}" stroke-width="2" '
        f'points="{self._path((p.x, p.y) for p in points)}"/>'
      )
      self._out += [
        f'<circle cx="{self.x(p.x):.1f}" cy="{self.y(p.y):.1f}" r="2.6" fill="{colour}"/>'
        for p in points
      ]

  def _path(self, points):
    return ' '.join(f'{self.x(x):.1f},{self.y(y):.1f}' for x, y in points)

  def svg(self):
    return ''.join(self._out)


def _neighbours(items, key, within):
  """Groups of sorted items whose keys lie less than `within` from the item before."""
  groups = []
  for item in items:
    if groups and key(item) - key(groups[-1][-1]) < within:
      groups[-1].append(item)
    else:
      groups.append([item])
  return groups


def _apart(places, gap):
  """The places, moved so that any two are `gap` apart, in the same order and as a whole where they
  were.
  """
  order = sorted(range(len(places)), key=places.__getitem__)
  moved = []
  for i in order:
    moved.append(max(places[i], moved[-1] + gap) if moved else places[i])
  shift = sum(m - places[i] for i, m in zip(order, moved)) / len(places)
  out = [0.0] * len(places)
  for i, m in zip(order, moved):
    out[i] = m - shift
  return out


def dots(title, unit, bars, width=560):
  """A dot plot, a row a bar, with a line at 0: (SVG, width, height)."""
  left, top, row, right = 250, 30, 19, 14
  height = top + row * len(bars) + 40
  values = [v for b in bars for v in (b.low, b.high)] + [0.0]
  ticks = charts.ticks(min(values), max(values), 5)

  def x(v):
    return left + (v - ticks[0]) / (ticks[-1] - ticks[0]) * (width - left - right)

  out = [_text(left, 16, title, size=13, bold=True)]
  for tick in ticks:
    out += [
      _line(x(tick), top, x(tick), height - 34, FAINT if tick == 0 else GRID),
      _text(x(tick), height - 20, f'{tick:g}', 'middle'),
    ]
  for i, b in enumerate(bars):
    y, colour = top + row * (i + 0.5), COLOURS[b.series % len(COLOURS)]
    out.append(_text(left - 8, y + 4, b.label, 'end'))
    out.append(_line(x(b.low), y, x(b.high), y, colour, 1.6))
    words = f'{b.value:+.2f} ({b.low:+.2f} … {b.high:+.2f})'
    out.append(
      f'<circle cx="{x(b.value):.1f}" cy="{y:.1f}" r="4" '
      f'fill="{colour}"><title>{words}</title></circle>'
    )
  out.append(_text((left + width - right) / 2, height - 5, unit, 'middle'))
  return ''.join(out), width, height


def page(parts, legend=()):
  """Panels beside one another, [(SVG, width, height)], and a legend [(label, index of a colour)]
  below -> the text of an SVG file.
  """
  width, height = sum(w for _, w, _ in parts), max(h for _, _, h in parts)
  out, left = [], 0
  for body, w, _ in parts:
    out.append(f'<g transform="translate({left} 0)">{body}</g>')
    left += w
  at, row = 54, height + 12
  for label, index in legend:
    if at + 8 * len(label) > width:
      at, row = 54, row + 18
    out.append(
      f'<rect x="{at}" y="{row - 9}" width="10" height="10" '
      f'fill="{COLOURS[index % len(COLOURS)]}"/>' + _text(at + 15, row, label)
    )
    at += 34 + 7 * len(label)
  total = row + 12 if legend else height
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" width="{width}" '
    f'height="{total}">'
    f'<rect width="{width}" height="{total}" fill="#ffffff"/>{"".join(out)}</svg>\n'
  )


def _text(x, y, words, anchor='start', size=11, colour=INK, bold=False):
  weight = ' font-weight="600"' if bold else ''
  style = f'{FONT} font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}'
  return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{html.escape(str(words))}</text>'


def _line(x0, y0, x1, y1, colour, width=1.0):
  return (
    f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="{colour}" '
    f'stroke-width="{width}"/>'
  )
