"""The probe: one page and its numbers, with the judge of Scenes and without any judge."""

import dataclasses
import json
import os
import re
import subprocess
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import micro_parts
import numpy as np
import pytest
from run_command import ROOT, TINY, Page, picture_of, run

from dsr_jax import config_loading
from dsr_jax.convert import locate
from dsr_jax.errors import InputError
from dsr_jax.models.janus.processor import Processor
from dsr_jax.models.unified import Picture, Scoring, Text
from dsr_jax.probe import __main__ as probe
from dsr_jax.probe import measures, tasks
from dsr_jax.probe import page as page_lib
from dsr_jax.probe import scenes as scenes_lib
from dsr_jax.probe.model import ProbedPictures, Prober
from dsr_jax.rollouts import GenerationBatch
from dsr_jax.scenes import render, world


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
  """(what was printed, numbers, page) of a probe of the embedded model with its judge."""
  out = tmp_path_factory.mktemp('scenes') / 'out'
  said = run(
    probe, model='scenes', config=TINY, output=out, num_inputs=4, config__method__max_text_tokens=24
  )
  return said, json.loads((out / 'probe.json').read_text()), Page((out / 'probe.html').read_text())


@pytest.fixture(scope='module')
def own(tmp_path_factory):
  """(numbers, page, config) of the smallest model with prompts and pictures of someone's own: no
  judge.
  """
  config = config_loading.load(
    TINY, **micro_parts.write_inputs(tmp_path_factory.mktemp('own')), method__group_size=4
  )
  numbers, shown = measure(config)
  return numbers, Page(page_lib.page(numbers, shown)), config


def measure(config):
  model = micro_parts.load()
  results = tasks.probe(model, config, 3, 42)
  about = dict(
    model='micro',
    prompts='prompts.txt',
    images='pictures',
    inputs=3,
    candidates=4,
    temperature=1.0,
    guidance=1.0,
    seed=42,
    device='cpu',
    date='',
  )
  numbers = {
    'about': about,
    'go': True,
    'verdict': 'go',
    **{task: r.numbers for task, r in results.items()},
  }
  return measures.to_json(numbers), {task: r.shown for task, r in results.items()}


def test_the_judge_measures_what_the_rewards_pick(scenes):
  said, numbers, _ = scenes
  for task, score in (('generation', 'right'), ('understanding', 'f1')):
    n = numbers[task]
    judged = n['judged'][score]
    assert (
      judged['worst']['value'] <= judged['best_there_is']['value']
      and n['reward']['worst'] <= n['reward']['mean'] <= n['reward']['best']
    )
    assert judged['gain']['value'] == pytest.approx(
      judged['best']['value'] - judged['mean']['value']
    )
    assert (
      n['best_of']['by_reward'][0]
      == pytest.approx(judged['mean']['value'])
      == n['best_of']['by_judge'][0]
    )
    assert n['best_of']['by_reward'][-1] == pytest.approx(judged['best']['value'])
    assert {'colours', 'counts', 'relations', 'mean'} <= n['swaps'].keys() and n['swaps'][
      'colours'
    ]['cases'] == 64
    assert said[task]['verdict'] == n['verdict']['verdict']
    assert said[task]['not_measured'] == n['verdict']['not_measured']
  assert (
    len(numbers['generation']['categories'])
    == len({c for c in numbers['generation']['categories']})
    > 1
  )
  assert {'auc', 'cases', 'lowest'} <= numbers['generation']['words'].keys()
  assert {'all', 'things', 'relations'} == numbers['understanding']['clauses'].keys()
  assert len(numbers['generation']['instructions']['sentences']) == 3
  assert said['go'] == numbers['go']


def test_the_page_stands_alone_and_shows_pictures_words_and_a_verdict(scenes):
  _, numbers, page = scenes
  assert len(page.images) > 8 and all(
    src.startswith('data:image/png;base64,') for src in page.images
  )
  words = ' '.join(page.words)
  for word in (
    'go',
    'Go or no-go',
    'Best of n',
    'By kind of prompt',
    'where the reward comes from',
    'support of their clauses',
  ):
    assert word in words, word
  gates = [g for task in ('generation', 'understanding') for g in numbers[task]['verdict']['gates']]
  assert all(g['gate'] in words and f'{g["threshold"]:g}' in words for g in gates)


