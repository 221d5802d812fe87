"""The measurements of a study's cell: both tasks on fixed lists with common random numbers, and how
well scorers order samples.

Everything is kept as rows, one per prompt or image, so that differences between cells are paired.
Axes: P prompts or images, S samples, G samples that scorers order, B inputs of a chunk, T text
tokens, N image codes, H W pixels.
"""

import dataclasses
import functools

from flax import nnx
import jax
import numpy as np

from dsr_jax import images
from dsr_jax.data import batches as batches_lib
from dsr_jax.evaluate import evaluator, stats
from dsr_jax.evaluate import scores as scores_lib
from dsr_jax.inference import Sampler
from dsr_jax.models.unified import Scoring, Text, row_keys, score_keys, without_eos
from dsr_jax.rewards import scenes_judge, table
from dsr_jax.rewards.base import RewardInputs
from dsr_jax.scenes import grammar, judge, sets
from dsr_jax.tasks import TASKS, sampling_of

SCORER_SEED = 20_000  # of the prompts and images that scorers judge; no run uses it
SCORER_INPUTS = 16  # at a time
# The results of `failure`.
FAILURES = ('right', 'missing', 'count', 'binding', 'position', 'unreadable')


@functools.lru_cache(maxsize=8)
def prompts_of(per_task: int, split: str = 'evaluation'):
  """The fixed list of prompts. Cached, because making it takes seconds."""
  return tuple(sets.evaluation_prompts(per_task, split))


class Evaluator(evaluator.Evaluator):
  """A run's evaluator with more rows: the judge's other rules, objects that were not requested, and
  many samples for a few prompts.

  measure: the group `measure` of configs/scenes_study.py.
  """

  def __init__(self, config, processor, graphdef, measure, split: str = 'evaluation'):
    super().__init__(config, processor, graphdef, split)
    self._measure = measure

  def run(self, params, step: int, reader=None):
    scores, rows = super().run(params, step, reader)
    if self.is_whole(step) and self._split == 'evaluation':
      m = self._method
      rows |= self.many(params, m.temperature, m.guidance, m.cfg_interval)
    return scores, rows

  def generation(
    self,
    params,
    per_task: int,
    temperature: float,
    guidance: float,
    best_of: int = 1,
    cfg_interval: int = 0,
  ):
    """Flat scores, and rows (P, S): generation, strict (0 or 1), graded, extras (objects and blobs
    beyond those requested), pebbles, failure (an index into FAILURES).
    """
    prompts = prompts_of(per_task, self._split)
    pixels = self._sampler.pictures(
      params,
      [p.text for p in prompts],
      self._eval.images_per_prompt,
      temperature=temperature,
      guidance=guidance,
      cfg_interval=cfg_interval,
      best=best_of,
    )
    rows = picture_rows(prompts, pixels)
    correct = np.array(rows['generation'])
    sums, strata = scores_lib.generation_sums(prompts, correct)
    mean = stats.estimate(sums, scores_lib.mean_of_tasks, strata)
    scores = evaluator.with_interval('generation/mean', mean)
    for task in scores_lib.tasks_of(prompts):
      of_task = correct[[p.category == task for p in prompts]]
      scores[f'generation/{task}'] = float(of_task.mean())
    return scores, rows

  def many(self, params, temperature: float, guidance: float, cfg_interval: int = 0):
    """{'generation_many': rows (P, measure.many)}, for pass@k."""
    prompts = prompts_of(self._measure.many_prompts_per_task, self._split)
    pixels = self._sampler.pictures(
      params,
      [p.text for p in prompts],
      self._measure.many,
      temperature=temperature,
      guidance=guidance,
      cfg_interval=cfg_interval,
    )
    return {'generation_many': picture_rows(prompts, pixels)['generation']}

  def texts(self, params, temperature: float, best_of: int = 1):
    """Rows of sums for descriptions of the whole list."""
    scenes = sets.evaluation_scenes(self._eval.pictures, self._split)
    texts = self._sampler.texts(
      params,
      sets.pictures(scenes),
      [grammar.QUESTION_DESCRIBE] * len(scenes),
      temperature=temperature,
      best=best_of,
    )
    return scores_lib.description_sums(scenes, texts).tolist()

  def best_settings(self, params, temperatures, guidances):
    """Tries every setting on this evaluator's list.

    Returns: {'generation': {'T,guidance': score}, 'description': {'T': F1}}.
    """
    generation, description = {}, {}
    for temperature in temperatures:
      for guidance in guidances:
        scores, _ = self.generation(params, self._eval.prompts_per_task, temperature, guidance)
        generation[f'{temperature:g},{guidance:g}'] = scores['generation/mean']
    for temperature in temperatures:
      total = np.sum(self.texts(params, temperature), axis=0)
      f1 = scores_lib.DESCRIPTION['f1'](total[None])
      description[f'{temperature:g}'] = float(f1[0])
    return {'generation': generation, 'description': description}


