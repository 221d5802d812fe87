"""What the step knows of a model: texts, pictures, and six methods. Any backbone that has them can
be reinforced.

Axes: B inputs, G candidates of an input, T text tokens, N image codes, H W pixels. Of the two
  leading axes written g and
h each is 1 or G; they broadcast.
"""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from dsr_jax.models.common.logprobs import TokenScores

__all__ = [
  'Text',
  'Picture',
  'TokenScores',
  'Sampling',
  'Scoring',
  'UnifiedModel',
  'guided_codes',
  'row_keys',
  'without_eos',
]


class Text(NamedTuple):
  """Bare content, no template. ids (..., T) int32, left-justified; mask (..., T) bool: content, and
  a final EOS if any.
  """

  ids: jax.Array
  mask: jax.Array


class Picture(NamedTuple):
  """codes (..., N) int32 in [0, K), no vocabulary offset; pixels (..., H, W, 3) in [-1, 1]."""

  codes: jax.Array
  pixels: jax.Array


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How to sample. temperature 0 is greedy; guidance 1 is off; max_tokens bounds texts (EOS
  included).

  segment: tokens decoded between two growths of the cache (and two looks whether every text has
    ended). scan: whether a token is
  scanned through the stacked layers, or their loop unrolled. cfg_interval: codes of a picture, from
  its first, that are guided; 0: all.
  cache_dtype: of keys and values, '' the model's own, or 'int8'.
  """

  temperature: float = 1.0
  guidance: float = 1.0
  max_tokens: int = 64
  segment: int = 16
  scan: bool = False
  cfg_interval: int = 0
  cache_dtype: str = ''


@dataclasses.dataclass(frozen=True)
class Scoring:
  """How to score. guidance 1 is the plain conditional; chunk tokens of logits at a time (0 all);
  remat layers; cfg_interval as sampled.
  """

  temperature: float = 1.0
  guidance: float = 1.0
  chunk: int = 0
  remat: bool = False
  cfg_interval: int = 0


class UnifiedModel(Protocol):
  """A model that reads and draws pictures. All methods are pure; `keys` of likelihoods serve models
  that need chance.
  """

  likelihood_is_random: bool

  def picture_from_pixels(self, pixels) -> Picture:
    """(..., H, W, 3) in [-1, 1] -> the same pixels and their codes."""

  def picture_from_codes(self, codes) -> Picture:
    """(..., N) -> the codes and their pixels, clamped to [-1, 1]."""

  def sample_pictures(self, prompt: Text, keys, how: Sampling):
    """prompt (B, Tp), keys (B, G) -> codes (B, G, N) and their log-probability under the sampling
    distribution.
    """

  def sample_texts(self, picture: Picture, question: Text, keys, how: Sampling):
    """picture (B, ...), question (B, Tq), keys (B, G) -> Text (B, G, T) and log-probabilities (B,
    G, T).
    """

  def picture_logps(self, prompt: Text, codes, keys, how: Scoring) -> TokenScores:
    """prompt (B, g, Tp), codes (B, h, N) -> TokenScores (B, G, N)."""

  def text_logps(
    self, picture: Picture, question: Text, text: Text, keys, how: Scoring
  ) -> TokenScores:
    """picture (B, g, ...), question (B, Tq), text (B, h, T) -> TokenScores (B, G, T)."""


def guided_codes(how, codes: int) -> int:
  """How many of a picture's `codes`, from its first, are guided; how: whatever has guidance and
  cfg_interval.
  """
  return 0 if how.guidance == 1.0 else min(how.cfg_interval or codes, codes)


def row_keys(key, first_candidate, inputs: int, group: int):
  """One key a candidate, (B, G): fold_in(key, global candidate index), whatever the mesh, chunking
  or accumulation.
  """
  index = first_candidate + jnp.arange(inputs * group).reshape(inputs, group)
  return jax.vmap(jax.vmap(lambda i: jax.random.fold_in(key, i)))(index)


def without_eos(text: Text, eos_id: int) -> Text:
  """The content alone: what a sampled text is as a prompt."""
  return Text(text.ids, text.mask & (text.ids != eos_id))
