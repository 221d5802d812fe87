"""The protocol between the training step and a model: texts, images, and six methods, plus two for
question-answering benchmarks, `read` and `answer`.

Any backbone that implements the six can be trained: `step`, `tasks`, `rewards` and `losses` call
nothing else. docs/extending.md shows how to add one.

The prefix of a question has two parts, so that questions about the same images share the first:

  reading = model.read(pictures, mask)            # Picture (B, P, ...), mask (B, P)
  text, logps = model.answer(reading, question, keys, how)
                             # Text (B, Q, Tq), keys (B, Q) -> Text (B, Q, T), logps (B, Q, T)

The content of such a question is everything after the images in the user's turn, including a
leading line break: `processor.encode_turn(text)` returns its ids.

Axes: B inputs, G samples per input, P images per input, Q questions about them, T text tokens, N
image codes, H W pixels. The second axes g and h are each 1 or G, and they broadcast.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.models.common.logprobs import TokenScores

__all__ = [
  'Counts',
  'Family',
  'Picture',
  'Sampling',
  'Scoring',
  'Spec',
  'Text',
  'TokenScores',
  'UnifiedModel',
  'as_answer',
  'as_prompt',
  'guided_codes',
  'named',
  'picture_to_read',
  'row_keys',
  'score_keys',
  'without_eos',
]

# Samplers fold token indices into their keys, so this index is free for the likelihoods' keys.
SCORING = 2**31 - 2


class Text(NamedTuple):
  """Content without a template.

  ids (..., T) int32, left-justified; mask (..., T) bool: the content, and the final EOS if any.
  """

  ids: jax.Array
  mask: jax.Array


class Picture(NamedTuple):
  """codes (..., N) int32 in [0, K), without vocabulary offset; pixels (..., H, W, 3) in [-1, 1].

  A model reads one of the two (`Spec.reads`); the other may be None if an image is only read.
  """

  codes: jax.Array | None
  pixels: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Spec:
  """Static facts about a model, for code that knows it only through the protocol.

  Attributes:
    eos_id: token that ends a sampled text.
    num_codes: N, codes per image.
    codebook_size: K.
    image_size: side of a square image in pixels.
    reads: 'pixels' or 'codes'; the likelihood of a text is conditioned on these.
    likelihood_is_random: whether its likelihoods need keys (masked diffusion); otherwise keys are
      None.
    max_pictures: images per question, at most (P of `read`); 0: any number.
    sampler_is_exact: whether the log-probabilities of sampled images are their likelihoods. If
      not, no code compares the two.
    text_sampler_is_exact: the same for texts.
    as_prompt, as_answer: tables of ids (V,), int32 bytes, for a model in which the first word of a
      prompt has other ids than the first word of an answer. Empty if the ids are the same.
    prompt_tokens: maximum number of tokens in a prompt; 0: no limit but the sequence length.
    prompt_drop, sampling_steps, sampling_noise: the model's own values, used if the key of that
      name in `method` is -1.
  """

  eos_id: int
  num_codes: int
  codebook_size: int
  image_size: int
  reads: str = 'pixels'
  likelihood_is_random: bool = False
  sampler_is_exact: bool = True
  max_pictures: int = 1
  text_sampler_is_exact: bool = True
  as_prompt: bytes = b''
  as_answer: bytes = b''
  prompt_tokens: int = 0
  prompt_drop: float = 0.0
  sampling_steps: int = 0
  sampling_noise: float = 0.0


@dataclasses.dataclass(frozen=True)
class Counts:
  """Numbers for plans: weights, tokens and operations of a model of given sizes.

  Attributes:
    layer: weights in the matrices of one layer.
    adapted: input and output sizes of the matrices in a layer that get adapters, summed.
    image_head, text_head: weights of the heads for codes and for text tokens.
    tables: weights of the heads and the token embedding together.
    reading_tokens: positions that an image takes when the model reads it.
    eye_operations: operations of the vision encoder per image, without the image tokenizer.
    steps: passes over the whole image when it is drawn; 0: code by code.
    block: positions in such a pass.
  """

  layer: int
  adapted: int
  image_head: int
  text_head: int
  tables: int
  reading_tokens: int
  eye_operations: int = 0
  steps: int = 0
  block: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
  """Everything that a backbone defines in addition to its module. Each has a folder in models/ and
  a line in `families`.

  Attributes:
    name: its name in messages.
    config_type: the dataclass of its sizes.
    graphdef: config -> the module's structure; `nnx.merge(graphdef, params)` is a `UnifiedModel`.
    shapes: config -> shapes of its parameters, a nested dict by part.
    spec: config -> `Spec`.
    num_heads: config -> number of attention heads, which tensor parallelism splits.
    sharding_rules: (pattern of a parameter's path, a sharding of `sharding`), the first match wins.
    trainable_parts: value of `method.trainable` -> the top-level parts to train.
    image_tokenizer: the part between pixels and codes: never trained, always float32.
    lora_targets: name of an adapter -> path of the stacked linear layer that it adapts.
    counts: config -> `Counts`, for plans.
    stand_in: config -> templates of realistic length, for plans and benchmarks without a
      tokenizer.
    only: key of a run's configuration -> (the values that this family supports, the reason why it
      does not support others, as the end of a sentence).
    drawn_as: (config, steps, noise) -> a configuration whose own sampler uses that number of steps
      and that noise, for a family with such a sampler.
    room: config -> content tokens that fit in one sequence with a template and an image.
    templates: values of `method.template`, the default first. Each frames prompts and questions in
      its own words. The processor has `template`, the one in use, and `with_template(name)`. Empty
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
  counts: Callable[[Any], Counts] | None = None
  stand_in: Callable[[Any], Any] | None = None
  only: Mapping[str, tuple[tuple[Any, ...], str]] = dataclasses.field(default_factory=dict)
  drawn_as: Callable[[Any, int, float], Any] = lambda config, steps, noise: config
  room: Callable[[Any], int] | None = None
  templates: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How to sample.

  Attributes:
    temperature: 0 is greedy.
    guidance: weight of classifier-free guidance; 1 is off.
    max_tokens: maximum length of a text, including its EOS.
    segment: tokens decoded before the cache grows again (and before the next check whether all
      texts have ended).
    scan: scan over the stacked layers for each token; otherwise the loop over layers is unrolled.
    cfg_interval: guide this many codes of an image, from the first; 0: all.
    cache_dtype: dtype of the KV cache: '' for the model's own, or 'int8'.
    chunk: positions whose logits an unmasking sampler holds at a time; 0: all. The model's
      configuration sets its number of steps and its noise (`Family.drawn_as`).
  """

  temperature: float = 1.0
  guidance: float = 1.0
  max_tokens: int = 64
  segment: int = 16
  scan: bool = False
  cfg_interval: int = 0
  cache_dtype: str = ''
  chunk: int = 256


@dataclasses.dataclass(frozen=True)
class Scoring:
  """How to compute log-probabilities.

  Attributes:
    temperature: the sampling temperature.
    guidance: 1 is the plain conditional, 0 only the unconditional branch.
    chunk: tokens whose logits are held at a time; 0: all.
    remat: recompute each layer in the backward pass.
    cfg_interval: the value used in sampling.
    picture_likelihood, prompt_drop, prompt_drop_way, elbo_draws: for a model whose likelihood of an
      image is an estimate: which estimate, the share of the prompt's tokens that is dropped at
      random, how they are dropped, and the number of draws that a bound averages. Rewards use the
      defaults.
  """

  temperature: float = 1.0
  guidance: float = 1.0
  chunk: int = 0
  remat: bool = False
  cfg_interval: int = 0
  picture_likelihood: str = 'one_step'
  prompt_drop: float = 0.0
  prompt_drop_way: str = 'delete'
  elbo_draws: int = 1


class UnifiedModel(Protocol):
  """A model that reads and draws images. All methods are pure.

  Samplers take one key per sample, (B, G). Likelihoods take one key per input, (B,), shared by all
  samples of a group and by policy, old policy and reference, so that the noise cancels within a
  group; None if `spec.likelihood_is_random` is False.
  """

  spec: Spec

  def picture_from_pixels(self, pixels) -> Picture:
    """(..., H, W, 3) in [-1, 1] -> the same pixels and their codes."""

  def picture_from_codes(self, codes) -> Picture:
    """(..., N) -> the codes and their pixels, clamped to [-1, 1]."""

  def sample_pictures(self, prompt: Text, keys, how: Sampling):
    """prompt (B, Tp), keys (B, G) -> codes (B, G, N), and log-probabilities (B, G, N) float32 of
    each code under the distribution from which it was sampled.
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

  def read(self, pictures: Picture, mask) -> Any:
    """Computes the part of the prefix before the questions, once for all questions about it.

    Args:
      pictures: (B, P, ...), the images of each row in the order in which they are shown.
      mask: (B, P) bool, left-justified: the row's images, at least one; the rest is padding.

    Returns:
      A pytree of arrays for `answer`. The model chooses its leading axes.
    """

  def answer(self, reading, question: Text, keys, how: Sampling):
    """Samples one answer per question.

    Args:
      reading: the result of `read`, B rows.
      question: (B, Q, Tq): the text after the images in the user's turn (`encode_turn`); rows
        with fewer questions are padded with arbitrary ones.
      keys: (B, Q), one PRNG key per answer; unused at temperature 0, which is greedy.
      how: `guidance` and `cfg_interval` apply to images and are unused.

    Returns:
      Text (B, Q, T), T = how.max_tokens, and log-probabilities (B, Q, T) float32.
    """


