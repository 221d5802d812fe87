"""Plans a run for a slice without having it: does it fit, what does it do, how long does it take.

  python -m dsr_jax.plan --config=configs/janus_pro_7b.py --topology=v5e:8x8 [--config.key=value]

For TPU slices the real step is compiled by the real TPU compiler (libtpu, from requirements-tpu.txt; no TPU). For others, as h200:8, the
counted half alone. A table on stderr, JSON on stdout.
"""

import dataclasses
import json
import os
import re
import sys
import time

os.environ['JAX_PLATFORMS'] = 'cpu'  # before JAX: the TPU compiler is asked, no TPU is looked for
os.environ['TPU_SKIP_MDS_QUERY'] = '1'

# pylint: disable=wrong-import-position
from absl import flags
from ml_collections import config_flags

from dsr_jax import config as config_lib
from dsr_jax import errors
from dsr_jax import plan_costs
from dsr_jax.errors import InputError

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

_CONFIG = config_flags.DEFINE_config_file('config', None, 'The run: a file of configs/, its keys set by --config.key=value.')
_TOPOLOGY = flags.DEFINE_string('topology', None, 'The slice: v5e:8x8, v5p:4x4x4, v6e:8x8, h200:8.')
_COMPILE = flags.DEFINE_bool('compile', True, 'Whether to compile the step for a TPU slice; --nocompile counts only.')
_HLO = flags.DEFINE_string('hlo', '', 'Where to leave the compiled program as text.')

SPARE = 0.05  # of a device's memory that a plan leaves free
MOVED_IN_DECODE = 2 ** 20  # bytes of a gather, permute or exchange that a decode step may have


def main(argv):
  """Prints the plan; exit status 2 where it does not fit."""
  if len(argv) > 1:
    raise InputError(f'found the stray argument {argv[1]!r}; expected flags only; write --name=value')
  if not _TOPOLOGY.value:
    raise InputError('found no --topology; expected a slice; name one, as --topology=v5e:8x8 or --topology=h200:8')
  config = config_lib.from_config_dict(_CONFIG.value)
  report, estimate = plan(config, _TOPOLOGY.value, _COMPILE.value, _HLO.value)
  print(_table(report, estimate), file=sys.stderr)
  print(json.dumps(report, indent=2))
  if not report['fits']:
    room = (1 - SPARE) * report['memory_bytes']
    # The compiler's word over the estimate's: what is asked of a turn shrinks by what the estimate missed.
    missed = report['needed_bytes'] / estimate.total
    over = report['needed_bytes'] - room
    raise InputError(f'found a step that needs {report["needed_bytes"] / 2**30:.2f} GiB of a device; expected at most {room / 2**30:.2f} '
                     f'({SPARE:.0%} of {report["memory_bytes"] / 2**30:.2f} kept free), {over / 2**30:.2f} less; {estimate.advice(room / missed)}')


def plan(config, topology, compiling=True, hlo=''):
  """The plan as a dict of JSON values, and the `plan_memory.Estimate` it rests on.

  Errors: InputError where the topology does not exist or the config does not divide over it.
  """
  from dsr_jax import plan_memory
  from dsr_jax import plan_sizes
  from dsr_jax import sharding
  name, chip, chips = plan_costs.parse(topology)
  model = sizes_of(config.model)
  devices = _devices(name, topology, chips) if chip.tpu and compiling else None
  axes = sharding.resolve(config.system.mesh, chips)
  sharding.check_fits(axes, model.text.num_attention_heads, _chunks(config))
  s = plan_sizes.Sizes(model, config.method, config.system, config.data.max_prompt_tokens)
  estimate = plan_memory.estimate(model, config, axes)
  found = plan_costs.phases(s, axes, chip)
  seconds = sum(phase.seconds for phase in found)
  report = dict(
      topology=topology, chips=chips, mesh=axes, config=config.model, memory_bytes=chip.memory, estimated_bytes=estimate.total,
      needed_bytes=estimate.total, parts=[dict(part=n, bytes=b, lives=w) for n, b, w in estimate.parts], compiled=None,
      phases=[dataclasses.asdict(phase) for phase in found], step_seconds=seconds, run_hours=seconds * config.method.steps / 3600,
      assumed_shares=plan_costs.SHARES)
  if devices is not None:
    compiled = _compile(config, model, devices, axes, hlo)
    report.update(compiled=compiled, needed_bytes=compiled['total_bytes'])
  report['fits'] = report['needed_bytes'] <= (1 - SPARE) * chip.memory
  return report, estimate


