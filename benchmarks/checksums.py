"""What the checksums of a checkpoint cost, beside writing it and reading it.

  python -m benchmarks.checksums [--gib=2 --rounds=5]

Writes a state of so many GiB of random float32 as a run does, and times the checksums within.
Prints one JSON object; seconds are medians, the file system's cache is not emptied.
"""

import json
import os
import statistics
import tempfile
import time
from unittest import mock

from absl import app, flags
import jax
import numpy as np

from dsr_jax import cli
from dsr_jax.runtime import checkpoints, checksums
from dsr_jax.state import TrainState

ABOUT = {part: {'fingerprint': ''} for part in ('method', 'data', 'model')}
ARRAY_BYTES = 256 << 20  # of one array: a layer's share of a large model


def random_state(gib: float) -> TrainState:
  """A state whose saved part is so large."""
  rng = np.random.default_rng(0)
  number = max(1, round(gib * 2**30 / ARRAY_BYTES))
  params = {
    f'layer_{i}': jax.device_put(rng.random(ARRAY_BYTES // 4, np.float32)) for i in range(number)
  }
  return TrainState(
    step=jax.numpy.int32(0), params=params, opt_state={}, fixed_params={}, ref_params=None
  )


def timed(function, seconds: list):
  """The function, which adds how long each of its calls took to `seconds`."""

  def call(*args, **named):
    began = time.perf_counter()
    result = function(*args, **named)
    seconds.append(time.perf_counter() - began)
    return result

  return call


def main(argv, f=flags.FLAGS):
  """Prints the times, as JSON."""
  cli.no_arguments(argv)
  state = random_state(f.gib)
  whole, summing, comparing = [], [], []
  with mock.patch.object(checksums, 'write', timed(checksums.write, summing)):
    for _ in range(f.rounds):
      with tempfile.TemporaryDirectory(dir=f.folder or None) as folder:
        saver = checkpoints.Checkpoints(folder, ABOUT)

        def save(saver=saver):
          saver.save(1, state)
          saver.wait()

        timed(save, whole)()
        timed(saver.verify, comparing)(1)
        saver.close()
  write, sums, verify = (statistics.median(x) for x in (whole, summing, comparing))
  result = {
    'gib': checkpoints.num_bytes(state.params) / 2**30,
    'cores': os.cpu_count(),
    'rounds': f.rounds,
    'write_seconds': round(write, 3),
    'checksums_seconds': round(sums, 3),
    'checksums_share': round(sums / write, 4),
    'verify_seconds': round(verify, 3),
  }
  print(json.dumps(result, indent=2))


def define_flags(f=flags.FLAGS):
  flags.DEFINE_float('gib', 2.0, 'Size of the state.', flag_values=f)
  flags.DEFINE_integer('rounds', 5, 'How often it is written.', flag_values=f)
  flags.DEFINE_string('folder', '', 'On which disk; by default the temporary one.', flag_values=f)


if __name__ == '__main__':
  define_flags()
  app.run(main)
