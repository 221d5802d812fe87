"""The protocol between the training step and a model: texts, pictures, and six methods; two more
for benchmarks of questions, `read` and `answer`.

Any backbone that implements the six can be reinforced: `step`, `tasks`, `rewards` and `losses` call
nothing else. docs/extending.md shows how to add one.

The prefix of a question is in two parts, so that questions about the same pictures share the first:

  reading = model.read(pictures, mask)            # Picture (B, P, ...), mask (B, P)
  text, logps = model.answer(reading, question, keys, how)
                             # Text (B, Q, Tq), keys (B, Q) -> Text (B, Q, T), logps (B, Q, T)

The content of such a question is all that follows the pictures in the user's turn, a leading line
break included: `processor.encode_turn(text)` gives its ids.

Axes: B inputs, G samples of an input, P pictures of an input, Q questions about them, T text
tokens, N image codes, H W pixels. Of the two leading axes written g and h each is 1 or G, and they
broadcast.
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
    max_pictures: that one question can be about (P of `read`); 0: any number.
    sampler_is_exact: whether the log-probabilities of sampled pictures are their likelihoods. Where
      they are not, nobody compares the two.
    text_sampler_is_exact: the same of texts.
    as_prompt, as_answer: where a word has other ids at the beginning of a prompt than at that of an
      answer: tables of ids (V,), int32 bytes. Empty where a text has the same ids in both places.
    prompt_tokens: of a prompt, at most; 0: as many as there is room for.
    prompt_drop, sampling_steps, sampling_noise: what `method` leaves to the model (its keys of
      those names at -1).
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
  """What plans count with: weights, tokens and operations of a model of given sizes.

  Attributes:
    layer: weights of a layer's matrices.
    adapted: inputs and outputs of a layer's matrices that adapters go beside, summed.
    image_head, text_head: weights behind the states of codes and of words.
    tables: weights of heads and word embedding together.
    reading_tokens: places that a picture takes where it is read.
    eye_operations: of what turns a picture's pixels into what is read, besides the image tokenizer.
    steps: passes over a whole picture in which it is drawn; 0: code by code.
    block: places that such a pass has.
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
    counts: config -> `Counts`, for plans.
    stand_in: config -> templates as long as real ones, for plans and benchmarks without a
      tokenizer.
    only: key of a run's configuration -> (the values that make sense for this family, what of it
      forbids the others, as the end of a sentence).
    drawn_as: (config, steps, noise) -> a configuration whose own sampler takes so many steps with
      so much noise, for a family that has such a sampler.
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
    max_tokens: of a text, its EOS included.
    segment: tokens decoded between two growths of the cache (and two checks whether all texts have
      ended).
    scan: whether a token is scanned through the stacked layers; else their loop is unrolled.
    cfg_interval: codes of a picture, from its first, that are guided; 0: all.
    cache_dtype: of keys and values: '' the model's own, or 'int8'.
    chunk: of a sampler that unmasks: places whose logits are held at a time; 0: all. How many steps
      it takes, and with how much noise, its model's configuration says (`Family.drawn_as`).
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
    temperature: the one that sampled.
    guidance: 1 is the plain conditional, 0 the unconditional branch alone.
    chunk: tokens whose logits are held at a time; 0: all.
    remat: recompute each layer in the backward pass.
    cfg_interval: as sampled.
    picture_likelihood, prompt_drop, prompt_drop_way, elbo_draws: of a model whose likelihood of a
      picture is an estimate: which one, the share of the prompt's words that is dropped at random,
      how, and of how many draws a bound is the mean. Rewards keep the defaults.
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

  def read(self, pictures: Picture, mask) -> Any:
    """The part of a prefix that comes before any question, run once for all questions about it.

    Args:
      pictures: (B, P, ...), those of a row in the order in which they are shown.
      mask: (B, P) bool, left-justified: the row's own pictures, at least one; the rest is padding.

    Returns:
      A pytree of arrays whose leading axes are the model's own business; goes to `answer`.
    """

  def answer(self, reading, question: Text, keys, how: Sampling):
    """One answer to each question.

    Args:
      reading: of `read`, B rows.
      question: (B, Q, Tq): what follows the pictures in the user's turn (`encode_turn`); rows with
        fewer questions are filled up with any.
      keys: (B, Q), of the answers' chance; unused at temperature 0, which is greedy.
      how: `guidance` and `cfg_interval` are of pictures, and unused.

    Returns:
      Text (B, Q, T), T = how.max_tokens, and log-probabilities (B, Q, T) float32.
    """


def named(spec: Spec, method):
  """`config.Method` with the model's own values in the place of -1."""

  def or_own(value, own):
    return own if value < 0 else value

  return dataclasses.replace(
    method,
    prompt_drop=or_own(method.prompt_drop, spec.prompt_drop),
    sampling_steps=or_own(method.sampling_steps, spec.sampling_steps),
    sampling_noise=or_own(method.sampling_noise, spec.sampling_noise),
  )


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


def as_prompt(model_or_spec, text: Text) -> Text:
  """A sampled answer (..., T) as a prompt: its first word in the form that begins a prompt."""
  return _with_first(text, getattr(model_or_spec, 'spec', model_or_spec).as_prompt)


def as_answer(model_or_spec, text: Text) -> Text:
  """A prompt (..., T) as an answer: its first word in the form that begins an answer."""
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
