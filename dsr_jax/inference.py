"""The sampler and scorer for everything except the training step: commands, evaluation, probe,
study.

`Sampler` processes lists in chunks of one shape. Parameters are an argument, so a run can evaluate
itself. `Inference` is one loaded model for the commands. It always scores samples one row at a
time, so an image has bit for bit the same reward when it is drawn and when its codes are scored
again.

All models share the seeds: sample i of input p has the same key for every model, so differences are
paired.
Axes: P inputs, G samples per input, K instructions, T text tokens, N image codes, H W pixels.
"""

import dataclasses
import functools
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax import families, images, sharding
from dsr_jax.convert.locate import Source
from dsr_jax.errors import InputError
from dsr_jax.models.unified import (
  Picture,
  Sampling,
  Scoring,
  Text,
  TokenScores,
  as_answer,
  as_prompt,
  picture_to_read,
  row_keys,
  score_keys,
)
from dsr_jax.rewards import dual

CHUNK = 16  # samples that the commands draw at once; it changes only the float rounding
DECODED = 32  # images that a `Sampler` decodes at once, or the next multiple of the devices
BUCKET = (
  64  # the commands pad texts to multiples of this, so that not every length needs a compilation
)


class PictureSamples(NamedTuple):
  """Images drawn for P prompts. rewards: R_G per instruction; prompt_logps: with the first."""

  codes: np.ndarray  # (P, G, N) int32
  logps: np.ndarray  # (P, G, N), under the distribution that sampled
  pixels: np.ndarray  # (P, G, H, W, 3) uint8
  rewards: np.ndarray | None = None  # (P, K, G)
  prompt_logps: np.ndarray | None = None  # (P, G, T)


class TextSamples(NamedTuple):
  """Texts written about P images. rewards: R_U; codes: the codes of the images."""

  ids: np.ndarray  # (P, G, T) int32
  mask: np.ndarray  # (P, G, T) bool, including the final EOS
  logps: np.ndarray  # (P, G, T), under the distribution that sampled
  rewards: np.ndarray | None = None  # (P, G)
  codes: np.ndarray | None = None  # (P, N)


def _as_float(pixels):
  """Converts uint8 pixels to [-1, 1]; keeps floats, which are already in [-1, 1]."""
  return images.to_float(pixels) if pixels.dtype == jnp.uint8 else pixels


# Programs, compiled once per model structure; two models that are compared share them.
# first: the index of the chunk's first sample among all samples.


@functools.partial(jax.jit, static_argnames=('graphdef', 'group', 'how', 'scoring', 'eos_id'))
def _sample_pictures(
  graphdef, params, prompt, first, seed, instructions, *, group, how, scoring, eos_id
):
  model = nnx.merge(graphdef, params)
  keys = row_keys(jax.random.key(seed), first, prompt.ids.shape[0], group)
  codes, logps = model.sample_pictures(prompt, keys, how)
  if instructions is None:
    return codes, logps, None, None
  pictures = model.picture_from_codes(codes)
  rewards, prompt_logps = [], []
  for instruction in instructions:
    reward, logp = dual.generation(
      model,
      pictures,
      prompt,
      instruction,
      scoring,
      eos_id=eos_id,
      keys=score_keys(model, keys),
    )
    rewards.append(reward)
    prompt_logps.append(logp[..., : prompt.ids.shape[-1]])
  return codes, logps, jnp.stack(rewards, axis=1), prompt_logps[0]


@functools.partial(jax.jit, static_argnames=('graphdef', 'group', 'how', 'scoring'))
def _sample_texts(graphdef, params, pixels, question, first, seed, *, group, how, scoring):
  model = nnx.merge(graphdef, params)
  keys = row_keys(jax.random.key(seed), first, pixels.shape[0], group)
  pixels = _as_float(pixels)
  if scoring is None:
    texts, logps = model.sample_texts(picture_to_read(model, pixels), question, keys, how)
    return texts, logps, None, None
  picture = model.picture_from_pixels(pixels)
  texts, logps = model.sample_texts(picture, question, keys, how)
  rewards, _ = dual.understanding(
    model,
    picture.codes,
    texts,
    scoring,
    eos_id=model.spec.eos_id,
    keys=score_keys(model, keys),
  )
  return texts, logps, rewards, picture.codes


