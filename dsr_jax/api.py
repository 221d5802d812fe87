"""The Python interface: a model that draws, describes and scores, and runs that train it.

  import dsr_jax as dsr

  model = dsr.load('scenes')
  best, *others = model.generate('a red disc left of a blue square', num_samples=8, seed=42)
  best.image, best.reward_generation, best.sampling_logps
  texts = model.describe(best.image, num_samples=4)
  score = model.score('a red disc', best.image)
  run = dsr.train('scenes', 'runs/scenes', {'method.steps': 40})
  model = dsr.load(run.workdir)

Arguments have the names and defaults of the commands' flags, and the commands `generate`,
`describe` and `score` print what these methods return. Input images are files, PIL images or NumPy
arrays; output images are PIL images. Every error that a user can fix is an `InputError`.

Rewards are in nats per token, at temperature 1, without guidance (arXiv 2506.07963, eq. 3).
Axes: T text tokens, N image codes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import functools
import math
import os
import threading
from typing import Any, BinaryIO, overload

from absl import logging
import jax.numpy as jnp
import ml_collections
import numpy as np
from PIL import Image

from dsr_jax import config as config_lib
from dsr_jax import config_loading, families, files, images, inputs, saved_config
from dsr_jax import train as train_lib
from dsr_jax.convert import locate
from dsr_jax.errors import InputError
from dsr_jax.inference import BUCKET, Inference, Sampler
from dsr_jax.models.unified import Scoring, Text
from dsr_jax.probe import words as words_lib
from dsr_jax.runtime import cpu

__all__ = [
  'Description',
  'Drawing',
  'Explanation',
  'InputError',
  'Model',
  'Run',
  'Score',
  'Word',
  'load',
  'train',
]

# Number of images drawn without a prompt; they stand for having seen no image.
UNSEEN = 8


# Results.


@dataclasses.dataclass(frozen=True)
class Word:
  """A word of a text.

  Attributes:
    text: the word, `text[start:end]` of the whole text without blanks around it.
    start, end: its characters.
    value: nats; the method that returns words defines their meaning.
  """

  text: str
  start: int
  end: int
  value: float


@dataclasses.dataclass(frozen=True, eq=False)
class Drawing:
  """An image that a model drew for a prompt.

  Attributes:
    prompt: the prompt.
    image: the image, RGB.
    candidate: its index among the samples, from 0.
    reward_generation: R_G, mean log p(prompt | image) over the prompt's tokens.
    reward_understanding: R_U, mean log p(image | prompt) over the image's codes.
    codes: (N,) int32, the codes that the model sampled; `image` is their decoding, rounded to 8
      bits.
    text_logps: (T,), log-probabilities of the prompt's tokens given the image.
    image_logps: (N,), log-probabilities of the codes given the prompt.
    sampling_logps: (N,), log-probabilities of the codes when sampled, with guidance and
      temperature.
  """

  prompt: str
  image: Image.Image
  candidate: int
  reward_generation: float
  reward_understanding: float
  codes: np.ndarray
  text_logps: np.ndarray
  image_logps: np.ndarray
  sampling_logps: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Description:
  """A text that a model wrote about an image. An empty one has no rewards.

  Attributes:
    text: the text.
    candidate: its index among the samples, from 0.
    reward_understanding: R_U, mean log p(image | text) over the image's codes.
    reward_generation: R_G, mean log p(text | image) over the text's tokens.
    ended: whether it ended before `max_tokens`.
    text_tokens: ids of its content, without EOS.
    sampling_logps: log-probabilities of the tokens when sampled, including the EOS if sampled.
  """

  text: str
  candidate: int
  reward_understanding: float | None
  reward_generation: float | None
  ended: bool
  text_tokens: list[int]
  sampling_logps: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
  """Both rewards of a text and an image.

  Attributes:
    reward_generation: R_G, mean log p(text | image) over the text's tokens.
    reward_understanding: R_U, mean log p(image | text) over the image's codes.
    words: each word's share of R_G; the shares add up to it.
    text_tokens: (T,) ids.
    text_logps: (T,), log-probabilities of the tokens given the image.
    image_codes: (N,) int32.
    image_logps: (N,), log-probabilities of the codes given the text.
  """

  reward_generation: float
  reward_understanding: float
  words: list[Word]
  text_tokens: list[int]
  text_logps: np.ndarray
  image_codes: np.ndarray
  image_logps: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Explanation:
  """Which parts of a text and an image support each other.

  Attributes:
    words: log p(word | image) - log p(word | no image); images that the model draws without
      a prompt stand for no image.
    patches: (n, n), log p(code | text) - log p(code | no text) at its place in the image, by the
      unconditional branch of guidance; (1, N) if N is not a square number.
  """

  words: list[Word]
  patches: np.ndarray


@dataclasses.dataclass(frozen=True)
class Run:
  """A run that has ended or was stopped.

  Attributes:
    workdir: its folder; `load(workdir)` is its current model.
    report: the path of its HTML report.
    summary: the content of summary.json.
  """

  workdir: str
  report: str
  summary: dict[str, Any]


# What `describe` takes for an image; arrays of other libraries too, if NumPy reads them.
AnyImage = str | os.PathLike | BinaryIO | Image.Image | np.ndarray | Drawing


# A model.


def load(model: str | os.PathLike, template: str = '', base: str | os.PathLike = '') -> Model:
  """Loads a model onto the default device.

  Args:
    model: 'scenes' for the embedded model, a model directory, a Hub id (OWNER/NAME), or a run's
      workdir (DIR or DIR@STEP; of two models DIR:generator or DIR:understander).
    template: a value of `method.template`, which frames its prompts. By default, the one that the
      model was trained with, else its family's first.
    base: for a run, the current location of the model that it started from, if that has moved.

  Raises:
    InputError: if there is no such model, or its files are damaged.
  """
  if not isinstance(model, str | os.PathLike):
    raise InputError(f'model has the type {type(model).__name__}; name {locate.EXPECTED}')
  name = inputs.expanded(os.fspath(model), 'model')
  found = locate.resolve(name, template=template, base=os.fspath(base))
  return Model(Inference(found))


class Model:
  """A loaded model, created by `load`.

  All models share the seeds: candidate i of seed s uses the same PRNG key in each.
  """

  def __init__(self, inference: Inference):
    self._inference = inference
    self._method = inference.source.method
    # Cached: it is the same for every image of a prompt.
    self._without_picture = functools.lru_cache(maxsize=8)(self._score_unseen)

  @property
  def name(self) -> str:
    """The name with which it was loaded."""
    return self._inference.source.name

  @property
  def image_size(self) -> int:
    """The side of its square images, in pixels."""
    return self._inference.spec.image_size

  @property
  def guidance(self) -> float:
    """The default of `cfg_weight`."""
    return self._method.guidance

  @property
  def temperature(self) -> float:
    """The default of `temperature`."""
    return self._method.temperature

  @property
  def question(self) -> str:
    """The default question of `describe`."""
    return self._method.question

  def __repr__(self):
    side = self.image_size
    return f'<dsr_jax.Model {self.name!r}: {side} x {side} pixels>'

  @overload
  def generate(
    self,
    prompts: str,
    num_samples: int = ...,
    seed: int = ...,
    temperature: float | None = ...,
    cfg_weight: float | None = ...,
    cfg_interval: int | None = ...,
    instruction: str | None = ...,
  ) -> list[Drawing]: ...

  @overload
  def generate(
    self,
    prompts: list[str] | tuple[str, ...],
    num_samples: int = ...,
    seed: int = ...,
    temperature: float | None = ...,
    cfg_weight: float | None = ...,
    cfg_interval: int | None = ...,
    instruction: str | None = ...,
  ) -> list[list[Drawing]]: ...

  def generate(
    self,
    prompts,
    num_samples: int = 8,
    seed: int = 42,
    temperature: float | None = None,
    cfg_weight: float | None = None,
    cfg_interval: int | None = None,
    instruction: str | None = None,
  ):
    """Draws images for prompts, and scores each with both rewards.

    None means the model's own value: the run's configuration, else the model's files.

    Args:
      prompts: one prompt, or several.
      num_samples: images per prompt.
      seed: candidate i uses the key (seed, i), for any number of images.
      temperature: sampling temperature; 0 is greedy.
      cfg_weight: classifier-free guidance; 1 is off.
      cfg_interval: number of codes, from the first, that are guided; 0: all.
      instruction: question before the prompt when it is scored given the image.

    Returns:
      `Drawing`s, best first by R_G; for several prompts, one list per prompt.

    Raises:
      InputError: for an empty prompt, one that the model has no room for, or an impossible number.
    """
    one = isinstance(prompts, str)
    prompts = _texts('prompts', prompts)
    temperature = self._method.temperature if temperature is None else temperature
    cfg_weight = self._method.guidance if cfg_weight is None else cfg_weight
    inputs.check_sampling(num_samples, temperature, seed, cfg_weight)
    if cfg_interval is not None:
      inputs.check_whole('cfg_interval', cfg_interval, 0)
    encoded = [self._inference.encode(prompt, 'prompt') for prompt in prompts]
    asked = self._instruction(instruction)
    drawn = []
    for prompt, ids in zip(prompts, encoded):
      codes, logps = self._inference.draw(
        ids,
        int(num_samples),
        temperature=float(temperature),
        guidance=float(cfg_weight),
        cfg_interval=None if cfg_interval is None else int(cfg_interval),
        seed=int(seed),
      )
      drawn.append(self._drawings(prompt, ids, asked, codes, logps))
    return drawn[0] if one else drawn

  def _drawings(self, prompt, ids, asked, codes, logps) -> list[Drawing]:
    """Codes (num_samples, N) with their scores, best first."""
    drawn = []
    for candidate in range(len(codes)):
      pixels = self._inference.decode(codes[candidate])
      scores = self._inference.score(ids, codes[candidate], pixels, asked)
      drawn.append(
        Drawing(
          prompt=prompt,
          image=Image.fromarray(images.to_uint8(pixels)),
          candidate=candidate,
          reward_generation=scores.reward_generation,
          reward_understanding=scores.reward_understanding,
          codes=codes[candidate],
          text_logps=scores.text_logps,
          image_logps=scores.image_logps,
          sampling_logps=logps[candidate],
        )
      )
    return sorted(drawn, key=lambda drawing: -drawing.reward_generation)

  def describe(
    self,
    image: AnyImage,
    num_samples: int = 4,
    question: str | None = None,
    seed: int = 42,
    temperature: float | None = None,
    max_tokens: int | None = None,
    crop: str | None = None,
  ) -> list[Description]:
    """Samples texts about an image, or answers to a question about it.

    None means the model's own value: the run's configuration, else the model's files.

    Args:
      image: a file, a PIL image, an array (H, W), (H, W, 3) or (H, W, 4) of uint8, uint16 or
        floats in [0, 1], or a `Drawing`.
      num_samples: number of texts.
      question: the question about the image.
      seed: text i uses the key (seed, i), for any number of texts.
      temperature: sampling temperature; 0 is greedy.
      max_tokens: maximum length of a text.
      crop: how to make it square: 'crop' to the center, or 'pad' with gray bars.

    Returns:
      `Description`s, best first by R_U; empty texts come last.

    Raises:
      InputError: for an invalid image, an empty question, or an impossible number.
    """
    method = self._method
    temperature = method.temperature if temperature is None else temperature
    max_tokens = method.max_text_tokens if max_tokens is None else max_tokens
    inputs.check_sampling(num_samples, temperature, seed)
    inputs.check_whole('max_tokens', max_tokens, 1)
    (question,) = _texts('question', method.question if question is None else question)
    pixels = self._pixels(image, crop)
    asked = self._inference.encode(question, 'question')
    instruction = self._instruction(None)
    codes = self._inference.tokenize(pixels)
    texts = self._inference.describe(
      pixels,
      asked,
      int(num_samples),
      temperature=float(temperature),
      seed=int(seed),
      max_tokens=int(max_tokens),
    )
    eos = self._inference.spec.eos_id
    described = []
    for candidate, (ids, logps) in enumerate(texts):
      content = [int(i) for i in ids if i != eos]
      scores = self._inference.score(content, codes, pixels, instruction) if content else None
      described.append(
        Description(
          text=self._inference.processor.decode(content),
          candidate=candidate,
          reward_understanding=scores.reward_understanding if scores else None,
          reward_generation=scores.reward_generation if scores else None,
          ended=len(content) < len(ids),
          text_tokens=content,
          sampling_logps=logps,
        )
      )
    return sorted(described, key=_worth, reverse=True)

  def score(
    self,
    text: str,
    image: AnyImage | None = None,
    instruction: str | None = None,
    codes: Sequence[int] | np.ndarray | None = None,
    crop: str | None = None,
  ) -> Score:
    """Scores a text with an image.

    Args:
      text: the text.
      image: as in `describe`. A `Drawing` is scored by its codes, so its rewards are exactly its
        original ones, which do not depend on the rounding to 8 bits.
      instruction: as in `generate`.
      codes: (N,) image codes, instead of an image.
      crop: as in `describe`.

    Raises:
      InputError: for an empty text, an invalid image, or codes of another model.
    """
    (text,) = _texts('text', text)
    ids = self._inference.encode(text, 'text')
    asked = self._instruction(instruction)
    seen, pixels = self._codes_and_pixels(image, codes, crop)
    scores = self._inference.score(ids, seen, pixels, asked)
    shares = [float(logp) / len(ids) for logp in scores.text_logps]
    return Score(
      reward_generation=scores.reward_generation,
      reward_understanding=scores.reward_understanding,
      words=self._words(text, ids, shares),
      text_tokens=ids,
      text_logps=scores.text_logps,
      image_codes=seen,
      image_logps=scores.image_logps,
    )

  def explain(
    self,
    text: str,
    image: AnyImage | None = None,
    instruction: str | None = None,
    codes: Sequence[int] | np.ndarray | None = None,
    crop: str | None = None,
  ) -> Explanation:
    """Measures which words an image supports, and which of its patches a text supports.

    Arguments and errors are the same as in `score`.
    """
    (text,) = _texts('text', text)
    ids = self._inference.encode(text, 'text')
    asked = self._instruction(instruction)
    seen, pixels = self._codes_and_pixels(image, codes, crop)
    scores = self._inference.score(ids, seen, pixels, asked)
    heat = scores.text_logps - self._without_picture(tuple(ids), tuple(asked))
    patches = np.asarray(scores.image_logps - self._without_text(ids, seen))
    side = math.isqrt(patches.size)
    square = (side, side) if side * side == patches.size else (1, -1)
    return Explanation(self._words(text, ids, heat), patches.reshape(square))

  def as_seen(self, image: AnyImage, crop: str | None = None) -> Image.Image:
    """The image as the model reads it: square, RGB, `image_size`. Arguments as in `describe`."""
    mode = crop or self._method.crop
    return Image.fromarray(images.preprocess(_readable(image), self.image_size, mode=mode))

  # What the methods share.

  def _instruction(self, instruction):
    if instruction is None:
      instruction = self._method.instruction
    if not isinstance(instruction, str) or not inputs.is_text(instruction):
      raise InputError(
        f'instruction={instruction!r} is not UTF-8 text; pass a string, or "" for no instruction'
      )
    return self._inference.encode(instruction, 'question')

  def _pixels(self, image, crop) -> np.ndarray:
    """(H, W, 3) float32 in [-1, 1]."""
    return self._inference.read_image(_readable(image), crop or '')

  def _codes_and_pixels(self, image, codes, crop) -> tuple[np.ndarray, np.ndarray]:
    if (image is None) == (codes is None):
      both = 'neither' if image is None else 'both'
      raise InputError(f'got {both} of image and codes; pass exactly one of them')
    if isinstance(image, Drawing):
      codes = image.codes
    if codes is None:
      pixels = self._pixels(image, crop)
      return self._inference.tokenize(pixels), pixels
    codes = self._checked(codes)
    return codes, self._inference.decode(codes)

  def _checked(self, codes) -> np.ndarray:
    spec = self._inference.spec
    try:
      found = np.asarray(codes)
    except ValueError:  # rows of several lengths
      found = np.zeros(0)
    if (
      found.shape != (spec.num_codes,)
      or not np.issubdtype(found.dtype, np.integer)
      or not (0 <= found.min() and found.max() < spec.codebook_size)
    ):
      raise InputError(
        f'these codes, of shape {found.shape} and type {found.dtype}, do not fit this model; pass '
        f'{spec.num_codes} integers from 0 to {spec.codebook_size - 1}, as it draws them'
      )
    return found.astype(np.int32)

  def _words(self, text: str, ids: list[int], values) -> list[Word]:
    """The words of a text with the sums of their tokens' values (T,).

    A token counts toward the word that it begins in, or toward the next word if it begins between
    two, so the words add up to the tokens.
    """
    text = text.strip()
    places = words_lib.words_of(text)
    sums = [0.0] * len(places)
    for start, value in zip(self._starts(text, ids), values):
      later = (i for i, (_, end) in enumerate(places) if end > start)
      sums[next(later, len(places) - 1)] += float(value)
    return [Word(text[a:b], a, b, value) for (a, b), value in zip(places, sums)]

  def _starts(self, text: str, ids: list[int]) -> list[int]:
    """Where each token begins in the text. Some families put a space before a prompt."""
    for before in (' ', ''):
      found = self._inference.processor.tokenizer(
        before + text, add_special_tokens=False, return_offsets_mapping=True
      )
      if found['input_ids'] == ids:
        return [start - len(before) for start, _ in found['offset_mapping']]
    raise AssertionError('this family does not tokenize a prompt as its text')

  # The baselines of explanations.

  @functools.cached_property
  def _sampler(self) -> Sampler:
    model = families.model_of(self._inference.source.bundle, self.name, self._method)
    return Sampler(model.graphdef, model.processor, chunk=1, seed=0)

  @functools.cached_property
  def _unseen(self) -> list[tuple[np.ndarray, np.ndarray]]:
    """Codes and pixels of images without a prompt: guidance 0 is the unconditional branch."""
    ids = self._inference.encode(self.question, 'prompt')  # any text: only its length matters
    codes, _ = self._inference.draw(ids, UNSEEN, temperature=1.0, guidance=0.0, seed=0)
    return [(code, self._inference.decode(code)) for code in codes]

  def _score_unseen(self, ids: tuple[int, ...], asked: tuple[int, ...]) -> np.ndarray:
    """Log of the mean likelihood of each of a text's tokens (T,) over images without a prompt."""
    scores = [self._inference.score(list(ids), *other, list(asked)) for other in self._unseen]
    return np.logaddexp.reduce([s.text_logps for s in scores], axis=0) - math.log(UNSEEN)

  def _without_text(self, ids, codes) -> np.ndarray:
    """Log-probabilities of the codes (N,) without a text."""
    room = -(-len(ids) // BUCKET) * BUCKET
    padded = np.zeros((1, 1, room), np.int32)
    padded[0, 0, : len(ids)] = ids
    text = Text(jnp.asarray(padded), jnp.arange(room)[None, None] < len(ids))
    scores = self._sampler.picture_logps(
      self._inference.source.bundle.params, text, codes[None, None], Scoring(guidance=0.0)
    )
    return np.asarray(scores.logp[0, 0])


# A run.


def train(
  config: str | os.PathLike | ml_collections.ConfigDict | config_lib.Config,
  workdir: str | os.PathLike,
  overrides: Mapping[str, Any] | None = None,
) -> Run:
  """Trains a model on its own rewards, or resumes a run that was stopped.

  Ctrl-C finishes the step and saves; the same call resumes.

  Args:
    config: the name of a shipped config ('scenes'), a Python file with get_config(), or the object
      that such a file returns.
    workdir: the folder for all outputs of the run.
    overrides: new values of keys, such as {'method.steps': 40}.

  Raises:
    InputError: for every error that a user can fix; the workdir then holds its last good
      checkpoint.
  """
  if threading.current_thread() is not threading.main_thread():
    raise InputError(
      'train was called in a thread, where Ctrl-C does not arrive; call it in the main thread'
    )
  checked = cpu.divide(_config(config, overrides or {}))
  workdir = os.fspath(workdir)
  # Orbax logs a dozen lines per checkpoint.
  before = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    summary = train_lib.run(checked, workdir)
  finally:
    logging.set_verbosity(before)
  return Run(workdir, os.path.join(workdir, 'report.html'), files.read_json(summary))


def _config(config, overrides) -> config_lib.Config:
  if isinstance(config, ml_collections.ConfigDict):
    tree = config.to_dict()
  elif isinstance(config, config_lib.Config):
    tree = saved_config.to_json(config)
  elif isinstance(config, str | os.PathLike):
    tree = config_loading.read(os.fspath(config)).to_dict()
  else:
    raise InputError(
      f'config has the type {type(config).__name__}; pass the name of a config, such as '
      "'scenes', or a ConfigDict"
    )
  for key, value in overrides.items():
    *groups, name = str(key).split('.')
    node = tree
    for group in groups:
      # A group that does not exist is rejected below, by its name.
      node = node.setdefault(group, {})
      if not isinstance(node, dict):
        raise InputError(
          f'the config has no key {key}, because {group} is a value and not a group; leave out '
          'what follows it'
        )
    node[name] = value
  for key in overrides:
    config_loading.refuse_rate_of_others(str(key), saved_config.flat(tree))
  return config_loading.from_config_dict(tree)


# Arguments.


def _texts(name: str, given) -> list[str]:
  """One text or several as a list; InputError for anything else, or if one is empty."""
  texts = [given] if isinstance(given, str) else given
  if isinstance(texts, bytes) or not isinstance(texts, Iterable):
    raise InputError(f'{name} has the type {type(given).__name__}; pass a text')
  texts = list(texts)
  if not texts:
    raise InputError(f'{name} is empty; pass at least one text')
  for i, text in enumerate(texts):
    where = name.removesuffix('s') if isinstance(given, str) else f'{name}[{i}]'
    if not isinstance(text, str):
      raise InputError(f'{where} has the type {type(text).__name__}; convert it to a string')
    if not text.strip():
      raise InputError(f'{where} is empty; write at least one word')
    if not inputs.is_text(text):
      raise InputError(f'{where} is not UTF-8 text: {text!r}; write it in UTF-8')
  return texts


def _worth(description: Description) -> float:
  reward = description.reward_understanding
  return -math.inf if reward is None else reward


# Images.


def _readable(image):
  """What `images.load_image` takes: a path, an open file or a PIL image."""
  if isinstance(image, Drawing):
    return image.image
  if isinstance(image, str | os.PathLike | Image.Image) or hasattr(image, 'read'):
    return image
  try:
    array = np.asarray(image)
  except Exception as e:  # another library's array, on another device: its own error says why
    raise InputError(
      f'NumPy cannot read an image of type {type(image).__name__} ({e}); convert it to a file, a '
      'PIL image or a NumPy array'
    ) from e
  return _from_array(array)


def _from_array(array: np.ndarray) -> Image.Image:
  shape = array.shape[:2] + array.shape[2:] * (array.shape[2:] != (1,))
  if len(shape) not in (2, 3) or shape[2:] not in ((), (3,), (4,)) or 0 in shape:
    raise InputError(
      f'the image has the shape {array.shape}; pass one image of shape (height, width), '
      '(height, width, 3) or (height, width, 4), colors last'
    )
  array = array.reshape(shape)
  if array.dtype == np.uint16:
    array = array / 65535
  elif array.dtype == bool or jnp.issubdtype(array.dtype, jnp.floating):
    array = array.astype(np.float64)
    if not (array.min() >= 0 and array.max() <= 1):  # a NaN is in no range
      raise InputError(
        f'the image is an array of floats from {array.min():g} to {array.max():g}, which should be '
        'from 0 to 1; rescale it, or convert it to uint8'
      )
  elif array.dtype != np.uint8:
    raise InputError(
      f'the image is an array of {array.dtype}; convert it to uint8, uint16, or floats from 0 to 1'
    )
  if array.dtype != np.uint8:
    array = np.round(array * 255).astype(np.uint8)
  return Image.fromarray(array)
