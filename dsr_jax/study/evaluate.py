"""What a cell of the study is measured by: both tasks on fixed lists with common random numbers,
and how well scorers order candidates.

Everything is kept as rows, a row a prompt or a picture, so that differences between cells are
paired.
Axes: P prompts or pictures, S samples, G candidates, B inputs at once, T text tokens, N image
  codes, H W pixels.
"""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax import tasks as tasks_lib
from dsr_jax.data import batches as batches_lib
from dsr_jax.evaluate import __main__ as evaluate
from dsr_jax.evaluate import scores as evaluation
from dsr_jax.models.janus import processor as processor_lib
from dsr_jax.models.unified import Picture, Text, without_eos
from dsr_jax.rewards import base as rewards_lib
from dsr_jax.rewards import scenes_judge as callback
from dsr_jax.scenes import grammar, judge, sets

SCORER_SEED = 20_000  # of the prompts and pictures that scorers are asked about: no run's
SCORER_INPUTS = 16  # at once
FAILURES = (
  'right',
  'missing',
  'count',
  'binding',
  'position',
  'unreadable',
)  # what became of a prompt, by `failure`


@functools.lru_cache(maxsize=8)
def prompts_of(per_task: int, split: str = 'evaluation'):
  """The fixed list of prompts; it takes seconds to draw."""
  return tuple(sets.evaluation_prompts(per_task, split))


class Evaluator(evaluate.Evaluator):
  """A run's evaluator with more rows: the judge's other rules, what nobody asked for, and many
  samples of a few prompts.

  measure: the group `measure` of configs/scenes_study.py.
  """

  def __init__(self, config, processor, graphdef, measure, split: str = 'evaluation'):
    super().__init__(config, processor, graphdef, split)
    m = config.method
    self._measure = measure
    self._sampler = evaluate.Sampler(  # this one can also pick the best of several
      graphdef,
      processor,
      chunk=config.eval.chunk,
      max_prompt_tokens=config.data.max_prompt_tokens,
      max_text_tokens=m.max_text_tokens,
      seed=config.eval.seed,
      instruction=m.instruction,
    )

  def run(self, params, step: int, reader=None):
    scores, rows = super().run(params, step, reader)
    if step in (0, self._last) and self._split == 'evaluation':
      rows |= self.many(
        params, self._method.temperature, self._method.guidance, self._method.cfg_interval
      )
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
    """Flat scores, and rows (P, S): generation, strict (0 or 1), graded, extras (things and blobs
    beyond those asked for), pebbles,
    failure (an index of FAILURES)."""
    prompts = prompts_of(per_task, self._split)
    pixels = self._sampler.pictures(
      params,
      [p.text for p in prompts],
      self._eval.images_per_prompt,
      temperature,
      guidance,
      best_of,
      cfg_interval=cfg_interval,
    )
    rows = picture_rows(prompts, pixels)
    correct = np.array(rows['generation'])
    sums, strata = evaluation.generation_sums(prompts, correct)
    mean = evaluation.estimate(sums, evaluation.mean_of_tasks, strata)
    tasks = list(dict.fromkeys(p.category for p in prompts))
    flat = {
      'generation/mean': mean.value,
      'generation/mean_low': mean.low,
      'generation/mean_high': mean.high,
    }
    flat |= {
      f'generation/{task}': float(correct[[p.category == task for p in prompts]].mean())
      for task in tasks
    }
    return flat, rows

  def many(self, params, temperature: float, guidance: float, cfg_interval: int = 0):
    """{'generation_many': rows (P, measure.many)}, for pass@k."""
    prompts = prompts_of(self._measure.many_prompts_per_task, self._split)
    pixels = self._sampler.pictures(
      params,
      [p.text for p in prompts],
      self._measure.many,
      temperature,
      guidance,
      cfg_interval=cfg_interval,
    )
    return {'generation_many': picture_rows(prompts, pixels)['generation']}

  def texts(self, params, temperature: float, best_of: int = 1):
    """Rows of sums of descriptions of the whole list."""
    scenes = sets.evaluation_scenes(self._eval.pictures, self._split)
    asked = [grammar.QUESTION_DESCRIBE] * len(scenes)
    texts = self._sampler.texts(params, sets.pictures(scenes), asked, temperature, best_of=best_of)
    return evaluation.description_sums(scenes, texts).tolist()

  def best_settings(self, params, temperatures, guidances):
    """Tries every setting: {'generation': {'T,guidance': score}, 'description': {'T': F1}} of this
    evaluator's list.
    """

    def mean(t, g):
      return self.generation(params, self._eval.prompts_per_task, t, g)[0]['generation/mean']

    def f1(t):
      return float(evaluation.DESCRIPTION['f1'](np.sum(self.texts(params, t), 0)[None])[0])

    return {
      'generation': {f'{t:g},{g:g}': mean(t, g) for t in temperatures for g in guidances},
      'description': {f'{t:g}': f1(t) for t in temperatures},
    }


