"""Weights & Biases beside a run's own files: every step once, whatever happened to the process."""

import collections
import json
import os
import pathlib
import subprocess
import sys

import fake_run
import pytest

from dsr_jax import tracking, train
from dsr_jax.errors import InputError
from dsr_jax.runtime import metrics

wandb = pytest.importorskip('wandb')


@pytest.fixture(autouse=True)
def offline(monkeypatch):
  """No network, and no login."""
  monkeypatch.setenv('WANDB_MODE', 'offline')
  monkeypatch.setenv('WANDB_SILENT', 'true')


def tracked(steps=12, **changes):
  return fake_run.config(steps, system__track='wandb', **changes)


def history(workdir):
  """{step: {name: value}} of everything that was sent, and how often each step was."""
  rows, times = {}, collections.Counter()
  for path in sorted(pathlib.Path(workdir).glob('wandb/offline-run-*/run-*.wandb')):
    for record in tracking.records_in(str(path)):
      if record.WhichOneof('record_type') == 'history':
        step = record.history.step.num
        times[step] += 1
        rows[step] = {
          item.key or '/'.join(item.nested_key): json.loads(item.value_json)
          for item in record.history.item
        }
  return rows, times


def check_whole(workdir):
  """Every step is there once, with its numbers."""
  rows, times = history(workdir)
  logged = metrics.read(workdir)
  steps = sorted({step for at, _ in logged.values() for step in at})
  assert sorted(rows) == steps and set(times.values()) == {1}
  for name, (at, values) in logged.items():
    for step, value in zip(at, values):
      if not name.startswith(metrics.UNREPEATABLE):
        assert rows[step][name] == value, (name, step)
  return rows


def test_a_run_is_there_whole_with_its_pictures(tmp_path):
  train.run(tracked(), str(tmp_path), fake_run.parts())
  rows = check_whole(tmp_path)
  assert 'eval/w/norm' in rows[0] and 'eval/w/norm' in rows[6] and 'loss' in rows[6]
  assert [step for step in rows if 'pictures/samples' in str(rows[step])] == [5, 10]
  assert len({p.name for p in (tmp_path / 'wandb').glob('offline-run-*/run-*.wandb')}) == 1


def test_a_run_that_goes_on_is_the_same_run_and_has_every_step_once(tmp_path):
  for stopped in (6, 11):
    with pytest.raises(InputError):
      train.run(tracked(16), str(tmp_path), fake_run.parts(nan_at=stopped))
  train.run(tracked(16), str(tmp_path), fake_run.parts())
  check_whole(tmp_path)
  names = {p.name for p in (tmp_path / 'wandb').glob('offline-run-*/run-*.wandb')}
  assert len(names) == 1


@pytest.mark.slow
def test_after_a_kill_nothing_is_missing_and_nothing_is_twice(tmp_path):
  """What the killed process had not yet written down is sent by the next one."""
  script = pathlib.Path(fake_run.__file__)
  code = (
    'import os, sys; sys.path.insert(0, sys.argv[2]); import fake_run\n'
    'from dsr_jax import train\n'
    "config = fake_run.config(16, system__track='wandb')\n"
    'made = fake_run.parts(delay=0.05)\n'
    'at = made.make_batches\n'
    'def batches(*args):\n'
    '  found = at(*args); inner = found.at\n'
    '  found.at = lambda step: os._exit(9) if step == 11 else inner(step)\n'
    '  return found\n'
    'import dataclasses\n'
    'made = dataclasses.replace(made, make_batches=batches)\n'
    'train.run(config, sys.argv[1], made)\n'
  )
  # Its own service, which sees it die, and not the one of this process.
  environment = {name: value for name, value in os.environ.items() if 'WANDB_SERVICE' not in name}
  done = subprocess.run(
    [sys.executable, '-c', code, str(tmp_path), str(script.parent)],
    cwd=script.parents[2],
    env=environment | {'PYTHONPATH': str(script.parents[2])},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 9, done.stderr
  train.run(tracked(16), str(tmp_path), fake_run.parts())
  check_whole(tmp_path)


def test_without_a_login_one_sentence_says_what_to_do(tmp_path, monkeypatch):
  monkeypatch.setenv('WANDB_MODE', 'online')
  monkeypatch.setattr(wandb, 'login', lambda **_: False)
  with pytest.raises(InputError, match='needs a login at Weights & Biases; run wandb login'):
    train.run(tracked(), str(tmp_path / 'run'), fake_run.parts())
  assert not (tmp_path / 'run').exists()


def test_without_wandb_one_sentence_says_what_to_install(monkeypatch):
  monkeypatch.setattr(tracking, 'wandb', None)
  with pytest.raises(InputError, match=r"needs the package wandb; pip install 'dsr_jax\[wandb\]'"):
    tracking.check('wandb')
  tracking.check('')
