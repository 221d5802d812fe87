"""Files and folders are there whole or not at all."""

import errno
import json
import os
import pathlib
import shutil
import stat
import subprocess
import sys
import types

from places import ROOT
import pytest

from dsr_jax import files
from dsr_jax.errors import InputError


def test_a_file_is_replaced_and_nothing_aside_is_left(tmp_path):
  path = tmp_path / 'new' / 'folders' / 'x.json'
  assert files.write_json(path, {'b': 1, 'a': 'é'}, indent=2, sort_keys=True) == path
  assert path.read_text() == '{\n  "a": "\\u00e9",\n  "b": 1\n}\n'
  files.write_text(path, 'é')
  assert path.read_bytes() == 'é'.encode()
  assert os.listdir(path.parent) == ['x.json']


def test_a_value_that_is_no_json_leaves_the_old_file(tmp_path):
  path = tmp_path / 'x.json'
  files.write_json(path, [1])
  with pytest.raises(ValueError):
    files.write_json(path, [float('nan')], allow_nan=False)
  assert json.loads(path.read_text()) == [1] and os.listdir(tmp_path) == ['x.json']


def test_a_file_of_a_relative_name_needs_no_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  files.write_text('x.md', 'x')
  assert (tmp_path / 'x.md').read_text() == 'x'


def test_a_missing_file_gives_the_default_or_a_sentence(tmp_path):
  path = tmp_path / 'config.json'
  assert files.read_json(path, default={}) == {}
  assert files.read_json_or_none(path) is None
  with pytest.raises(InputError, match='has no config.json, so it is not a model directory'):
    files.read_json(path)


@pytest.mark.parametrize(
  'content, found', [('{', 'cannot be read as JSON'), ('[1]', 'holds a list, not')]
)
def test_what_is_no_json_object_is_a_sentence(tmp_path, content, found):
  path = tmp_path / 'config.json'
  path.write_text(content)
  with pytest.raises(InputError, match=found):
    files.read_json(path, default={})


def fill(directory, ours=None, **contents):
  """Writes an output of files NAME.json (a_b is a/b)."""
  with files.whole_directory(directory, ours=ours) as aside:
    for name, text in contents.items():
      path = pathlib.Path(aside, *name.split('_')).with_suffix('.json')
      path.parent.mkdir(exist_ok=True)
      path.write_text(text)


def tree(folder):
  return {
    str(path.relative_to(folder)): path.read_text() for path in folder.rglob('*') if path.is_file()
  }


@pytest.mark.parametrize('before', [None, 'folder', 'file', 'link', 'dangling link'])
def test_a_finished_folder_takes_the_place_of_what_was_there(tmp_path, before):
  out, elsewhere = tmp_path / 'out', tmp_path / 'elsewhere'
  if before == 'folder':
    out.mkdir()
    (out / 'old').write_text('')
  elif before == 'file':
    out.write_text('')
  elif before:
    out.symlink_to(elsewhere)
    if before == 'link':
      elsewhere.mkdir()
      (elsewhere / 'old').write_text('')
  fill(out, new='')
  assert os.listdir(out) == ['new.json']
  # A link stays one, and what it points to is written.
  linked = before in ('link', 'dangling link')
  assert out.is_symlink() == linked
  assert sorted(os.listdir(tmp_path)) == (['elsewhere', 'out'] if linked else ['out'])


def test_a_file_is_written_through_a_link_and_a_device_stays_one(tmp_path):
  (tmp_path / 'link').symlink_to(tmp_path / 'there')
  files.write_text(tmp_path / 'link', 'x')
  assert (tmp_path / 'link').is_symlink() and (tmp_path / 'there').read_text() == 'x'
  files.check_output_file('/dev/null')
  files.write_text('/dev/null', 'x')
  assert stat.S_ISCHR(os.stat('/dev/null').st_mode)
  os.mkfifo(tmp_path / 'pipe')
  with pytest.raises(OSError):  # nobody reads: it is not waited for
    files.write_text(tmp_path / 'pipe', 'x')


def test_a_write_that_fails_leaves_the_old_file_and_nothing_aside(tmp_path, monkeypatch):
  files.write_text(tmp_path / 'x', 'old')

  def full(*args):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'replace', full)
  with pytest.raises(OSError):
    files.write_text(tmp_path / 'x', 'new')
  assert tree(tmp_path) == {'x': 'old'}


# Folders that cannot be renamed.


