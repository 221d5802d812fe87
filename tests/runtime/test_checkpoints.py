"""Checkpoints alone: whole or absent, read back exactly, refused when they are another's or
broken.
"""

import asyncio
import dataclasses
import errno
import json
import shutil

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.crc32c import crc32c

from dsr_jax.errors import InputError
from dsr_jax.runtime import checkpoints, checksums
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
  with pytest.raises(InputError, match=r'has the checkpoints \[4, 8\], but none of step 5'):
    checkpoints.load_trained(str(tmp_path), 5)
  with pytest.raises(InputError, match='does not exist; name the workdir of a run'):
    checkpoints.load_trained(str(tmp_path / 'nothing'))
  (tmp_path / 'empty' / 'checkpoints').mkdir(parents=True)
  with pytest.raises(InputError, match=r'has the checkpoints \[\], but none of step any'):
    checkpoints.load_trained(str(tmp_path / 'empty'))


def files_of(folder):
  return sorted(path for path in folder.rglob('*') if path.is_file())


def flip(path, rng):
  """One bit of a file that has any."""
  data = bytearray(path.read_bytes())
  bit = int(rng.integers(8 * len(data)))
  data[bit // 8] ^= 1 << bit % 8
  path.write_bytes(data)


def empty(path, rng):
  del rng
  path.write_bytes(b'')


def truncate(path, rng):
  data = path.read_bytes()
  path.write_bytes(data[: int(rng.integers(len(data)))])


def garble(path, rng):
  path.write_bytes(rng.bytes(path.stat().st_size))


def remove(path, rng):
  del rng
  path.unlink()


def read_as_the_run(workdir):
  reader = checkpoints.Checkpoints(str(workdir), ABOUT)
  try:
    return reader.restore(make_state(0))
  finally:
    reader.close()


def read_beside_the_run(workdir):
  return checkpoints.restore(str(workdir), 2, make_state(0), ABOUT)


def read_without_the_run(workdir):
  return checkpoints.load_trained(str(workdir))


READERS = (read_as_the_run, read_beside_the_run, read_without_the_run)


@pytest.mark.parametrize('harm', [flip, truncate, empty, garble, remove])
def test_harm_to_any_file_of_a_checkpoint_is_found_by_every_reader(harm, tmp_path):
  rng = np.random.default_rng(0)
  save(tmp_path, 1, 2)
  newest = tmp_path / 'checkpoints' / '2'
  assert len(files_of(newest)) > 10
  assert [p for p in files_of(newest) if p.name == checksums.CHECKSUMS] == [
    newest / checksums.CHECKSUMS
  ]
  for path in files_of(newest):
    good = path.read_bytes()
    harm(path, rng)
    for read in READERS:
      with pytest.raises(InputError) as e:
        read(tmp_path)
      assert f'cannot read the checkpoint {newest} (' in str(e.value), path
      assert f'of step 1, or name that one as {tmp_path}@1' in str(e.value)
    path.write_bytes(good)
  assert int(read_as_the_run(tmp_path).step) == 2


def test_every_single_bit_of_the_checksums_counts(tmp_path):
  folder = tmp_path
  (folder / 'a').write_bytes(b'')
  (folder / 'in').mkdir()
  (folder / 'in' / 'b').write_bytes(b'123456789')
  checksums.write(epath.Path(folder))
  path = folder / checksums.CHECKSUMS
  good = path.read_bytes()
  for bit in range(8 * len(good)):
    data = bytearray(good)
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    assert checksums.damage(epath.Path(folder)), (bit, data[bit // 8 - 9 : bit // 8 + 9])


@pytest.mark.parametrize('harm', [truncate, empty, garble, remove])
def test_harm_to_an_earlier_versions_checkpoint_is_never_a_traceback(harm, tmp_path, capsys):
  rng = np.random.default_rng(1)
  save_as_an_earlier_version(tmp_path, 1, 2)
  for read in READERS:
    read(tmp_path)
    assert '/2 has no checksums (an earlier version wrote it)' in capsys.readouterr().err
  refused = 0
  for path in files_of(tmp_path / 'checkpoints' / '2'):
    good = path.read_bytes()
    harm(path, rng)
    for read in READERS:
      try:
        read(tmp_path)
      except InputError as e:
        refused += 1
        assert 'cannot read the checkpoint' in str(e) and f'{tmp_path}@1' in str(e)
    path.write_bytes(good)
  assert refused > 10


def save_as_an_earlier_version(workdir, *steps):
  save(workdir, *steps)
  for step in steps:
    folder = workdir / 'checkpoints' / str(step)
    (folder / checksums.CHECKSUMS).unlink()
    said = json.loads((folder / '_CHECKPOINT_METADATA').read_text())
    (folder / '_CHECKPOINT_METADATA').write_text(json.dumps({**said, 'custom_metadata': {}}))


def test_the_offered_checkpoint_is_a_whole_one(tmp_path):
  save(tmp_path, 1, 2, 3)
  for step in (2, 3):
    (tmp_path / 'checkpoints' / str(step) / 'about' / 'metadata').write_bytes(b'{}')
  with pytest.raises(InputError, match=r'/3 \(.*of step 1, or name that one as'):
    read_as_the_run(tmp_path)
  shutil.rmtree(tmp_path / 'checkpoints' / '1')
  with pytest.raises(InputError, match='there is no intact one before it: restore'):
    read_as_the_run(tmp_path)


def test_an_emptied_checkpoint_is_named(tmp_path):
  save(tmp_path, 1)
  (tmp_path / 'checkpoints' / '2').mkdir()
  for read in READERS:
    with pytest.raises(InputError, match=r'/2 \(it is empty\).*of step 1'):
      read(tmp_path)


def test_a_checkpoint_under_another_steps_name_is_refused(tmp_path):
  save(tmp_path, 1)
  shutil.copytree(tmp_path / 'checkpoints' / '1', tmp_path / 'checkpoints' / '2')
  with pytest.raises(InputError, match=r'/2 \(it holds step 1\)'):
    read_as_the_run(tmp_path)


@pytest.mark.parametrize('said', [b'[]', b'7', b'{}', b'{"method": 1}', b'\xff', b'[' * 100_000])
def test_a_description_of_the_run_that_is_none_is_refused(said, tmp_path):
  save_as_an_earlier_version(tmp_path, 1, 2)
  (tmp_path / 'checkpoints' / '2' / 'about' / 'metadata').write_bytes(said)
  for read in READERS:
    with pytest.raises(InputError, match='cannot read the checkpoint'):
      read(tmp_path)


def test_a_file_that_may_not_be_read_is_no_damage(tmp_path, monkeypatch):
  save(tmp_path, 1, 2)

  def refuse(folder, part, parts):
    raise PermissionError(errno.EACCES, 'Permission denied', 'somewhere')

  monkeypatch.setattr(checkpoints.checksums, 'damage', refuse)
  with pytest.raises(InputError, match=r'\(Permission denied: somewhere\).*nothing in it is lost'):
    read_without_the_run(tmp_path)


def test_an_error_of_the_writers_thread_is_raised_and_not_logged_as_well(
  tmp_path, monkeypatch, caplog
):
  def refuse(*_, **__):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(checkpoints.checksums, 'write', refuse)
  saved = checkpoints.Checkpoints(str(tmp_path), ABOUT)
  saved.save(0, make_state(0))
  with pytest.raises(InputError, match='No space left'):
    saved.wait()
  saved.close()
  assert not [record for record in caplog.records if record.exc_info]


def test_checksums_of_large_files_see_every_block(tmp_path, monkeypatch):
  monkeypatch.setattr(checksums, 'BLOCK_BYTES', 1000)
  monkeypatch.setattr(checksums, 'READ_BYTES', 300)
  rng = np.random.default_rng(0)
  folder = epath.Path(tmp_path)
  (tmp_path / 'in').mkdir()
  for name, size in (('a', 0), ('b', 1000), ('in/c', 4321)):
    (tmp_path / name).write_bytes(rng.bytes(size))
  checksums.write(folder)
  found = json.loads((tmp_path / checksums.CHECKSUMS).read_text())['files']['b']
  assert found == [1000, crc32c((tmp_path / 'b').read_bytes())]
  assert not checksums.damage(folder)
  good = (tmp_path / 'in' / 'c').read_bytes()
  for place in range(0, 4321, 100):
    harmed = bytearray(good)
    harmed[place] ^= 1
    (tmp_path / 'in' / 'c').write_bytes(harmed)
    assert checksums.damage(folder) == 'in/c has changed since it was written'
    # Of three processes exactly one is the first to see it.
    assert sum(bool(checksums.damage(folder, part, 3)) for part in range(3)) == 1


def test_checksums_of_an_earlier_version_are_compared(tmp_path):
  folder = epath.Path(tmp_path)
  (tmp_path / 'x').write_bytes(b'123456789')
  (tmp_path / checksums.CHECKSUMS).write_text(json.dumps({'x': [9, 0xCBF43926]}))  # CRC-32
  assert not checksums.damage(folder)
  (tmp_path / 'x').write_bytes(b'123456788')
  assert checksums.damage(folder) == 'x has changed since it was written'
  for other in ({'algorithm': 'md5', 'files': {'x': [9, 1]}}, {'algorithm': [], 'files': {}}):
    (tmp_path / checksums.CHECKSUMS).write_text(json.dumps(other))
    assert checksums.damage(folder) == 'checksums.json is not a list of checksums'


def test_a_checkpoint_in_a_bucket_has_checksums_of_its_last_file_too(tmp_path):
  folder = epath.Path(tmp_path) / '3'
  made = checkpoints._CheckedInBucket.from_final(folder)
  folder.mkdir()
  (folder / 'x').write_bytes(b'123456789')
  asyncio.run(made.finalize())
  assert json.loads((folder / checksums.CHECKSUMS).read_text())['files']['x'] == [9, 0xE3069283]
  assert not checksums.damage(folder)
  (folder / 'commit_success.txt').write_bytes(b'complet\n')
  assert 'commit_success.txt' in checksums.damage(folder)


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
