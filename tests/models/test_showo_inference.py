"""A Show-o of files behind the commands: one sampler and scorer for all of them."""

import dataclasses

import numpy as np
import pytest
import tiny_showo

from dsr_jax import config as config_lib
from dsr_jax.convert import locate
from dsr_jax.errors import InputError
from dsr_jax.inference import Inference
from dsr_jax.models.unified import named


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  folder = tmp_path_factory.mktemp('hub')
  tiny_showo.write(folder)
  source = locate.resolve(str(folder / 'show-o'))
  method = dataclasses.replace(source.method, sampling_steps=3)
  return Inference(dataclasses.replace(source, method=method))


def test_what_is_drawn_is_scored_the_same_by_its_codes_and_by_its_pixels(model):
  prompt = model.encode('a red circle', 'prompt')
  codes, logps = model.draw(prompt, 2, temperature=1.0, guidance=2.0, seed=1)
  assert codes.shape == logps.shape == (2, 16) and np.any(codes[0] != codes[1])
  assert np.all(logps < 0)
  question = model.encode('yes', 'question')
  pixels = model.decode(codes[0])
  scores = model.score(prompt, codes[0], pixels, question)
  assert scores.text_logps.shape == (len(prompt),) and scores.image_logps.shape == (16,)
  # Only codes are read: any pixels will do.
  np.testing.assert_array_equal(
    model.score(prompt, codes[0], pixels * 0, question).text_logps, scores.text_logps
  )
  # A prompt and the same words as an answer are one text.
  answer = model.processor.encode_answer('a red circle')[:-1]
  assert answer[0] != prompt[0] and answer[1:] == prompt[1:]
  again = model.score(answer, codes[0], pixels, question)
  np.testing.assert_array_equal(again.text_logps, scores.text_logps)
  np.testing.assert_array_equal(again.image_logps, scores.image_logps)


def test_texts_are_words_of_the_tokenizer(model):
  pixels = np.random.default_rng(0).uniform(-1, 1, (8, 8, 3)).astype(np.float32)
  question = model.encode('yes', 'question')
  texts = model.describe(pixels, question, 2, temperature=1.0, max_tokens=6, seed=0)
  assert all(ids.max() < model.config.text.vocab_size for ids, _ in texts)
  assert all(isinstance(model.processor.decode(ids), str) for ids, _ in texts)


def test_the_steps_of_a_run_are_those_of_its_commands(model):
  assert model.config.sampling_steps == 3
  assert named(model.spec, config_lib.Method()).sampling_steps == 3


def test_an_interval_of_guidance_is_refused(model):
  prompt = model.encode('yes', 'prompt')
  with pytest.raises(InputError, match='cfg_interval=4 does not fit .* a Show-o, which draws an? '):
    model.draw(prompt, 1, temperature=1.0, guidance=2.0, seed=1, cfg_interval=4)
