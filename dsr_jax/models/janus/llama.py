"""LLaMA as Janus uses it, written around one idea: a group of G candidates shares its prefix.

A prefix (a prompt, or a picture and a question) is run once by `prefill`; its keys and values then
serve every candidate of the group, both in teacher forcing (`extend`) and token by token
(models/decoder.py), under one softmax over all parts. Right padding of a prefix is masked where it
is read; right padding of a candidate is never seen, by causality.

Axes: R prefixes (rows), C candidates of a prefix, P prefix length, T candidate tokens, S cached
tokens, D width, N heads, h head width, L layers. Keys and values are (R, N, ..., tokens, h): batch
axes first, so that attention is a plain batched matrix product.
"""

import functools

from flax import nnx
import jax
import jax.numpy as jnp

from dsr_jax import sharding
from dsr_jax.models.common.attention import attend
from dsr_jax.models.common.layers import Embedding, Linear, RMSNorm, scan_layers, stack_layers
from dsr_jax.models.common.prefix import Prefix, prefix_mask
from dsr_jax.models.common.rotary import Rotary, rotary, rotate
from dsr_jax.models.janus.config import TextConfig


class Attention(nnx.Module):
  def __init__(self, cfg: TextConfig, *, rngs: nnx.Rngs):
    self.heads = cfg.num_attention_heads
    inner = cfg.num_attention_heads * cfg.head_dim
    self.q_proj = Linear(cfg.hidden_size, inner, rngs=rngs, bias=False)
    self.k_proj = Linear(cfg.hidden_size, inner, rngs=rngs, bias=False)
    self.v_proj = Linear(cfg.hidden_size, inner, rngs=rngs, bias=False)
    self.o_proj = Linear(inner, cfg.hidden_size, rngs=rngs, bias=False)

  def qkv(self, x, at: Rotary):
    """x: (R, C, T, D) -> three of (R, N, C, T, h), rotated where they must be."""
    r, c, t, _ = x.shape

    def split(y):
      return jnp.moveaxis(y.reshape(r, c, t, self.heads, -1), 3, 1)

    q, k, v = (sharding.split_heads(split(f(x))) for f in (self.q_proj, self.k_proj, self.v_proj))
    return rotate(q, at), rotate(k, at), v

  def output(self, y):
    """y: (R, N, C, T, h) -> (R, C, T, D)."""
    r, _, c, t, _ = y.shape
    return self.o_proj(jnp.moveaxis(y, 1, 3).reshape(r, c, t, -1))


class MLP(nnx.Module):
  def __init__(self, cfg: TextConfig, *, rngs: nnx.Rngs):
    self.gate_proj = Linear(cfg.hidden_size, cfg.intermediate_size, rngs=rngs, bias=False)
    self.up_proj = Linear(cfg.hidden_size, cfg.intermediate_size, rngs=rngs, bias=False)
    self.down_proj = Linear(cfg.intermediate_size, cfg.hidden_size, rngs=rngs, bias=False)

  def __call__(self, x):
    return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
  """One layer; `attend_fn(q, k, v)` is its attention, given the new tokens' queries, keys and
  values.
  """

  def __init__(self, cfg: TextConfig, *, rngs: nnx.Rngs):
    self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
    self.self_attn = Attention(cfg, rngs=rngs)
    self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
    self.mlp = MLP(cfg, rngs=rngs)

  def __call__(self, x, at: Rotary, attend_fn):
    """x: (R, C, T, D) -> the same shape."""
    x = sharding.split_rows(
      x + self.self_attn.output(attend_fn(*self.self_attn.qkv(self.input_layernorm(x), at)))
    )
    return sharding.split_rows(x + self.mlp(self.post_attention_layernorm(x)))


