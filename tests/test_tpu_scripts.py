"""The scripts of tpu/ against a stand-in for gcloud that writes down every call and answers from a
list.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time

from places import ROOT
import pytest

SCRIPTS = sorted(p.name for p in (ROOT / 'tpu').glob('*.sh'))
# Writes its arguments as a line of JSON. A `describe` takes the next state; an `ssh` the next exit
# status; scp keeps the file.
GCLOUD = f"""#!{sys.executable}
import json, os, shutil, sys
folder = os.environ['STAND_IN']
with open(os.path.join(folder, 'calls'), 'a') as f:
  f.write(json.dumps(sys.argv[1:]) + '\\n')

def next_of(name, default):
  path = os.path.join(folder, name)
  lines = open(path).read().split() if os.path.exists(path) else []
  if len(lines) > 1:
    open(path, 'w').write('\\n'.join(lines[1:]))
  return lines[0] if lines else default

if 'describe' in sys.argv:
  state = next_of('states', 'ACTIVE')
  if state == 'ABSENT':
    sys.exit('ERROR: NOT_FOUND')
  print(state)
elif 'scp' in sys.argv:
  shutil.copy(sys.argv[5], folder)
elif 'ssh' in sys.argv:
  sys.exit(int(next_of('codes', '0')))
"""
SETTINGS = {
  'TPU_NAME': 'pod',
  'TPU_ZONE': 'us-west4-a',
  'TPU_TYPE': 'v5litepod-64',
  'TPU_POLL': '0',
}
TPUS, ZONE = ['compute', 'tpus'], '--zone=us-west4-a'
RUN = ('--config=configs/janus_pro_7b.py', '--workdir=runs/7b', '--config.system.bucket=gs://b/7b')
DESCRIBE = [*TPUS, 'queued-resources', 'describe', 'pod', ZONE, '--format=value(state.state)']
CREATE = [
  *TPUS,
  'queued-resources',
  'create',
  'pod',
  ZONE,
  '--node-id=pod',
  '--accelerator-type=v5litepod-64',
  '--runtime-version=v2-alpha-tpuv5-lite',
]
DELETE = [*TPUS, 'queued-resources', 'delete', 'pod', ZONE, '--force', '--quiet']
INSTALL = [
  *TPUS,
  'tpu-vm',
  'ssh',
  'pod',
  ZONE,
  '--worker=all',
  '--command=mkdir -p dsr_jax && tar -C dsr_jax -xzf dsr_jax.tar.gz && dsr_jax/tpu/on_host.sh '
  'install',
]
START = [
  *TPUS,
  'tpu-vm',
  'ssh',
  'pod',
  ZONE,
  '--worker=all',
  f'--command=dsr_jax/tpu/on_host.sh start {" ".join(RUN)} ',
]
FOLLOW = [
  *TPUS,
  'tpu-vm',
  'ssh',
  'pod',
  ZONE,
  '--worker=0',
  '--command=dsr_jax/tpu/on_host.sh follow',
]
STOP = [
  *TPUS,
  'tpu-vm',
  'ssh',
  'pod',
  ZONE,
  '--worker=all',
  '--command=dsr_jax/tpu/on_host.sh stop',
]


@pytest.fixture
def tpu(tmp_path):
  """Runs a script: (name, *arguments, states, codes, **settings) -> the finished process, with its
  gcloud calls in `calls`.
  """
  stand_in = tmp_path / 'gcloud'
  stand_in.write_text(GCLOUD)
  stand_in.chmod(0o755)

  def run(name, *args, states='', codes='', **settings):
    for file, content in (('states', states), ('codes', codes), ('calls', '')):
      (tmp_path / file).write_text(content)
    outside = {k: v for k, v in os.environ.items() if not k.startswith('TPU_')}
    env = {
      **outside,
      **SETTINGS,
      'STAND_IN': str(tmp_path),
      'PATH': f'{tmp_path}:{os.environ["PATH"]}',
      **settings,
    }
    done = subprocess.run(
      [ROOT / 'tpu' / name, *args], env=env, capture_output=True, text=True, timeout=120
    )
    done.calls = [json.loads(line) for line in (tmp_path / 'calls').read_text().splitlines()]
    return done

  return run


def test_create_asks_for_the_slice_and_waits_until_it_is_there(tpu):
  done = tpu('create.sh', states='WAITING_FOR_RESOURCES PROVISIONING ACTIVE')
  assert done.returncode == 0, done.stderr
  assert done.calls == [CREATE, DESCRIBE, DESCRIBE, DESCRIBE]
  assert 'waiting      for pod: PROVISIONING' in done.stderr


@pytest.mark.parametrize(
  'kind, version',
  [
    ('v5litepod-8', 'v2-alpha-tpuv5-lite'),
    ('v5p-128', 'v2-alpha-tpuv5'),
    ('v6e-64', 'v2-alpha-tpuv6e'),
    ('v4-16', 'tpu-ubuntu2204-base'),
  ],
)
def test_each_type_gets_its_image_and_spot_and_project_are_passed_on(tpu, kind, version):
  done = tpu('create.sh', '--spot', TPU_TYPE=kind, TPU_PROJECT='mine')
  assert done.calls[0] == [
    *CREATE[:5],
    ZONE,
    '--project=mine',
    '--node-id=pod',
    f'--accelerator-type={kind}',
    f'--runtime-version={version}',
    '--spot',
  ]


def test_install_brings_the_checkout_to_all_hosts_and_nothing_that_is_not_needed(tpu, tmp_path):
  done = tpu('install.sh')
  assert done.returncode == 0, done.stderr
  scp, install = done.calls
  assert (
    scp[:3] == [*TPUS, 'tpu-vm']
    and scp[3] == 'scp'
    and scp[5:] == ['pod:dsr_jax.tar.gz', ZONE, '--worker=all']
  )
  assert install == INSTALL
  with tarfile.open(tmp_path / 'dsr_jax.tar.gz') as packed:
    names = packed.getnames()
  assert {
    './dsr_jax/main.py',
    './requirements-tpu.txt',
    './tpu/on_host.sh',
    './dsr_jax/configs/common.py',
    './configs',  # the link to them
  } <= set(names)
  assert not [
    n for n in names if '__pycache__' in n or n.startswith(('./.git/', './runs/', './.venv'))
  ]
  assert not os.path.exists(scp[4])  # nothing is left behind


def test_run_starts_all_hosts_and_ends_as_the_run_does(tpu):
  done = tpu('run.sh', *RUN)
  assert (done.returncode, done.calls) == (0, [START, FOLLOW])
  assert tpu('run.sh', *RUN, codes='0 3').returncode == 3


def test_stop_and_delete_are_one_call_each(tpu):
  assert tpu('stop.sh').calls == [STOP]
  assert tpu('delete.sh').calls == [DELETE]


def test_keep_makes_a_preempted_slice_again_and_goes_on(tpu):
  # No slice; made, installed; the run is lost with the slice; made again; the run ends.
  done = tpu(
    'keep.sh',
    *RUN,
    states='ABSENT ACTIVE SUSPENDED SUSPENDED ACTIVE',
    codes='0 0 1 0 0 0',
    TPU_SPOT='1',
  )
  assert done.returncode == 0, done.stderr
  scp = done.calls[3]
  made = [[*CREATE, '--spot'], DESCRIBE, scp, INSTALL, START, FOLLOW]
  again = made[:2] + [done.calls[12]] + made[3:]
  assert done.calls == [DESCRIBE, *made, DESCRIBE, DESCRIBE, DELETE, *again]


def test_keep_gives_up_on_bad_input_and_on_a_run_that_fails_on_a_whole_slice(tpu):
  bad = tpu('keep.sh', *RUN, codes='0 2')
  assert bad.returncode == 2 and bad.calls == [DESCRIBE, START, FOLLOW]
  failing = tpu('keep.sh', *RUN, codes='0 1 0 0 1', TPU_TRIES='2')
  assert failing.returncode == 2 and 'failed 2 times' in failing.stderr
  assert failing.calls == [
    DESCRIBE,
    START,
    FOLLOW,
    DESCRIBE,
    STOP,
    DESCRIBE,
    START,
    FOLLOW,
    DESCRIBE,
  ]


@pytest.mark.parametrize(
  'name, args, settings, message',
  [
    ('create.sh', (), {'TPU_NAME': ''}, 'error: TPU_NAME is not set'),
    ('create.sh', (), {'TPU_TYPE': 'h100-8'}, 'error: TPU_TYPE=h100-8 is not a known slice'),
    ('create.sh', ('--cheap',), {}, 'error: unexpected arguments --cheap'),
    ('run.sh', (), {}, 'error: no arguments'),
    ('run.sh', ('--config=configs/scenes.py',), {}, 'error: --config.system.bucket'),
  ],
)
def test_what_is_missing_or_wrong_is_one_sentence_and_no_call(tpu, name, args, settings, message):
  done = tpu(name, *args, **settings)
  assert (
    done.returncode == 2
    and done.stderr.startswith(message)
    and done.stderr.count('\n') == 1
    and not done.calls
  )


def test_a_slice_that_does_not_come_is_said(tpu):
  done = tpu('create.sh', states='WAITING_FOR_RESOURCES FAILED')
  assert done.returncode == 2 and 'the slice pod is FAILED' in done.stderr


# On a host, with a stand-in for curl (the metadata) and for python.


@pytest.fixture
def host(tmp_path):
  """A host: on_host.sh in its folder; python writes its arguments, then sleeps until it is told to
  stop.
  """
  (tmp_path / 'tpu').mkdir()
  (tmp_path / '.venv' / 'bin').mkdir(parents=True)
  shutil.copy(ROOT / 'tpu' / 'on_host.sh', tmp_path / 'tpu')
  for path, text in (
    ('curl', 'case $* in *endpoints) echo a:b:10.0.0.5,c:d:10.0.0.6;; *) echo 1;; esac'),
    (
      '.venv/bin/python',
      'echo "$@"; trap "echo stopped; exit 0" TERM; for i in $(seq 300); do sleep 0.1; done; exit '
      '7',
    ),
  ):
    (tmp_path / path).write_text(f'#!/bin/bash\n{text}\n')
    (tmp_path / path).chmod(0o755)

  def run(*args):
    env = {**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'HOME': str(tmp_path)}
    return subprocess.run(
      [tmp_path / 'tpu' / 'on_host.sh', *args], env=env, capture_output=True, text=True, timeout=60
    )

  yield run
  if (tmp_path / 'run.pid').exists():
    run('stop')


def test_a_host_starts_once_knows_its_place_and_stops_cleanly(host, tmp_path):
  assert host('start', '--config=a b').returncode == 0
  assert host('start', '--config=other').stdout.startswith('at work')
  deadline = time.time() + 30
  while 'dsr_jax.main' not in (tmp_path / 'run.log').read_text() and time.time() < deadline:
    time.sleep(0.05)
  expected = (
    '-m dsr_jax.main --coordinator=10.0.0.5:8476 --processes=2 --process=1 '
    f'--config.system.compile_cache={tmp_path}/compiled --config=a b'
  )
  assert (tmp_path / 'run.log').read_text().strip() == expected
  assert host('stop').returncode == 0
  followed = host('follow')
  assert followed.returncode == 0 and followed.stdout.endswith('stopped\n')


def test_following_a_host_that_was_killed_fails(host, tmp_path):
  host('start', '--config=x')
  pid = int((tmp_path / 'run.pid').read_text())
  for child in subprocess.run(
    ['pgrep', '-P', str(pid)], capture_output=True, text=True
  ).stdout.split():
    os.kill(int(child), signal.SIGKILL)
  os.kill(pid, signal.SIGKILL)
  assert host('follow').returncode == 1


@pytest.mark.parametrize('name', SCRIPTS)
def test_scripts_parse_and_follow_the_rules_that_shellcheck_holds(name):
  path = ROOT / 'tpu' / name
  assert subprocess.run(['bash', '-n', path], capture_output=True).returncode == 0
  checker = shutil.which(
    'shellcheck', path=f'{os.path.dirname(sys.executable)}:{os.environ["PATH"]}'
  )
  assert checker, 'found no shellcheck; pip install -r requirements-test.txt'
  done = subprocess.run([checker, '-x', path], cwd=ROOT / 'tpu', capture_output=True, text=True)
  assert done.returncode == 0, done.stdout
