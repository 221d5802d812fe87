"""Objectives: arrays in, sums and weights out, to be divided once.

Axes: B groups, T tokens.
"""

import jax
import jax.numpy as jnp


def mean_logp(logp, mask):
  """log pi(y|x) / |y|, (...): the mean over a sequence's own tokens of (..., T), in float32; 0 for an empty sequence."""
  total = jnp.sum(jnp.where(mask, logp.astype(jnp.float32), 0.0), axis=-1)
  return total / jnp.maximum(jnp.sum(mask, axis=-1), 1)


def simpo(chosen, rejected, weight, *, beta: float, gamma: float):
  """Online SimPO (arXiv 2506.07963, eq. 5), without a reference model and without an added likelihood term.

  Args:
    chosen, rejected: (B,) length-normalised log-probabilities of the best and the worst candidate.
    weight: (B,) 1 where the pair counts, 0 where it was dropped.
    beta, gamma: scale of the margin, and the margin asked for.

  Returns:
    The sum over pairs of -log sigmoid(beta (chosen - rejected) - gamma) and the sum of weights.
  """
  margin = beta * (chosen - rejected) - gamma
  return jnp.sum(jnp.where(weight > 0, -jax.nn.log_sigmoid(margin), 0.0) * weight), jnp.sum(weight)


def best_and_worst(rewards, min_margin: float):
  """Rewards (B, G) -> indices of best and worst (B, 2), and whether the pair counts (B,) float32.

  A pair counts if its rewards differ by more than `min_margin`; so equal rewards never do.
  """
  pair = jnp.stack([jnp.argmax(rewards, axis=-1), jnp.argmin(rewards, axis=-1)], axis=-1)
  gap = jnp.max(rewards, axis=-1) - jnp.min(rewards, axis=-1)
  return pair, (gap > min_margin).astype(jnp.float32)