class LanguageModel(nnx.Module):
  def __init__(self, cfg: TextConfig, *, rngs: nnx.Rngs):
    self.cfg = cfg
    self.embed_tokens = Embedding(cfg.vocab_size, cfg.hidden_size, rngs=rngs, large=True)
    self.layers = stack_layers(lambda r: Block(cfg, rngs=r), cfg.num_hidden_layers, rngs)
    self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

  def rotary_at(self, positions, limit: int) -> Rotary:
    """The rotary embedding at positions (R, T) below `limit`."""
    return rotary(positions, limit, width=self.cfg.head_dim, theta=self.cfg.rope_theta)

  def prefill(self, embeds, length, *, remat: bool = False) -> Prefix:
    """embeds: (R, P, D), right-padded to P; length: (R,). Runs the prefixes and keeps their keys
    and values.
    """
    p = embeds.shape[1]
    at = self.rotary_at(jnp.arange(p)[None], p)  # one row serves all
    causal = jnp.tril(jnp.ones((p, p), bool))

    def body(block, x, _):
      kept = []

      def attend_fn(q, k, v):
        kept.append((k[:, :, 0], v[:, :, 0]))
        return attend(q, [(k, v, causal)])

      return block(x, at, attend_fn), kept[0]

    _, (k, v) = scan_layers(self.layers, body, sharding.split_rows(embeds[:, None]), remat=remat)
    return Prefix(k, v, length)

  def prefill_on(self, prefix: Prefix, embeds, length) -> Prefix:
    """Goes on from R prefixes in C ways each, and keeps the keys and values of all of it.

    embeds: (R, C, T, D), right-padded to T; length: (R, C). Returns a prefix of R C rows and P + T
    places. What is shared is computed once, and copied: each row decodes by itself.
    """
    rows, ways, t, _ = embeds.shape
    room = prefix.k.shape[-2] + t
    at = self.rotary_at(prefix.length[:, None] + jnp.arange(t), room)
    causal = jnp.tril(jnp.ones((t, t), bool))
    seen = prefix_mask(prefix)

    def body(block, x, kv):
      kept = []

      def attend_fn(q, k, v):
        kept.append((k, v))
        return attend(q, [(*kv, seen), (k, v, causal)])

      return block(x, at, attend_fn), kept[0]

    _, own = scan_layers(self.layers, body, sharding.split_rows(embeds), (prefix.k, prefix.v))

    def joined(shared, own):
      """shared (L, R, N, P, h), own (L, R, N, C, T, h) -> (L, R C, N, P + T, h), without a gap."""
      shared = jnp.pad(shared, ((0, 0), (0, 0), (0, 0), (0, t), (0, 0)))
      shared = jnp.broadcast_to(shared[:, :, None], (*shared.shape[:2], ways, *shared.shape[2:]))
      put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=-2)
      out = jax.vmap(put, in_axes=(1, 1, 0), out_axes=1)(
        shared, jnp.moveaxis(own, 3, 2), prefix.length
      )
      return sharding.split_heads(
        out.reshape(out.shape[0], rows * ways, *out.shape[3:]), stacked=True
      )

    return Prefix(
      joined(prefix.k, own[0]), joined(prefix.v, own[1]), (prefix.length[:, None] + length).ravel()
    )

  def extend(self, prefix: Prefix, embeds, *, remat: bool = False):
    """Teacher forcing of candidates after a shared prefix.

    embeds: (R, C, T, D) -> final-norm states (R, C, T, D); state t predicts what follows token t.
    """
    t = embeds.shape[2]
    at = self.rotary_at(prefix.length[:, None] + jnp.arange(t), prefix.k.shape[-2] + t)
    causal = jnp.tril(jnp.ones((t, t), bool))
    seen = prefix_mask(prefix)

    def body(block, x, kv):
      return block(x, at, lambda q, k, v: attend(q, [(*kv, seen), (k, v, causal)])), None

    x, _ = scan_layers(
      self.layers, body, sharding.split_rows(embeds), (prefix.k, prefix.v), remat=remat
    )
    return self.norm(x)
