"""A tokenizer made from texts, and the files beside it."""

import json

import pytest
from transformers import AutoProcessor

from dsr_jax import images
from dsr_jax.convert import tokenizer_files
from dsr_jax.errors import InputError
from dsr_jax.models.janus.processor import SPECIALS

TEXTS = ['a red circle left of a blue square', 'two small green rings and 3 dotted stars.']
FILES = [
  'chat_template.jinja',
  'generation_config.json',
  'preprocessor_config.json',
  'processor_config.json',
  'special_tokens_map.json',
  'tokenizer.json',
  'tokenizer_config.json',
]


def test_every_file_but_the_model_is_written_and_nothing_aside_is_left(tmp_path):
  tokenizer_files.make_tokenizer(TEXTS, 300, tmp_path)
  assert sorted(path.name for path in tmp_path.iterdir()) == FILES


def test_special_tokens_are_the_last_ids_in_their_order(tmp_path):
  tokenizer = tokenizer_files.make_tokenizer(TEXTS, 300, tmp_path).tokenizer
  size = len(tokenizer)
  assert size <= 300
  ids = tokenizer.convert_tokens_to_ids(list(SPECIALS))
  assert ids == list(range(size - len(SPECIALS), size))


def test_sizes_and_grey_reach_the_files_that_transformers_reads(tmp_path):
  tokenizer_files.make_tokenizer(TEXTS, 300, tmp_path, image_size=48, patch_size=8)
  assert json.loads((tmp_path / 'processor_config.json').read_text())['num_image_tokens'] == 36
  theirs = AutoProcessor.from_pretrained(tmp_path).image_processor
  assert dict(theirs.size) == {'height': 48, 'width': 48}
  assert theirs.min_size == images.MIN_SIDE
  assert tuple(theirs.background_color) == images.GREY


def test_a_vocabulary_too_small_for_bytes_is_refused(tmp_path):
  with pytest.raises(InputError, match='at least 264'):
    tokenizer_files.make_tokenizer(TEXTS, 100, tmp_path)
