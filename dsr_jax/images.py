"""Reads images, makes them square, and converts between uint8 and the model's floats.

Axes: H W pixels.
"""

import io
import os
import re
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from PIL import ExifTags, Image, JpegImagePlugin, UnidentifiedImageError

from dsr_jax import inputs
from dsr_jax.errors import InputError

MIN_SIDE = 14  # Janus's lower limit for the short side of a padded image
GREY = (127, 127, 127)  # int(0.5 * 255), Janus's padding color

# Formats that Pillow recognizes by a signature and decodes itself. EPS and WMF would run another
# program on the file; TGA and a few old ones have no signature, so any file could pass for one.
FORMATS = (
  'AVIF', 'BLP', 'BMP', 'CUR', 'DCX', 'DDS', 'DIB', 'GIF', 'ICNS', 'ICO', 'JPEG', 'JPEG2000', 'MSP',
  'PCX', 'PNG', 'PPM', 'PSD', 'QOI', 'SGI', 'SUN', 'TIFF', 'WEBP', 'XBM', 'XPM',
)  # fmt: skip
MAX_PIXELS = 178_956_970  # Pillow's own limit for decoding
MAX_PIXELS_VARIABLE = 'DSR_JAX_MAX_PIXELS'

# Tag 0x0112 of EXIF 2.32, section 4.6.4: how to turn the stored rows and columns.
_TURNS = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
# The entry of the EXIF item in an AVIF file (ISO/IEC 23008-12, annex A).
_EXIF_ITEM = re.compile(rb'(infe.{8,10}?)Exif', re.DOTALL)
# How JPEG, PNG, GIF, WebP, AVIF and TIFF files begin.
_SIGNATURES = re.compile(
  rb'\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|RIFF....WEBP|....ftypavi|II\*\0|MM\0\*', re.DOTALL
)
_UNLIMITED = threading.Lock()  # held while Pillow's limit is off

# Pillow warns of odd metadata and above half its limit; whatever matters is an error here.
warnings.filterwarnings('ignore', module=r'PIL\.')


def load_image(source, name: str = ''):
  """An RGB PIL image from a path, an open file or a PIL image of any mode.

  Transparency is composited onto white, the EXIF orientation is applied, and deep images are
  reduced to 8 bits: integers by their bit depth, floating-point values from the range [0, 1].

  Args:
    source: a path, a binary file or a PIL image.
    name: its name in errors; by default its path.

  Raises:
    InputError: the source is not an image of FORMATS, does not decode, is larger than
      `max_pixels()`, or has values outside its range.
  """
  if isinstance(source, Image.Image):
    return _decode(source, name or 'an image in memory')
  if hasattr(source, 'read'):
    return _decode(source, name or 'an image in memory')
  name = name or inputs.shown(source)
  with inputs.open_plain(source, 'an image file') as file:
    return _decode(file, name)


def max_pixels() -> int:
  """The most pixels that an image may have: Pillow's own limit, or MAX_PIXELS_VARIABLE.

  Pillow's limit applies to the whole process; Pillow only refuses images above twice that limit.
  """
  text = os.environ.get(MAX_PIXELS_VARIABLE)
  if text is None:
    return MAX_PIXELS
  try:
    limit = int(text)
  except ValueError:
    limit = 0
  if not 0 < limit < 2**31:  # what Pillow can address
    raise InputError(
      f'{MAX_PIXELS_VARIABLE} is {text!r}; set it to a whole number of pixels from 1 to {2**31 - 1}'
    )
  if limit > MAX_PIXELS:
    Image.MAX_IMAGE_PIXELS = limit
  return limit


def header(file, name: str):
  """(format, (width, height)) of an image in an open binary file, without decoding it.

  Raises InputError like `load_image`.
  """
  limit = max_pixels()
  try:
    image = _open(file)
  except InputError:
    raise
  except Exception as e:
    raise _refusal(file, name, limit, e) from e
  _check_size(image.size, name, limit)
  return image.format, image.size


def verify(file, name: str):
  """(format, (width, height)) of an image in an open binary file, after decoding all of it.

  Accepts exactly what `load_image` accepts. A JPEG is decoded at an eighth of its width and height:
  that still reads and decompresses the whole file, so the verdict is the same, in little more than
  half the time.

  Raises InputError like `load_image`.
  """
  limit = max_pixels()
  try:
    image = _open(file)
    found = image.format, image.size
    _check_size(image.size, name, limit)
    if isinstance(image, JpegImagePlugin.JpegImageFile):
      image.draft(image.mode, (1, 1))
      image.load()
      return found
  except InputError:
    raise
  except Exception as e:
    raise _refusal(file, name, limit, e) from e
  _decode(image, name)
  return found