def sizes_of(name):
  """A model's sizes by its name: those of its directory, or, with nothing downloaded, of the published models."""
  from dsr_jax.models.config import JanusConfig
  published = {'janus-pro-1b': JanusConfig.janus_pro_1b, 'janus-pro-7b': JanusConfig.janus_pro_7b, 'scenes': JanusConfig.scenes}
  for key, make in published.items():
    if key in name.lower() and not os.path.isdir(name):
      return make()
  from dsr_jax import model_source
  from dsr_jax.convert import directory
  return directory.read_config(model_source.directory_of(name))


def stand_in_templates(model):
  """Token ids around prompts, as many as the real ones have: nothing in a plan depends on which they are."""
  from dsr_jax.models.config import Templates
  last = model.text.vocab_size - 1
  return Templates(bos_id=1, eos_id=2, pad_id=0, boi_id=3, eoi_id=4, image_id=5, generation_prefix=(1, 6, 7), generation_suffix=(8, 6, 3),
                   understanding_prefix=(1, 6, 7, 3), understanding_infix=(4, 8), understanding_suffix=(8, 6, 7),
                   forbidden_text_ids=(0, 1, 3, 4, 5, last))


def lower_step(config, model, mesh):
  """The real step lowered for a mesh, from shapes alone: {kind of batch: jax.stages.Lowered}; `separate` has two kinds."""
  import jax
  from dsr_jax import plan_sizes
  from dsr_jax import state as state_lib
  from dsr_jax import step as step_lib
  from dsr_jax.models import janus
  model = dataclasses.replace(model, templates=model.templates or stand_in_templates(model))
  with jax.set_mesh(mesh):
    state = state_lib.abstract_state(plan_sizes.shapes(model), config.method, config.system, mesh)
    step = step_lib.make_step(janus.graphdef_of(model), config.method, config.system, mesh, model.templates)
    kinds = [(task,) for task in config.method.tasks] if config.method.strategy == 'separate' else [config.method.tasks]
    return {' and '.join(kind): step.lower(state, _batch(config, model, mesh, kind)) for kind in kinds}


def _batch(config, model, mesh, tasks):
  """Shapes and layouts of a step's inputs."""
  import jax
  import numpy as np
  from dsr_jax import plan_sizes
  from dsr_jax import sharding
  rows, side = config.method.inputs_per_task, model.image_size
  whole, split = sharding.whole(mesh), sharding.batch_sharding(mesh, rows)
  batch = {'seed': jax.ShapeDtypeStruct((), np.uint32, sharding=whole)}
  if 'generation' in tasks:
    for name, shape, where in (('prompt', (rows, config.data.max_prompt_tokens), split), ('instruction', (plan_sizes.QUESTION,), whole)):
      batch[f'{name}_ids'] = jax.ShapeDtypeStruct(shape, np.int32, sharding=where)
      batch[f'{name}_mask'] = jax.ShapeDtypeStruct(shape, np.bool_, sharding=where)
  if 'understanding' in tasks:
    batch['pixels'] = jax.ShapeDtypeStruct((rows, side, side, 3), np.uint8, sharding=split)
    batch['question_ids'] = jax.ShapeDtypeStruct((rows, plan_sizes.QUESTION), np.int32, sharding=split)
    batch['question_mask'] = jax.ShapeDtypeStruct((rows, plan_sizes.QUESTION), np.bool_, sharding=split)
  return batch


def _chunks(config):
  from dsr_jax import step as step_lib
  return step_lib.chunks(config.method, config.system)


def _devices(name, topology, chips):
  """The slice's devices, as the TPU compiler knows them. InputError without the compiler."""
  from jax.experimental import topologies
  try:
    devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
    if len(devices) != chips:  # v4 has two cores a chip, that work as one
      devices = topologies.get_topology_desc(platform='tpu', topology_name=topology, chip_config_name='megacore').devices
  except Exception as e:  # JAX tells a missing compiler and a wrong name apart only in words
    text = str(e).splitlines()[0][:200]
    if 'nvalid' in text or 'divisible' in text:
      raise InputError(f'found the topology {topology!r}, which the TPU compiler does not know ({text}); expected one as '
                       f'{", ".join(f"{name}:{shape}" for shape in plan_costs.TOPOLOGIES[name])}; choose one of them') from e
    raise InputError(f'found no TPU compiler ({text}); expected libtpu; pip install -r requirements-tpu.txt in an environment of its own, '
                     'or count only, with --nocompile') from e
  return list(devices)


