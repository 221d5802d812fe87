"""Images at the border against transformers and PIL."""

import io
import struct
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngImageFile
import pytest
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from dsr_jax import images
from dsr_jax.errors import InputError


def noise(height, width, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def through_png(image):
  buffer = io.BytesIO()
  image.save(buffer, 'PNG')
  buffer.seek(0)
  return buffer


def test_grey_palette_and_rgb_pictures_of_the_same_colours_load_equal():
  grey = np.repeat(noise(9, 7)[..., :1], 3, axis=-1)
  rgb = Image.fromarray(grey)
  for mode in ('RGB', 'L', 'P', '1'):
    image = rgb.convert(mode) if mode != 'P' else rgb.quantize(256)
    want = np.asarray(image.convert('RGB'))
    got = np.asarray(images.load_image(through_png(image)))
    np.testing.assert_array_equal(got, want)
    if mode in ('RGB', 'L', 'P'):
      np.testing.assert_array_equal(got, grey)


def test_16_bit_grey_keeps_its_brightness():
  values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
  got = np.asarray(images.load_image(through_png(Image.fromarray(values))))
  np.testing.assert_array_equal(got[..., 0], np.round(values / 257))


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P'])
def test_transparency_shows_white(mode):
  image = Image.new('RGBA', (4, 2), (0, 0, 0, 0))
  image.putpixel((0, 0), (0, 0, 0, 255))
  got = np.asarray(images.load_image(through_png(image.convert(mode))))
  assert got[0, 0].max() == 0 and got[1, 3].min() == 255


def test_half_transparent_black_is_mid_grey():
  got = np.asarray(images.load_image(Image.new('RGBA', (1, 1), (0, 0, 0, 128))))
  assert abs(int(got[0, 0, 0]) - 127) <= 1


@pytest.mark.parametrize(
  'content', [b'no picture', b'P6', through_png(Image.fromarray(noise(64, 64))).getvalue()[:500]]
)
def test_what_does_not_decode_is_refused(tmp_path, content):
  path = tmp_path / 'x.png'
  path.write_bytes(content)
  with pytest.raises(InputError, match='x.png is not a readable image'):
    images.load_image(path)


def test_a_missing_picture_is_refused(tmp_path):
  with pytest.raises(InputError, match='cannot read .*none.png .No such file'):
    images.load_image(tmp_path / 'none.png')


def test_an_empty_file_is_called_so(tmp_path):
  (tmp_path / 'x.png').write_bytes(b'')
  with pytest.raises(InputError, match=r'x\.png is an empty file'):
    images.load_image(tmp_path / 'x.png')


@pytest.mark.parametrize(
  'error',
  [
    struct.error('odd'),
    TypeError('odd'),
    RuntimeError('odd'),
    SyntaxError('odd'),
    KeyError('odd'),
    AssertionError('odd'),
    MemoryError(),
    RecursionError('odd'),
    OverflowError('odd\nand long'),
  ],
)
@pytest.mark.parametrize('where', ['open', 'load'])
def test_whatever_pillow_raises_is_one_sentence(tmp_path, monkeypatch, error, where):
  def fail(*args, **options):
    raise error

  Image.new('RGB', (3, 3)).save(tmp_path / 'x.png')
  owner = Image if where == 'open' else PngImageFile
  monkeypatch.setattr(owner, where, fail)
  with pytest.raises(InputError, match=r'x\.png is not a readable image \(.+\); use a PNG') as e:
    images.load_image(tmp_path / 'x.png')
  assert '\n' not in str(e.value)


# Metadata.


def tiff_block(*entries):
  """An EXIF block of (tag, type, count, four bytes of value) entries, big-endian."""
  body = b''.join(struct.pack('>HHI', *entry[:3]) + entry[3] for entry in entries)
  return b'Exif\0\0MM\0*\0\0\0\x08' + struct.pack('>H', len(entries)) + body + bytes(16)


SHORT, LONG, ASCII, SRATIONAL = 3, 4, 2, 10
UPRIGHT = (0x0112, SHORT, 1, b'\0\x06\0\0')


@pytest.mark.parametrize(
  'block, turned',
  [
    (tiff_block(UPRIGHT), True),
    # Pillow cannot write a negative denominator or a zero back
    (tiff_block(UPRIGHT, (0x011A, SRATIONAL, 1, b'\0\0\0\x22')) + b'\xff' * 4 + bytes(4), True),
    (tiff_block(UPRIGHT, (0x8769, LONG, 1, b'\xff\xff\xff\xff')), True),
    (tiff_block((0x0112, ASCII, 2, b'6\0\0\0')), False),
    (tiff_block((0x0112, LONG, 1, b'\0\0\0\x63')), False),
    (tiff_block((0x0112, SHORT, 9, b'\0\0\0\x01')), False),
    (tiff_block((0x0112, 77, 1, b'\0\x06\0\0')), False),
    (b'Exif\0\0MM\0*\xff\xff\xff\xff', False),
    (b'Exif\0\0XX', False),
    (b'Exif\0\0', False),
  ],
)
@pytest.mark.parametrize('name', ['JPEG', 'PNG', 'WEBP'])
def test_of_metadata_the_orientation_is_read_and_what_is_broken_ignored(block, turned, name):
  if name == 'PNG':
    block = block.removeprefix(b'Exif\0\0') or b'X'
  image = Image.fromarray(noise(6, 9))
  plain, marked = io.BytesIO(), io.BytesIO()
  image.save(plain, name)
  whole = tiff_block(UPRIGHT, (0x010F, ASCII, 4, b'abc\0')) + bytes(64)
  whole = whole if name == 'JPEG' else whole.removeprefix(b'Exif\0\0')
  image.save(marked, name, exif=whole)
  block = (block + bytes(len(whole)))[: max(len(whole), len(block))]
  block = block[: len(whole)]
  data = marked.getvalue()
  start = data.index(whole)
  end = data[start + len(whole) :]
  if name == 'PNG':
    end = struct.pack('>I', zlib.crc32(b'eXIf' + block)) + end[4:]
  want = Image.open(plain).convert('RGB')
  if turned:
    want = want.transpose(Image.Transpose.ROTATE_270)
  got = images.load_image(io.BytesIO(data[:start] + block + end))
  np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize(
  'name, options', [('PNG', {}), ('TIFF', {}), ('TIFF', {'compression': 'tiff_lzw'})]
)
def test_every_orientation_is_turned_as_pillow_turns_it(orientation, name, options):
  exif = Image.Exif()
  exif[0x0112] = orientation
  file = io.BytesIO()
  image = Image.fromarray(noise(5, 8))
  image.save(file, name, exif=exif, **options)
  stand_in = Image.fromarray(noise(5, 8))
  stand_in.getexif()[0x0112] = orientation
  want = np.asarray(ImageOps.exif_transpose(stand_in))
  np.testing.assert_array_equal(np.asarray(images.load_image(file)), want)


def test_a_tiff_whose_other_tags_are_broken_is_read():
  file = io.BytesIO()
  exif = Image.Exif()
  exif[0x0112] = 6
  exif[0x010E] = 'abcdefgh'
  Image.fromarray(noise(5, 8)).save(file, 'TIFF', exif=exif)
  data = bytearray(file.getvalue())
  at = data.index(struct.pack('<HHI', 0x010E, ASCII, 9))
  data[at + 2 : at + 12] = struct.pack('<HII', SRATIONAL, 1, len(data))  # where the file ends
  got = images.load_image(io.BytesIO(bytes(data) + struct.pack('<ii', -1, 0)))
  np.testing.assert_array_equal(np.asarray(got), np.rot90(noise(5, 8), -1))


@pytest.mark.parametrize('length', [1, 3, 0xFFFF])
def test_of_several_images_in_a_jpeg_the_first_is_read_whatever_their_list_says(length):
  first, both = io.BytesIO(), io.BytesIO()
  Image.fromarray(noise(5, 8)).save(first, 'JPEG')
  Image.fromarray(noise(5, 8)).save(
    both, 'MPO', save_all=True, append_images=[Image.fromarray(noise(5, 8))]
  )
  data = bytearray(both.getvalue())
  # The number of images in the list (tag 0xB001 of CIPA DC-007), which Pillow trusts.
  at = data.index(struct.pack('<HHI', 0xB001, LONG, 1)) + 8
  data[at : at + 4] = struct.pack('<I', length)
  got = images.load_image(io.BytesIO(bytes(data)))
  want = Image.open(first).convert('RGB')
  np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


# Size.


def test_a_picture_above_the_limit_is_told_its_size_and_what_raises_it(tmp_path, monkeypatch):
  Image.new('1', (20000, 10000)).save(tmp_path / 'x.png')
  monkeypatch.delenv(images.MAX_PIXELS_VARIABLE, raising=False)
  with pytest.raises(InputError) as e:
    images.load_image(tmp_path / 'x.png')
  said = str(e.value)
  assert '20000 x 10000' in said and str(images.MAX_PIXELS) in said
  assert images.MAX_PIXELS_VARIABLE in said and 'attack' not in said.lower()


def test_the_limit_on_pixels_is_raised_and_lowered_by_the_environment(tmp_path, monkeypatch):
  Image.new('1', (20000, 10000)).save(tmp_path / 'x.png')
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', Image.MAX_IMAGE_PIXELS)  # put back at the end
  monkeypatch.setenv(images.MAX_PIXELS_VARIABLE, '200000000')
  with open(tmp_path / 'x.png', 'rb') as file:
    assert images.header(file, 'x') == ('PNG', (20000, 10000))
  monkeypatch.setenv(images.MAX_PIXELS_VARIABLE, '8')
  with pytest.raises(InputError, match='3 x 3 pixels, 9 in all, but the limit is 8; make'):
    images.load_image(Image.new('L', (3, 3)))
  for wrong in ('', 'many', '0', '1e9', '2147483648'):
    monkeypatch.setenv(images.MAX_PIXELS_VARIABLE, wrong)
    with pytest.raises(InputError, match='set it to a whole number of pixels'):
      images.load_image(Image.new('L', (3, 3)))


def test_no_other_program_is_run_on_a_file():
  assert not {'EPS', 'WMF', 'FPX', 'MIC'} & set(images.FORMATS)
  with pytest.raises(InputError, match='unknown format'):
    images.load_image(
      io.BytesIO(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n')
    )


# Values of more than 8 bits.


def grey_of(image):
  return np.asarray(images.load_image(image))[..., 0].tolist()


@pytest.mark.parametrize(
  'values, want',
  [
    # whole numbers by their bit depth, however dark or bright the picture is
    (np.array([[0, 255, 257, 65535]], np.uint16), [[0, 1, 1, 255]]),
    (np.array([[0, 255, 257]], np.uint16), [[0, 1, 1]]),
    (np.array([[0, 255, 2**24, 2**31 - 1]], np.int32), [[0, 0, 2, 255]]),
    (np.array([[0, 1]], np.int32), [[0, 0]]),
    (np.array([[0, 1, 255]], np.uint8), [[0, 1, 255]]),
    # floating-point numbers by their range, not by the largest there is
    (np.array([[0, 0.5, 1]], np.float32), [[0, 128, 255]]),
    (np.array([[0.001, 0.002]], np.float32), [[0, 1]]),
  ],
)
def test_values_are_scaled_by_their_type(values, want):
  assert grey_of(Image.fromarray(values)) == want


@pytest.mark.parametrize(
  'values', [[0, 255], [0, 1.001], [-0.001, 1], [0, np.nan], [0, np.inf], [-np.inf, 0]]
)
def test_floats_of_another_range_are_refused(values):
  with pytest.raises(InputError, match='has values from .* to .*, but mode F allows 0 to 1;'):
    images.load_image(Image.fromarray(np.array([values], np.float32)))


def test_negative_whole_numbers_are_refused():
  with pytest.raises(InputError, match='has values from -1 to 5, but mode I allows 0 to'):
    images.load_image(Image.fromarray(np.array([[-1, 5]], np.int32)))


def deep_tiff(values, bits, form, photometric=1):
  """A TIFF file of one row of whole numbers. form: 1 unsigned, 2 signed."""
  width = len(values)
  kind = {(16, 1): 'H', (16, 2): 'h', (32, 1): 'I', (32, 2): 'i'}[bits, form]
  pixels = struct.pack(f'<{width}{kind}', *values)
  tags = [
    (256, LONG, width), (257, LONG, 1), (258, SHORT, bits), (259, SHORT, 1),
    (262, SHORT, photometric), (273, LONG, 8), (277, SHORT, 1), (278, LONG, 1),
    (279, LONG, len(pixels)), (339, SHORT, form),
  ]  # fmt: skip
  pixels += bytes(len(pixels) % 2)
  directory = struct.pack('<H', len(tags))
  directory += b''.join(struct.pack('<HHII', tag, kind, 1, value) for tag, kind, value in tags)
  return io.BytesIO(b'II*\0' + struct.pack('<I', 8 + len(pixels)) + pixels + directory + bytes(4))


@pytest.mark.parametrize(
  'file, want',
  [
    (deep_tiff([0, 257, 65535], 16, 1), [[0, 1, 255]]),
    (deep_tiff([0, 257, 65535], 16, 1, photometric=0), [[255, 254, 0]]),
    (deep_tiff([0, 32767], 16, 2), [[0, 255]]),
    (deep_tiff([0, 2**31, 2**32 - 1], 32, 1), [[0, 128, 255]]),
    (deep_tiff([0, 2**31 - 1], 32, 2), [[0, 255]]),
    (io.BytesIO(b'P5 3 1 65535\n\0\0\1\1\xff\xff'), [[0, 1, 255]]),
    (io.BytesIO(b'P5 2 1 1023\n\0\0\3\xff'), [[0, 255]]),
    (io.BytesIO(b'P2 2 1 1023\n0 1023\n'), [[0, 255]]),
    (io.BytesIO(b'P5 2 1 15\n\0\x0f'), [[0, 255]]),
  ],
)
def test_files_are_scaled_by_the_depth_they_state(file, want):
  assert grey_of(file) == want


def test_a_transparent_value_of_16_bits_shows_white():
  file = io.BytesIO()
  values = np.array([[0, 300, 65535]], np.uint16)
  Image.fromarray(values).save(file, 'PNG', transparency=300)
  assert grey_of(file) == [[0, 255, 255]]


# Modes.


@pytest.mark.parametrize('mode', ['YCbCr', 'LAB', 'HSV', 'CMYK', 'RGBX', 'RGBA', 'RGBa', 'RGB'])
def test_a_colour_survives_every_mode(mode):
  colour = (200, 40, 90)
  image = Image.new('RGB', (4, 4), colour).convert('RGBA' if mode == 'RGBa' else 'RGB')
  got = np.asarray(images.load_image(image.convert(mode))).astype(int)
  assert np.abs(got - colour).max() <= 3


@pytest.mark.parametrize('mode', ['LA', 'La', 'PA', 'RGBA', 'RGBa'])
def test_a_mode_with_transparency_shows_white(mode):
  image = Image.new('RGBA', (2, 1), (0, 0, 0, 255))
  image.putpixel((1, 0), (0, 0, 0, 0))
  steps = {'La': ('LA', 'La'), 'PA': ('PA',)}.get(mode, (mode,))
  for step in steps:
    image = image.convert(step)
  got = np.asarray(images.load_image(image))
  assert got[0, 0].max() == 0 and got[0, 1].min() == 255


@pytest.mark.parametrize('height, width', [(32, 32), (50, 33), (33, 50), (64, 97), (40, 31)])
@pytest.mark.parametrize('rounding', ['int', 'round'])
def test_crop_equals_resizing_then_cutting_the_centre(height, width, rounding):
  image = Image.fromarray(
    noise(height, width) // 2 + 64
  )  # away from 0 and 255: PIL clips between its two passes
  shortest = min(height, width)
  whole = int if rounding == 'int' else round
  size = [whole(side * 32 / shortest) for side in (width, height)]
  left, top = (size[0] - 32) // 2, (size[1] - 32) // 2
  want = np.asarray(
    image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))
  )
  got = images.preprocess(image, 32, 'crop', rounding)
  assert got.shape == (32, 32, 3) and got.dtype == np.uint8
  assert np.abs(got.astype(int) - want).max() <= 1