def picture_rows(prompts, pixels) -> dict[str, list]:
  """Rows (P, S) for pixels (P, S, H, W, 3) uint8; see `Evaluator.generation`."""
  readings = judge.read(pixels.reshape(-1, *pixels.shape[2:]))
  samples = pixels.shape[1]
  rows = {'generation': [], 'strict': [], 'graded': [], 'extras': [], 'pebbles': [], 'failure': []}
  for i, reading in enumerate(readings):
    prompt = prompts[i // samples]
    verdict = judge.verdict(prompt, reading)
    wanted = sum(clause.count for clause in prompt.atoms.clauses)
    rows['generation'].append(int(verdict['geneval']))
    rows['strict'].append(int(verdict['strict']))
    rows['graded'].append(round(float(verdict['graded']), 4))
    rows['extras'].append(max(len(reading.things) + reading.blobs - wanted, 0))
    rows['pebbles'].append(len(reading.scene.pebbles) if reading.scene else 0)
    rows['failure'].append(FAILURES.index(failure(prompt, reading)))
  return {name: np.reshape(values, (-1, samples)).tolist() for name, values in rows.items()}


def failure(prompt, reading) -> str:
  """How an image fails its prompt: the first of FAILURES that applies.

  An object is missing, there are too few or too many, an attribute is on the wrong object or on
  none, or a relation does not hold.
  """
  if judge.verdict(prompt, reading)['geneval']:
    return 'right'
  if reading.scene is None:
    return 'unreadable'

  wanted = {}
  for clause in prompt.atoms.clauses:
    wanted[clause.shape] = wanted.get(clause.shape, 0) + clause.count
  number = {shape: sum(t.shape == shape for t in reading.things) for shape in wanted}
  if not all(number.values()):
    return 'missing'
  too_few = any(number[shape] < n for shape, n in wanted.items())
  too_many = any(number[shape] > n for shape, n in wanted.items())
  if too_few or (too_many and prompt.category in grammar.COUNTED):
    return 'count'

  attributes_alone = prompt.atoms._replace(relations=())
  if not judge.geneval(attributes_alone, reading, False):
    return 'binding'
  return 'position' if not judge.geneval(prompt.atoms, reading, False) else 'unreadable'


class Scorers:
  """How scorers order samples for inputs that no run sees, compared with the exact judge's order.

  The configuration sets the reward, temperature and guidance. inputs: the number of prompts, and of
  images.
  """

  def __init__(self, graphdef, config, processor, image_size: int, inputs: int):
    m, system = config.method, config.system
    one_model = m.strategy == 'unified' and m.reward != 'dual'
    self._tasks = table.tasks(m.reward) if one_model else tuple(TASKS)
    self._method = dataclasses.replace(
      m,
      task='unified' if len(self._tasks) == 2 else self._tasks[0],
      inputs_per_step=inputs * len(self._tasks),
      strategy='unified',
      scorer='policy',
      accumulate=1,
      objective='simpo',
      inner_updates=1,
      seed=SCORER_SEED,
    )
    self._sampling = sampling_of(m, system)
    self._sampler = Sampler(graphdef, processor, chunk=SCORER_INPUTS, seed=SCORER_SEED)
    self._score = jax.jit(
      functools.partial(_score, graphdef, self._method, Scoring(chunk=system.logprob_chunk)),
      static_argnames='task',
    )
    self._reward_params = table.load(m)
    self._batches = batches_lib.make(
      config.data, self._method, processor, image_size, ('vocabulary',)
    )
    self._inputs = inputs
    self._eos_id = processor.templates.eos_id

  def run(self, policies, scorers) -> dict[str, list]:
    """Rows (P, G): `scorer_TASK_NAME` has each scorer's rewards, `scorer_TASK_truth` the judge's
    scores, `scorer_understanding_length` the lengths of texts.

    policies: {task: parameters that sample}. scorers: {task: {name: parameters}}.
    """
    batch = self._batches.at(0)
    vocabulary = batch.shared['token_bytes'], batch.shared['token_ends']
    out = {}
    for task in self._tasks:
      if task == 'generation':
        rows = self._pictures(policies[task], scorers[task], batch, vocabulary)
      else:
        rows = self._texts(policies[task], scorers[task], batch, vocabulary)
      for name, values in rows.items():
        out[f'scorer_{task}_{name}'] = values.astype(float).round(6).tolist()
    return out

  def _pictures(self, policy, scorers, batch, vocabulary):
    prompt = batch.generation.prompt
    drawn = self._sampler.sample_pictures(
      policy, prompt, group=self._method.group_size, how=self._sampling, seed=SCORER_SEED
    )
    rows = self._rewards('generation', scorers, batch, drawn.codes)
    rows['truth'] = scenes_judge.verdicts_on_pictures(
      drawn.pixels, prompt.ids, prompt.mask, *vocabulary
    )
    return rows

  def _texts(self, policy, scorers, batch, vocabulary):
    half = batch.understanding
    written = self._sampler.sample_texts(
      policy,
      half.pixels,
      half.question,
      group=self._method.group_size,
      how=self._sampling,
      seed=SCORER_SEED + 1,
    )
    texts = Text(written.ids, written.mask)
    rows = self._rewards('understanding', scorers, batch, texts)
    content = without_eos(texts, self._eos_id)
    rows['truth'] = scenes_judge.verdicts_on_texts(
      half.pixels, content.ids, content.mask, *vocabulary
    )
    rows['length'] = content.mask.sum(-1)
    return rows

  def _rewards(self, task, scorers, batch, samples) -> dict[str, np.ndarray]:
    """Each scorer's rewards (P, G) for samples: codes (P, G, N), or Text (P, G, T)."""
    rows = {name: [] for name in scorers}
    for first in range(0, self._inputs, SCORER_INPUTS):
      part = slice(first, min(first + SCORER_INPUTS, self._inputs))
      chunk = self._batches.at(0, part.start, part.stop)
      chosen = jax.tree.map(lambda x, part=part: x[part], samples)
      for name, params in scorers.items():
        rewards = self._score(params, self._reward_params, chunk, chosen, first, task=task)
        rows[name].append(np.asarray(rewards))
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def _score(graphdef, method, scoring, params, reward_params, batch, samples, first, *, task):
  """Rewards (B, G) for samples of a part of the inputs. first: the index of its first input."""
  model = nnx.merge(graphdef, params)
  group = method.group_size
  half = batch.generation if task == 'generation' else batch.understanding
  if task == 'generation':
    text, question = half.prompt, half.instruction
    picture = model.picture_from_codes(samples)
    inputs = text.ids.shape[0]
  else:
    text, question = samples, half.question
    picture = model.picture_from_pixels(images.to_float(half.pixels))
    inputs = half.pixels.shape[0]
  keys = row_keys(jax.random.key(SCORER_SEED), first * group, inputs, group)
  return table.score(
    RewardInputs(
      task=task,
      model=model,
      text=text,
      picture=picture,
      question=question,
      sample_keys=keys,
      score_keys=score_keys(model, keys),
      extra={**half.extra, **batch.shared},
      reward_params=reward_params,
      scoring=scoring,
      eos_id=model.spec.eos_id,
      method=method,
    )
  ).total
