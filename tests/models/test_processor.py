"""Tokenizer, templates and pictures against transformers and PIL."""

import io

import numpy as np
from PIL import Image
import pytest

from dsr_jax.errors import InputError
from dsr_jax.models.janus import processor as processor_lib
from dsr_jax.models.janus.processor import ASSISTANT, BOI, BOS, EOS, IMAGE, PAD, USER

TEXTS = [
  'a red circle left of a blue square',
  'two small green rings and 3 dotted stars.',
  'Is there a red disc?',
  'yes',
  'no',
]


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  directory = tmp_path_factory.mktemp('tokenizer')
  processor_lib.make_tokenizer(TEXTS * 10, 330, directory)
  return directory


@pytest.fixture(scope='module')
def processor(directory):
  return processor_lib.Processor.from_directory(directory)


@pytest.fixture(scope='module')
def hf(directory):
  from transformers import AutoProcessor

  return AutoProcessor.from_pretrained(directory)


def test_bos_is_added_and_eos_is_not_and_padding_is_left(hf):
  tokenizer = hf.tokenizer
  batch = tokenizer(['a red circle', 'a'], padding=True)['input_ids']
  bos, eos, pad = tokenizer.convert_tokens_to_ids([BOS, EOS, PAD])
  assert batch[0][0] == bos and eos not in batch[0]
  assert batch[1][:2] == [pad, pad] and batch[1][2] == bos


def test_special_token_literals_use_the_full_width_bars():
  assert BOS.encode('unicode_escape') == rb'<\uff5cbegin\u2581of\u2581sentence\uff5c>'
  assert PAD.encode('unicode_escape') == rb'<\uff5c\u2581pad\u2581\uff5c>'


def test_generation_prompt_equals_the_tokenised_string(processor, hf):
  t = processor.templates
  for text in TEXTS + ['  "odd": 12 things!\n', 'ends with a mark.']:
    want = hf.tokenizer(f'{USER}: {text.strip()}\n\n{ASSISTANT}:{BOI}')['input_ids']
    assert (
      list(t.generation_prefix) + processor.encode_prompt(text) + list(t.generation_suffix) == want
    )


def test_understanding_prompt_equals_transformers_processor(processor, hf):
  picture = Image.new('RGB', (32, 32), 'red')
  conversation = [
    dict(role='user', content=[dict(type='image'), dict(type='text', text='Is there a red disc?')])
  ]
  text = hf.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
  want = hf(text=text, images=[picture], return_tensors='np')['input_ids'][0].tolist()
  t = processor.templates
  assert want == (
    list(t.understanding_prefix)
    + [t.image_id] * 64
    + list(t.understanding_infix)
    + processor.encode_question('Is there a red disc?')
    + list(t.understanding_suffix)
  )


def test_system_prompt_comes_before_the_user_where_the_directory_asks_for_it(tmp_path):
  processor = processor_lib.make_tokenizer(TEXTS, 300, tmp_path, system_prompt=True)
  from transformers import AutoProcessor

  hf = AutoProcessor.from_pretrained(tmp_path)
  want = hf(
    text=f'{USER}: {IMAGE}\nyes\n\n{ASSISTANT}:',
    images=[Image.new('RGB', (32, 32))],
    return_tensors='np',
  )
  t = processor.templates
  assert want['input_ids'][0].tolist() == (
    list(t.understanding_prefix)
    + [t.image_id] * 64
    + list(t.understanding_infix)
    + processor.encode_question('yes')
    + list(t.understanding_suffix)
  )
  assert len(t.generation_prefix) == 3  # bos, role, colon: drawing prompts carry no system prompt


