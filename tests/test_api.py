"""The Python interface: what the commands say, from Python, with pictures of any common kind."""

import subprocess
import sys

import numpy as np
from PIL import Image
from places import ROOT
import pytest
import tiny_showo

import dsr_jax as dsr
from dsr_jax import api, config_loading, images, inference
from dsr_jax import train as train_lib
from dsr_jax.convert import locate

PROMPT = 'a red circle left of a blue square'


@pytest.fixture(scope='module')
def model(hf_directory):
  return dsr.load(hf_directory)


@pytest.fixture(scope='module')
def drawn(model):
  return model.generate(PROMPT, num_samples=3, seed=5)


@pytest.fixture(scope='module')
def pixels():
  return np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


# Importing.


def test_importing_the_package_imports_nothing_heavy():
  code = (
    'import sys, dsr_jax as dsr\n'
    'assert dsr.__version__ and "load" in dir(dsr)\n'
    'heavy = {"jax", "numpy", "PIL", "transformers", "flax", "absl"} & sys.modules.keys()\n'
    'assert not heavy, heavy\n'
    'try:\n  dsr.lod\nexcept AttributeError as e:\n  assert "lod" in str(e)\n'
    'else:\n  raise AssertionError\n'
  )
  subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


def test_every_public_name_is_there_and_documented():
  assert set(dsr.__all__) == {*api.__all__, '__version__'}
  for name in api.__all__:
    assert getattr(api, name).__doc__
    # dsr_jax.train is the module of the loop too, and stays it.
    assert getattr(dsr, name) is (getattr(api, name) if name != 'train' else train_lib)
  for name in ('generate', 'describe', 'score', 'explain', 'as_seen'):
    assert getattr(api.Model, name).__doc__


# Drawing.


def test_drawings_are_what_was_sampled_best_first(model, drawn, hf_directory):
  rewards = [d.reward_generation for d in drawn]
  assert rewards == sorted(rewards, reverse=True)
  assert sorted(d.candidate for d in drawn) == [0, 1, 2]
  alone = inference.Inference(locate.resolve(str(hf_directory)))
  ids = alone.encode(PROMPT, 'prompt')
  codes, logps = alone.draw(ids, 3, temperature=1.0, guidance=model.guidance, seed=5)
  for d in drawn:
    np.testing.assert_array_equal(d.codes, codes[d.candidate])
    np.testing.assert_array_equal(d.sampling_logps, logps[d.candidate])
    assert d.image.size == (model.image_size, model.image_size) and d.image.mode == 'RGB'
    np.testing.assert_array_equal(d.image, images.to_uint8(alone.decode(d.codes)))
    assert d.reward_generation == pytest.approx(d.text_logps.mean(dtype=np.float64), abs=0)
    assert d.reward_understanding == pytest.approx(d.image_logps.mean(dtype=np.float64), abs=0)


def test_several_prompts_are_drawn_as_each_alone(model, drawn):
  both = model.generate([PROMPT, 'two blue squares'], num_samples=3, seed=5)
  assert [d.prompt for d in both[1]] == ['two blue squares'] * 3
  for a, b in zip(both[0], drawn):
    np.testing.assert_array_equal(a.codes, b.codes)
    assert a.reward_generation == b.reward_generation


def test_fewer_samples_are_the_first_of_more(model, drawn):
  (first,) = model.generate(PROMPT, num_samples=1, seed=5)
  same = next(d for d in drawn if d.candidate == 0)
  np.testing.assert_array_equal(first.codes, same.codes)


# Scores.


def test_a_drawing_scores_exactly_what_it_was_drawn_with(model, drawn):
  for d in drawn[:2]:
    for score in (model.score(PROMPT, d), model.score(PROMPT, codes=d.codes.tolist())):
      assert score.reward_generation == d.reward_generation
      assert score.reward_understanding == d.reward_understanding
      np.testing.assert_array_equal(score.text_logps, d.text_logps)
      np.testing.assert_array_equal(score.image_codes, d.codes)


@pytest.mark.parametrize('text', [PROMPT, '  red,  blue. and a\nsquare  ', 'x'])
def test_the_shares_of_the_words_add_up_to_the_reward(model, drawn, text):
  score = model.score(text, drawn[0])
  assert [w.text for w in score.words] == text.split()
  assert all(text.strip()[w.start : w.end] == w.text for w in score.words)
  assert sum(w.value for w in score.words) == pytest.approx(score.reward_generation, abs=1e-6)


def test_a_picture_is_the_same_as_a_file_an_image_and_an_array(model, pixels, tmp_path):
  path = tmp_path / 'x.png'
  Image.fromarray(pixels).save(path)
  with open(path, 'rb') as file:
    opened = model.score(PROMPT, file)
  others = [
    path,
    str(path),
    Image.fromarray(pixels),
    pixels / 255,
    pixels.astype(np.float32) / 255,
    pixels.astype(np.uint16) * 257,
    np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)]),
  ]
  expected = model.score(PROMPT, pixels)
  np.testing.assert_array_equal(opened.image_codes, expected.image_codes)
  for other in others:
    found = model.score(PROMPT, other)
    np.testing.assert_array_equal(found.image_codes, expected.image_codes)
    assert found.reward_generation == expected.reward_generation


