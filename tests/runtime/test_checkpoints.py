"""Checkpoints alone: whole or absent, read back exactly, refused when they are another's or
broken.
"""

import dataclasses
import glob
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.errors import InputError
from dsr_jax.runtime import checkpoints
from dsr_jax.state import TrainState

ABOUT = {
  'method': {'beta': 2.0, 'seed': 0},
  'data': {'prompts': 'a', 'fingerprint': '1'},
  'model': {'name': 'm', 'fingerprint': '2'},
}


def make_state(seed):
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  params = {
    'language_model': {'layers': {'0': draw(3, 5)}, 'norm': draw(7)},
    'head': draw(2, 2).astype(jnp.bfloat16),
  }
  return TrainState(
    step=jnp.int32(seed),
    params=params,
    opt_state=({'mu': draw(3)}, jnp.int32(seed), ()),
    fixed_params={'vq': draw(4)},
  )


def save(workdir, *steps, about=ABOUT):
  saved = checkpoints.Checkpoints(str(workdir), about, keep_last=5)
  for step in steps:
    saved.save(step, make_state(step))
  saved.close()


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def test_what_is_saved_comes_back_exactly_and_frozen_parts_are_the_new_runs(tmp_path):
  save(tmp_path, 1, 2)
  now = make_state(9)
  reader = checkpoints.Checkpoints(str(tmp_path), ABOUT)
  assert reader.latest() == 2
  for step in (1, 2):
    back = reader.restore(now, step)
    assert_equal(back, dataclasses.replace(make_state(step), fixed_params=now.fixed_params))
  reader.close()


def test_a_checkpoint_written_on_one_layout_is_read_onto_another(tmp_path):
  save(tmp_path, 3)
  device = jax.devices()[-1]
  target = jax.device_put(make_state(0), device)
  reader = checkpoints.Checkpoints(str(tmp_path), ABOUT)
  back = reader.restore(target)
  reader.close()
  assert_equal(back.params, make_state(3).params)
  assert all(x.devices() == {device} for x in jax.tree.leaves(back))


def test_trained_parameters_are_found_without_the_run(tmp_path):
  save(tmp_path, 4, 8)
  params, about, step = checkpoints.load_trained(str(tmp_path))
  assert step == 8 and about == ABOUT
  assert_equal(params, jax.tree.map(np.asarray, make_state(8).params))
  assert checkpoints.load_trained(str(tmp_path), 4)[2] == 4
  with pytest.raises(InputError, match=r'found checkpoints \[4, 8\].*expected one of step 5'):
    checkpoints.load_trained(str(tmp_path), 5)
  with pytest.raises(InputError, match='expected the workdir of a run'):
    checkpoints.load_trained(str(tmp_path / 'nothing'))
  (tmp_path / 'empty' / 'checkpoints').mkdir(parents=True)
  with pytest.raises(InputError, match=r'found checkpoints \[\]'):
    checkpoints.load_trained(str(tmp_path / 'empty'))


def test_a_broken_checkpoint_is_named_and_the_one_before_goes_on(tmp_path):
  save(tmp_path, 1, 2)
  for path in glob.glob(str(tmp_path / 'checkpoints' / '2' / 'state' / '**'), recursive=True):
    if os.path.isfile(path) and os.path.basename(os.path.dirname(path)) == 'd':
      os.truncate(path, os.path.getsize(path) // 2)
  reader = checkpoints.Checkpoints(str(tmp_path), ABOUT)
  with pytest.raises(InputError, match=r'cannot read the checkpoint .*/2 .*remove that folder'):
    reader.restore(make_state(0))
  reader.close()
  shutil.rmtree(tmp_path / 'checkpoints' / '2')
  reader = checkpoints.Checkpoints(str(tmp_path), ABOUT)
  assert int(reader.restore(make_state(0)).step) == 1
  reader.close()


def test_a_moved_data_set_is_the_same_and_changed_data_is_not(tmp_path):
  def check(now):
    return checkpoints.check_same_run(ABOUT, now, 'here')

  check({**ABOUT, 'data': {'prompts': 'elsewhere/a', 'fingerprint': '1'}})
  with pytest.raises(InputError, match=r"data\.fingerprint: '1' -> '3'; data\.prompts: 'a' -> 'b'"):
    check({**ABOUT, 'data': {'prompts': 'b', 'fingerprint': '3'}})
  with pytest.raises(InputError, match=r'method\.beta: 2\.0 -> 1\.0; method\.seed: 0 -> 4'):
    check({**ABOUT, 'method': {'beta': 1.0, 'seed': 4}})


def test_a_run_saved_under_the_old_names_of_its_keys_goes_on():
  def settings(**method):
    return {**ABOUT, 'method': {**ABOUT['method'], **method}}

  saved = settings(swap_every=9, lora_rank=4, scorer='partner')
  now = settings(separate={'swap_every': 9}, lora={'rank': 4}, scorer='policy')
  checkpoints.check_same_run(saved, now, 'here')
  with pytest.raises(InputError, match=r'\(checkpoint -> now: method\.lora\.rank: 4 -> 5\)'):
    checkpoints.check_same_run(saved, settings(**{**now['method'], 'lora': {'rank': 5}}), 'here')


def test_fingerprints_see_every_bit_and_every_name():
  base = {'a': np.arange(4, dtype=np.float32), 'b': np.zeros(2, np.float32)}
  same = checkpoints.fingerprint({'b': base['b'], 'a': jnp.asarray(base['a'])})
  assert checkpoints.fingerprint(base) == same
  changed = base['a'].copy()
  changed[2] = np.nextafter(changed[2], 9)
  others = [
    {**base, 'a': changed},
    {'a': base['a'], 'c': base['b']},
    {**base, 'a': base['a'].reshape(2, 2)},
    {**base, 'b': -base['b']},
  ]
  assert len({same, *map(checkpoints.fingerprint, others)}) == 5
