"""A past step again: the very same numbers, taken apart, and under another method."""

import json
import os
import shutil

import micro_parts
import numpy as np
import pytest
from run_command import TINY, Page, run

from dsr_jax import config_loading, train
from dsr_jax.errors import InputError
from dsr_jax.replay import __main__ as replay
from dsr_jax.replay import past_step


@pytest.fixture(scope='module', autouse=True)
def small():
  """Every replay of this file finds the smallest model."""
  builders = micro_parts.real()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train, 'Builders', lambda: builders)
    yield


@pytest.fixture(scope='module')
def workdir(tmp_path_factory, small):
  """A run of three steps with checkpoints at 2 and 3."""
  folder = tmp_path_factory.mktemp('run')
  config = config_loading.load(
    TINY,
    model='micro',
    **micro_parts.write_inputs(folder),
    eval__benchmark='none',
    method__steps=3,
    method__group_size=3,
    method__learning_rate=1e-3,
    system__save_every=2,
    system__samples_every=0,
    system__eval_every=0,
    system__frozen_every=2,
    system__rollout_chunk=1,
    system__compile_cache=str(folder / 'cache'),
  )
  train.run(config, str(folder / 'run'))
  return folder / 'run'


@pytest.fixture(scope='module')
def third(workdir, tmp_path_factory):
  """(what was printed, replay.json, page) of step 3, with another objective beside it."""
  out = tmp_path_factory.mktemp('third') / 'out'
  said = run(replay, workdir=workdir, step=3, objective='grpo', output=out)
  return (
    said,
    json.loads((out / 'replay.json').read_text()),
    Page((out / 'replay.html').read_text()),
  )


def test_a_step_is_recomputed_exactly_from_a_checkpoint_and_from_the_start(workdir, third):
  said, _, _ = third
  assert said['exact'] and said['from_checkpoint'] == 2 and said['differences'] == {}
  files = sorted(os.listdir(workdir))
  logged = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  for step in (1, 2):
    again = run(replay, workdir=workdir, step=step)
    assert again['exact'] and again['from_checkpoint'] == 0
    line = next(line for line in logged if line['step'] == step)
    assert again['metrics'] == {
      k: v for k, v in line.items() if k != 'step' and not k.startswith(('time/', 'memory/'))
    }
    assert ('generation/reward_frozen' in again['metrics']) == (
      step == 1
    )  # measured every other step, the first among them
  assert sorted(os.listdir(workdir)) == sorted([*files, 'replays'])
  assert sorted(os.listdir(workdir / 'replays')) == ['000001', '000002']


METHODS = {
  'two models': dict(strategy='separate', separate__swap_every=1),
  'an adapter, two inner updates': dict(
    objective='grpo', trainable='lora', lora__rank=2, inner_updates=2
  ),
  'all weights, a moving scorer': dict(trainable='all_but_vq', scorer='ema', reward='pmi'),
}


@pytest.mark.parametrize('name', METHODS)
def test_a_step_of_every_kind_of_state_is_recomputed_exactly(name, small, tmp_path):
  adapters = METHODS[name].get('trainable') == 'lora'
  config = config_loading.load(
    TINY,
    model='micro',
    **micro_parts.write_inputs(tmp_path),
    eval__benchmark='none',
    method__steps=3,
    method__group_size=3,
    **{'method__lora__learning_rate' if adapters else 'method__learning_rate': 1e-3},
    system__save_every=1,
    system__samples_every=0,
    system__eval_every=0,
    system__frozen_every=1,
    **{f'method__{key}': value for key, value in METHODS[name].items()},
  )
  train.run(config, str(tmp_path / 'run'))
  said = run(replay, workdir=tmp_path / 'run', step=3, output=tmp_path / 'out')
  assert said['exact'] and said['from_checkpoint'] == 2, said['differences']


