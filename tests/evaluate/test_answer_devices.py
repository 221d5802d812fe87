"""The first stage on one device, on eight, and in two processes: the same pictures and answers."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
from PIL import Image
from places import ROOT
import pytest
import tiny_benchmarks

from dsr_jax.evaluate.answering import drawing

pytestmark = pytest.mark.slow


def start(model, data, output, devices, *more):
  """The answering command in a process that sees so many devices."""
  plain = os.environ.get('XLA_FLAGS', '')
  command = [sys.executable, '-m', 'dsr_jax.evaluate', f'--model={model}', f'--data={data}']
  command += ['--benchmarks=geneval,pope', '--any_version', '--limit=1', '--max_tokens=6']
  command += [f'--output={output}', '--stage=answer', *more]
  return subprocess.Popen(
    command,
    cwd=ROOT,
    env={
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': f'{plain} --xla_force_host_platform_device_count={devices}',
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def finish(*processes):
  for process in processes:
    out, _ = process.communicate(timeout=3000)
    assert process.returncode == 0, out[-3000:]


def answers_of(output):
  """{path: bytes} of all answers."""
  root = pathlib.Path(output)
  found = (path for path in root.rglob('*') if path.is_file() and 'answers' in path.parts)
  return {str(path.relative_to(root)): path.read_bytes() for path in found}


def pictures_of(output):
  """{path: (codes, pixels)} of all pictures."""
  (folder,) = pathlib.Path(output).glob('*/geneval')
  records = drawing.rewards_of(str(folder))
  return {
    path: (record['codes'], np.asarray(Image.open(folder / path), int))
    for path, record in records.items()
  }


def test_any_number_of_devices_and_processes_make_the_same(hf_directory, tmp_path):
  data = tiny_benchmarks.write_all(tmp_path / 'data')
  outputs = [tmp_path / name for name in ('one', 'eight', 'two_processes')]
  finish(start(hf_directory, data, outputs[0], 1))
  finish(start(hf_directory, data, outputs[1], 8))
  with socket.create_server(('localhost', 0)) as free:
    port = free.getsockname()[1]
  cluster = [f'--coordinator=localhost:{port}', '--processes=2', '--wait_seconds=600']
  finish(*(start(hf_directory, data, outputs[2], 4, *cluster, f'--process={i}') for i in (0, 1)))
  answers, *others = map(answers_of, outputs)
  assert answers and all(other == answers for other in others)
  pictures, *others = map(pictures_of, outputs)
  assert len(pictures) == 6 * 4
  for other in others:
    assert other.keys() == pictures.keys()
    for path, (codes, pixels) in pictures.items():
      assert other[path][0] == codes
      # A pixel between two levels may be rounded to either.
      assert np.abs(other[path][1] - pixels).max() <= 1
