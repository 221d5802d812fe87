"""A run that was stopped, however it was, goes on as if nothing had happened."""

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import types

import fake_run
import jax
from jax.experimental.compilation_cache import compilation_cache
import numpy as np
from PIL import Image
from places import CONFIGS, ROOT, SUPPORT
import pytest

from dsr_jax import config as config_lib
from dsr_jax import config_loading, train
from dsr_jax.errors import InputError
from dsr_jax.runtime import checkpoints, metrics
from dsr_jax.runtime import workdir as workdir_lib
from dsr_jax.state import TrainState

TINY = str(CONFIGS / 'scenes_tiny.py')


def summary(workdir):
  with open(os.path.join(workdir, 'summary.json'), encoding='utf-8') as f:
    return json.load(f)


def start(workdir, steps, *args):
  env = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  return subprocess.Popen(
    [sys.executable, str(SUPPORT / 'fake_run.py'), str(workdir), str(steps), *args],
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def assert_same_run(a, b):
  assert metrics.repeatable(a) == metrics.repeatable(b)
  assert summary(a)['parameters_sha256'] == summary(b)['parameters_sha256']


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('unbroken')
  train.run(fake_run.config(40), str(workdir), fake_run.parts())
  return str(workdir)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_equals_the_unbroken_one(unbroken, tmp_path):
  kills, rng = 0, random.Random(0)
  while True:
    process = start(tmp_path, 40, '0.05')
    for line in process.stderr:  # let it start, then kill it anywhere in the next steps
      if line.startswith('step '):
        break
    try:
      process.communicate(
        timeout=rng.uniform(0.0, 0.4) if kills < 10 else 300
      )  # reads the pipes: a full one would block the run
    except subprocess.TimeoutExpired:
      process.send_signal(signal.SIGKILL)
      kills += 1
    process.communicate()
    if process.returncode == 0:
      break
  assert kills >= 5
  assert_same_run(tmp_path, unbroken)


@pytest.mark.slow
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(unbroken, tmp_path):
  process = start(tmp_path, 40, '0.02')
  folder, seen = tmp_path / 'checkpoints', []
  while process.poll() is None and len(seen) < 2:
    half = [n for n in (os.listdir(folder) if folder.exists() else []) if not n.isdigit()]
    if half and half[0] not in seen:
      seen.append(half[0])
  process.kill()
  process.communicate()
  assert seen
  restarted = start(tmp_path, 40)
  _, err = restarted.communicate(timeout=600)
  assert restarted.returncode == 0, err
  assert all(n.isdigit() for n in os.listdir(folder))
  assert_same_run(tmp_path, unbroken)


def test_sigterm_finishes_the_step_saves_and_exits_with_0(unbroken, tmp_path):
  process = start(tmp_path, 40, '0.05')
  for line in process.stderr:
    if line.startswith('step 9/'):
      break
  process.terminate()
  _, err = process.communicate(timeout=600)
  assert process.returncode == 0, err
  stopped = int(re.search(r'after step (\d+) of 40', err).group(1))
  assert 9 <= stopped < 40
  assert max(int(n) for n in os.listdir(tmp_path / 'checkpoints')) == stopped
  assert summary(tmp_path)['finished'] is False
  again = start(tmp_path, 40)
  _, err = again.communicate(timeout=600)
  assert f'from the checkpoint of step {stopped}' in err
  assert_same_run(tmp_path, unbroken)


def test_a_stop_on_a_step_that_is_to_be_evaluated_makes_up_for_it(unbroken, tmp_path):
  made, evaluations = fake_run.parts(), []

  def batches(*args):
    inner = made.make_batches(*args)

    def at(step):
      if step == 12 and not os.path.exists(
        tmp_path / 'summary.json'
      ):  # while step 12, an evaluated one, runs
        os.kill(os.getpid(), signal.SIGTERM)
      return inner.at(step)

    return types.SimpleNamespace(at=at, fingerprint=inner.fingerprint)

  parts = dataclasses.replace(fake_run.parts(evaluations=evaluations), make_batches=batches)
  train.run(fake_run.config(40), str(tmp_path), parts)
  assert (summary(tmp_path)['step'], evaluations) == (12, [0, 6])
  train.run(fake_run.config(40), str(tmp_path), parts)
  assert evaluations == [0, 6, 12, 18, 24, 30, 36, 40]
  assert_same_run(tmp_path, unbroken)


def test_a_finished_run_started_again_changes_nothing(unbroken, tmp_path):
  before = open(os.path.join(unbroken, 'metrics.jsonl'), encoding='utf-8').read()
  train.run(fake_run.config(40), unbroken, fake_run.parts())
  assert open(os.path.join(unbroken, 'metrics.jsonl'), encoding='utf-8').read() == before


def test_lines_after_the_restored_step_are_cut(unbroken, tmp_path):
  train.run(fake_run.config(40), str(tmp_path), fake_run.parts())
  for step in (40, 36):  # as if killed before these were complete
    os.rename(tmp_path / 'checkpoints' / str(step), tmp_path / f'gone-{step}')
  os.makedirs(tmp_path / 'checkpoints', exist_ok=True)
  with pytest.raises(AssertionError):
    assert metrics.repeatable(tmp_path)[-1]['step'] <= 32
  train.run(fake_run.config(40), str(tmp_path), fake_run.parts())
  assert_same_run(tmp_path, unbroken)


def test_another_method_is_refused_and_the_difference_is_named(unbroken):
  files = sorted(os.listdir(unbroken))
  with pytest.raises(InputError, match=r'method\.beta: 2\.0 -> 3\.0') as e:
    train.run(fake_run.config(40, method__beta=3.0), unbroken, fake_run.parts())
  assert 'group_size' not in str(e.value)
  assert sorted(os.listdir(unbroken)) == files


def test_adapters_that_began_before_they_had_a_rate_of_their_own_go_on_at_theirs(
  tmp_path, monkeypatch, capsys
):
  config = fake_run.config(12)  # at 0.1
  method = dataclasses.replace(config.method, trainable='lora')
  config = dataclasses.replace(config, method=method)
  about = workdir_lib.about

  def as_then(*args):
    made = about(*args)
    del made['method']['lora']['learning_rate'], made['method']['template']
    return made

  with monkeypatch.context() as then, pytest.raises(InputError, match='lower method.lora.learning'):
    then.setattr(workdir_lib, 'about', as_then)
    train.run(config, str(tmp_path), fake_run.parts(nan_at=6))
  assert checkpoints.steps_in(str(tmp_path)) == [4]

  # The same command, twice more: what it says of the rate is a default that the run never had.
  assert method.lora.learning_rate == 1e-4
  for step in (4, 12):
    capsys.readouterr()
    train.run(config, str(tmp_path), fake_run.parts())
    said = capsys.readouterr().err
    assert 'lora, at a rate of at most 0.1 (method.lora.learning_rate)' in said
    assert f'from the checkpoint of step {step}' in said
    saved = checkpoints.newest_method(str(tmp_path))
    assert (saved['lora']['learning_rate'], saved['learning_rate']) == (0.1, 0.1)
  other = dataclasses.replace(method, lora=config_lib.Lora(learning_rate=2e-3))
  with pytest.raises(InputError, match=r'method\.lora\.learning_rate: 0\.1 -> 0\.002'):
    train.run(dataclasses.replace(config, method=other), str(tmp_path), fake_run.parts())


def test_other_data_and_another_model_are_refused(unbroken):
  other = fake_run.parts()

  def load(name):
    return dataclasses.replace(other.load_model(name), source={'name': 'other', 'fingerprint': '0'})

  with pytest.raises(InputError, match="model.name: 'scenes' -> 'other'"):
    train.run(fake_run.config(40), unbroken, dataclasses.replace(other, load_model=load))


def test_the_system_may_change_between_two_starts(unbroken, tmp_path):
  config = fake_run.config(40)
  with pytest.raises(InputError):
    train.run(config, str(tmp_path), fake_run.parts(nan_at=17))
  other_system = fake_run.config(40, system__save_every=7, system__log_every=1, system__keep_last=3)
  train.run(other_system, str(tmp_path), fake_run.parts())
  assert_same_run(tmp_path, unbroken)


def test_a_checkpoint_holds_what_was_saved_although_the_step_donates_it(tmp_path):
  weights = jax.numpy.arange(1 << 20, dtype=jax.numpy.float32)
  state = TrainState(step=jax.numpy.int32(3), params={'w': weights}, opt_state={}, fixed_params={})
  about = {'method': {}, 'data': {'fingerprint': ''}, 'model': {'fingerprint': ''}}
  overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
  saved = checkpoints.Checkpoints(str(tmp_path), about)
  saved.save(3, state)
  state = overwrite(state)
  jax.block_until_ready(state)
  saved.wait()
  back = saved.restore(state)
  saved.close()
  np.testing.assert_array_equal(back.params['w'], np.arange(1 << 20, dtype=np.float32))
  assert int(back.step) == 3


@pytest.fixture(scope='module')
def own_inputs(tmp_path_factory):
  """A file of prompts and a folder of pictures."""
  folder = tmp_path_factory.mktemp('inputs')
  prompts = ['a red circle', 'two small green rings', 'a blue square left of a red disc', '3 stars']
  (folder / 'prompts.txt').write_text('\n'.join(prompts))
  rng = np.random.default_rng(0)
  for i in range(5):
    Image.fromarray(rng.integers(0, 255, (20 + i, 24, 3), np.uint8)).save(folder / f'{i}.png')
  return {'data__prompts': str(folder / 'prompts.txt'), 'data__images': str(folder)}


@pytest.fixture
def compile_cache(tmp_path):
  """A folder of compiled programs for one test."""
  kept = jax.config.jax_compilation_cache_dir
  compilation_cache.reset_cache()
  yield {'system__compile_cache': str(tmp_path / 'compiled')}
  jax.config.update('jax_compilation_cache_dir', kept)
  compilation_cache.reset_cache()


def test_the_real_step_stopped_and_resumed_equals_the_unbroken_run(
  hf_directory, own_inputs, compile_cache, tmp_path, capfd
):
  config = config_loading.load(
    TINY,
    model=str(hf_directory),
    eval__benchmark='none',
    eval__watched=0,
    system__frozen_every=2,
    **own_inputs,
    **compile_cache,
  )

  def programs():
    return {name for name in os.listdir(tmp_path / 'compiled') if 'step' in name}

  train.run(config, str(tmp_path / 'unbroken'))
  assert 'compiled     the step' in capfd.readouterr().err
  lines = metrics.repeatable(tmp_path / 'unbroken')
  assert [line['step'] for line in lines] == [1, 2, 3] and all(
    np.isfinite(list(line.values())).all() for line in lines
  )
  assert {'generation/reward_mean', 'understanding/reward_mean', 'loss', 'gradient_norm'} <= set(
    lines[0]
  )
  assert [
    line['step'] for line in lines if any(name.endswith('reward_frozen') for name in line)
  ] == [1, 3]
  real = train.Builders()

  def make_batches(*args):
    inner = real.make_batches(*args)

    def at(step):
      if step == 2:  # made while step 2 runs
        os.kill(os.getpid(), signal.SIGTERM)
      return inner.at(step)

    return types.SimpleNamespace(**{**vars(inner), 'at': at})

  kept = programs()
  assert kept
  train.run(config, str(tmp_path / 'stopped'), dataclasses.replace(real, make_batches=make_batches))
  assert summary(tmp_path / 'stopped')['step'] == 2
  train.run(config, str(tmp_path / 'stopped'))
  assert programs() == kept  # the first run's are found again, before a step and after a restart
  assert_same_run(tmp_path / 'stopped', tmp_path / 'unbroken')
