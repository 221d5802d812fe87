"""generate, describe and score: they print what the model says, repeatably, and leave nothing
half-written.
"""

import contextlib
import io
import json
import os
import pathlib
import subprocess
import sys
import types

from absl import flags
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from places import ROOT
import pytest

from dsr_jax import config as config_lib
from dsr_jax import describe, files, generate, images, inference, saved_config, score
from dsr_jax.convert import locate
from dsr_jax.errors import InputError
from dsr_jax.models.unified import Picture, Scoring, Text
from dsr_jax.rewards import dual
from dsr_jax.runtime import checkpoints
from dsr_jax.state import TrainState

PROMPT = 'a red circle left of a blue square'


def run(command, **values):
  """Runs a command in this process; returns what it printed on stdout, parsed."""
  f = flags.FlagValues()
  command.define_flags(f)
  f(['test', *(f'--{name}={value}' for name, value in values.items())])
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    command.main(['test'], f)
  return json.loads(out.getvalue())


@pytest.fixture(scope='module')
def drawn(hf_directory, tmp_path_factory):
  """(folder, samples.json) of six pictures."""
  folder = tmp_path_factory.mktemp('drawn') / 'out'
  run(generate, model=hf_directory, prompt=PROMPT, num_samples=6, output=folder)
  return folder, json.loads((folder / 'samples.json').read_text())


@pytest.fixture(scope='module')
def picture(tmp_path_factory):
  path = tmp_path_factory.mktemp('picture') / 'x.png'
  Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)).save(path)
  return path


def content(bundle, text, question=False):
  encode = bundle.processor.encode_question if question else bundle.processor.encode_prompt
  return Text(
    *(jnp.asarray(x) for x in bundle.processor.pad([encode(text)], 32 if question else 12))
  )


@pytest.fixture(scope='module')
def reward(model, bundle):
  """The training step's rewards, compiled: reward.generation and reward.understanding."""
  eos = bundle.config.templates.eos_id
  return types.SimpleNamespace(
    generation=jax.jit(lambda *args: dual.generation(model, *args, Scoring())),
    understanding=jax.jit(lambda *args: dual.understanding(model, *args, Scoring(), eos_id=eos)),
  )


@pytest.fixture(scope='module')
def decode(model):
  return jax.jit(model.picture_from_codes)


@pytest.fixture(scope='module')
def read(picture, bundle, model):
  """The picture file as the model has it: (1, ...)."""
  square = images.preprocess(images.load_image(picture), bundle.config.image_size, 'pad')
  return jax.jit(model.picture_from_pixels)(jnp.asarray(images.to_float(square))[None])


def instruction(bundle):
  asked = content(bundle, config_lib.Method().instruction, question=True)
  return Text(asked.ids[0], asked.mask[0])


# What they say.


def test_pictures_come_best_first_and_are_the_decoded_codes(drawn, decode):
  folder, summary = drawn
  samples = summary['samples']
  rewards_found = [s['reward_generation'] for s in samples]
  assert rewards_found == sorted(rewards_found, reverse=True)
  assert sorted(s['candidate'] for s in samples) == list(range(6))
  assert sorted(os.listdir(folder)) == [f'{i:02d}.png' for i in range(6)] + ['samples.json']
  decoded = decode(jnp.asarray([[s['codes'] for s in samples]])).pixels[0]
  for sample, pixels in zip(samples, np.asarray(decoded)):
    shown = np.asarray(Image.open(folder / sample['file'])).astype(int)
    assert np.abs(shown - images.to_uint8(pixels)).max() <= 1  # truncation may fall to either side


def test_rewards_are_those_of_the_training_step(drawn, bundle, reward, decode):
  samples = drawn[1]['samples']
  codes = jnp.asarray([[s['codes'] for s in samples]])
  prompt = content(bundle, PROMPT)
  generation, text_logps = reward.generation(decode(codes), prompt, instruction(bundle))
  candidate = Text(prompt.ids[:, None], prompt.mask[:, None])
  understanding, _ = reward.understanding(codes[:, 0], candidate)
  np.testing.assert_allclose([s['reward_generation'] for s in samples], generation[0], atol=1e-4)
  length = len(samples[0]['text_logps'])
  np.testing.assert_allclose(
    [s['text_logps'] for s in samples], text_logps[0, :, :length], atol=1e-4
  )
  assert not np.any(text_logps[0, :, length:])
  np.testing.assert_allclose(samples[0]['reward_understanding'], understanding[0, 0], atol=1e-4)


