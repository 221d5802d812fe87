"""Damages images at random and loads them: each must load, or be refused with a one-line error.

  python -m benchmarks.fuzz_pictures [--count=50000 --seed=0]

Case i depends only on (seed, i): `--first=i --count=1` repeats it. Slices of cases run in separate
processes, so that a hang (`LIMIT` seconds per case) or a crash in a decoder is recorded and does
not end the program. Images with damage only in their metadata must load. Prints one JSON object;
exits with 1 if a case fails.
"""

from collections import Counter
import io
import itertools
import json
import os
import random
import resource
import signal
import struct
import sys
import time
import traceback
import zlib

from absl import flags
import numpy as np
import PIL
from PIL import ExifTags, Image

from dsr_jax import cli, images
from dsr_jax.errors import InputError

WIDTH, HEIGHT = 24, 17
LIMIT = 20  # seconds per case
SLICE = 500  # cases per process

# How an image is written: format, mode, options of Pillow's `save`.
WRITTEN = (
  ('AVIF', 'RGB', {}),
  ('AVIF', 'RGBA', {}),
  ('BLP', 'P', {}),
  ('BMP', 'RGB', {}),
  ('BMP', 'P', {}),
  ('BMP', '1', {}),
  ('DDS', 'RGBA', {}),
  ('DDS', 'RGB', {'pixel_format': 'DXT1'}),
  ('DIB', 'RGB', {}),
  ('GIF', 'P', {}),
  ('GIF', 'P', {'transparency': 3}),
  ('ICNS', 'RGBA', {}),
  ('ICO', 'RGBA', {}),
  ('JPEG', 'RGB', {}),
  ('JPEG', 'L', {'progressive': True}),
  ('JPEG', 'CMYK', {}),
  ('JPEG2000', 'RGB', {}),
  ('JPEG2000', 'L', {'no_jp2': True}),
  ('MPO', 'RGB', {'save_all': True}),
  ('MSP', '1', {}),
  ('PCX', 'RGB', {}),
  ('PCX', 'P', {}),
  ('PNG', 'RGB', {}),
  ('PNG', 'RGBA', {}),
  ('PNG', 'P', {'transparency': 3}),
  ('PNG', 'I;16', {}),
  ('PNG', 'RGB', {'save_all': True}),
  ('PPM', 'RGB', {}),
  ('PPM', '1', {}),
  ('PPM', 'I;16', {}),
  ('PPM', 'F', {}),
  ('QOI', 'RGBA', {}),
  ('SGI', 'RGB', {}),
  ('SGI', 'RGB', {'rle': True}),
  ('TIFF', 'RGB', {}),
  ('TIFF', 'I;16', {}),
  ('TIFF', 'I', {}),
  ('TIFF', 'F', {}),
  ('TIFF', 'LAB', {}),
  ('TIFF', 'CMYK', {'compression': 'tiff_lzw'}),
  ('TIFF', '1', {'compression': 'group4'}),
  ('TIFF', 'RGB', {'compression': 'jpeg'}),
  ('TIFF', 'RGBA', {'compression': 'tiff_adobe_deflate'}),
  ('WEBP', 'RGB', {}),
  ('WEBP', 'RGBA', {'lossless': True}),
  ('WEBP', 'RGB', {'save_all': True}),
  ('XBM', '1', {}),
)
WITH_EXIF = ('AVIF', 'JPEG', 'MPO', 'PNG', 'TIFF', 'WEBP')
INTERESTING = (0, 1, 2, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000)

# The images.


def picture(mode: str) -> Image.Image:
  """A small image of smooth noise in a mode."""
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
  if mode == 'F':
    return Image.fromarray(pixels[..., 0].astype(np.float32) / 255)
  if mode in ('I', 'I;16'):
    deep = pixels[..., 0].astype(np.uint16 if mode == 'I;16' else np.int32)
    return Image.fromarray(deep * 257)
  image = Image.fromarray(pixels)
  return image.quantize(16) if mode == 'P' else image.convert(mode)