def picture_rows(prompts, pixels) -> dict[str, list]:
  """Rows (P, S) of pixels (P, S, H, W, 3) uint8; see `Evaluator.generation`."""
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
  """How a picture fails its prompt, one of FAILURES, the first that applies: a thing is missing,
  there are too few or too many, an attribute is on the wrong thing or on none, a relation does not
  hold."""
  if judge.verdict(prompt, reading)['geneval']:
    return 'right'
  if reading.scene is None:
    return 'unreadable'

  def number(shape):
    return sum(thing.shape == shape for thing in reading.things)

  wanted = {
    clause.shape: sum(c.count for c in prompt.atoms.clauses if c.shape == clause.shape)
    for clause in prompt.atoms.clauses
  }
  if not all(number(shape) for shape in wanted):
    return 'missing'
  counted = prompt.category in grammar.COUNTED
  if any(number(shape) < n or counted and number(shape) > n for shape, n in wanted.items()):
    return 'count'
  if not judge.geneval(prompt.atoms._replace(relations=()), reading, False):
    return 'binding'
  return 'position' if not judge.geneval(prompt.atoms, reading, False) else 'unreadable'


class Scorers:
  """How scorers order candidates of inputs that no run sees, beside the exact judge's order of
  them.

  method: whose reward, temperature and guidance are at work. inputs: prompts and as many pictures.
  """

  def __init__(self, graphdef, config, processor, image_size: int, inputs: int):
    m = config.method
    alone = {
      'strategy': 'unified',
      'scorer': 'policy',
      'accumulate': 1,
      'objective': 'simpo',
      'inner_updates': 1,
      'seed': SCORER_SEED,
    }
    self._names = (
      rewards_lib.REWARDS[m.reward].tasks
      if m.strategy == 'unified' and m.reward != 'dual'
      else tuple(tasks_lib.TASKS)
    )
    task = 'unified' if len(self._names) == 2 else self._names[0]
    self._method = dataclasses.replace(
      m, task=task, inputs_per_step=inputs * len(self._names), **alone
    )
    eos_id = processor.templates.eos_id
    load = rewards_lib.REWARDS[m.reward].load
    self._weights = load(m) if load else None
    self._tasks = {
      name: tasks_lib.TASKS[name](self._method, config.system, eos_id) for name in self._names
    }
    self._batches = batches_lib.make(
      config.data, self._method, processor, image_size, ('vocabulary',)
    )
    self._inputs, self._eos_id = inputs, eos_id

    def merge(params):
      return nnx.merge(graphdef, params)

    @jax.jit
    def draw(params, batch, index):
      task, model = self._tasks['generation'], merge(params)
      codes, _ = model.sample_pictures(
        task.inputs(batch)[0], task.keys(jax.random.key(SCORER_SEED), index), task.sampling
      )
      return model.picture_from_codes(codes)

    @jax.jit
    def tell(params, batch, index):
      task, model = self._tasks['understanding'], merge(params)
      pixels, question = task.inputs(batch)[:2]
      picture = Picture(None, pixels.astype(jnp.float32) / 127.5 - 1.0)
      return model.sample_texts(
        picture, question, task.keys(jax.random.key(SCORER_SEED + 1), index), task.sampling
      )[0]

    @functools.partial(jax.jit, static_argnames='name')
    def score(name, params, batch, candidates, index, weights):
      task, model = self._tasks[name], merge(params)
      keys = task.keys(jax.random.key(SCORER_SEED), index)
      first, *more, extra = (*task.inputs(batch)[:-2], task.inputs(batch)[-1])
      instruction, whole = task.shared(batch)
      if name == 'generation':
        text, picture, question = first, candidates, instruction
      else:
        text, picture, question = (
          candidates,
          model.picture_from_pixels(first.astype(jnp.float32) / 127.5 - 1.0),
          more[0],
        )
      return rewards_lib.score(
        rewards_lib.Case(
          name,
          model,
          text,
          picture,
          question,
          keys,
          {**extra, **whole},
          weights,
          task.reward_scoring,
          eos_id,
          self._method,
        )
      )

    self._draw, self._tell, self._score = draw, tell, score

  def run(self, policies, scorers) -> dict[str, list]:
    """Rows (P, G) `scorer_TASK_NAME` of each scorer's rewards, `scorer_TASK_truth` of the judge's,
    `scorer_understanding_length` of texts.

    policies: {task: parameters that sample}. scorers: {task: {name: parameters}}.
    """
    out = {}
    for name in self._names:
      parts = [
        self._part(name, policies[name], scorers[name], first)
        for first in range(0, self._inputs, SCORER_INPUTS)
      ]
      out |= {
        f'scorer_{name}_{key}': np.concatenate([p[key] for p in parts])
        .astype(float)
        .round(6)
        .tolist()
        for key in parts[0]
      }
    return out

  def _part(self, name, policy, scorers, first):
    batch = self._batches.at(0, first, min(first + SCORER_INPUTS, self._inputs))
    index = np.arange(first, min(first + SCORER_INPUTS, self._inputs))
    words = batch['whole/token_bytes'], batch['whole/token_ends']
    candidates = (self._draw if name == 'generation' else self._tell)(policy, batch, index)
    rows = {
      key: np.asarray(self._score(name, params, batch, candidates, index, self._weights))
      for key, params in scorers.items()
    }
    if name == 'generation':
      pixels = processor_lib.to_uint8(np.asarray(candidates.pixels))
      rows['truth'] = callback.verdicts_on_pictures(
        pixels, batch['prompt_ids'], batch['prompt_mask'], *words
      )
    else:
      content = jax.device_get(without_eos(Text(*candidates), self._eos_id))
      rows['truth'] = callback.verdicts_on_texts(batch['pixels'], content.ids, content.mask, *words)
      rows['length'] = content.mask.sum(-1)
    return rows
