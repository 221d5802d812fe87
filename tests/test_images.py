"""Images at the border against transformers and PIL."""

import io

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
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
  'content', [b'', b'no picture', through_png(Image.fromarray(noise(64, 64))).getvalue()[:500]]
)
def test_what_does_not_decode_is_refused(tmp_path, content):
  path = tmp_path / 'x.png'
  path.write_bytes(content)
  with pytest.raises(InputError, match='unreadable as a picture'):
    images.load_image(path)


def test_a_missing_picture_is_refused(tmp_path):
  with pytest.raises(InputError, match='unreadable as a picture'):
    images.load_image(tmp_path / 'none.png')


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
  with pytest.raises(InputError, match='expected'):
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
