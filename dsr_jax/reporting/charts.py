"""Small line charts as SVG inside HTML: round numbers on the axes, smoothed curves, a legend. The
page styles them.
"""

import html
import math

COLORS = ('var(--a)', 'var(--b)', 'var(--c)', 'var(--d)')
WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 22
LONG = 30  # more points than this are drawn as a smoothed line over the faint raw one


def chart(title, unit, series, band=None):
  """One chart as HTML.

  series: list of (label, steps, values), at most four. band: lower and upper values around the
  first of them.
  """
  xs = [x for _, steps, _ in series for x in steps]
  ys = [y for values in [*(v for _, _, v in series), *(band or ())] for y in values]
  x0, x1 = min(xs), max(max(xs), min(xs) + 1)
  y_ticks = ticks(min(ys), max(ys))
  y0, y1 = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

  def px(x):
    return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

  def py(y):
    return HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

  def points(steps, values):
    return ' '.join(f'{px(x):.1f},{py(y):.1f}' for x, y in zip(steps, values))

  out = [_grid_line(py(y), _number(y, y_ticks[1] - y_ticks[0])) for y in y_ticks]
  out += [_step_label(px(x), x) for x in ticks(x0, x1, 5) if x0 <= x <= x1 and x == int(x)]
  if band:
    steps = series[0][1]
    around = f'{points(steps, band[0])} {points(steps[::-1], band[1][::-1])}'
    out.append(f'<polygon fill="{COLORS[0]}" opacity=".14" points="{around}"/>')
  for color, (label, steps, values) in zip(COLORS, series):
    if len(values) > LONG:
      out.append(_line(points(steps, values), color, 'stroke-width="1" opacity=".28"'))
      out.append(_line(points(steps, smoothed(values)), color, 'stroke-width="2"'))
    else:
      out.append(_line(points(steps, values), color, 'stroke-width="2"'))
      out += [
        f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="2.6" fill="{color}">'
        f'<title>{html.escape(label)}, step {x}: {y:.5g}</title></circle>'
        for x, y in zip(steps, values)
      ]

  labels = [label for label, _, _ in series] if len(series) > 1 else []
  legend = ''.join(
    f'<span><i style="background:{color}"></i>{html.escape(label)}</span>'
    for color, label in zip(COLORS, labels)
  )
  unit = f' <span class="unit">{html.escape(unit)}</span>' if unit else ''
  title = html.escape(title)
  return (
    f'<figure class="chart"><figcaption>{title}{unit}</figcaption><div '
    f'class="legend">{legend}</div>'
    f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
    f'aria-label="{title}">{"".join(out)}</svg></figure>'
  )


def smoothed(values):
  """Running means over a tenth of the curve, of what there is of it at its ends."""
  half = max(1, len(values) // 20)
  windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
  return [sum(w) / len(w) for w in windows]


def ticks(low, high, count=4):
  """Round numbers that enclose [low, high], about `count` steps of them."""
  span = (high - low) or abs(high) or 1.0
  step = 10.0 ** math.floor(math.log10(span / count))
  step *= next(m for m in (1, 2, 5, 10) if m * step >= span / count * 0.999)
  first = math.floor(low / step + 1e-9)
  last = max(math.ceil(high / step - 1e-9), first + 1)
  return [i * step for i in range(first, last + 1)]


def _line(points, color, style):
  return (
    f'<polyline fill="none" stroke="{color}" stroke-linejoin="round" stroke-linecap="round" '
    f'{style} '
    f'points="{points}"/>'
  )


def _grid_line(y, label):
  return (
    f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
  )


def _step_label(x, step):
  anchor = 'end' if x > WIDTH - 20 else 'middle'
  return f'<text x="{x:.1f}" y="{HEIGHT - 5}" text-anchor="{anchor}">{int(step)}</text>'


def _number(value, step):
  if value and (abs(value) >= 1e5 or step < 1e-4):
    return f'{value:.1g}'.replace('e-0', 'e-').replace('e+0', 'e')
  return f'{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}'