def test_sampling_log_probabilities_are_those_under_the_models_own_guidance(
  drawn, bundle, model, hf_directory
):
  samples = drawn[1]['samples']
  weight = json.loads((hf_directory / 'generation_config.json').read_text())['guidance_scale']
  assert drawn[1]['cfg_weight'] == weight != 1
  prompt = content(bundle, PROMPT)
  how = Scoring(guidance=float(weight))
  score_guided = jax.jit(lambda prompt, codes: model.picture_logps(prompt, codes, None, how).logp)
  logp = score_guided(
    Text(prompt.ids[:, None], prompt.mask[:, None]), jnp.asarray([[s['codes'] for s in samples]])
  )
  np.testing.assert_allclose([s['sampling_logps'] for s in samples], logp[0], atol=1e-4)


def test_scores_of_drawn_codes_equal_their_rewards_exactly(drawn, hf_directory, tmp_path):
  folder, summary = drawn
  for sample in summary['samples'][:3]:
    file = tmp_path / 'codes.json'
    file.write_text(json.dumps(sample['codes']))
    found = run(score, model=hf_directory, text=PROMPT, image_codes=file)
    for key in ('reward_generation', 'reward_understanding', 'text_logps', 'image_logps'):
      assert found[key] == sample[key], key
    assert found['image_codes'] == sample['codes']
    assert found['reward_generation'] == np.mean(
      np.asarray(found['text_logps'], np.float32), dtype=np.float64
    )
  best = run(score, model=hf_directory, text=PROMPT, image_codes=folder / 'samples.json')
  assert best['reward_generation'] == summary['samples'][0]['reward_generation']


def test_scores_in_another_process_are_the_same(drawn, hf_directory):
  folder, summary = drawn
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'dsr_jax.score',
      f'--model={hf_directory}',
      f'--text={PROMPT}',
      f'--image_codes={folder / "samples.json"}',
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  found = json.loads(done.stdout)
  assert found['reward_generation'] == summary['samples'][0]['reward_generation']
  assert found['image_logps'] == summary['samples'][0]['image_logps']


def test_an_empty_instruction_asks_nothing_before_the_text(
  picture, hf_directory, bundle, read, reward
):
  found = run(score, model=hf_directory, text=PROMPT, image=picture, instruction='')
  nothing = Text(jnp.zeros(8, jnp.int32), jnp.zeros(8, bool))
  pictures = Picture(read.codes[:, None], read.pixels[:, None])
  expected, _ = reward.generation(pictures, content(bundle, PROMPT), nothing)
  np.testing.assert_allclose(found['reward_generation'], expected[0, 0], atol=1e-4)
  usual = run(score, model=hf_directory, text=PROMPT, image=picture)
  assert abs(found['reward_generation'] - usual['reward_generation']) > 1e-4


def test_scores_of_an_image_file_are_those_of_its_pixels_and_codes(
  picture, hf_directory, bundle, read, reward
):
  found = run(score, model=hf_directory, text=PROMPT, image=picture)
  assert found['image_codes'] == read.codes[0].tolist()
  expected, _ = reward.generation(
    Picture(read.codes[:, None], read.pixels[:, None]), content(bundle, PROMPT), instruction(bundle)
  )
  np.testing.assert_allclose(found['reward_generation'], expected[0, 0], atol=1e-4)
  assert found['text_tokens'] == bundle.processor.encode_prompt(PROMPT)
  assert len(found['text_logps']) == len(found['text_tokens'])


def test_the_same_seed_draws_the_same_and_another_does_not(drawn, hf_directory, tmp_path):
  again = run_generate(hf_directory, tmp_path / 'a')
  assert again['samples'] == drawn[1]['samples']
  assert (
    run_generate(hf_directory, tmp_path / 'b', seed=7)['samples'][0]['codes']
    != again['samples'][0]['codes']
  )


def run_generate(model, folder, **values):
  run(generate, **{**dict(model=model, prompt=PROMPT, num_samples=6, output=folder), **values})
  return json.loads((folder / 'samples.json').read_text())


