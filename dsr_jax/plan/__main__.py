"""Plans a run for a slice without having it: does it fit, what does it do, how long does it take.

  python -m dsr_jax.plan --config=configs/janus_pro_7b.py --topology=v5e:8x8 [--config.key=value]

For TPU slices the real step is compiled by the real TPU compiler (libtpu, from
requirements-tpu.txt; no TPU). For others, as h200:8, the counted half alone. A table on stderr,
JSON on stdout.
"""

import dataclasses
import json
import os
import sys
import time

os.environ['JAX_PLATFORMS'] = 'cpu'  # before JAX: the TPU compiler is asked, no TPU is looked for
os.environ['TPU_SKIP_MDS_QUERY'] = '1'

# pylint: disable=wrong-import-position
from absl import flags
from ml_collections import config_flags

from dsr_jax import config as config_lib
from dsr_jax import errors
from dsr_jax.errors import InputError
from dsr_jax.plan import costs as plan_costs

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'The run: a file of configs/, its keys set by --config.key=value.'
)
_TOPOLOGY = flags.DEFINE_string('topology', None, 'The slice: v5e:8x8, v5p:4x4x4, v6e:8x8, h200:8.')
_COMPILE = flags.DEFINE_bool(
  'compile', True, 'Whether to compile the step for a TPU slice; --nocompile counts only.'
)
_HLO = flags.DEFINE_string('hlo', '', 'Where to leave the compiled program as text.')

SPARE = 0.05  # of a device's memory that a plan leaves free


def main(argv):
  """Prints the plan; exit status 2 where it does not fit."""
  if len(argv) > 1:
    raise InputError(
      f'found the stray argument {argv[1]!r}; expected flags only; write --name=value'
    )
  if not _TOPOLOGY.value:
    raise InputError(
      'found no --topology; expected a slice; name one, as --topology=v5e:8x8 or --topology=h200:8'
    )
  config = config_lib.from_config_dict(_CONFIG.value)
  report, estimate = plan(config, _TOPOLOGY.value, _COMPILE.value, _HLO.value)
  print(_table(report, estimate), file=sys.stderr)
  print(json.dumps(report, indent=2))
  if not report['fits']:
    room = (1 - SPARE) * report['memory_bytes']
    # The compiler's word over the estimate's: what is asked of a turn shrinks by what the estimate
    # missed.
    missed = report['needed_bytes'] / estimate.total
    over = report['needed_bytes'] - room
    raise InputError(
      f'found a step that needs {report["needed_bytes"] / 2**30:.2f} GiB of a device; expected at '
      f'most {room / 2**30:.2f} '
      f'({SPARE:.0%} of {report["memory_bytes"] / 2**30:.2f} kept free), {over / 2**30:.2f} less; '
      f'{estimate.advice(room / missed)}'
    )


def plan(config, topology, compiling=True, hlo=''):
  """The plan as a dict of JSON values, and the `plan_memory.Estimate` it rests on.

  Errors: InputError where the topology does not exist or the config does not divide over it.
  """
  from dsr_jax import sharding
  from dsr_jax.plan import memory as plan_memory
  from dsr_jax.plan import program as plan_program
  from dsr_jax.plan import sizes as plan_sizes

  name, chip, chips = plan_costs.parse(topology)
  model = plan_program.sizes_of(config.model)
  axes = sharding.resolve(config.system.mesh, chips)
  sharding.check_fits(axes, model.text.num_attention_heads, _chunks(config))
  devices = _devices(name, topology, chips) if chip.tpu and compiling else None
  s = plan_sizes.Sizes(model, config.method, config.system, config.data.max_prompt_tokens)
  estimate = plan_memory.estimate(model, config, axes)
  found = plan_costs.phases(s, axes, chip)
  seconds = sum(phase.seconds for phase in found)
  report = dict(
    topology=topology,
    chips=chips,
    mesh=axes,
    config=config.model,
    memory_bytes=chip.memory,
    estimated_bytes=estimate.total,
    needed_bytes=estimate.total,
    parts=[dict(part=n, bytes=b, lives=w) for n, b, w in estimate.parts],
    compiled=None,
    phases=[dataclasses.asdict(phase) for phase in found],
    step_seconds=seconds,
    run_hours=seconds * config.method.steps / 3600,
    assumed_shares=plan_costs.SHARES,
  )
  if devices is not None:
    compiled = _compile(config, model, devices, axes, hlo)
    report.update(compiled=compiled, needed_bytes=compiled['total_bytes'])
  report['fits'] = report['needed_bytes'] <= (1 - SPARE) * chip.memory
  return report, estimate