def named(spec: Spec, method):
  """`config.Method` with each -1 replaced by the model's own value."""

  def or_own(value, own):
    return own if value < 0 else value

  return dataclasses.replace(
    method,
    prompt_drop=or_own(method.prompt_drop, spec.prompt_drop),
    sampling_steps=or_own(method.sampling_steps, spec.sampling_steps),
    sampling_noise=or_own(method.sampling_noise, spec.sampling_noise),
  )


def guided_codes(how, codes: int) -> int:
  """The number of an image's `codes`, from the first, that are guided.

  how: `Sampling`, `Scoring`, or any object with guidance and cfg_interval.
  """
  return 0 if how.guidance == 1.0 else min(how.cfg_interval or codes, codes)


def picture_to_read(model: UnifiedModel, pixels) -> Picture:
  """Pixels (..., H, W, 3) in [-1, 1] -> what the model reads of an image, with codes if needed."""
  if model.spec.reads == 'codes':
    return model.picture_from_pixels(pixels)
  return Picture(None, pixels)


def row_keys(key, first_candidate, inputs: int, group: int):
  """One key per sample, (B, G): fold_in(key, global sample index).

  A sample's randomness therefore does not depend on mesh, chunks, accumulation or processes.
  """
  index = first_candidate + jnp.arange(inputs * group).reshape(inputs, group)
  return jax.vmap(jax.vmap(lambda i: jax.random.fold_in(key, i)))(index)


