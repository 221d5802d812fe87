"""Files and folders are there whole or not at all."""

import json
import os
import pathlib
import stat

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
  with pytest.raises(InputError, match='found no config.json in .*; expected a model directory'):
    files.read_json(path)


@pytest.mark.parametrize('content, found', [('{', 'unreadable'), ('[1]', 'found a list')])
def test_what_is_no_json_object_is_a_sentence(tmp_path, content, found):
  path = tmp_path / 'config.json'
  path.write_text(content)
  with pytest.raises(InputError, match=found):
    files.read_json(path, default={})


@pytest.mark.parametrize('before', [None, 'folder', 'file', 'link'])
def test_a_finished_folder_takes_the_place_of_what_was_there(tmp_path, before):
  out, elsewhere = tmp_path / 'out', tmp_path / 'elsewhere'
  elsewhere.mkdir()
  (elsewhere / 'kept').write_text('')
  if before == 'folder':
    out.mkdir()
    (out / 'old').write_text('')
  elif before == 'file':
    out.write_text('')
  elif before == 'link':
    out.symlink_to(elsewhere)
  with files.whole_directory(out) as aside:
    (pathlib.Path(aside) / 'new').write_text('')
  assert os.listdir(out) == ['new'] and not out.is_symlink()
  assert sorted(os.listdir(tmp_path)) == ['elsewhere', 'out']
  assert os.listdir(elsewhere) == ['kept']


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
  out.mkdir()
  (out / 'old').write_text('')
  rename = os.rename

  def fails_for_new(source, target):
    if os.path.basename(source) == 'new':
      raise OSError(28, 'No space left on device')
    rename(source, target)

  monkeypatch.setattr(os, 'rename', fails_for_new)
  with pytest.raises(InputError, match='cannot write .*No space left'):
    with files.whole_directory(out) as aside:
      (pathlib.Path(aside) / 'new').write_text('')
  assert os.listdir(out) == ['old'] and os.listdir(tmp_path) == ['out']


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
  with pytest.raises(InputError, match='found the file'):
    files.check_output(str(tmp_path / 'ours'), ours)
  (tmp_path / 'thesis.tex').write_text('')
  with pytest.raises(InputError, match='found thesis.tex in .*; expected a new or empty folder'):
    files.check_output(str(tmp_path), ours)
