"""The step on the smallest model there is, for tests of the method: built once for each
configuration.
"""

import dataclasses
import functools
import os

import jax
import micro_model
import numpy as np
from places import CONFIGS

from dsr_jax import config as config_lib
from dsr_jax import sharding
from dsr_jax import step as step_lib

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
  return config_lib.load(os.path.join(CONFIGS, 'scenes_tiny.py'), **changes)


@functools.cache
def model():
  """(graphdef, params)."""
  return micro_model.create(0)


def batch(tasks=('generation', 'understanding'), seed=0, rows=4, **more):
  """Random prompts and pictures of the tasks."""
  rng = np.random.default_rng(seed)
  mask = np.arange(6) < np.array([[3], [6], [1], [4]])[np.arange(rows) % 4]
  made = dict(seed=np.uint32(seed))
  prompt, pixels = (
    rng.integers(9, 40, (rows, 6)).astype('i4') * mask,
    rng.integers(0, 255, (rows, 16, 16, 3)).astype('u1'),
  )
  if 'generation' in tasks:
    made |= dict(
      prompt_ids=prompt,
      prompt_mask=mask,
      instruction_ids=np.array([9, 10, 11], 'i4'),
      instruction_mask=np.ones(3, bool),
    )
  if 'understanding' in tasks:
    made |= dict(
      pixels=pixels,
      question_ids=rng.integers(9, 40, (rows, 3)).astype('i4'),
      question_mask=np.ones((rows, 3), bool),
    )
  return {**made, **more}


@functools.cache
def program(method, system):
  return step_lib.make_step(
    model()[0], method, system, sharding.make_mesh(system.mesh), micro_model.Templates()
  )


def start(method=METHOD, system=SYSTEM):
  mesh = sharding.make_mesh(system.mesh)
  with jax.set_mesh(mesh):
    return step_lib.init_state(model()[1], method, system, mesh)


def run(method=METHOD, system=SYSTEM, steps=1, batches=None, state=None):
  """Runs steps on `batches(step)`, one batch by default; returns state, metrics and records on the
  host, and the step.
  """
  mesh = sharding.make_mesh(system.mesh)
  batches = batches or (lambda step: batch(method.tasks_at(step)))
  with jax.set_mesh(mesh):
    state = start(method, system) if state is None else state
    step = program(method, system)
    for index in range(steps):
      state, metrics, records = step(state, batches(index))
  return jax.device_get(state), jax.device_get(metrics), jax.device_get(records), step


def finite(metrics):
  """Whether all numbers are, but the frozen model's rewards, which are not asked for here."""
  return all(np.isfinite(v) for k, v in metrics.items() if not k.endswith('reward_frozen'))
