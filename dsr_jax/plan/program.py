"""The real step of a configuration without its weights: lowered from shapes alone, compiled, and
measured by the compiler.

`plan` compiles it for slices that are not available; `benchmark` runs it with random weights.
"""

import dataclasses
import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax import errors, families, files, sharding
from dsr_jax import state as state_lib
from dsr_jax import step as step_lib
from dsr_jax.convert import directory
from dsr_jax.convert import locate as model_source
from dsr_jax.models.janus.config import JanusConfig
from dsr_jax.models.showo.config import ShowoConfig
from dsr_jax.models.unified import Text
from dsr_jax.plan import sizes as plan_sizes
from dsr_jax.rollouts import Batch, GenerationBatch, UnderstandingBatch


def sizes_of(name):
  """A model's sizes by its name: from its directory or, without a download, those of a published
  model.
  """
  published = {
    'janus-pro-1b': JanusConfig.janus_pro_1b,
    'janus-pro-7b': JanusConfig.janus_pro_7b,
    'scenes': JanusConfig.scenes,
    'show-o-512': ShowoConfig.showo_512,
    'show-o': ShowoConfig.showo_256,
  }
  for key, make in published.items():
    if key in name.lower() and not os.path.isdir(name):
      return make()
  return directory.read_config(model_source.directory_of(name))[0]


def stand_in_templates(model):
  """Token ids around prompts, as many as the real templates have. A plan does not depend on their
  values.
  """
  return families.family_of(model).stand_in(model)


def random_arrays(shapes):
  """Arrays of the given shapes, types and layouts. Floating ones repeat the same 2^20 normal
  numbers: drawing each array separately takes a minute to compile.
  """

  def make():
    normal = 0.02 * jax.random.normal(jax.random.key(0), (2**20 + 7,))

    def fill(x):
      return (
        jnp.resize(normal, x.shape).astype(x.dtype)
        if jnp.issubdtype(x.dtype, jnp.floating)
        else jnp.zeros(x.shape, x.dtype)
      )

    return jax.tree.map(fill, shapes)

  return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, shapes))()


def lower_step(config, model, mesh):
  """Lowers the real step for a mesh, from shapes alone: {kind of batch: jax.stages.Lowered}; the
  strategy `separate` has two kinds.
  """
  model = dataclasses.replace(model, templates=model.templates or stand_in_templates(model))
  family = families.family_of(model)
  method, system = config.method, config.system
  ctx = step_lib.StepContext(
    graphdef=family.graphdef(model),
    family=family,
    spec=family.spec(model),
    method=method,
    system=system,
  )
  with jax.set_mesh(mesh):
    state = state_lib.abstract_state(plan_sizes.shapes(model), family, method, system, mesh)
    step = jax.jit(
      functools.partial(step_lib.train_step, ctx),
      donate_argnums=0,
      out_shardings=step_lib.output_shardings(ctx, state, mesh),
    )
    kinds = [method.tasks]
    if method.strategy == 'separate':
      kinds = [(task,) for task in method.tasks]
    return {
      ' and '.join(kind): step.lower(state, _batch(config, model, mesh, kind)) for kind in kinds
    }


def _batch(config, model, mesh, tasks) -> Batch:
  """Shapes and layouts of the inputs of a step."""
  rows, side = config.method.inputs_per_task, model.image_size
  whole, split = sharding.whole(mesh), sharding.batch_sharding(mesh, rows)

  def array(shape, dtype, where):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

  def text(shape, where):
    return Text(array(shape, np.int32, where), array(shape, np.bool_, where))

  generation = understanding = None
  if 'generation' in tasks:
    generation = GenerationBatch(
      prompt=text((rows, config.data.max_prompt_tokens), split),
      instruction=text((plan_sizes.QUESTION,), whole),
      extra={},
    )
  if 'understanding' in tasks:
    understanding = UnderstandingBatch(
      pixels=array((rows, side, side, 3), np.uint8, split),
      question=text((rows, plan_sizes.QUESTION), split),
      extra={},
    )
  return Batch(array((), np.uint32, whole), generation, understanding)


def measure(lowered, hlo: str = '') -> dict:
  """What the compiler reports about a program: bytes per device, and operations.

  hlo: output file for the program as text.
  """
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    used = re.search(r'Used ([\d.]+)([GM]) of', str(e))
    if not used:
      raise
    return dict(
      total_bytes=float(used[1]) * (2**30 if used[2] == 'G' else 2**20),
      refused=errors.first_line(e),
    )
  m = compiled.memory_analysis()
  if hlo:
    files.write_text(hlo, compiled.as_text())
  return dict(
    total_bytes=m.argument_size_in_bytes
    + m.output_size_in_bytes
    - m.alias_size_in_bytes
    + m.temp_size_in_bytes
    + m.generated_code_size_in_bytes,
    arguments_bytes=m.argument_size_in_bytes,
    temporaries_bytes=m.temp_size_in_bytes,
    code_bytes=m.generated_code_size_in_bytes,
    operations_counted_once=(compiled.cost_analysis() or {}).get('flops'),
  )
