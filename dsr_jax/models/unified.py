"""The protocol between the training step and a model: texts, pictures, and six methods.

Any backbone that implements it can be reinforced: `step`, `tasks`, `rewards` and `losses` call
nothing else. docs/extending.md shows how to add one.

Axes: B inputs, G samples of an input, T text tokens, N image codes, H W pixels. Of the two leading
axes written g and h each is 1 or G, and they broadcast.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from dsr_jax.models.common.logprobs import TokenScores

__all__ = [
  'Family',
  'Picture',
  'Sampling',
  'Scoring',
  'Spec',
  'Text',
  'TokenScores',
  'UnifiedModel',
  'guided_codes',
  'picture_to_read',
  'row_keys',
  'score_keys',
  'without_eos',
]

# A sampler folds token indices into its keys, so this index is free for the likelihoods' keys.
SCORING = 2**31 - 2


class Text(NamedTuple):
  """Content without a template.

  ids (..., T) int32, left-justified; mask (..., T) bool: the content, and a final EOS if any.
  """

  ids: jax.Array
  mask: jax.Array


class Picture(NamedTuple):
  """codes (..., N) int32 in [0, K), without vocabulary offset; pixels (..., H, W, 3) in [-1, 1].

  A model reads one of the two (`Spec.reads`); the other may be None where a picture is only read.
  """

  codes: jax.Array | None
  pixels: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Spec:
  """Static facts about a model, for code that knows it through the protocol alone.

  Attributes:
    eos_id: ends a sampled text.
    num_codes: N, codes of a picture.
    codebook_size: K.
    image_size: side of a square picture in pixels.
    reads: 'pixels' or 'codes', what its likelihood of a text is conditioned on.
    likelihood_is_random: whether its likelihoods need keys (masked diffusion); else they get None.
    sampler_is_exact: whether the sampler's log-probabilities are the likelihoods of what it
      sampled. Where they are not, nobody compares the two.
  """

  eos_id: int
  num_codes: int
  codebook_size: int
  image_size: int
  reads: str = 'pixels'
  likelihood_is_random: bool = False
  sampler_is_exact: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
  """What a backbone brings besides its module. One folder in models/, one line in `families`.

  Attributes:
    name: in messages.
    config_type: the dataclass of its sizes.
    graphdef: config -> the module's structure; `nnx.merge(graphdef, params)` is a `UnifiedModel`.
    shapes: config -> shapes of its parameters, a nested dict by part.
    spec: config -> `Spec`.
    num_heads: config -> attention heads, which tensor parallelism splits.
    sharding_rules: (pattern of a parameter's path, layout of `sharding`), first match wins.
    trainable_parts: value of `method.trainable` -> the top-level parts that are trained.
    image_tokenizer: the part between pixels and codes: never trained, always float32.
    lora_targets: name of an adapter -> path of the stacked linear layer that it adapts.
    room: config -> content tokens that fit beside a template and a picture in one sequence.
    templates: values of `method.template`, the default first: each frames prompts and questions in
      its own words. The processor has `template`, the one it uses, and `with_template(name)`. None
      for a backbone without a choice.
  """

  name: str
  config_type: type
  graphdef: Callable[[Any], Any]
  shapes: Callable[[Any], Any]
  spec: Callable[[Any], Spec]
  num_heads: Callable[[Any], int]
  sharding_rules: tuple[tuple[str, Any], ...]
  trainable_parts: Mapping[str, tuple[str, ...]]
  image_tokenizer: str
  lora_targets: Mapping[str, tuple[str, ...]]
  room: Callable[[Any], int] | None = None
  templates: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How to sample.

  Attributes:
    temperature: 0 is greedy.
    guidance: weight of classifier-free guidance; 1 is off.
    max_tokens: of a text, its EOS included.
    segment: tokens decoded between two growths of the cache (and two checks whether all texts have
      ended).
    scan: whether a token is scanned through the stacked layers; else their loop is unrolled.
    cfg_interval: codes of a picture, from its first, that are guided; 0: all.
    cache_dtype: of keys and values: '' the model's own, or 'int8'.
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
  """How to compute log-probabilities.

  Attributes:
    temperature: the one that sampled.
    guidance: 1 is the plain conditional, 0 the unconditional branch alone.
    chunk: tokens whose logits are held at a time; 0: all.
    remat: recompute each layer in the backward pass.
    cfg_interval: as sampled.
  """

  temperature: float = 1.0
  guidance: float = 1.0
  chunk: int = 0
  remat: bool = False
  cfg_interval: int = 0


class UnifiedModel(Protocol):
  """A model that reads and draws pictures. All methods are pure.

  Samplers take a key a sample, (B, G). Likelihoods take a key an input, (B,), the same for all
  samples of a group and for policy, old policy and reference, so that what chance adds cancels
  within a group; None where `spec.likelihood_is_random` is False.
  """

  spec: Spec

  def picture_from_pixels(self, pixels) -> Picture:
    """(..., H, W, 3) in [-1, 1] -> the same pixels and their codes."""

  def picture_from_codes(self, codes) -> Picture:
    """(..., N) -> the codes and their pixels, clamped to [-1, 1]."""

  def sample_pictures(self, prompt: Text, keys, how: Sampling):
    """prompt (B, Tp), keys (B, G) -> codes (B, G, N), and log-probabilities (B, G, N) float32: each
    code's under the distribution that fixed it.
    """

  def sample_texts(self, picture: Picture, question: Text, keys, how: Sampling):
    """picture (B, ...), question (B, Tq), keys (B, G) -> Text (B, G, T), logps (B, G, T)."""

  def picture_logps(self, prompt: Text, codes, keys, how: Scoring) -> TokenScores:
    """prompt (B, g, Tp), codes (B, h, N), keys (B,) or None -> TokenScores (B, G, N)."""

  def text_logps(
    self, picture: Picture, question: Text, text: Text, keys, how: Scoring
  ) -> TokenScores:
    """picture (B, g, ...), question (B, Tq), text (B, h, T), keys (B,) or None -> TokenScores
    (B, G, T).
    """


def guided_codes(how, codes: int) -> int:
  """How many of a picture's `codes`, from its first, are guided.

  how: `Sampling`, `Scoring`, or whatever has guidance and cfg_interval.
  """
  return 0 if how.guidance == 1.0 else min(how.cfg_interval or codes, codes)


def picture_to_read(model: UnifiedModel, pixels) -> Picture:
  """Pixels (..., H, W, 3) in [-1, 1] -> a picture that the model can read, codes only if needed."""
  if model.spec.reads == 'codes':
    return model.picture_from_pixels(pixels)
  return Picture(None, pixels)


def row_keys(key, first_candidate, inputs: int, group: int):
  """One key a sample, (B, G): fold_in(key, global sample index).

  So a sample's randomness depends on neither mesh, chunks, accumulation nor processes.
  """
  index = first_candidate + jnp.arange(inputs * group).reshape(inputs, group)
  return jax.vmap(jax.vmap(lambda i: jax.random.fold_in(key, i)))(index)


def score_keys(model_or_spec, keys):
  """Keys of samplers (B, G) -> keys of likelihoods (B,), or None for a model that needs none."""
  spec = getattr(model_or_spec, 'spec', model_or_spec)
  if not spec.likelihood_is_random:
    return None
  return jax.vmap(lambda key: jax.random.fold_in(key, SCORING))(keys[:, 0])


def without_eos(text: Text, eos_id: int) -> Text:
  """The content alone: what a sampled text is as a prompt."""
  return Text(text.ids, text.mask & (text.ids != eos_id))
