"""What a run prints, refuses and leaves behind; the fake step stands for the real one."""

import dataclasses
import json
import os
import types

import fake_run
import jax
import pytest

from dsr_jax import train
from dsr_jax.errors import InputError
from dsr_jax.runtime import checkpoints, metrics, progress
from dsr_jax.runtime import workdir as workdir_lib


def run(workdir, steps=12, made=None, **changes):
  return train.run(fake_run.config(steps, **changes), str(workdir), made or fake_run.parts())


def steps_kept(workdir):
  return sorted(int(n) for n in os.listdir(os.path.join(workdir, 'checkpoints')) if n.isdigit())


def test_a_run_leaves_its_files_and_names_its_summary(tmp_path, capsys):
  path = run(tmp_path / 'new' / 'run')
  assert path == str(tmp_path / 'new' / 'run' / 'summary.json')
  with open(path, encoding='utf-8') as f:
    summary = json.load(f)
  assert summary['finished'] and summary['step'] == 12
  assert (
    summary['evaluation']['w/norm']['step'] == 12 and summary['evaluation']['w/norm']['before'] > 0
  )
  left = set(os.listdir(tmp_path / 'new' / 'run'))
  assert {
    'config.json',
    'metrics.jsonl',
    'events',
    'samples',
    'checkpoints',
    'report.html',
    'summary.json',
  } <= left
  assert not [n for n in left if n.endswith('.new')]
  assert sorted(os.listdir(tmp_path / 'new' / 'run' / 'samples')) == ['000005.png', '000010.png']
  assert sorted(os.listdir(tmp_path / 'new' / 'run' / 'evaluations')) == [
    '000000.json',
    '000006.json',
    '000012.json',
  ]
  out, err = capsys.readouterr()
  assert out == ''
  for word in (
    'devices',
    'mesh data 1',
    'parameters   8.19 k',
    'MiB per device',
    'compiled',
    'step 12/12',
    'evaluation   step 6: w/norm ',
    'before     after',
  ):
    assert word in err, word


def test_every_step_has_a_line_whatever_the_log_interval(tmp_path):
  run(tmp_path / 'a', system__log_every=1)
  run(tmp_path / 'b', system__log_every=5)
  assert metrics.repeatable(tmp_path / 'a') == metrics.repeatable(tmp_path / 'b')
  lines = metrics.repeatable(tmp_path / 'a')
  assert [line['step'] for line in lines if 'loss' in line] == list(range(1, 13))
  assert [line['step'] for line in lines if 'eval/w/norm' in line] == [0, 6, 12]


def test_checkpoints_kept_are_the_last_and_the_multiples(tmp_path):
  run(
    tmp_path,
    12,
    system__save_every=1,
    system__keep_last=2,
    system__keep_every=5,
    eval__benchmark='none',
  )
  assert steps_kept(tmp_path) == [5, 10, 11, 12]


def test_nan_stops_the_run_names_metric_and_step_and_keeps_the_last_good_checkpoint(tmp_path):
  with pytest.raises(InputError, match=r'loss is nan at step 10, not a finite number; lower') as e:
    run(tmp_path, 12, fake_run.parts(nan_at=10))
  assert 'learning_rate' in str(e.value)
  assert steps_kept(tmp_path) == [4, 8]
  assert max(line['step'] for line in metrics.repeatable(tmp_path)) == 9


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
  made = fake_run.parts()

  def make_train_step(model, config, mesh, state):
    inner = made.make_train_step(model, config, mesh, state)

    def step(state, batch):
      out = inner(state, batch)
      extra = jax.numpy.where(out.state.step == 8, jax.numpy.inf, 0.0)
      broken = {'w': out.state.params['w'] + extra}
      return out._replace(state=dataclasses.replace(out.state, params=broken))

    return jax.jit(step, donate_argnums=0)

  with pytest.raises(InputError, match='not finite after step 8'):
    run(tmp_path, 12, dataclasses.replace(made, make_train_step=make_train_step))
  assert steps_kept(tmp_path) == [4]