def is_known(file) -> bool:
  """Whether the contents of an open binary file look like an image, even a damaged one."""
  if _SIGNATURES.match(file.read(16)):
    return True
  file.seek(0)
  try:
    _open(file)
  except Image.DecompressionBombError:
    return True
  except Exception:
    return False
  return True


def _decode(source, name):
  limit = max_pixels()
  try:
    image = source if isinstance(source, Image.Image) else _open(source)
    _check_size(image.size, name, limit)
    image.load()  # open() reads the header only; a truncated file fails here
    return _to_rgb(_upright(image), name)
  except InputError:
    raise
  # On a damaged file, Pillow's readers can raise anything, including MemoryError and
  # RecursionError: no list of types would be complete.
  except Exception as e:
    raise _refusal(source, name, limit, e) from e


def _open(file):
  beginning = file.read(12)
  file.seek(0)
  if beginning[4:11] == b'ftypavi':
    # Pillow turns an AVIF file only by its transformations, but fails on a broken EXIF item.
    file = io.BytesIO(_EXIF_ITEM.sub(rb'\1free', file.read()))
  if beginning[:3] == b'\xff\xd8\xff':
    # Image.open looks for the list of an MPO's further images, and fails if that is broken. Only
    # the first image counts, and it is a plain JPEG.
    return JpegImagePlugin.JpegImageFile(file)
  image = Image.open(file, formats=FORMATS)
  if image.format == 'TIFF':
    # Pillow would turn it here and rewrite its metadata, which fails if they are broken.
    image.load_end = lambda: None
  return image


def _check_size(size, name, limit):
  width, height = size
  if width * height > limit:
    raise InputError(
      f'{name} has {width} x {height} pixels, {width * height} in all, but the limit is {limit}; '
      f'make it smaller, or set {MAX_PIXELS_VARIABLE} to a larger number of pixels'
    )


def _refusal(source, name, limit, error):
  """The InputError for an image on which Pillow raised `error`."""
  if isinstance(error, Image.DecompressionBombError):
    size = _claimed_size(source)
    if size is not None and size[0] * size[1] > limit:
      try:
        _check_size(size, name, limit)
      except InputError as e:
        return e
    return InputError(
      f'{name} has more than {limit} pixels, which is the limit; make it smaller, or set '
      f'{MAX_PIXELS_VARIABLE} to a larger number of pixels'
    )
  if _is_empty(source):
    return InputError(f'{name} is an empty file, not an image; download it again')
  reason = ' '.join(str(error).split())[:200]
  if isinstance(error, UnidentifiedImageError):
    reason = 'unknown format'
  elif not isinstance(error, (OSError, ValueError, SyntaxError)) or not reason:
    reason = f'{type(error).__name__} {reason}'.strip()
  return InputError(
    f'{name} is not a readable image ({reason}); use a PNG, JPEG, WebP, TIFF, AVIF, GIF or BMP '
    'file, or another format of images.FORMATS: check the path or save the image again'
  )


def _claimed_size(file):
  """(width, height) in the header of a file that Pillow refuses because of its size, or None."""
  with _UNLIMITED:
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
      file.seek(0)
      return Image.open(file, formats=FORMATS).size
    except Exception:
      return None
    finally:
      Image.MAX_IMAGE_PIXELS = limit


def _is_empty(source):
  try:
    return source.seek(0, os.SEEK_END) == 0
  except Exception:
    return False


def _upright(image):
  """Turns an image according to its EXIF orientation, if that is readable. Reads no other
  metadata.
  """
  try:
    if hasattr(image, 'tag_v2'):  # TIFF
      orientation = _tag(image, 'Orientation')
    else:
      orientation = image.getexif().get(ExifTags.Base.Orientation)
    turn = _TURNS.get(orientation)
  except Exception:  # broken metadata say nothing about the pixels
    return image
  return image if turn is None else image.transpose(turn)


def _to_rgb(image, name):
  if image.mode in ('I', 'F') or image.mode.startswith('I;16'):
    return _from_deep(image, name)
  if image.mode == 'La':  # premultiplied alpha; Pillow converts it only to LA
    image = image.convert('LA')
  if image.has_transparency_data:
    image = image.convert('RGBA')
    ground = Image.new('RGBA', image.size, 'white')
    return Image.alpha_composite(ground, image).convert('RGB')
  return image.convert('RGB')


