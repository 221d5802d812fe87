"""CLIP: a text tower and a vision tower that map a matching text and image to similar vectors.
Matches transformers' CLIPModel exactly.

Source: transformers models/clip/modeling_clip.py. Everything is float32. Axes: B pairs, G images
per text, T tokens, N patches and the class token, D width, H W pixels.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from dsr_jax.models.common.layers import (
  Embedding,
  LayerNorm,
  Linear,
  gelu,
  scan_layers,
  stack_layers,
)

# configs published before transformers 4.31 have this id; with it, the text ends at its largest id
LEGACY_EOS = 2


@dataclasses.dataclass(frozen=True)
class TowerConfig:
  """Sizes of one tower; act: 'quick_gelu' or 'gelu'."""

  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  act: str = 'quick_gelu'
  layer_norm_eps: float = 1e-5


@dataclasses.dataclass(frozen=True)
class ClipConfig:
  """A whole CLIP. mean, std: of the three channels, to normalize pixels in [0, 1]."""

  text: TowerConfig
  vision: TowerConfig
  projection_dim: int
  vocab_size: int
  max_positions: int
  eos_id: int
  image_size: int
  patch_size: int
  mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
  std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)


class Attention(nnx.Module):
  def __init__(self, cfg: TowerConfig, *, rngs: nnx.Rngs):
    self.heads = cfg.num_attention_heads
    self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
      Linear(cfg.hidden_size, cfg.hidden_size, rngs=rngs) for _ in range(4)
    )

  def __call__(self, x, mask):
    b, n, d = x.shape
    q, k, v = (
      jnp.swapaxes(f(x).reshape(b, n, self.heads, -1), 1, 2)
      for f in (self.q_proj, self.k_proj, self.v_proj)
    )
    scores = jnp.einsum('bhqd,bhkd->bhqk', q, k) * q.shape[-1] ** -0.5
    probs = jax.nn.softmax(scores if mask is None else jnp.where(mask, scores, -1e30), axis=-1)
    return self.out_proj(
      jnp.swapaxes(jnp.einsum('bhqk,bhkd->bhqd', probs, v), 1, 2).reshape(b, n, d)
    )


class MLP(nnx.Module):
  def __init__(self, cfg: TowerConfig, *, rngs: nnx.Rngs):
    self.act = gelu if cfg.act == 'gelu' else quick_gelu
    self.fc1 = Linear(cfg.hidden_size, cfg.intermediate_size, rngs=rngs)
    self.fc2 = Linear(cfg.intermediate_size, cfg.hidden_size, rngs=rngs)

  def __call__(self, x):
    return self.fc2(self.act(self.fc1(x)))


class Block(nnx.Module):
  def __init__(self, cfg: TowerConfig, *, rngs: nnx.Rngs):
    self.layer_norm1 = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
    self.self_attn = Attention(cfg, rngs=rngs)
    self.layer_norm2 = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
    self.mlp = MLP(cfg, rngs=rngs)

  def __call__(self, x, mask):
    x = x + self.self_attn(self.layer_norm1(x), mask)
    return x + self.mlp(self.layer_norm2(x))


class TextModel(nnx.Module):
  def __init__(self, cfg: ClipConfig, *, rngs: nnx.Rngs):
    self.cfg = cfg
    self.token_embedding = Embedding(cfg.vocab_size, cfg.text.hidden_size, rngs=rngs)
    self.position_embedding = Embedding(
      cfg.max_positions, cfg.text.hidden_size, rngs=rngs, scale=0.01
    )
    self.layers = stack_layers(lambda r: Block(cfg.text, rngs=r), cfg.text.num_hidden_layers, rngs)
    self.final_layer_norm = LayerNorm(cfg.text.hidden_size, cfg.text.layer_norm_eps)

  def __call__(self, ids):
    """ids: (B, T), each row with an end of text -> the vectors (B, D) at the end. What follows the
    end is not seen.
    """
    t = ids.shape[1]
    x = self.token_embedding(ids) + self.position_embedding(jnp.arange(t))
    causal = jnp.tril(jnp.ones((t, t), bool))
    x, _ = scan_layers(self.layers, lambda block, x, _: (block(x, causal), None), x)
    end = jnp.argmax(ids if self.cfg.eos_id == LEGACY_EOS else ids == self.cfg.eos_id, axis=-1)
    return self.final_layer_norm(x)[jnp.arange(ids.shape[0]), end]


class VisionModel(nnx.Module):
  def __init__(self, cfg: ClipConfig, *, rngs: nnx.Rngs):
    width, p = cfg.vision.hidden_size, cfg.patch_size
    self.class_embedding = nnx.Param(jax.random.normal(rngs.params(), (width,)) * width**-0.5)
    self.patch_embedding = Patches(p, width, rngs=rngs)
    self.position_embedding = Embedding((cfg.image_size // p) ** 2 + 1, width, rngs=rngs)
    self.pre_layrnorm = LayerNorm(width, cfg.vision.layer_norm_eps)
    self.layers = stack_layers(
      lambda r: Block(cfg.vision, rngs=r), cfg.vision.num_hidden_layers, rngs
    )
    self.post_layernorm = LayerNorm(width, cfg.vision.layer_norm_eps)

  def __call__(self, pixels):
    """pixels: (B, H, W, 3), normalized -> (B, D)."""
    x = self.patch_embedding(pixels)
    first = jnp.broadcast_to(self.class_embedding[...], (x.shape[0], 1, x.shape[-1]))
    x = self.pre_layrnorm(
      jnp.concatenate([first, x], axis=1) + self.position_embedding.embedding[...]
    )
    x, _ = scan_layers(self.layers, lambda block, x, _: (block(x, None), None), x)
    return self.post_layernorm(x[:, 0])


class Patches(nnx.Module):
  """Non-overlapping patches to vectors, without a bias; kernel (p, p, 3, D)."""

  def __init__(self, patch: int, width: int, *, rngs: nnx.Rngs):
    self.kernel = nnx.Param(
      jax.random.normal(rngs.params(), (patch, patch, 3, width)) * (patch * patch * 3) ** -0.5
    )

  def __call__(self, pixels):
    b, height, width, c = pixels.shape
    p = self.kernel.shape[0]
    x = pixels.reshape(b, height // p, p, width // p, p, c).swapaxes(2, 3).reshape(b, -1, p * p * c)
    return x @ self.kernel[...].reshape(p * p * c, -1)


class Clip(nnx.Module):
  def __init__(self, cfg: ClipConfig, *, rngs: nnx.Rngs):
    self.cfg = cfg
    self.text_model = TextModel(cfg, rngs=rngs)
    self.vision_model = VisionModel(cfg, rngs=rngs)
    self.text_projection = Linear(cfg.text.hidden_size, cfg.projection_dim, rngs=rngs, bias=False)
    self.visual_projection = Linear(
      cfg.vision.hidden_size, cfg.projection_dim, rngs=rngs, bias=False
    )
    self.logit_scale = nnx.Param(jnp.float32(2.6592))

  def texts(self, ids):
    """ids: (B, T) -> unit vectors (B, D)."""
    return _unit(self.text_projection(self.text_model(ids)))

  def pictures(self, pixels):
    """pixels: (B, H, W, 3) in [-1, 1], square, of any size -> unit vectors (B, D)."""
    return _unit(self.visual_projection(self.vision_model(self.normalised(pixels))))

  def normalised(self, pixels):
    """Pixels in [-1, 1] as the vision tower expects them: resized to its size (bicubic), and
    normalized with its mean and std.
    """
    size = self.cfg.image_size
    if pixels.shape[1] != size:
      pixels = jnp.clip(
        jax.image.resize(pixels, (pixels.shape[0], size, size, 3), 'cubic'), -1.0, 1.0
      )
    return (pixels * 0.5 + 0.5 - jnp.array(self.cfg.mean)) / jnp.array(self.cfg.std)


def graphdef_of(config: ClipConfig):
  """The model's structure; `nnx.merge(graphdef, params)` gives the module."""
  return nnx.graphdef(nnx.eval_shape(lambda: Clip(config, rngs=nnx.Rngs(0))))


def create(config: ClipConfig, seed: int = 0):
  """Random parameters: a nested dict of float32 arrays."""
  return nnx.to_pure_dict(nnx.state(Clip(config, rngs=nnx.Rngs(seed)), nnx.Param))


def similarity(config: ClipConfig, params, pixels, ids):
  """Cosine similarity of each text (B, T) and its images (B, G, H, W, 3) in [-1, 1] -> (B, G)."""
  model = nnx.merge(graphdef_of(config), params)
  seen = model.pictures(pixels.reshape(-1, *pixels.shape[2:]).astype(jnp.float32)).reshape(
    *pixels.shape[:2], -1
  )
  return jnp.einsum('bgd,bd->bg', seen, model.texts(ids))


def quick_gelu(x):
  """OpenAI's approximation of GELU."""
  return x * jax.nn.sigmoid(1.702 * x)


def _unit(x):
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
