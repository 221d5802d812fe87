"""Several processes as one run: they join, agree, stop together, and none is left alone."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import mesh_processes
import numpy as np
from places import CONFIGS, ROOT, SUPPORT
import pytest

from dsr_jax import config_loading
from dsr_jax.errors import InputError
from dsr_jax.runtime import coordination_log, metrics
from dsr_jax.runtime import distributed as processes

VARIABLES = ('JAX_', 'SLURM_', 'OMPI_', 'TPU_')


def free_port():
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return s.getsockname()[1]


# Finding one another.


@pytest.fixture
def environ(monkeypatch):
  """Sets the variables of a cluster, and no others of any."""
  for name in list(os.environ):
    if name.startswith(VARIABLES) and name != 'JAX_PLATFORMS':
      monkeypatch.delenv(name)

  def change(**values):
    for name, value in values.items():
      monkeypatch.setenv(name, value)

  return change


SLURM = {
  'SLURM_JOB_ID': '4096',
  'SLURM_NTASKS': '3',
  'SLURM_PROCID': '2',
  'SLURM_LOCALID': '0',
  'SLURM_STEP_NODELIST': 'localhost',
}
NAMED = {
  'JAX_COORDINATOR_ADDRESS': 'localhost:99',
  'JAX_NUM_PROCESSES': '4',
  'JAX_PROCESS_ID': '3',
}


@pytest.mark.parametrize(
  'variables, expected',
  [
    ({}, None),
    ({'TPU_WORKER_HOSTNAMES': '10.0.0.1', 'TPU_WORKER_ID': '0'}, None),
    ({**SLURM, 'SLURM_NTASKS': '1', 'SLURM_PROCID': '0'}, None),
    # JAX's own choice of a port, by the job's number.
    (SLURM, ('localhost:61440', 3, 2, (0,))),
    (NAMED, ('localhost:99', 4, 3)),
    ({**NAMED, 'JAX_COORDINATOR_ADDRESS': 'localhost'}, ('localhost:8476', 4, 3)),
  ],
)
def test_a_cluster_is_found_only_where_there_is_one(environ, variables, expected):
  environ(**variables)
  assert processes.find() == (expected and processes.Cluster(*expected))


@pytest.mark.parametrize(
  'flags',
  [
    ('localhost:1', None, None),
    (None, 2, 1),
    (None, None, 0),
    ('localhost:1', 2, 2),
    ('localhost:1', 2, None),
    ('localhost:1', 2, -1),
    ('localhost:1', 0, 0),
    ('localhost:1', -2, 0),
    ('', 2, 0),
    ('localhost:port', 2, 0),
    ('localhost:', 2, 0),
    (':8476', 2, 0),
    ('localhost:0', 2, 0),
    ('localhost:65536', 2, 0),
    ('localhost:-1', 2, 0),
    ('localhost:8476.5', 2, 0),
    ('localhost:' + '9' * 5000, 2, 0),
    ('no-such-host.invalid:8476', 2, 0),
    ('a..b:8476', 2, 0),
    ('x' * 300, 2, 0),
  ],
)
def test_a_cluster_named_by_halves_or_out_of_range_is_refused_at_once(environ, flags):
  began = time.monotonic()
  with pytest.raises(InputError, match='--coordinator'):
    processes.find(*flags)
  assert time.monotonic() - began < 1


def test_the_largest_port_is_one():
  assert processes.find('localhost:65535', 2, 1).coordinator == 'localhost:65535'


@pytest.mark.parametrize(
  'variables, named',
  [
    ({**NAMED, 'JAX_NUM_PROCESSES': 'two'}, 'JAX_NUM_PROCESSES'),
    ({**NAMED, 'JAX_NUM_PROCESSES': '0'}, 'JAX_NUM_PROCESSES'),
    ({**NAMED, 'JAX_PROCESS_ID': '-1'}, 'JAX_PROCESS_ID'),
    ({**NAMED, 'JAX_PROCESS_ID': '4'}, '--process=4'),
    ({**NAMED, 'JAX_COORDINATOR_ADDRESS': 'localhost:0'}, 'localhost:0'),
    ({'JAX_NUM_PROCESSES': '4'}, '--coordinator'),
    ({**SLURM, 'SLURM_NTASKS': ''}, 'SLURM_NTASKS'),
    ({**SLURM, 'SLURM_NTASKS': '2(x3)'}, 'SLURM_NTASKS'),
    ({**SLURM, 'SLURM_PROCID': '²'}, 'SLURM_PROCID'),
    ({**SLURM, 'SLURM_PROCID': '3'}, '--process=3'),
    ({**SLURM, 'SLURM_JOB_ID': 'job'}, 'SLURM_JOB_ID'),
    ({**SLURM, 'SLURM_STEP_NODELIST': ''}, "':61440'"),
    ({**SLURM, 'JAX_COORDINATOR_PORT': '99999'}, '99999'),
    ({'TPU_WORKER_HOSTNAMES': 'a,b', 'TPU_WORKER_ID': 'x'}, 'TPU_WORKER_ID'),
    # Two hosts, but no TPU that JAX would see.
    ({'TPU_WORKER_HOSTNAMES': 'a,b', 'TPU_WORKER_ID': '0'}, '--coordinator'),
  ],
)
def test_malformed_variables_are_refused_by_name(environ, variables, named):
  environ(**variables)
  with pytest.raises(InputError, match=re.escape(named)):
    processes.find()


def test_flags_say_more_than_the_environment(environ):
  environ(**SLURM)
  assert processes.find('localhost:5', 3, 1) == processes.Cluster('localhost:5', 3, 1)


@pytest.mark.parametrize('seconds', [float('nan'), float('inf'), 0, -1, 0.5])
def test_a_wait_that_is_no_time_is_refused(seconds):
  with pytest.raises(InputError, match='--wait_seconds'), processes.together(None, seconds):
    pass


@pytest.mark.parametrize('family', [socket.AF_INET, socket.AF_INET6])
def test_a_taken_port_is_named(family):
  with socket.create_server(('', 0), family=family) as server:
    port = server.getsockname()[1]
    with pytest.raises(InputError, match=f'port {port} '):
      processes._check_free(port)


# What all must have in common.


def test_a_setting_of_jax_is_compared():
  config = config_loading.load(str(CONFIGS / 'scenes_tiny.py'))
  plain = processes.facts(config, 'run')
  with jax.default_matmul_precision('bfloat16'):
    assert processes.facts(config, 'run')['JAX'] != plain['JAX']
  assert processes.facts(config, 'run') == plain


def test_a_broken_connection_is_found_behind_the_sentence_about_a_file():
  lost = RuntimeError('UNKNOWN: Gloo AllGather failed: Connection closed by peer')
  told = InputError('cannot write a checkpoint (UNKNOWN: Gloo AllGather failed)')
  told.__cause__ = lost
  assert processes._broken_connection(told) is lost
  assert processes._broken_connection(lost) is lost
  assert processes._broken_connection(InputError('found no model')) is None


# What JAX's service says before it aborts.

ABORT = (
  'F1129 05:00:20.313508     825 client.h:80] Terminating process because the JAX distributed '
  'service detected fatal errors. absl::Status: '
)


@pytest.mark.parametrize(
  'log, part',
  [
    ('UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n1\n', 'cess 1'),
    ('(stopped sending heartbeats):\n3\n12\nThe tasks have crashed', 'process 3, 12 of 16'),
    ('UNAVAILABLE: Failed to send RPC to coordination service.\n', 'process 0 of 16 died'),
    ('DEADLINE_EXCEEDED: \n\nRPC: /x/CoordinationService/Heartbeat', 'process 0 of 16 died'),
    ('DEADLINE_EXCEEDED: \nRPC: /x.CoordinationService/RegisterTask', 'not all of 16'),
    ('ALREADY_EXISTS: Aborted connect\nRPC: /x/RegisterTask', 'two processes have the same number'),
    ('INVALID_ARGUMENT: Unexpected task\nRPC: /x/RegisterTask', 'Unexpected task'),
    ('ABORTED: 1 unexpectedly tried to connect with a different incarnation.', 'another process 1'),
    ('INTERNAL: something new', 'something new'),
  ],
)
def test_an_abort_is_said_in_a_sentence(log, part):
  said = coordination_log.sentence(ABORT + log, '16', 'h:1', '120', '40')
  assert part in said and '\n' not in said
  assert coordination_log.sentence(log, '16', 'h:1', '120', '40') is None


def test_what_is_not_of_the_service_passes_unchanged():
  text = (
    'a line of XLA\nE1129 05:00:20.313508   825 compiler.cc:80] an error\nand more\n'
    'W1129 05:00:20.313508   825 coordination_service.cc:8] withheld\nwith its second line\n'
    'I1129 05:00:20.313508   825 other.cc:1] passes\n'
  )
  aborted = (
    ABORT + 'INTERNAL: x\n*** Check failure stack trace: ***\nE1129 05:00:20.313508 1 a.cc:1]'
  )
  for log, out in ((text, text), (text + aborted, text)):
    done = subprocess.run(
      [sys.executable, coordination_log.__file__, '2', 'h:1', '120', '40'],
      input=log,
      capture_output=True,
      text=True,
    )
    expected = out.replace(out[out.index('W1129') : out.index('I1129')], '')
    assert done.stderr.startswith(expected) and done.stderr.count('error: ') == (log != out)


# Teams of small processes.

TEAM = """
import os, sys, time
from dsr_jax import cli, errors
from dsr_jax.runtime import distributed as processes
process, count, port, wait, how = sys.argv[1:]
process, count = int(process), int(count)
if how == 'count' and process:
  count += 1