def _from_deep(image, name):
  """An RGB image from gray values of more than 8 bits (Pillow's own conversion clips everything
  above 255 to white).
  """
  values = np.asarray(image)
  if image.mode == 'F':
    low, high, most = 0.0, 1.0, 1.0
  else:
    values, low, high, most = _whole_numbers(image, values)
  least, largest = values.min(initial=high), values.max(initial=low)
  if not (low <= least and largest <= high):  # also catches NaN
    raise InputError(
      f'{name} has values from {least:g} to {largest:g}, but mode {image.mode} allows {low:g} to '
      f'{high:g}; save it with 8 bits per channel'
    )
  grey = values / most
  if _tag(image, 'PhotometricInterpretation') == 0:  # white is zero
    grey = 1 - grey
  eight = np.round(grey * 255).astype(np.uint8)
  hidden = image.info.get('transparency')
  if isinstance(hidden, int):
    eight = np.where(values == hidden, np.uint8(255), eight)
  return Image.fromarray(eight).convert('RGB')


def _whole_numbers(image, values):
  """(values, least allowed, largest allowed, white) of an image of integers."""
  bits = _tag(image, 'BitsPerSample')
  signed = _tag(image, 'SampleFormat') == 2
  if bits is None:
    # Pillow reads 16-bit PGM files into its 32-bit mode, with 65535 as white.
    bits = 16 if image.mode != 'I' or image.format == 'PPM' else 32
    signed = bits == 32
  if bits == 32 and not signed:
    values = values.view(np.uint32)
  most = 2 ** (bits - signed) - 1
  return values, 0, most, most


def _tag(image, name):
  """The first value of a TIFF tag; None for other formats."""
  tags = getattr(image, 'tag_v2', None)
  value = None if tags is None else tags.get(getattr(ExifTags.Base, name))
  return value[0] if isinstance(value, tuple) else value


def preprocess(image, size, mode='crop', rounding='int'):
  """Makes an image square: uint8 (size, size, 3).

  Args:
    image: anything that `load_image` accepts.
    mode: 'crop' scales the short side to `size` and keeps the center of the long one (as Janus saw
      the images that it learned to draw); 'pad' scales the long side and pads with gray (as it saw
      the images that it learned to describe).
    rounding: of the other side's length; 'int' truncates like the original code, 'round' rounds
      like transformers since 5.0. They differ by one pixel for about half of all sizes.
  """
  if mode not in ('crop', 'pad'):
    raise InputError(f'mode is {mode!r}; use crop or pad')
  if rounding not in ('int', 'round'):
    raise InputError(f'rounding is {rounding!r}; use int or round')
  whole = int if rounding == 'int' else round
  image = load_image(image)
  if mode == 'crop':
    return _crop(image, size, whole)
  width, height = image.size
  longest = max(width, height)

  def scaled(side):
    # Multiply in the order of each source: the products differ in the last bit, and truncation
    # turns that into a pixel.
    if rounding == 'int':
      return side / longest * size
    return side * (size / longest)

  shape = tuple(min(max(whole(scaled(side)), MIN_SIDE), size) for side in (width, height))
  canvas = Image.new('RGB', (size, size), GREY)
  corner = ((size - shape[0]) // 2, (size - shape[1]) // 2)
  canvas.paste(image.resize(shape, Image.Resampling.BICUBIC), corner)
  return np.asarray(canvas)


def _crop(image, size, whole):
  """Scales the short side to `size` and keeps the center in a single resampling, so that a 1 x 1000
  image is never blown up.
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
  """uint8 (..., H, W, 3) -> float32 in [-1, 1]; a NumPy or JAX array, inside or outside jit."""
  if isinstance(image, jax.Array):
    return image.astype(jnp.float32) / 127.5 - 1.0
  # XLA compiles that quotient to this product; use it here too, so that host and device agree.
  return image.astype(np.float32) * np.float32(1 / 127.5) - np.float32(1)


def to_uint8(pixels):
  """Pixels in [-1, 1], (..., H, W, 3) -> uint8; truncated, not rounded, as in Janus and
  transformers.
  """
  return np.clip((np.asarray(pixels, np.float32) * 0.5 + 0.5) * 255, 0, 255).astype(np.uint8)


def levels(pixels):
  """Like `to_uint8`, inside jit."""
  return jnp.clip((pixels * 0.5 + 0.5) * 255.0, 0, 255).astype(jnp.uint8)


def png(image) -> bytes:
  """PIL image -> PNG bytes."""
  buffer = io.BytesIO()
  # The default level, 6, takes a third longer and saves 4% of the bytes.
  image.save(buffer, 'PNG', compress_level=4)
  return buffer.getvalue()
