"""The fixed list of a run: some of its prompts and images, drawn and described at every evaluation
with the same keys, and scored by the initial model.

The rewards that a training step logs come from different inputs each time and from a scorer that
changes, so their curve may fall while the model improves. Here only the model changes: the prompts,
images, keys and scorer stay the same. So before and after can be compared item by item, on the
terminal, on the page and on its sheet, for a run on any prompts and images.

The items, for prompts and for images:
- if the run holds some of its own out of training, those, and for named sets the first of their
  validation lists (`data.mixtures`);
- for Scenes, the first of the evaluation lists, which are never trained on;
- otherwise the first that the run trains on.

An item is identified by a hash of its content, so a run that resumes with changed data is compared
over the items that both sides have (`report.same_items`).

Axes: P prompts or images, S samples of a prompt, T tokens, H W pixels.
"""

from collections.abc import Callable
import hashlib
from typing import Any, NamedTuple

import jax
import numpy as np

from dsr_jax import chunks, sharding
from dsr_jax import rows as rows_lib
from dsr_jax import state as state_lib
from dsr_jax.data import order
from dsr_jax.evaluate import stats
from dsr_jax.evaluate.evaluator import with_interval
from dsr_jax.evaluate.sampler import QUESTION_TOKENS
from dsr_jax.inference import Sampler
from dsr_jax.models.unified import Scoring, Text
from dsr_jax.scenes import grammar, judge, sets
from dsr_jax.tasks import sampling_of

DARK = 0.2  # of full brightness: a pixel below this is dark
EDGE = 0.1  # of full brightness: a larger difference between neighbors is an edge
COLOR_LEVELS = 8  # per channel, for the entropy of colors
CHECKED = 256  # most prompts that are checked for words that the model does not know
GREY = 128


class Prompts(NamedTuple):
  """The prompts to draw. asked: their atoms, if the judge of Scenes knows them."""

  words: list[str]
  asked: list[grammar.Prompt] | None = None


class Pictures(NamedTuple):
  """The images to describe. scenes: what they show, if known."""

  pixels: np.ndarray  # (P, H, W, 3) uint8
  question: str
  scenes: list | None = None


class Watched(NamedTuple):
  """The result.

  Attributes:
    scores: flat numbers.
    rows: the values that they are means of, for pairing: (P, S) or (P, 1) as lists, and under
      `ITEMS` the items' hashes (P,).
    table: the samples, see `dsr_jax.rows`.
    unfamiliar: prompts far outside what the initial model knows, 'line 3 of prompts.txt: TEXT
      (-14.2)'; checked at step 0 of a run on the user's own prompts.
  """

  scores: dict[str, float]
  rows: dict[str, list]
  table: object
  unfamiliar: list[str]


# {score: (task, name of its rows)}. Rows of rewards have the task's name, all others the score's.
ITEMS = {'generation': 'watched_prompts', 'understanding': 'watched_pictures'}
ROWS = {
  'watched/reward_generation': ('generation', 'watched_generation'),
  'watched/reward_understanding': ('understanding', 'watched_understanding'),
  'watched/entropy_generation': ('generation', 'watched_entropy_generation'),
  'watched/entropy_understanding': ('understanding', 'watched_entropy_understanding'),
  'watched/similarity_generation': ('generation', 'watched_similarity_generation'),
  'watched/similarity_understanding': ('understanding', 'watched_similarity_understanding'),
  'watched/text_length': ('understanding', 'watched_text_length'),
  'watched/dark_pixels': ('generation', 'watched_dark_pixels'),
  'watched/edge_density': ('generation', 'watched_edge_density'),
  'watched/color_entropy': ('generation', 'watched_color_entropy'),
}


def of_run(config, model, batches, load: Callable[[], Any] | None = None):
  """The watcher of a run: (state, step) -> `Watched`; None if there is nothing to watch.

  model: `families.Model`. batches: as `data.sharded.ShardedBatches`. load: () -> the initial
  model's parameters, for a run on the user's own data if the state has no copy of them.
  """
  prompts = pictures = None
  if 'generation' in config.method.tasks:
    prompts = _prompts(config, batches)
  if 'understanding' in config.method.tasks:
    pictures = _pictures(config, batches)
  if prompts is None and pictures is None:
    return None
  return Watcher(config, model, batches, prompts, pictures, load)


