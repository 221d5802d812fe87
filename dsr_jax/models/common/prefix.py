"""Keys and values of a prefix that the samples of a group share, and of the samples themselves.

Axes: L layers, R prefixes (rows), C samples of a prefix, P prefix length, S cached tokens, N heads,
h head width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Prefix(NamedTuple):
  """Keys and values of all layers, (L, R, N, P, h); length (R,) int32: the rest is padding. shown
  (R, P): False for tokens that no later token sees; None: all are seen.
  """

  k: jax.Array
  v: jax.Array
  length: jax.Array
  shown: jax.Array | None = None


class KV(NamedTuple):
  """Keys and values of samples: (R, N, C, S, h) for one layer, (L, R, N, C, S, h) for a stack."""

  k: jax.Array
  v: jax.Array


def prefix_mask(prefix: Prefix):
  """(R, 1, 1, 1, P): True for tokens of the prefix, False for padding and hidden tokens."""
  seen = jnp.arange(prefix.k.shape[-2]) < prefix.length[:, None]
  if prefix.shown is not None:
    seen &= prefix.shown
  return seen[:, None, None, None, :]
