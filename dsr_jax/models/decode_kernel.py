"""Attention of one new token over a candidate's own cache, as one pass over what of it is filled: a Pallas kernel for GPUs.

As plain products XLA reads the room that is not filled yet besides; on an H200 the compiled loop of a 1B model took 1.6 times as long
(docs/pods.md).

Axes: R prefixes (rows), N heads, C candidates of a prefix, S keys there is room for, h head width.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
import jax.numpy as jnp

BLOCKS = (32, 16)  # keys read at once; the room must be a multiple of one
WARPS = 1  # of 32 threads, for each candidate and head
NOTHING = -1e30  # the score of a key that is not there


def block_of(room: int, width: int) -> int | None:
  """The keys to read at once, or None where the kernel does not serve such a cache."""
  whole = width >= 16 and width & (width - 1) == 0  # a kernel's arrays have powers of two
  return next((b for b in BLOCKS if room % b == 0), None) if whole else None


def partial_attention(q, k, v, count, *, interpret: bool = False):
  """The softmax over the first `count` keys, before it is divided by its sum, so that another part can join.

  Args:
    q: (R, N, C, h).
    k, v: (R, N, C, S, h); S as `block_of` asks.
    count: int32 scalar, from 1.
    interpret: runs the kernel anywhere, slowly, for tests.

  Returns:
    Float32: the highest score (R, N, C), the sum of exp(score - highest) (R, N, C), and values weighted by those (R, N, C, h).
  """
  *lead, room, h = k.shape
  rows = q.size // h
  one = lambda *shape: pl.BlockSpec((None, *shape), lambda i: (i, *(0,) * len(shape)))
  kernel = functools.partial(_kernel, block=block_of(room, h), scale=h ** -0.5)
  top, total, out = pl.pallas_call(
      kernel, grid=(rows,),
      in_specs=[pl.BlockSpec((1,), lambda i: (0,)), one(h), one(room, h), one(room, h)],
      out_specs=[one(1), one(1), one(h)],
      out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, 1), (rows, 1), (rows, h))],
      compiler_params=triton.CompilerParams(num_warps=WARPS), interpret=interpret, name='decode_attention',
  )(jnp.asarray(count, jnp.int32).reshape(1), q.reshape(rows, h), k.reshape(rows, room, h), v.reshape(rows, room, h))
  return top.reshape(lead), total.reshape(lead), out.reshape(*lead, h)


def _kernel(count_ref, q_ref, k_ref, v_ref, top_ref, total_ref, out_ref, *, block, scale):
  """One candidate and head."""
  count = count_ref[0]
  q = q_ref[...].astype(jnp.float32) * scale

  def body(i, carry):
    top, total, out = carry
    here = pl.ds(i * block, block)
    score = jnp.sum(k_ref[here, :].astype(jnp.float32) * q[None], axis=1)
    score = jnp.where(i * block + jnp.arange(block) < count, score, NOTHING)
    higher = jnp.maximum(top, jnp.max(score))
    weight, kept = jnp.exp(score - higher), jnp.exp(top - higher)
    return higher, total * kept + jnp.sum(weight), out * kept + jnp.sum(weight[:, None] * v_ref[here, :].astype(jnp.float32), axis=0)

  start = jnp.float32(NOTHING), jnp.float32(0), jnp.zeros(q.shape, jnp.float32)
  top, total, out = jax.lax.fori_loop(0, pl.cdiv(count, block), body, start)
  top_ref[0], total_ref[0], out_ref[...] = top, total, out