def score_keys(model_or_spec, keys):
  """Sampler keys (B, G) -> likelihood keys (B,), or None for a model that needs none."""
  spec = getattr(model_or_spec, 'spec', model_or_spec)
  if not spec.likelihood_is_random:
    return None
  return jax.vmap(lambda key: jax.random.fold_in(key, SCORING))(keys[:, 0])


def without_eos(text: Text, eos_id: int) -> Text:
  """Only the content: a sampled text as a prompt has no EOS."""
  return Text(text.ids, text.mask & (text.ids != eos_id))


def as_prompt(model_or_spec, text: Text) -> Text:
  """Converts a sampled answer (..., T) to a prompt: replaces its first id by the one that begins a
  prompt.
  """
  return _with_first(text, getattr(model_or_spec, 'spec', model_or_spec).as_prompt)


def as_answer(model_or_spec, text: Text) -> Text:
  """Converts a prompt (..., T) to an answer: replaces its first id by the one that begins an
  answer.
  """
  return _with_first(text, getattr(model_or_spec, 'spec', model_or_spec).as_answer)


def _with_first(text: Text, table: bytes) -> Text:
  if not table or not text.ids.shape[-1]:
    return text
  forms = np.frombuffer(table, np.int32)
  first = text.ids[..., :1]
  known = text.mask[..., :1] & (first >= 0) & (first < len(forms))
  other = jnp.asarray(forms)[jnp.clip(first, 0, len(forms) - 1)]
  first = jnp.where(known, other, first)
  return text._replace(ids=jnp.concatenate([first, text.ids[..., 1:]], axis=-1))
