"""Conditions and the candidates that share them.

Axes: B inputs, R prefixes (rows), C candidates of a prefix, G candidates of an input.
"""

import jax
import jax.numpy as jnp


def pair_up(shared, own):
  """Conditions (B, g, ...) and candidates (B, h, ...) -> (R, ...), (R, C, ...) and (B, R, G).

  If g = 1, a condition serves its whole group (R = B, C = h); otherwise every pair is a row (R = B
  g, C = 1).
  """
  inputs, g = jax.tree.leaves(shared)[0].shape[:2]
  h = jax.tree.leaves(own)[0].shape[1]
  assert g == 1 or h in (1, g), (g, h)
  rows = inputs * g
  shared = jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), shared)
  if g > 1:
    own = jax.tree.map(
      lambda x: jnp.broadcast_to(x, (inputs, g, *x.shape[2:])).reshape(rows, 1, *x.shape[2:]), own
    )
  return shared, own, (inputs, rows, max(g, h))
