"""What the loop runs on: the model, its data, the step, the evaluation. A test puts smaller parts
in their places.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import numpy as np

from dsr_jax.reporting import sheets as pictures_lib


@dataclasses.dataclass
class Model:
  """A loaded model: structure, parameters by part, sizes, tokenizer, and its origin ({'name',
  'fingerprint'}).
  """

  graphdef: Any
  params: Any
  config: Any
  processor: Any
  source: dict[str, str]
  codes_per_picture: int = 0


@dataclasses.dataclass(frozen=True)
class Parts:
  """Functions of the loop.

  load_model(name) -> Model.
  make_mesh(system.mesh) -> mesh.
  make_batches(config, model, mesh) -> object with at(step), a dict of arrays, and fingerprint.
  init_state(model, config, mesh) -> state, with 'params' and 'frozen' among its keys.
  make_step(model, config, mesh) -> object with lower(state, batch), whose program gives (state,
  metrics, records) and
    takes the state for its own. One that may be kept for other starts has an identity, words that
    differ where steps do, and the mesh's devices.
  make_evaluator(config, model) -> function (state, step) -> (flat dict of floats, dict of rows for
  paired comparisons);
    or None.
  make_sheets(config, model) -> function (state, records) -> PIL image.
  estimate(model, config, mesh) -> `plan_memory.Estimate` of a device's bytes, or None.
  """

  load_model: Callable[..., Any]
  make_mesh: Callable[..., Any]
  make_batches: Callable[..., Any]
  init_state: Callable[..., Any]
  make_step: Callable[..., Any]
  make_evaluator: Callable[..., Any]
  make_sheets: Callable[..., Any]
  estimate: Callable[..., Any] = lambda model, config, mesh: None


def real():
  """The parts of a real run."""
  from dsr_jax import sharding
  from dsr_jax import step as step_lib

  return Parts(
    load_model=_load_model,
    make_mesh=sharding.make_mesh,
    make_batches=_Batches,
    init_state=_init_state,
    make_step=lambda model, config, mesh: step_lib.make_step(
      model.graphdef, config.method, config.system, mesh, model.config.templates
    ),
    make_evaluator=_make_evaluator,
    make_sheets=_make_sheets,
    estimate=_estimate,
  )


def _load_model(name):
  from dsr_jax import convert
  from dsr_jax.convert import locate as model_source
  from dsr_jax.models.janus import model as janus

  bundle = convert.load(
    model_source.directory_of(name), lambda leaf: leaf
  )  # each is read when it is known where to
  return Model(
    janus.graphdef_of(bundle.config),
    bundle.params,
    bundle.config,
    bundle.processor,
    {'name': name, 'fingerprint': bundle.source['hash']},
    bundle.config.num_codes,
  )


class _Batches:
  """The run's batches on the mesh: each process makes the rows that its devices hold."""

  def __init__(self, config, model, mesh):
    from dsr_jax.data import batches

    fields = (
      ('swapped_prompts',)
      if config.system.probe_every and 'generation' in config.method.tasks
      else ()
    )
    self._batches = batches.make(
      config.data, config.method, model.processor, model.config.vision.image_size, fields
    )
    self._mesh, self._rows, self.fingerprint = (
      mesh,
      config.method.inputs_per_task,
      self._batches.fingerprint,
    )

  def at(self, step):
    from dsr_jax import sharding

    first, last = sharding.rows_here(self._mesh, self._rows)
    return sharding.place_batch(self._batches.at(step, first, last), self._mesh, first, self._rows)


def _init_state(model, config, mesh):
  from dsr_jax import sharding
  from dsr_jax import step as step_lib

  sharding.check_fits(
    mesh.shape, model.config.text.num_attention_heads, step_lib.chunks(config.method, config.system)
  )
  return step_lib.init_state(model.params, config.method, config.system, mesh)


def _estimate(model, config, mesh):
  from dsr_jax.plan import memory as plan_memory

  return plan_memory.estimate(model.config, config, mesh.shape)


def _make_evaluator(config, model):
  if config.eval.benchmark == 'none':
    return None
  from dsr_jax import step as step_lib
  from dsr_jax.evaluate import __main__ as evaluate

  evaluator = evaluate.Evaluator(config, model.processor, model.graphdef)
  separate = config.method.strategy == 'separate'
  return lambda state, step: evaluator.run(
    step_lib.policy_params(state),
    step,
    step_lib.policy_params(state, 'understander') if separate else None,
  )


def _make_sheets(config, model):
  """Records of a step (see `step.Task.record`) -> a sheet of both tasks."""
  from flax import nnx

  from dsr_jax import sharding
  from dsr_jax import step as step_lib
  from dsr_jax.models.janus import processor as processor_lib

  decode = jax.jit(
    lambda params, codes: nnx.merge(model.graphdef, params).picture_from_codes(codes).pixels
  )

  def read(ids, mask):
    return model.processor.decode([int(i) for i in ids[mask]])

  def sheet(state, records):
    parts = []
    if 'generation' in records:
      r = jax.device_get(records['generation'])
      prompts = [read(ids, mask) for ids, mask in zip(r['prompt_ids'], r['prompt_mask'])]
      pixels = processor_lib.to_uint8(
        sharding.fetch(decode(step_lib.policy_params(state), r['codes']))
      )
      parts.append(pictures_lib.candidates(prompts, pixels, *_verdicts(r)))
    if 'understanding' in records:
      r = jax.device_get(records['understanding'])
      texts = [
        [read(ids, mask) for ids, mask in zip(*group)]
        for group in zip(r['text_ids'], r['text_mask'])
      ]
      parts.append(pictures_lib.captions(r['pixels'], texts, *_verdicts(r)))
    return pictures_lib.stack(parts)

  return sheet


def _verdicts(record):
  """Rewards, chosen, rejected; a group of equal rewards has neither."""
  tied = record['chosen'] == record['rejected']
  return (
    record['rewards'],
    np.where(tied, -1, record['chosen']),
    np.where(tied, -1, record['rejected']),
  )