def exif() -> bytes:
  """Metadata with an orientation and tags of several types."""
  block = Image.Exif()
  block[ExifTags.Base.Orientation] = 6
  block[ExifTags.Base.XResolution] = 72.5
  block[ExifTags.Base.Make] = 'a camera'
  block.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExposureTime] = 0.01
  return block.tobytes()


def written(image, name: str, options: dict, metadata: bytes = b'') -> bytes:
  """The image as a file of a format."""
  options = dict(options)
  if options.get('save_all'):
    options['append_images'] = [image.transpose(Image.Transpose.ROTATE_180)]
  if metadata:
    options['exif'] = metadata
  file = io.BytesIO()
  image.save(file, name, **options)
  return file.getvalue()


def originals() -> list[tuple[str, bytes]]:
  """(format, file) of every undamaged image."""
  found = []
  for name, mode, options in WRITTEN:
    plain = name in WITH_EXIF and mode == 'RGB' and 'compression' not in options
    metadata = exif() if plain else b''
    found.append((name, written(picture(mode), name, options, metadata)))
  return found


# The damage: functions (rng, file, another file) -> file.


def flip_bits(rng, data, other):
  data = bytearray(data)
  for _ in range(rng.choice((1, 1, 2, 4, 8, 32))):
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  return bytes(data)


def truncate(rng, data, other):
  return data[: rng.randrange(len(data))]


def splice_header(rng, data, other):
  """The beginning of another image's file, followed by the rest of this one."""
  cut = rng.choice((4, 8, 16, 32, 64, rng.randrange(1, 200)))
  return other[:cut] + data[rng.choice((cut, 0, rng.randrange(len(data)))) :]


def change_number(rng, data, other):
  """Changes two or four bytes, like those of a length or an offset, to another number."""
  data = bytearray(data)
  for _ in range(rng.choice((1, 1, 2, 3))):
    size, form = rng.choice(((2, 'H'), (4, 'I')))
    value = rng.choice((*INTERESTING, rng.randrange(2**32))) % 2 ** (8 * size)
    # Most lengths are in the first bytes.
    at = rng.randrange(min(len(data), rng.choice((32, 128, len(data)))))
    data[at : at + size] = struct.pack(rng.choice('<>') + form, value)
  return bytes(data)


def move_block(rng, data, other):
  """Removes some bytes, duplicates them, or replaces them with noise."""
  start = rng.randrange(len(data))
  block = data[start : start + rng.randrange(1, 64)]
  rest = data[start + len(block) :]
  return data[:start] + rng.choice((b'', block * 2, rng.randbytes(len(block)))) + rest


DAMAGES = (flip_bits, truncate, splice_header, change_number, move_block)


def broken_metadata(rng) -> tuple[str, bytes]:
  """(format, file) of a whole image whose EXIF block, or index of images, is damaged."""
  name = rng.choice(('AVIF', 'JPEG', 'JPEG', 'MPO', 'PNG', 'TIFF', 'WEBP'))
  options = {'save_all': True} if name == 'MPO' else {}
  data = written(picture('RGB'), name, options, exif())
  if name == 'MPO':
    start = data.index(b'MPF\0') + 4
    length = int.from_bytes(data[start - 6 : start - 4], 'big') - 6
  elif name == 'TIFF':  # the data that its directory's tags point to
    start = data.index(b'a camera')
    length = len(b'a camera')
  elif name == 'AVIF':  # its orientation is stored elsewhere
    start = data.index(exif()[6:14])
    length = data.index(b'a camera') - start
  else:
    block = exif().removeprefix(b'Exif\0\0')
    start, length = data.index(block), len(block)
  block = rng.choice(DAMAGES)(rng, data[start : start + length], rng.randbytes(64))
  block = (block + bytes(length))[:length]
  after = data[start + length :]
  if name == 'PNG':
    after = struct.pack('>I', zlib.crc32(b'eXIf' + block)) + after[4:]
  return name, data[:start] + block + after