def main(argv, f):
  cluster = processes.Cluster('localhost:' + port, count, process)
  with processes.together(cluster, float(wait), 8) as team:
    team.agree(config={'a': 1, 'b': 'differs' if how == 'differ' and process == 1 else 'same'})
    last = team.any(process == count - 1)
    print(last, team.any(False), team.shared({'from': process}), flush=True)
    if how in ('input', 'bug') and process == count - 1:
      raise errors.InputError('found no model') if how == 'input' else KeyError('bug')
    if how == 'first' and process == 0:
      raise errors.InputError('found no model')
    if how == 'hang' and process == 1:
      os.kill(os.getpid(), 19)
    if how != 'end':
      time.sleep(60)

sys.argv = sys.argv[:1]
cli.run_main(main, lambda f: None)
"""
slow = pytest.mark.slow


def start_member(process, count, port, wait, how):
  return subprocess.Popen(
    [sys.executable, '-c', TEAM, f'{process}', f'{count}', f'{port}', f'{wait}', how],
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


def team(count, how='end'):
  """A list of Popen."""
  port = free_port()
  return [start_member(process, count, port, 60, how) for process in range(count)]


def results(members):
  return [(*p.communicate(timeout=120), p.returncode) for p in members]


def errors_of(text):
  """The sentences; what else is there may be no traceback."""
  assert 'Traceback' not in text and 'stack trace' not in text, text
  return [line for line in text.splitlines() if line.startswith('error: ')]


@slow
def test_processes_agree_and_share_what_the_first_says():
  for out, err, code in results(team(3)):
    assert code == 0 and not errors_of(err), err
    assert out.split('\n')[0] == "True False {'from': 0}"


@slow
@pytest.mark.parametrize(
  'how, message',
  [
    ('differ', "config.b: 'same' in process 0 2, 'differs' in process 1)"),
    ('count', '--processes=2 in process'),
  ],
)
def test_processes_that_differ_are_refused_by_all(how, message):
  count = {'differ': 3, 'count': 2}[how]
  for _, err, code in results(team(count, how)):
    (said,) = errors_of(err)
    assert code == 2 and message in said


@slow
@pytest.mark.parametrize('present', [0, 1])
def test_who_waits_gives_up_in_time(present):
  began = time.time()
  _, err = (member := start_member(present, 2, free_port(), 4, 'end')).communicate(timeout=60)
  assert time.time() - began < 60
  (said,) = errors_of(err)
  assert member.returncode and 'not all of 2 processes' in said and 'within 4 s' in said
  assert 'waiting      for all 2 processes' in err


@slow
def test_a_number_that_is_taken_twice_is_said():
  port = free_port()
  members = [start_member(process, 3, port, 8, 'end') for process in (0, 1, 1)]
  said = [errors_of(err) for _, err, code in results(members) if code]
  assert len(said) == 3 and any('same number' in line for lines in said for line in lines)


@slow
@pytest.mark.parametrize('how, culprit', [('input', 2), ('first', 0), ('bug', 2)])
def test_all_stop_at_once_when_one_meets_an_error(how, culprit):
  members = team(3, how)
  for p in members:
    p.stdout.readline()
  began = time.time()
  found = results(members)
  assert time.time() - began < 15
  for process, (_, err, code) in enumerate(found):
    if process != culprit:
      (said,) = errors_of(err)
      why = 'bug' if how == 'bug' else 'found no model'
      assert code == processes.DIED and f'process {culprit} of 3 stopped: ' in said and why in said
  own = found[culprit]
  if how == 'bug':
    assert own[2] == 1 and "KeyError: 'bug'" in own[1]
  else:
    assert own[2] == 2 and errors_of(own[1]) == ['error: found no model']


@slow
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
    (said,) = errors_of(err)
    assert code and f'process {victim} of 3 died' in said


@slow
def test_all_stop_when_one_falls_silent():
  members = team(2, 'hang')
  members[0].stdout.readline()
  began = time.time()
  _, err = members[0].communicate(timeout=60)
  members[1].kill()
  members[1].communicate()
  (said,) = errors_of(err)
  assert members[0].returncode and 'process 1 of 2 died or has been silent for 8 s' in said
  assert time.time() - began < 30


STRAY = (b'[1,2]\n', b'GET / HTTP/1.1\r\n\r\n', b'{"stop": "x"}\n', os.urandom(4096), b'')


@slow
@pytest.mark.parametrize('when', ['joining', 'working'])
def test_stray_bytes_on_the_port_change_nothing(when, tmp_path):
  port = free_port()
  if when == 'working':
    members = [start_run(tmp_path, port, i, 60, 0.05) for i in range(2)]
    for line in members[0].stderr:
      if line.startswith('step 6/'):
        break
    send_stray(port)
  else:
    members = [start_run(tmp_path, port, 0, 6, 0.0)]
    deadline = time.time() + 120
    while time.time() < deadline:
      try:
        send_stray(port)
        break
      except ConnectionRefusedError:
        time.sleep(0.1)
    members.append(start_run(tmp_path, port, 1, 6, 0.0))
  for p in members:
    _, err = p.communicate(timeout=300)
    assert p.returncode == 0, err
  assert summary(tmp_path)['finished']


def send_stray(port):
  for data in STRAY * 3:
    with socket.create_connection(('localhost', port), timeout=5) as s:
      s.sendall(data)


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


@slow
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


@slow
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
  assert len(errors_of(err)) == 1, err[-2000:]
  pair[victim].communicate()


@slow
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
