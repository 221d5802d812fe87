"""LLaMA as Janus uses it, written around one idea: a group of G candidates shares its prefix.

A prefix (a prompt, or a picture and a question) is run once by `prefill`; its keys and values then serve every candidate
of the group, both in teacher forcing (`extend`) and token by token (`decode_step`), under one softmax over all parts.
Right padding of a prefix is masked where it is read; right padding of a candidate is never seen, by causality.

Axes: R prefixes (rows), C candidates of a prefix, P prefix length, T candidate tokens, S cached tokens, D width, N heads,
h head width, L layers. Keys and values are (R, N, ..., tokens, h): batch axes first, so that attention is a plain
batched matrix product.
"""

from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from dsr_jax.models.config import TextConfig
from dsr_jax.models.layers import Embedding, Linear, RMSNorm, layer_at, scan_layers, stack_layers


class Prefix(NamedTuple):
  """Keys and values of all layers, (L, R, N, P, h); length (R,) int32: the rest is padding."""
  k: jax.Array
  v: jax.Array
  length: jax.Array


class KV(NamedTuple):
  """Keys and values of one layer, (R, N, C, S, h)."""
  k: jax.Array
  v: jax.Array


def rope(x, positions, theta: float):
  """Rotary embedding, half-split layout, angles in float32. x: (R, N, ..., T, h); positions: (R, T)."""
  half = x.shape[-1] // 2
  freq = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles = positions.astype(jnp.float32)[..., None] * freq  # float32 island (R, T, h/2)
  angles = angles.reshape(angles.shape[0], *(1,) * (x.ndim - 3), *angles.shape[1:])
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attend(q, parts):
  """One softmax over several parts of the context.

  Args:
    q: (R, N, C, T, h).
    parts: of (k, v, mask): either shared by the candidates, (R, N, S, h), or their own, (R, N, C, S, h);
      mask broadcasts to (R, N, C, T, S), or is None.

  Returns:
    (R, N, C, T, h).
  """
  r, n, c, t, h = q.shape
  scores = []
  for k, _, mask in parts:
    if k.ndim == 4:  # shared: all candidates' queries are rows of one matrix product
      s = jnp.einsum('rnqh,rnsh->rnqs', q.reshape(r, n, c * t, h), k, preferred_element_type=jnp.float32)
      s = s.reshape(r, n, c, t, -1)
    else:
      s = jnp.einsum('rncth,rncsh->rncts', q, k, preferred_element_type=jnp.float32)
    s = s * h ** -0.5
    scores.append(s if mask is None else jnp.where(mask, s, -1e30))
  probs = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(q.dtype)  # softmax in float32
  out, start = 0, 0
  for k, v, _ in parts:
    p = probs[..., start:start + k.shape[-2]]
    start += k.shape[-2]
    if k.ndim == 4:
      out += jnp.einsum('rnqs,rnsh->rnqh', p.reshape(r, n, c * t, -1), v).reshape(r, n, c, t, h)
    else:
      out += jnp.einsum('rncts,rncsh->rncth', p, v)
  return out


