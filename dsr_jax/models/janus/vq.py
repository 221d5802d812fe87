"""VQ tokenizer of Janus (LlamaGen VQ-16): images to codes and back.

Source: deepseek-ai/Janus janus/models/vq_model.py; parameter names as in the Hugging Face layout.
Axes: B batch, H height, W width, N codes of an image (row-major), K codebook size, E
code width.
"""

from flax import nnx
import jax
import jax.numpy as jnp

from dsr_jax.models.common.convolutions import Conv, GroupNorm, Level, Mid
from dsr_jax.models.janus.config import VQConfig


class Encoder(nnx.Module):
  """(B, H, W, 3) in [-1, 1] to (B, h, w, latent_channels)."""

  def __init__(self, cfg: VQConfig, *, rngs: nnx.Rngs):
    widths = [cfg.base_channels * m for m in cfg.channel_multiplier]
    last = len(widths) - 1
    self.conv_in = Conv(3, cfg.base_channels, 3, rngs=rngs)
    self.down = nnx.List(
      [
        Level(
          i,
          o,
          cfg.num_res_blocks,
          attention=n == last,
          rngs=rngs,
          resample=None if n == last else 'downsample',
        )
        for n, (i, o) in enumerate(zip([cfg.base_channels] + widths[:-1], widths))
      ]
    )
    self.mid = Mid(widths[-1], rngs=rngs)
    self.norm_out = GroupNorm(widths[-1])
    self.conv_out = Conv(widths[-1], cfg.latent_channels, 3, rngs=rngs)

  def __call__(self, x):
    x = self.conv_in(x)
    for level in self.down:
      x = level(x)
    return self.conv_out(jax.nn.silu(self.norm_out(self.mid(x))))


class Decoder(nnx.Module):
  """(B, h, w, latent_channels) to (B, H, W, 3), nominally in [-1, 1], not clamped. Level 0 has the
  lowest resolution.
  """

  def __init__(self, cfg: VQConfig, *, rngs: nnx.Rngs):
    widths = [cfg.base_channels * m for m in reversed(cfg.channel_multiplier)]
    last = len(widths) - 1
    self.conv_in = Conv(cfg.latent_channels, widths[0], 3, rngs=rngs)
    self.mid = Mid(widths[0], rngs=rngs)
    self.up = nnx.List(
      [
        Level(
          i,
          o,
          cfg.num_res_blocks + 1,
          attention=n == 0,
          rngs=rngs,
          resample=None if n == last else 'upsample',
        )
        for n, (i, o) in enumerate(zip([widths[0]] + widths[:-1], widths))
      ]
    )
    self.norm_out = GroupNorm(widths[-1])
    self.conv_out = Conv(widths[-1], 3, 3, rngs=rngs)

  def __call__(self, x):
    x = self.mid(self.conv_in(x))
    for level in self.up:
      x = level(x)
    return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Codebook(nnx.Module):
  def __init__(self, cfg: VQConfig, *, rngs: nnx.Rngs):
    rows = jax.random.normal(rngs.params(), (cfg.num_embeddings, cfg.embed_dim))
    self.embedding = nnx.Param(unit_norm(rows))


def unit_norm(x):
  """Rows to unit length (torch's F.normalize: the norm is bounded below by 1e-12)."""
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class VQModel(nnx.Module):
  """Encoder, quantizer and decoder. Codes are int32 in [0, K)."""

  def __init__(self, cfg: VQConfig, *, rngs: nnx.Rngs):
    self.encoder = Encoder(cfg, rngs=rngs)
    self.decoder = Decoder(cfg, rngs=rngs)
    self.quantize = Codebook(cfg, rngs=rngs)
    self.quant_conv = Conv(cfg.latent_channels, cfg.embed_dim, 1, rngs=rngs)
    self.post_quant_conv = Conv(cfg.embed_dim, cfg.latent_channels, 1, rngs=rngs)

  def latents(self, pixels):
    """pixels: (B, H, W, 3) in [-1, 1] -> unit-length latents (B, h, w, E), before quantization."""
    return unit_norm(self.quant_conv(self.encoder(pixels)))

  def encode(self, pixels):
    """pixels: (B, H, W, 3) in [-1, 1] -> codes (B, N). Always float32, because margins of 1e-4
    decide between codes.
    """
    with jax.default_matmul_precision('highest'):
      z = self.latents(pixels.astype(jnp.float32))
      codebook = unit_norm(self.quantize.embedding[...].astype(jnp.float32))

      # The nearest unit vector has the largest product; argmax, like torch's argmin, takes the
      # lowest index of a tie. One image at a time, so that the products of all are never held.
      def nearest(z):
        return jnp.argmax(jnp.einsum('ne,ke->nk', z, codebook), axis=-1)

      return jax.lax.map(nearest, z.reshape(z.shape[0], -1, z.shape[-1])).astype(jnp.int32)

  def decode_latents(self, z):
    """z: (B, h, w, E) unit-length code vectors -> pixels (B, H, W, 3), not clamped."""
    return self.decoder(self.post_quant_conv(z))

  def decode(self, codes):
    """codes: (B, N) of a square image -> pixels (B, H, W, 3), not clamped."""
    side = int(codes.shape[-1] ** 0.5)
    assert side * side == codes.shape[-1], codes.shape
    codebook = unit_norm(self.quantize.embedding[...].astype(jnp.float32))
    z = codebook[codes].reshape(-1, side, side, codebook.shape[-1])
    return self.decode_latents(z.astype(self.post_quant_conv.kernel[...].dtype))
