"""The model under test on the mesh, and the programs that draw and answer with it.

Random keys are a function of the benchmark, the prompt or question, and the sample, so they do not
depend on devices, chunks, `--limit` or what else is asked.

Axes: B prompts or rows of images, G candidates of a prompt, N image codes, P images of a row, Q
questions of a row, T text tokens, H W pixels.
"""

import dataclasses
import functools
from typing import NamedTuple
import zlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax import config as config_lib
from dsr_jax import convert, families, images, sharding
from dsr_jax.convert import locate
from dsr_jax.models.common import lora
from dsr_jax.models.unified import Sampling, Scoring, Text, picture_to_read, score_keys
from dsr_jax.rewards import dual
from dsr_jax.runtime import checkpoints

CHUNK = 32  # candidates or answers at a time, unless a configuration is given
MAX_TOKENS = 2048  # of an answer, as in VLMEvalKit
SEGMENT = 64  # tokens between extensions of the cache, and between checks whether all have ended
SHORT_SEGMENT = 4  # the same for one-word answers
CROP = 'pad'  # as in Janus's training on descriptions, and as in VLMEvalKit


@dataclasses.dataclass(frozen=True)
class How:
  """How a model draws and answers, as recorded in the manifest.

  Attributes:
    temperature, guidance, cfg_interval: for images; the temperature also for answers that are the
      best of several. Other answers are greedy.
    seed: of all random keys.
    best_of: how many candidates each image is chosen from, by R_G, and each answer to an open
      question, by R_U.
    max_tokens: of an answer.
    instruction: what the model is asked in R_G.
    template: the role strings.
    precision: of the weights and the computation.
    sampling_steps, sampling_noise: for a sampler that unmasks images; -1: the model's own.
  """

  temperature: float
  guidance: float
  cfg_interval: int
  seed: int
  best_of: int
  max_tokens: int
  instruction: str
  template: str
  precision: str
  sampling_steps: int = -1
  sampling_noise: float = -1.0


class Drawn(NamedTuple):
  """Images for B prompts: codes (B, G, N) int32, pixels (B, G, H, W, 3) float32 in [-1, 1], R_G
  (B, G).
  """

  codes: np.ndarray
  pixels: np.ndarray
  rewards: np.ndarray


class Written(NamedTuple):
  """Answers to K questions about each of B rows of images, or K candidate answers to one question:
  ids (B, K, T) int32, mask (B, K, T) bool, log-probabilities (B, K, T); R_U (B, K) of candidates.
  """

  ids: np.ndarray
  mask: np.ndarray
  logps: np.ndarray
  rewards: np.ndarray | None = None


