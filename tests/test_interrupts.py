"""Ctrl-C while a run or a command is where Python's own handlers have no turn."""

import os
import re
import signal
import subprocess
import sys
import time

from places import ROOT, SUPPORT
import pytest

from dsr_jax.runtime import checkpoints, metrics

# In the place of a step that takes long to compile, or an evaluation of many chunks: C code, in
# which Python's handlers wait, for a long time or for moments.
RUN = """
import dataclasses, sys
sys.path.insert(0, sys.argv[1])
import ctypes, fake_run
from dsr_jax import cli, train
from dsr_jax.runtime import compiled

where, sleeping = sys.argv[2], ctypes.CDLL(None).usleep
made = fake_run.parts(0.02)

def in_c(seconds):
  for _ in range(int(seconds * 10)):
    sleeping(100_000)  # it begins again after a signal

def forever():
  lock = ctypes.create_string_buffer(64)
  for _ in range(2):  # taken, and never given back; signals do not end the wait
    ctypes.CDLL(None).pthread_mutex_lock(lock)

def evaluator(config, model):
  measure = made.make_evaluator(config, model)
  def run(state, step):
    if step == int(where.partition('@')[2] or -1):
      print('measuring', file=sys.stderr, flush=True)
      if where.startswith('chunks'):
        in_c(60)
      else:
        forever()
    return measure(state, step)
  return run

if where == 'compile':
  def compile(self, state, batch):
    print('compiling', file=sys.stderr, flush=True)
    forever()
  compiled.CompiledStep.compile = compile

sys.argv[1:] = sys.argv[3:]
workdir = sys.argv.pop()

def main(argv, f):
  parts = dataclasses.replace(made, make_evaluator=evaluator)
  print(train.run(fake_run.config(40), workdir, parts))

cli.run_main(main, lambda f: None)
"""


def start(workdir, where):
  environ = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  process = subprocess.Popen(
    [sys.executable, '-c', RUN, str(SUPPORT), where, str(workdir)],
    env=environ,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  told = []
  for line in process.stderr:
    told.append(line)
    if line in ('compiling\n', 'measuring\n'):
      return process
  raise AssertionError(''.join(told))


def ended(process, within):
  """What was said until the end, which must come so soon."""
  began = time.monotonic()
  out, said = process.communicate(timeout=60)
  assert time.monotonic() - began < within and 'Traceback' not in said, said
  return out, said


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_that_compiles(number, tmp_path):
  process = start(tmp_path, 'compile')
  process.send_signal(number)
  _, said = ended(process, 5)
  assert process.returncode == -number
  assert said == f'stopped      by {"Ctrl-C" if number == signal.SIGINT else "SIGTERM"}\n'


def test_an_evaluation_is_left_between_chunks_and_its_step_is_kept(tmp_path):
  process = start(tmp_path, 'chunks@6')
  process.send_signal(signal.SIGINT)
  _, said = ended(process, 20)
  assert process.returncode == 0, said
  assert said.startswith('stopping     on SIGINT, after this step\n')
  assert 'after step 6 of 40; run the same command to resume' in said
  assert checkpoints.steps_in(str(tmp_path))[-1] == 6
  lines = metrics.repeatable(tmp_path)
  assert lines[-1]['step'] == 6 and not any('eval/w/norm' in x for x in lines if x['step'] == 6)


def test_an_evaluation_that_cannot_be_left_ends_the_run_and_a_second_ctrl_c_does_at_once(tmp_path):
  process = start(tmp_path, 'stuck@6')
  process.send_signal(signal.SIGINT)
  assert process.stderr.readline() == 'stopping     on SIGINT, after this step\n'
  process.send_signal(signal.SIGINT)
  _, said = ended(process, 4)
  assert process.returncode == -signal.SIGINT and said == 'stopped      by Ctrl-C\n'
  # The start that goes on has the step's checkpoint before it.
  assert checkpoints.steps_in(str(tmp_path)) == [4]


COMMAND = """
import ctypes, sys
from dsr_jax import cli, environment

environment.PATIENCE_SECONDS = 0.5

def main(argv, f):
  print('at work', file=sys.stderr, flush=True)
  lock = ctypes.create_string_buffer(64)
  c = ctypes.CDLL(None)
  c.pthread_mutex_lock(lock)
  c.pthread_mutex_lock(lock)

cli.run_main(main, lambda f: None)
"""


def test_a_command_that_does_not_come_back_to_python_is_ended_by_the_first_ctrl_c():
  process = subprocess.Popen(
    [sys.executable, '-c', COMMAND],
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stderr.readline() == 'at work\n'
  process.send_signal(signal.SIGINT)
  _, said = ended(process, 5)
  assert process.returncode == -signal.SIGINT and re.fullmatch('stopped +by Ctrl-C\n', said)
