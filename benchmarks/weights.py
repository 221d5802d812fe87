"""Memory and time of converting, loading and first using full-size models. Run by hand, one part at
a time:

  python -m benchmarks.weights make --size=7b --directory=/tmp/dsr_7b
  python -m benchmarks.weights convert --directory=/tmp/dsr_7b --target=/tmp/dsr_7b_hf --format=hf
  python -m benchmarks.weights load --directory=/tmp/dsr_7b --devices=8
  python -m benchmarks.weights generate --directory=/tmp/dsr_1b --num_samples=8

`make` writes random weights, because memory and time do not depend on their values. They are in the
original layout (or --format=hf) and like the published ones: bfloat16, files of at most 4 GiB;
14.8 GB for the 7B. `load` reads them as float32, onto virtual devices. Memory is anonymous memory
(RssAnon in /proc), read ten times per second: pages of mapped files belong to the files and can be
dropped at any time. Prints a JSON object; docs/weights.md has the results.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import numpy as np

from dsr_jax import convert
from dsr_jax.convert import locate, table
from dsr_jax.models.janus import model as janus
from dsr_jax.models.janus.config import JanusConfig
from dsr_jax.models.janus.processor import Processor

ROOT = pathlib.Path(__file__).resolve().parent.parent

LOAD = """
import sys
import jax
jax.config.update('jax_num_cpu_devices', {devices})
from dsr_jax import config, convert, sharding
from dsr_jax.models.janus.family import JANUS
from jax.sharding import SingleDeviceSharding
import time
mesh = sharding.make_mesh(config.Mesh(data=1, fsdp={devices}, tp=1))
def place(leaf, where):
  # What every device holds whole is held by one: virtual devices share one memory.
  return leaf.placed(where if len(where.spec) else SingleDeviceSharding(jax.devices()[0]))
start = time.perf_counter()
bundle = convert.load({directory!r}, lambda leaf: leaf)
opened = time.perf_counter()
layout = sharding.shardings(bundle.params, mesh, JANUS.sharding_rules)
params = jax.block_until_ready(jax.tree.map(place, bundle.params, layout))
held = sum(shard.data.nbytes for x in jax.tree.leaves(params) for shard in x.addressable_shards)
print(held, opened - start, time.perf_counter() - opened)
"""


def make(size, directory, layout):
  """Writes a directory with random weights; tokenizer and processor are the embedded model's."""
  config = {'1b': JanusConfig.janus_pro_1b(), '7b': JanusConfig.janus_pro_7b()}[size]
  processor = Processor.from_directory(locate.EMBEDDED, config.text.vocab_size)
  names = {
    (atom.leaf, atom.layer): entry.name
    for entry in table.entries(janus.abstract_params(config), 'hf')
    for atom in entry.atoms
  }
  rng = np.random.default_rng(0)
  draw = _tiled(rng) if size == '7b' else lambda shape: rng.standard_normal(shape, np.float32)

  def read(atom):
    return _Random(atom, names[atom.leaf, atom.layer], draw)

  unused = {
    name: np.zeros(shape, np.float32)
    for name, shape in table.unused(config.vision, 'deepseek').items()
  }
  convert.export(
    directory,
    layout,
    dataclasses.replace(config, templates=processor.templates),
    processor,
    read,
    locate.EMBEDDED,
    kept_aside=unused,
    dtype='bfloat16',
  )
  return dict(
    bytes=sum(f.stat().st_size for f in pathlib.Path(directory).rglob('*') if f.is_file())
  )


def _tiled(rng):
  """Repeats a few numbers: memory and time do not depend on the values, and seven billion take long
  to draw.
  """
  some = rng.standard_normal(1 << 22, np.float32)
  return lambda shape: np.resize(some, shape)


