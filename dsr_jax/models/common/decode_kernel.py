"""Attention of one new token per candidate, in one pass over the filled cache: a Pallas kernel for
GPUs.

It rotates query and key, writes the new key and value into the cache in place, and attends to the
shared prefix, to the filled part of the candidate's own cache, and to the new token itself. Plain
products need a dozen programs for this, which also read the part of the cache that is not filled
yet (docs/pods.md has the times).

One program handles one head of a prefix for all its candidates: their queries are the rows of a
matrix, so the prefix is read once. For a candidate's own keys only its own row is used; the other
rows are computed and discarded, since the matrix units are idle otherwise.

Axes: R prefixes (rows), N heads, C candidates of a prefix, P prefix length, S capacity of the cache
in keys, h head width.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
import jax.numpy as jnp

from dsr_jax import sharding
from dsr_jax.errors import InputError
from dsr_jax.models.common.attention import kernels_run

BLOCK = 64  # keys read at once
WARPS = 4  # of 32 threads, for each program
STAGES = 3  # blocks in flight at once
LEAST_ROWS = 16  # minimum of the matrix units
ADDRESSES = 2**31 - 1  # offsets are 32-bit numbers
NOTHING = -1e30  # the score of a masked key


def serves(dtype, width: int) -> bool:
  """Whether the kernel supports heads of this width and dtype: a power of two, if kernels run."""
  return width >= 16 and width & (width - 1) == 0 and kernels_run(dtype)


def room_for(tokens: int) -> int:
  """The capacity in keys for so many tokens: a whole number of blocks."""
  return -(-tokens // BLOCK) * BLOCK


def decode_attention(qkv, turn, prefix, length, cache, index, *, interpret: bool = False):
  """Attention of the candidates' token `index`, and the cache with its key and value.

  Args:
    qkv: (R, C, 3, N, h): query, key and value, not rotated yet.
    turn: cosines and sines of the token's position, (R, 1, h/2) float32 each.
    prefix: shared keys and values, (R, N, P, h) each; P from `room_for`.
    length: (R,) int32, length of the prefix; the rest is padding.
    cache: the candidates' own keys and values, (R, N, C, S, h) each; S from `room_for`. Updated in
      place: the argument must not be used afterwards.
    index: int32 scalar, how many of the S are filled.
    interpret: runs the kernel on any device, slowly, for tests.

  Returns:
    (R, C, N, h), and the keys and values, (R, N, C, S, h) each.

  Raises:
    InputError: a device's part of the keys has more numbers than the kernel can address.
  """
  run = functools.partial(_call, interpret=interpret)
  # Each device has its own rows and heads; these are the axes of the heads in each array:
  out, *kept = sharding.by_rows_and_heads(
    run,
    (qkv, *turn, *prefix, length, *cache, jnp.asarray(index, jnp.int32)),
    (3, None, None, 1, 1, None, 1, 1, None),
    (2, 1, 1),
  )
  return out, kept


def _call(qkv, cos, sin, k, v, length, own_k, own_v, index, *, interpret):
  rows, candidates, _, heads, h = qkv.shape
  if own_k.size > ADDRESSES:
    raise InputError(
      f"a layer's keys on a device have {own_k.size} numbers, but the kernel can address at most "
      f'{ADDRESSES}; lower system.rollout_chunk'
    )

  def row(*shape):
    return pl.BlockSpec((None, *shape), lambda r, n: (r, *(0,) * len(shape)))

  def head(*shape):
    return pl.BlockSpec((None, None, *shape), lambda r, n: (r, n, *(0,) * len(shape)))

  kept = head(*own_k.shape[2:])
  kernel = functools.partial(
    _kernel,
    rows=max(LEAST_ROWS, pl.next_power_of_2(candidates)),
    candidates=candidates,
    scale=h**-0.5,
  )
  return pl.pallas_call(
    kernel,
    grid=(rows, heads),
    in_specs=[
      pl.BlockSpec((None, candidates, 3, None, h), lambda r, n: (r, 0, 0, n, 0)),
      row(h // 2),
      row(h // 2),
      head(*k.shape[2:]),
      head(*k.shape[2:]),
      pl.BlockSpec((1,), lambda r, n: (r,)),
      kept,
      kept,
      pl.BlockSpec((1,), lambda r, n: (0,)),
    ],
    out_specs=[pl.BlockSpec((None, candidates, None, h), lambda r, n: (r, 0, n, 0)), kept, kept],
    out_shape=[
      jax.ShapeDtypeStruct((rows, candidates, heads, h), qkv.dtype),
      *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (own_k, own_v)),
    ],
    input_output_aliases={6: 1, 7: 2},
    interpret=interpret,
    name='decode_attention',
    compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
  )(qkv, cos[:, 0], sin[:, 0], k, v, length, own_k, own_v, index.reshape(1))


def _kernel(
  qkv_ref,
  cos_ref,
  sin_ref,
  k_ref,
  v_ref,
  length_ref,
  own_k_ref,
  own_v_ref,
  index_ref,
  out_ref,
  kept_k_ref,
  kept_v_ref,
  *,
  rows,
  candidates,
  scale,
):
  """One head of one prefix."""
  length, index = length_ref[0], index_ref[0]
  width = qkv_ref.shape[-1]
  column = jnp.arange(width)
  row = jnp.minimum(
    jnp.arange(rows), candidates - 1
  )  # rows beyond the candidates repeat the last one
  half, other = column % (width // 2), (column + width // 2) % width
  cos, sin = cos_ref[half], jnp.where(column < width // 2, -1.0, 1.0) * sin_ref[half]

  def new(which, columns=column):
    return qkv_ref[row[:, None], which, columns[None]]

  def turned(which):
    return (
      new(which).astype(jnp.float32) * cos + new(which, other).astype(jnp.float32) * sin
    ).astype(qkv_ref.dtype)

  q, k, v = turned(0), turned(1), new(2)
  kept_k_ref[row[:, None], index, column[None]] = k
  kept_v_ref[row[:, None], index, column[None]] = v

  def join(carry, k_at, v_at, filled, whose):
    """Adds one block of keys and values. filled: (BLOCK,) bool, the keys to read; whose: (rows,)
    bool, the rows that see the block.
    """
    top, total, out = carry
    k, v = (
      triton.load(x, mask=jnp.broadcast_to(filled[:, None], (BLOCK, width)), other=0.0)
      for x in (k_at, v_at)
    )
    score = (
      jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
      * scale
    )
    score = jnp.where(whose[:, None] & filled[None], score, NOTHING)
    higher = jnp.maximum(top, jnp.max(score, axis=1))
    weight, fade = jnp.exp(score - higher[:, None]), jnp.exp(top - higher)
    more = jnp.dot(weight.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return higher, total * fade + jnp.sum(weight, axis=1), out * fade[:, None] + more

  def prefix_block(i, carry):
    keys = pl.ds(i * BLOCK, BLOCK)
    return join(
      carry, k_ref.at[keys], v_ref.at[keys], i * BLOCK + jnp.arange(BLOCK) < length, row >= 0
    )

  blocks = pl.cdiv(index, BLOCK)  # of one candidate

  def own_block(i, carry):
    c, first = i // blocks, i % blocks * BLOCK
    keys = pl.ds(first, BLOCK)
    return join(
      carry,
      own_k_ref.at[c, keys],
      own_v_ref.at[c, keys],
      first + jnp.arange(BLOCK) < index,
      row == c,
    )

  carry = (
    jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), axis=1) * scale,
    jnp.ones(rows, jnp.float32),
    v.astype(jnp.float32),
  )
  carry = jax.lax.fori_loop(0, pl.cdiv(length, BLOCK), prefix_block, carry)
  _, total, out = jax.lax.fori_loop(0, candidates * blocks, own_block, carry)
  out_ref[row[:, None], column[None]] = (out / total[:, None]).astype(out_ref.dtype)