def test_grey_pictures_have_equal_colors(model, pixels):
  grey = pixels[..., 0]
  expected = model.as_seen(np.dstack([grey] * 3))
  np.testing.assert_array_equal(model.as_seen(grey), expected)
  np.testing.assert_array_equal(model.as_seen(grey[..., None]), expected)
  black_and_white = np.where(grey > 127, np.uint8(255), np.uint8(0))
  np.testing.assert_array_equal(model.as_seen(grey > 127), model.as_seen(black_and_white))


# Explanations.


def test_an_explanation_compares_with_pictures_and_codes_without_a_text(model, drawn):
  found = model.explain(PROMPT, drawn[0])
  side = int(len(drawn[0].codes) ** 0.5)
  assert found.patches.shape == (side, side)
  assert [w.text for w in found.words] == PROMPT.split()

  # Its words, from scores alone: codes of the unconditional branch, log of the mean likelihood.
  ids = model._inference.encode(model.question, 'prompt')
  codes, _ = model._inference.draw(ids, api.UNSEEN, temperature=1.0, guidance=0.0, seed=0)
  others = np.exp([model.score(PROMPT, codes=c).text_logps.astype(np.float64) for c in codes])
  heat = drawn[0].text_logps - np.log(others.mean(axis=0))
  assert sum(w.value for w in found.words) == pytest.approx(heat.sum(), abs=1e-3)

  # Its patches: codes without a text are the same beside another text of as many tokens.
  turned = 'a blue circle left of a red square'
  other = model.explain(turned, drawn[0])
  one, two = (model.score(text, drawn[0]) for text in (PROMPT, turned))
  assert len(one.text_tokens) == len(two.text_tokens) and one.text_tokens != two.text_tokens
  difference = (found.patches - other.patches).ravel()
  np.testing.assert_allclose(difference, one.image_logps - two.image_logps, atol=1e-4, rtol=0)


# Texts.


def test_texts_come_best_first_and_repeat(model, pixels):
  texts = model.describe(pixels, num_samples=3, max_tokens=8, seed=1)
  rewards = [t.reward_understanding for t in texts if t.reward_understanding is not None]
  assert rewards == sorted(rewards, reverse=True)
  again = model.describe(pixels, num_samples=3, max_tokens=8, seed=1)
  assert [t.text_tokens for t in again] == [t.text_tokens for t in texts]
  for t in texts:
    assert len(t.sampling_logps) == len(t.text_tokens) + t.ended


# What is refused.


