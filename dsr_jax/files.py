"""Writes files and folders atomically, and reads and writes JSON.

A file is written as NAME.new and renamed. A folder is filled under a hidden name and replaces the
old one in one step: if the process is killed, the old content or the new one is there, never half
of it. The next start removes the hidden folder that a killed process leaves.

Links are followed: a file or a folder is written to where its link points.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import pathlib
import re
import shutil
import stat
import tempfile

from dsr_jax.errors import InputError, first_line

# Part of the name of a folder that is being filled: .NAME.dsr_jax-XXXX beside NAME, or in it.
MARK = '.dsr_jax-'
# Enough for a page, a table or some small images; callers that need more pass their own number.
SMALL_BYTES = 4 << 20
# Written last, after all other JSON, into a folder that cannot be exchanged as a whole.
_LAST = 'config.json'
_AT_CWD, _EXCHANGE = -100, 2  # arguments of renameat2, from linux/fcntl.h and linux/fs.h
_CANNOT_RENAME = (errno.EBUSY, errno.EXDEV)  # a mount point, another file system
_CANNOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)

# Reading.

_LFS = b'version https://git-lfs.github.com/spec/'


def read_json(path, default=None):
  """The JSON object in a file from another source, such as those of a model directory.

  Returns `default`, if given, for a missing file; every other problem is an InputError.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    if default is not None:
      return default
    if _leftovers(os.path.realpath(path.parent)):
      raise InputError(
        f'{path.parent} has no {path.name}, as writing this model directory was not finished; '
        'write it again (dsr_jax.convert: with --overwrite)'
      )
    raise InputError(
      f'{path.parent} has no {path.name}, so it is not a model directory; check the path'
    )
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except (ValueError, OSError, RecursionError) as e:
    check_no_pointer(path)
    raise InputError(f'{path} cannot be read as JSON ({e}); download the file again') from e
  if not isinstance(content, dict):
    raise InputError(
      f'{path} holds a {type(content).__name__}, not a JSON object; download the file again'
    )
  return content


def check_no_pointer(path):
  """InputError if the file is a Git LFS pointer to another one."""
  try:
    with open(path, 'rb') as f:
      beginning = f.read(len(_LFS))
  except OSError:
    return
  if beginning == _LFS:
    raise InputError(
      f'{path} is a Git LFS pointer, not the file that it points to; run git lfs pull there, or '
      'download the model with: hf download OWNER/NAME --local-dir DIR'
    )


def read_json_or_none(path):
  """The JSON value in a file that this program wrote, or None if there is no file."""
  try:
    with open(path, encoding='utf-8') as f:
      return json.load(f)
  except FileNotFoundError:
    return None
  except (ValueError, RecursionError) as e:
    raise InputError(
      f'cannot read {path} ({first_line(e)}), which this program wrote; restore it from a copy, or '
      'remove it'
    ) from e


# One file.


def check_output_file(path, flag: str = '--output'):
  """InputError unless a file can be written at `path`; called before any work."""
  target = os.path.realpath(path)
  if os.path.isdir(target):
    raise InputError(f'{flag} is the folder {path}, but it must name a file; add a file name')
  if os.path.lexists(target) and not os.path.isfile(target):
    return  # a device or a pipe
  _check_writable(_existing(os.path.dirname(target)), flag, 'a file')
  check_room(os.path.dirname(target), SMALL_BYTES)


def write_bytes(path, data: bytes):
  """Writes a file atomically, and makes the folders above it; returns its path.

  A device or a pipe, such as /dev/stdout, is written to directly.
  """
  target = os.path.realpath(path)
  if os.path.lexists(target) and not os.path.isfile(target):
    # Non-blocking, so as not to wait for a reader at the other end of a pipe.
    with open(os.open(path, os.O_WRONLY | os.O_NONBLOCK), 'wb') as f:
      os.set_blocking(f.fileno(), True)
      f.write(data)
    return path
  os.makedirs(os.path.dirname(target), exist_ok=True)
  aside = f'{target}.new'
  try:
    with open(aside, 'wb') as f:
      f.write(data)
    os.replace(aside, target)
  except BaseException:
    with contextlib.suppress(OSError):
      os.unlink(aside)
    raise
  return path


