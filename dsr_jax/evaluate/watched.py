"""The fixed list of a run: some of its prompts and pictures, drawn and described again and again
with the same keys, and scored by the initial model.

A step's own rewards are of other inputs each time, by a model that moves: their curve may fall
while the model improves. Here nothing changes but the model: the same prompts, the same pictures,
the same keys, a scorer that stands still. So before and after are compared item by item, on the
terminal, on the page and in its picture, for a run on anybody's prompts and pictures.

In Scenes the items are the first of the evaluation lists, never trained on. Elsewhere they are the
first that the run trains on.

Axes: P prompts or pictures, S samples of a prompt, T tokens, H W pixels.
"""

import functools
from typing import NamedTuple

import jax
import numpy as np

from dsr_jax import chunks, sharding
from dsr_jax import rows as rows_lib
from dsr_jax import state as state_lib
from dsr_jax.evaluate import stats
from dsr_jax.evaluate.evaluator import with_interval
from dsr_jax.evaluate.sampler import QUESTION_TOKENS
from dsr_jax.inference import Sampler
from dsr_jax.models.unified import Sampling, Scoring, Text
from dsr_jax.scenes import grammar, judge, sets

DARK = 0.2  # of full brightness: a pixel below is dark
EDGE = 0.1  # of full brightness between neighbors: more is an edge
COLOR_LEVELS = 8  # a channel, for the entropy of colors


class Prompts(NamedTuple):
  """What is drawn. asked: their atoms where the judge of Scenes knows them."""

  words: list[str]
  text: Text  # (P, T)
  asked: list[grammar.Prompt] | None = None


class Pictures(NamedTuple):
  """What is described. scenes: what they show where that is known."""

  pixels: np.ndarray  # (P, H, W, 3) uint8
  question: str
  scenes: list | None = None


class Watched(NamedTuple):
  """What came out: flat scores, rows (P, S) of rewards to be paired, and the table of `rows`."""

  scores: dict[str, float]
  rows: dict[str, list]
  table: object


def of_run(config, model, batches):
  """The watcher of a run: (state, step) -> `Watched`; None where nothing is to be watched.

  model: `families.Model`. batches: `at(step)`, as a run has them.
  """
  return Watcher(config, model, batches) if config.eval.watched else None