class Subject:
  """A model under test.

  Attributes:
    name: as the user named it.
    model: the `families.Model`; its parameters are on the mesh.
    how: `How`.
    identity: as recorded in the manifest: {'name', 'weights', 'trained'}.
    chunk: candidates or answers at a time, a multiple of the number of ways that rows are split.
  """

  def __init__(self, name: str, model: families.Model, how: How, identity: dict, chunk: int, mesh):
    self.name, self.model, self.how, self.identity = name, model, how, identity
    ways = sharding.ways(mesh.shape)
    self.chunk = -(-chunk // ways) * ways
    self._ways = ways

  def rows(self, each: int) -> int:
    """The number of rows in a chunk, if a row has `each` candidates or answers."""
    return -(-max(self.chunk // each, 1) // self._ways) * self._ways

  def roles(self) -> dict[str, str]:
    """The strings around a prompt and a question, decoded by the model's tokenizer."""
    templates = self.model.processor.templates
    tokenizer = getattr(self.model.processor, 'tokenizer', None)
    parts = {
      name: value
      for name, value in vars(templates).items()
      if name.endswith(('prefix', 'infix', 'suffix'))
    }
    return {name: tokenizer.decode(list(ids)) for name, ids in parts.items()} if tokenizer else {}

  # Drawing.

  def prompts(self, texts) -> Text:
    """B prompts -> ids (B, T)."""
    encode = self.model.processor.encode_prompt
    return self.model.processor.pad([encode(text) for text in texts])

  def draw(self, prompt: Text, words: np.ndarray, group: int):
    """Starts to draw `group` candidates for each of B prompts; returns the arrays of a `Drawn`, on
    the devices.

    words: (B,) uint32, from `word`.
    """
    how = Sampling(
      temperature=self.how.temperature,
      guidance=self.how.guidance,
      segment=SEGMENT,
      cfg_interval=self.how.cfg_interval,
    )
    asked = self.model.processor.encode_question(self.how.instruction)
    instruction = self.model.processor.pad([asked])
    return Drawn(
      *_draw(
        self.model.graphdef,
        self.model.family.sharding_rules,
        self.model.params,
        prompt,
        words,
        np.uint32(self.how.seed),
        Text(instruction.ids[0], instruction.mask[0]),
        group=group,
        how=how,
      )
    )

  # Asking.

  def turns(self, texts) -> list[list[int]]:
    """For each text, the token ids of what follows the images in the user's turn."""
    return [self.model.processor.encode_turn(text) for text in texts]

  def square(self, picture) -> np.ndarray:
    """A PIL image as the model reads it, (H, W, 3) uint8."""
    return images.preprocess(picture, self.model.spec.image_size, mode=CROP)

  def answer(self, pixels, shown, question: Text, words, max_tokens: int):
    """Starts to answer greedily; returns the arrays of a `Written`, on the devices.

    pixels (B, P, H, W, 3) uint8, shown (B, P) bool, question (B, Q, Tq), words (B, Q) uint32.
    """
    segment = SHORT_SEGMENT if max_tokens < SEGMENT else SEGMENT
    how = Sampling(temperature=0.0, max_tokens=max_tokens, segment=segment)
    fixed = self.model.graphdef, self.model.family.sharding_rules, self.model.params
    seed = np.uint32(self.how.seed)
    return Written(*_answer(*fixed, pixels, shown, question, words, seed, how=how))

  def answer_best(self, pixels, question: Text, words, max_tokens: int):
    """Starts to sample candidate answers; returns the arrays of a `Written`, on the devices.

    pixels (B, H, W, 3) uint8, question (B, Tq), words (B,).
    """
    how = Sampling(
      temperature=self.how.temperature, max_tokens=max_tokens, segment=min(SEGMENT, max_tokens)
    )
    fixed = self.model.graphdef, self.model.family.sharding_rules, self.model.params
    seed, group = np.uint32(self.how.seed), self.how.best_of
    return Written(*_answer_best(*fixed, pixels, question, words, seed, group=group, how=how))

  def words_of(self, ids, mask) -> str:
    """(T,) ids of an answer -> its text."""
    return self.model.processor.decode(ids[mask])


def word(benchmark: str, identity: str) -> int:
  """The number from which the keys of a prompt or question are folded."""
  return zlib.crc32(f'{benchmark}/{identity}'.encode())


def _keys(seed, words, group: int):
  """One key per candidate: words (B,) -> (B, G). `_draw` and both `_answer`s use the same keys."""

  def of_word(w):
    mine = jax.random.fold_in(jax.random.key(seed), w)
    return jax.vmap(lambda i: jax.random.fold_in(mine, i))(jnp.arange(group))

  return jax.vmap(of_word)(words)


# Programs.


@functools.partial(jax.jit, static_argnames=('graphdef', 'rules', 'group', 'how'))
def _draw(graphdef, rules, params, prompt, words, seed, instruction, *, group, how):
  model = nnx.merge(graphdef, sharding.gather_for_rollout(params, rules))
  keys = _keys(seed, words, group)
  codes, _ = model.sample_pictures(prompt, keys, how)
  pictures = model.picture_from_codes(codes)
  rewards, _ = dual.generation(
    model, pictures, prompt, instruction, Scoring(), keys=score_keys(model, keys)
  )
  return codes, pictures.pixels, rewards


@functools.partial(jax.jit, static_argnames=('graphdef', 'rules', 'how'))
def _answer(graphdef, rules, params, pixels, shown, question, words, seed, *, how):
  model = nnx.merge(graphdef, sharding.gather_for_rollout(params, rules))
  reading = model.read(picture_to_read(model, images.to_float(pixels)), shown)
  keys = _keys(seed, words.reshape(-1), 1).reshape(words.shape)
  text, logps = model.answer(reading, question, keys, how)
  return text.ids, text.mask, logps


@functools.partial(jax.jit, static_argnames=('graphdef', 'rules', 'group', 'how'))
def _answer_best(graphdef, rules, params, pixels, question, words, seed, *, group, how):
  model = nnx.merge(graphdef, sharding.gather_for_rollout(params, rules))
  picture = model.picture_from_pixels(images.to_float(pixels))
  shown = jax.tree.map(lambda x: x[:, None], picture)
  reading = model.read(shown, jnp.ones((pixels.shape[0], 1), bool))
  keys = _keys(seed, words, group)
  again = Text(*(jnp.repeat(x[:, None], group, axis=1) for x in question))
  text, logps = model.answer(reading, again, keys, how)
  rewards, _ = dual.understanding(
    model,
    picture.codes,
    text,
    Scoring(),
    eos_id=model.spec.eos_id,
    keys=score_keys(model, keys),
  )
  return text.ids, text.mask, logps, rewards


# Loading.


class Wishes(NamedTuple):
  """How the user wants models to draw and answer.

  config: `config.Config`, whose method and system are used, or None for the model's own method, in
    float32 on a CPU and bfloat16 elsewhere. best_of, max_tokens: see `How`. template: '' for the
    model's own. base: for runs, where the model that they started from is now.
  """

  config: config_lib.Config | None = None
  best_of: int = 1
  max_tokens: int = MAX_TOKENS
  template: str = ''
  base: str = ''


def mesh_of(wishes: Wishes):
  """The mesh of all devices."""
  system = wishes.config.system if wishes.config else config_lib.System()
  return sharding.make_mesh(system.mesh)


def load(name: str, wishes: Wishes, mesh) -> Subject:
  """Loads a model onto the mesh, each leaf directly in its layout and precision.

  Errors: InputError if there is no such model, or its files are damaged.
  """
  located = locate.locate(name, locate.base_for(name, wishes.base, several=True))
  method = locate.method_of(located)
  if wishes.config:
    locate.note_other_settings(wishes.config, located)
  bundle = convert.load(located.directory, lambda leaf: leaf)
  of_config = wishes.config.method.template if wishes.config else ''
  bundle = families.with_template(bundle, wishes.template or of_config or method.template)
  identity = {'name': name, 'weights': bundle.source['hash'], 'trained': ''}
  if located.workdir:
    locate.check_base(located, bundle.source['hash'])
    identity['trained'] = checkpoints.fingerprint(located.trained)
  if wishes.config:
    method = wishes.config.method
  model = families.model_of(bundle, name, method)
  sharding.check_fits(mesh.shape, model.family.num_heads(model.config), {})
  how = _how(model, method, wishes)
  model.params = _placed(model, located.trained, how.precision, mesh)
  chunk = wishes.config.eval.chunk if wishes.config else CHUNK
  return Subject(name, model, how, identity, chunk, mesh)


def _how(model, method, wishes) -> How:
  config = wishes.config
  seed, precision = 0, 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  if config:
    seed, precision = config.eval.seed, config.system.compute_dtype
  return How(
    temperature=method.temperature,
    guidance=method.guidance,
    cfg_interval=method.cfg_interval,
    seed=seed,
    best_of=wishes.best_of,
    max_tokens=wishes.max_tokens,
    instruction=method.instruction,
    template=model.template,
    precision=precision,
    sampling_steps=method.sampling_steps,
    sampling_noise=method.sampling_noise,
  )


def _placed(model, trained, precision, mesh):
  """The parameters on the mesh: placed in float32 leaf by leaf, then cast to their precision."""
  adapters = trained.get('lora')
  base = model.params if adapters else locate.merged(model.params, trained)
  layout = sharding.shardings(model.family.shapes(model.config), mesh, model.family.sharding_rules)

  def put(name):
    def one(leaf, where):
      x = sharding.place(leaf, where)
      return x if name == model.family.image_tokenizer else x.astype(precision)

    return one

  if not adapters:
    return {name: jax.tree.map(put(name), part, layout[name]) for name, part in base.items()}
  # Adapters are merged into float32 kernels.
  placed = sharding.place(base, layout)
  fold = jax.jit(
    functools.partial(_folded, model.family, precision), out_shardings=layout, donate_argnums=0
  )
  return fold(placed, adapters)


def _folded(family, precision, params, adapters):
  whole = lora.merged(params, family.lora_targets, adapters)
  return {
    name: part
    if name == family.image_tokenizer
    else jax.tree.map(lambda x: x.astype(precision), part)
    for name, part in whole.items()
  }
