"""Self-contained pages: the templates of `templates/`, their one stylesheet, and what is put into
them.

Templates escape whatever they are given; no module makes HTML as a string.

Axes: N image codes, H W pixels.
"""

import base64
from collections.abc import Mapping
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
FULL = 2.0  # nats at which a word's or a patch's color is full


class Word(NamedTuple):
  """A word or a clause under a color: the nats that color it, what is printed behind it, and
  whether it is wrong.
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
    """Of the color, in percent."""
    return round(45 * min(abs(self.value) / FULL, 1))


class Sample(NamedTuple):
  """A candidate. mark: 'up' (chosen, or right), 'down' (rejected, or wrong) or ''; lines: what is
  said below its image or before its text; alt: the image in words, for who cannot see it.
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
  """rows: lists of cells as long as `head`; numbers are rounded, texts stand as they are.

  sides: {text of a cell: 'up' or 'down', its color}.
  """

  head: list[str]
  rows: list[list]
  sides: Mapping[str, str] = types.MappingProxyType({})


def render(template: str, package: str = 'dsr_jax.reporting', /, **values) -> str:
  """A page, or a part of one: `templates/TEMPLATE` of a package with these values."""
  return _environment(package).get_template(template).render(**values)


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
  """PNG bytes as they stand in a page."""
  return f'data:image/png;base64,{base64.b64encode(png).decode()}'


def jpeg_uri(image: Image.Image) -> str:
  """A photo or a drawn image as it stands in a page: a fifth of its PNG."""
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
  """pixels (H, W, 3) uint8 under values (N,), a square of patches: grey, with green where a value
  is above 0, red where it is below.
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
  """A number in the text of a page."""
  if isinstance(x, int):
    return str(x)
  return f'{x:.3g}' if abs(x) < 0.01 and x else f'{x:.3f}'


def signed(x: float, digits: int = 3) -> str:
  """A difference with its sign; one that rounds to nothing has none."""
  text = f'{x:+.{digits}f}'
  return text if float(text) else f'±{abs(float(text)):.{digits}f}'


def _is_number(x) -> bool:
  return isinstance(x, (int, float)) and not isinstance(x, bool)


def _is_aligned(x) -> bool:
  """Whether a cell stands on the right: a number, or one that has been written down."""
  try:
    float(str(x).lstrip('±'))
  except ValueError:
    return False
  return True