def test_special_tokens_are_found_by_their_text_whatever_their_ids(directory, processor, tmp_path):
  """As between 1B and 7B: thirteen plain letters as added tokens before the padding token, whose
  ids all move.
  """
  import json

  content = json.loads((directory / 'tokenizer.json').read_text())
  plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)
  moved = [token for token in content['added_tokens'] if token['content'] not in (BOS, EOS)]
  first = min(token['id'] for token in moved)
  for token in moved:
    token['id'] += 13
  content['added_tokens'] += [dict(plain, id=first + i, content=chr(0x410 + i)) for i in range(13)]
  content['added_tokens'].sort(key=lambda token: token['id'])
  (tmp_path / 'tokenizer.json').write_text(json.dumps(content))
  other = processor_lib.Processor.from_directory(tmp_path)
  one, two = processor.templates, other.templates
  assert (two.bos_id, two.eos_id) == (one.bos_id, one.eos_id)
  assert all(
    getattr(two, key) == getattr(one, key) + 13
    for key in ('pad_id', 'boi_id', 'eoi_id', 'image_id')
  )

  def shifted(ids):
    return tuple(i + 13 if i >= first else i for i in ids)

  assert two.generation_prefix == shifted(
    one.generation_prefix
  ) and two.generation_suffix == shifted(one.generation_suffix)
  assert two.understanding_suffix == shifted(one.understanding_suffix)
  # The letters stay words: they may be sampled, and written in prompts.
  assert first not in two.forbidden_text_ids and first in other.encode_prompt(chr(0x410))


def test_answer_has_one_leading_space_and_an_eos(processor, hf):
  want = hf.tokenizer(f'{ASSISTANT}: yes{EOS}')['input_ids'][1:]
  assert list(processor.templates.understanding_suffix[2:]) + processor.encode_answer('yes') == want


def test_decode_inverts_encode_and_stops_at_eos(processor):
  ids = processor.encode_answer('two small rings, and 3 stars.')
  assert processor.decode(ids + ids) == 'two small rings, and 3 stars.'
  assert processor.decode([processor.templates.pad_id] + ids) == 'two small rings, and 3 stars.'


def test_sampling_forbids_every_special_token_but_eos_and_the_rows_beyond_the_tokenizer(directory):
  processor = processor_lib.Processor.from_directory(directory, vocab_size=400)
  size = len(processor.tokenizer)
  forbidden = set(processor.templates.forbidden_text_ids)
  specials = set(processor.tokenizer.convert_tokens_to_ids(list(processor_lib.SPECIALS)))
  assert forbidden == (specials - {processor.templates.eos_id}) | set(range(size, 400))


def test_pad_is_left_justified(processor):
  text = processor.pad([[5, 6], [7]], 4)
  pad = processor.templates.pad_id
  assert text.ids.tolist() == [[5, 6, pad, pad], [7, pad, pad, pad]]
  assert text.mask.tolist() == [[True, True, False, False], [True, False, False, False]]


@pytest.mark.parametrize(
  'text, found',
  [('', 'empty prompt'), (' \n', 'empty prompt'), (f'a {BOI} b', BOI), ('red ' * 40, 'tokens')],
)
def test_unusable_prompts_are_refused(processor, text, found):
  with pytest.raises(InputError, match=found):
    processor.encode_prompt(text, max_tokens=16)


def test_a_text_longer_than_the_padding_is_refused(processor):
  with pytest.raises(InputError, match='3 tokens; expected at most 2'):
    processor.pad([[1, 2, 3]], 2)


@pytest.mark.parametrize('content', [None, '{', '{"model": 3}'])
def test_a_missing_or_broken_tokenizer_is_refused(tmp_path, content):
  if content is not None:
    (tmp_path / 'tokenizer.json').write_text(content)
  with pytest.raises(InputError, match='tokenizer.json'):
    processor_lib.Processor.from_directory(tmp_path)


def test_a_tokenizer_without_janus_tokens_is_refused(tmp_path):
  from tokenizers import Tokenizer, models

  Tokenizer(models.BPE({'a': 0}, [])).save(str(tmp_path / 'tokenizer.json'))
  with pytest.raises(InputError, match='without the special tokens'):
    processor_lib.Processor.from_directory(tmp_path)


def test_a_vocabulary_too_small_for_bytes_is_refused(tmp_path):
  with pytest.raises(InputError, match='at least 264'):
    processor_lib.make_tokenizer(TEXTS, 100, tmp_path)


# Pictures.


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
    got = np.asarray(processor_lib.load_image(through_png(image)))
    np.testing.assert_array_equal(got, want)
    if mode in ('RGB', 'L', 'P'):
      np.testing.assert_array_equal(got, grey)


