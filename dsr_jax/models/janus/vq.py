"""VQ tokenizer of Janus (LlamaGen VQ-16): pictures to codes and back.

Source: deepseek-ai/Janus janus/models/vq_model.py; parameter names as in the Hugging Face layout.
Axes: B batch, H height, W width, C channels, N codes of a picture (row-major), K codebook size, E
code width.
"""

from flax import nnx
import jax
import jax.numpy as jnp

from dsr_jax.models.janus.config import VQConfig

GROUPS = 32


class GroupNorm(nnx.Module):
  """Group normalisation over (H, W, C / 32) in float32. x: (B, H, W, C)."""

  def __init__(self, channels: int):
    self.scale = nnx.Param(jnp.ones(channels))
    self.bias = nnx.Param(jnp.zeros(channels))

  def __call__(self, x):
    c = x.shape[-1]
    y = x.astype(jnp.float32)  # float32 island
    y = y - self._over_groups(y, c)
    y = y * jax.lax.rsqrt(self._over_groups(jnp.square(y), c) + 1e-6)
    return (y * self.scale[...] + self.bias[...]).astype(x.dtype)

  @staticmethod
  def _over_groups(y, c):
    """Means over (H, W) and each group, (B, 1, 1, C). Two plain reductions: one over a split axis
    is slow to differentiate.
    """
    mean = jnp.mean(y, axis=(1, 2)).reshape(-1, GROUPS, c // GROUPS).mean(axis=-1)
    return jnp.repeat(mean, c // GROUPS, axis=-1)[:, None, None, :]


class Conv(nnx.Module):
  """2-D convolution. x: (B, H, W, C_in); kernel (kh, kw, C_in, C_out); 3x3 keeps the size at stride
  1.
  """

  def __init__(
    self,
    channels_in: int,
    channels_out: int,
    size: int,
    *,
    rngs: nnx.Rngs,
    downsample: bool = False,
  ):
    init = jax.nn.initializers.variance_scaling(1.0, 'fan_in', 'uniform')
    self.kernel = nnx.Param(init(rngs.params(), (size, size, channels_in, channels_out)))
    self.bias = nnx.Param(jnp.zeros(channels_out))
    self.downsample = downsample

  def __call__(self, x):
    kernel, bias = self.kernel[...].astype(x.dtype), self.bias[...].astype(x.dtype)
    if kernel.shape[0] == 1:
      return x @ kernel[0, 0] + bias
    # Downsampling pads right and bottom only, as the original does.
    padding = ((0, 1), (0, 1)) if self.downsample else ((1, 1), (1, 1))
    stride = (2, 2) if self.downsample else (1, 1)
    return (
      jax.lax.conv_general_dilated(
        x, kernel, stride, padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
      )
      + bias
    )


class ResBlock(nnx.Module):
  def __init__(self, channels_in: int, channels_out: int, *, rngs: nnx.Rngs):
    self.norm1 = GroupNorm(channels_in)
    self.conv1 = Conv(channels_in, channels_out, 3, rngs=rngs)
    self.norm2 = GroupNorm(channels_out)
    self.conv2 = Conv(channels_out, channels_out, 3, rngs=rngs)
    if channels_in != channels_out:
      self.nin_shortcut = Conv(channels_in, channels_out, 1, rngs=rngs)

  def __call__(self, x):
    y = self.conv1(jax.nn.silu(self.norm1(x)))
    y = self.conv2(jax.nn.silu(self.norm2(y)))
    return y + (self.nin_shortcut(x) if hasattr(self, 'nin_shortcut') else x)


class AttnBlock(nnx.Module):
  """Single-head attention over all positions of the map."""

  def __init__(self, channels: int, *, rngs: nnx.Rngs):
    self.norm = GroupNorm(channels)
    self.q = Conv(channels, channels, 1, rngs=rngs)
    self.k = Conv(channels, channels, 1, rngs=rngs)
    self.v = Conv(channels, channels, 1, rngs=rngs)
    self.proj_out = Conv(channels, channels, 1, rngs=rngs)

  def __call__(self, x):
    b, h, w, c = x.shape
    y = self.norm(x)
    q, k, v = (f(y).reshape(b, h * w, c) for f in (self.q, self.k, self.v))
    scores = jnp.einsum('bqc,bkc->bqk', q, k, preferred_element_type=jnp.float32) * c**-0.5
    probs = jax.nn.softmax(scores, axis=-1).astype(x.dtype)  # softmax in float32
    return x + self.proj_out(jnp.einsum('bqk,bkc->bqc', probs, v).reshape(b, h, w, c))


class Mid(nnx.Module):
  def __init__(self, channels: int, *, rngs: nnx.Rngs):
    self.block_1 = ResBlock(channels, channels, rngs=rngs)
    self.attn_1 = AttnBlock(channels, rngs=rngs)
    self.block_2 = ResBlock(channels, channels, rngs=rngs)

  def __call__(self, x):
    return self.block_2(self.attn_1(self.block_1(x)))


class Resample(nnx.Module):
  def __init__(self, channels: int, *, rngs: nnx.Rngs, downsample: bool):
    self.conv = Conv(channels, channels, 3, rngs=rngs, downsample=downsample)

  def __call__(self, x):
    if not self.conv.downsample:
      b, h, w, c = x.shape  # nearest-neighbour doubling
      x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
    return self.conv(x)


class Level(nnx.Module):
  """Residual blocks of one resolution, with attention at the lowest, then an optional change of
  resolution.
  """

  def __init__(
    self,
    channels_in: int,
    channels_out: int,
    blocks: int,
    *,
    attention: bool,
    rngs: nnx.Rngs,
    resample: str | None,
  ):
    widths = [channels_in] + [channels_out] * blocks
    self.block = nnx.List([ResBlock(i, o, rngs=rngs) for i, o in zip(widths[:-1], widths[1:])])
    self.attn = nnx.List(
      [AttnBlock(channels_out, rngs=rngs) for _ in range(blocks)] if attention else []
    )
    if resample:
      setattr(
        self, resample, Resample(channels_out, rngs=rngs, downsample=resample == 'downsample')
      )

  def __call__(self, x):
    for i, block in enumerate(self.block):
      x = block(x)
      if len(self.attn):
        x = self.attn[i](x)
    for name in ('downsample', 'upsample'):
      if hasattr(self, name):
        x = getattr(self, name)(x)
    return x


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
  """(B, h, w, latent_channels) to (B, H, W, 3), nominally in [-1, 1], not clamped. Level 0 is the
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
  """Encoder, quantiser and decoder. Codes are int32 in [0, K)."""

  def __init__(self, cfg: VQConfig, *, rngs: nnx.Rngs):
    self.encoder = Encoder(cfg, rngs=rngs)
    self.decoder = Decoder(cfg, rngs=rngs)
    self.quantize = Codebook(cfg, rngs=rngs)
    self.quant_conv = Conv(cfg.latent_channels, cfg.embed_dim, 1, rngs=rngs)
    self.post_quant_conv = Conv(cfg.embed_dim, cfg.latent_channels, 1, rngs=rngs)

  def latents(self, pixels):
    """pixels: (B, H, W, 3) in [-1, 1] -> unit-length latents (B, h, w, E), before quantisation."""
    return unit_norm(self.quant_conv(self.encoder(pixels)))

  def encode(self, pixels):
    """pixels: (B, H, W, 3) in [-1, 1] -> codes (B, N). A float32 island: codes flip at margins of
    1e-4.
    """
    with jax.default_matmul_precision('highest'):
      z = self.latents(pixels.astype(jnp.float32))
      codebook = unit_norm(self.quantize.embedding[...].astype(jnp.float32))

      # Of unit vectors the nearest has the largest product; argmax, like torch's argmin, takes the
      # lowest index of a tie.
      # Picture by picture: products of all with the whole codebook are never held.
      def nearest(z):
        return jnp.argmax(jnp.einsum('ne,ke->nk', z, codebook), axis=-1)

      return jax.lax.map(nearest, z.reshape(z.shape[0], -1, z.shape[-1])).astype(jnp.int32)

  def decode_latents(self, z):
    """z: (B, h, w, E) unit-length code vectors -> pixels (B, H, W, 3), not clamped."""
    return self.decoder(self.post_quant_conv(z))

  def decode(self, codes):
    """codes: (B, N) of a square picture -> pixels (B, H, W, 3), not clamped."""
    side = int(codes.shape[-1] ** 0.5)
    assert side * side == codes.shape[-1], codes.shape
    codebook = unit_norm(self.quantize.embedding[...].astype(jnp.float32))
    z = codebook[codes].reshape(-1, side, side, codebook.shape[-1])
    return self.decode_latents(z.astype(self.post_quant_conv.kernel[...].dtype))
