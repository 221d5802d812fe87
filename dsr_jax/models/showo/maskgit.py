"""How a picture is drawn in steps: which places are fixed when, and which are masked again.

Source: showlab/Show-o models/modeling_showo.py and models/sampling.py (MaskGIT, arXiv 2202.04200).
At every step a code is proposed for every place; the least sure of those not yet fixed are masked
again, by a schedule that depends on nothing but the number of codes and of steps.
Axes: ... any leading axes, N image codes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LEAST = 1e-20  # probabilities below count as this where places are compared


class Schedule(NamedTuple):
  """Of each step: masked (T,) int, places that are masked again; noise (T,) float32, the weight of
  the Gumbel noise by which sureness is shaken.
  """

  masked: np.ndarray
  noise: np.ndarray


def schedule(codes: int, steps: int, noise: float) -> Schedule:
  """The cosine schedule of `codes` places in `steps` steps; noise: its weight before the first."""
  masked, left = [], codes
  for step in range(steps):
    # In float32, as the original: at ratios such as 2/3 the floor depends on it.
    ratio = np.float32((step + 1) / steps)
    share = np.cos(ratio * np.float32(np.pi) * np.float32(0.5), dtype=np.float32)
    left = max(1, min(left - 1, int(np.floor(np.float32(codes) * share))))
    masked.append(left)
  # The noise shrinks by the share of steps that are left, again and again.
  weights = np.cumprod(1.0 - (np.arange(steps) + 1) / steps) * noise
  return Schedule(np.asarray(masked, np.int32), weights.astype(np.float32))


def sureness(logp, known, gumbel, noise):
  """How sure each place's proposal is: logp (..., N) of the proposals, known (..., N) bool, gumbel
  (..., N) standard noise, and its weight -> (..., N); what is known is surest.
  """
  shaken = jnp.maximum(logp, np.log(LEAST)) + noise * gumbel
  return jnp.where(known, jnp.inf, shaken)


def least_sure(sure, count):
  """sure (..., N), a count -> (..., N) bool, True at exactly `count` lowest; the first of a tie."""
  order = jnp.argsort(sure, axis=-1, stable=True)
  rank = jnp.argsort(order, axis=-1)
  return rank < count


def gumbel_of(uniform):
  """Uniform numbers in [0, 1) -> standard Gumbel noise, with the original's bounds."""

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
