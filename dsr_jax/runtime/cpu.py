"""Divides a CPU into devices, and a step's inputs into chunks that stay in its caches.

XLA runs small operations, such as those of one decoded token, on one core, so two devices with half
of the inputs each are faster than one device with two cores. And the first write to each new page
of memory costs as much as a small matrix product, so small chunks, which use the same pages again,
are faster than all inputs at once.
"""

import contextlib
import dataclasses
import math
import os

import jax

from dsr_jax import config as config_lib

INPUTS_PER_DEVICE = 2  # of a chunk; fastest for the embedded model, in sampling and in learning


def divide(config: config_lib.Config) -> config_lib.Config:
  """Lets JAX see the CPU as `system.cpu_devices` devices, and returns the configuration with the
  chunks for them, unless it has its own. With cpu_devices=1, or on an accelerator, it is unchanged.

  Call it before JAX starts; later, or if the environment divides the CPU, only the chunks follow.
  """
  system = config.system
  if system.cpu_devices == 1:
    return config
  part = config.method.inputs_per_task // config.method.accumulate
  own = [chunk for chunk in (system.rollout_chunk, system.update_chunk) if chunk]
  devices = system.cpu_devices or _largest_divisor(math.gcd(part, *own), most=_cores())
  if 'host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
    with contextlib.suppress(RuntimeError):  # JAX has started
      jax.config.update('jax_num_cpu_devices', devices)
  if jax.default_backend() != 'cpu':
    return config
  chunk = chunk_of(part, jax.device_count())
  return dataclasses.replace(
    config,
    system=dataclasses.replace(
      system,
      rollout_chunk=system.rollout_chunk or chunk,
      update_chunk=system.update_chunk or chunk,
    ),
  )


def chunk_of(part: int, devices: int) -> int:
  """Inputs at once, of `part`; 0 if they do not divide over the devices."""
  if part % devices:
    return 0
  return devices * _largest_divisor(part // devices, most=INPUTS_PER_DEVICE)


def _largest_divisor(n: int, most: int) -> int:
  return max(d for d in range(1, most + 1) if n % d == 0)


def _cores() -> int:
  """Cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