@pytest.mark.parametrize('mode', ['crop', 'pad'])
@pytest.mark.parametrize('height, width', [(1, 1000), (1000, 1), (1, 1), (3, 2)])
def test_extreme_shapes_become_square(mode, height, width):
  picture = images.preprocess(Image.fromarray(noise(height, width)), 32, mode)
  assert picture.shape == (32, 32, 3)


@pytest.mark.parametrize(
  'height, width', [(1, 1000), (1000, 1), (33, 50), (97, 64), (384, 384), (511, 700), (1023, 767)]
)
def test_pad_with_round_equals_the_transformers_processor(height, width):
  hf = JanusImageProcessorPil(
    size=dict(height=384, width=384), image_mean=[0.5] * 3, image_std=[0.5] * 3
  )
  image = Image.fromarray(noise(height, width))
  want = np.asarray(hf(image, return_tensors='np')['pixel_values'][0]).transpose(1, 2, 0)
  got = images.to_float(images.preprocess(image, 384, 'pad', 'round'))
  np.testing.assert_allclose(got, want, atol=1e-6)


def of_mode(mode, height=23, width=31):
  """A random picture of a mode, as a PNG file gives it; of 16 bits also its 8-bit version, else
  itself.
  """
  rng = np.random.default_rng(7)
  if mode == 'I;16':
    values = rng.integers(0, 65536, (height, width))
    eight = Image.fromarray(np.round(values / 257).astype(np.uint8))
    return Image.open(through_png(Image.fromarray(values.astype(np.uint16)))), eight
  image = Image.fromarray(rng.integers(0, 256, (height, width, 4), np.uint8))
  if mode == 'P':
    image = image.convert('RGB').quantize(64)
  elif mode == 'transparent P':
    image = image.convert('RGB').quantize(64)
    image.info['transparency'] = 3
  else:
    image = image.convert(mode)
  image = Image.open(through_png(image))
  return image, image


