"""Rotary position embedding, half-split layout.

Axes: R rows, N heads, T tokens, h head width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax import sharding


class Rotary(NamedTuple):
  """Cosines and sines of some positions, (R, T, h/2) float32 each."""

  cos: jax.Array
  sin: jax.Array


def rotary(positions, limit: int, *, width: int, theta: float) -> Rotary:
  """positions: (R, T) below `limit`; width: h, or the part of it that is rotated.

  Uses a constant table; XLA would otherwise repeat the computation for every head, layer and
  element.
  """
  half = width // 2
  freq = np.float32(theta) ** (-np.arange(half, dtype=np.float32) / half)
  angles = np.arange(limit, dtype=np.float32)[:, None] * freq
  tables = (np.cos(angles), np.sin(angles))
  return Rotary(*(sharding.split_rows(jnp.asarray(table)[positions]) for table in tables))


def rotate(x, at: Rotary):
  """Rotates x (R, N, ..., T, h) in float32."""
  cos, sin = (y.reshape(y.shape[0], *(1,) * (x.ndim - 3), *y.shape[1:]) for y in at)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)  # float32 island
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
