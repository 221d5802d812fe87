"""The batch ahead, and what becomes of a run whose next batch fails or whose data changed."""

import dataclasses
import json
import time
import types

import fake_run
import jax.numpy as jnp
import picture_sets as sets
import pytest

from dsr_jax import config_loading, main, train
from dsr_jax.data import ahead as ahead_lib
from dsr_jax.data.ahead import Ahead
from dsr_jax.errors import InputError
from dsr_jax.runtime import checkpoints, metrics


def run(workdir, made=None, steps=12, accept=False, **changes):
  config = fake_run.config(steps, **changes)
  return train.run(config, str(workdir), made or fake_run.parts(), accept_changed_data=accept)


def with_data(at=None, **facts):
  """The fake run's parts, whose batches have other facts, and come through `at(make, step)`."""
  made = fake_run.parts()

  def batches(*args):
    inner = made.make_batches(*args)
    make = (lambda step: at(inner.at, step)) if at else inner.at
    return types.SimpleNamespace(**{'at': make, 'fingerprint': inner.fingerprint, **facts})

  return dataclasses.replace(made, make_batches=batches)


def failing(at_step, error):
  def at(make, step):
    if step == at_step:
      raise error
    return make(step)

  return with_data(at, can_fail=True)


# The batch ahead.


def slow(seconds):
  return types.SimpleNamespace(at=lambda step: time.sleep(seconds) or step)


def test_the_next_batch_is_made_while_the_devices_work():
  ahead = Ahead(slow(0.2))
  ahead.begin(5)
  while not ahead._future.done():  # the step
    time.sleep(0.01)
  assert ahead.finish(jnp.zeros(3)) == 5 and ahead.waited == 0.0
  ahead.close()


def test_time_that_the_devices_wait_is_counted_and_time_that_they_work_is_not(monkeypatch):
  ahead = Ahead(slow(0.3))
  ahead.begin(0)
  ahead.finish(jnp.zeros(3))  # done at once
  assert ahead.waited > 0.2
  monkeypatch.setattr(ahead_lib, '_are_done', lambda arrays: False)
  ahead.begin(1)
  assert ahead.finish(jnp.zeros(3)) == 1 and ahead.waited == 0.0
  ahead.close()


def test_without_a_next_step_there_is_no_batch():
  ahead = Ahead(slow(0))
  assert ahead.finish(jnp.zeros(3)) is None and ahead.error is None
  ahead.close()


def test_every_step_tells_how_long_it_waited_for_its_data(tmp_path):
  run(tmp_path, fake_run.parts(delay=0.5), steps=4)
  steps, waited = metrics.read(tmp_path)['time/data_wait']
  assert steps == [1, 2, 3, 4]
  assert 0.05 < max(waited[:3]) < 5 and waited[3] == 0.0


# A batch that cannot be made.


@pytest.mark.parametrize('step', [2, 4, 11])
def test_a_finished_step_is_saved_before_the_next_batch_may_fail(step, tmp_path):
  run(tmp_path / 'unbroken')
  with pytest.raises(InputError, match='found a picture unreadable'):
    run(tmp_path / 'run', failing(step, InputError('found a picture unreadable')))
  assert checkpoints.steps_in(str(tmp_path / 'run'))[-1] == step
  assert metrics.repeatable(tmp_path / 'run')[-1]['step'] == step
  run(tmp_path / 'run')
  assert metrics.repeatable(tmp_path / 'run') == metrics.repeatable(tmp_path / 'unbroken')


def test_what_is_no_input_error_comes_through(tmp_path):
  with pytest.raises(ZeroDivisionError):
    run(tmp_path, failing(3, ZeroDivisionError()))


# Data that changed.


def numbered(fingerprint, **number):
  return with_data(facts={'number': number}, fingerprint=fingerprint)


def test_changed_data_are_described_refused_and_accepted_on_request(tmp_path, capsys):
  before = {'number': {'pictures': 6, 'prompts': 9}}
  made = with_data(facts=before, fingerprint='a')
  with pytest.raises(InputError):
    run(tmp_path / 'run', dataclasses.replace(made, make_train_step=fake_nan(5)))
  after = numbered('b', pictures=5, prompts=9)
  with pytest.raises(InputError, match=r'6 pictures -> 5; .*--accept_changed_data') as e:
    run(tmp_path / 'run', after)
  assert 'prompts ->' not in str(e.value)
  capsys.readouterr()
  run(tmp_path / 'run', after, accept=True)
  assert 'resuming with changed data: 6 pictures -> 5' in capsys.readouterr().err
  assert json.loads((tmp_path / 'run' / 'summary.json').read_text())['finished']
  run(tmp_path / 'run', after)  # the new data are the run's own by now


def fake_nan(step):
  return fake_run.parts(nan_at=step).make_train_step


def test_accepting_changed_data_accepts_no_other_method(tmp_path):
  with pytest.raises(InputError):
    run(tmp_path, fake_run.parts(nan_at=9))
  with pytest.raises(InputError, match='method.beta'):
    run(tmp_path, numbered('b', pictures=5), accept=True, method__beta=7.0)


def test_a_run_that_told_its_folder_by_names_goes_on(tmp_path):
  with pytest.raises(InputError):
    run(tmp_path, fake_run.parts(nan_at=9))
  known = 'data of seed 0'  # what the fake run's own batches say
  with pytest.raises(InputError, match='another run'):
    run(tmp_path, with_data(fingerprint='by contents'))
  run(tmp_path, with_data(fingerprint='by contents', facts={'earlier_fingerprint': known}))


def test_inputs_that_are_missing_are_refused_before_the_model_is_loaded(tmp_path):
  made = dataclasses.replace(fake_run.parts(), load_model=None)
  changes = {'data__images': 'coco:2+journeydb:2', 'data__data_dir': str(tmp_path / 'sets')}
  with pytest.raises(InputError, match='python -m dsr_jax.prepare --dataset=coco'):
    run(tmp_path / 'run', made, **changes)
  assert not (tmp_path / 'run').exists()


def test_the_flag_of_the_command_reaches_the_run(tmp_path, monkeypatch):
  seen = {}
  monkeypatch.setattr(
    main.train, 'run', lambda *args, **how: seen.update(how) or str(tmp_path / 'summary')
  )
  f = types.SimpleNamespace(
    config=config_loading.read(fake_run.TINY),
    workdir=str(tmp_path),
    coordinator=None,
    processes=None,
    process=None,
    wait_seconds=120.0,
    accept_changed_data=True,
  )
  main.main(['test'], f)
  assert seen['accept_changed_data'] is True


def test_a_real_run_finds_all_bad_pictures_before_its_first_step(tmp_path):
  content = {f'{i}.png': sets.picture((40, 40), form='PNG') for i in range(6)}
  content['2.png'] = content['2.png'][:500]
  content['4.png'] = content['4.png'][:500]
  folder = sets.write_folder(tmp_path / 'in', content)
  config = config_loading.load(fake_run.TINY, data__images=folder)
  with pytest.raises(InputError, match=r'found 2 of 6 images .*2\.png.*4\.png'):
    train.run(config, str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()
