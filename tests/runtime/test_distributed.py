"""Several processes as one run: they wait, agree, and none is left alone."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import mesh_processes
import numpy as np
from places import ROOT, SUPPORT
import pytest

from dsr_jax.errors import InputError
from dsr_jax.runtime import distributed as processes
from dsr_jax.runtime import metrics

pytestmark = pytest.mark.slow


def free_port():
  """Of two in a row that are free."""
  while True:
    with socket.socket() as a, socket.socket() as b:
      a.bind(('localhost', 0))
      port = a.getsockname()[1]
      try:
        b.bind(('localhost', port + 1))
        return port
      except OSError:
        continue


# Finding one another.


@pytest.mark.parametrize(
  'environ, expected',
  [
    ({}, None),
    ({'TPU_WORKER_HOSTNAMES': '10.0.0.1', 'TPU_WORKER_ID': '0'}, None),
    ({'SLURM_NTASKS': '1'}, None),
    ({'TPU_WORKER_HOSTNAMES': '10.0.0.1,10.0.0.2', 'TPU_WORKER_ID': '1'}, ('10.0.0.1:8476', 2, 1)),
    (
      {'SLURM_NTASKS': '3', 'SLURM_PROCID': '2', 'SLURM_STEP_NODELIST': 'node[007-009,12],other'},
      ('node007:8476', 3, 2),
    ),
    (
      {'SLURM_NTASKS': '2', 'SLURM_PROCID': '0', 'SLURM_STEP_NODELIST': 'alpha,beta'},
      ('alpha:8476', 2, 0),
    ),
    (
      {'JAX_COORDINATOR_ADDRESS': 'h:99', 'JAX_NUM_PROCESSES': '4', 'JAX_PROCESS_ID': '3'},
      ('h:99', 4, 3),
    ),
  ],
)
def test_a_cluster_is_found_only_where_there_is_one(environ, expected):
  found = processes.find(environ=environ)
  assert found == (expected and processes.Cluster(*expected))


@pytest.mark.parametrize(
  'flags', [('h:1', 0, -1), ('', 2, 1), ('h:1', 2, 2), ('h:1', 2, -1), ('h:port', 2, 0)]
)
def test_a_cluster_named_by_halves_is_refused(flags):
  with pytest.raises(InputError, match='--coordinator'):
    processes.find(*flags, environ={})


def test_flags_say_more_than_the_environment():
  environ = {'TPU_WORKER_HOSTNAMES': 'a,b', 'TPU_WORKER_ID': '0'}
  assert processes.find('h:5', 3, 1, environ) == processes.Cluster('h:5', 3, 1)


TEAM = """
import sys, time, os
from dsr_jax.runtime import distributed as processes
process, count, port, wait, how = sys.argv[1:]
process, count, wait = int(process), int(count), float(wait)
processes.BEAT_SECONDS, processes.SILENT_SECONDS = 0.3, 4.0
try:
  team = processes._Joined(processes.Cluster('localhost:' + port, count, process), wait)
except processes.InputError as e:
  sys.exit(f'error: {e}')
print(team.any(process == count - 1), team.any(False), team.shared({'from': process}), flush=True)
if how == 'hang' and process == 1:
  os.kill(os.getpid(), 19)
if how == 'fail' and process == 1:
  team.failed('found no model; expected one; name it')
  sys.exit(2)
if how != 'end':
  time.sleep(60)
