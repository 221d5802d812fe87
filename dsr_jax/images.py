"""Images at the border: opened, made square, and between uint8 and the model's floats.

Axes: H W pixels.
"""

import io

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps

from dsr_jax.errors import InputError

MIN_SIDE = 14  # Janus never lets the short side of a padded image fall below this
GREY = (127, 127, 127)  # int(0.5 * 255), Janus' padding color


def load_image(source):
  """An RGB PIL image from a path, an open file or a PIL image of any mode.

  16-bit grey is scaled to 8 bits, transparency is laid over white, the EXIF rotation is applied.
  Raises InputError for what does not decode.
  """
  try:
    image = source if isinstance(source, Image.Image) else Image.open(source)
    image.load()  # open() reads the header only; a truncated file fails here
    image = ImageOps.exif_transpose(image)
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
    raise InputError(
      f'found {source} unreadable as a picture ({e}); expected a PNG or JPEG file; '
      'check the path or save the picture again'
    ) from e
  if image.mode in ('I', 'F') or image.mode.startswith('I;16'):
    return _from_deep(image).convert('RGB')
  if image.has_transparency_data:
    image = image.convert('RGBA')
    ground = Image.new('RGBA', image.size, 'white')
    return Image.alpha_composite(ground, image).convert('RGB')
  return image.convert('RGB')


def _from_deep(image):
  """An 8-bit grey image from a 16-bit one (PIL's own conversion clips everything above 255 to
  white).
  """
  values = np.asarray(image).astype(np.float64)
  if image.mode != 'F':
    values /= 257  # 65535 -> 255
  elif values.size and values.max() <= 1:
    values *= 255
  return Image.fromarray(np.clip(np.round(values), 0, 255).astype(np.uint8))


def preprocess(image, size, mode='crop', rounding='int'):
  """Makes a picture square: uint8 (size, size, 3).

  Args:
    image: what `load_image` takes.
    mode: 'crop' scales the short side to `size` and cuts the centre out of the long one (how Janus
      saw images it learned to draw); 'pad' scales the long side and pads with grey (how it saw
      pictures it learned to describe).
    rounding: of the other side's length; 'int' truncates as the original code does, 'round' is what
      transformers has done since 5.0. They differ by one pixel for about half of all sizes.
  """
  if mode not in ('crop', 'pad'):
    raise InputError(f'found picture mode {mode!r}; expected crop or pad; choose one')
  if rounding not in ('int', 'round'):
    raise InputError(f'found rounding {rounding!r}; expected int or round; choose one')
  whole = int if rounding == 'int' else round
  image = load_image(image)
  if mode == 'crop':
    return _crop(image, size, whole)
  width, height = image.size
  longest = max(width, height)

  def scaled(side):
    # Each in the order its source multiplies: the products differ in the last bit, and truncation
    # makes that a pixel.
    if rounding == 'int':
      return side / longest * size
    return side * (size / longest)

  shape = tuple(min(max(whole(scaled(side)), MIN_SIDE), size) for side in (width, height))
  canvas = Image.new('RGB', (size, size), GREY)
  corner = ((size - shape[0]) // 2, (size - shape[1]) // 2)
  canvas.paste(image.resize(shape, Image.Resampling.BICUBIC), corner)
  return np.asarray(canvas)


def _crop(image, size, whole):
  """Scales the short side to `size` and cuts the centre, in one resampling: a 1 x 1000 picture is
  never blown up.
  """
  shortest = min(image.size)
  box = []
  for side in image.size:
    scaled = max(whole(side * size / shortest), size)
    offset = (scaled - size) // 2
    box.append((offset * side / scaled, min((offset + size) * side / scaled, side)))
  (left, right), (top, bottom) = box
  return np.asarray(
    image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
  )


def to_float(image):
  """uint8 (..., H, W, 3) -> float32 in [-1, 1]; a NumPy or a JAX array, inside jit or outside."""
  if isinstance(image, jax.Array):
    return image.astype(jnp.float32) / 127.5 - 1.0
  # NumPy gets the product that XLA compiles that quotient to, so that host and device agree.
  return image.astype(np.float32) * np.float32(1 / 127.5) - np.float32(1)


def to_uint8(pixels):
  """Pixels in [-1, 1], (..., H, W, 3) -> uint8; truncated, not rounded, as Janus and transformers
  do.
  """
  return np.clip((np.asarray(pixels, np.float32) * 0.5 + 0.5) * 255, 0, 255).astype(np.uint8)


def png(image) -> bytes:
  """PIL image -> PNG bytes."""
  buffer = io.BytesIO()
  image.save(buffer, 'PNG', optimize=True)
  return buffer.getvalue()
