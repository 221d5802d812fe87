"""Every objective against a slow NumPy version, its gradient against finite differences, and inside
the step.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_step

from dsr_jax import config as config_lib
from dsr_jax import losses
from dsr_jax.errors import InputError

METHOD = config_lib.Method(
  kl=0.3,
  grpo=config_lib.Grpo(ratio_low=0.2, ratio_high=0.28),
  gspo=config_lib.Gspo(ratio_low=0.05, ratio_high=0.07),
  cispo=config_lib.Cispo(ratio_max=1.1),
  dpo=config_lib.Dpo(beta=0.7),
)
GROUPED = [name for name, objective in losses.OBJECTIVES.items() if objective.off_policy_ok]
PAIRED = [name for name in losses.OBJECTIVES if name not in GROUPED]


def case(seed=0, groups=3, candidates=4, tokens=5, shift=0.3):
  """Log-probabilities near those of the policy that sampled, so that some ratios are cut and some
  are not; one empty sequence.
  """
  rng = np.random.default_rng(seed)
  shape = (groups, candidates, tokens)
  logp = rng.normal(-2, 0.5, shape)
  mask = np.arange(tokens) < rng.integers(1, tokens + 1, shape[:2])[..., None]
  mask[0, -1] = False
  return dict(
    logp=logp,
    old=logp + rng.normal(0, shift, shape),
    reference=logp + rng.normal(0, 0.4, shape),
    mask=mask,
    rewards=rng.normal(-3, 0.5, shape[:2]),
  )


# The slow versions: loops, one number at a time.


def slow_cut(r, a, low, high):
  return min(r * a, min(max(r, 1 - low), 1 + high) * a)


def slow_group(name, m, logp, old, reference, mask, rewards):
  """Loss of one group: (C, T) arrays."""
  g, room = logp.shape
  lengths = [int(row.sum()) for row in mask]
  mean = sum(rewards) / g
  spread = (sum((r - mean) ** 2 for r in rewards) / g) ** 0.5
  scaled = [(r - mean) / (spread + 1e-4) for r in rewards]

  def kl(d):
    return {'k1': -d, 'k2': d * d / 2, 'k3': np.exp(d) - 1 - d}[m.kl_estimator]

  total = 0.0
  for i in range(g):
    tokens = [t for t in range(room) if mask[i, t]]
    ratios = [np.exp(logp[i, t] - old[i, t]) for t in tokens]
    kls = [kl(reference[i, t] - logp[i, t]) for t in tokens]
    if name == 'grpo':
      values = [
        slow_cut(r, scaled[i], m.grpo.ratio_low, m.grpo.ratio_high) - m.kl * k
        for r, k in zip(ratios, kls)
      ]
      total -= sum(values) / max(sum(lengths), 1)
    elif name == 'dr_grpo':
      values = [
        slow_cut(r, rewards[i] - mean, m.grpo.ratio_low, m.grpo.ratio_high) - m.kl * k
        for r, k in zip(ratios, kls)
      ]
      total -= sum(values) / (g * room)
    elif name == 'rloo':
      others = sum(r for j, r in enumerate(rewards) if j != i) / (g - 1)
      whole = np.prod(ratios) if ratios else 1.0
      total -= (
        slow_cut(whole, rewards[i] - others, m.grpo.ratio_low, m.grpo.ratio_high) - m.kl * sum(kls)
      ) / g
    elif name == 'gspo':
      n = max(len(tokens), 1)
      whole = np.prod(ratios) ** (1 / n) if ratios else 1.0
      total -= (
        slow_cut(whole, scaled[i], m.gspo.ratio_low, m.gspo.ratio_high) - m.kl * sum(kls) / n
      ) / g
  return total


def slow_cispo(m, logp, old, reference, mask, rewards, weights=None):
  """The weights are constants of the loss: given from outside, they do not move with it."""
  mean, spread = rewards.mean(), rewards.std()
  weights = np.minimum(np.exp(logp - old), m.cispo.ratio_max) if weights is None else weights
  d = reference - logp
  values = weights * ((rewards - mean) / (spread + 1e-4))[:, None] * logp - m.kl * (
    np.exp(d) - 1 - d
  )
  return -values[mask].sum() / max(mask.sum(), 1)


def slow(name, m, x, weights=None):
  groups = []
  for b in range(len(x['rewards'])):
    one = {k: v[b] for k, v in x.items()}
    groups.append(
      slow_cispo(m, **one, weights=None if weights is None else weights[b])
      if name == 'cispo'
      else slow_group(name, m, **one)
    )
  return np.array(groups)


def of(name, method, x):
  def to(v):
    return jnp.asarray(v, None if v.dtype == bool else jnp.float32)

  inputs = losses.LossInputs(*(to(x[k]) for k in ('logp', 'old', 'reference', 'mask', 'rewards')))
  return losses.OBJECTIVES[name].loss(inputs, method)


@pytest.mark.parametrize('seed', [0, 1])
@pytest.mark.parametrize('name', GROUPED)
def test_objective_of_groups_equals_the_slow_version(name, seed):
  x = case(seed)
  np.testing.assert_allclose(of(name, METHOD, x), slow(name, METHOD, x), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize('name', GROUPED)
def test_gradient_of_groups_equals_finite_differences(name):
  x = case(2, groups=1, candidates=3, tokens=4)
  grad = jax.grad(lambda logp: jnp.sum(of(name, METHOD, {**x, 'logp': logp})))(
    jnp.asarray(x['logp'], jnp.float32)
  )
  weights = np.minimum(np.exp(x['logp'] - x['old']), METHOD.cispo.ratio_max)
  step = 1e-5
  for index in np.ndindex(x['logp'].shape):
    up, down = x['logp'].copy(), x['logp'].copy()
    up[index] += step
    down[index] -= step

    def value(logp):
      return slow(name, METHOD, {**x, 'logp': logp}, weights if name == 'cispo' else None).sum()

    np.testing.assert_allclose(grad[index], (value(up) - value(down)) / (2 * step), atol=2e-4)


@pytest.mark.parametrize('estimator', ['k1', 'k2', 'k3'])
def test_kl_estimators(estimator):
  x = case(3)
  method = dataclasses.replace(METHOD, kl_estimator=estimator)
  np.testing.assert_allclose(of('grpo', method, x), slow('grpo', method, x), rtol=2e-4, atol=2e-5)


def test_kl_is_zero_where_policy_and_reference_agree_and_k3_is_never_negative():
  x = case(4)
  for estimator in ('k1', 'k2', 'k3'):
    np.testing.assert_array_equal(
      losses.kl_tokens(jnp.asarray(x['logp']), jnp.asarray(x['logp']), estimator), 0
    )
  assert np.all(losses.kl_tokens(jnp.asarray(x['logp']), jnp.asarray(x['reference']), 'k3') >= 0)


def test_at_the_first_update_every_group_objective_pushes_as_its_advantage_says():
  """At ratio 1 the gradient by a token's log-probability is minus the advantage times the token's
  weight.
  """
  x = case(5)
  x['old'] = x['logp']
  method = dataclasses.replace(METHOD, kl=0.0)
  lengths, mask = x['mask'].sum(-1), x['mask']
  scaled = (x['rewards'] - x['rewards'].mean(1, keepdims=True)) / (
    x['rewards'].std(1, keepdims=True) + 1e-4
  )
  centered = x['rewards'] - x['rewards'].mean(1, keepdims=True)
  expected = {
    'grpo': scaled / lengths.sum(1, keepdims=True),
    'cispo': scaled / lengths.sum(1, keepdims=True),
    'dr_grpo': centered / 20,
    'rloo': centered * 4 / 3 / 4,
    'gspo': scaled / 4 / np.maximum(lengths, 1),
  }
  for name, weight in expected.items():

    def value(logp, name=name):
      def to(v):
        return jnp.asarray(v, jnp.float32)

      inputs = losses.LossInputs(logp, to(x['old']), None, jnp.asarray(mask), to(x['rewards']))
      return jnp.sum(losses.OBJECTIVES[name].loss(inputs, method))

    grad = jax.grad(value)(jnp.asarray(x['logp'], jnp.float32))
    np.testing.assert_allclose(grad, -weight[..., None] * mask, atol=1e-5, err_msg=name)


def test_a_group_of_equal_rewards_teaches_nothing():
  x = {**case(6), 'rewards': np.full((3, 4), -2.5)}
  for name in GROUPED:

    def value(logp, name=name):
      return jnp.sum(of(name, dataclasses.replace(METHOD, kl=0.0), {**x, 'logp': logp}))

    np.testing.assert_allclose(jax.grad(value)(jnp.asarray(x['logp'], jnp.float32)), 0.0, atol=1e-6)


def test_online_dpo_equals_the_slow_version_and_its_gradient_finite_differences():
  x = case(7, candidates=2)
  ratio = np.where(x['mask'], x['logp'] - x['reference'], 0).sum(-1)
  np.testing.assert_allclose(
    of('online_dpo', METHOD, x),
    np.log1p(np.exp(-METHOD.dpo.beta * (ratio[:, 0] - ratio[:, 1]))),
    rtol=1e-4,
  )
  grad = jax.grad(lambda logp: jnp.sum(of('online_dpo', METHOD, {**x, 'logp': logp})))(
    jnp.asarray(x['logp'], jnp.float32)
  )
  share = 1 / (1 + np.exp(METHOD.dpo.beta * (ratio[:, 0] - ratio[:, 1])))
  expected = (
    -METHOD.dpo.beta * share[:, None, None] * np.array([1.0, -1.0])[None, :, None] * x['mask']
  )
  np.testing.assert_allclose(grad, expected, atol=1e-5)


def test_best_of_n_is_the_likelihood_of_the_best_alone():
  x = case(8, candidates=1)
  own = [row[m].mean() if m.any() else 0.0 for row, m in zip(x['logp'][:, 0], x['mask'][:, 0])]
  np.testing.assert_allclose(of('best_of_n', METHOD, x), -np.array(own), rtol=1e-5)
  index, weight = losses.OBJECTIVES['best_of_n'].choose(
    jnp.array([[0.1, 0.9, 0.2], [1.0, 1.0, 1.0]]), METHOD
  )
  assert index.tolist()[0] == [1] and weight.tolist() == [1.0, 0.0]


def test_clip_fraction_counts_where_the_ratio_has_left_its_bounds_on_the_side_that_matters():
  logp = jnp.log(jnp.array([[[1.5, 0.5, 1.0, 1.0]], [[0.5, 1.5, 1.0, 9.0]]]).reshape(1, 2, 4))
  mask = jnp.array([[[1, 1, 1, 1], [1, 1, 1, 0]]], bool)
  x = losses.LossInputs(logp, jnp.zeros_like(logp), None, mask, jnp.array([[1.0, -1.0]]))
  found = losses.OBJECTIVES['grpo'].measure(x, METHOD)
  np.testing.assert_allclose(
    found['clip_fraction'], 2 / 7
  )  # 1.5 of the better one, 0.5 of the worse one
  found = losses.OBJECTIVES['cispo'].measure(x, METHOD)
  np.testing.assert_allclose(
    found['clip_fraction'], 2 / 7
  )  # both 1.5: its weights are bounded above whatever the advantage


# Inside the step.


@pytest.mark.parametrize('name', GROUPED + PAIRED)
def test_every_objective_runs_both_tasks_in_one_program_and_moves_the_parameters(name):
  state, metrics, _, step = tiny_step.run(method=tiny_step.method(objective=name), steps=2)
  assert step._cache_size() == 1
  assert tiny_step.finite(metrics), metrics
  assert metrics['update_norm'] > 0
  if name in GROUPED:
    for task in ('generation', 'understanding'):
      assert metrics[f'{task}/ratio_gap'] == 0 and metrics[f'{task}/clip_fraction'] == 0


def test_grpo_starts_at_ratio_one_and_leaves_it_in_later_inner_updates():
  method = tiny_step.method(objective='grpo', inner_updates=3)
  _, metrics, _, step = tiny_step.run(method=method)
  assert step._cache_size() == 1
  for task in ('generation', 'understanding'):
    assert metrics[f'{task}/ratio_gap'] == 0 and metrics[f'{task}/clip_fraction'] == 0
    assert metrics[f'{task}/ratio_gap_last'] > 1e-3
    np.testing.assert_allclose(
      metrics[f'{task}/kl'], 0.0, atol=1e-6
    )  # the first update starts at the initial model
    assert metrics[f'{task}/kl_last'] > 1e-6


def test_the_first_of_several_inner_updates_is_the_plain_steps():
  one = tiny_step.run(method=tiny_step.method(objective='grpo'))[1]
  three = tiny_step.run(method=tiny_step.method(objective='grpo', inner_updates=3))[1]
  for key in ('generation/loss', 'understanding/loss', 'generation/entropy'):
    np.testing.assert_allclose(one[key], three[key], rtol=1e-5, atol=1e-7)


def test_the_sampler_and_the_policy_agree_wherever_they_are_the_same_distribution():
  """Guided pictures are replayed under the guided mixture; texts are sampled without guidance.
  Elsewhere the effective sample size.
  """
  _, metrics, _, _ = tiny_step.run(method=tiny_step.method(objective='grpo', policy_guidance=True))
  assert metrics['generation/sampler_ratio_gap'] <= 1e-4
  assert metrics['understanding/sampler_ratio_gap'] <= 1e-4
  _, metrics, _, _ = tiny_step.run(method=tiny_step.method(objective='grpo'))
  assert 1.0 <= metrics['generation/effective_sample_size'] < 4.0
  assert (
    'generation/sampler_ratio_gap' not in metrics
    and metrics['understanding/sampler_ratio_gap'] <= 1e-4
  )


def test_inner_updates_in_chunks_are_those_of_the_whole():
  method = tiny_step.method(objective='grpo', inner_updates=3)
  whole = tiny_step.run(method=method)[1]
  parts = tiny_step.run(method=method, system=tiny_step.system(rollout_chunk=2, update_chunk=1))[1]
  # At the first update a group's advantages cancel in the loss of drawing: what is left of it is
  # rounding, so it counts in the sum alone.
  for key in (
    'loss',
    'understanding/loss',
    'generation/ratio_gap_last',
    'generation/kl_last',
    'gradient_norm',
    'update_norm',
  ):
    np.testing.assert_allclose(whole[key], parts[key], rtol=1e-3, err_msg=key)


def test_the_learning_rate_is_logged():
  first, fourth = (tiny_step.run(steps=steps)[1]['learning_rate'] for steps in (1, 4))
  np.testing.assert_allclose(
    first, tiny_step.METHOD.learning_rate, rtol=1e-6
  )  # the peak, without warm-up
  np.testing.assert_allclose(
    fourth, tiny_step.METHOD.learning_rate * (1 + np.cos(np.pi * 3 / 11)) / 2, rtol=1e-5
  )


def test_the_reference_is_the_initial_model_whole():
  """After training, the KL's reference is what the model was, not its old heads on new
  embeddings.
  """
  method = tiny_step.method(objective='grpo')
  _, params = tiny_step.model()
  state, metrics, _, _ = tiny_step.run(method=method, steps=3)
  assert metrics['generation/kl'] > 1e-5
  initial = state.ref_params
  assert set(initial) == set(state.params)
  for part, tree in initial.items():
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(params[part])):
      np.testing.assert_array_equal(a, b)


# Bad input.


@pytest.mark.parametrize(
  'changes, words',
  [
    (
      dict(method__objective='ppo'),
      ['ppo', 'simpo', 'grpo', 'dr_grpo', 'rloo', 'gspo', 'cispo', 'online_dpo', 'best_of_n'],
    ),
    (dict(method__inner_updates=2), ['inner_updates=2', 'simpo', 'grpo']),
    (
      dict(method__inner_updates=2, method__objective='online_dpo'),
      ['inner_updates=2', 'online_dpo', 'grpo'],
    ),
    (dict(method__objective='grpo', method__inner_updates=0), ['at least 1']),
    (dict(method__kl_estimator='k4'), ['k1, k2, k3']),
    (dict(method__kl=-0.1), ['kl', 'at least 0']),
  ],
)
def test_impossible_objectives_are_refused_in_one_sentence(changes, words):
  with pytest.raises(InputError) as e:
    tiny_step.load(**changes)
  assert all(word in str(e.value) for word in words) and '\n' not in str(e.value)