def test_without_a_judge_its_measures_are_left_out_and_the_others_are_there(own):
  numbers, page, _ = own
  for task in ('generation', 'understanding'):
    n = numbers[task]
    assert not {'judged', 'pairwise', 'best_of', 'categories', 'words', 'clauses'} & n.keys()
    assert {'ties', 'spread', 'slopes', 'swaps', 'reward'} <= n.keys()
    passed = {g['gate']: g['passed'] for g in n['verdict']['gates']}
    assert not n['verdict']['go'] and n['verdict']['not_measured']
    assert (
      passed['pairs ordered as the judge does'] is None
      and passed['groups without any difference'] is not None
    )
  assert numbers['generation']['swaps']['colours']['cases'] == 2  # two of the prompts name colours
  assert numbers['generation']['instructions']['mean'] is not None
  assert 'no judge for this data' in ' '.join(page.words) and 'not measured' in ' '.join(page.words)


def test_a_run_of_two_models_or_of_another_reward_is_probed_alike(own):
  numbers, _, config = own
  for changes in (dict(strategy='separate'), dict(reward='contrastive')):
    again, _ = measure(
      dataclasses.replace(config, method=dataclasses.replace(config.method, **changes))
    )
    assert all(
      again[task]['reward'] == pytest.approx(numbers[task]['reward'], rel=1e-5)
      for task in ('generation', 'understanding')
    )


def test_the_numbers_do_not_depend_on_the_chunk(own):
  numbers, _, config = own
  again, _ = measure(
    dataclasses.replace(config, system=dataclasses.replace(config.system, rollout_chunk=1))
  )
  for task in ('generation', 'understanding'):
    for key in ('reward', 'spread'):
      assert again[task][key] == pytest.approx(numbers[task][key], abs=1e-5)
  assert (
    again['generation']['swaps']['colours']['value']
    == numbers['generation']['swaps']['colours']['value']
  )


def test_what_is_asked_of_the_model_is_what_plain_calls_give(own):
  _, _, config = own
  model = micro_parts.load()
  words = model.processor
  prober = Prober(model, config.method, config.system, 0)
  prompt = words.pad([words.encode_prompt(t) for t in ('a red circle', 'two rings')], 6)
  asked = words.pad([words.encode_question('Describe it.')] * 2)
  drawn = prober.draw(prompt, ['Describe it.', 'What is it?'])
  plain = nnx.merge(model.graphdef, jax.tree.map(jnp.asarray, model.params))
  pictures = plain.picture_from_codes(drawn.codes)
  own_text = Text(prompt.ids[:, None], prompt.mask[:, None])
  read = plain.text_logps(pictures, asked, own_text, None, Scoring()).logp
  np.testing.assert_allclose(drawn.text_logps, read, atol=1e-5)
  lengths = prompt.mask.sum(1)[:, None]
  np.testing.assert_allclose(drawn.rewards[:, 0], drawn.text_logps.sum(-1) / lengths, atol=1e-5)
  assert np.abs(drawn.rewards[:, 0] - drawn.rewards[:, 1]).max() > 1e-4  # another instruction
  scores = plain.picture_logps(own_text, drawn.codes, None, Scoring())
  np.testing.assert_allclose(drawn.code_logps, scores.logp, atol=1e-5)
  np.testing.assert_allclose(drawn.code_entropy, scores.entropy, atol=1e-5)

  # Without a prompt every prompt is alike.
  other = Text(prompt.ids[::-1, None], prompt.mask[::-1, None])
  unconditional = plain.picture_logps(other, drawn.codes, None, Scoring(guidance=0.0)).logp
  np.testing.assert_allclose(drawn.unconditional_logps, unconditional, atol=1e-5)

  # Other pictures in the place of a prompt's own.
  swapped = Picture(*(x[::-1, :1] for x in pictures))
  read = plain.text_logps(swapped, asked, own_text, None, Scoring()).logp
  found = prober.read_prompts(prompt, drawn.codes[::-1, :1], 'Describe it.')
  np.testing.assert_allclose(found, read, atol=1e-5)
  given_picture, given_text = prober.score_pairs(
    ['a red circle', 'two rings'], drawn.codes[:, 1], 'Describe it.'
  )
  np.testing.assert_allclose(given_picture, drawn.rewards[:, 0, 1], atol=1e-5)
  np.testing.assert_allclose(given_text, scores.logp[:, 1], atol=1e-5)


