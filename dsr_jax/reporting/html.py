"""Parts of the self-contained pages: the common style, tables, sheets, words and pictures under a
heat of numbers.

Axes: N image codes, H W pixels.
"""

import base64
import html
import math

import numpy as np
from PIL import Image

from dsr_jax import images
from dsr_jax.reporting import sheets as pictures_lib

TILE = 192  # pixels of a picture on a page
FULL = 2.0  # nats at which a word's or a patch's colour is full

STYLE = """
:root { --paper:#fff; --ink:#1c2026; --faint:#68717d; --line:#e3e6ea; --card:#f7f8fa; --up:#16865a; --down:#c53b33;
  --a:#2563c9; --b:#d9622b; --c:#16865a; --d:#8a4fc4 }
@media (prefers-color-scheme: dark) { :root { --paper:#14171b; --ink:#e8eaed; --faint:#98a1ad; --line:#2b3038;
  --card:#1b1f25; --up:#4fc592; --down:#f0746c; --a:#6ea3f5; --b:#f0915f; --c:#4fc592; --d:#bd92ec } }
* { box-sizing:border-box }
body { margin:0; background:var(--paper); color:var(--ink);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif }
main { max-width:1120px; margin:0 auto; padding:40px 24px 80px }
h1 { font-size:28px; margin:0 0 4px; letter-spacing:-.01em }
h2 { font-size:18px; margin:44px 0 10px }
figure { margin:0 }
.lead { color:var(--faint); margin:0 0 16px }
.facts { display:flex; flex-wrap:wrap; gap:6px 28px; color:var(--faint); font-size:14px }
.facts b { color:var(--ink); font-weight:600 }
.tiles { display:grid; grid-template-columns:repeat(auto-fill,minmax(200px,1fr)); gap:12px; margin-top:28px }
.tile { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:14px 16px }
.tile .name, .tile .was { color:var(--faint); font-size:13px }
.tile .value { font-size:26px; font-weight:650; letter-spacing:-.02em; font-variant-numeric:tabular-nums }
.up { color:var(--up) }
.down { color:var(--down) }
.charts { display:grid; grid-template-columns:repeat(auto-fill,minmax(330px,1fr)); gap:16px }
.chart { border:1px solid var(--line); border-radius:10px; padding:12px 14px 8px }
.chart figcaption { font-size:14px; font-weight:600 }
.chart .unit { color:var(--faint); font-weight:400 }
.legend { font-size:12px; color:var(--faint); min-height:18px }
.legend i { display:inline-block; width:14px; height:3px; border-radius:2px; margin:0 5px 3px 0 }
.legend span { margin-right:14px }
svg { width:100%; height:auto; display:block }
svg text { fill:var(--faint); font-size:11px; font-variant-numeric:tabular-nums }
.grid { stroke:var(--line); stroke-width:1 }
.sheet { background:#fff; border:1px solid var(--line); border-radius:10px; padding:8px; margin-bottom:18px;
  overflow-x:auto }
.sheet img { display:block; max-width:100% }
.sheet figcaption { color:#68717d; font-size:13px; padding:0 4px 6px }
.scroll { overflow-x:auto }
table { border-collapse:collapse; font-size:14px; width:100% }
th, td { text-align:left; padding:5px 14px 5px 0; border-bottom:1px solid var(--line) }
td.n, th.n { text-align:right; font-variant-numeric:tabular-nums }
th { color:var(--faint); font-weight:500 }
summary { cursor:pointer; color:var(--faint); margin:14px 0 }
pre { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:14px; overflow-x:auto;
  font-size:12.5px }
.verdict { display:inline-block; border-radius:8px; padding:2px 12px; font-weight:650; color:#fff }
.go { background:var(--up) }
.nogo { background:var(--down) }
.heat { line-height:2; font-size:15px }
.heat span { border-radius:4px; padding:2px 3px }
.heat small { color:var(--faint); margin-right:10px; font-variant-numeric:tabular-nums }
.row { display:flex; flex-wrap:wrap; gap:20px; align-items:flex-start; border-top:1px solid var(--line); padding:14px 0 }
.row img { border-radius:6px; image-rendering:pixelated }
.row > div { flex:1; min-width:300px }
.bad { text-decoration:underline wavy var(--down); text-underline-offset:4px }
"""


