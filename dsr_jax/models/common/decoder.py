"""Token-by-token decoding of candidates after a shared prefix: the setup before the loop, and one
step of it.

Axes: R prefixes (rows), C candidates of a prefix, P prefix length, S cached tokens, D width, N
heads, h head width, I = N h, F width inside an MLP, L layers.
"""

import copy

import jax
import jax.numpy as jnp

from dsr_jax import sharding
from dsr_jax.models.common import decode_kernel
from dsr_jax.models.common.attention import Int8, attend, to_int8
from dsr_jax.models.common.layers import LinearsInOne, layer_at, scan_layers
from dsr_jax.models.common.prefix import KV, Prefix, prefix_mask


def make(lm, prefix: Prefix, candidates: int, tokens: int, scan: bool, cache_dtype: str = ''):
  """A decoder for C candidates of `tokens` tokens each after `prefix`: uses the kernel where it is
  supported, plain products elsewhere.

  scan: one program for all layers (`Sampling.scan`). cache_dtype: '' or 'int8', which the kernel
  does not support. Both kinds have `grow`, `step`, `segment` and `first_of`.
  """
  by_kernel = (
    not scan and not cache_dtype and decode_kernel.serves(prefix.k.dtype, prefix.k.shape[-1])
  )
  return (
    KernelDecoder(lm, prefix, candidates, tokens)
    if by_kernel
    else Decoder(lm, prefix, candidates, tokens, scan, cache_dtype)
  )


def _first_of(x, rows: int, axis: int = 0):
  """The first row of every `rows` rows."""
  return jax.lax.index_in_dim(
    x.reshape(*x.shape[:axis], -1, rows, *x.shape[axis + 1 :]), 0, axis + 1, keepdims=False
  )


def _widened(x, tokens: int, axis: int = 3):
  """A part of a cache, padded to `tokens` along `axis`."""
  return jnp.pad(x, [(0, tokens - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])


class Decoder:
  """What stays fixed during the decode loop, built once before it.

  Unrolled, each layer has its own weights, prefix and cache, and a token writes only one slice of
  its cache. Scanned (`Sampling.scan`), the layers stay one stack: the program is shorter by the
  number of layers, and there is no second copy of weights and prefix.

  A step reads little more of the cache than is filled. Within a segment the cache is the loop's
  carry. Between segments the cache of unrolled layers grows; that of a stack has its full size from
  the start, because growing it would hold it twice, and is read up to the end of the segment.
  cache_dtype 'int8' keeps the candidates' own keys and values in 8 bits; the shared prefix keeps
  its dtype.
  """

  def __init__(
    self,
    lm,
    prefix: Prefix,
    candidates: int,
    tokens: int,
    scan: bool,
    cache_dtype: str = '',
  ):
    layers = range(prefix.k.shape[0])
    self.layers = lm.layers if scan else [layer_at(lm.layers, i) for i in layers]
    self.prefix = (prefix.k, prefix.v) if scan else [(prefix.k[i], prefix.v[i]) for i in layers]
    self.norm, self.rotary_at = lm.norm, lm.rotary_at
    self.scan, self.int8 = scan, cache_dtype == 'int8'
    self.candidates, self.tokens = candidates, tokens
    self.length, self.padded = prefix.length, prefix.k.shape[3]
    self.seen = prefix_mask(prefix)

  def segment(self, wanted: int) -> int:
    """Tokens per segment: as `wanted`."""
    return wanted

  def grow(self, cache, tokens: int):
    """The cache with room for `tokens` more tokens per candidate; None is the empty cache. A list
    of the layers' KVs, or the KV of the stack.
    """
    if self.scan:
      return self._room(self.prefix[0], self.tokens) if cache is None else cache
    room = self._room(self.prefix[0][0], tokens)
    if cache is None:
      return [room for _ in self.layers]
    return [jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=3), kv, room) for kv in cache]

  def first_of(self, rows: int, cache, tokens: int):
    """The decoder of the first of every `rows` prefixes alone, for `tokens` tokens in all, and its
    cache.
    """
    left = copy.copy(self)

    def narrow(x):
      return sharding.split_heads(_first_of(x, rows, int(self.scan)), stacked=self.scan)

    left.prefix, cache = jax.tree.map(narrow, (self.prefix, cache))
    left.length, left.seen, left.tokens = (
      _first_of(self.length, rows),
      _first_of(self.seen, rows),
      tokens,
    )
    return left, jax.tree.map(lambda x: _widened(x, tokens, 4), cache) if self.scan else cache

  def _room(self, like, tokens):
    """An empty KV for layers with the prefix `like`, (R, N, P, h) or (L, R, N, P, h)."""
    shape = (*like.shape[:-2], self.candidates, tokens, like.shape[-1])

    def zeros(shape, dtype):
      return sharding.split_heads(jnp.zeros(shape, dtype), stacked=self.scan)

    room = (
      Int8(zeros(shape, jnp.int8), zeros(shape[:-1], jnp.float32))
      if self.int8
      else zeros(shape, like.dtype)
    )
    return KV(room, room)

  def step(self, embeds, cache, index, room: int):
    """embeds: (R, C, D), token `index` of the candidates -> states (R, C, D) and the cache with
    this token. room: exceeds all indices of the segment.
    """
    at = self.rotary_at((self.length + index)[:, None], self.padded + self.tokens)
    x = sharding.split_rows(embeds[:, :, None])

    def through(layer, x, shared, cache, write, read):
      """One layer. `write` puts the new token into the cache, and `read` returns the part that
      attention sees.
      """
      new = []

      def attend_fn(q, k, v):
        kept = KV(*map(to_int8, (k, v))) if self.int8 else KV(k, v)
        new.append(jax.tree.map(write, cache, kept))
        own = jax.tree.map(read, new[0])
        return attend(q, [(*shared, self.seen), (*own, jnp.arange(own.k.shape[-2]) < index + 1)])

      return layer(x, at, attend_fn), new[0]

    if self.scan:

      def body(layer, carry, of_layer):
        i, shared = of_layer

        def write(c, y):
          return jax.lax.dynamic_update_slice(c, y[None], (i, 0, 0, 0, index, *(0,) * (c.ndim - 5)))

        def read(c):
          return jax.lax.dynamic_slice(
            c, (i, *(0,) * (c.ndim - 1)), (1, *c.shape[1:4], room, *c.shape[5:])
          )[0]

        return through(layer, carry[0], shared, carry[1], write, read), None

      (x, cache), _ = scan_layers(
        self.layers, body, (x, cache), (jnp.arange(len(self.prefix[0])), self.prefix)
      )
      return self.norm(x)[:, :, 0], cache

    def write(c, y):
      return jax.lax.dynamic_update_slice_in_dim(c, y, index, axis=3)

    written = []
    for layer, shared, own in zip(self.layers, self.prefix, cache):
      x, kv = through(layer, x, shared, own, write, lambda c: c)
      written.append(kv)
    return self.norm(x)[:, :, 0], written