class Seeing:
  """In the place of a Prober: draws every prompt rightly, or bare ground, and knows which."""

  def __init__(self, prompts):
    self.prompts = prompts
    self.rng = np.random.default_rng(0)

  def draw(self, prompt, instructions):
    (number, length), group = prompt.ids.shape, 4
    right = np.arange(group) % 2 == 0
    bare = render.render(world.Scene(()))
    pixels = [[picture_of(p.atoms) if r else bare for r in right] for p in self.prompts]
    worth = np.where(right, -1.0, -2.0)
    noise = self.rng.normal(size=(number, group, 64))
    return ProbedPictures(
      codes=np.broadcast_to(right[None, :, None], noise.shape).astype(np.int32),
      pixels=np.array(pixels),
      rewards=np.broadcast_to(worth + 0.01 * np.arange(group), (number, len(instructions), group)),
      text_logps=np.broadcast_to(worth[None, :, None], (number, group, length)),
      code_logps=noise,
      code_entropy=noise,
      unconditional_logps=noise,
    )

  def read_prompts(self, prompt, codes, instruction):
    return np.where(codes[:, :, :1] == 1, -1.0, -2.0) * np.ones(prompt.ids.shape[1])

  def encode(self, pixels):
    return np.array([np.frombuffer(p.tobytes(), np.uint8)[:64] for p in pixels], np.int32)

  def score_pairs(self, texts, codes, instruction):
    half = len(texts) // 2
    good = np.where(np.arange(len(texts)) < half, -1.0, -2.0)  # the true ones come first
    return good, np.repeat(good[:, None], 64, axis=1)


def test_a_reward_that_sees_everything_is_a_go(processor):
  config = config_loading.load(TINY, method__group_size=4)
  prompts = scenes_lib.prompts(0, 12)
  texts = [p.text for p in prompts]
  batch = GenerationBatch(
    prompt=processor.pad([processor.encode_prompt(t) for t in texts]),
    instruction=None,
    extra={},
  )
  n = tasks.generation(Seeing(prompts), processor, config, batch, texts=texts, seed=0).numbers
  judged = n['judged']['right']
  assert judged['best'].value == 1 and judged['worst'].value == 0 and judged['mean'].value == 0.5
  assert n['pairwise']['accuracy'].value == 1 and n['swaps']['mean'] == 1
  assert n['verdict']['go'] and not n['verdict']['blind']
  assert n['best_of']['by_reward'][-1] == 1
  assert sorted(n['categories']) == sorted({p.category for p in prompts})
  # A bare picture shows none of a prompt's things, so every noun is wrong there, and its words are
  # the ones that are supported least.
  assert n['words']['auc'].value == 1


@pytest.fixture(scope='module')
def processor():
  return Processor.from_directory(locate.EMBEDDED)


@pytest.mark.parametrize(
  'values, said',
  [
    (dict(model=''), '--model is missing'),
    (dict(output=''), '--output is missing'),
    (dict(num_inputs=1), '--num_inputs is 1; set it to a number from 2'),
    (dict(seed=-1), '--seed is -1; set it to'),
    (dict(model='/nowhere/at/all'), 'there is no model'),
    (dict(config__data__prompts='nowhere.txt'), 'there are no prompts nowhere.txt'),
  ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(values, said, tmp_path):
  with pytest.raises(InputError, match=said) as e:
    run(
      probe,
      **{**dict(model='scenes', config=TINY, output=tmp_path / 'out', num_inputs=2), **values},
    )
  assert '\n' not in str(e.value) and os.listdir(tmp_path) == []


def test_a_wrong_command_line_is_a_sentence_and_a_status():
  call = [sys.executable, '-m', 'dsr_jax.probe', '--model=scenes', '--output=/tmp/nothing']
  done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
  assert (
    done.returncode == 2
    and re.match('error: --config is missing; name a config file', done.stderr)
    and done.stderr.count('\n') == 1
  )