@pytest.mark.parametrize(
  'ask, found',
  [
    (lambda m, p: m.generate(''), 'prompt is empty; write at least one word'),
    (lambda m, p: m.generate([]), 'prompts is empty; pass at least one'),
    (lambda m, p: m.generate([PROMPT, 3]), r'prompts\[1\] has the type int; convert it'),
    (lambda m, p: m.generate(7), 'prompts has the type int; pass a text'),
    (lambda m, p: m.generate(b'red'), 'prompts has the type bytes; pass a text'),
    (lambda m, p: m.generate(PROMPT, num_samples=0), 'num_samples is 0; set it to'),
    (lambda m, p: m.generate(PROMPT, num_samples=2.5), 'num_samples is 2.5; set it to'),
    (lambda m, p: m.generate(PROMPT, seed=-1), 'seed is -1; set it to'),
    (lambda m, p: m.generate(PROMPT, seed=2**32), 'seed is 4294967296; set it to'),
    (lambda m, p: m.generate(PROMPT, temperature=float('nan')), 'temperature is nan; set it to'),
    (lambda m, p: m.generate(PROMPT, cfg_weight=-1), 'cfg_weight is -1; set it to'),
    (lambda m, p: m.generate(PROMPT, instruction=3), 'instruction=3 is not UTF-8 text'),
    (lambda m, p: m.generate('\udcff'), 'prompt is not UTF-8 text'),
    (lambda m, p: m.describe(p, max_tokens=0), 'max_tokens is 0; set it to'),
    (lambda m, p: m.describe(p, question=' '), 'question is empty; write at least one word'),
    (lambda m, p: m.describe('/nowhere.png'), 'cannot read /nowhere.png'),
    (lambda m, p: m.describe(p.astype(np.int64)), 'the image is an array of int64; convert it'),
    (lambda m, p: m.describe(p * 1.0), 'the image is an array of floats from 0 to 255'),
    (lambda m, p: m.describe(p * np.nan), 'the image is an array of floats from nan'),
    (lambda m, p: m.describe(p[None]), r'the image has the shape \(1, 20, 30, 3\)'),
    (lambda m, p: m.describe(p.transpose(2, 0, 1)), r'the image has the shape \(3, 20, 30\)'),
    (lambda m, p: m.describe(p[:0]), r'the image has the shape \(0, 30, 3\)'),
    (lambda m, p: m.score(PROMPT), 'got neither of image and codes'),
    (lambda m, p: m.score(PROMPT, p, codes=[1]), 'got both of image and codes'),
    (lambda m, p: m.score(PROMPT, codes=[1, 2]), r'these codes, of shape \(2,\)'),
    (lambda m, p: m.score(PROMPT, codes=[[1], [1, 2]]), r'these codes, of shape \(0,\)'),
    (lambda m, p: m.describe(p, crop='round'), "mode is 'round'; use crop or pad"),
    (lambda m, p: m.generate(PROMPT, cfg_interval=-1), 'cfg_interval is -1; set it to'),
    (lambda m, p: m.score(PROMPT, codes=np.full(16, -1)), 'pass 16 integers from 0'),
    (lambda m, p: dsr.load('/nowhere'), "there is no model '/nowhere'"),
    (lambda m, p: dsr.load(None), 'model has the type NoneType; name'),
    (lambda m, p: dsr.train('nonsense', 'x'), 'there is no config file nonsense'),
    (lambda m, p: dsr.train(3, 'x'), 'config has the type int; pass'),
    (lambda m, p: dsr.train('scenes', 'x', {'method.stepps': 3}), 'did you mean'),
    (
      lambda m, p: dsr.train('scenes', 'x', {'method.steps': 'x'}),
      "config.method.steps is 'x'; set it to",
    ),
    (lambda m, p: dsr.train('scenes', 'x', {'method.steps.a': 1}), 'steps is a value and not a'),
    (lambda m, p: dsr.train('scenes', 'x', {'nonsense.a': 1}), 'nonsense'),
    (lambda m, p: dsr.train('scenes', 'x', {3: 4}), 'config.3 is not a key; the keys are'),
    (
      lambda m, p: dsr.train('scenes', 'x', {'method': 3}),
      r'config.method is a group of keys, not a value \(3\)',
    ),
    (
      lambda m, p: dsr.train(
        'scenes', 'x', {'method.trainable': 'lora', 'method.learning_rate': 1e-4}
      ),
      'method.lora.learning_rate',
    ),
    (lambda m, p: dsr.train('scenes', 'x', {'method.lora_rank': 1}), 'is now method.lora.rank'),
  ],
)
def test_what_cannot_be_done_is_one_sentence(model, pixels, ask, found, monkeypatch):
  monkeypatch.setattr(api.train_lib, 'run', lambda *args: pytest.fail('a run began'))
  with pytest.raises(dsr.InputError, match=found):
    ask(model, pixels)


# Runs.


def test_a_config_comes_by_name_by_file_as_a_tree_and_as_a_record():
  overrides = {'method.steps': 7, 'method.lora.rank': 3}
  path = config_loading.find('scenes_tiny')[0]
  by_name = api._config('scenes_tiny', overrides)
  assert (by_name.method.steps, by_name.method.lora.rank) == (7, 3)
  tree = config_loading.read('scenes_tiny')
  for other in (path, tree, config_loading.from_config_dict(tree)):
    assert api._config(other, overrides) == by_name
  assert api._config('scenes_tiny', {}) == config_loading.load('scenes_tiny')


def test_the_module_of_the_loop_can_be_called_though_it_was_imported_first():
  code = (
    'import dsr_jax as dsr\n'
    'from dsr_jax import train\n'
    'try:\n  dsr.train("nonsense", "x")\n'
    'except dsr.InputError as e:\n  assert "no config file nonsense" in str(e)\n'
    'else:\n  raise AssertionError\n'
    'assert callable(train.run) and callable(dsr.train.Builders)\n'
  )
  subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


def test_train_runs_and_its_workdir_loads(monkeypatch, tmp_path):
  summary = tmp_path / 'summary.json'

  def run(config, workdir):
    assert config.method.steps == 2 and workdir == str(tmp_path)
    summary.write_text('{"step": 2}')
    return str(summary)

  monkeypatch.setattr(api.train_lib, 'run', run)
  found = dsr.train('scenes_tiny', tmp_path, {'method.steps': 2})
  assert found.summary == {'step': 2} and found.workdir == str(tmp_path)
  assert found.report == str(tmp_path / 'report.html')


# Another family.


def test_a_show_o_draws_describes_and_scores_too(tmp_path, pixels):
  tiny_showo.write(tmp_path)
  model = dsr.load(tmp_path / 'show-o')
  drawn = model.generate('a red circle', num_samples=2)
  score = model.score('a red circle', drawn[0])
  assert score.reward_generation == drawn[0].reward_generation
  assert [w.text for w in score.words] == ['a', 'red', 'circle']
  assert sum(w.value for w in score.words) == pytest.approx(score.reward_generation, abs=1e-6)
  assert len(model.explain('a red circle', drawn[0]).words) == 3
  assert len(model.describe(pixels, num_samples=2, max_tokens=4)) == 2
