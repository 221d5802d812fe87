"""Runs an image tokenizer, or another image model, with the images split over all devices.

Axes: R rows, H W pixels, N codes of an image.
"""

from flax import nnx
import jax.numpy as jnp

from dsr_jax import sharding


def over_pictures(fn, modules, x, side: int):
  """fn(modules, x), split over all devices; x: (R, ...). side: of an image in pixels."""
  graphdef, params = nnx.split(modules)
  return sharding.over_pictures(
    lambda params, x: fn(nnx.merge(graphdef, params), x), params, x, side**2
  )


def encode(tokenizer, pixels, side: int):
  """pixels (..., H, W, 3) in [-1, 1] -> codes (..., N)."""
  flat = pixels.reshape(-1, *pixels.shape[-3:])
  codes = over_pictures(lambda tokenizer, x: tokenizer.encode(x), tokenizer, flat, side)
  return codes.reshape(*pixels.shape[:-3], -1)


def decode(tokenizer, codes, side: int):
  """codes (..., N) -> pixels (..., H, W, 3), clamped to [-1, 1]."""
  flat = codes.reshape(-1, codes.shape[-1])
  pixels = over_pictures(lambda tokenizer, x: tokenizer.decode(x), tokenizer, flat, side)
  pixels = jnp.clip(pixels.astype(jnp.float32), -1.0, 1.0)
  return pixels.reshape(*codes.shape[:-1], *pixels.shape[1:])