@functools.partial(jax.jit, static_argnames=('graphdef', 'how'))
def _picture_logps(graphdef, params, prompt, codes, first, seed, *, how):
  """prompt (P, g, T), codes (P, h, N) -> TokenScores (P, G, N)."""
  model = nnx.merge(graphdef, params)
  group = max(prompt.ids.shape[1], codes.shape[1])
  keys = row_keys(jax.random.key(seed), first, codes.shape[0], group)
  return model.picture_logps(prompt, codes, score_keys(model, keys), how)


@functools.partial(jax.jit, static_argnames=('graphdef', 'how'))
def _text_logps(graphdef, params, pixels, question, text, first, seed, *, how):
  """pixels (P, H, W, 3) uint8, question (P, Tq), text (P, G, T) -> TokenScores (P, G, T)."""
  model = nnx.merge(graphdef, params)
  keys = row_keys(jax.random.key(seed), first, *text.ids.shape[:2])
  picture = picture_to_read(model, images.to_float(pixels))
  picture = jax.tree.map(lambda x: x[:, None], picture)
  return model.text_logps(picture, question, text, score_keys(model, keys), how)


@functools.partial(jax.jit, static_argnames=('graphdef', 'how'))
def _read_prompts(graphdef, params, prompt, codes, first, seed, instruction, *, how):
  """prompt (P, T), codes (P, G, N) -> R_G (P, G) and log-probabilities (P, G, T)."""
  model = nnx.merge(graphdef, params)
  keys = row_keys(jax.random.key(seed), first, *codes.shape[:2])
  pictures = model.picture_from_codes(codes)
  return dual.generation(model, pictures, prompt, instruction, how, keys=score_keys(model, keys))


@functools.partial(jax.jit, static_argnames=('graphdef', 'how', 'eos_id'))
def _score_texts(graphdef, params, codes, text, first, seed, *, how, eos_id):
  """codes (P, N), text (P, G, T) -> R_U (P, G)."""
  model = nnx.merge(graphdef, params)
  keys = score_keys(model, row_keys(jax.random.key(seed), first, *text.ids.shape[:2]))
  rewards, _ = dual.understanding(model, codes, text, how, eos_id=eos_id, keys=keys)
  return rewards


@functools.partial(jax.jit, static_argnames='graphdef')
def _encode(graphdef, params, pixels):
  """Pixels (P, H, W, 3), uint8 or float -> codes (P, N)."""
  return nnx.merge(graphdef, params).picture_from_pixels(_as_float(pixels)).codes


@functools.partial(jax.jit, static_argnames='graphdef')
def _decode(graphdef, params, codes):
  """Codes (..., N) -> pixels (..., H, W, 3) float32."""
  return nnx.merge(graphdef, params).picture_from_codes(codes).pixels


@functools.partial(jax.jit, static_argnames='graphdef')
def _score_pair(graphdef, params, text, picture, instruction):
  """One text and one image: log-probabilities of the text (T,) and of the codes (N,)."""
  model = nnx.merge(graphdef, params)
  keys = score_keys(model, jax.random.key(0)[None, None])
  text = Text(text.ids[:, None], text.mask[:, None])
  prompt, answer = as_prompt(model, text), as_answer(model, text)
  text_scores = model.text_logps(picture, instruction, answer, keys, Scoring())
  image_scores = model.picture_logps(prompt, picture.codes, keys, Scoring())
  return text_scores.logp[0, 0], image_scores.logp[0, 0]