def write_text(path, text: str):
  """`write_bytes` of a text, in UTF-8."""
  return write_bytes(path, text.encode('utf-8'))


def write_json(path, tree, **style):
  r"""`write_bytes` of a JSON value and a newline. style: arguments of `json.dumps`.

  Bytes of a path that are not UTF-8 are written as JSON's \udcXX.
  """
  text = json.dumps(tree, **style) + '\n'
  return write_bytes(path, text.encode('utf-8', 'backslashreplace'))


# Checks before any work whether a folder can be written.


def check_output(directory: str, ours, flag: str = '--output', need: int = SMALL_BYTES):
  """InputError unless `directory` can become a command's output.

  ours: (file name) -> whether this command writes such files; a folder with no others is replaced.
  flag: the flag that names the folder. need: bytes.
  """
  check_place(directory, flag, need)
  others = [
    name for _, folders, names in os.walk(directory) for name in folders + names if not ours(name)
  ]
  if others:
    raise InputError(
      f'{directory} already holds {others[0]}; name a new or empty folder for {flag}, or an '
      'earlier output of this command'
    )


def check_place(directory, flag: str = '--output', need: int = SMALL_BYTES):
  """InputError unless a folder can be written at `directory`, whatever is in it now. Removes what a
  killed process left there.
  """
  target = os.path.realpath(directory)
  if os.path.lexists(target) and not os.path.isdir(target):
    kind = 'a circular link' if os.path.islink(target) else 'a file'
    raise InputError(f'{directory} is {kind}; name a new folder for {flag}')
  place = _place(target)
  remove_leftovers(target)
  _check_writable(_existing(place), flag, 'a folder')
  check_room(place, need)


def check_room(directory, need: int):
  """InputError unless the disk that holds `directory`, or will, has room for `need` bytes."""
  existing = _existing(os.path.realpath(directory))
  free = shutil.disk_usage(existing).free
  if free < need:
    raise InputError(
      f'{existing} has {free >> 20:,} MiB free, but {-(-need >> 20):,} MiB are needed; free some '
      'space, or choose another place'
    )


def _check_writable(existing, flag, what):
  """Tries to write, as permissions alone do not tell."""
  try:
    if not os.path.isdir(existing):
      raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    os.rmdir(tempfile.mkdtemp(prefix=MARK, dir=existing))
  except OSError as e:
    raise InputError(
      f'cannot write to {existing} ({e.strerror}); name another place for {what} of {flag}'
    ) from e


def _existing(path):
  """The path, or its nearest parent that exists."""
  while not os.path.lexists(path):
    path = os.path.dirname(path)
  return path


# A whole folder.


@contextlib.contextmanager
def whole_directory(directory, refusal: str = '', ours=None):
  """Yields a folder to fill. After the block, it replaces `directory`; if the block fails, it is
  removed.

  A folder that cannot be renamed (a mount point, the current folder, or one whose parent is not
  writable) is instead replaced file by file, with renames. There the JSON files are removed first
  and written last, config.json at the very end: without it, the folder does not count as complete.

  Args:
    directory: the output folder.
    refusal: the message of the InputError if it cannot be written, with {directory} and {error} to
      be filled in; by default one that names the flag --output.
    ours: (path inside the folder) -> whether an earlier output wrote this file; other files stay.
      By default everything in the folder is replaced.
  """
  target = os.path.realpath(directory)
  place = _place(target)
  try:
    made = make_folders(place)
    remove_leftovers(target)
    hidden, held = _make_hidden(place, target)
  except OSError as e:
    raise InputError(
      refusal.format(directory=directory, error=e)
      or f'cannot write to {place} ({e.strerror}); name a writable folder for --output'
    ) from e
  try:
    aside = os.path.join(hidden, 'new')
    os.mkdir(aside)  # mkdtemp's own folder is private, whatever the umask is
    yield aside
    _put_in_place(aside, target, hidden, ours)
    made = []
  except OSError as e:
    raise InputError(
      refusal.format(directory=directory, error=e)
      or f'cannot write {directory} ({e.strerror or e}); free some space and check its '
      'permissions, or name another --output'
    ) from e
  finally:
    shutil.rmtree(hidden, ignore_errors=True)
    os.close(held)
    for folder in made:
      with contextlib.suppress(OSError):
        os.rmdir(folder)