def case(files, seed: int, index: int) -> tuple[str, bytes, str]:
  """(format, file, kind of damage) of one case."""
  rng = random.Random(f'{seed} {index}')
  if rng.random() < 0.1:
    name, data = broken_metadata(rng)
    return name, data, 'metadata'
  (name, data), (_, other) = rng.choice(files), rng.choice(files)
  damage = rng.choice(DAMAGES)
  data = damage(rng, data, other)
  if rng.random() < 0.2 and data:
    data = rng.choice(DAMAGES)(rng, data, other)
  return name, data, damage.__name__


# The check.


def outcome(data: bytes, kind: str) -> str:
  """'loaded', 'refused', or what is wrong."""
  try:
    square = images.preprocess(io.BytesIO(data), 16)
  except InputError as e:
    text = str(e)
    if kind == 'metadata':
      return f'wrong: refused for its metadata: {text}'
    # One line that names the image and says what to do.
    said = text.startswith('an image in memory ') and '; ' in text
    if '\n' in text or not said or 'attack' in text.lower():
      return f'wrong: no such sentence: {text}'
    return 'refused'
  except BaseException:
    return f'wrong: {traceback.format_exc()}'
  return 'loaded' if square.shape == (16, 16, 3) else f'wrong: shape {square.shape}'


def run(files, seed: int, cases) -> list[tuple[str, str, str]]:
  """(format, kind, outcome) of each case."""
  found = []
  for index in cases:
    signal.alarm(LIMIT)
    name, data, kind = case(files, seed, index)
    found.append((name, kind, outcome(data, kind)))
  signal.alarm(0)
  return found


def run_apart(files, seed: int, cases) -> list[tuple[str, str, str]]:
  """`run` in a separate process; if it dies, the cases are repeated one by one."""
  here, there = os.pipe()
  child = os.fork()
  if not child:
    os.close(here)
    with os.fdopen(there, 'w') as pipe:
      json.dump(run(files, seed, cases), pipe)
    os._exit(0)
  os.close(there)
  with os.fdopen(here) as pipe:
    text = pipe.read()
  _, status = os.waitpid(child, 0)
  if status == 0:
    return json.loads(text)
  if len(cases) > 1:
    return [row for index in cases for row in run_apart(files, seed, range(index, index + 1))]
  end = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f'status {status}'
  name, _, kind = case(files, seed, cases[0])
  return [(name, kind, f'wrong: the process ended with {end}')]


def main(argv, f=flags.FLAGS):
  cli.no_arguments(argv)
  files, begun, slowest, rows = originals(), time.perf_counter(), 0.0, []
  end = f.first + f.count
  for start in range(f.first, end, SLICE):
    before = time.perf_counter()
    cases = range(start, min(start + SLICE, end))
    rows += run_apart(files, f.seed, cases)
    slowest = max(slowest, (time.perf_counter() - before) / len(cases))
    print(f'{cases.stop - f.first} of {f.count}', end='\r', file=sys.stderr, flush=True)
  wrong = [
    {'case': f.first + i, 'format': name, 'damage': kind, 'found': text}
    for i, (name, kind, text) in enumerate(rows)
    if text.startswith('wrong')
  ]
  cli.print_json(
    {
      'seed': f.seed,
      'cases': len(rows),
      'pillow': PIL.__version__,
      'seconds': round(time.perf_counter() - begun, 1),
      'slowest_slice_ms_a_case': round(1000 * slowest, 1),
      'largest_process_mib': resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
      'formats': _counts((name, text) for name, _, text in rows),
      'damages': _counts((kind, text) for _, kind, text in rows),
      'wrong': wrong,
    }
  )
  return int(bool(wrong))


def _counts(rows) -> dict[str, dict[str, int]]:
  """{group: {first word of the outcome: count}}."""
  ordered = sorted((group, text.split(':')[0]) for group, text in rows)
  return {
    group: dict(Counter(word for _, word in members))
    for group, members in itertools.groupby(ordered, key=lambda row: row[0])
  }


def define_flags(f=flags.FLAGS):
  flags.DEFINE_integer('count', 50_000, 'Number of cases.', flag_values=f)
  flags.DEFINE_integer('first', 0, 'Number of the first case.', flag_values=f)
  flags.DEFINE_integer('seed', 0, 'Random seed.', flag_values=f)


if __name__ == '__main__':
  cli.run_main(main, define_flags)