def whole(title, body):
  """A whole self-contained page: a plain title and HTML."""
  return (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width,initial-scale=1">'
    f'<title>{html.escape(title)}</title><style>{STYLE}</style></head>'
    f'<body><main>{body}</main></body></html>\n'
  )


def figure(png, caption):
  """A sheet (PNG bytes) with a line above it."""
  text = html.escape(caption)
  return (
    f'<figure class="sheet"><figcaption>{text}</figcaption><img alt="{text}" '
    f'src="{data_uri(png)}"></figure>'
  )


def data_uri(png):
  """PNG bytes as they stand in a page."""
  return f'data:image/png;base64,{base64.b64encode(png).decode()}'


def table(title, head, rows):
  """A heading and a table; rows: a name, then numbers or texts."""

  def cell(x):
    return f'<td class="n">{number(x) if isinstance(x, (int, float)) else html.escape(x)}</td>'

  lines = ''.join(
    f'<tr><td>{html.escape(str(row[0]))}</td>{"".join(cell(x) for x in row[1:])}</tr>'
    for row in rows
  )
  names = ''.join(f'<th{" class=n" if i else ""}>{name}</th>' for i, name in enumerate(head))
  return f'<h2>{title}</h2><div class="scroll"><table><tr>{names}</tr>{lines}</table></div>'


def heat(parts):
  """Words or clauses in colour. parts: (text, nats that colour it, whether it is wrong, what to
  print behind it).
  """
  spans = []
  for text, value, bad, *behind in parts:
    color = 'var(--up)' if value > 0 else 'var(--down)'
    strength = round(45 * min(abs(value) / FULL, 1))
    spans.append(
      f'<span class="{"bad" if bad else ""}" style="background:color-mix(in srgb, {color} '
      f'{strength}%, transparent)">'
      f'{html.escape(text)}</span><small>{behind[0] if behind else f"{value:+.1f}"}</small>'
    )
  return f'<div class="heat">{" ".join(spans)}</div>'


def patches(pixels, values):
  """pixels (H, W, 3) uint8 under values (N,), a square of patches: grey, with green where the
  prompt makes a code likelier, red where less.
  """
  side = math.isqrt(len(values))
  grey = np.repeat(
    np.asarray(Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.NEAREST).convert('L'))[
      ..., None
    ],
    3,
    -1,
  )
  nats = np.asarray(
    Image.fromarray(values.reshape(side, side).astype(np.float32)).resize(
      (TILE, TILE), Image.Resampling.NEAREST
    )
  )
  strength = 0.75 * np.minimum(np.abs(nats) / FULL, 1)[..., None]
  color = np.where(nats[..., None] > 0, pictures_lib.CHOSEN, pictures_lib.REJECTED)
  return (grey * (1 - strength) + color * strength).astype(np.uint8)


def picture(pixels):
  """Pixels (H, W, 3) uint8 as an <img> of TILE pixels; small ones keep their pixels as squares."""
  image = Image.fromarray(np.asarray(pixels, np.uint8))
  if image.width != TILE:
    image = image.resize(
      (TILE, TILE), Image.Resampling.NEAREST if image.width < TILE else Image.Resampling.LANCZOS
    )
  return f'<img alt="" width="{TILE}" src="{data_uri(images.png(image))}">'


def number(x):
  """A number in the text of a page."""
  return str(x) if isinstance(x, int) else f'{x:.3g}' if abs(x) < 0.01 and x else f'{x:.3f}'
