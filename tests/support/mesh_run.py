"""One real step of a tiny model on given meshes, for tests that compare meshes and processes.

As a program: `python tests/support/mesh_run.py OUT MESH [MESH ...] [--steps=1] [--devices=8]
  [--port=P --processes=M --process=I] [--resume=DIR] [--model=janus|showo] [--credit=WAY]`; a MESH
is DATAxFSDPxTP and takes the first devices. Leaves OUT/MESH@STEP.npz: random bits, candidates,
gradients, parameters and metrics, whole; and a checkpoint of each step in OUT/MESH.
"""

import importlib.metadata
import os
import sys

DEVICES = next((int(a.partition('=')[2]) for a in sys.argv if a.startswith('--devices=')), 8)
if __name__ == '__main__':
  os.environ['JAX_PLATFORMS'] = 'cpu'
  plain = ' --xla_cpu_use_fusion_emitters=false' * importlib.metadata.version('jaxlib').startswith(
    '0.10.'
  )  # as conftest.py has it
  os.environ['XLA_FLAGS'] = (
    f'--xla_force_host_platform_device_count={DEVICES} --xla_backend_optimization_level=0{plain}'
  )

import dataclasses
import functools

import hlo as plan_hlo
import jax
import micro_showo
import numpy as np

from dsr_jax import config as config_lib
from dsr_jax import sharding, tasks
from dsr_jax import state as state_lib
from dsr_jax import step as step_lib
from dsr_jax.models.janus import model as janus
from dsr_jax.models.janus.config import JanusConfig, Templates, TextConfig, VisionConfig, VQConfig
from dsr_jax.models.janus.family import JANUS
from dsr_jax.models.showo.family import SHOWO
from dsr_jax.models.unified import Text
from dsr_jax.rollouts import Batch, GenerationBatch, UnderstandingBatch
from dsr_jax.runtime import checkpoints
from dsr_jax.runtime import distributed as processes

TEMPLATES = Templates(
  bos_id=1,
  eos_id=2,
  pad_id=0,
  boi_id=3,
  eoi_id=4,
  image_id=5,
  generation_prefix=(1, 6, 7),
  generation_suffix=(8, 6, 3),
  understanding_prefix=(1, 6, 7, 3),
  understanding_infix=(4, 8),
  understanding_suffix=(8, 6, 7),
  forbidden_text_ids=(0, 1, 3, 4, 5),
)
# Vocabularies are twice a prime, so that no other array has their size, whole or halved.
VOCABULARY, CODEBOOK, CHUNK, WIDTH, SIDE = 46, 34, 3, 32, 8
MODEL = JanusConfig(
  text=TextConfig(VOCABULARY, WIDTH, 64, 2, 4, 8),
  vision=VisionConfig(32, 64, 1, 4, image_size=SIDE, patch_size=4),
  vq=VQConfig(
    CODEBOOK,
    embed_dim=8,
    latent_channels=32,
    base_channels=32,
    channel_multiplier=(1, 1),
    num_res_blocks=1,
  ),
  templates=TEMPLATES,
)
INPUTS, GROUP, PROMPT, TEXT = 8, 3, 7, 11  # inputs of a task, candidates, tokens
METHOD = config_lib.Method(
  group_size=GROUP,
  inputs_per_step=2 * INPUTS,
  steps=10,
  max_text_tokens=TEXT,
  guidance=2.0,
  cfg_interval=3,
  learning_rate=1e-3,
  warmup_steps=0,
)
SYSTEM = config_lib.System(compute_dtype='float32', logprob_chunk=CHUNK, remat=True, frozen_every=0)
CONTEXT = step_lib.StepContext(
  graphdef=JANUS.graphdef(MODEL),
  family=JANUS,
  spec=JANUS.spec(MODEL),
  method=METHOD,
  system=SYSTEM,
)


