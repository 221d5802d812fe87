"""Draws an image in steps: which positions are fixed when, and which are masked again.

Source: showlab/Show-o models/modeling_showo.py and models/sampling.py (MaskGIT, arXiv 2202.04200).
Every step proposes a code for every position; those with the lowest confidence among the positions
that are not yet fixed are masked again. The schedule depends only on the number of codes and steps.
Axes: ... any leading axes, N image codes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LEAST = 1e-20  # smaller probabilities count as this when positions are compared


class Schedule(NamedTuple):
  """For each step: masked (T,) int, the number of positions masked again; noise (T,) float32, the
  weight of the Gumbel noise on the confidence.
  """

  masked: np.ndarray
  noise: np.ndarray


def schedule(codes: int, steps: int, noise: float) -> Schedule:
  """The cosine schedule of `codes` positions in `steps` steps; noise: its weight at the start."""
  masked, left = [], codes
  for step in range(steps):
    # In float32, as in the original: at ratios such as 2/3 the floor depends on it.
    ratio = np.float32((step + 1) / steps)
    share = np.cos(ratio * np.float32(np.pi) * np.float32(0.5), dtype=np.float32)
    left = max(1, min(left - 1, int(np.floor(np.float32(codes) * share))))
    masked.append(left)
  # Each step multiplies the noise by the share of steps that are left.
  weights = np.cumprod(1.0 - (np.arange(steps) + 1) / steps) * noise
  return Schedule(np.asarray(masked, np.int32), weights.astype(np.float32))


def sureness(logp, known, gumbel, noise):
  """The confidence of each position's proposal: logp (..., N) of the proposals, known (..., N)
  bool, gumbel (..., N) standard noise, and its weight -> (..., N); known positions are highest.
  """
  shaken = jnp.maximum(logp, np.log(LEAST)) + noise * gumbel
  return jnp.where(known, jnp.inf, shaken)


def least_sure(sure, count):
  """sure (..., N), a count -> (..., N) bool, True at exactly `count` lowest; the first of a tie."""
  order = jnp.argsort(sure, axis=-1, stable=True)
  rank = jnp.argsort(order, axis=-1)
  return rank < count


def gumbel_of(uniform):
  """Uniform numbers in [0, 1) -> standard Gumbel noise, bounded as in the original."""

  def log(x):
    return jnp.log(jnp.maximum(x, LEAST))

  return -log(-log(uniform))


def noise_of(keys, index, places: int):
  """keys (...), a step's index -> standard Gumbel noise (..., N)."""

  def draw(key):
    return gumbel_of(jax.random.uniform(jax.random.fold_in(key, index), (places,)))

  for _ in keys.shape:
    draw = jax.vmap(draw)
  return draw(keys)
