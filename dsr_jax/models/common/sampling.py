"""Samples tokens from logits.

Axes: ... any leading axes, V vocabulary (of text or of image codes).
"""

import jax
import jax.numpy as jnp

from dsr_jax import sharding
from dsr_jax.models.common.logprobs import log_softmax


def sample_tokens(logits, keys, index, temperature: float):
  """logits (..., V), keys (...), token index -> ids (...) int32 and their log-probabilities at this
  temperature.
  """
  logp = log_softmax(logits, temperature)
  if temperature == 0:
    ids = first_largest(logits)
  else:

    def noise(key):
      return jax.random.gumbel(jax.random.fold_in(key, index), logits.shape[-1:])

    for _ in keys.shape:
      noise = jax.vmap(noise)
    ids = first_largest(logp + noise(keys))
  return ids, sharding.pick(logp, ids)


def first_largest(x):
  """argmax over the last axis, int32, as two plain reductions: on a CPU this is many times as fast
  as one reduction over pairs of value and index.
  """
  place = jnp.arange(x.shape[-1], dtype=jnp.int32)
  return jnp.min(
    jnp.where(x == jnp.max(x, axis=-1, keepdims=True), place, x.shape[-1] - 1), axis=-1
  )
