"""What the file system does to a run: each kind of write fails once, and the folders of two runs
are the same one. The run ends in a sentence, and the same command resumes as if nothing happened.
"""

import dataclasses
import errno
import json
import os
import shutil
import threading
import time
import types

from etils import epath
import fake_run
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tensorboardX import event_file_writer

from dsr_jax import train
from dsr_jax.errors import InputError
from dsr_jax.runtime import checkpoints, metrics
from dsr_jax.runtime import workdir as workdir_lib

STEPS = 12
CAUSES = (errno.ENOSPC, errno.EACCES, errno.EMFILE)


def run(workdir, made=None, **changes):
  return train.run(fake_run.config(STEPS, **changes), str(workdir), made or fake_run.parts())


def parameters(workdir):
  return json.loads((workdir / 'summary.json').read_text())['parameters_sha256']


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('unbroken')
  run(workdir)
  return workdir


class FailsOnce:
  """In the place of a function: the n-th call of those that `when` chooses is an OSError."""

  def __init__(self, real, cause, n, when=lambda *args: True):
    self.real, self.cause, self.left, self.when = real, cause, n, when

  def __call__(self, *args, **named):
    if self.when(*args):
      self.left -= 1
      if not self.left:
        raise OSError(self.cause, os.strerror(self.cause))
    return self.real(*args, **named)

  def __get__(self, instance, owner=None):
    return types.MethodType(self, instance) if instance is not None else self


def fail_rename_to(ending, n):
  def patch(monkeypatch, cause):
    def chosen(old, new, *rest):
      return os.fspath(new).endswith(ending)

    monkeypatch.setattr(os, 'replace', FailsOnce(os.replace, cause, n, chosen))

  return patch


def fail_method(owner, name, n):
  def patch(monkeypatch, cause):
    monkeypatch.setattr(owner, name, FailsOnce(getattr(owner, name), cause, n))

  return patch


def fail_line(monkeypatch, cause):
  """The fifth line of metrics."""

  def opened(path, mode='r', **named):
    file = open(path, mode, **named)
    if mode != 'a':
      return file
    write = FailsOnce(file.write, cause, 5)
    return types.SimpleNamespace(write=write, flush=file.flush, close=file.close)

  monkeypatch.setattr(metrics, 'open', opened, raising=False)


WRITES = {
  'config': fail_rename_to('config.json', 1),
  'a line of metrics': fail_line,
  'an event': fail_method(event_file_writer.EventsWriter, 'write_event', 7),
  'an evaluation': fail_rename_to('000006.json', 1),
  'a sheet': fail_rename_to('000010.png', 1),
  'the page': fail_rename_to('report.html', 2),
  'the summary': fail_rename_to('summary.json', 1),
  'a checkpoint, at its begin': fail_method(ocp.CheckpointManager, 'save', 2),
  'a checkpoint, its files': fail_method(ocp.StandardCheckpointHandler, 'async_save', 2),
  'a checkpoint, its checksums': fail_method(checkpoints.checksums, 'write', 2),
  'the last checkpoint, its checksums': fail_method(checkpoints.checksums, 'write', 3),
  'a checkpoint, its rename': fail_method(type(epath.Path('/')), 'rename', 4),
}


@pytest.mark.parametrize('what', WRITES)
def test_a_write_that_fails_is_a_sentence_and_the_restart_is_identical(
  what, unbroken, tmp_path, monkeypatch
):
  cause = CAUSES[list(WRITES).index(what) % 3]
  with monkeypatch.context() as patched:
    WRITES[what](patched, cause)
    with pytest.raises(InputError) as e:
      run(tmp_path)
  assert os.strerror(cause) in str(e.value) and 'run the same command to resume' in str(e.value)
  run(tmp_path)
  assert metrics.repeatable(tmp_path) == metrics.repeatable(unbroken)
  assert parameters(tmp_path) == parameters(unbroken)
  assert all(name.isdigit() for name in os.listdir(tmp_path / 'checkpoints'))


def test_a_copy_to_the_bucket_that_fails_is_a_sentence(unbroken, tmp_path, monkeypatch):
  bucket = {'system__bucket': str(tmp_path / 'bucket')}
  with monkeypatch.context() as patched:
    fail_method(type(epath.Path('/')), 'copy', 3)(patched, errno.ENOSPC)
    with pytest.raises(InputError, match=r'No space left on device'):
      run(tmp_path / 'run', **bucket)
  shutil.rmtree(tmp_path / 'run')
  run(tmp_path / 'run', **bucket)
  assert metrics.repeatable(tmp_path / 'run') == metrics.repeatable(unbroken)
  assert parameters(tmp_path / 'run') == parameters(unbroken)


