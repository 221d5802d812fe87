"""Convolutional parts that image tokenizers share: group norm, convolutions, residual and attention
blocks, and the resolution levels made of them.

Sources: the VQGAN blocks of CompVis/taming-transformers, as in deepseek-ai/Janus and
showlab/Show-o.
Axes: B batch, H height, W width, C channels.
"""

from flax import nnx
import jax
import jax.numpy as jnp

GROUPS = 32


class GroupNorm(nnx.Module):
  """Group normalization over (H, W, C / 32) in float32. x: (B, H, W, C)."""

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
    """Means over (H, W) and each group, (B, 1, 1, C). Uses two plain reductions, because one over a
    split axis is slow to differentiate.
    """
    mean = jnp.mean(y, axis=(1, 2)).reshape(-1, GROUPS, c // GROUPS).mean(axis=-1)
    return jnp.repeat(mean, c // GROUPS, axis=-1)[:, None, None, :]


class Conv(nnx.Module):
  """2-D convolution. x: (B, H, W, C_in); kernel (kh, kw, C_in, C_out); 3x3 with stride 1 keeps the
  size.
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
    # Downsampling pads only right and bottom, as in the original.
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
      b, h, w, c = x.shape  # nearest-neighbor upsampling
      x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
    return self.conv(x)


class Level(nnx.Module):
  """Residual blocks of one resolution, with attention after each or without, then an optional
  change of resolution.
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
