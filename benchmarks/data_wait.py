"""What JPEG images of 640 x 480 cost a training step of the default Scenes run: how long the
devices wait for the next batch.

  python -m benchmarks.data_wait [--pictures=200 --steps=8]

Runs configs/scenes.py without evaluation, on a folder of such images and, for comparison, on its
own. Prints one JSON object with medians over all steps except the first and the last; exits with 1
if more than 2 % of a step is spent waiting.
"""

import json
import os
import pathlib
import platform
import statistics
import tempfile
import time

from absl import flags
import jax

from benchmarks import pictures_per_second
from dsr_jax import cli, config_loading, train
from dsr_jax.runtime import metrics

MOST = 0.02  # of a step


def measure(workdir, steps, **changes):
  """(median seconds per step, median seconds per step that the devices wait for data)."""
  config = config_loading.load(
    'scenes',
    method__steps=steps,
    eval__benchmark='none',
    system__samples_every=0,
    system__save_every=steps,
    **changes,
  )
  train.run(config, str(workdir))
  found = metrics.read(workdir)
  # The first step has more to do, and the last one has no next batch.
  return tuple(
    statistics.median(found[name][1][1:-1]) for name in ('time/step_seconds', 'time/data_wait')
  )


def main(argv, f=flags.FLAGS):
  cli.no_arguments(argv)
  with tempfile.TemporaryDirectory() as folder:
    pictures = pathlib.Path(folder) / 'pictures'
    pictures.mkdir()
    for i, data in enumerate(pictures_per_second.photographs(f.pictures)):
      (pictures / f'{i:04d}.jpg').write_bytes(data)
    step, wait = measure(os.path.join(folder, 'jpeg'), f.steps, data__images=str(pictures))
    own, own_wait = measure(os.path.join(folder, 'own'), f.steps)
  share = wait / step
  result = {
    'config': 'configs/scenes.py',
    'pictures': f'{f.pictures} JPEGs of 640 x 480',
    'step_seconds': round(step, 3),
    'data_wait_seconds': round(wait, 5),
    'data_wait_share': round(share, 5),
    'drawn_step_seconds': round(own, 3),
    'drawn_data_wait_seconds': round(own_wait, 5),
    'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
    'machine': f'{platform.processor() or platform.machine()}, {os.cpu_count()} cores',
    'load': [round(x, 1) for x in os.getloadavg()],
    'date': time.strftime('%Y-%m-%d', time.gmtime()),
  }
  print(json.dumps(result, indent=1))
  return int(share > MOST)


def define_flags(f=flags.FLAGS):
  flags.DEFINE_integer('pictures', 200, 'Number of different images.', lower_bound=1, flag_values=f)
  flags.DEFINE_integer(
    'steps',
    8,
    'Steps of each run; the first and the last are left out.',
    lower_bound=3,
    flag_values=f,
  )


if __name__ == '__main__':
  cli.run_main(main, define_flags)
