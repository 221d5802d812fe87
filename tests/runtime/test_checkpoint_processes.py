"""Two processes and one damaged checkpoint: both say so, whoever looked at the damaged part."""

import os
import pathlib
import socket
import subprocess
import sys

from places import ROOT, SUPPORT
import pytest

pytestmark = pytest.mark.slow


def start(workdir, port, process, steps):
  return subprocess.Popen(
    [
      sys.executable,
      SUPPORT / 'fake_run.py',
      workdir,
      str(steps),
      f'--port={port}',
      f'--process={process}',
    ],
    env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def run_pair(workdir):
  """(exit statuses, what each said)."""
  with socket.create_server(('localhost', 0)) as server:
    port = server.getsockname()[1]
  pair = [start(workdir, port, i, 12) for i in range(2)]
  said = [process.communicate(timeout=300)[1] for process in pair]
  return [process.returncode for process in pair], said


def files_of(workdir) -> list[pathlib.Path]:
  return sorted(p for p in (workdir / 'checkpoints' / '12').rglob('*') if p.is_file())


def test_both_processes_refuse_a_checkpoint_of_which_one_read_the_damage(tmp_path):
  statuses, said = run_pair(tmp_path)
  assert statuses == [0, 0], said[0][-2000:]
  assert run_pair(tmp_path)[0] == [0, 0]
  # Process 0 looks at one half of the blocks and process 1 at the other.
  for path in [p for p in files_of(tmp_path) if p.parent.name == 'about']:
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    statuses, said = run_pair(tmp_path)
    assert all(statuses), path
    for part in ('checkpoints/12 (', 'of step 8, or name that one as'):
      assert part in said[0], said[0][-2000:]
    path.write_bytes(good)