class Watcher:
  """Draws and describes the fixed list with the model of a state. All processes must call it."""

  def __init__(self, config, model, batches, prompts, pictures, load):
    m, system = config.method, config.system
    self._config, self._family = config, model.family
    self._prompts, self._pictures = prompts, pictures
    self._eos, self._side = model.spec.eos_id, model.spec.image_size
    self._rules, self._dtype = model.family.sharding_rules, system.compute_dtype
    self._is_own = config.eval.benchmark == 'own'
    self._load = load if self._is_own else None
    self._scoring = Scoring(chunk=system.logprob_chunk)
    self._sampling = sampling_of(m, system)

    def sampler(number):
      # In Scenes the programs are those of the evaluation, so this list needs no compilation.
      on_scenes = config.eval.benchmark == 'scenes'
      chunk = config.eval.chunk if on_scenes else min(number, chunks.size(system.rollout_chunk, m))
      return Sampler(model.graphdef, model.processor, chunk=chunk, seed=config.eval.seed)

    if prompts is not None:
      self._drawer = sampler(len(prompts.words))
      # In Scenes, padded to the evaluation's length. Some more of a user's own prompts are checked
      # by the same program.
      is_scenes = prompts.asked is not None
      self._checked = _checked(batches) if self._is_own and not is_scenes else []
      self._texts = self._drawer.prompts(
        [*prompts.words, *(text for _, text in self._checked)],
        config.data.max_prompt_tokens if is_scenes else None,
      )
    if pictures is not None:
      self._reader = sampler(len(pictures.pixels))

    def as_sampled(params):
      return sharding.gather_for_rollout(state_lib.cast(params, self._dtype), self._rules)

    self._as_sampled = jax.jit(as_sampled)

  def __call__(self, state, step: int) -> Watched:
    """The fixed list by the model of `state`, scored by the initial model if the state has it or
    it can be loaded.
    """
    initial = self._initial(state)
    values, rows, found, unfamiliar = {}, {}, [], []
    if self._prompts is not None:
      params = self._ready(state_lib.policy_params(state, self._family))
      drawn, measured = self._draw(params, initial)
      found.append(drawn)
      values |= measured
      rows[ITEMS['generation']] = [_hash(text.encode()) for text in self._prompts.words]
      if not step and initial is not None:
        unfamiliar = self._unfamiliar(initial)
    if self._pictures is not None:
      params = self._ready(state_lib.policy_params(state, self._family, 'understander'))
      written, measured = self._describe(params, initial)
      found.append(written)
      values |= measured
      rows[ITEMS['understanding']] = [_hash(x.tobytes()) for x in self._pictures.pixels]
    for one in found:
      if one.rewards is not None:
        values[f'watched/reward_{one.task}'] = one.rewards
    scores = {}
    for name, each in values.items():
      rows[ROWS[name][1]] = np.asarray(each, float).tolist()
      found_sums = row_sums(each)
      if 'reward' in name:
        scores |= with_interval(name, stats.estimate(found_sums, mean_of_rows))
      else:
        scores[name] = float(mean_of_rows(found_sums.sum(axis=0)[None])[0])
    return Watched(scores, rows, rows_lib.table(step, found), unfamiliar)

  def _initial(self, state):
    """The initial model's parameters, or None."""
    ref_params, method = state.ref_params, self._config.method
    if ref_params is None and self._load is None:
      return None
    if ref_params is None:
      ref_params = state_lib.initial_params(
        self._load(), state, self._family, method, self._config.system
      )
    return self._ready(state_lib.joined(self._family, state.fixed_params, ref_params))

  def _ready(self, params):
    """Parameters in the form that a training step samples with; the image tokenizer unchanged."""
    codec = {self._family.image_tokenizer: params[self._family.image_tokenizer]}
    return {**self._as_sampled({k: v for k, v in params.items() if k not in codec}), **codec}

  def _draw(self, params, initial) -> tuple[rows_lib.Candidates, dict]:
    prompts = self._prompts
    text = self._text(0, len(prompts.words))
    samples = self._drawer.sample_pictures(
      params,
      text,
      group=self._config.eval.images_per_prompt,
      how=self._sampling,
    )
    rewards = right = reasons = None
    if initial is not None:
      rewards = self._rewards(initial, text, samples.codes)
    if prompts.asked is not None:
      readings = judge.read(samples.pixels.reshape(-1, *samples.pixels.shape[2:]))
      each = self._config.eval.images_per_prompt
      said = [judge.reasons(prompts.asked[i // each], r) for i, r in enumerate(readings)]
      right = np.array([not found for found in said]).reshape(-1, each)
      said = ['; '.join(found) for found in said]
      reasons = [said[i : i + each] for i in range(0, len(said), each)]
    drawn = rows_lib.Candidates(
      task='generation',
      prompts=prompts.words,
      codes=samples.codes,
      pixels=samples.pixels,
      rewards=rewards,
      right=right,
      reasons=reasons,
    )
    entropy = -np.mean(samples.logps, axis=-1, dtype=np.float64)
    values = {'watched/entropy_generation': entropy, **guard(samples.pixels)}
    if samples.codes.shape[1] > 1:
      values['watched/similarity_generation'] = _alike(samples.codes)[:, None]
    return drawn, values

  def _text(self, start: int, stop: int) -> Text:
    return Text(*(x[start:stop] for x in self._texts))

  def _rewards(self, initial, text: Text, codes):
    """R_G (P, S) of images by codes (P, S, N), by the initial model."""
    ids, mask = self._drawer.questions([self._config.method.instruction])
    instruction = Text(ids[0], mask[0])
    return self._drawer.read_prompts(initial, text, codes, instruction, self._scoring)[0]

  def _unfamiliar(self, initial) -> list[str]:
    """Prompts far outside what the initial model knows: those much less likely than the others,
    given a gray image.
    """
    number = len(self._checked)
    if not number:
      return []
    grey = np.full((1, self._side, self._side, 3), GREY, np.uint8)
    codes = self._drawer.encode(initial, grey)
    codes = np.broadcast_to(
      codes[:, None], (number, self._config.eval.images_per_prompt, codes.shape[-1])
    )
    first = len(self._prompts.words)
    rewards = self._rewards(initial, self._text(first, first + number), codes)
    far, usual = stats.unfamiliar(rewards)
    return [
      f'{where}: {text} ({max(of_text):.1f} nats per token; the best quarter is above {usual:.1f})'
      for (where, text), of_text, is_far in zip(self._checked, rewards, far)
      if is_far
    ]

  def _describe(self, params, initial) -> tuple[rows_lib.Candidates, dict]:
    pictures = self._pictures
    number = len(pictures.pixels)
    question = self._reader.questions([pictures.question])
    length = max(QUESTION_TOKENS, question.ids.shape[1])
    question = self._reader.questions([pictures.question] * number, length)
    written = self._reader.sample_texts(
      params,
      pictures.pixels,
      question,
      group=1,
      how=self._sampling,
    )
    codes = self._reader.encode(params, pictures.pixels)
    texts = Text(written.ids, written.mask)
    rewards = None
    if initial is not None:
      rewards = self._reader.score_texts(initial, codes, texts, self._scoring, eos_id=self._eos)
    words = [self._reader.words(*group) for group in zip(*texts)]
    right = reasons = None
    if pictures.scenes is not None:
      counts = [
        [judge.count_atoms(text, scene) for text in group]
        for group, scene in zip(words, pictures.scenes)
      ]
      right = np.array([[c.parsed and c.right == c.stated for c in group] for group in counts])
      reasons = [[_what_is_wrong(c) for c in group] for group in counts]
    tokens = [
      [ids[mask & (ids != self._eos)].tolist() for ids, mask in zip(*group)]
      for group in zip(*texts)
    ]
    described = rows_lib.Candidates(
      task='understanding',
      prompts=[pictures.question] * number,
      codes=codes,
      pixels=pictures.pixels,
      rewards=rewards,
      texts=words,
      tokens=tokens,
      right=right,
      reasons=reasons,
    )
    logps = np.where(written.mask, written.logps, 0.0).sum(axis=-1, dtype=np.float64)
    values = {
      'watched/text_length': np.array([[len(one) for one in group] for group in tokens]),
      'watched/entropy_understanding': -logps / np.maximum(written.mask.sum(axis=-1), 1),
    }
    if number > 1:
      said = [group[0] for group in words]
      alike = [(said.count(text) - 1) / (number - 1) for text in said]
      values['watched/similarity_understanding'] = np.array(alike)[:, None]
    return described, values


# The items.


def _prompts(config, batches) -> Prompts | None:
  number = config.eval.watched
  if config.data.prompts == 'scenes':
    if not number:
      return None
    asked = sets.mixed_prompts(number)
    return Prompts([prompt.text for prompt in asked], asked)
  apart = batches.prompts.measured
  if apart is not None:
    return Prompts([apart[i] for i in range(len(apart))])
  return Prompts(batches.texts_at(0)[:number]) if number else None


def _pictures(config, batches) -> Pictures | None:
  """The images, and the question that the run asks about them."""
  number, m = config.eval.watched, config.method
  if config.data.images == 'scenes':
    if not number:
      return None
    scenes = sets.evaluation_scenes(number)
    return Pictures(sets.pictures(scenes), m.question, scenes)
  apart = batches.pictures.measured
  if apart is not None:
    return Pictures(apart.take(range(len(apart))), m.question)
  if not number:
    return None
  # With `separate`, the understander's first turn comes after the generator's.
  first = m.separate.swap_every if m.strategy == 'separate' else 0
  pixels = sharding.fetch(batches.at(first).understanding.pixels)
  return Pictures(np.asarray(pixels)[:number], m.question)


def _checked(batches) -> list[tuple[str, str]]:
  """(location, text) of up to CHECKED different prompts of the run."""
  texts = batches.prompts.everything
  places = {texts[i]: i for i in reversed(range(len(texts)))}
  places = sorted(places.values())
  return [(texts.where(places[i]), texts[places[i]]) for i in order.choice(0, len(places), CHECKED)]


def _what_is_wrong(counts: judge.TextCounts) -> str:
  if not counts.parsed:
    return 'not a text of Scenes'
  wrong = counts.stated - counts.right
  return f'{wrong} of {counts.stated} statements are wrong' if wrong else ''


# Numbers.


def row_sums(values) -> np.ndarray:
  """Values (P, S) -> (P, 2): each item's sum and count."""
  values = np.asarray(values, float)
  return np.stack([values.sum(axis=1), np.full(len(values), values.shape[1])], axis=1)


def mean_of_rows(sums):
  """Sums (R, 2) of `row_sums` -> means (R,)."""
  return sums[:, 0] / sums[:, 1]


def guard(pixels) -> dict[str, np.ndarray]:
  """Signs of reward hacking: images that are all dark, without edges, or of one color.

  pixels (P, S, H, W, 3) uint8 -> dark_pixels (share), edge_density (share of neighboring pixels
  that differ), color_entropy (nats, of the image's colors in 8 levels per channel), each (P, S).
  """
  light = pixels.astype(np.float32).mean(axis=-1) / 255
  across = np.abs(np.diff(light, axis=-1)) > EDGE
  down = np.abs(np.diff(light, axis=-2)) > EDGE
  levels = pixels // (256 // COLOR_LEVELS)
  colors = (levels[..., 0] * COLOR_LEVELS + levels[..., 1].astype(int)) * COLOR_LEVELS
  colors = (colors + levels[..., 2]).reshape(*pixels.shape[:2], -1)
  return {
    'watched/dark_pixels': (light < DARK).mean(axis=(-1, -2)),
    'watched/edge_density': (across.mean(axis=(-1, -2)) + down.mean(axis=(-1, -2))) / 2,
    'watched/color_entropy': np.array([[_entropy(one) for one in group] for group in colors]),
  }


def _entropy(values) -> float:
  _, counts = np.unique(values, return_counts=True)
  share = counts / counts.sum()
  return float(-(share * np.log(share)).sum())


def _alike(codes) -> np.ndarray:
  """Image codes (P, S, N) -> the share of equal codes in two images for a prompt, (P,)."""
  samples = codes.shape[1]
  pairs = [(i, j) for i in range(samples) for j in range(i)]
  return np.mean([(codes[:, i] == codes[:, j]).mean(axis=-1) for i, j in pairs], axis=0)


def _hash(content: bytes) -> str:
  """The identity of an item."""
  return hashlib.sha256(content).hexdigest()[:16]
