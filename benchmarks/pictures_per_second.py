"""Images per second on one core: decoded for a batch, and opened to see whether they decode.

  python -m benchmarks.pictures_per_second [--pictures=64 --seconds=4]

JPEGs of 640 x 480. Each step runs alone in one thread and is timed with that thread's clock, so
that other load on the machine matters little:

- `batch_N`: as for a run of a model of N x N pixels: decoded whole, then scaled and cropped;
- `verify`: as in the checks of `prepare` and at the start of a run, where Pillow's draft mode
  computes an eighth of each side and gives the same verdict;
- `verify_whole`: the same without draft mode.

Draft mode before scaling would change pixels; `draft_changes_N` says by how much (mean and largest
of 255), and is the reason why batches do not use it. Prints one JSON object.
"""

import io
import json
import os
import platform
import time

from absl import flags
import numpy as np
import PIL
from PIL import Image, features

from dsr_jax import cli, images

SIDES = (640, 480)
MODELS = (32, 384)  # side in pixels, for the embedded model and Janus-Pro


def photographs(number: int, seed: int = 0) -> list[bytes]:
  """JPEG files of size SIDES with detail at all scales, about as many bytes as photographs."""
  rng = np.random.default_rng(seed)
  made = []
  for _ in range(number):
    pixels = np.zeros((SIDES[1], SIDES[0], 3), np.float32)
    for scale in (4, 16, 64, 256):
      noise = rng.normal(0, 160 / scale**0.5, (max(scale * 3 // 4, 1), scale, 3))
      layer = [
        Image.fromarray(noise[..., c].astype(np.float32)).resize(SIDES, Image.Resampling.BICUBIC)
        for c in range(3)
      ]
      pixels += np.stack([np.asarray(channel) for channel in layer], -1)
    file = io.BytesIO()
    eight = np.clip(pixels + 128, 0, 255).astype(np.uint8)
    Image.fromarray(eight).save(file, 'JPEG', quality=90)
    made.append(file.getvalue())
  return made


def rate(function, files, seconds: float) -> float:
  """Calls per second of this thread's time, cycling through the files."""
  for data in files[:4]:
    function(data)
  began, count = time.thread_time(), 0
  while time.thread_time() - began < seconds:
    function(files[count % len(files)])
    count += 1
  return round(count / (time.thread_time() - began), 1)


def for_batch(size):
  return lambda data: images.preprocess(images.load_image(io.BytesIO(data)), size)


def verify_whole(data):
  Image.open(io.BytesIO(data)).load()


def draft_change(data, size):
  """(mean, largest) change by draft mode in an image of a batch, of 255."""
  drafted = Image.open(io.BytesIO(data))
  drafted.draft('RGB', (size, size))
  a, b = (images.preprocess(image, size).astype(int) for image in (io.BytesIO(data), drafted))
  return float(np.abs(a - b).mean()), int(np.abs(a - b).max())


def main(argv, f=flags.FLAGS):
  cli.no_arguments(argv)
  files = photographs(f.pictures)
  result = {
    'pictures': f'{f.pictures} JPEGs of {SIDES[0]} x {SIDES[1]}, '
    f'{sum(map(len, files)) // len(files) >> 10} KiB each'
  }
  for size in MODELS:
    result[f'batch_{size}'] = rate(for_batch(size), files, f.seconds)
  result['verify'] = rate(lambda d: images.verify(io.BytesIO(d), 'x'), files, f.seconds)
  result['verify_whole'] = rate(verify_whole, files, f.seconds)
  for size in MODELS:
    mean, most = np.array([draft_change(data, size) for data in files[:8]]).T
    result[f'draft_changes_{size}'] = [round(float(mean.mean()), 3), int(most.max())]
  result |= {
    'pillow': f'{PIL.__version__}, libjpeg-turbo {features.check_feature("libjpeg_turbo")}',
    'machine': f'{platform.processor() or platform.machine()}, {os.cpu_count()} cores',
    'load': [round(x, 1) for x in os.getloadavg()],
    'date': time.strftime('%Y-%m-%d', time.gmtime()),
  }
  print(json.dumps(result, indent=1))


def define_flags(f=flags.FLAGS):
  flags.DEFINE_integer('pictures', 64, 'Number of different images.', lower_bound=1, flag_values=f)
  flags.DEFINE_float('seconds', 4.0, 'Seconds to measure each step.', flag_values=f)


if __name__ == '__main__':
  cli.run_main(main, define_flags)
