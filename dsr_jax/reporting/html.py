"""Self-contained pages: the templates in `templates/`, their stylesheet, and the values for them.

Templates escape all values; no module builds HTML strings.

Axes: N image codes, H W pixels.
"""

import base64
from collections.abc import Mapping
import functools
import io
import math
import types
from typing import NamedTuple

import jinja2
import numpy as np
from PIL import Image

from dsr_jax import images
from dsr_jax.reporting import sheets

TILE = 192  # pixels of an image on a page
FULL = 2.0  # nats at which the color of a word or patch is strongest


class Word(NamedTuple):
  """A colored word or clause: the nats that color it, the text printed after it, and whether it is
  wrong.
  """

  text: str
  value: float
  said: str
  wrong: bool = False

  @property
  def side(self) -> str:
    """The color."""
    return 'up' if self.value > 0 else 'down'

  @property
  def strength(self) -> int:
    """The strength of the color, in percent."""
    return round(45 * min(abs(self.value) / FULL, 1))


class Sample(NamedTuple):
  """A candidate. mark: 'up' (chosen, or correct), 'down' (rejected, or wrong) or ''. lines: the
  lines below its image or before its text. alt: the image's alternative text.
  """

  mark: str
  lines: list[str]
  src: str = ''
  text: str = ''
  alt: str = ''


class Tile(NamedTuple):
  """A chief number. side: 'up' or 'down' colors the last line."""

  name: str
  value: str
  lines: list[str]
  change: str = ''
  side: str = ''


class Table(NamedTuple):
  """A table. rows: lists of cells, as long as `head`; numbers are rounded, text is not changed.

  sides: {text of a cell: its color, 'up' or 'down'}.
  """

  head: list[str]
  rows: list[list]
  sides: Mapping[str, str] = types.MappingProxyType({})


def render(template: str, package: str = 'dsr_jax.reporting', /, **values) -> str:
  """A page, or a part of one: `templates/TEMPLATE` of a package, filled with the values."""
  return _environment(package).get_template(template).render(**values)


@functools.cache  # a run writes its page many times, and templates take longest to compile
def _environment(package: str = 'dsr_jax.reporting') -> jinja2.Environment:
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader(package),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters['number'] = number
  environment.tests['numeric'] = _is_number
  environment.tests['aligned'] = _is_aligned
  return environment


def data_uri(png: bytes) -> str:
  """PNG bytes as a data URL."""
  return f'data:image/png;base64,{base64.b64encode(png).decode()}'


def jpeg_uri(image: Image.Image) -> str:
  """A photo or a drawn image as a JPEG data URL, a fifth of the size of its PNG."""
  buffer = io.BytesIO()
  image.save(buffer, 'JPEG', quality=88)
  return f'data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}'


def picture(pixels) -> str:
  """Pixels (H, W, 3) uint8 as a data URL, TILE wide; small ones keep their pixels as squares."""
  image = Image.fromarray(np.asarray(pixels, np.uint8))
  if image.width != TILE:
    enlarged = image.width < TILE
    kind = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
    image = image.resize((TILE, TILE), kind)
  return data_uri(images.png(image))


def patches(pixels, values) -> str:
  """Pixels (H, W, 3) uint8 overlaid with values (N,), a square of patches: gray, tinted green where
  a value is above 0 and red where it is below.
  """
  side = math.isqrt(len(values))
  scaled = Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.NEAREST)
  grey = np.repeat(np.asarray(scaled.convert('L'))[..., None], 3, -1)
  values = Image.fromarray(values.reshape(side, side).astype(np.float32))
  nats = np.asarray(values.resize((TILE, TILE), Image.Resampling.NEAREST))[..., None]
  strength = 0.75 * np.minimum(np.abs(nats) / FULL, 1)
  color = np.where(nats > 0, sheets.CHOSEN, sheets.REJECTED)
  return picture((grey * (1 - strength) + color * strength).astype(np.uint8))


def number(x) -> str:
  """A number as text for a page."""
  if isinstance(x, int):
    return str(x)
  return f'{x:.3g}' if abs(x) < 0.01 and x else f'{x:.3f}'


def signed(x: float, digits: int = 3) -> str:
  """A difference with its sign; one that rounds to 0 gets ±."""
  text = f'{x:+.{digits}f}'
  return text if float(text) else f'±{abs(float(text)):.{digits}f}'


def _is_number(x) -> bool:
  return isinstance(x, (int, float)) and not isinstance(x, bool)


def _is_aligned(x) -> bool:
  """Whether a cell is right-aligned: a number, or the text of one."""
  try:
    float(str(x).lstrip('±'))
  except ValueError:
    return False
  return True
