"""How an image's reward is divided among its codes.

All codes of an image get the advantage of the whole image (`method.credit=equal`, as in the paper).
The other values weight the codes in the loss, with mean 1 in each image: the codes that probably
earned the reward learn more, the rest less. Texts are never weighted.

  guidance     how much the prompt changes a code's likelihood: |log p(code | prompt) - log p(code)|
  rarity       the share of the other samples in the group that have another code at this position
  early        decreases linearly, from the first code to the last
  attribution  how much R_G depends on a code's pixels: gradient times difference from the image's
               mean color, summed over the patch (first order)

Axes: B inputs, G samples, N image codes, H W pixels.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsr_jax.models.unified import Scoring, Text, UnifiedModel

LEAST = 1e-6  # an image whose mean weight is less gets equal ones


class Drawn(NamedTuple):
  """Samples whose reward is to be divided.

  Attributes:
    policy: the model that drew them.
    prompt: (B, Tp).
    codes: (B, G, N).
    pixels: (B, G, H, W, 3) in [-1, 1].
    reward: pixels -> R_G (B, G), differentiable.
    how: `Scoring` of plain likelihoods.
    keys: (B,) for likelihoods, or None.
  """

  policy: UnifiedModel
  prompt: Text
  codes: jax.Array
  pixels: jax.Array | None
  reward: Callable[[Any], Any]
  how: Scoring
  keys: jax.Array | None


def guidance(drawn: Drawn):
  """|log p(code | prompt) - log p(code)|, (B, G, N), in nats."""
  prompt = Text(drawn.prompt.ids[:, None], drawn.prompt.mask[:, None])

  def logps(weight):
    how = dataclasses.replace(drawn.how, guidance=weight)
    return drawn.policy.picture_logps(prompt, drawn.codes, drawn.keys, how).logp

  return jnp.abs(logps(1.0) - logps(0.0))


def rarity(drawn: Drawn):
  """The share of samples in the group with another code at the position, (B, G, N)."""
  codes = drawn.codes
  same = jnp.mean(codes[:, :, None] == codes[:, None], axis=2, dtype=jnp.float32)
  return 1.0 - same  # its own share, 1 / G, is the same for all


def early(drawn: Drawn):
  """N for the first code, 1 for the last, (B, G, N)."""
  places = drawn.codes.shape[-1]
  return jnp.broadcast_to(jnp.arange(places, 0, -1, dtype=jnp.float32), drawn.codes.shape)


def attribution(drawn: Drawn):
  """|first-order share of R_G| of each code's patch, (B, G, N), in nats per token."""
  pixels = drawn.pixels
  assert pixels is not None  # `Picture` may lack them; a decoded one does not
  slope = jax.grad(lambda x: jnp.sum(drawn.reward(x)))(pixels)
  mean = jnp.mean(pixels, axis=(-3, -2), keepdims=True)
  part = jnp.sum(slope * (pixels - mean), axis=-1)  # (B, G, H, W)
  *lead, height, width = part.shape
  side = round(drawn.codes.shape[-1] ** 0.5)
  patches = part.reshape(*lead, side, height // side, side, width // side)
  return jnp.abs(jnp.sum(patches, axis=(-3, -1))).reshape(*lead, side * side)


WAYS = {
  'guidance': guidance,
  'rarity': rarity,
  'early': early,
  'attribution': attribution,
}


def divided(way: str, drawn: Drawn):
  """Weights of codes, (B, G, N) float32, with mean 1 in each image.

  way: a key of `WAYS`.
  """
  raw = WAYS[way](drawn).astype(jnp.float32)
  mean = jnp.mean(raw, axis=-1, keepdims=True)
  return jax.lax.stop_gradient(jnp.where(mean > LEAST, raw / jnp.maximum(mean, LEAST), 1.0))


def share(weights):
  """The share of an image's codes that carry its credit, (B, G): 1 if all weigh the same, 1 / N if
  one carries everything.
  """
  return 1.0 / jnp.mean(jnp.square(weights), axis=-1)