@pytest.mark.parametrize('mode', ['L', '1', 'P', 'transparent P', 'LA', 'RGBA', 'RGB', 'I;16'])
def test_pictures_of_every_mode_equal_those_of_the_transformers_processor(mode):
  hf = JanusImageProcessorPil(
    size=dict(height=64, width=64), image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True
  )
  image, theirs = of_mode(
    mode
  )  # of 16 bits transformers cuts off all but the darkest 256 values, so it gets 8
  want = np.asarray(hf(theirs, return_tensors='np')['pixel_values'][0]).transpose(1, 2, 0)
  got = images.to_float(images.preprocess(image, 64, 'pad', 'round'))
  assert want.std() > 0.1
  np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize(
  'height, width', [(1, 1000), (1000, 1), (33, 50), (97, 64), (511, 700), (1023, 767), (384, 384)]
)
def test_pad_with_int_is_the_originals_rule(height, width):
  """The other side truncated, padding grey on both sides, the smaller half first."""
  image = Image.fromarray(noise(height, width))
  sides = [max(int(side / max(height, width) * 384), 14) for side in (width, height)]
  resized = np.asarray(image.resize(sides, Image.Resampling.BICUBIC))
  want = np.full((384, 384, 3), 127, np.uint8)
  top, left = ((384 - n) // 2 for n in resized.shape[:2])
  want[top : top + resized.shape[0], left : left + resized.shape[1]] = resized
  np.testing.assert_array_equal(images.preprocess(image, 384, 'pad', 'int'), want)


def test_int_and_round_differ_by_at_most_one_row_of_padding():
  counts = []
  for height in range(40, 80):
    image = Image.new('RGB', (101, height), 'red')
    red = [
      (images.preprocess(image, 96, 'pad', rounding)[:, 0] == [255, 0, 0]).all(-1).sum()
      for rounding in ('int', 'round')
    ]
    counts.append(red[1] - red[0])
  assert set(counts) == {0, 1}


def test_to_float_covers_the_range_and_to_uint8_truncates():
  np.testing.assert_allclose(images.to_float(np.array([0, 255], np.uint8)), [-1, 1], atol=1e-6)
  assert images.to_uint8(np.array([-3.0, -1, 0, 0.999, 1, 7])).tolist() == [
    0,
    0,
    127,
    254,
    255,
    255,
  ]


@pytest.mark.parametrize('options', [dict(mode='stretch'), dict(rounding='up')])
def test_unknown_preprocessing_is_refused(options):
  with pytest.raises(InputError, match='is .(stretch.; use crop|up.; use int) or '):
    images.preprocess(Image.new('RGB', (3, 3)), 32, **options)


def test_to_float_makes_the_same_bits_of_numpy_and_jax_arrays():
  values = np.arange(256, dtype=np.uint8)
  want = images.to_float(values)
  got = images.to_float(jnp.asarray(values))
  assert want.dtype == got.dtype == np.float32
  np.testing.assert_array_equal(got, want)


def test_to_float_in_a_program_is_the_quotient_by_half_of_the_range():
  """Models were trained on `x / 127.5 - 1`; XLA makes that the product that `to_float` is."""
  values = np.arange(256, dtype=np.uint8)
  quotient = jax.jit(lambda x: x.astype(jnp.float32) / 127.5 - 1.0)(values)
  np.testing.assert_array_equal(jax.jit(images.to_float)(values), quotient)
