"""The probe: one page and its numbers, with the judge of Scenes and without any judge."""

import json
import os
import re
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest
from run_command import Page, ROOT, TINY, run

from dsr_jax import probe
from dsr_jax.errors import InputError

@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
  """(what was printed, numbers, page) of a probe of the embedded model with its judge."""
  out = tmp_path_factory.mktemp('scenes') / 'out'
  said = run(probe, model='scenes', config=TINY, output=out, num_inputs=4, config__method__max_text_tokens=24)
  return said, json.loads((out / 'probe.json').read_text()), Page((out / 'probe.html').read_text())


@pytest.fixture(scope='module')
def own(hf_directory, tmp_path_factory):
  """The same without a judge: another model, and prompts and pictures of someone's own."""
  folder = tmp_path_factory.mktemp('own')
  (folder / 'prompts.txt').write_text('a red circle left of a blue square\ntwo small green rings\na large striped diamond\n')
  (folder / 'pictures').mkdir()
  for i in range(3):
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (20, 30, 3), np.uint8)).save(folder / 'pictures' / f'{i}.png')
  values = dict(model=hf_directory, config=TINY, num_inputs=3, config__data__prompts=folder / 'prompts.txt',
                config__data__images=folder / 'pictures')
  run(probe, output=folder / 'out', **values)
  return json.loads((folder / 'out' / 'probe.json').read_text()), Page((folder / 'out' / 'probe.html').read_text()), values


def test_the_judge_measures_what_the_rewards_pick(scenes):
  said, numbers, _ = scenes
  for task, score in (('generation', 'right'), ('understanding', 'f1')):
    n = numbers[task]
    judged = n['judged'][score]
    assert judged['worst']['value'] <= judged['best_there_is']['value'] and n['reward']['worst'] <= n['reward']['mean'] <= n['reward']['best']
    assert judged['gain']['value'] == pytest.approx(judged['best']['value'] - judged['mean']['value'])
    assert n['best_of']['by_reward'][0] == pytest.approx(judged['mean']['value']) == n['best_of']['by_judge'][0]
    assert n['best_of']['by_reward'][-1] == pytest.approx(judged['best']['value'])
    assert {'colours', 'counts', 'relations', 'mean'} <= n['swaps'].keys() and n['swaps']['colours']['cases'] == 64
    assert said[task]['go'] == n['verdict']['go'] == all(g['passed'] is not False for g in n['verdict']['gates'])
  assert len(numbers['generation']['categories']) == len({c for c in numbers['generation']['categories']}) > 1
  assert {'auc', 'cases', 'lowest'} <= numbers['generation']['words'].keys()
  assert {'all', 'things', 'relations'} == numbers['understanding']['clauses'].keys()
  assert len(numbers['generation']['instructions']['sentences']) == 3
  assert said['go'] == numbers['go']


def test_the_page_stands_alone_and_shows_pictures_words_and_a_verdict(scenes):
  _, numbers, page = scenes
  assert len(page.images) > 8 and all(src.startswith('data:image/png;base64,') for src in page.images)
  words = ' '.join(page.words)
  for word in ('go', 'Go or no-go', 'Best of n', 'By sort of prompt', 'Where the reward comes from', 'support of their clauses'):
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
    assert passed['pairs ordered as the judge does'] is None and passed['groups without any difference'] is not None
  assert numbers['generation']['swaps']['colours']['cases'] == 1  # one of the prompts names colours of two things
  assert numbers['generation']['instructions']['mean'] is not None
  assert 'no judge for this data' in ' '.join(page.words) and 'not measured' in ' '.join(page.words)


def test_the_same_seed_gives_the_same_numbers_whatever_the_chunk(own, tmp_path):
  numbers, _, values = own
  run(probe, output=tmp_path / 'again', **values, config__system__rollout_chunk=1)
  again = json.loads((tmp_path / 'again' / 'probe.json').read_text())
  for task in ('generation', 'understanding'):
    for key in ('reward', 'spread'):
      assert again[task][key] == pytest.approx(numbers[task][key], abs=1e-5)


def test_token_heat_is_the_gain_of_the_picture_over_other_pictures(bundle):
  """The parts of a token's heat against plain calls of the model."""
  import dataclasses
  from flax import nnx
  import jax
  from dsr_jax import config as config_lib
  from dsr_jax.models import janus
  from dsr_jax.models.unified import Picture, Scoring, Text
  from dsr_jax.probe_model import Prober
  config = config_lib.load(TINY)
  graphdef = janus.graphdef_of(bundle.config)
  prober = Prober(graphdef, bundle.params, bundle.processor, dataclasses.replace(config.method, inputs_per_step=4), config.system, 0)
  text = bundle.processor.pad([bundle.processor.encode_prompt(t) for t in ('a red circle', 'two rings')], 6)
  drawn = prober.draw(*text, ['Describe it.', 'What?'])
  model = nnx.merge(graphdef, jax.tree.map(jax.numpy.asarray, bundle.params))
  asked = bundle.processor.pad([bundle.processor.encode_question('Describe it.')] * 2)
  pictures = model.picture_from_codes(drawn.codes)
  expected = model.text_logps(pictures, Text(*asked), Text(text.ids[:, None], text.mask[:, None]), None, Scoring()).logp
  np.testing.assert_allclose(drawn.text_logps, expected, atol=1e-4)
  other = prober.read(*text, drawn.codes[::-1, :1], 'Describe it.')
  swapped = Picture(*(x[::-1, :1] for x in pictures))
  np.testing.assert_allclose(other, model.text_logps(swapped, Text(*asked), Text(text.ids[:, None], text.mask[:, None]), None, Scoring()).logp, atol=1e-4)
  # Without a prompt every prompt has the same likelihood.
  bare = model.picture_logps(Text(text.ids[::-1, None], text.mask[::-1, None]), drawn.codes, None, Scoring(guidance=0.0)).logp
  lengths = text.mask.sum(1)
  if lengths[0] == lengths[1]:
    np.testing.assert_allclose(drawn.bare_logps, bare, atol=1e-4)


@pytest.mark.parametrize('values, said', [
    (dict(model=''), 'found no --model'), (dict(output=''), 'found no --output'), (dict(num_inputs=1), 'found --num_inputs=1'),
    (dict(seed=-1), 'found --seed=-1'), (dict(model='/nowhere/at/all'), 'found no model'),
    (dict(config__data__prompts='nowhere.txt'), 'found no prompts nowhere.txt')])
def test_bad_input_is_one_sentence_and_leaves_nothing(values, said, tmp_path, hf_directory):
  with pytest.raises(InputError, match=said) as e:
    run(probe, **{**dict(model=hf_directory, config=TINY, output=tmp_path / 'out', num_inputs=2), **values})
  assert '\n' not in str(e.value) and os.listdir(tmp_path) == []


def test_a_wrong_command_line_is_a_sentence_and_a_status():
  call = [sys.executable, '-m', 'dsr_jax.probe', '--model=scenes', '--output=/tmp/nothing']
  done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 2 and re.match('error: found no --config; expected', done.stderr) and done.stderr.count('\n') == 1