def test_pictures_do_not_depend_on_how_many_are_drawn_at_once(
  drawn, hf_directory, tmp_path, monkeypatch
):
  monkeypatch.setattr(inference, 'CHUNK', 3)
  again = run_generate(hf_directory, tmp_path / 'out')

  def codes(summary):
    return {s['candidate']: s['codes'] for s in summary['samples']}

  assert codes(again) == codes(drawn[1])


def test_guidance_given_is_used(hf_directory, drawn, tmp_path):
  given = run_generate(hf_directory, tmp_path / 'out', cfg_weight=1)
  assert (
    given['cfg_weight'] == 1 and given['samples'][0]['codes'] != drawn[1]['samples'][0]['codes']
  )


def test_a_model_compared_with_itself_draws_the_same(hf_directory, drawn, tmp_path):
  summary = run_generate(hf_directory, tmp_path / 'out', compare=hf_directory)

  def drop(samples):
    return [{k: v for k, v in s.items() if k != 'file'} for s in samples]

  assert (
    drop(summary['compare']['samples']) == drop(summary['samples']) == drop(drawn[1]['samples'])
  )
  assert (tmp_path / 'out/00.png').read_bytes() == (tmp_path / 'out/compare/00.png').read_bytes()
  grid = Image.open(tmp_path / 'out/grid.png')
  assert grid.width > 6 * 160 and grid.height > 2 * 160


def test_texts_come_best_first_and_are_scored_by_the_picture(
  picture, hf_directory, bundle, read, reward
):
  found = run(describe, model=hf_directory, image=picture, num_samples=5, max_tokens=12)
  rewards_found = [
    s['reward_understanding'] for s in found['samples'] if s['reward_understanding'] is not None
  ]
  assert rewards_found == sorted(rewards_found, reverse=True)
  for sample in found['samples'][:3]:
    assert sample['text'] == bundle.processor.decode(sample['text_tokens'])
    text = bundle.processor.pad([sample['text_tokens']], 12)
    expected, _ = reward.understanding(read.codes, Text(*(jnp.asarray(x)[None] for x in text)))
    np.testing.assert_allclose(sample['reward_understanding'], expected[0, 0], atol=1e-4)


def test_a_question_changes_the_texts_and_a_seed_repeats_them(picture, hf_directory):
  f = dict(model=hf_directory, image=picture, num_samples=5, max_tokens=12)
  plain = run(describe, **f)
  assert run(describe, **f) == plain
  asked = run(describe, **f, question='Is there a red disc?', compare=hf_directory)
  assert asked['samples'] != plain['samples'] and asked['compare']['samples'] == asked['samples']


def test_an_empty_text_has_no_reward_and_comes_last(picture, hf_directory, bundle, monkeypatch):
  model = inference.Inference(locate.resolve(str(hf_directory)))
  eos = bundle.config.templates.eos_id
  texts = [
    (np.array([eos]), np.zeros(1, np.float32)),
    (np.array([5, 6, eos]), np.zeros(3, np.float32)),
  ]
  monkeypatch.setattr(model, 'describe', lambda *args, **kwargs: texts)
  best, last = describe.describe(model, str(picture))
  assert (
    last['text'] == '' and last['reward_understanding'] is None and best['reward_understanding'] < 0
  )


# Models.


@pytest.fixture(scope='module')
def workdir(hf_directory, bundle, tmp_path_factory):
  """A run's folder with checkpoints of steps 1 and 2, whose heads are the base's times the step
  plus one.
  """
  folder = tmp_path_factory.mktemp('run')
  about = {
    'method': saved_config.to_json(config_lib.Config())['method'],
    'data': {},
    'model': {'name': str(hf_directory), 'fingerprint': bundle.source['hash']},
  }
  kept = checkpoints.Checkpoints(str(folder), about)
  for step in (1, 2):
    head = {'kernel': jnp.asarray(bundle.params['lm_head']['kernel']) * (step + 1)}
    state = TrainState(
      step=jnp.int32(step),
      params={'lm_head': head},
      opt_state={'mu': jnp.zeros(3)},
      fixed_params={},
    )
    kept.save(step, state)
    kept.wait()
  kept.close()
  return folder


