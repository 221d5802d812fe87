"""A plan: whether a step fits a slice, what it computes there and how long it takes, as JSON values
and as a table.
"""

import dataclasses
import sys
import time

from jax.experimental import topologies

from dsr_jax import families, sharding
from dsr_jax.errors import InputError, first_line
from dsr_jax.plan import costs as plan_costs
from dsr_jax.plan import memory as plan_memory
from dsr_jax.plan import program as plan_program
from dsr_jax.plan import sizes as plan_sizes

SPARE = 0.05  # of a device's memory that a plan leaves free


def plan(config, topology: str, compiling: bool = True, hlo: str = ''):
  """The plan as a dict of JSON values, and the `memory.Estimate` that it is based on.

  compiling: whether to compile the step for a TPU. hlo: output file for the program as text.

  Raises:
    InputError: the topology does not exist, or the config does not divide over it.
  """
  name, chip, chips = plan_costs.parse(topology)
  model = plan_program.sizes_of(config.model)
  families.check(model, config)
  model = families.sizes_as_drawn(model, config.method)
  axes = sharding.resolve(config.system.mesh, chips)
  sizes = plan_sizes.Sizes(model, config.method, config.system, config.data.max_prompt_tokens)
  chunks = {f'system.{key}': sizes.chunk(key) for key in ('rollout_chunk', 'update_chunk')}
  sharding.check_fits(axes, families.family_of(model).num_heads(model), chunks)
  devices = _devices(name, topology, chips) if chip.tpu and compiling else None
  estimate = plan_memory.estimate(model, config, axes)
  phases = plan_costs.phases(sizes, axes, chip)
  seconds = sum(phase.seconds for phase in phases)
  report = dict(
    topology=topology,
    chips=chips,
    mesh=axes,
    config=config.model,
    memory_bytes=chip.memory,
    estimated_bytes=estimate.total,
    needed_bytes=estimate.total,
    parts=[dict(part=part, bytes=size, lives=when) for part, size, when in estimate.parts],
    compiled=None,
    phases=[dataclasses.asdict(phase) for phase in phases],
    step_seconds=seconds,
    run_hours=seconds * config.method.steps / 3600,
    assumed_shares=plan_costs.SHARES,
  )
  if devices is not None:
    compiled = _compile(config, model, devices, hlo)
    report.update(compiled=compiled, needed_bytes=compiled['total_bytes'])
  report['fits'] = report['needed_bytes'] <= (1 - SPARE) * chip.memory
  return report, estimate


def check_fits(report: dict):
  """InputError for a plan that does not fit."""
  if report['fits']:
    return
  needed, memory = report['needed_bytes'], report['memory_bytes']
  room = (1 - SPARE) * memory
  raise InputError(
    f'the step needs {needed / 2**30:.2f} GiB per device, {(needed - room) / 2**30:.2f} more than '
    f'the {room / 2**30:.2f} that it may use ({SPARE:.0%} of {memory / 2**30:.2f} stays free); '
    f'{plan_memory.ADVICE}'
  )


def _devices(name: str, topology: str, chips: int):
  """The slice's devices, as the TPU compiler describes them. InputError without the compiler."""
  try:
    devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
    if len(devices) != chips:  # v4 has two cores per chip, which work as one
      devices = topologies.get_topology_desc(
        platform='tpu', topology_name=topology, chip_config_name='megacore'
      ).devices
  except Exception as e:  # only JAX's message tells a missing compiler from a wrong name
    text = first_line(e)
    if 'nvalid' in text or 'divisible' in text:
      known = ', '.join(f'{name}:{shape}' for shape in plan_costs.TOPOLOGIES[name])
      raise InputError(
        f'the TPU compiler does not know the topology {topology!r} ({text}); choose one such as '
        f'{known}'
      ) from e
    raise InputError(
      f'there is no TPU compiler ({text}); install libtpu in a separate environment, with pip '
      'install -r requirements-tpu.txt, or only count, with --nocompile'
    ) from e
  return list(devices)


def _compile(config, model, devices, hlo) -> dict:
  """Compiles for each kind of batch; returns the compiler's numbers for the largest program."""
  mesh = sharding.make_mesh(config.system.mesh, devices)
  began, worst = time.perf_counter(), None
  for kind, lowered in plan_program.lower_step(config, model, mesh).items():
    found = plan_program.measure(lowered, hlo)
    print(
      f'compiled     {kind}: {found["total_bytes"] / 2**30:.2f} GiB per device', file=sys.stderr
    )
    if worst is None or found['total_bytes'] > worst['total_bytes']:
      worst = found
  return {**worst, 'compile_seconds': time.perf_counter() - began}


# For people.


def table(report: dict, estimate: plan_memory.Estimate) -> str:
  """The plan, by part and by phase."""
  mesh = ', '.join(f'{name} {size}' for name, size in report['mesh'].items())
  needed, memory = report['needed_bytes'], report['memory_bytes']
  shares = ', '.join(f'{share:.0%} of {name}' for name, share in report['assumed_shares'].items())
  return '\n'.join(
    [
      '',
      f'{report["config"]} on {report["topology"]}: {report["chips"]} chips, mesh {mesh}',
      '',
      estimate.table(),
      '',
      *_compiled_lines(report['compiled']),
      f'needed {_gib(needed)} of {_gib(memory)} per device ({needed / memory:.0%})',
      '',
      f'{"phase":<34}{"PFLOP":>8}{"GB/device":>13}{"GB over links":>15}{"seconds":>9}  collectives',
      *map(_phase_line, report['phases']),
      f'a step {report["step_seconds"]:.1f} s, the run {report["run_hours"]:.1f} h, assuming these '
      f'shares of the published rates: {shares}',
      '',
    ]
  )


def _compiled_lines(compiled: dict | None) -> list[str]:
  """What the compiler reports; nothing if it did not run."""
  if not compiled:
    return []
  if 'refused' in compiled:
    return [compiled['refused']]
  return [
    f'compiled in {compiled["compile_seconds"]:.0f} s: {_gib(compiled["total_bytes"])} per device '
    f'({_gib(compiled["arguments_bytes"])} of state and inputs, '
    f'{_gib(compiled["temporaries_bytes"])} of temporaries)',
  ]


def _phase_line(phase: dict) -> str:
  return (
    f'{phase["name"]:<34}{phase["operations"] / 1e15:8.2f}{phase["bytes"] / 1e9:13.1f}'
    f'{phase["collective_bytes"] / 1e9:15.1f}{phase["seconds"]:9.2f}  {phase["collectives"]}'
  )


def _gib(size: float) -> str:
  return f'{size / 2**30:8.2f} GiB'