def interrupted_at(step, action):
  """The fake run's parts; `action` is done while the batch after `step` is made."""
  made = fake_run.parts()

  def batches(*args):
    inner = made.make_batches(*args)

    def at(index):
      if index == step:
        action()
      return inner.at(index)

    return types.SimpleNamespace(at=at, fingerprint=inner.fingerprint)

  return dataclasses.replace(made, make_batches=batches)


@pytest.mark.parametrize('again', [False, True])
@pytest.mark.parametrize('step', [2, 5, 9, 11])
def test_a_workdir_that_goes_away_is_said_so(step, again, tmp_path):
  def remove():
    os.rename(tmp_path / 'run', tmp_path / 'gone')
    if again:
      # The writer of a checkpoint may have made it in between: another folder too.
      (tmp_path / 'run').mkdir(exist_ok=True)

  with pytest.raises(InputError, match=r'/run was removed or replaced while the run was using it'):
    run(tmp_path / 'run', interrupted_at(step, remove))


# "Before" is the initial model's.


def not_evaluated(nan_at):
  return dataclasses.replace(
    fake_run.parts(nan_at=nan_at), make_evaluator=lambda config, model: None
  )


@pytest.mark.parametrize('stopped', [5, 9])
def test_a_run_that_is_first_evaluated_when_it_goes_on_measures_the_initial_model(
  stopped, unbroken, tmp_path
):
  with pytest.raises(InputError):
    run(tmp_path, not_evaluated(stopped), eval__benchmark='none')
  assert not any('eval/w/norm' in line for line in metrics.repeatable(tmp_path))
  evaluations = []
  run(tmp_path, fake_run.parts(evaluations=evaluations))
  assert evaluations[0] == 0
  before = metrics.read(unbroken)
  after = metrics.read(tmp_path)
  for name in ('eval/w/norm', 'eval/w/first'):
    at, values = after[name]
    assert at[0] == 0 and values[0] == before[name][1][0] != values[-1]
  weights = np.random.default_rng(0).normal(size=(fake_run.SIZE,) * 2).astype(np.float32)
  assert after['eval/w/first'][1][0] == weights[0, 0]
  assert parameters(tmp_path) == parameters(unbroken)


def test_a_lost_evaluation_of_the_initial_model_is_made_again_from_it(unbroken, tmp_path):
  with pytest.raises(InputError):
    run(tmp_path, fake_run.parts(nan_at=9))
  path = tmp_path / metrics.FILE
  kept = [text for text in path.read_text().splitlines() if '"step": 0' not in text]
  path.write_text(''.join(text + '\n' for text in kept))
  run(tmp_path)
  assert metrics.read(tmp_path)['eval/w/norm'] == metrics.read(unbroken)['eval/w/norm']


def test_a_checkpoint_that_another_run_wrote_is_refused_before_any_evaluation(tmp_path):
  with pytest.raises(InputError):
    run(tmp_path, not_evaluated(9), eval__benchmark='none')
  evaluations = []
  with pytest.raises(InputError, match=r'method\.beta'):
    run(tmp_path, fake_run.parts(evaluations=evaluations), method__beta=7.0)
  assert not evaluations


# Two runs, and starts that are refused.


@pytest.mark.parametrize('deep', ['run', 'a/b/run'])
def test_a_refused_start_leaves_nothing(deep, tmp_path, monkeypatch):
  made = fake_run.parts()

  def load(name):
    raise InputError('found no model')

  for refused in (
    dataclasses.replace(made, load_model=load),
    dataclasses.replace(made, make_batches=lambda *args: load('')),
  ):
    with pytest.raises(InputError, match='found no model'):
      run(tmp_path / deep, refused)
    assert os.listdir(tmp_path) == []
  monkeypatch.setattr(
    checkpoints.shutil, 'disk_usage', lambda path: types.SimpleNamespace(free=1 << 20)
  )
  with pytest.raises(InputError, match='has 1 MiB free, but a checkpoint needs'):
    run(tmp_path / deep)
  assert os.listdir(tmp_path) == []