def _chunks(config):
  from dsr_jax import step as step_lib

  return step_lib.chunks(config.method, config.system)


def _devices(name, topology, chips):
  """The slice's devices, as the TPU compiler knows them. InputError without the compiler."""
  from jax.experimental import topologies

  try:
    devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
    if len(devices) != chips:  # v4 has two cores a chip, that work as one
      devices = topologies.get_topology_desc(
        platform='tpu', topology_name=topology, chip_config_name='megacore'
      ).devices
  except Exception as e:  # JAX tells a missing compiler and a wrong name apart only in words
    text = str(e).splitlines()[0][:200]
    if 'nvalid' in text or 'divisible' in text:
      raise InputError(
        f'found the topology {topology!r}, which the TPU compiler does not know ({text}); expected '
        'one as '
        f'{", ".join(f"{name}:{shape}" for shape in plan_costs.TOPOLOGIES[name])}; choose one of '
        'them'
      ) from e
    raise InputError(
      f'found no TPU compiler ({text}); expected libtpu; pip install -r requirements-tpu.txt in an '
      'environment of its own, '
      'or count only, with --nocompile'
    ) from e
  return list(devices)


def _compile(config, model, devices, axes, hlo):
  """Compiles for each kind of batch; memory, collectives and the largest arrays of the fullest
  program.
  """
  from dsr_jax import sharding
  from dsr_jax.plan import program as plan_program

  mesh = sharding.make_mesh(config.system.mesh, devices)
  began, worst = time.perf_counter(), None
  for kind, lowered in plan_program.lower_step(config, model, mesh).items():
    found = plan_program.measure(lowered, config, model, axes, hlo)
    print(f'compiled     {kind}: {found["total_bytes"] / 2**30:.2f} GiB a device', file=sys.stderr)
    if worst is None or found['total_bytes'] > worst['total_bytes']:
      worst = found
  return {**worst, 'compile_seconds': time.perf_counter() - began}


def _table(report, estimate):
  """For people."""

  def gib(n):
    return f'{n / 2**30:8.2f} GiB'

  mesh = ', '.join(f'{name} {size}' for name, size in report['mesh'].items())
  lines = [
    '',
    f'{report["config"]} on {report["topology"]}: {report["chips"]} chips, mesh {mesh}',
    '',
    estimate.table(),
    '',
  ]
  if (compiled := report['compiled']) and 'refused' not in compiled:
    lines += [
      f'compiled in {compiled["compile_seconds"]:.0f} s: {gib(compiled["total_bytes"])} a device '
      f'({gib(compiled["arguments_bytes"])} of state and inputs, '
      f'{gib(compiled["temporaries_bytes"])} of temporaries)',
      'collectives, each loop counted once: '
      + ', '.join(
        f'{n} {kind} (largest {size / 2**20:.1f} MiB)'
        for kind, (n, size) in compiled['collectives'].items()
      ),
      f'{compiled["decode_loops"]} decode loops; the largest move in them has '
      f'{compiled["largest_move_in_decode_bytes"] / 2**20:.3f} MiB',
      *compiled['moves_in_decode'],
    ]
  elif compiled:
    lines += [compiled['refused']]
  share = report['needed_bytes'] / report['memory_bytes']
  lines += [
    f'needed {gib(report["needed_bytes"])} of {gib(report["memory_bytes"])} a device ({share:.0%})',
    '',
    f'{"phase":<34}{"PFLOP":>8}{"GB a device":>13}{"GB over links":>15}{"seconds":>9}  collectives',
  ]
  for p in report['phases']:
    lines.append(
      f'{p["name"]:<34}{p["operations"] / 1e15:8.2f}{p["bytes"] / 1e9:13.1f}{p["collective_bytes"] / 1e9:15.1f}{p["seconds"]:9.2f}'
      f'  {p["collectives"]}'
    )
  shares = ', '.join(f'{share:.0%} of {name}' for name, share in report['assumed_shares'].items())
  return '\n'.join(
    [
      *lines,
      f'a step {report["step_seconds"]:.1f} s, the run {report["run_hours"]:.1f} h, assumed that '
      f'{shares} rates are reached',
      '',
    ]
  )


if __name__ == '__main__':
  errors.run_main(main, config_lib.check_flags)