class _Random:
  """An atom of random numbers, made one slice at a time, scaled to keep activations and logits in
  range.
  """

  def __init__(self, atom, name, draw):
    self.shape, self.dtype, self._name, self._draw = atom.shape, np.dtype(np.float32), name, draw

  def __array__(self, dtype=None, copy=None):
    del copy
    shape = self.shape
    x = self._draw(shape)
    if self._name.endswith('bias'):
      x *= 0.02
    elif len(shape) == 1:  # norms
      x = 1 + 0.05 * x
    elif 'quantize' in self._name:
      x /= np.linalg.norm(x, axis=-1, keepdims=True)
    elif 'embed' not in self._name or 'patch_embedding' in self._name:
      x *= np.float32((2.0 if 'head' in self._name else 1.0) * (x.size / shape[0]) ** -0.5)
    return x if dtype is None else x.astype(dtype)


def measured(command, env=None):
  """Runs a command; returns (stdout, seconds, peak anonymous memory in bytes). Raises if the
  command fails.
  """
  start = time.perf_counter()
  process = subprocess.Popen(
    command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}
  )
  peak = 0

  def watch():
    nonlocal peak
    while process.poll() is None:
      try:
        status = pathlib.Path(f'/proc/{process.pid}/status').read_text()
        peak = max(
          peak,
          next(
            int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith('RssAnon')
          ),
        )
      except (OSError, StopIteration):
        pass  # the process has ended
      time.sleep(0.1)

  watcher = threading.Thread(target=watch)
  watcher.start()
  out, _ = process.communicate()
  watcher.join()
  if process.returncode:
    sys.exit(process.returncode)
  return out, time.perf_counter() - start, peak


def convert_(directory, target, layout):
  out, seconds, peak = measured(
    [
      sys.executable,
      '-m',
      'dsr_jax.convert',
      f'--source={directory}',
      f'--target={target}',
      f'--format={layout}',
      '--overwrite',
    ],
    {'JAX_PLATFORMS': 'cpu'},
  )
  size = sum(f.stat().st_size for f in pathlib.Path(target).rglob('*.safetensors'))
  return dict(
    tensors=json.loads(out)['tensors'], bytes=size, seconds=seconds, anonymous_mib=peak >> 20
  )


def load(directory, devices):
  code = LOAD.format(devices=devices, directory=str(directory))
  out, seconds, peak = measured([sys.executable, '-c', code], {'JAX_PLATFORMS': 'cpu'})
  held, opened, placed = (float(x) for x in out.split())
  return dict(
    devices=devices,
    held_mib=int(held) >> 20,
    above_held_mib=(peak - int(held)) >> 20,
    seconds=seconds,
    open_and_hash_seconds=opened,
    place_seconds=placed,
  )


def generate(directory, samples):
  target = pathlib.Path(f'{directory}_pictures')
  shutil.rmtree(target, ignore_errors=True)
  _, seconds, peak = measured(
    [
      sys.executable,
      '-m',
      'dsr_jax.generate',
      f'--model={directory}',
      '--prompt=a red disc',
      f'--num_samples={samples}',
      f'--output={target}',
    ]
  )
  return dict(num_samples=samples, seconds=seconds, anonymous_mib=peak >> 20)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('part', choices=('make', 'convert', 'load', 'generate'))
  parser.add_argument('--size', choices=('1b', '7b'), default='1b')
  parser.add_argument('--directory', required=True)
  parser.add_argument('--target')
  parser.add_argument('--format', choices=('hf', 'deepseek'), default=None)
  parser.add_argument('--devices', type=int, default=8)
  parser.add_argument('--num_samples', type=int, default=8)
  a = parser.parse_args()
  result = {
    'make': lambda: make(a.size, a.directory, a.format or 'deepseek'),
    'convert': lambda: convert_(a.directory, a.target, a.format or 'hf'),
    'load': lambda: load(a.directory, a.devices),
    'generate': lambda: generate(a.directory, a.num_samples),
  }[a.part]()
  print(json.dumps({'part': a.part, **result}))


if __name__ == '__main__':
  main()
