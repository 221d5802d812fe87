"""MAGVIT-v2 with lookup-free quantization: images to codes and back.

Source: showlab/Show-o models/modeling_magvitv2.py; parameter names are those of its files, where
encoder and decoder include the 1x1 convolutions around the quantizer. The quantizer has no
parameters: the sign of a channel is a bit, and the first channel is the most significant.
Axes: B batch, H height, W width, N codes of an image (row-major), E bits.
"""

from flax import nnx
import jax
import jax.numpy as jnp

from dsr_jax.models.common.convolutions import Conv, GroupNorm, Level, Mid
from dsr_jax.models.showo.config import MagvitConfig


class Encoder(nnx.Module):
  """(B, H, W, 3) in [-1, 1] to (B, h, w, E), before the signs are taken."""

  def __init__(self, cfg: MagvitConfig, *, rngs: nnx.Rngs):
    widths = [cfg.base_channels * m for m in cfg.encoder_widths]
    last = len(widths) - 1
    self.conv_in = Conv(3, cfg.base_channels, 3, rngs=rngs)
    levels = []
    for n, (i, o) in enumerate(zip([cfg.base_channels] + widths[:-1], widths)):
      resample = None if n == last else 'downsample'
      blocks = cfg.encoder_blocks[n]
      levels.append(Level(i, o, blocks, attention=False, rngs=rngs, resample=resample))
    self.down = nnx.List(levels)
    self.mid = Mid(widths[-1], rngs=rngs)
    self.norm_out = GroupNorm(widths[-1])
    self.conv_out = Conv(widths[-1], cfg.bits, 3, rngs=rngs)
    self.quant_conv = Conv(cfg.bits, cfg.bits, 1, rngs=rngs)

  def __call__(self, x):
    x = self.conv_in(x)
    for level in self.down:
      x = level(x)
    return self.quant_conv(self.conv_out(jax.nn.silu(self.norm_out(self.mid(x)))))


class Decoder(nnx.Module):
  """(B, h, w, E) of signs to (B, H, W, 3), nominally in [-1, 1], not clamped. Level 0 has the
  highest resolution and runs last.
  """

  def __init__(self, cfg: MagvitConfig, *, rngs: nnx.Rngs):
    widths = [cfg.base_channels * m for m in cfg.decoder_widths]
    self.post_quant_conv = Conv(cfg.bits, cfg.bits, 1, rngs=rngs)
    self.conv_in = Conv(cfg.bits, widths[-1], 3, rngs=rngs)
    self.mid = Mid(widths[-1], rngs=rngs)
    levels = []
    for n, (i, o) in enumerate(zip(widths[1:] + [widths[-1]], widths)):
      resample = None if n == 0 else 'upsample'
      blocks = cfg.decoder_blocks[n]
      levels.append(Level(i, o, blocks, attention=False, rngs=rngs, resample=resample))
    self.up = nnx.List(levels)
    self.norm_out = GroupNorm(widths[0])
    self.conv_out = Conv(widths[0], 3, 3, rngs=rngs)

  def __call__(self, z):
    x = self.mid(self.conv_in(self.post_quant_conv(z)))
    for level in reversed(list(self.up)):
      x = level(x)
    return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Magvit(nnx.Module):
  """Encoder, quantizer and decoder. Codes are int32 in [0, 2**E)."""

  def __init__(self, cfg: MagvitConfig, *, rngs: nnx.Rngs):
    self.cfg = cfg
    self.encoder = Encoder(cfg, rngs=rngs)
    self.decoder = Decoder(cfg, rngs=rngs)

  def latents(self, pixels):
    """pixels: (B, H, W, 3) in [-1, 1] -> (B, h, w, E), before quantization."""
    return self.encoder(pixels)

  def encode(self, pixels):
    """pixels: (B, H, W, 3) in [-1, 1] -> codes (B, N). Always float32, because a bit flips if its
    channel is near 0.
    """
    with jax.default_matmul_precision('highest'):
      z = self.latents(pixels.astype(jnp.float32))
      return codes_of(z).reshape(z.shape[0], -1)

  def decode(self, codes):
    """codes: (B, N) of a square image -> pixels (B, H, W, 3), not clamped."""
    side = round(codes.shape[-1] ** 0.5)
    assert side * side == codes.shape[-1], codes.shape
    z = signs_of(codes, self.cfg.bits).reshape(-1, side, side, self.cfg.bits)
    return self.decoder(z.astype(self.decoder.conv_in.kernel[...].dtype))


def codes_of(z):
  """Latents (..., E) -> codes (...) int32; 0 counts as negative."""
  bits = z.shape[-1]
  weights = 2 ** jnp.arange(bits - 1, -1, -1, dtype=jnp.int32)
  return jnp.sum(jnp.where(z > 0, weights, 0), axis=-1, dtype=jnp.int32)


def signs_of(codes, bits: int):
  """codes (...) -> (..., E) float32 of -1 and 1."""
  places = jnp.arange(bits - 1, -1, -1, dtype=jnp.int32)
  return (2 * ((codes[..., None] >> places) & 1) - 1).astype(jnp.float32)
