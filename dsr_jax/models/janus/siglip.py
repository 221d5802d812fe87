"""SigLIP vision tower of Janus: all layers, no pooling.

Source: deepseek-ai/Janus janus/models/siglip_vit.py. Pre-norm blocks, exact GELU, biases
everywhere.
Axes: B images, N patches (row-major), W width, L layers, H heads, h head width.
"""

from flax import nnx
import jax
import jax.numpy as jnp

from dsr_jax.models.common.layers import LayerNorm, Linear, gelu, scan_layers, stack_layers
from dsr_jax.models.janus.config import VisionConfig


class Attention(nnx.Module):
  def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs):
    self.heads = cfg.num_attention_heads
    self.q_proj = Linear(cfg.hidden_size, cfg.hidden_size, rngs=rngs)
    self.k_proj = Linear(cfg.hidden_size, cfg.hidden_size, rngs=rngs)
    self.v_proj = Linear(cfg.hidden_size, cfg.hidden_size, rngs=rngs)
    self.projection_layer = Linear(cfg.hidden_size, cfg.hidden_size, rngs=rngs)

  def __call__(self, x):
    b, n, w = x.shape
    # (B, H, N, h): batch axes first, so that both products are plain batched matrix products.
    q, k, v = (
      jnp.swapaxes(f(x).reshape(b, n, self.heads, -1), 1, 2)
      for f in (self.q_proj, self.k_proj, self.v_proj)
    )
    scores = (
      jnp.einsum('bhqd,bhkd->bhqk', q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    )
    probs = jax.nn.softmax(scores, axis=-1).astype(x.dtype)  # softmax in float32
    out = jnp.einsum('bhqk,bhkd->bhqd', probs, v)
    return self.projection_layer(jnp.swapaxes(out, 1, 2).reshape(b, n, w))


class MLP(nnx.Module):
  def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs):
    self.fc1 = Linear(cfg.hidden_size, cfg.intermediate_size, rngs=rngs)
    self.fc2 = Linear(cfg.intermediate_size, cfg.hidden_size, rngs=rngs)

  def __call__(self, x):
    return self.fc2(gelu(self.fc1(x)))


class Block(nnx.Module):
  def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs):
    self.layer_norm1 = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
    self.self_attn = Attention(cfg, rngs=rngs)
    self.layer_norm2 = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
    self.mlp = MLP(cfg, rngs=rngs)

  def __call__(self, x):
    x = x + self.self_attn(self.layer_norm1(x))
    return x + self.mlp(self.layer_norm2(x))


class PatchEmbedding(nnx.Module):
  """Non-overlapping patches to vectors; kernel (p, p, 3, W)."""

  def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs):
    p = cfg.patch_size
    self.kernel = nnx.Param(
      jax.random.normal(rngs.params(), (p, p, 3, cfg.hidden_size)) * (p * p * 3) ** -0.5
    )
    self.bias = nnx.Param(jnp.zeros(cfg.hidden_size))

  def __call__(self, pixels):
    b, height, width, c = pixels.shape
    p = self.kernel.shape[0]
    x = pixels.reshape(b, height // p, p, width // p, p, c).swapaxes(2, 3).reshape(b, -1, p * p * c)
    return x @ self.kernel[...].reshape(p * p * c, -1).astype(x.dtype) + self.bias[...].astype(
      x.dtype
    )


class PositionEmbedding(nnx.Module):
  def __init__(self, positions: int, width: int, *, rngs: nnx.Rngs):
    self.embedding = nnx.Param(jax.random.normal(rngs.params(), (positions, width)) * 0.02)


class VisionModel(nnx.Module):
  def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs):
    self.patch_embedding = PatchEmbedding(cfg, rngs=rngs)
    self.position_embedding = PositionEmbedding(cfg.num_patches, cfg.hidden_size, rngs=rngs)
    self.layers = stack_layers(lambda r: Block(cfg, rngs=r), cfg.num_hidden_layers, rngs)
    self.post_layernorm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)

  def __call__(self, pixels, *, remat: bool = False):
    """pixels: (B, height, width, 3) in [-1, 1] -> patch features (B, N, W)."""
    x = self.patch_embedding(pixels)
    x = x + self.position_embedding.embedding[...].astype(x.dtype)
    x, _ = scan_layers(self.layers, lambda block, x, _: (block(x), None), x, remat=remat)
    return self.post_layernorm(x)
