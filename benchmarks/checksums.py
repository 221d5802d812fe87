"""What the checksums of a checkpoint cost, compared with writing and reading it.

  python -m benchmarks.checksums [--gib=2 --rounds=5]

Writes a state of the given size, random float32, as a run does, and times the checksums in it.
Prints one JSON object; all numbers are medians, and shares are taken within a round. Seconds are
wall-clock time; the share of processor time is that of all threads, which other programs disturb
less. The file system's cache is not emptied.
"""

import json
import os
import statistics
import tempfile
import time
from unittest import mock

from absl import flags
import jax
import numpy as np

from dsr_jax import cli
from dsr_jax.runtime import checkpoints, checksums
from dsr_jax.state import TrainState

ABOUT = {part: {'fingerprint': ''} for part in ('method', 'data', 'model')}
ARRAY_BYTES = 256 << 20  # per array: about a layer of a large model


def random_state(gib: float) -> TrainState:
  """A state whose saved part has this size."""
  rng = np.random.default_rng(0)
  number = max(1, round(gib * 2**30 / ARRAY_BYTES))
  params = {
    f'layer_{i}': jax.device_put(rng.random(ARRAY_BYTES // 4, np.float32)) for i in range(number)
  }
  return TrainState(
    step=jax.numpy.int32(0), params=params, opt_state={}, fixed_params={}, ref_params=None
  )


def timed(function, took: list[tuple[float, float]]):
  """Wraps a function: each call appends its wall-clock and processor seconds to `took`."""

  def call(*args, **named):
    began = time.perf_counter(), time.process_time()
    result = function(*args, **named)
    took.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    return result

  return call


def main(argv, f=flags.FLAGS):
  """Prints the times as JSON."""
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

  def median(took):
    return round(statistics.median(seconds for seconds, _ in took), 3)

  def share(which):
    return round(statistics.median(s[which] / w[which] for s, w in zip(summing, whole)), 4)

  result = {
    'gib': checkpoints.num_bytes(state.params) / 2**30,
    'cores': os.cpu_count(),
    'rounds': f.rounds,
    'write_seconds': median(whole),
    'checksums_seconds': median(summing),
    'checksums_share': share(0),
    'checksums_share_of_processor_time': share(1),
    'verify_seconds': median(comparing),
  }
  print(json.dumps(result, indent=2))


def define_flags(f=flags.FLAGS):
  flags.DEFINE_float('gib', 2.0, 'Size of the state.', flag_values=f)
  flags.DEFINE_integer('rounds', 5, 'Number of times it is written.', flag_values=f)
  flags.DEFINE_string(
    'folder', '', 'A folder on the disk to test (default: the temporary folder).', flag_values=f
  )


if __name__ == '__main__':
  cli.run_main(main, define_flags)
