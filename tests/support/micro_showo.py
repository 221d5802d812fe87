"""The smallest Show-o, random, of Micro's sizes: the same batches serve both (tiny_step.py)."""

import dataclasses
import functools

from flax import nnx
import jax
import numpy as np

from dsr_jax import sharding
from dsr_jax import state as state_lib
from dsr_jax import step as step_lib
from dsr_jax.models.showo import model as showo
from dsr_jax.models.showo.config import MagvitConfig, PhiConfig, ShowoConfig, Templates
from dsr_jax.models.showo.family import SHOWO

VOCABULARY, EOS = 40, 2
PAD, SOI, EOI, T2I, MMU = 40, 41, 42, 45, 46
# Of words 9 to 39 an even one begins a prompt, the odd one after it an answer.
FORMS = np.arange(VOCABULARY, dtype=np.int32)
AS_PROMPT = np.where((FORMS > 9) & (FORMS % 2 == 1), FORMS - 1, FORMS).astype(np.int32)
AS_ANSWER = np.where((FORMS > 9) & (FORMS % 2 == 0), FORMS + 1, FORMS).astype(np.int32)

CONFIG = ShowoConfig(
  text=PhiConfig(VOCABULARY, 16, 24, 1, 2, max_position_embeddings=256),
  vq=MagvitConfig(4, 32, (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
  num_codes=16,
  prompt_tokens=12,
  sampling_steps=4,
  templates=Templates(
    eos_id=EOS,
    pad_id=PAD,
    soi_id=SOI,
    eoi_id=EOI,
    generation_prefix=(T2I, EOS),
    generation_suffix=(EOS, SOI),
    understanding_prefix=(MMU, SOI),
    understanding_infix=(EOI, EOS, 7, 8),
    understanding_suffix=(5, 6),
    as_prompt=AS_PROMPT.tobytes(),
    as_answer=AS_ANSWER.tobytes(),
  ),
)


def randomized(params, seed=0):
  """Every tensor random: norms and biases too, and logits that differ."""
  rng = np.random.default_rng(seed)

  def fresh(path, x):
    name = sharding.path_name(path)
    scale = 0.3 if name.endswith('bias') else 0.5 if 'embed' in name else x.shape[-2:][0] ** -0.5
    if 'dense/kernel' in name:
      scale *= 4  # of a masked place nothing but what it sees tells one prompt from another
    value = rng.normal(size=x.shape) * scale
    if name.endswith('scale'):
      value = 1 + 0.2 * rng.normal(size=x.shape)
    if name.startswith('lm_head/kernel'):
      value *= 2
    if 'vqmodel' in name and name.endswith('kernel'):
      value = rng.normal(size=x.shape) * np.prod(x.shape[:-1]) ** -0.5
    return value.astype(np.float32)

  return jax.tree_util.tree_map_with_path(fresh, params)


@functools.cache
def params(config=CONFIG):
  return randomized(showo.abstract_params(config))


def model(config=CONFIG) -> showo.Showo:
  return nnx.merge(showo.graphdef_of(config), jax.tree.map(jax.numpy.asarray, params(config)))


@functools.cache
def context(method, system, config=CONFIG) -> step_lib.StepContext:
  return step_lib.StepContext(
    graphdef=showo.graphdef_of(config),
    family=SHOWO,
    spec=showo.spec_of(config),
    method=method,
    system=system,
  )


def run(method, system, batches, steps=1, devices=None):
  """Runs steps on `batches(step)`. Returns state, metrics and records on the host, and the step."""
  ctx = context(method, system)
  mesh = sharding.make_mesh(system.mesh, devices)
  with jax.set_mesh(mesh):
    state = state_lib.init_state(params(), SHOWO, method, system, mesh)
    step = jax.jit(
      functools.partial(step_lib.train_step, ctx),
      donate_argnums=0,
      out_shardings=step_lib.output_shardings(ctx, state, mesh),
    )
    for index in range(steps):
      batch = batches(index)
      rows = jax.tree.leaves((batch.generation, batch.understanding))[0].shape[0]
      batch = batch if devices is None else sharding.place_batch(batch, mesh, 0, rows)
      state, metrics, records = step(state, batch)
  return jax.device_get(state), jax.device_get(metrics), jax.device_get(records), step


def sized(vocabulary: int, codes: int) -> ShowoConfig:
  """Another vocabulary, Show-o's own words behind it, and another picture."""
  templates = dataclasses.replace(
    CONFIG.templates,
    pad_id=vocabulary,
    soi_id=vocabulary + 1,
    eoi_id=vocabulary + 2,
    generation_prefix=(vocabulary + 5, EOS),
    generation_suffix=(EOS, vocabulary + 1),
    understanding_prefix=(vocabulary + 6, vocabulary + 1),
    understanding_infix=(vocabulary + 2, EOS, 7, 8),
  )
  text = dataclasses.replace(CONFIG.text, vocab_size=vocabulary)
  return dataclasses.replace(CONFIG, text=text, num_codes=codes, templates=templates)
