"""Weighted sums of rewards by name."""

import jax
import numpy as np
import pytest
import tiny_step

from dsr_jax.errors import InputError
from dsr_jax.rewards import table
from dsr_jax.rewards.base import Reward


def run(reward):
  return tiny_step.run(method=tiny_step.method(reward=reward))


def written(records):
  """Samples that are not empty: an empty text has the worst of its group, whatever its terms."""
  drawn = np.ones(records['generation']['rewards'].shape, bool)
  return {'generation': drawn, 'understanding': records['understanding']['text_mask'].sum(-1) > 1}


def test_a_sum_is_the_weighted_sum_of_its_terms_on_the_same_samples():
  _, alone, dual, _ = run('dual')
  _, _, forward, _ = run('forward')
  _, metrics, both, step = run('dual+0.25*forward')
  for task in ('generation', 'understanding'):
    # One seed and one model: all three runs sample the same.
    expected = dual[task]['rewards'] + 0.25 * forward[task]['rewards']
    seen = written(dual)[task]
    assert seen.sum() > 6
    np.testing.assert_allclose(both[task]['rewards'][seen], expected[seen], atol=1e-6)
    assert metrics[f'{task}/reward/forward_spread'] > 0
  np.testing.assert_allclose(
    metrics['generation/reward/dual'], alone['generation/reward_mean'], atol=1e-6
  )
  assert not any('/reward/' in name for name in alone)
  assert step._cache_size() == 1


def test_a_weight_turns_the_order_of_a_group_around():
  _, _, plain, _ = run('dual')
  _, _, turned, _ = run('-1*dual')
  turned, plain = turned['generation'], plain['generation']
  np.testing.assert_allclose(turned['rewards'], -plain['rewards'], atol=1e-6)
  np.testing.assert_array_equal(turned['chosen'], plain['rejected'])


def test_a_term_is_left_out_of_the_task_that_it_does_not_cover(monkeypatch):
  def red(x):
    return x.picture.pixels[..., 0].mean((-2, -1))

  monkeypatch.setitem(table.REWARDS, 'red', Reward(red, tasks=('generation',), self_reward=False))
  _, metrics, records, _ = run('dual+2*red')
  _, _, dual, _ = run('dual')
  np.testing.assert_allclose(
    records['understanding']['rewards'], dual['understanding']['rewards'], atol=1e-6
  )
  assert 'generation/reward/red' in metrics and 'understanding/reward/red' not in metrics
  method = tiny_step.method(reward='dual+2*red')
  assert [term.name for term in table.terms_of(method, 'understanding')] == ['dual']


def test_every_term_brings_its_fields_and_its_own_weights(monkeypatch):
  seen = {}

  def weighted(name):
    def function(x):
      seen[name] = x.reward_params
      return x.reward_params * jax.numpy.ones(x.sample_keys.shape)

    return Reward(function, load=lambda method: np.float32(len(name)), self_reward=False)

  monkeypatch.setitem(table.REWARDS, 'one', weighted('one'))
  monkeypatch.setitem(table.REWARDS, 'three', weighted('three'))
  method = tiny_step.method(reward='one+10*three+dual')
  assert table.load(method) == {'one': 3.0, 'three': 5.0}
  assert table.load(tiny_step.method()) is None
  assert table.fields('contrastive+vqa+dual') == ('negatives', 'yes_question')
  _, metrics, _, _ = tiny_step.run(method=method)
  assert metrics['generation/reward/one'] == 3.0 and metrics['generation/reward/three'] == 5.0


@pytest.mark.parametrize(
  'reward, words',
  [
    ('dual+', 'set it to one of dual'),
    ('dual+0.3*clipp', "config.method.reward is 'dual\\+0.3\\*clipp'"),
    ('', 'set it to one of dual'),
    ('dual+dual', 'dual twice'),
    ('dual+x*forward', "the weight 'x'"),
    ('dual+nan*forward', "the weight 'nan'"),
    ('dual+1e999*forward', "the weight '1e999'"),
    ('0*dual', "the weight '0'"),
    ('dual+0.3*clip', 'needs config.method.clip_reward.model'),
    ('dual*0.3', 'set it to one of dual'),
  ],
)
def test_what_is_no_sum_of_rewards_is_one_sentence(reward, words):
  with pytest.raises(InputError, match=words):
    tiny_step.load(method__reward=reward)


def test_a_task_without_a_term_is_refused():
  with pytest.raises(InputError, match='task understanding'):
    tiny_step.load(method__reward='clip', method__clip_reward__model='somewhere')
