"""The log-probability function against NumPy, whole and in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.models.common import logprobs as likelihood


@pytest.fixture(name='case')
def _case():
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(2, 3, 7, 5)).astype('f4')
  head = rng.normal(size=(5, 11)).astype('f4')
  targets = rng.integers(0, 11, (2, 3, 7))
  mask = rng.random((2, 3, 7)) < 0.8
  return jnp.asarray(hidden), jnp.asarray(head), jnp.asarray(targets), jnp.asarray(mask)


def slow(hidden, head, targets, mask, temperature):
  logits = np.asarray(hidden, 'f8') @ np.asarray(head, 'f8') / temperature
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  entropy = -(np.exp(logp) * logp).sum(-1)
  return np.where(
    mask, np.take_along_axis(logp, np.asarray(targets)[..., None], -1)[..., 0], 0
  ), np.where(mask, entropy, 0)


@pytest.mark.parametrize('chunk', [0, 1, 3, 7, 20])
@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_scores_equal_numpy_for_every_chunk(case, chunk, temperature):
  hidden, head, targets, mask = case
  scores = likelihood.token_scores(
    hidden, lambda h: h @ head, targets, mask, temperature=temperature, chunk=chunk
  )
  logp, entropy = slow(hidden, head, targets, mask, temperature)
  np.testing.assert_allclose(scores.logp, logp, atol=1e-5)
  np.testing.assert_allclose(scores.entropy, entropy, atol=1e-5)


def test_gradient_does_not_depend_on_the_chunk(case):
  hidden, head, targets, mask = case

  def loss(h, chunk):
    return jnp.sum(
      likelihood.token_scores(hidden, lambda x: x @ h, targets, mask, chunk=chunk).logp
    )

  np.testing.assert_allclose(jax.grad(loss)(head, 0), jax.grad(loss)(head, 2), atol=1e-5)


def test_chunks_never_hold_all_logits(case):
  hidden, head, targets, mask = case
  wide = jnp.tile(head, (1, 1009))

  def fn(h):
    return jnp.sum(likelihood.token_scores(hidden, lambda x: x @ h, targets, mask, chunk=2).logp)

  text = jax.jit(jax.grad(fn)).lower(wide).compile().as_text()
  assert f'2,3,2,{11 * 1009}' in text
  assert f'2,3,7,{11 * 1009}' not in text and f'2,3,8,{11 * 1009}' not in text


def test_guidance_of_one_is_plain_and_larger_extrapolates():
  logits = jnp.array([[[1.0, 2.0]], [[0.0, 4.0]]])  # (branch, 1, V)
  np.testing.assert_allclose(likelihood.guide(logits, 1.0, axis=0), logits[0])
  np.testing.assert_allclose(likelihood.guide(logits, 3.0, axis=0), [[3.0, -2.0]])


def test_float32_out_of_bfloat16_logits():
  scores = likelihood.token_scores(
    jnp.ones((1, 2, 4), jnp.bfloat16), lambda h: h, jnp.zeros((1, 2), int), jnp.ones((1, 2), bool)
  )
  assert scores.logp.dtype == jnp.float32
