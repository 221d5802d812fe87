"""Checks whether a model or a step fits on a device, if the device reports its memory."""

import os

import jax

from dsr_jax import cli
from dsr_jax.errors import InputError

# The estimate of a step counts the largest arrays that live at once; the compiler may need a little
# less, but never half.
SURELY_TOO_MUCH = 1.5


def check_weights(nbytes: int, name: str):
  """InputError, or a warning, if a device has no room for the weights of a model.

  nbytes: total bytes of the weights on one device.
  """
  limit = device_bytes()
  if limit is not None and nbytes > limit:
    raise InputError(
      f'the weights of {name} need {gib(nbytes)}, but a device here has only {gib(limit)}; use a '
      'smaller model or a larger device'
    )
  _warn(nbytes, f'the weights of {name}')


def check_step(estimate):
  """The same for a step. estimate: `plan.memory.Estimate`, or None."""
  if estimate is None:
    return
  limit, state, total = device_bytes(), estimate.of('always'), estimate.total
  if limit is not None and (state > limit or total > SURELY_TOO_MUCH * limit):
    cli.log(estimate.table())
    raise InputError(
      f'a step needs an estimated {gib(total)} per device, {gib(state)} of it for the state, but a '
      f'device here has only {gib(limit)}; {estimate.advice}'
    )
  if limit is not None and total > limit:
    cli.log(f'warning      the estimate exceeds the {gib(limit)} that a device here has')
  _warn(total * jax.local_device_count(), 'the step (an estimate)')


def device_bytes() -> int | None:
  """Memory of one device for arrays; None if it does not report it, such as a CPU."""
  return (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit')


def machine_bytes() -> int:
  """The memory of this machine, which a CPU's devices share."""
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def gib(nbytes) -> str:
  """Bytes as readable text in GiB."""
  return f'{nbytes / 2**30:,.1f} GiB'


def _warn(nbytes, what):
  if jax.default_backend() == 'cpu' and nbytes > machine_bytes():
    cli.log(
      f'warning      {gib(nbytes)} needed for {what}, but this machine has {gib(machine_bytes())}: '
      'the system will end the process if memory runs out'
    )
