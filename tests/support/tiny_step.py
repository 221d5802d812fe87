"""The step on the smallest model there is, for tests of the method: built once a configuration."""

import dataclasses
import functools

import jax
import micro_model
from micro_model import MICRO, MicroConfig
import numpy as np
from places import CONFIGS

from dsr_jax import config as config_lib
from dsr_jax import config_loading, sharding
from dsr_jax import state as state_lib
from dsr_jax import step as step_lib
from dsr_jax.models.unified import Text
from dsr_jax.rollouts import Batch, GenerationBatch, UnderstandingBatch

METHOD = config_lib.Method(
  group_size=4,
  inputs_per_step=8,
  steps=10,
  max_text_tokens=10,
  guidance=2.0,
  learning_rate=1e-2,
  warmup_steps=0,
)
SYSTEM = config_lib.System(compute_dtype='float32', logprob_chunk=0, remat=False, frozen_every=0)


def method(**changes):
  return dataclasses.replace(METHOD, **changes)


def system(**changes):
  return dataclasses.replace(SYSTEM, **changes)


def load(**changes):
  """configs/scenes_tiny.py with changes, as a user would set them."""
  return config_loading.load(str(CONFIGS / 'scenes_tiny.py'), **changes)


@functools.cache
def model(noisy: bool = False):
  """(graphdef, params)."""
  return micro_model.create(0, MicroConfig(noisy))


def batch(tasks=('generation', 'understanding'), seed=0, rows=4, extra=None, shared=None) -> Batch:
  """Random prompts and pictures of the tasks; extra: {task: fields}."""
  rng = np.random.default_rng(seed)
  mask = np.arange(6) < np.array([[3], [6], [1], [4]])[np.arange(rows) % 4]
  prompt = rng.integers(9, 40, (rows, 6)).astype('i4') * mask
  pixels = rng.integers(0, 255, (rows, 16, 16, 3)).astype('u1')
  extra = extra or {}
  generation = understanding = None
  if 'generation' in tasks:
    generation = GenerationBatch(
      prompt=Text(prompt, mask),
      instruction=Text(np.array([9, 10, 11], 'i4'), np.ones(3, bool)),
      extra=extra.get('generation', {}),
    )
  if 'understanding' in tasks:
    question = rng.integers(9, 40, (rows, 3)).astype('i4')
    understanding = UnderstandingBatch(
      pixels=pixels,
      question=Text(question, np.ones((rows, 3), bool)),
      extra=extra.get('understanding', {}),
    )
  return Batch(np.uint32(seed), generation, understanding, shared or {})


@functools.cache
def context(method, system, noisy: bool = False) -> step_lib.StepContext:
  config = MicroConfig(noisy)
  return step_lib.StepContext(
    graphdef=model(noisy)[0],
    family=MICRO,
    spec=MICRO.spec(config),
    method=method,
    system=system,
  )


@functools.cache
def program(method, system, noisy: bool = False):
  """The jitted step, as `train.make_train_step` makes it."""
  ctx = context(method, system, noisy)
  mesh = sharding.make_mesh(system.mesh)
  with jax.set_mesh(mesh):
    shapes = micro_model.MICRO.shapes(MicroConfig(noisy))
    state = state_lib.abstract_state(shapes, MICRO, method, system, mesh)
    return jax.jit(
      functools.partial(step_lib.train_step, ctx),
      donate_argnums=0,
      out_shardings=step_lib.output_shardings(ctx, state, mesh),
    )


def start(method=METHOD, system=SYSTEM, noisy: bool = False) -> state_lib.TrainState:
  mesh = sharding.make_mesh(system.mesh)
  with jax.set_mesh(mesh):
    return state_lib.init_state(model(noisy)[1], MICRO, method, system, mesh)


def run(method=METHOD, system=SYSTEM, steps=1, batches=None, state=None, noisy: bool = False):
  """Runs steps on `batches(step)`, one batch by default.

  Returns state, metrics and records on the host, and the step.
  """
  mesh = sharding.make_mesh(system.mesh)
  batches = batches or (lambda step: batch(method.tasks_at(step)))
  with jax.set_mesh(mesh):
    state = start(method, system, noisy) if state is None else state
    step = program(method, system, noisy)
    for index in range(steps):
      state, metrics, records = step(state, batches(index))
  return jax.device_get(state), jax.device_get(metrics), jax.device_get(records), step


def finite(metrics):
  """Whether all numbers are, but the initial model's rewards, which are not asked for here."""
  return all(np.isfinite(v) for k, v in metrics.items() if not k.endswith('reward_frozen'))