@pytest.fixture(params=['current', 'mount', 'mount found late', 'no leave above'])
def unmovable(request, tmp_path, monkeypatch):
  """A folder with files of an earlier output and one of the user's."""
  out = tmp_path / 'out'
  fill(out, config='old', b='old', deep_c='old')
  (out / 'mine.txt').write_text('mine')
  if request.param == 'current':
    monkeypatch.chdir(out)
    return pathlib.Path('.'), out
  if request.param == 'mount':
    monkeypatch.setattr(files, '_mounts', lambda: {str(out)})
  elif request.param == 'no leave above':
    access = os.access
    monkeypatch.setattr(os, 'access', lambda path, mode: path != str(tmp_path))
    assert access(out, os.W_OK)
  else:

    def busy(*args):
      raise OSError(errno.EBUSY, 'Device or resource busy')

    monkeypatch.setattr(files, '_exchange', busy)
  return out, out


def test_a_folder_that_cannot_be_renamed_is_written_file_by_file(unmovable):
  directory, out = unmovable
  inode = out.stat().st_ino
  files.check_place(directory)
  fill(directory, ours=lambda path: path.endswith('.json'), config='new', a_b='new')
  assert tree(out) == {'config.json': 'new', 'a/b.json': 'new', 'mine.txt': 'mine'}
  assert sorted(os.listdir(out)) == ['a', 'config.json', 'mine.txt']
  assert out.stat().st_ino == inode and os.listdir(out.parent) == ['out']


def test_its_config_comes_last_and_goes_first(unmovable, monkeypatch):
  directory, out = unmovable
  replace, seen = os.replace, []

  def watched(source, target):
    seen.append((os.path.basename(target), (out / 'config.json').exists()))
    replace(source, target)

  monkeypatch.setattr(os, 'replace', watched)
  fill(directory, config='new', a_x='new', index='new')
  assert seen == [('x.json', False), ('index.json', False), ('config.json', False)]


def test_a_folder_that_was_not_finished_is_said_to_be(tmp_path, monkeypatch):
  monkeypatch.setattr(files, '_mounts', lambda: {str(tmp_path)})
  (tmp_path / f'.{tmp_path.name}{files.MARK}x').mkdir()
  with pytest.raises(InputError, match='as writing this model directory was not finished'):
    files.read_json(tmp_path / 'config.json')


# What is not ours.


@pytest.mark.parametrize('exchange', [True, False])
def test_files_of_the_user_stay_and_those_of_an_earlier_output_go(tmp_path, monkeypatch, exchange):
  out = tmp_path / 'out'
  fill(out, config='old', deep_c='old')
  (out / 'notes' / 'empty').mkdir(parents=True)
  (out / 'notes' / 'mine.txt').write_text('mine')
  (out / 'notes' / 'link').symlink_to('mine.txt')
  (out / 'deep' / 'mine.txt').write_text('mine')
  out.chmod(0o700)
  if not exchange:
    monkeypatch.setattr(files, '_exchange', lambda *args: False)
  inode = (out / 'notes' / 'mine.txt').stat().st_ino
  fill(out, ours=lambda path: path.endswith('.json'), config='new')
  assert tree(out) == {
    'config.json': 'new',
    'notes/mine.txt': 'mine',
    'notes/link': 'mine',
    'deep/mine.txt': 'mine',
  }
  assert (out / 'notes' / 'link').is_symlink() and (out / 'notes' / 'empty').is_dir()
  assert (out / 'notes' / 'mine.txt').stat().st_ino == inode
  assert stat.S_IMODE(out.stat().st_mode) == 0o700 and os.listdir(tmp_path) == ['out']


# Processes that were killed.