def test_the_frozen_score_is_logged_only_when_it_was_made(tmp_path):
  made = fake_run.parts()

  def make_train_step(model, config, mesh, state):
    inner = made.make_train_step(model, config, mesh, state)

    def step(state, batch):
      out = inner(state, batch)
      score = jax.numpy.where(state.step % 4 == 0, 1.5, jax.numpy.nan)
      return out._replace(metrics={**out.metrics, 'generation/reward_frozen': score})

    return jax.jit(step, donate_argnums=0)

  run(
    tmp_path, 12, dataclasses.replace(made, make_train_step=make_train_step), system__frozen_every=4
  )
  assert metrics.read(tmp_path)['generation/reward_frozen'] == ([1, 5, 9], [1.5] * 3)


@pytest.mark.parametrize('where', ['file/run', 'file', '/proc/run'])
def test_a_workdir_that_cannot_be_written_is_refused_before_anything_is_loaded(tmp_path, where):
  (tmp_path / 'file').write_text('x')
  made = train.Builders(**dict.fromkeys(vars(fake_run.parts()), None))
  with pytest.raises(InputError, match='cannot write to .*/run|cannot write to .*/file'):
    run(tmp_path / where, made=made)
  assert os.listdir(tmp_path) == ['file']


def test_two_runs_in_one_workdir_are_refused(tmp_path):
  with workdir_lib.locked(str(tmp_path)):
    with pytest.raises(InputError, match='another run is using .*; stop it'):
      run(tmp_path)


def test_too_small_a_disk_is_found_before_the_first_step(tmp_path, monkeypatch):
  monkeypatch.setattr(
    checkpoints.shutil, 'disk_usage', lambda path: types.SimpleNamespace(free=1 << 20)
  )
  with pytest.raises(InputError, match=r'has 1 MiB free, but a checkpoint needs 64 MiB'):
    run(tmp_path)
  assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_up_stops_the_run_with_the_last_good_checkpoint(tmp_path, monkeypatch):
  free = iter([1 << 40] * 2 + [0] * 9)
  monkeypatch.setattr(
    checkpoints.shutil, 'disk_usage', lambda path: types.SimpleNamespace(free=next(free))
  )
  with pytest.raises(InputError, match='has 0 MiB free, but a checkpoint needs'):
    run(tmp_path)
  assert steps_kept(tmp_path) == [4]


def test_an_unused_accelerator_is_named(monkeypatch):
  monkeypatch.setattr(
    workdir_lib.glob, 'glob', lambda pattern: ['/dev/nvidia0'] if 'nvidia' in pattern else []
  )
  monkeypatch.setattr(workdir_lib, '_told_to_use_cpu', lambda: False)
  with pytest.raises(InputError, match=r'/dev/nvidia0.*requirements-gpu\.txt'):
    workdir_lib.check_accelerator()
  monkeypatch.setattr(workdir_lib, '_told_to_use_cpu', lambda: True)
  workdir_lib.check_accelerator()


def test_a_bar_stands_on_a_terminal_and_plain_lines_elsewhere(monkeypatch, capsys):
  values = {
    'generation/reward_mean': -3.25,
    'understanding/reward_mean': -4.5,
    'time/step_seconds': 2.0,
  }
  plain = progress.Progress(0, 100)
  plain.step(40, values)
  assert capsys.readouterr().err == 'step 40/100  R_G -3.250  R_U -4.500  2.00 s  2 min 00 s left\n'
  monkeypatch.setattr(progress.sys.stderr, 'isatty', lambda: True)
  bar = progress.Progress(0, 100)
  bar.step(40, values)
  bar.close()
  err = capsys.readouterr().err
  assert '40/100' in err and 'R_G=-3.250' in err and '40%' in err
