"""Files and folders that appear whole or not at all, and JSON in and out.

A file is written aside as NAME.new and renamed, a folder is filled under a hidden name and renamed:
a process that is killed leaves what was there before, or what came after, never half of it.
"""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile

from dsr_jax.errors import InputError

# Reading.

_LFS = b'version https://git-lfs.github.com/spec/'


def read_json(path, default=None):
  """The JSON object in a file that came from elsewhere, as those of a model directory.

  A missing file gives `default` if there is one; everything else is an InputError.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    if default is not None:
      return default
    raise InputError(
      f'found no {path.name} in {path.parent}; expected a model directory; check the path'
    )
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except (ValueError, OSError, RecursionError) as e:
    check_no_pointer(path)
    raise InputError(f'found {path} unreadable ({e}); expected JSON; fetch the file again') from e
  if not isinstance(content, dict):
    raise InputError(
      f'found a {type(content).__name__} in {path}; expected a JSON object; fetch the file again'
    )
  return content


def check_no_pointer(path):
  """InputError where a file of Git LFS stands for another one."""
  try:
    with open(path, 'rb') as f:
      beginning = f.read(len(_LFS))
  except OSError:
    return
  if beginning == _LFS:
    raise InputError(
      f'found a Git LFS pointer in the place of {path}; expected the file that it points to; run '
      'git lfs pull there, or fetch the model by: hf download OWNER/NAME --local-dir DIR'
    )


def read_json_or_none(path):
  """The JSON value in a file that this program wrote itself, or None where there is no file."""
  try:
    with open(path, encoding='utf-8') as f:
      return json.load(f)
  except FileNotFoundError:
    return None


# One file.


def write_bytes(path, data: bytes):
  """Writes a file, and the folders above it, whole or not at all; returns its path."""
  os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
  aside = f'{os.fspath(path)}.new'
  with open(aside, 'wb') as f:
    f.write(data)
  os.replace(aside, path)
  return path


def write_text(path, text: str):
  """`write_bytes` of a text, in UTF-8."""
  return write_bytes(path, text.encode('utf-8'))


def write_json(path, tree, **style):
  r"""`write_bytes` of a JSON value and a line break. style: arguments of `json.dumps`.

  Bytes of a path that are not UTF-8 are written as JSON's \udcXX.
  """
  text = json.dumps(tree, **style) + '\n'
  return write_bytes(path, text.encode('utf-8', 'backslashreplace'))


# A whole folder.


def check_output(directory: str, ours):
  """InputError unless `directory` can become a command's output; called before any work.

  ours: says of a file name whether this command writes such files; a folder of nothing else is
  replaced.
  """
  if os.path.lexists(directory) and not os.path.isdir(directory):
    raise InputError(
      f'found the file {directory}; expected a new folder for --output; name another'
    )
  if os.path.isdir(directory):
    others = [
      name for _, folders, names in os.walk(directory) for name in folders + names if not ours(name)
    ]
    if others:
      raise InputError(
        f'found {others[0]} in {directory}; expected a new or empty folder for --output, or an '
        'earlier output of this command; name another'
      )
  above = _parent(directory)
  while not os.path.exists(above):
    above = os.path.dirname(above)
  if not os.path.isdir(above) or not os.access(above, os.W_OK | os.X_OK):
    raise InputError(
      f'cannot write to {above}; expected a writable folder for --output; name another'
    )


@contextlib.contextmanager
def whole_directory(directory, refusal: str = ''):
  """A folder to be filled, which takes the name `directory`, and the place of what is there, once
  the block is done; it vanishes if the block fails.

  refusal: the InputError's sentence where it cannot be written, with {directory} and {error} to be
    filled in; by default one that names the flag --output.
  """
  parent = _parent(directory)
  name = os.path.basename(os.path.abspath(directory))
  try:
    os.makedirs(parent, exist_ok=True)
    # The new folder is made inside of this one: mkdtemp's own is private whatever the umask says.
    beside = tempfile.mkdtemp(prefix=f'.{name}-', dir=parent)
  except OSError as e:
    raise InputError(
      refusal.format(directory=directory, error=e)
      or f'cannot write to {parent} ({e.strerror}); expected a writable folder for --output; '
      'name another'
    ) from e
  try:
    aside = os.path.join(beside, 'new')
    os.mkdir(aside)
    yield aside
    _put_in_place(aside, directory, parent)
  except OSError as e:
    raise InputError(
      refusal.format(directory=directory, error=e)
      or f'cannot write {directory} ({e.strerror}); expected room and leave to write; '
      'free some or name another --output'
    ) from e
  finally:
    shutil.rmtree(beside, ignore_errors=True)


def _put_in_place(aside, directory, parent):
  """Renames `aside` to `directory`; what was there goes away only after the new one stands."""
  if not os.path.lexists(directory):
    os.rename(aside, directory)
    return
  # In a folder of its own, not in the one that is removed in any case: an old one that can neither
  # be replaced nor put back is still there.
  keep = tempfile.mkdtemp(prefix='.old-', dir=parent)
  old = os.path.join(keep, 'output')
  try:
    os.rename(directory, old)
    os.rename(aside, directory)
  except OSError:
    if os.path.lexists(old):
      os.rename(old, directory)
    os.rmdir(keep)
    raise
  shutil.rmtree(keep, ignore_errors=True)


def _parent(directory):
  return os.path.dirname(os.path.abspath(directory))
