"""Inputs that are chosen, instead of taken as they come: prompts whose images differ most in
reward, and images that resemble the step's prompts.

`benchmarks.levers` runs them as `high_spread` and `paired`. The untouched base chooses, from two
and four times as many inputs of the same run; its time is part of the run's.

Axes: B inputs of a task and step, P prompts and M images to choose from, G samples, T tokens, N
image codes, H W pixels.
"""

import functools

from flax import nnx
import jax
import numpy as np
from scipy import optimize

from dsr_jax import images, sharding
from dsr_jax.data.sharded import ShardedBatches
from dsr_jax.inference import Sampler
from dsr_jax.models.unified import Sampling, Scoring
from dsr_jax.rewards import dual

PROMPTS_OFFERED = 2  # times B
IMAGES_OFFERED = 4  # times B
CHUNK = 16  # prompts at once


def widest(rewards, number: int) -> np.ndarray:
  """The `number` groups of largest standard deviation, in their order. rewards: (P, G)."""
  return np.sort(np.argsort(-np.std(rewards, axis=1), kind='stable')[:number])


def partners(likelihoods) -> np.ndarray:
  """A different image for each prompt, with the largest sum of likelihoods. (P, M) -> (P,)."""
  return optimize.linear_sum_assignment(likelihoods, maximize=True)[1]


class _Chosen:
  """Batches of a run, of which `_choose` replaces a half. See `ShardedBatches`."""

  def __init__(self, config, model, mesh, kept=None):
    self._offers = ShardedBatches(config, model, mesh, kept)
    self._config, self._mesh = config, mesh
    self._graphdef, self._processor = model.graphdef, model.processor
    self._params = jax.tree.map(np.array, model.params)  # the run itself does not keep them
    self.fingerprint = f'{type(self).__name__} of {self._offers.fingerprint}'

  def at(self, step: int):
    """The batch of a step (from 0), on the mesh."""
    batch = self._choose(jax.tree.map(np.asarray, self._offers.at(step)), step)
    return sharding.place_batch(batch, self._mesh, 0, self._config.method.inputs_per_task)

  def _offered(self, task: str, step: int, times: int):
    """That half of `times` consecutive steps of the run's inputs, as a list."""
    steps = range(times * step, times * (step + 1))
    return [jax.tree.map(np.asarray, getattr(self._offers.at(i), task)) for i in steps]


class HighSpread(_Chosen):
  """The half of the prompts whose images, drawn by the base, differ most in R_G."""

  def _choose(self, batch, step):
    method, half = self._config.method, batch.generation
    prompt, extra = _joined(
      [(x.prompt, x.extra) for x in self._offered('generation', step, PROMPTS_OFFERED)]
    )
    sampler = Sampler(self._graphdef, self._processor, chunk=CHUNK, seed=method.seed)
    drawn = sampler.sample_pictures(
      self._params,
      prompt,
      group=method.group_size,
      how=Sampling(temperature=method.temperature, guidance=method.guidance),
      instructions=jax.tree.map(lambda x: x[None], half.instruction),
      seed=step,
    )
    kept = widest(drawn.rewards[:, 0], method.inputs_per_task)
    prompt, extra = jax.tree.map(lambda x: x[kept], (prompt, extra))
    return batch._replace(generation=half._replace(prompt=prompt, extra=extra))


class Paired(_Chosen):
  """For each prompt the image that, among those offered, makes it most likely to the base."""

  def _choose(self, batch, step):
    pixels, extra = _joined(
      [(x.pixels, x.extra) for x in self._offered('understanding', step, IMAGES_OFFERED)]
    )
    kept = partners(self.likelihoods(batch.generation, pixels))
    pixels, extra = jax.tree.map(lambda x: x[kept], (pixels, extra))
    half = batch.understanding._replace(pixels=pixels, extra=extra)
    return batch._replace(understanding=half)

  def likelihoods(self, generation, pixels) -> np.ndarray:
    """log p(prompt | image) per token, of all pairs. pixels (M, H, W, 3) uint8 -> (P, M)."""
    return np.asarray(
      _likelihoods(self._graphdef, self._params, generation.prompt, pixels, generation.instruction)
    )


def _joined(parts):
  """Trees of rows -> one tree of all rows."""
  return jax.tree.map(lambda *x: np.concatenate(x), *parts)


@functools.partial(jax.jit, static_argnames='graphdef')
def _likelihoods(graphdef, params, prompt, pixels, instruction):
  """prompt (P, T), pixels (M, H, W, 3) uint8, instruction (Ti,) -> R_G (P, M)."""
  model = nnx.merge(graphdef, params)
  shown = model.picture_from_pixels(images.to_float(pixels))
  shown = jax.tree.map(lambda x: x[None], shown)  # the group of one prompt

  def of_one(prompt):
    prompt = jax.tree.map(lambda x: x[None], prompt)
    return dual.generation(model, shown, prompt, instruction, Scoring())[0][0]

  return jax.lax.map(of_one, prompt)