class Watcher:
  """Draws and describes the fixed list with the model of a state. In several processes all call."""

  def __init__(self, config, model, batches):
    m, system = config.method, config.system
    self._config, self._family = config, model.family
    self._eos = model.spec.eos_id
    self._rules, self._dtype = model.family.sharding_rules, system.compute_dtype
    self._scoring = Scoring(chunk=system.logprob_chunk)
    self._sampling = functools.partial(
      Sampling,
      temperature=m.temperature,
      segment=system.decode_segment,
      scan=system.decode_scan,
      cache_dtype=system.cache_dtype,
      chunk=system.logprob_chunk,
    )
    # In Scenes the programs are the evaluation's: nothing is compiled for this list's drawing.
    on_scenes = config.eval.benchmark == 'scenes'
    number = min(config.eval.watched, chunks.size(system.rollout_chunk, m))
    self._sampler = Sampler(
      model.graphdef,
      model.processor,
      chunk=config.eval.chunk if on_scenes else number,
      seed=config.eval.seed,
    )
    self._prompts = self._pictures = None
    if 'generation' in m.tasks:
      self._prompts = _prompts(config, self._sampler, batches)
    if 'understanding' in m.tasks:
      self._pictures = _pictures(config, batches)

    def as_sampled(params):
      return sharding.gather_for_rollout(state_lib.cast(params, self._dtype), self._rules)

    self._as_sampled = jax.jit(as_sampled)

  def __call__(self, state, step: int) -> Watched:
    """The fixed list by the model of `state`, scored by the initial model where the state has
    one.
    """
    initial = None
    if state.ref_params is not None:
      initial = self._ready(state_lib.joined(self._family, state.fixed_params, state.ref_params))
    scores, rows, found = {}, {}, []
    if self._prompts is not None:
      params = self._ready(state_lib.policy_params(state, self._family))
      drawn = self._draw(params, initial)
      scores |= guard(drawn.pixels)
      found.append(drawn)
    if self._pictures is not None:
      params = self._ready(state_lib.policy_params(state, self._family, 'understander'))
      written = self._describe(params, initial)
      lengths = [len(tokens) for group in written.tokens for tokens in group]
      scores['watched/text_length'] = float(np.mean(lengths))
      found.append(written)
    for one in found:
      if one.rewards is not None:
        name = f'watched/reward_{one.task}'
        rows[f'watched_{one.task}'] = one.rewards.tolist()
        scores |= with_interval(name, stats.estimate(reward_sums(one.rewards), mean_reward))
    return Watched(scores, rows, rows_lib.table(step, found))

  def _ready(self, params):
    """Parameters as the step samples with them; the image tokenizer as it is."""
    codec = {self._family.image_tokenizer: params[self._family.image_tokenizer]}
    return {**self._as_sampled({k: v for k, v in params.items() if k not in codec}), **codec}

  def _draw(self, params, initial) -> rows_lib.Candidates:
    m, prompts = self._config.method, self._prompts
    samples = self._sampler.sample_pictures(
      params,
      prompts.text,
      group=self._config.eval.images_per_prompt,
      how=self._sampling(guidance=m.guidance, cfg_interval=m.cfg_interval),
    )
    rewards = right = reasons = None
    if initial is not None:
      ids, mask = self._sampler.questions([m.instruction])
      instruction = Text(ids[0], mask[0])
      rewards, _ = self._sampler.read_prompts(
        initial, prompts.text, samples.codes, instruction, self._scoring
      )
    if prompts.asked is not None:
      readings = judge.read(samples.pixels.reshape(-1, *samples.pixels.shape[2:]))
      each = self._config.eval.images_per_prompt
      said = [judge.reasons(prompts.asked[i // each], r) for i, r in enumerate(readings)]
      right = np.array([not found for found in said]).reshape(-1, each)
      said = ['; '.join(found) for found in said]
      reasons = [said[i : i + each] for i in range(0, len(said), each)]
    return rows_lib.Candidates(
      task='generation',
      prompts=prompts.words,
      codes=samples.codes,
      pixels=samples.pixels,
      rewards=rewards,
      right=right,
      reasons=reasons,
    )

  def _describe(self, params, initial) -> rows_lib.Candidates:
    m, pictures = self._config.method, self._pictures
    number = len(pictures.pixels)
    question = self._sampler.questions([pictures.question])
    length = max(QUESTION_TOKENS, question.ids.shape[1])
    question = self._sampler.questions([pictures.question] * number, length)
    written = self._sampler.sample_texts(
      params,
      pictures.pixels,
      question,
      group=1,
      how=self._sampling(max_tokens=m.max_text_tokens),
    )
    codes = self._sampler.encode(params, pictures.pixels)
    texts = Text(written.ids, written.mask)
    rewards = None
    if initial is not None:
      rewards = self._sampler.score_texts(initial, codes, texts, self._scoring, eos_id=self._eos)
    words = [self._sampler.words(*group) for group in zip(*texts)]
    right = reasons = None
    if pictures.scenes is not None:
      counts = [
        [judge.count_atoms(text, scene) for text in group]
        for group, scene in zip(words, pictures.scenes)
      ]
      right = np.array([[c.parsed and c.right == c.stated for c in group] for group in counts])
      reasons = [[_what_is_wrong(c) for c in group] for group in counts]
    return rows_lib.Candidates(
      task='understanding',
      prompts=[pictures.question] * number,
      codes=codes,
      pixels=pictures.pixels,
      rewards=rewards,
      texts=words,
      tokens=[
        [ids[mask & (ids != self._eos)].tolist() for ids, mask in zip(*group)]
        for group in zip(*texts)
      ],
      right=right,
      reasons=reasons,
    )


# The items.


def _prompts(config, sampler: Sampler, batches) -> Prompts:
  """The first prompts, of each of GenEval's tasks in turn in Scenes."""
  number = config.eval.watched
  if config.data.prompts == 'scenes':
    tasks = len(grammar.GENEVAL)
    each = -(-number // tasks)
    listed = sets.evaluation_prompts(each)
    asked = [listed[task * each + i] for i in range(each) for task in range(tasks)][:number]
    words = [prompt.text for prompt in asked]
    return Prompts(words, sampler.prompts(words, config.data.max_prompt_tokens), asked)
  half = batches.at(0).generation
  ids, mask = (np.asarray(sharding.fetch(x))[:number] for x in half.prompt)
  return Prompts(sampler.words(ids, mask), Text(ids, mask))


def _pictures(config, batches) -> Pictures:
  """The first pictures, and what the run asks about them."""
  number, m = config.eval.watched, config.method
  if config.data.images == 'scenes':
    scenes = sets.evaluation_scenes(number)
    return Pictures(sets.pictures(scenes), m.question, scenes)
  # With `separate` the understander's first turn comes after the generator's.
  first = m.separate.swap_every if m.strategy == 'separate' else 0
  pixels = sharding.fetch(batches.at(first).understanding.pixels)
  return Pictures(np.asarray(pixels)[:number], m.question)


def _what_is_wrong(counts: judge.TextCounts) -> str:
  if not counts.parsed:
    return 'no text of this world'
  wrong = counts.stated - counts.right
  return f'{wrong} of {counts.stated} things said are not so' if wrong else ''


# Numbers.


def reward_sums(rewards) -> np.ndarray:
  """Rewards (P, S) -> (P, 2): each item's sum and number."""
  rewards = np.asarray(rewards, float)
  return np.stack([rewards.sum(axis=1), np.full(len(rewards), rewards.shape[1])], axis=1)


def mean_reward(sums):
  """Sums (R, 2) of `reward_sums` -> means (R,)."""
  return sums[:, 0] / sums[:, 1]


def guard(pixels) -> dict[str, float]:
  """What pictures look like when a reward is hacked: all dark, without edges, of one color.

  pixels (P, S, H, W, 3) uint8 -> dark_pixels (share), edge_density (share of neighboring pixels
  that differ), color_entropy (nats, of the picture's colors in 8 levels a channel), means over the
  pictures.
  """
  flat = pixels.reshape(-1, *pixels.shape[2:])
  light = flat.astype(np.float32).mean(axis=-1) / 255
  across = np.abs(np.diff(light, axis=2)) > EDGE
  down = np.abs(np.diff(light, axis=1)) > EDGE
  levels = flat // (256 // COLOR_LEVELS)
  colors = (levels[..., 0] * COLOR_LEVELS + levels[..., 1].astype(int)) * COLOR_LEVELS
  colors = (colors + levels[..., 2]).reshape(len(flat), -1)
  return {
    'watched/dark_pixels': float((light < DARK).mean()),
    'watched/edge_density': float((across.mean() + down.mean()) / 2),
    'watched/color_entropy': float(np.mean([_entropy(row) for row in colors])),
  }


def _entropy(values) -> float:
  _, counts = np.unique(values, return_counts=True)
  share = counts / counts.sum()
  return float(-(share * np.log(share)).sum())