def test_a_number_that_differs_is_named(workdir, tmp_path):
  copy = tmp_path / 'run'
  shutil.copytree(workdir, copy)
  lines = [json.loads(line) for line in (copy / 'metrics.jsonl').read_text().splitlines()]
  next(x for x in lines if x['step'] == 3 and 'generation/loss' in x)['generation/loss'] += 1e-7
  (copy / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  said = run(replay, workdir=copy, step=3)
  assert not said['exact'] and list(said['differences']) == ['generation/loss']


def test_shares_add_up_and_pushes_go_the_right_way(third):
  said, numbers, _ = third
  shares = numbers['generation']['gradient_shares'] + numbers['understanding']['gradient_shares']
  assert sum(shares) == pytest.approx(1, abs=1e-3) and len(shares) == 4
  assert sum(numbers['gradient_by_part'].values()) == pytest.approx(1, abs=1e-4)
  for task in ('generation', 'understanding'):
    for one in numbers[task]['inputs']:
      best, worst = np.argmax(one['rewards']), np.argmin(one['rewards'])
      assert one['learning'] == [best, worst] or not one['weight']
      if one['weight']:
        assert one['push'][0] > 0 > one['push'][1]
      assert all(
        len(c['tokens']) == len(c['logps']) and max(c['logps'], default=0) <= 0
        for c in one['candidates']
      )
    rewards = [r for one in numbers[task]['inputs'] for r in one['rewards']]
    assert np.mean(rewards) == pytest.approx(said['metrics'][f'{task}/reward_mean'], abs=1e-4)


def test_the_same_method_is_the_same_update_and_another_is_not(workdir, third):
  _, numbers, _ = third
  other = numbers['what_if']
  assert (
    other['changes'] == {'objective': 'grpo'}
    and other['cosine'] < 0.999
    and 'generation/clip_fraction' in other['metrics']
  )
  assert other['tasks']['generation'] == {
    'same_best': 1.0,
    'same_worst': 1.0,
    'rank_correlation': pytest.approx(1),
  }
  assert len(other['generation']['inputs'][0]['learning']) == 3  # the whole group
  same = run(replay, workdir=workdir, step=1, scorer='frozen')[
    'what_if'
  ]  # at step 1 the policy is the initial model
  assert same['cosine'] == pytest.approx(1, abs=1e-5) and same['norm_ratio'] == pytest.approx(
    1, abs=1e-4
  )


def test_one_input_can_be_asked_for_and_the_page_shows_it(workdir, third, tmp_path):
  _, _, page = third
  words = ' '.join(page.words)
  for word in (
    'Replay of step 3',
    'exactly the same numbers',
    'Contributions to the gradient',
    'Images for prompts',
    'Texts about images',
    'objective=grpo',
    'push',
  ):
    assert word in words, word
  assert (
    all(src.startswith('data:image/png;base64,') for src in page.images) and len(page.images) >= 4
  )
  run(replay, workdir=workdir, step=1, input=1, output=tmp_path / 'one')
  one = json.loads((tmp_path / 'one' / 'replay.json').read_text())
  assert [i['input'] for i in one['generation']['inputs']] == [1] and len(
    one['generation']['gradient_shares']
  ) == 2


@pytest.mark.parametrize(
  'values, said',
  [
    (dict(step=4), '--step is 4, but the run .* has run steps 1 to 3; change --step'),
    (dict(step=0), 'has run steps 1 to 3'),
    (dict(input=2), '--input is 2; set it to a number from 0 to 1'),
    (dict(input=-1), '--input is -1'),
    (dict(objective='magic'), "config.method.objective is 'magic'; set it to one of simpo"),
    (dict(scorer='ema'), 'scorer=ema needs parameters .* as it kept no ema'),
    (dict(scorer='nobody'), "config.method.scorer is 'nobody'"),
    (dict(reward='judge'), 'config.method.reward=judge cannot judge the data'),
  ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(values, said, workdir, tmp_path):
  with pytest.raises(InputError, match=said) as e:
    run(replay, **{**dict(workdir=workdir, step=1, output=tmp_path / 'out'), **values})
  assert '\n' not in str(e.value) and os.listdir(tmp_path) == []


def test_a_folder_that_is_no_run_is_one_sentence(tmp_path):
  with pytest.raises(InputError, match='config.json does not exist; name the workdir of a run'):
    run(replay, workdir=tmp_path, step=1)


def test_a_number_that_the_run_did_not_measure_is_no_difference():
  logged = {'loss': 1.0, 'generation/reward_mean': -0.5}
  assert past_step.differences(logged, {**logged, 'generation/margin_size': 0.1}) == {}
  assert past_step.differences(logged, {'loss': 1.0}) == {'generation/reward_mean': [-0.5, None]}
  assert past_step.differences(logged, {**logged, 'loss': 2.0}) == {'loss': [1.0, 2.0]}
