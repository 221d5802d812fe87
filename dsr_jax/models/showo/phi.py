"""Phi-1.5 as Show-o uses it: norms on queries and keys, half of each head rotated, attention and
MLP in parallel.

Source: showlab/Show-o models/phi.py, which is transformers' Phi with `qk_layernorm`.
Two kinds of candidates follow a prefix: texts, which are causal, and images, whose tokens all
attend to each other. In a prefix, too, the tokens of an image attend to each other, and what
follows is causal.

Axes: R prefixes (rows), C candidates of a prefix, P prefix length, T candidate tokens, D width, N
heads, h head width. Keys and values are (R, N, ..., tokens, h).
"""

from flax import nnx
import jax
import jax.numpy as jnp

from dsr_jax import sharding
from dsr_jax.models.common.layers import (
  Embedding,
  Head,
  LayerNorm,
  Linear,
  product_in_float32,
  stack_layers,
)
from dsr_jax.models.common.rotary import Rotary, rotary, rotate
from dsr_jax.models.common.trunk import Trunk
from dsr_jax.models.showo.config import PhiConfig


class Attention(nnx.Module):
  def __init__(self, cfg: PhiConfig, *, rngs: nnx.Rngs):
    width = cfg.hidden_size
    self.heads, self.rotary_dim = cfg.num_attention_heads, cfg.rotary_dim
    self.q_proj = Linear(width, width, rngs=rngs)
    self.k_proj = Linear(width, width, rngs=rngs)
    self.v_proj = Linear(width, width, rngs=rngs)
    self.dense = Linear(width, width, rngs=rngs)
    self.q_layernorm = LayerNorm(cfg.head_dim, cfg.layer_norm_eps)
    self.k_layernorm = LayerNorm(cfg.head_dim, cfg.layer_norm_eps)

  def qkv(self, x, at: Rotary):
    """x: (R, C, T, D) -> q, k, v (R, N, C, T, h) each, with q and k normalized and rotated."""
    r, c, t, _ = x.shape

    def split(y):
      return jnp.moveaxis(y.reshape(r, c, t, self.heads, -1), 3, 1)

    q, k, v = (sharding.split_heads(split(f(x))) for f in (self.q_proj, self.k_proj, self.v_proj))
    return self._rotated(self.q_layernorm(q), at), self._rotated(self.k_layernorm(k), at), v

  def _rotated(self, x, at: Rotary):
    """Rotates the first `rotary_dim` components of a head and keeps the others."""
    turned, still = jnp.split(x, [self.rotary_dim], axis=-1)
    return jnp.concatenate([rotate(turned, at), still], axis=-1)

  def output(self, y):
    """y: (R, N, C, T, h) -> (R, C, T, D)."""
    r, _, c, t, _ = y.shape
    return self.dense(jnp.moveaxis(y, 1, 3).reshape(r, c, t, -1))


class MLP(nnx.Module):
  def __init__(self, cfg: PhiConfig, *, rngs: nnx.Rngs):
    self.fc1 = Linear(cfg.hidden_size, cfg.intermediate_size, rngs=rngs)
    self.fc2 = Linear(cfg.intermediate_size, cfg.hidden_size, rngs=rngs)

  def __call__(self, x):
    return self.fc2(jax.nn.gelu(self.fc1(x), approximate=True))


class Block(nnx.Module):
  """One layer: one norm feeds attention and MLP, and both are added. `attend_fn(q, k, v)` computes
  its attention from the new tokens' queries, keys and values.
  """

  def __init__(self, cfg: PhiConfig, *, rngs: nnx.Rngs):
    self.input_layernorm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
    self.self_attn = Attention(cfg, rngs=rngs)
    self.mlp = MLP(cfg, rngs=rngs)

  def __call__(self, x, at: Rotary, attend_fn):
    """x: (R, C, T, D) -> the same shape."""
    y = self.input_layernorm(x)
    attended = self.self_attn.output(attend_fn(*self.self_attn.qkv(y, at)))
    return sharding.split_rows(x + attended + self.mlp(y))


class LanguageModel(Trunk):
  """rows: of the embedding, including those of image codes."""

  def __init__(self, cfg: PhiConfig, rows: int, *, rngs: nnx.Rngs):
    self.cfg = cfg
    self.embed_tokens = Embedding(rows, cfg.hidden_size, rngs=rngs)
    self.layers = stack_layers(lambda r: Block(cfg, rngs=r), cfg.num_hidden_layers, rngs)
    self.norm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)

  def rotary_at(self, positions, limit: int) -> Rotary:
    """The rotary embedding at positions (R, T) below `limit`."""
    return rotary(positions, limit, width=self.cfg.rotary_dim, theta=self.cfg.rope_theta)


class SharedHead(Head):
  """One matrix for text tokens and image codes, of which only a part is used at a time."""

  def part(self, x, first: int, end: int):
    """x: (..., D) -> float32 logits (..., end - first) of rows `first` to `end`."""
    rows = x.reshape(-1, x.shape[-1])
    y = product_in_float32(rows, self.kernel[...][:, first:end].astype(x.dtype))
    y = y.reshape(*x.shape[:-1], -1)
    return y + self.bias[...][first:end].astype(jnp.float32)