def test_a_run_is_its_base_with_the_trained_parameters_of_the_step(workdir, bundle):
  head = bundle.params['lm_head']['kernel']
  for name, factor in ((f'{workdir}', 3), (f'{workdir}@2', 3), (f'{workdir}@1', 2)):
    params = locate.resolve(name).bundle.params
    np.testing.assert_array_equal(params['lm_head']['kernel'], np.asarray(head) * factor)

    def rest(p):
      return {k: v for k, v in p.items() if k != 'lm_head'}

    jax.tree.map(np.testing.assert_array_equal, rest(params), rest(bundle.params))


def test_a_step_that_a_run_does_not_have_is_one_sentence(workdir, hf_directory):
  with pytest.raises(InputError, match='has the checkpoints .*, but none of step 9; name one'):
    locate.resolve(f'{workdir}@9')
  with pytest.raises(InputError, match='has no checkpoints'):
    locate.resolve(f'{hf_directory}@1')


def test_a_run_whose_base_has_changed_is_refused(workdir, monkeypatch):
  trained, about, step = checkpoints.load_trained(str(workdir))
  other = {**about, 'model': {**about['model'], 'fingerprint': 'another'}}
  monkeypatch.setattr(checkpoints, 'load_trained', lambda *args: (trained, other, step))
  with pytest.raises(InputError, match='does not have the weights that the run'):
    locate.resolve(str(workdir))


def test_a_run_is_no_source_for_training(workdir):
  with pytest.raises(InputError, match='is the workdir of a run; convert'):
    locate.directory_of(str(workdir))


def test_trained_parameters_of_another_model_are_refused(bundle):
  with pytest.raises(
    InputError, match='the source model does not have the trained parameter /lm_head/bias'
  ):
    locate.merged(bundle.params, {'lm_head': {'bias': np.zeros(3)}})
  with pytest.raises(InputError, match=r'/lm_head/kernel has shape \(3,\), but \('):
    locate.merged(bundle.params, {'lm_head': {'kernel': np.zeros(3)}})


def test_a_hub_id_that_cannot_be_fetched_is_one_sentence(monkeypatch):
  monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
  with pytest.raises(InputError, match='could not be fetched from the Hub') as e:
    locate.resolve('nobody/no-such-model')
  assert '\n' not in str(e.value)


def test_a_hub_id_is_the_downloaded_directory(monkeypatch, hf_directory):
  monkeypatch.setattr(
    huggingface_hub, 'snapshot_download', lambda name, allow_patterns: str(hf_directory)
  )
  assert locate.directory_of('owner/model-1.5') == str(hf_directory)


# Bad input: one clear sentence, an exit status that is not 0, nothing half-written.


@pytest.mark.parametrize(
  'values, said',
  [
    (dict(prompt=''), '--prompt is missing; add --prompt='),
    (dict(prompt='  '), 'prompt is empty; write at least one word'),
    (dict(prompt='word ' * 400), r'the prompt has \d+ tokens, but this model has room for at most'),
    (dict(prompt='a <|User|> b'), 'special token'),
    (dict(model=''), '--model is missing; add --model='),
    (dict(model='/nowhere/at/all'), 'there is no model'),
    (dict(num_samples=0), '--num_samples is 0'),
    (dict(temperature=-1), '--temperature is -1'),
    (dict(cfg_weight=-1), '--cfg_weight is -1'),
    (dict(cfg_weight='nan'), '--cfg_weight is nan'),
    (dict(seed=-1), '--seed is -1'),
    (dict(output=''), '--output is missing; add --output='),
  ],
)
def test_bad_input_to_generate_is_one_sentence_and_leaves_nothing(
  values, said, hf_directory, tmp_path
):
  values = {
    **dict(model=hf_directory, prompt=PROMPT, num_samples=6, output=tmp_path / 'out'),
    **values,
  }
  with pytest.raises(InputError, match=said) as e:
    run(generate, **values)
  assert '\n' not in str(e.value) and '; ' in str(e.value)
  assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
  'values, said',
  [
    (dict(image='nowhere.png'), 'cannot read nowhere.png'),
    (dict(question='<|User|>'), 'special token'),
    (dict(question='  '), '--question is empty; write a question'),
    (dict(image=''), '--image is missing; add --image='),
    (dict(max_tokens=0), '--max_tokens is 0; set it to a number from 1'),
    (dict(num_samples=-3), '--num_samples is -3'),
  ],
)
def test_bad_input_to_describe_is_one_sentence(values, said, picture, hf_directory):
  with pytest.raises(InputError, match=said) as e:
    run(describe, **{**dict(model=hf_directory, image=picture), **values})
  assert '\n' not in str(e.value)