def remove_leftovers(target):
  """Removes what killed processes left of this output, and restores an old output that one of them
  had moved away but not replaced.
  """
  for hidden in _leftovers(os.path.realpath(target)):
    with contextlib.suppress(OSError), _held(hidden):
      old = os.path.join(hidden, 'old')
      if os.path.lexists(old) and not os.path.lexists(target):
        os.rename(old, target)
      shutil.rmtree(hidden, ignore_errors=True)


def _leftovers(target) -> list[str]:
  """Hidden folders of an output, from processes that are running or were killed."""
  start = _hidden_name(target)
  found = []
  for place in {target, os.path.dirname(target)}:
    with contextlib.suppress(OSError):
      found += [os.path.join(place, name) for name in os.listdir(place) if name.startswith(start)]
  return found


def _hidden_name(target) -> str:
  return f'.{os.path.basename(target)}{MARK}'


def _make_hidden(place, target) -> tuple[str, int]:
  """A new hidden folder, and the open file through which this process holds its lock."""
  while True:
    hidden = tempfile.mkdtemp(prefix=_hidden_name(target), dir=place)
    with contextlib.suppress(FileNotFoundError):  # another process took it for abandoned
      held = os.open(hidden, os.O_RDONLY)
      with contextlib.suppress(OSError):  # a file system without locks: none is taken for abandoned
        fcntl.flock(held, fcntl.LOCK_EX)
      if os.path.isdir(hidden):
        break
      os.close(held)
  with open(os.path.join(hidden, '.gitignore'), 'w', encoding='utf-8') as f:
    f.write('*\n')
  return hidden, held


@contextlib.contextmanager
def _held(hidden):
  """Locks the folder; OSError if another process holds it. A lock ends with its process."""
  file = os.open(hidden, os.O_RDONLY)
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield
  finally:
    os.close(file)


def make_folders(folder) -> list[str]:
  """Makes a folder and its parents; returns the new ones, innermost first."""
  new, above = [], folder
  while not os.path.lexists(above):
    new.append(above)
    above = os.path.dirname(above)
  os.makedirs(folder, exist_ok=True)
  return new


# Where the folder is filled, and how it replaces the old one.


def _place(target) -> str:
  """Where to make the hidden folder of an output: beside it, or in it if it cannot be renamed."""
  above = os.path.dirname(target)
  if not os.path.isdir(target):
    return above
  return target if _stays(target) or not os.access(above, os.W_OK | os.X_OK) else above


def _stays(target) -> bool:
  """Whether a folder cannot be renamed, or should not be, as it contains the current folder."""
  if os.path.commonpath([target, os.getcwd()]) == target:
    return True
  return os.path.ismount(target) or target in _mounts()


def _mounts() -> set[str]:
  """Mount points of this process, including bind mounts."""
  try:
    with open('/proc/self/mountinfo', encoding='utf-8', errors='surrogateescape') as f:
      names = [line.split(' ')[4] for line in f]
  except OSError:  # not Linux
    return set()
  return {re.sub(r'\\(\d{3})', lambda match: chr(int(match[1], 8)), name) for name in names}


def _put_in_place(aside, target, hidden, ours):
  """Gives the filled folder `aside` the name `target`."""
  if not os.path.lexists(target):
    os.rename(aside, target)
    return
  if os.path.dirname(hidden) == target:
    _move_files(aside, target, ours)
    return
  shutil.copymode(target, aside)
  try:
    if ours is not None:
      _link_others(target, aside, ours)
    if not _exchange(aside, target):
      _replace(aside, target, os.path.join(hidden, 'old'))
  except OSError as e:
    if e.errno not in _CANNOT_RENAME:
      raise
    _move_files(aside, target, ours)