def test_16_bit_grey_keeps_its_brightness():
  values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
  got = np.asarray(processor_lib.load_image(through_png(Image.fromarray(values))))
  np.testing.assert_array_equal(got[..., 0], np.round(values / 257))


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P'])
def test_transparency_shows_white(mode):
  image = Image.new('RGBA', (4, 2), (0, 0, 0, 0))
  image.putpixel((0, 0), (0, 0, 0, 255))
  got = np.asarray(processor_lib.load_image(through_png(image.convert(mode))))
  assert got[0, 0].max() == 0 and got[1, 3].min() == 255


def test_half_transparent_black_is_mid_grey():
  got = np.asarray(processor_lib.load_image(Image.new('RGBA', (1, 1), (0, 0, 0, 128))))
  assert abs(int(got[0, 0, 0]) - 127) <= 1


@pytest.mark.parametrize(
  'content', [b'', b'no picture', through_png(Image.fromarray(noise(64, 64))).getvalue()[:500]]
)
def test_what_does_not_decode_is_refused(tmp_path, content):
  path = tmp_path / 'x.png'
  path.write_bytes(content)
  with pytest.raises(InputError, match='unreadable as a picture'):
    processor_lib.load_image(path)


def test_a_missing_picture_is_refused(tmp_path):
  with pytest.raises(InputError, match='unreadable as a picture'):
    processor_lib.load_image(tmp_path / 'none.png')


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
  got = processor_lib.preprocess(image, 32, 'crop', rounding)
  assert got.shape == (32, 32, 3) and got.dtype == np.uint8
  assert np.abs(got.astype(int) - want).max() <= 1


@pytest.mark.parametrize('mode', ['crop', 'pad'])
@pytest.mark.parametrize('height, width', [(1, 1000), (1000, 1), (1, 1), (3, 2)])
def test_extreme_shapes_become_square(mode, height, width):
  picture = processor_lib.preprocess(Image.fromarray(noise(height, width)), 32, mode)
  assert picture.shape == (32, 32, 3)


@pytest.mark.parametrize(
  'height, width', [(1, 1000), (1000, 1), (33, 50), (97, 64), (384, 384), (511, 700), (1023, 767)]
)
def test_pad_with_round_equals_the_transformers_processor(height, width):
  from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

  hf = JanusImageProcessorPil(
    size=dict(height=384, width=384), image_mean=[0.5] * 3, image_std=[0.5] * 3
  )
  image = Image.fromarray(noise(height, width))
  want = np.asarray(hf(image, return_tensors='np')['pixel_values'][0]).transpose(1, 2, 0)
  got = processor_lib.to_float(processor_lib.preprocess(image, 384, 'pad', 'round'))
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
  from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

  hf = JanusImageProcessorPil(
    size=dict(height=64, width=64), image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True
  )
  image, theirs = of_mode(
    mode
  )  # of 16 bits transformers cuts off all but the darkest 256 values, so it gets 8
  want = np.asarray(hf(theirs, return_tensors='np')['pixel_values'][0]).transpose(1, 2, 0)
  got = processor_lib.to_float(processor_lib.preprocess(image, 64, 'pad', 'round'))
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
  np.testing.assert_array_equal(processor_lib.preprocess(image, 384, 'pad', 'int'), want)


def test_int_and_round_differ_by_at_most_one_row_of_padding():
  counts = []
  for height in range(40, 80):
    image = Image.new('RGB', (101, height), 'red')
    red = [
      (processor_lib.preprocess(image, 96, 'pad', rounding)[:, 0] == [255, 0, 0]).all(-1).sum()
      for rounding in ('int', 'round')
    ]
    counts.append(red[1] - red[0])
  assert set(counts) == {0, 1}


def test_to_float_covers_the_range_and_to_uint8_truncates():
  np.testing.assert_allclose(
    processor_lib.to_float(np.array([0, 255], np.uint8)), [-1, 1], atol=1e-6
  )
  assert processor_lib.to_uint8(np.array([-3.0, -1, 0, 0.999, 1, 7])).tolist() == [
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
    processor_lib.preprocess(Image.new('RGB', (3, 3)), 32, **options)