def test_a_refused_start_takes_nothing_that_was_there(tmp_path):
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'mine.txt').write_text('x')
  with workdir_lib.locked(str(tmp_path / 'run')):
    with pytest.raises(InputError, match='another run is using .*/run; stop it'):
      run(tmp_path / 'run')
  assert (tmp_path / 'run' / 'mine.txt').exists()


def test_two_runs_on_one_bucket_are_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(workdir_lib, 'BEAT_SECONDS', 0.05)
  bucket = tmp_path / 'bucket'
  with workdir_lib.BucketLock(str(bucket), str(tmp_path / 'one')) as held:
    with pytest.raises(InputError, match=r'another run is using .*/bucket \(of .*/one\)'):
      run(tmp_path / 'two', system__bucket=str(bucket))
    assert not (tmp_path / 'two').exists()
    held.check()
  assert os.listdir(bucket) == []
  run(tmp_path / 'two', system__bucket=str(bucket))
  assert workdir_lib.BUCKET_LOCK not in os.listdir(bucket)


def test_a_beat_under_way_does_not_bring_a_left_bucket_s_lock_back(tmp_path, monkeypatch):
  monkeypatch.setattr(workdir_lib, 'BEAT_SECONDS', 0.01)
  begun, write = threading.Event(), workdir_lib.BucketLock._write

  def slow(self, beats):
    if beats:
      begun.set()
      time.sleep(0.2)
    write(self, beats)

  monkeypatch.setattr(workdir_lib.BucketLock, '_write', slow)
  with workdir_lib.BucketLock(str(tmp_path), str(tmp_path / 'run')):
    assert begun.wait(10)
  time.sleep(0.3)
  assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('content', ['', '[1]', '{"place": "elsewhere:/x", "token": "t"}'])
def test_a_dead_runs_bucket_is_taken_over_after_a_while(content, tmp_path, monkeypatch):
  monkeypatch.setattr(workdir_lib, 'BEAT_SECONDS', 0.05)
  monkeypatch.setattr(workdir_lib, 'DEAD_SECONDS', 0.3)
  (tmp_path / workdir_lib.BUCKET_LOCK).write_text(content)
  began = time.monotonic()
  with workdir_lib.BucketLock(str(tmp_path), str(tmp_path / 'run')):
    assert time.monotonic() - began > 0.3


def test_the_same_workdir_takes_its_own_bucket_back_at_once(tmp_path, monkeypatch):
  monkeypatch.setattr(workdir_lib, 'DEAD_SECONDS', 1e9)
  killed = workdir_lib.BucketLock(str(tmp_path), str(tmp_path / 'run'))
  killed._write(0)
  with workdir_lib.BucketLock(str(tmp_path), str(tmp_path / 'run')):
    pass


def test_a_run_whose_bucket_was_taken_stops(tmp_path, monkeypatch):
  monkeypatch.setattr(workdir_lib, 'BEAT_SECONDS', 0.02)
  with workdir_lib.BucketLock(str(tmp_path), str(tmp_path / 'run')) as held:
    other = workdir_lib.BucketLock(str(tmp_path), str(tmp_path / 'other'))
    end = time.monotonic() + 10
    while not held._taken_by and time.monotonic() < end:
      other._write(0)
      time.sleep(0.01)
    with pytest.raises(InputError, match='another run is using'):
      held.check()
  assert threading.active_count() and other._read()['token'] == other._token


# Compiled programs.


@pytest.mark.parametrize('harm', [b'', b'garbage', None])
def test_a_compiled_program_that_cannot_be_read_is_compiled_again(harm, tmp_path, monkeypatch):
  from jax.experimental.compilation_cache import compilation_cache  # noqa: PLC0415

  kept = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs

  def begin():
    """As a new process would."""
    jax.clear_caches()
    compilation_cache.reset_cache()
    workdir_lib.use_compile_cache(str(tmp_path))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)

  def compute():
    return float(jax.jit(lambda x: (x * 3 + 1).sum())(np.arange(5, dtype=np.float32)))

  try:
    begin()
    assert compute() == 35
    entries = [path for path in tmp_path.iterdir() if path.name.endswith('-cache')]
    assert entries
    for path in entries:
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if harm is None else harm)
    begin()
    with pytest.warns(UserWarning, match='Error reading persistent compilation cache'):
      assert compute() == 35
  finally:
    jax.config.update('jax_compilation_cache_dir', kept[0])
    jax.config.update('jax_persistent_cache_min_compile_time_secs', kept[1])
    compilation_cache.reset_cache()
