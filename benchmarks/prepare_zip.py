"""Prepares a zip of many small JPEGs with the command itself: measures its rate and its memory, and
whether a preparation that is killed repeatedly ends with the same bytes.

  python -m benchmarks.prepare_zip [--pictures=20000 --kills=10 --workers=2 --seed=0]

The zip is made first, outside the measured time. One preparation runs without interruption, with
its memory (RSS) read every 20 ms; another gets SIGKILL at random moments, one per part of its work.
Prints one JSON object; exits with 1 if the files differ or memory grew by more than 200 MiB.
"""

import hashlib
import io
import json
import os
import pathlib
import platform
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import zipfile

from absl import flags
import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

from dsr_jax import cli

ROOT = pathlib.Path(__file__).resolve().parent.parent
GROWTH_MIB = 200
SIDES = (160, 120)  # of an image, in pixels


def write_zip(path, number, seed):
  """A zip of `number` JPEGs, no two alike."""
  rng = np.random.default_rng(seed)
  with zipfile.ZipFile(path, 'w') as archive:
    for i in range(number):
      coarse = rng.integers(0, 256, (12, 16, 3), np.uint8)
      image = Image.fromarray(coarse).resize(SIDES, Image.Resampling.BICUBIC)
      file = io.BytesIO()
      image.save(file, 'JPEG', quality=85)
      archive.writestr(f'pictures/{i:06d}.jpg', file.getvalue())


def start(source, data_dir, workers):
  """Starts the command; its output goes to a file beside its folder."""
  command = [sys.executable, '-m', 'dsr_jax.prepare', '--dataset=folder', f'--workers={workers}']
  command += [f'--source={source}', f'--data_dir={data_dir}']
  with open(f'{data_dir}.log', 'a', encoding='utf-8') as log:
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def resident(process) -> int:
  """The resident memory of a process in bytes; 0 once it has ended."""
  try:
    pages = pathlib.Path(f'/proc/{process}/statm').read_text(encoding='utf-8').split()[1]
  except (OSError, IndexError):
    return 0
  return int(pages) * resource.getpagesize()


def cpu_seconds() -> float:
  """CPU seconds of all child processes that have ended."""
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime


def unbroken(source, data_dir, workers):
  """(seconds, CPU seconds, the rate that it reports, MiB at the first image, peak MiB)."""
  began, used = time.perf_counter(), cpu_seconds()
  process = start(source, data_dir, workers)
  folder = pathlib.Path(data_dir) / 'folder' / '1.0.0'
  first, most = None, 0
  while process.poll() is None:
    now = resident(process.pid)
    most = max(most, now)
    # Imports are done once the first shard has begun.
    if first is None and folder.is_dir() and any(folder.glob('*.new')):
      first = now
    time.sleep(0.02)
  assert process.wait() == 0, pathlib.Path(f'{data_dir}.log').read_text(encoding='utf-8')
  said = pathlib.Path(f'{data_dir}.log').read_text(encoding='utf-8')
  if first is None:
    raise RuntimeError('the preparation ended before its memory was measured: use more --pictures')
  rate = re.findall(r'^prepared +\d+ pictures, ([\d,]+) a second', said, re.MULTILINE)[-1]
  seconds = time.perf_counter() - began
  return (
    seconds,
    cpu_seconds() - used,
    int(rate.replace(',', '')),
    first >> 20,
    most >> 20,
  )


def killed(source, data_dir, workers, kills, lasting, rng):
  """Kills the command `kills` times, then lets it end; returns how many shards each start found."""
  moments = []
  folder = pathlib.Path(data_dir) / 'folder' / '1.0.0'
  while True:
    process = start(source, data_dir, workers)
    if len(moments) < kills:
      there = len(list(folder.glob('*array_record-?????')))
      end = time.monotonic() + 10 * lasting
      # Waits for the start of its work, plus part of the time that a shard takes.
      while process.poll() is None and time.monotonic() < end and not any(folder.glob('*.new')):
        time.sleep(0.002)
      time.sleep(rng.uniform(0, 2 * lasting / kills))
      if process.poll() is None:
        process.kill()
        process.wait()
        moments.append(there)
        continue
    assert process.wait() == 0
    return moments


def hashes(data_dir):
  """{file: SHA-256} of the data set."""
  folder = pathlib.Path(data_dir) / 'folder' / '1.0.0'
  return {
    path.name: hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.iterdir())
    if path.name != '.lock'
  }


def same_as_source(source, data_dir) -> bool:
  """Whether TFDS reads back the bytes of the zip, in its order."""
  builder = tfds.builder_from_directory(os.path.join(data_dir, 'folder', '1.0.0'))
  rows = builder.as_data_source('train', decoders={'image': tfds.decode.SkipDecoding()})
  with zipfile.ZipFile(source) as archive:
    names = archive.namelist()
    return len(names) == len(rows) and all(
      rows[i]['image'] == archive.read(name) for i, name in enumerate(names)
    )


def main(argv, f=flags.FLAGS):
  cli.no_arguments(argv)
  rng = random.Random(f.seed)
  with tempfile.TemporaryDirectory() as folder:
    source = os.path.join(folder, 'pictures.zip')
    write_zip(source, f.pictures, f.seed)
    whole, broken = os.path.join(folder, 'whole'), os.path.join(folder, 'broken')
    seconds, used, rate, first, most = unbroken(source, whole, f.workers)
    moments = killed(source, broken, f.workers, f.kills, f.pictures / rate, rng)
    result = {
      'pictures': f.pictures,
      'zip_mib': os.path.getsize(source) >> 20,
      'workers': f.workers,
      'pictures_per_second': rate,
      'seconds': round(seconds, 1),
      'pictures_per_second_of_cpu': round(f.pictures / used),
      'memory_mib_at_first': first,
      'memory_mib_most': most,
      'same_bytes_as_the_zip': same_as_source(source, whole),
      'kills': len(moments),
      'shards_there_at_each_start': moments,
      'same_files_after_kills': hashes(whole) == hashes(broken),
      'machine': f'{platform.processor() or platform.machine()}, {os.cpu_count()} cores',
      'load': [round(x, 1) for x in os.getloadavg()],
      'date': time.strftime('%Y-%m-%d', time.gmtime()),
    }
  print(json.dumps(result, indent=1))
  good = result['same_bytes_as_the_zip'] and result['same_files_after_kills']
  return 0 if good and len(moments) == f.kills and most - first <= GROWTH_MIB else 1


def define_flags(f=flags.FLAGS):
  flags.DEFINE_integer('pictures', 20_000, 'Images in the zip.', lower_bound=1, flag_values=f)
  flags.DEFINE_integer('kills', 10, 'Number of kills of the second preparation.', flag_values=f)
  flags.DEFINE_integer('workers', os.cpu_count() or 1, 'Threads of the command.', flag_values=f)
  flags.DEFINE_integer('seed', 0, 'Seed of the images and of the moments of kills.', flag_values=f)


if __name__ == '__main__':
  cli.run_main(main, define_flags)