def _exchange(one, other) -> bool:
  """Exchanges the names of two folders in one step; False if the system cannot."""
  rename = getattr(ctypes.CDLL(None, use_errno=True), 'renameat2', None)
  if rename is None:
    return False
  if rename(_AT_CWD, os.fsencode(one), _AT_CWD, os.fsencode(other), _EXCHANGE) == 0:
    return True
  number = ctypes.get_errno()
  if number in _CANNOT_EXCHANGE:
    return False
  raise OSError(number, os.strerror(number), other)


def _replace(aside, target, old):
  """Replaces a folder in two steps. If the process is killed between them, the next start restores
  `old`; if the second step fails, this function does.
  """
  os.rename(target, old)
  try:
    os.rename(aside, target)
  except OSError:
    os.rename(old, target)
    raise


def _link_others(target, aside, ours):
  """Links the files in `target` that are not an output's into `aside`, where the name is free."""
  for path in _files(target):
    other = os.path.join(aside, path)
    if ours(path) or os.path.lexists(other):
      continue
    _make_same_folders(os.path.dirname(path), target, aside)
    source = os.path.join(target, path)
    if _is_folder(source):
      _make_same_folders(path, target, aside)
      continue
    try:
      os.link(source, other, follow_symlinks=False)
    except OSError as e:
      if e.errno == errno.EXDEV:  # a mount inside the folder
        raise
      shutil.copy2(source, other, follow_symlinks=False)  # a file system without hard links


def _make_same_folders(path, target, aside):
  """Makes the folder `path` in `aside`, with the mode and times that it has in `target`."""
  if path and not os.path.isdir(os.path.join(aside, path)):
    _make_same_folders(os.path.dirname(path), target, aside)
    os.mkdir(os.path.join(aside, path))
    shutil.copystat(os.path.join(target, path), os.path.join(aside, path))


def _move_files(aside, target, ours):
  """Moves each file of a folder into another, and removes an earlier output there."""

  def last(path):
    return os.path.dirname(path) == '' and path.endswith('.json'), path == _LAST, path

  new = [path for path in _files(aside) if not _is_folder(os.path.join(aside, path))]
  old = [path for path in _files(target) if ours is None or ours(path)]
  old = [path for path in old if not _is_folder(os.path.join(target, path))]
  for path in sorted(old, key=last, reverse=True):
    if last(path)[0] or path not in new:
      os.unlink(os.path.join(target, path))
      _remove_empty(target, os.path.dirname(path))
  for path in sorted(new, key=last):
    _move_file(os.path.join(aside, path), os.path.join(target, path))


def _remove_empty(target, path):
  """Removes the folder `path` in `target`, and its parents, if they are empty."""
  with contextlib.suppress(OSError):
    while path:
      os.rmdir(os.path.join(target, path))
      path = os.path.dirname(path)


def _move_file(source, target):
  os.makedirs(os.path.dirname(target), exist_ok=True)
  try:
    os.replace(source, target)
  except OSError as e:
    if e.errno != errno.EXDEV:
      raise
    shutil.copy2(source, f'{target}.new')
    os.replace(f'{target}.new', target)


def _files(folder) -> list[str]:
  """Paths inside a folder: files, links, and empty folders, without our hidden ones."""
  found = []
  for at, folders, names in os.walk(folder):
    folders[:] = [name for name in folders if MARK not in name]
    links = [name for name in folders if os.path.islink(os.path.join(at, name))]
    empty = [] if folders or names or at == folder else ['']
    found += [os.path.relpath(os.path.join(at, name), folder) for name in names + links + empty]
  return found


def _is_folder(path) -> bool:
  return stat.S_ISDIR(os.lstat(path).st_mode)
