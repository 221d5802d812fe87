"""The numbers that show how a self-reward is fooled: there when they should be, and what they say
they are.
"""

import jax.numpy as jnp
import numpy as np
import tiny_step

from dsr_jax import diagnostics
from dsr_jax.runtime.run_log import RunLog

PROBES = [
  'generation/probe_coarse_loss',
  'generation/probe_swapped_gain',
  'generation/probe_swapped_right',
]


def probed(frozen_every):
  rng = np.random.default_rng(0)
  negatives = {
    'negative_ids': rng.integers(9, 40, (4, 2, 5)).astype('i4'),
    'negative_mask': np.ones((4, 2, 5), bool),
  }
  system = tiny_step.system(probe_every=2, frozen_every=frozen_every, rollout_chunk=2)
  return [
    tiny_step.run(
      system=system, steps=steps, batches=lambda _: tiny_step.batch(extra={'generation': negatives})
    )[1]
    for steps in (1, 2)
  ]


def test_a_monitor_for_each_way_in_which_a_self_reward_is_known_to_be_fooled():
  """docs/method.md, "Numbers to look at"; the dearer ones only in the steps that they are asked
  for.
  """
  first, second = probed(frozen_every=1)
  for name in (
    'generation/entropy',
    'generation/code_entropy',
    'generation/similarity',
    'generation/reward_frozen',
    'learning_rate',
    'generation/reward_entropy_slope',
    'understanding/text_length',
    'understanding/reward_length_slope',
    'understanding/similarity',
    'understanding/reward_frozen',
  ):
    assert np.isfinite(first[name]) and np.isfinite(second[name]), name
  assert 0 < first['generation/code_entropy'] <= np.log(16)
  assert all(np.isfinite(first[name]) for name in PROBES) and all(
    np.isnan(second[name]) for name in PROBES
  )
  assert 0 <= first['generation/probe_swapped_right'] <= 1
  assert not any('probe' in name for name in tiny_step.run()[1])


def test_the_loop_leaves_out_what_was_not_due():
  log = object.__new__(RunLog)
  log._frozen_every, log._probe_every = 2, 3

  def due(step, name):
    return log._measured(step, name)

  assert [due(step, 'generation/reward_frozen') for step in (1, 2, 3)] == [True, False, True]
  assert [due(step, PROBES[0]) for step in (1, 2, 3, 4)] == [True, False, False, True]
  assert due(2, 'generation/reward_mean')


def test_code_entropy_is_that_of_the_frequencies_within_a_picture():
  codes = jnp.array([[1, 1, 1, 1], [1, 2, 3, 4], [1, 1, 2, 2]])
  np.testing.assert_allclose(
    diagnostics.code_entropy(codes), [0.0, np.log(4), np.log(2)], atol=1e-6
  )


def test_slope_is_the_least_squares_one_within_each_group():
  x = jnp.array([[1.0, 2.0, 4.0], [3.0, 3.0, 3.0]])
  np.testing.assert_allclose(
    diagnostics.slope(2.5 * x + jnp.array([[1.0], [7.0]]), x), [2.5, 0.0], atol=1e-5
  )
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, 1, 9))
  np.testing.assert_allclose(
    diagnostics.slope(jnp.asarray(b), jnp.asarray(a)), np.polyfit(a[0], b[0], 1)[:1], rtol=1e-4
  )


def test_coarsening_takes_the_mean_of_every_two_by_two_and_twice_is_once():
  pixels = jnp.arange(16.0).reshape(1, 4, 4, 1) * jnp.ones(3)
  coarse = diagnostics.coarsened(pixels)
  np.testing.assert_allclose(coarse[0, :2, :2, 0], 2.5)
  np.testing.assert_allclose(diagnostics.coarsened(coarse), coarse)