class Sampler:
  """Samples from models of one structure and scores with them, in chunks of one shape, on host
  data.

  chunk: inputs at once; copies of its first row pad the last chunk. With several processes, all
  must call together, and every process gets all results.
  """

  def __init__(self, graphdef, processor, *, chunk: int, seed: int):
    self._graphdef = graphdef
    self._processor = processor
    self._chunk = chunk
    self._seed = seed

  # Texts to ids and back.

  def prompts(self, texts, length: int | None = None) -> Text:
    """P prompt strings -> ids (P, T), padded to `length` or to the longest."""
    return self._processor.pad([self._processor.encode_prompt(t) for t in texts], length)

  def questions(self, texts, length: int | None = None) -> Text:
    """P question or instruction strings -> ids (P, T)."""
    return self._processor.pad([self._processor.encode_question(t) for t in texts], length)

  def words(self, ids, mask) -> list[str]:
    """Rows of ids (P, T) -> P strings."""
    return [self._processor.decode(row[keep]) for row, keep in zip(ids, mask)]

  # Samples.

  def sample_pictures(
    self,
    params,
    prompt: Text,
    *,
    group: int,
    how: Sampling,
    instructions: Text | None = None,
    scoring: Scoring | None = None,
    eos_id: int | None = None,
    seed: int | None = None,
  ) -> PictureSamples:
    """P prompts (P, T) -> G images each.

    instructions (K, Ti): scores each image by R_G with each instruction. eos_id: also counts the
    end-of-text token in R_G.
    """
    asked = None
    if instructions is not None:
      asked = tuple(Text(ids, mask) for ids, mask in zip(*instructions))

    def run(first, ids, mask):
      return _sample_pictures(
        self._graphdef,
        params,
        Text(ids, mask),
        first * group,
        self._seed if seed is None else seed,
        asked,
        group=group,
        how=how,
        scoring=scoring or Scoring(),
        eos_id=eos_id,
      )

    codes, logps, rewards, prompt_logps = self.chunked(run, *prompt)
    return PictureSamples(codes, logps, self.decode(params, codes), rewards, prompt_logps)

  def sample_texts(
    self,
    params,
    pixels,
    question: Text,
    *,
    group: int,
    how: Sampling,
    scoring: Scoring | None = None,
    seed: int | None = None,
  ) -> TextSamples:
    """P images (P, H, W, 3) uint8 and questions (P, Tq) -> G texts each.

    scoring: scores each text by R_U.
    """

    def run(first, pixels, ids, mask):
      text, logps, rewards, codes = _sample_texts(
        self._graphdef,
        params,
        pixels,
        Text(ids, mask),
        first * group,
        self._seed if seed is None else seed,
        group=group,
        how=how,
        scoring=scoring,
      )
      return TextSamples(text.ids, text.mask, logps, rewards, codes)

    return self.chunked(run, pixels, *question)

  # Scores.

  def picture_logps(self, params, prompt: Text, codes, how: Scoring) -> TokenScores:
    """prompt (P, g, T), codes (P, h, N) -> TokenScores (P, G, N)."""

    def run(first, ids, mask, codes):
      group = max(ids.shape[1], codes.shape[1])
      return _picture_logps(
        self._graphdef, params, Text(ids, mask), codes, first * group, self._seed, how=how
      )

    return self.chunked(run, *prompt, codes)

  def text_logps(self, params, pixels, question: Text, text: Text, how: Scoring) -> TokenScores:
    """pixels (P, H, W, 3) uint8, question (P, Tq), text (P, G, T) -> TokenScores (P, G, T)."""

    def run(first, pixels, question_ids, question_mask, ids, mask):
      question, text = Text(question_ids, question_mask), Text(ids, mask)
      first = first * ids.shape[1]
      return _text_logps(self._graphdef, params, pixels, question, text, first, self._seed, how=how)

    return self.chunked(run, pixels, *question, *text)

  def read_prompts(self, params, prompt: Text, codes, instruction: Text, how: Scoring):
    """prompt (P, T), the images' codes (P, G, N), instruction (Ti,) -> R_G (P, G), and the
    log-probabilities of the prompt's tokens given each image (P, G, T).
    """

    def run(first, ids, mask, codes):
      return _read_prompts(
        self._graphdef,
        params,
        Text(ids, mask),
        codes,
        first * codes.shape[1],
        self._seed,
        instruction,
        how=how,
      )

    return self.chunked(run, *prompt, codes)

  def score_texts(self, params, codes, text: Text, how: Scoring, *, eos_id: int):
    """The images' codes (P, N), text (P, G, T) -> R_U (P, G)."""

    def run(first, codes, ids, mask):
      return _score_texts(
        self._graphdef,
        params,
        codes,
        Text(ids, mask),
        first * ids.shape[1],
        self._seed,
        how=how,
        eos_id=eos_id,
      )

    return self.chunked(run, codes, *text)

  def encode(self, params, pixels):
    """(P, H, W, 3) uint8 -> codes (P, N)."""
    return self.chunked(lambda first, x: _encode(self._graphdef, params, x), pixels)

  def decode(self, params, codes):
    """codes (P, ..., N) -> pixels (P, ..., H, W, 3) uint8.

    All lists are decoded by one program, whatever the number of prompts and samples.
    """

    def run(first, codes):
      return images.to_uint8(sharding.fetch(_decode(self._graphdef, params, codes)))

    devices = jax.device_count()
    at_once = -(-DECODED // devices) * devices
    pixels = self.chunked(run, codes.reshape(-1, codes.shape[-1]), chunk=at_once)
    return pixels.reshape(*codes.shape[:-1], *pixels.shape[1:])

  def chunked(self, run, *arrays, chunk: int | None = None):
    """Runs run(first, *parts) on chunks of host arrays (P, ...), by default of the sampler's number
    of rows; joins the results on the host.
    """
    rows, chunk = len(arrays[0]), chunk or self._chunk
    outputs = []
    for first in range(0, rows, chunk):
      parts = [np.asarray(a[first : first + chunk]) for a in arrays]
      here = len(parts[0])
      filled = [np.concatenate([p, np.repeat(p[:1], chunk - here, axis=0)]) for p in parts]
      output = jax.tree.map(sharding.fetch, run(first, *filled))
      outputs.append(jax.tree.map(lambda x, n=here: x[:n], output))
      check_numbers(outputs[-1])
    return jax.tree.map(lambda *x: np.concatenate(x), *outputs)


def check_numbers(tree):
  """InputError for a NaN in a model's outputs, which make every result meaningless."""
  for x in jax.tree.leaves(tree):
    if np.issubdtype(x.dtype, np.floating) and np.isnan(x).any():
      raise InputError(
        'the log-probabilities or images of the model contain NaN; sample closer to temperature 1 '
        'and guidance 1; if that does not help, its weights are damaged: download them again'
      )


def best_of(x, rewards):
  """x (P, S K, ...), rewards (P, S, K) -> the best of each K samples, (P, S, ...)."""
  rows, samples, _ = rewards.shape
  x = x.reshape(*rewards.shape, *x.shape[2:])
  return x[np.arange(rows)[:, None], np.arange(samples), np.argmax(rewards, axis=-1)]


# One loaded model.


@dataclasses.dataclass(frozen=True)
class Scores:
  """Both reversed likelihoods of one pair, in nats, at temperature 1 and without guidance. The
  rewards are means over tokens.

  text_logps (T,): the text's content tokens given the image. image_logps (N,): the codes given
  the text.
  """

  text_logps: np.ndarray
  image_logps: np.ndarray

  @property
  def reward_generation(self) -> float:
    return float(np.mean(self.text_logps, dtype=np.float64))

  @property
  def reward_understanding(self) -> float:
    return float(np.mean(self.image_logps, dtype=np.float64))


class Inference:
  """A model from `locate.resolve`, with its parameters on the default device."""

  def __init__(self, source: Source):
    self.source = source
    model = families.model_of(source.bundle, source.name, source.method)
    self.config = model.config
    self.spec = model.spec
    self.processor = model.processor
    self._room = model.family.room and model.family.room(model.config)
    self._family = model.family
    self._graphdef = model.graphdef
    self._params = jax.device_put(source.bundle.params)

  def encode(self, text: str, what: str) -> list[int]:
    """Content ids of a text, without EOS. InputError if the text is empty or does not fit the
    model.
    """
    encode = self.processor.encode_question if what == 'question' else self.processor.encode_prompt
    ids = encode(text)
    if self._room is not None and len(ids) > self._room:
      raise InputError(
        f'the {what} has {len(ids)} tokens, but this model has room for at most {self._room}; '
        'shorten it'
      )
    return ids

  def read_image(self, path: str, crop: str = '') -> np.ndarray:
    """Reads a file as the square image for the model: (H, W, 3) float32 in [-1, 1].

    crop: 'crop' or 'pad'; by default the model's own way.
    """
    image = images.load_image(path)
    square = images.preprocess(image, self.spec.image_size, mode=crop or self.source.method.crop)
    return images.to_float(square)

  def draw(
    self,
    prompt: list[int],
    number: int,
    *,
    temperature: float,
    guidance: float,
    seed: int,
    cfg_interval: int | None = None,
  ):
    """Samples images: codes (number, N) int32 and their log-probabilities (number, N).

    cfg_interval: see `method.cfg_interval`; by default the model's own value.
    """
    interval = self.source.method.cfg_interval if cfg_interval is None else cfg_interval
    families.check_value(self._family, 'method.cfg_interval', interval, self.source.name)
    how = Sampling(temperature=temperature, guidance=guidance, segment=64, cfg_interval=interval)
    codes, logps = [], []
    for first in range(0, number, CHUNK):
      drawn = _sample_pictures(
        self._graphdef,
        self._params,
        _text(prompt),
        first,
        seed,
        None,
        group=min(CHUNK, number - first),
        how=how,
        scoring=None,
        eos_id=None,
      )
      codes.append(np.asarray(drawn[0])[0])
      logps.append(np.asarray(drawn[1])[0])
    self._check_finite(*logps)
    return np.concatenate(codes), np.concatenate(logps)

  def describe(
    self,
    pixels,
    question: list[int],
    number: int,
    *,
    temperature: float,
    max_tokens: int,
    seed: int,
  ):
    """Samples texts about an image (H, W, 3) in [-1, 1]: a list of (ids (T,), logps (T,)), with
    the EOS if it was sampled.
    """
    how = Sampling(temperature=temperature, max_tokens=max_tokens, segment=64)
    texts = []
    for first in range(0, number, CHUNK):
      text, logps, _, _ = jax.device_get(
        _sample_texts(
          self._graphdef,
          self._params,
          pixels[None],
          _text(question),
          first,
          seed,
          group=min(CHUNK, number - first),
          how=how,
          scoring=None,
        )
      )
      rows = zip(text.ids[0], text.mask[0], logps[0])
      texts += [(ids[mask], logp[mask]) for ids, mask, logp in rows]
    self._check_finite(*(logp for _, logp in texts))
    return texts

  def decode(self, codes: np.ndarray) -> np.ndarray:
    """Codes (N,) -> pixels (H, W, 3) float32 in [-1, 1]."""
    return np.asarray(_decode(self._graphdef, self._params, codes[None]))[0]

  def tokenize(self, pixels: np.ndarray) -> np.ndarray:
    """Pixels (H, W, 3) in [-1, 1] -> codes (N,) int32."""
    return np.asarray(_encode(self._graphdef, self._params, pixels[None]))[0]

  def score(
    self, text: list[int], codes: np.ndarray, pixels: np.ndarray, instruction: list[int]
  ) -> Scores:
    """Scores one pair: a text's content ids, and an image's codes (N,) and pixels (H, W, 3)."""
    picture = Picture(jnp.asarray(codes)[None, None], jnp.asarray(pixels)[None, None])
    text_logps, image_logps = _score_pair(
      self._graphdef, self._params, _text(text), picture, _text(instruction)
    )
    scores = Scores(np.asarray(text_logps)[: len(text)], np.asarray(image_logps))
    self._check_finite(scores.text_logps, scores.image_logps)
    return scores

  def _check_finite(self, *logps):
    """InputError for log-probabilities that are not finite, which give no reward."""
    if not all(np.isfinite(x).all() for x in logps):
      raise InputError(
        f'the log-probabilities of {self.source.name} are not finite; sample closer to temperature '
        '1 and guidance 1; if that does not help, its weights are damaged: download them again'
      )


def _text(ids) -> Text:
  """One row, (1, T), with T a multiple of BUCKET."""
  room = -(-len(ids) // BUCKET) * BUCKET
  padded = jnp.asarray([ids + [0] * (room - len(ids))], jnp.int32)
  return Text(padded, jnp.arange(room)[None] < len(ids))
