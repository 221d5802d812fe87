"""LLaMA as Janus uses it; models/common/trunk.py runs prefixes and candidates through it.

Axes: R prefixes (rows), C candidates of a prefix, P prefix length, T candidate tokens, S cached
tokens, D width, N heads, h head width, L layers. Keys and values are (R, N, ..., tokens, h): batch
axes first, so that attention is a plain batched matrix product.
"""

from flax import nnx
import jax
import jax.numpy as jnp

from dsr_jax import sharding
from dsr_jax.models.common.layers import Embedding, Linear, RMSNorm, stack_layers
from dsr_jax.models.common.rotary import Rotary, rotary, rotate
from dsr_jax.models.common.trunk import Trunk
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
    """x: (R, C, T, D) -> q, k, v (R, N, C, T, h) each, with q and k rotated."""
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
  """One layer. `attend_fn(q, k, v)` computes its attention from the new tokens' queries, keys and
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


class LanguageModel(Trunk):
  def __init__(self, cfg: TextConfig, *, rngs: nnx.Rngs):
    self.cfg = cfg
    self.embed_tokens = Embedding(cfg.vocab_size, cfg.hidden_size, rngs=rngs, large=True)
    self.layers = stack_layers(lambda r: Block(cfg, rngs=r), cfg.num_hidden_layers, rngs)
    self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

  def rotary_at(self, positions, limit: int) -> Rotary:
    """The rotary embedding at positions (R, T) below `limit`."""
    return rotary(positions, limit, width=self.cfg.head_dim, theta=self.cfg.rope_theta)