KILLED = """
import os, pathlib, sys
from dsr_jax import files
if sys.argv[2] == 'between':
  files._exchange = lambda *args: False
  rename = os.rename
  def killed(source, target):
    if source.endswith('new'):
      os.kill(os.getpid(), 9)
    rename(source, target)
  os.rename = killed
with files.whole_directory(sys.argv[1]) as aside:
  pathlib.Path(aside, 'config.json').write_text('half')
  if sys.argv[2] == 'writing':
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize('when', ['writing', 'between'])
def test_what_a_killed_process_left_is_removed_by_the_next_start(tmp_path, when):
  out = tmp_path / 'out'
  fill(out, config='old')
  subprocess.run([sys.executable, '-c', KILLED, out, when], cwd=ROOT, check=False)
  (hidden,) = tmp_path.glob('.out.dsr_jax-*')
  assert (hidden / '.gitignore').read_text() == '*\n'
  files.check_place(out)
  assert tree(tmp_path) == {'out/config.json': 'old'}


def test_the_folder_of_a_process_at_work_is_left_alone(tmp_path):
  out = tmp_path / 'out'
  with files.whole_directory(out) as aside:
    files.check_place(out)
    fill(out, config='of another')
    pathlib.Path(aside, 'config.json').write_text('later')
  assert tree(tmp_path) == {'out/config.json': 'later'}


@pytest.mark.parametrize('deep', ['out', 'a/b/out'])
def test_a_block_that_fails_leaves_no_new_folder(tmp_path, deep):
  with pytest.raises(KeyboardInterrupt):
    with files.whole_directory(tmp_path / deep):
      raise KeyboardInterrupt
  assert os.listdir(tmp_path) == []


def test_a_folder_has_the_rights_that_the_umask_leaves(tmp_path):
  before = os.umask(0o027)
  try:
    with files.whole_directory(tmp_path / 'out'):
      pass
  finally:
    os.umask(before)
  assert stat.S_IMODE((tmp_path / 'out').stat().st_mode) == 0o750


def test_an_old_folder_is_put_back_where_the_new_one_cannot_be_named(tmp_path, monkeypatch):
  out = tmp_path / 'out'
  fill(out, old='')
  rename = os.rename

  def fails_for_new(source, target):
    if os.path.basename(source) == 'new':
      raise OSError(28, 'No space left on device')
    rename(source, target)

  monkeypatch.setattr(files, '_exchange', lambda *args: False)
  monkeypatch.setattr(os, 'rename', fails_for_new)
  with pytest.raises(InputError, match='cannot write .*No space left'):
    fill(out, new='')
  assert os.listdir(out) == ['old.json'] and os.listdir(tmp_path) == ['out']


def test_a_caller_says_in_its_own_words_that_a_folder_cannot_be_written(tmp_path):
  (tmp_path / 'file').write_text('')
  refusal = 'found {directory} not writable ({error}); expected room; choose another place'
  with pytest.raises(InputError, match='found .*/file/out{} not writable .*; expected room'):
    with files.whole_directory(tmp_path / 'file' / 'out{}', refusal):
      pass


def test_an_output_of_other_files_is_refused(tmp_path):
  def ours(name):
    return name == 'ours'

  (tmp_path / 'ours').write_text('')
  files.check_output(str(tmp_path), ours)
  files.check_output(str(tmp_path / 'not' / 'yet'), ours)
  with pytest.raises(InputError, match='/ours is a file; name a new folder'):
    files.check_output(str(tmp_path / 'ours'), ours)
  (tmp_path / 'thesis.tex').write_text('')
  with pytest.raises(InputError, match='already holds thesis.tex; name a new or empty folder'):
    files.check_output(str(tmp_path), ours)


def test_places_that_cannot_be_written_are_refused_before_any_work(tmp_path):
  (tmp_path / 'circle').symlink_to(tmp_path / 'circle')
  (tmp_path / 'file').write_text('')
  for name, said in {
    'circle': '/circle is a circular link; name a new folder',
    'file': '/file is a file; name a new folder',
    'file/out': 'cannot write to .*/file ',
  }.items():
    with pytest.raises(InputError, match=said):
      files.check_output(str(tmp_path / name), lambda name: True)
  with pytest.raises(InputError, match='is the folder .*, but it must name a file'):
    files.check_output_file(tmp_path)
  with pytest.raises(InputError, match='cannot write to'):
    files.check_output_file(tmp_path / 'file' / 'x.md')
  assert sorted(os.listdir(tmp_path)) == ['circle', 'file']


def test_room_is_looked_for_on_the_disk_that_a_link_points_to(tmp_path, monkeypatch):
  (tmp_path / 'link').symlink_to(tmp_path / 'other' / 'out')
  (tmp_path / 'other').mkdir()
  asked = []

  def usage(path):
    asked.append(path)
    return types.SimpleNamespace(free=1 << 20)

  monkeypatch.setattr(shutil, 'disk_usage', usage)
  with pytest.raises(InputError, match='/other has 1 MiB free, but 4 MiB are needed'):
    files.check_place(tmp_path / 'link')
  assert asked == [str(tmp_path / 'other')]
