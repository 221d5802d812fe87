"""Who scores: the live policy, the frozen initial model, or the running mean of what was
learned.
"""

import jax
import numpy as np
import pytest
import tiny_step

from dsr_jax.errors import InputError


def trees(*parts):
  return zip(*(jax.tree.leaves(part) for part in parts), strict=True)


def test_all_scorers_agree_before_the_first_update():
  found = [
    tiny_step.run(method=tiny_step.method(scorer=scorer))[1]
    for scorer in ('policy', 'frozen', 'ema')
  ]
  for metrics in found[1:]:
    for key in ('generation/reward_mean', 'understanding/reward_best', 'loss'):
      np.testing.assert_allclose(metrics[key], found[0][key], rtol=1e-5)


def test_the_frozen_scorer_gives_the_rewards_of_the_initial_model_whatever_was_learned():
  """The policy that samples is the same for the first step's parameters; only the scorer differs in
  the second step.
  """
  state, _, _, _ = tiny_step.run(method=tiny_step.method(scorer='frozen'))
  frozen = tiny_step.run(method=tiny_step.method(scorer='frozen'), state=jax.device_put(state))
  logged = tiny_step.run(
    method=tiny_step.method(), system=tiny_step.system(frozen_every=1), state=jax.device_put(state)
  )
  for task in ('generation', 'understanding'):
    np.testing.assert_allclose(
      frozen[1][f'{task}/reward_mean'], logged[1][f'{task}/reward_frozen'], rtol=1e-5
    )
    assert abs(logged[1][f'{task}/reward_mean'] - logged[1][f'{task}/reward_frozen']) > 1e-5


def test_ema_follows_the_parameters_by_its_decay_in_float32():
  method = tiny_step.method(scorer='ema', ema_decay=0.75)
  before = jax.device_get(tiny_step.start(method))
  after, _, _, _ = tiny_step.run(method=method)
  for mean, old, new in trees(after.ema_params, before.params, after.params):
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, 0.75 * old + 0.25 * new, atol=1e-6)


def test_only_what_a_configuration_needs_is_in_its_state():
  plain = tiny_step.start(tiny_step.method())
  assert plain.ref_params is None and plain.ema_params is None and plain.reward_params is None
  for changes in (dict(scorer='frozen'), dict(objective='grpo'), dict(objective='online_dpo')):
    assert tiny_step.start(tiny_step.method(**changes)).ref_params is not None
  assert tiny_step.start(tiny_step.method(objective='grpo', kl=0.0)).ref_params is None


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(method__scorer='judge'), ['policy, frozen, ema']),
    (dict(method__scorer='partner'), ['method.scorer=partner is now method.scorer=policy']),
    (dict(method__ema_decay=1.0), ['ema_decay is 1.0', 'below 1']),
  ],
)
def test_impossible_scorers_are_refused_in_one_sentence(changes, words):
  with pytest.raises(InputError) as e:
    tiny_step.load(**changes)
  assert all(word in str(e.value) for word in words) and '\n' not in str(e.value)
