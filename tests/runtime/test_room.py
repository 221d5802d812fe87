"""What a device or a bucket cannot be is said before anything is done."""

import types

import fake_run
import pytest

from dsr_jax import train
from dsr_jax.errors import InputError
from dsr_jax.plan.memory import Estimate
from dsr_jax.runtime import room
from dsr_jax.runtime import workdir as workdir_lib

GIB = 2**30


def estimate(always, rollout=0):
  return Estimate((('state', always * GIB, 'always'), ('samples', rollout * GIB, 'rollout')))


@pytest.fixture
def device(monkeypatch):
  """Function: what a device says that it has, in GiB; None for one that says nothing."""

  def says(gib):
    stats = None if gib is None else {'bytes_limit': gib * GIB}
    found = types.SimpleNamespace(memory_stats=lambda: stats)
    monkeypatch.setattr(room.jax, 'local_devices', lambda: [found])

  return says


@pytest.mark.parametrize('asked', [estimate(11), estimate(5, 11), estimate(0, 800_000)])
def test_a_step_for_which_a_device_says_it_has_no_room_is_refused(asked, device, capsys):
  device(10)
  with pytest.raises(InputError, match='GiB per device.*here has only 10.0 GiB.*update_chunk'):
    room.check_step(asked)
  assert 'samples' in capsys.readouterr().err  # by part


def test_an_estimate_a_little_above_what_there_is_is_a_warning(device, capsys):
  device(10)
  room.check_step(estimate(5, 4))
  room.check_step(None)
  assert capsys.readouterr().err == ''
  room.check_step(estimate(5, 6))
  assert 'warning' in capsys.readouterr().err


def test_a_machine_that_says_nothing_is_warned_for(device, monkeypatch, capsys):
  device(None)
  monkeypatch.setattr(room, 'machine_bytes', lambda: 10 * GIB)
  monkeypatch.setattr(room.jax, 'local_device_count', lambda: 1)
  room.check_step(estimate(5, 4))
  room.check_weights(9 * GIB, 'mine')
  assert capsys.readouterr().err == ''
  room.check_step(estimate(5, 800_000))
  room.check_weights(11 * GIB, 'mine')
  step, weights = capsys.readouterr().err.splitlines()
  assert '800,005.0 GiB needed for the step (an estimate), but this machine has 10.0' in step
  assert 'GiB: the system' in step
  assert '11.0 GiB needed for the weights of mine' in weights


def test_weights_that_a_device_cannot_hold_are_refused(device):
  device(10)
  room.check_weights(10 * GIB, 'mine')
  with pytest.raises(InputError, match='weights of mine need 11.0 GiB, .* here has only 10.0'):
    room.check_weights(11 * GIB, 'mine')


@pytest.mark.parametrize(
  'bucket, words',
  [
    ('FILE', 'system.bucket names the file .*; set it to a folder'),
    ('s3://nobody/x', 'needs the package s3fs, which is not installed; pip install s3fs'),
    ('gs://nobody/x', 'needs the package gcsfs, which is not installed; pip install gcsfs'),
    ('ftp://nobody/x', r'set it to a folder, or to a bucket with gs or s3 before the ://'),
  ],
)
def test_a_bucket_that_cannot_be_one_is_refused_at_once(bucket, words, tmp_path, monkeypatch):
  monkeypatch.setattr(workdir_lib.importlib.util, 'find_spec', lambda name: None)
  (tmp_path / 'file').write_text('x')
  config = fake_run.config(12, system__bucket=bucket.replace('FILE', str(tmp_path / 'file')))
  with pytest.raises(InputError, match=words):
    train.run(config, str(tmp_path / 'run'), fake_run.parts())
  assert not (tmp_path / 'run').exists()
  monkeypatch.setattr(workdir_lib.importlib.util, 'find_spec', lambda name: name == 's3fs')
  workdir_lib.check_bucket('s3://nobody/x')
  workdir_lib.check_bucket(str(tmp_path / 'new'))


def test_a_workdir_is_a_folder_of_this_machine(tmp_path):
  with pytest.raises(InputError, match='--workdir=gs://a/b is not a folder of this machine'):
    train.run(fake_run.config(12), 'gs://a/b', fake_run.parts())
