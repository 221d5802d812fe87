"""One loaded model, drawing, describing and scoring, for the commands.

Every candidate is scored by itself, one row at a time, whoever asks: so a picture has bit for bit
the same reward when it is drawn and when its codes are scored again.

Axes: T text tokens, N image codes, H W pixels; numbers of candidates are written out.
"""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.convert.locate import Source
from dsr_jax.errors import InputError
from dsr_jax.models.janus import model as janus
from dsr_jax.models.janus import processor as processor_lib
from dsr_jax.models.unified import Picture, Sampling, Scoring, Text, row_keys

CHUNK = 16  # candidates sampled at once; the result does not depend on it beyond float rounding
BUCKET = 64  # texts are padded to multiples of this, so that not every length is compiled anew


@dataclasses.dataclass(frozen=True)
class Scores:
  """Both reversed likelihoods of one pair, in nats; the rewards are means over tokens, at
  temperature 1, unguided.

  text_logps (T,): of the text's content tokens given the picture. image_logps (N,): of the codes
  given the text.
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
  """A model of `model_source.resolve`, with its parameters on the default device."""

  def __init__(self, source: Source):
    self.source = source
    self.config = source.bundle.config
    self.processor = source.bundle.processor
    self._params = jax.device_put(source.bundle.params)

  def encode(self, text: str, what: str) -> list[int]:
    """Content ids of a text (no end of sentence). Errors: InputError if it is empty or does not fit
    the model.
    """
    t = self.config.templates
    frame = (
      len(t.understanding_prefix + t.understanding_infix + t.understanding_suffix)
      + self.config.num_codes
    )
    room = self.config.text.max_position_embeddings - frame - self.config.vision.num_patches
    encode = self.processor.encode_question if what == 'question' else self.processor.encode_prompt
    ids = encode(text)
    if len(ids) > room:
      raise InputError(
        f'found a {what} of {len(ids)} tokens; expected at most {room}, which this model has room '
        'for; '
        'shorten it'
      )
    return ids

  def read_image(self, path: str) -> np.ndarray:
    """A file as the square picture that the model reads: (H, W, 3) float32 in [-1, 1]."""
    image = processor_lib.load_image(path)
    return processor_lib.to_float(
      processor_lib.preprocess(image, self.config.image_size, mode=self.source.method.crop)
    )

  def draw(self, prompt: list[int], number: int, *, temperature: float, guidance: float, seed: int):
    """Samples pictures: codes (number, N) int32 and their log-probabilities (number, N) as they
    were sampled.
    """
    how = Sampling(temperature=temperature, guidance=guidance, segment=64)

    def sample(keys):
      return _draw(self._params, _text(prompt), keys, config=self.config, how=how)

    codes, logps = zip(*(sample(keys) for keys in _keys(seed, number)))
    return _joined(codes), _joined(logps)

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
    """Samples texts of a picture (H, W, 3): a list of (ids (T,), logps (T,)), with the end of
    sentence if it came.
    """
    how = Sampling(temperature=temperature, max_tokens=max_tokens, segment=64)
    texts = []
    for keys in _keys(seed, number):
      text, logps = jax.device_get(
        _describe(self._params, pixels[None], _text(question), keys, config=self.config, how=how)
      )
      texts += [
        (ids[mask], logp[mask]) for ids, mask, logp in zip(text.ids[0], text.mask[0], logps[0])
      ]
    return texts

  def decode(self, codes: np.ndarray) -> np.ndarray:
    """Codes (N,) -> pixels (H, W, 3) float32 in [-1, 1]."""
    return np.asarray(_decode(self._params, codes[None], config=self.config))[0]

  def tokenize(self, pixels: np.ndarray) -> np.ndarray:
    """Pixels (H, W, 3) -> codes (N,) int32."""
    return np.asarray(_tokenize(self._params, pixels[None], config=self.config))[0]

  def score(
    self, text: list[int], codes: np.ndarray, pixels: np.ndarray, instruction: list[int]
  ) -> Scores:
    """Scores one pair of a text's content ids and a picture, codes (N,) and pixels (H, W, 3)."""
    picture = Picture(jnp.asarray(codes)[None, None], jnp.asarray(pixels)[None, None])
    text_logps, image_logps = _score(
      self._params, _text(text), picture, _text(instruction), config=self.config
    )
    return Scores(np.asarray(text_logps)[: len(text)], np.asarray(image_logps))


def _model(params, config):
  return nnx.merge(janus.graphdef_of(config), params)


@functools.partial(jax.jit, static_argnames=('config', 'how'))
def _draw(params, prompt, keys, *, config, how):
  return _model(params, config).sample_pictures(prompt, keys, how)


@functools.partial(jax.jit, static_argnames=('config', 'how'))
def _describe(params, pixels, question, keys, *, config, how):
  codes = jnp.zeros((1, config.num_codes), jnp.int32)  # texts are sampled from pixels alone
  return _model(params, config).sample_texts(Picture(codes, pixels), question, keys, how)


@functools.partial(jax.jit, static_argnames='config')
def _decode(params, codes, *, config):
  return _model(params, config).picture_from_codes(codes).pixels


@functools.partial(jax.jit, static_argnames='config')
def _tokenize(params, pixels, *, config):
  return _model(params, config).picture_from_pixels(pixels).codes


@functools.partial(jax.jit, static_argnames='config')
def _score(params, text, picture, instruction, *, config):
  model = _model(params, config)
  key, how = jax.random.key(0)[None, None], Scoring()  # Janus' likelihood takes no chance
  candidate = Text(text.ids[:, None], text.mask[:, None])
  text_scores = model.text_logps(picture, instruction, candidate, key, how)
  image_scores = model.picture_logps(candidate, picture.codes, key, how)
  return text_scores.logp[0, 0], image_scores.logp[0, 0]


def _text(ids):
  """One row: (1, T), T a multiple of BUCKET."""
  room = -(-len(ids) // BUCKET) * BUCKET
  return Text(
    jnp.asarray([ids + [0] * (room - len(ids))], jnp.int32), jnp.arange(room)[None] < len(ids)
  )


def _keys(seed, number):
  """The candidates' keys in chunks (1, at most CHUNK)."""
  key = jax.random.key(seed)
  return [row_keys(key, first, 1, min(CHUNK, number - first)) for first in range(0, number, CHUNK)]


def _joined(chunks):
  return np.concatenate([np.asarray(chunk)[0] for chunk in chunks])
