"""Attention over a context in several parts: a prefix that candidates share, and their own tokens.

Axes: R prefixes (rows), C candidates of a prefix, T queries, S keys of a part, N heads, h head
width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

FUSED_FROM = 64  # queries; with fewer, the kernel is no faster
FUSED_ROOM = 64  # keys are padded to a multiple of this


class Int8(NamedTuple):
  """Keys or values in 8 bits: values (..., S, h) int8, and each vector's factor, scale (..., S)
  float32.
  """

  values: jax.Array
  scale: jax.Array

  @property
  def shape(self):
    return self.values.shape


def to_int8(x) -> Int8:
  """(..., S, h) -> the nearest 8-bit numbers; the largest of each vector becomes 127."""
  x = x.astype(jnp.float32)  # float32 island
  scale = jnp.max(jnp.abs(x), axis=-1) / 127
  return Int8(jnp.round(x / jnp.maximum(scale, 1e-30)[..., None]).astype(jnp.int8), scale)


def kernels_run(dtype) -> bool:
  """Whether hand-written kernels run here with this dtype: half precision on an NVIDIA GPU with
  compute capability 8 (Ampere) or later.
  """
  if jax.default_backend() != 'gpu' or dtype not in (jnp.bfloat16, jnp.float16):
    return False
  capability = getattr(
    jax.local_devices()[0], 'compute_capability', ''
  )  # other vendors' GPUs have a name here
  return capability[:1].isdigit() and float(capability) >= 8


def attend(q, parts):
  """One softmax over several parts of the context. With many queries in half precision on a GPU,
  uses cuDNN's fused kernel.

  Args:
    q: (R, N, C, T, h).
    parts: list of (k, v, mask). k and v are shared by the candidates, (R, N, S, h), or their own,
      (R, N, C, S, h), or `Int8`; mask broadcasts to (R, N, C, T, S), or is None.

  Returns:
    (R, N, C, T, h).
  """
  r, n, c, t, h = q.shape
  if t >= FUSED_FROM and h % 8 == 0 and kernels_run(q.dtype):
    return fused(q, parts, 'cudnn')

  def flat(x):
    return x.reshape(
      r, n, c * t, -1
    )  # for a shared part, the queries of all candidates are rows of one matrix product

  scores = []
  for k, _, mask in parts:
    if isinstance(k, Int8):
      s = (
        jnp.einsum(
          'rncth,rncsh->rncts', q, k.values.astype(q.dtype), preferred_element_type=jnp.float32
        )
        * k.scale[:, :, :, None]
      )
    elif k.ndim == 4:
      s = jnp.einsum('rnqh,rnsh->rnqs', flat(q), k, preferred_element_type=jnp.float32).reshape(
        r, n, c, t, -1
      )
    else:
      s = jnp.einsum('rncth,rncsh->rncts', q, k, preferred_element_type=jnp.float32)
    s = s * h**-0.5
    scores.append(s if mask is None else jnp.where(mask, s, -1e30))
  # The softmax is in float32, part by part, because joining the scores would copy them twice.
  top = functools.reduce(jnp.maximum, (jnp.max(s, axis=-1, keepdims=True) for s in scores))
  weights = [jnp.exp(s - jax.lax.stop_gradient(top)) for s in scores]
  total = sum(jnp.sum(w, axis=-1, keepdims=True) for w in weights)
  out = 0
  for w, (_, v, _) in zip(weights, parts):
    if isinstance(v, Int8):
      w, v = w * v.scale[:, :, :, None], v.values.astype(q.dtype)
    w = w.astype(q.dtype)
    if v.ndim == 4:
      y = jnp.einsum('rnqs,rnsh->rnqh', flat(w), v, preferred_element_type=jnp.float32).reshape(
        r, n, c, t, h
      )
    else:
      y = jnp.einsum('rncts,rncsh->rncth', w, v, preferred_element_type=jnp.float32)
    out += y
  return (out / total).astype(q.dtype)


def fused(q, parts, implementation: str):
  """`attend` with `jax.nn.dot_product_attention`, which never holds all scores. Joins the parts
  into one context with one mask.
  """
  r, n, c, t, h = q.shape

  def rows(x):
    return jnp.moveaxis(x, 1, 3).reshape(
      r * c, x.shape[3], n, h
    )  # (R, N, C, S, h) -> (R C, S, N, h)

  def own(x):
    return x if x.ndim == 5 else jnp.broadcast_to(x[:, :, None], (r, n, c, *x.shape[2:]))

  keys, values = (jnp.concatenate([rows(own(part[i])) for part in parts], axis=1) for i in (0, 1))

  def whole(mask, s):
    return jnp.broadcast_to(True if mask is None else mask, (r, 1, c, t, s))

  mask = jnp.concatenate([whole(mask, k.shape[-2]) for k, _, mask in parts], axis=-1).reshape(
    r * c, 1, t, -1
  )
  room = -keys.shape[1] % FUSED_ROOM
  keys, values = (jnp.pad(x, ((0, 0), (0, room), (0, 0), (0, 0))) for x in (keys, values))
  mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, room)))
  even = t % 2  # the kernel's backward pass needs an even number of queries
  queries, mask = (
    jnp.pad(rows(q), ((0, 0), (0, even), (0, 0), (0, 0))),
    jnp.pad(mask, ((0, 0), (0, 0), (0, even), (0, 0)), mode='edge'),
  )
  out = jax.nn.dot_product_attention(
    queries, keys, values, mask=mask, implementation=implementation
  )[:, :t]
  return jnp.moveaxis(out.reshape(r, c, t, n, h), 3, 1)