@pytest.mark.parametrize(
  'codes, said',
  [
    ('[1, 2', 'codes.json is not JSON'),
    ('[1, 2]', 'has 2 codes from 1 to 2'),
    ('{"a": 1}', 'has no image codes; use a file'),
    ('[1.5]', 'has no image codes; use a file'),
    ('[true]', 'has no image codes; use a file'),
    ('7', 'has no image codes; use a file'),
    (json.dumps([99999] * 16), 'has 16 codes from 99999'),
    (json.dumps([-1] * 16), 'has 16 codes from -1'),
    (None, 'cannot read'),
  ],
)
def test_bad_codes_are_one_sentence(codes, said, tmp_path):
  file = tmp_path / 'codes.json'
  if codes is not None:
    file.write_text(codes)
  with pytest.raises(InputError, match=said) as e:
    score.read_codes(str(file), 16, 40)
  assert '\n' not in str(e.value)


def test_score_wants_a_picture_once(picture, hf_directory):
  with pytest.raises(InputError, match='--image and --image_codes: neither set; add one'):
    run(score, model=hf_directory, text=PROMPT)
  with pytest.raises(InputError, match='--image and --image_codes: both set; remove one'):
    run(score, model=hf_directory, text=PROMPT, image=picture, image_codes=picture)
  with pytest.raises(InputError, match='text is empty; write at least one word'):
    run(score, model=hf_directory, text=' ', image=picture)


def test_a_foreign_folder_is_refused_and_an_own_one_replaced(hf_directory, tmp_path):
  foreign = tmp_path / 'foreign'
  foreign.mkdir()
  (foreign / 'thesis.tex').write_text('years of work')
  with pytest.raises(InputError, match='already holds thesis.tex; name a new or empty folder'):
    run_generate(hf_directory, foreign)
  (tmp_path / 'file').write_text('')
  with pytest.raises(InputError, match='/file is a file; name a new folder'):
    run_generate(hf_directory, tmp_path / 'file')
  run_generate(hf_directory, tmp_path / 'own', compare=hf_directory)
  run_generate(hf_directory, tmp_path / 'own')
  assert sorted(os.listdir(tmp_path / 'own')) == [f'{i:02d}.png' for i in range(6)] + [
    'samples.json'
  ]
  assert sorted(os.listdir(tmp_path)) == ['file', 'foreign', 'own'] and os.listdir(foreign) == [
    'thesis.tex'
  ]


def test_a_folder_that_cannot_be_made_is_one_sentence(hf_directory, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(InputError, match='cannot write'):
    run_generate(hf_directory, tmp_path / 'file' / 'out')


def test_output_that_fails_half_way_leaves_what_was_there(tmp_path):
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out' / '00.png').write_text('old')
  for error in (OSError(28, 'No space left on device'), RuntimeError('x')):
    with pytest.raises((InputError, RuntimeError)):
      with files.whole_directory(str(tmp_path / 'out')) as aside:
        (pathlib.Path(aside) / '00.png').write_text('new')
        raise error
    assert os.listdir(tmp_path) == ['out'] and (tmp_path / 'out' / '00.png').read_text() == 'old'


@pytest.mark.parametrize('command', ['generate', 'describe', 'score'])
def test_a_wrong_command_line_is_a_sentence_and_a_status(command):
  done = subprocess.run(
    [sys.executable, '-m', f'dsr_jax.{command}'], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 2 and done.stdout == ''
  assert done.stderr.startswith('error: --model is missing') and done.stderr.count('\n') == 1
  stray = subprocess.run(
    [sys.executable, '-m', f'dsr_jax.{command}', 'red'], cwd=ROOT, capture_output=True, text=True
  )
  assert stray.returncode == 2 and "unexpected argument 'red'" in stray.stderr


@pytest.mark.parametrize('command', ['generate', 'describe', 'score'])
def test_help_names_every_flag(command):
  call = [sys.executable, '-m', f'dsr_jax.{command}', '--help']
  done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
  f = flags.FlagValues()
  {'generate': generate, 'describe': describe, 'score': score}[command].define_flags(f)
  assert all(
    f'--{name}:' in done.stdout or f'--[no]{name}:' in done.stdout for name in f if name != 'help'
  )