team.any(False)
team.close()
time.sleep(0.5)
"""


def team(count, how='end', of=None, wait=60):
  """`count` processes of `of`; a list of Popen."""
  port = free_port()
  env = {**os.environ, 'PYTHONPATH': str(ROOT)}
  return [
    subprocess.Popen(
      [sys.executable, '-c', TEAM, str(i), str(of or count), str(port), str(wait), how],
      env=env,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )
    for i in range(count)
  ]


def results(members):
  return [(*p.communicate(timeout=120), p.returncode) for p in members]


def test_processes_agree_and_share_what_the_first_says():
  for out, err, code in results(team(3)):
    assert code == 0, err
    assert out.split('\n')[0] == "True False {'from': 0}"


def test_who_waits_says_for_how_many_and_gives_up_in_time():
  began = time.time()
  found = results(team(2, of=4, wait=3))
  assert time.time() - began < 60
  assert (
    'waiting      for 3 of 4 processes (3 s at most)' in found[0][1]
    and 'waiting      for 2 of 4 processes' in found[0][1]
  )
  for _, err, code in found:
    assert code and re.search(
      'error: found 2 of 4 processes after 3 s; expected process 2, 3 too', err
    )


def test_a_process_that_finds_no_first_one_gives_up_in_time():
  port = free_port()
  with pytest.raises(InputError, match=f'no process 0 at localhost:{port + 1} after 0.5 s'):
    processes._Joined(processes.Cluster(f'localhost:{port}', 2, 1), 0.5)


@pytest.mark.parametrize('victim', [0, 1])
def test_all_stop_when_one_dies(victim):
  members = team(3, 'work')
  for p in members:
    p.stdout.readline()
  members[victim].kill()
  began = time.time()
  others = [r for i, r in enumerate(results(members)) if i != victim]
  assert time.time() - began < 30
  for _, err, code in others:
    assert (
      code == processes.DIED and err.count(f'error: found that process {victim} of 3 died') == 1
    )


def test_all_stop_when_one_falls_silent_and_when_one_meets_an_error():
  members = team(2, 'hang')
  _, err = members[0].communicate(timeout=60)
  members[1].kill()
  members[1].communicate()
  assert members[0].returncode == processes.DIED and 'process 1 of 2 has been silent for 4 s' in err
  found = results(team(3, 'fail'))
  assert [code for _, _, code in found] == [processes.DIED, 2, processes.DIED]
  assert all(
    'process 1 of 3 stopped: found no model' in err
    for _, err, code in found
    if code == processes.DIED
  )


# Real runs, of two processes.


def start_run(workdir, port, process, steps, delay):
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  args = [
    sys.executable,
    SUPPORT / 'fake_run.py',
    workdir,
    str(steps),
    str(delay),
    f'--port={port}',
    f'--process={process}',
  ]
  return subprocess.Popen(
    args,
    env={**env, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


def summary(workdir):
  return json.loads((workdir / 'summary.json').read_text())


def drain(process):
  """Reads a pipe to its end, so that it never fills."""
  lines = []
  thread = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)
  thread.start()
  return lines, thread


def test_two_processes_stop_at_the_same_step_on_one_sigterm_and_go_on_as_one_process(tmp_path):
  port = free_port()
  pair = [start_run(tmp_path, port, i, 40, 0.05) for i in range(2)]
  seen, thread = drain(pair[1])
  for line in pair[0].stderr:
    if line.startswith('step 9/'):
      break
  pair[1].terminate()
  err = pair[0].stderr.read()
  assert [p.wait(timeout=600) for p in pair] == [0, 0], err
  thread.join()
  assert any(line.startswith('stopping     on SIGTERM') for line in seen) and not any(
    line.startswith('step ') for line in seen
  )
  stopped = int(re.search(r'after step (\d+) of 40', err).group(1))
  assert 9 <= stopped < 40 and summary(tmp_path)['step'] == stopped
  assert max(int(n) for n in os.listdir(tmp_path / 'checkpoints')) == stopped
  # One process goes on, and ends as one that did it all.
  alone = tmp_path.parent / f'{tmp_path.name}-alone'
  for workdir in (tmp_path, alone):
    assert (
      subprocess.run(
        [sys.executable, SUPPORT / 'fake_run.py', workdir, '40'],
        capture_output=True,
        timeout=600,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
      ).returncode
      == 0
    )
  ours, theirs = metrics.repeatable(tmp_path), metrics.repeatable(alone)
  assert [line.keys() for line in ours] == [line.keys() for line in theirs]
  for a, b in zip(ours, theirs):
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)


@pytest.mark.parametrize('victim', [0, 1])
def test_a_killed_process_ends_the_run_within_a_minute_with_a_sentence(tmp_path, victim):
  port = free_port()
  pair = [start_run(tmp_path, port, i, 4000, 0.05) for i in range(2)]
  for line in pair[0].stderr:
    if line.startswith('step 5/'):
      break
  pair[victim].send_signal(signal.SIGKILL)
  began = time.time()
  _, err = pair[1 - victim].communicate(timeout=120)
  assert time.time() - began < 60 and pair[1 - victim].returncode
  assert err.count('error: found that process') == 1, err[-2000:]
  pair[victim].communicate()


def test_two_processes_of_four_devices_go_on_from_another_mesh_as_one_process_of_eight(tmp_path):
  one = mesh_processes.start(tmp_path, '4x2x1', '--steps=2')
  mesh_processes.finish(one)
  port = free_port()
  # From the checkpoint of the first step alone.
  for step in (tmp_path / '4x2x1' / 'checkpoints').iterdir():
    if step.name != '1':
      step.rename(tmp_path / f'gone-{step.name}')
  pair = [
    mesh_processes.start(
      tmp_path,
      '2x2x2',
      f'--resume={tmp_path}/4x2x1',
      '--devices=4',
      f'--port={port}',
      '--processes=2',
      f'--process={i}',
    )
    for i in range(2)
  ]
  for process in pair:
    mesh_processes.finish(process)
  mesh_processes.assert_same_step(
    mesh_processes.load(tmp_path, '4x2x1@2'), mesh_processes.load(tmp_path, '2x2x2@2')
  )