def _compile(config, model, devices, axes, hlo):
  """Compiles for each kind of batch; memory, collectives and the largest arrays of the fullest program."""
  from dsr_jax import sharding
  mesh = sharding.make_mesh(config.system.mesh, devices)
  began, worst = time.perf_counter(), None
  for kind, lowered in lower_step(config, model, mesh).items():
    found = measure(lowered, config, model, axes, hlo)
    print(f'compiled     {kind}: {found["total_bytes"] / 2**30:.2f} GiB a device', file=sys.stderr)
    if worst is None or found['total_bytes'] > worst['total_bytes']:
      worst = found
  return {**worst, 'compile_seconds': time.perf_counter() - began}


def measure(lowered, config, model, axes, hlo=''):
  """What the compiler and its program say: bytes a device, collectives, moves in decode loops, positions of logits held at once."""
  import jax
  from dsr_jax import plan_hlo
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    used = re.search(r'Used ([\d.]+)([GM]) of', str(e))
    if not used:
      raise
    return dict(total_bytes=float(used[1]) * (2**30 if used[2] == 'G' else 2**20), refused=str(e).splitlines()[0][:300])
  m = compiled.memory_analysis()
  text = compiled.as_text()
  if hlo:
    with open(hlo, 'w', encoding='utf-8') as f:
      f.write(text)
  program = plan_hlo.Program(text)
  moves = program.decode_moves()
  tp, width = axes['tp'], model.text.hidden_size
  weights = tuple(width // n for n in (1, axes['fsdp'], tp))
  positions = {name: max(program.positions(size, weights) for size in {n, n // tp})
               for name, n in (('text', model.text.vocab_size), ('image', model.vq.num_embeddings))}
  return dict(
      total_bytes=m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes + m.generated_code_size_in_bytes,
      arguments_bytes=m.argument_size_in_bytes, temporaries_bytes=m.temp_size_in_bytes, code_bytes=m.generated_code_size_in_bytes,
      operations_counted_once=(compiled.cost_analysis() or {}).get('flops'), collectives=program.collectives(),
      decode_loops=len(program.loops('decode')), largest_move_in_decode_bytes=moves[0].bytes if moves else 0,
      moves_in_decode=[f'{i.opcode} {i.bytes / 2**20:.2f} MiB ({i.scope[-120:]})' for i in moves if i.bytes > MOVED_IN_DECODE][:10],
      logits_held_at_once=positions)


def _table(report, estimate):
  """For people."""
  gib = lambda n: f'{n / 2**30:8.2f} GiB'
  mesh = ', '.join(f'{name} {size}' for name, size in report['mesh'].items())
  lines = ['', f'{report["config"]} on {report["topology"]}: {report["chips"]} chips, mesh {mesh}', '', estimate.table(), '']
  if (compiled := report['compiled']) and 'refused' not in compiled:
    lines += [f'compiled in {compiled["compile_seconds"]:.0f} s: {gib(compiled["total_bytes"])} a device '
              f'({gib(compiled["arguments_bytes"])} of state and inputs, {gib(compiled["temporaries_bytes"])} of temporaries)',
              'collectives, each loop counted once: ' + ', '.join(
                  f'{n} {kind} (largest {size / 2**20:.1f} MiB)' for kind, (n, size) in compiled['collectives'].items()),
              f'{compiled["decode_loops"]} decode loops; the largest move in them has {compiled["largest_move_in_decode_bytes"] / 2**20:.3f} MiB',
              *compiled['moves_in_decode']]
  elif compiled:
    lines += [compiled['refused']]
  share = report['needed_bytes'] / report['memory_bytes']
  lines += [f'needed {gib(report["needed_bytes"])} of {gib(report["memory_bytes"])} a device ({share:.0%})', '',
            f'{"phase":<34}{"PFLOP":>8}{"GB a device":>13}{"GB over links":>15}{"seconds":>9}  collectives']
  for p in report['phases']:
    lines.append(f'{p["name"]:<34}{p["operations"] / 1e15:8.2f}{p["bytes"] / 1e9:13.1f}{p["collective_bytes"] / 1e9:15.1f}{p["seconds"]:9.2f}'
                 f'  {p["collectives"]}')
  shares = ', '.join(f'{share:.0%} of {name}' for name, share in report['assumed_shares'].items())
  return '\n'.join([*lines, f'a step {report["step_seconds"]:.1f} s, the run {report["run_hours"]:.1f} h, assumed that {shares} rates are reached', ''])


if __name__ == '__main__':
  errors.run_main(main, config_lib.check_flags)
