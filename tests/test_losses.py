"""SimPO and its pairs against slow NumPy versions and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax import config as config_lib
from dsr_jax import losses


def simpo(chosen, rejected, weight, *, beta, gamma):
  """As the step sums it."""
  per_pair = losses.simpo_losses(chosen, rejected, beta=beta, gamma=gamma)
  return losses.weighted(per_pair, weight)


def slow_simpo(chosen, rejected, weight, beta, gamma):
  total = 0.0
  for c, r, w in zip(chosen, rejected, weight):
    if w:
      total += np.log1p(np.exp(-(beta * (c - r) - gamma)))
  return total


@pytest.fixture(name='pairs')
def _pairs():
  rng = np.random.default_rng(0)
  return (
    rng.normal(-2, 1, 9).astype('f4'),
    rng.normal(-2, 1, 9).astype('f4'),
    np.array([1, 1, 0, 1, 1, 1, 0, 1, 1], 'f4'),
  )


@pytest.mark.parametrize('beta,gamma', [(2.0, 0.5), (0.7, 0.0)])
def test_simpo_equals_the_slow_version(pairs, beta, gamma):
  total = simpo(*pairs, beta=beta, gamma=gamma)
  np.testing.assert_allclose(total, slow_simpo(*pairs, beta, gamma), rtol=1e-5)


def test_the_tables_simpo_compares_the_mean_of_the_first_samples_tokens_with_the_seconds(pairs):
  chosen, rejected, _ = pairs
  mask = np.arange(4) < np.stack([np.arange(9) % 4 + 1, np.arange(9)[::-1] % 4 + 1], 1)[..., None]
  mean = np.stack([chosen, rejected], axis=1)[..., None]
  noise = np.random.default_rng(1).normal(0, 1, (9, 2, 4))
  noise -= (noise * mask).sum(-1, keepdims=True) / mask.sum(-1, keepdims=True)
  logps = jnp.asarray(np.where(mask, mean + noise, -99.0), jnp.float32)
  x = losses.LossInputs(logps, None, None, jnp.asarray(mask), None)
  found = losses.OBJECTIVES['simpo'].loss(x, config_lib.Method(beta=0.7, gamma=0.3))
  expected = [slow_simpo([c], [r], [1], 0.7, 0.3) for c, r in zip(chosen, rejected)]
  np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_the_linear_objective_is_simpos_tangent_where_the_samples_are_equally_likely(pairs):
  chosen, rejected, _ = pairs
  slope = jax.grad(lambda d: losses.simpo_losses(d, 0.0, beta=0.7, gamma=0.3))(0.0)
  linear = losses.linear_losses(jnp.asarray(chosen), jnp.asarray(rejected), beta=0.7, gamma=0.3)
  np.testing.assert_allclose(linear, slope * (chosen - rejected), rtol=1e-5)


def test_gradient_of_simpo_equals_finite_differences(pairs):
  chosen, rejected, weight = pairs
  grad = jax.grad(lambda c: simpo(c, rejected, weight, beta=2.0, gamma=0.5))(jnp.asarray(chosen))
  for i in range(len(chosen)):
    up, down = (np.array(chosen, 'f8') for _ in range(2))
    up[i] += 1e-5
    down[i] -= 1e-5
    slope = (
      slow_simpo(up, rejected, weight, 2.0, 0.5) - slow_simpo(down, rejected, weight, 2.0, 0.5)
    ) / 2e-5
    np.testing.assert_allclose(grad[i], slope, atol=1e-4)


def test_simpo_has_no_likelihood_term(pairs):
  """Raising both log-probabilities alike changes nothing: only their difference counts."""
  chosen, rejected, weight = pairs
  a = simpo(chosen, rejected, weight, beta=2.0, gamma=0.5)
  b = simpo(chosen + 3.0, rejected + 3.0, weight, beta=2.0, gamma=0.5)
  np.testing.assert_allclose(a, b, rtol=1e-5)


def test_dropped_pair_has_no_gradient_even_if_not_finite(pairs):
  chosen, rejected, weight = pairs
  chosen = chosen.copy()
  chosen[2] = -1e9
  grad = jax.grad(lambda c: simpo(c, rejected, weight, beta=2.0, gamma=0.5))(jnp.asarray(chosen))
  assert grad[2] == 0 and np.all(np.isfinite(grad))


def test_best_and_worst_are_the_extremes_and_ties_are_dropped():
  rewards = jnp.array([[0.1, 0.5, -0.2], [0.3, 0.3, 0.3], [1.0, 0.0, 0.99]])
  pair, weight = losses.best_and_worst(rewards, 0.0)
  np.testing.assert_array_equal(pair[0], [1, 2])
  np.testing.assert_array_equal(pair[2], [0, 1])
  np.testing.assert_array_equal(weight, [1, 0, 1])


def test_pairs_within_the_margin_are_dropped():
  _, weight = losses.best_and_worst(jnp.array([[0.0, 0.2], [0.0, 0.4]]), 0.3)
  np.testing.assert_array_equal(weight, [0, 1])


def test_mean_logp_counts_only_the_tokens_of_the_sequence():
  logp = jnp.array([[-1.0, -3.0, -100.0], [-2.0, -100.0, -100.0], [-5.0, -5.0, -5.0]])
  mask = jnp.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]], bool)
  np.testing.assert_allclose(losses.mean_logp(logp, mask), [-2.0, -2.0, 0.0])


def test_mean_logp_is_reduced_in_float32():
  """Sums in bfloat16 land on a coarse grid, and rewards tie."""
  logp = jnp.full((1, 576), -3.1719, jnp.bfloat16)
  out = losses.mean_logp(logp, jnp.ones((1, 576), bool))
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out[0], float(logp[0, 0]), rtol=1e-6)
