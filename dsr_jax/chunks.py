"""Loops over chunks of a batch that fit in memory.

Chunks are strided: rows r, r + n, r + 2n ... form one, so every device chunks its own rows. Mapping
over a sharded axis would gather it.
"""

import jax
import jax.numpy as jnp


def size(wanted: int, method) -> int:
  """Rows per chunk: `wanted`, or all rows of a part if `wanted` is 0 or exceeds it."""
  part = method.inputs_per_task // method.accumulate
  return min(wanted or part, part)


def mapped(fn, tree, chunk: int):
  """Maps fn over chunks of axis 0: (rows, ...) -> (rows, ...)."""
  count = _count(tree, chunk)
  if count == 1:
    return fn(tree)
  _, out = jax.lax.scan(lambda _, part: (None, fn(part)), None, _split(tree, chunk, count))
  return _joined(out)


def summed(fn, tree, chunk: int):
  """Maps fn over chunks of axis 0. fn returns a pair: the first items are summed, the second ones
  concatenated as in `mapped`.
  """
  count = _count(tree, chunk)
  if count == 1:
    return fn(tree)
  split = _split(tree, chunk, count)
  zeros = jax.tree.map(
    lambda s: jnp.zeros(s.shape, s.dtype),
    jax.eval_shape(fn, jax.tree.map(lambda x: x[0], split))[0],
  )

  def step(total, part):
    more, kept = fn(part)
    return jax.tree.map(jnp.add, total, more), kept

  total, kept = jax.lax.scan(step, zeros, split)
  return total, _joined(kept)


def _count(tree, chunk):
  return jax.tree.leaves(tree)[0].shape[0] // chunk


def _split(tree, chunk, count):
  return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(chunk, count, *x.shape[1:]), 0, 1), tree)


def _joined(tree):
  return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), tree)