class KernelDecoder:
  """Decoding with models/decode_kernel.py. The kernel reads only the filled part of the cache, so
  the cache has its full size from the start.

  On a GPU a step is bound by memory bandwidth and by the number of programs, so linear maps of the
  same activations are one product.
  """

  def __init__(
    self,
    lm,
    prefix: Prefix,
    candidates: int,
    tokens: int,
    *,
    interpret: bool = False,
  ):
    whole = decode_kernel.room_for(prefix.k.shape[3]) - prefix.k.shape[3]

    def widen(x):
      return jnp.pad(x, ((0, 0), (0, 0), (0, whole), (0, 0)))

    self.prefix = [(widen(k), widen(v)) for k, v in zip(prefix.k, prefix.v)]
    self.layers = []
    for i in range(len(self.prefix)):
      layer = layer_at(lm.layers, i)
      attention, mlp = layer.self_attn, layer.mlp
      self.layers.append(
        (
          layer,
          LinearsInOne(attention.q_proj, attention.k_proj, attention.v_proj),
          LinearsInOne(mlp.gate_proj, mlp.up_proj),
        )
      )
    self.norm, self.rotary_at = lm.norm, lm.rotary_at
    self.cfg, self.length = lm.cfg, prefix.length
    self.candidates, self.tokens, self.limit = candidates, tokens, prefix.k.shape[3] + tokens
    self.interpret = interpret

  def segment(self, wanted: int) -> int:
    """Tokens per segment: all, because no step reads what is not filled."""
    return self.tokens

  def grow(self, cache, tokens: int):
    """The cache with room for `tokens` more tokens per candidate; None is the empty cache. A list
    of each layer's keys and values.
    """
    if cache is not None:
      return cache
    r, n, _, h = self.prefix[0][0].shape
    room = sharding.split_heads(
      jnp.zeros(
        (r, n, self.candidates, decode_kernel.room_for(self.tokens), h), self.prefix[0][0].dtype
      )
    )
    return [KV(room, room) for _ in self.prefix]

  def first_of(self, rows: int, cache, tokens: int):
    """The decoder of the first of every `rows` prefixes alone, for `tokens` tokens in all, and its
    cache.
    """
    left = copy.copy(self)
    left.prefix, cache = jax.tree.map(
      lambda x: sharding.split_heads(_first_of(x, rows)), (self.prefix, cache)
    )
    left.length, left.tokens, left.limit = (
      _first_of(self.length, rows),
      tokens,
      self.limit + tokens - self.tokens,
    )
    return left, jax.tree.map(lambda x: _widened(x, decode_kernel.room_for(tokens)), cache)

  def step(self, embeds, cache, index, room: int):
    """embeds: (R, C, D), token `index` of the candidates -> states (R, C, D) and the cache with
    this token. room: unused.
    """
    at = self.rotary_at((self.length + index)[:, None], self.limit)
    x, written = sharding.split_rows(embeds), []
    for (layer, qkv, gate_and_up), shared, own in zip(self.layers, self.prefix, cache):
      new = qkv(layer.input_layernorm(x)).reshape(*x.shape[:2], 3, self.cfg.num_attention_heads, -1)
      y, kept = decode_kernel.decode_attention(
        new, at, shared, self.length, own, index, interpret=self.interpret
      )
      x = sharding.split_rows(x + layer.self_attn.o_proj(y.reshape(*x.shape[:2], -1)))
      gate, up = jnp.moveaxis(gate_and_up(layer.post_attention_layernorm(x)), -2, 0)
      x = sharding.split_rows(x + layer.mlp.down_proj(jax.nn.silu(gate) * up))
      written.append(KV(*kept))
    return self.norm(x), written