class Attention(nnx.Module):

  def __init__(self, cfg: TextConfig, *, rngs: nnx.Rngs):
    self.heads, self.theta = cfg.num_attention_heads, cfg.rope_theta
    inner = cfg.num_attention_heads * cfg.head_dim
    self.q_proj = Linear(cfg.hidden_size, inner, rngs=rngs, bias=False)
    self.k_proj = Linear(cfg.hidden_size, inner, rngs=rngs, bias=False)
    self.v_proj = Linear(cfg.hidden_size, inner, rngs=rngs, bias=False)
    self.o_proj = Linear(inner, cfg.hidden_size, rngs=rngs, bias=False)

  def qkv(self, x, positions):
    """x: (R, C, T, D), positions: (R, T) -> three of (R, N, C, T, h), rotated where they must be."""
    r, c, t, _ = x.shape
    split = lambda y: jnp.moveaxis(y.reshape(r, c, t, self.heads, -1), 3, 1)
    q, k, v = (split(f(x)) for f in (self.q_proj, self.k_proj, self.v_proj))
    return rope(q, positions, self.theta), rope(k, positions, self.theta), v

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
  """One layer; `context(k, v)` says which parts its queries see, given the new tokens' keys and values."""

  def __init__(self, cfg: TextConfig, *, rngs: nnx.Rngs):
    self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
    self.self_attn = Attention(cfg, rngs=rngs)
    self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
    self.mlp = MLP(cfg, rngs=rngs)

  def __call__(self, x, positions, context):
    """x: (R, C, T, D) -> the same shape."""
    q, k, v = self.self_attn.qkv(self.input_layernorm(x), positions)
    x = x + self.self_attn.output(attend(q, context(k, v)))
    return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nnx.Module):

  def __init__(self, cfg: TextConfig, *, rngs: nnx.Rngs):
    self.embed_tokens = Embedding(cfg.vocab_size, cfg.hidden_size, rngs=rngs)
    self.layers = stack_layers(lambda r: Block(cfg, rngs=r), cfg.num_hidden_layers, rngs)
    self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

  def prefill(self, embeds, length, *, remat: bool = False) -> Prefix:
    """embeds: (R, P, D), right-padded to P; length: (R,). Runs the prefixes and keeps their keys and values."""
    r, p, _ = embeds.shape
    positions = jnp.broadcast_to(jnp.arange(p), (r, p))
    causal = jnp.tril(jnp.ones((p, p), bool))

    def body(block, x, _):
      kept = []

      def context(k, v):
        kept.append((k[:, :, 0], v[:, :, 0]))
        return [(k, v, causal)]

      return block(x, positions, context), kept[0]

    _, (k, v) = scan_layers(self.layers, body, embeds[:, None], remat=remat)
    return Prefix(k, v, length)

  def extend(self, prefix: Prefix, embeds, *, remat: bool = False):
    """Teacher forcing of candidates after a shared prefix.

    embeds: (R, C, T, D) -> final-norm states (R, C, T, D); state t predicts what follows token t.
    """
    t = embeds.shape[2]
    positions = prefix.length[:, None] + jnp.arange(t)
    causal = jnp.tril(jnp.ones((t, t), bool))
    seen = self._prefix_mask(prefix)

    def body(block, x, kv):
      return block(x, positions, lambda k, v: [(*kv, seen), (k, v, causal)]), None

    x, _ = scan_layers(self.layers, body, embeds, (prefix.k, prefix.v), remat=remat)
    return self.norm(x)

  def decoder(self, prefix: Prefix, candidates: int):
    """Token-by-token decoding after `prefix` for C candidates each; see `Decoder`."""
    return Decoder(self, prefix, candidates)

  @staticmethod
  def _prefix_mask(prefix: Prefix):
    """(R, 1, 1, 1, P): True on the prefix's own tokens."""
    return (jnp.arange(prefix.k.shape[-2]) < prefix.length[:, None])[:, None, None, None, :]


class Decoder:
  """The decode loop's fixed surroundings, built once before the loop: a layer's weights and prefix are arrays of their own.

  The candidates' own cache has two parts. `past` holds whole finished segments and does not change while a segment is
  decoded; `current`, one segment long, is the only cache in the loop's carry, so a step writes one slice and copies
  nothing else, and reads only what is filled.
  """

  def __init__(self, lm: LanguageModel, prefix: Prefix, candidates: int):
    self.layers = [layer_at(lm.layers, i) for i in range(prefix.k.shape[0])]
    self.norm = lm.norm
    self.length = prefix.length
    self.candidates = candidates
    self.prefix = [(prefix.k[i], prefix.v[i]) for i in range(prefix.k.shape[0])]
    self.seen = lm._prefix_mask(prefix)

  def empty(self, tokens: int) -> list[KV]:
    """A cache for `tokens` tokens a candidate, one KV a layer."""
    k = self.prefix[0][0]
    zeros = jnp.zeros((*k.shape[:2], self.candidates, tokens, k.shape[-1]), k.dtype)
    return [KV(zeros, zeros) for _ in self.layers]

  @staticmethod
  def append(past: list[KV], current: list[KV]) -> list[KV]:
    """Closes a segment."""
    return [KV(*(jnp.concatenate(pair, axis=3) for pair in zip(a, b))) for a, b in zip(past, current)]

  def step(self, embeds, past: list[KV], current: list[KV], index):
    """embeds: (R, C, D), the token at place `index` of the current segment -> states (R, C, D) and the new `current`."""
    before = past[0].k.shape[3]
    positions = (self.length + before + index)[:, None]
    filled = jnp.arange(current[0].k.shape[3]) <= index
    x, written = embeds[:, :, None], []
    for layer, shared, old, cache in zip(self.layers, self.prefix, past, current):

      def context(k, v):
        written.append(KV(*(jax.lax.dynamic_update_slice_in_dim(c, new, index, axis=3) for c, new in zip(cache, (k, v)))))
        own = [(*old, None)] if before else []
        return [(*shared, self.seen), *own, (*written[-1], filled)]

      x = layer(x, positions, context)
    return self.norm(x)[:, :, 0], written