# Show-o with as many words and codes. Its pictures are drawn in steps, all codes guided.
SHOWO_MODEL = micro_showo.sized(vocabulary=VOCABULARY, codes=(SIDE // 4) ** 2)
SHOWO_CONTEXT = dataclasses.replace(
  CONTEXT,
  graphdef=SHOWO.graphdef(SHOWO_MODEL),
  family=SHOWO,
  spec=SHOWO.spec(SHOWO_MODEL),
  method=dataclasses.replace(METHOD, cfg_interval=0),
)


def batch(step):
  """A step's inputs, on the host."""
  rng = np.random.default_rng(step)
  mask = np.arange(PROMPT) < rng.integers(1, PROMPT + 1, (INPUTS, 1))
  prompt = rng.integers(9, VOCABULARY, (INPUTS, PROMPT)).astype('i4') * mask
  pixels = rng.integers(0, 255, (INPUTS, SIDE, SIDE, 3)).astype('u1')
  question = rng.integers(9, VOCABULARY, (INPUTS, 3)).astype('i4')
  return Batch(
    seed=np.uint32(step),
    generation=GenerationBatch(
      prompt=Text(prompt, mask),
      instruction=Text(np.array([9, 10, 11], 'i4'), np.ones(3, bool)),
      extra={},
    ),
    understanding=UnderstandingBatch(
      pixels=pixels, question=Text(question, np.ones((INPUTS, 3), bool)), extra={}
    ),
  )


def mesh_of(name):
  """'2x2x2' -> a mesh of the first devices."""
  sizes = [int(n) for n in name.split('x')]
  return sharding.make_mesh(config_lib.Mesh(*sizes), jax.devices()[: int(np.prod(sizes))])


def params():
  """Random parameters, the same everywhere; heads loud enough that candidates and rewards
  differ.
  """
  made = jax.tree.map(np.asarray, janus.create(MODEL, 0)[1])

  def loud(tree):
    return jax.tree.map(lambda x: 3 * x, tree)

  return {
    **made,
    'lm_head': loud(made['lm_head']),
    'generation_head': loud(made['generation_head']),
  }


def run(name, folder, steps, resume='', showo=False, credit='equal'):
  """Steps on a mesh, from the start or from a checkpoint, each saved in `folder`; yields (step,
  dict of whole arrays).
  """
  mesh = mesh_of(name)
  ctx = SHOWO_CONTEXT if showo else CONTEXT
  ctx = dataclasses.replace(ctx, method=dataclasses.replace(ctx.method, credit=credit))
  weights = micro_showo.params(SHOWO_MODEL) if showo else params()
  about = {'method': {}, 'data': {'fingerprint': ''}, 'model': {'fingerprint': ''}}
  with jax.set_mesh(mesh):
    state = state_lib.init_state(weights, ctx.family, ctx.method, SYSTEM, mesh)
    if resume:
      state = checkpoints.Checkpoints(resume, about).restore(state)
    saved, compiled = checkpoints.Checkpoints(folder, about, keep_last=9), None
    for _ in range(steps):
      before, placed = (
        jax.tree.map(sharding.fetch, state.params),
        place(mesh, batch(int(sharding.fetch(state.step)))),
      )
      if compiled is None:
        jitted = jax.jit(
          functools.partial(step_lib.train_step, ctx),
          donate_argnums=0,
          out_shardings=step_lib.output_shardings(ctx, state, mesh),
        )
        compiled = jitted.lower(state, placed).compile()
      state, metrics, records = compiled(state, placed)
      step = int(sharding.fetch(state.step))
      saved.save(step, state)
      adam = next(
        x
        for x in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, 'mu'))
        if hasattr(x, 'mu')
      )
      yield (
        step,
        {
          'bits': bits(mesh),
          **({} if showo else program(compiled, mesh)),
          **flat('metric', metrics),
          **flat('record', records),
          **flat('before', before),
          **flat('after', state.params),
          **flat('mu', adam.mu),
        },
      )
    saved.close()


def place(mesh, whole):
  """A whole batch, of which this process takes its rows."""
  first, last = sharding.rows_here(mesh, INPUTS)
  here = jax.tree.map(lambda x: x[first:last] if np.ndim(x) > 1 else x, whole)
  return sharding.place_batch(here, mesh, first, INPUTS)


def bits(mesh):
  """Random bits by row, of rows that are split."""
  draw = jax.jit(
    lambda rows: jax.vmap(
      lambda i: jax.random.bits(jax.random.fold_in(jax.random.key(0), i[0]), (5,))
    )(rows)
  )
  return sharding.fetch(draw(place(mesh, {'rows': np.arange(INPUTS)[:, None]})['rows']))


def program(compiled, mesh):
  """What the compiled program says of itself."""
  found = plan_hlo.Program(compiled.as_text())
  weights = tuple(WIDTH // n for n in (1, mesh.shape['fsdp'], mesh.shape['tp']))

  def largest(size):
    return max(found.positions(n, weights) for n in {size, size // mesh.shape['tp']})

  def top(size):
    return max(
      (
        (n, f'{i.opcode} {i.arrays} {i.scope}')
        for m in {size, size // mesh.shape['tp']}
        for n, i in found.over(m, weights)
      )
    )

  return dict(
    hlo_text_array=np.array(str(top(VOCABULARY))),
    hlo_image_array=np.array(str(top(CODEBOOK))),
    hlo_text_positions=largest(VOCABULARY),
    hlo_image_positions=largest(CODEBOOK),
    hlo_loops=len(found.loops('decode')),
    hlo_moves=np.array(
      [f'{i.opcode} {i.bytes} {i.arrays} {i.scope}' for i in found.decode_moves()] or [''], str
    ),
    hlo_move=max((i.bytes for i in found.decode_moves()), default=0),
  )


def flat(prefix, tree):
  return {
    f'{prefix}/{sharding.path_name(path)}': sharding.fetch(x)
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def main(argv):
  def option(name, other=''):
    return next((a.partition('=')[2] for a in argv if a.startswith(f'--{name}=')), other)

  out, *names = (a for a in argv if not a.startswith('--'))
  tasks.SHOWN = INPUTS  # all candidates leave the step
  cluster = (
    processes.find(f'localhost:{option("port")}', int(option('processes')), int(option('process')))
    if option('port')
    else None
  )
  with processes.together(cluster, 120) as team:
    for name in names:
      for step, found in run(
        name,
        os.path.join(out, name),
        int(option('steps', '1')),
        option('resume'),
        showo=option('model') == 'showo',
        credit=option('credit', 'equal'),
      ):
        if team.lead:
          np.savez(os.path.join(out, f'{name}@{step}.npz'), **found)


if __name__ == '__main__':
  main(sys.argv[1:])
