"""Files and folders that appear whole or not at all, and JSON in and out.

A file is written aside as NAME.new and renamed. A folder is filled under a hidden name and takes
the place of what was there in one step: a process that is killed leaves what was there before, or
what came after, never half of it. What it leaves besides, under the hidden name, the next start
removes.

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

# In the name of a folder that is being filled: .NAME.dsr_jax-XXXX beside NAME, or in it.
MARK = '.dsr_jax-'
# What a page, a table or some small pictures may need; more is asked for by whoever knows.
SMALL_BYTES = 4 << 20
# Of a folder that cannot be exchanged as a whole, this file comes last, after all other JSON.
_LAST = 'config.json'
_AT_CWD, _EXCHANGE = -100, 2  # of renameat2, as linux/fs.h has them
_CANNOT_RENAME = (errno.EBUSY, errno.EXDEV)  # a mount point, another file system
_CANNOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)

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
    if _leftovers(os.path.realpath(path.parent)):
      raise InputError(
        f'found no {path.name} in {path.parent}, whose writing was not finished; expected a model '
        'directory; write it again (dsr_jax.convert: with --overwrite)'
      )
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
  except (ValueError, RecursionError) as e:
    raise InputError(
      f'cannot read {path} ({first_line(e)}); expected what this program wrote there; bring it '
      'back from a copy, or remove it'
    ) from e


# One file.


def check_output_file(path, flag: str = '--output'):
  """InputError unless a file can be written at `path`; called before any work."""
  target = os.path.realpath(path)
  if os.path.isdir(target):
    raise InputError(
      f'found the folder {path}; expected the name of a file for {flag}; add a file name'
    )
  if os.path.lexists(target) and not os.path.isfile(target):
    return  # a device or a pipe
  _check_writable(_existing(os.path.dirname(target)), flag, 'a file')
  check_room(os.path.dirname(target), SMALL_BYTES)


def write_bytes(path, data: bytes):
  """Writes a file, and the folders above it, whole or not at all; returns its path.

  A device or a pipe, as /dev/stdout, is written to as it is.
  """
  target = os.path.realpath(path)
  if os.path.lexists(target) and not os.path.isfile(target):
    # Not to wait for somebody who opens a pipe at its other end.
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
  r"""`write_bytes` of a JSON value and a line break. style: arguments of `json.dumps`.

  Bytes of a path that are not UTF-8 are written as JSON's \udcXX.
  """
  text = json.dumps(tree, **style) + '\n'
  return write_bytes(path, text.encode('utf-8', 'backslashreplace'))


# May a folder be written? Asked before any work.


def check_output(directory: str, ours, flag: str = '--output', need: int = SMALL_BYTES):
  """InputError unless `directory` can become a command's output.

  ours: says of a file name whether this command writes such files; a folder of nothing else is
    replaced.
  flag: that named it. need: bytes.
  """
  check_place(directory, flag, need)
  others = [
    name for _, folders, names in os.walk(directory) for name in folders + names if not ours(name)
  ]
  if others:
    raise InputError(
      f'found {others[0]} in {directory}; expected a new or empty folder for {flag}, or an '
      'earlier output of this command; name another'
    )


def check_place(directory, flag: str = '--output', need: int = SMALL_BYTES):
  """InputError unless a folder can be written at `directory`, whatever is in it now; what a killed
  start left there is removed.
  """
  target = os.path.realpath(directory)
  if os.path.lexists(target) and not os.path.isdir(target):
    kind = 'a circle of links' if os.path.islink(target) else 'the file'
    raise InputError(f'found {kind} {directory}; expected a new folder for {flag}; name another')
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
      f'found {free >> 20:,} MiB free at {existing}; expected {-(-need >> 20):,} MiB; free some, '
      'or choose another place'
    )


def _check_writable(existing, flag, what):
  """By trying: leave to write is more than permissions say."""
  try:
    if not os.path.isdir(existing):
      raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    os.rmdir(tempfile.mkdtemp(prefix=MARK, dir=existing))
  except OSError as e:
    raise InputError(
      f'cannot write to {existing} ({e.strerror}); expected a place for {what} of {flag}; '
      'name another'
    ) from e


def _existing(path):
  """The path, or the nearest above it that is there."""
  while not os.path.lexists(path):
    path = os.path.dirname(path)
  return path


# A whole folder.


@contextlib.contextmanager
def whole_directory(directory, refusal: str = '', ours=None):
  """A folder to be filled, which takes the name `directory`, and the place of what is there, once
  the block is done; it vanishes if the block fails.

  A folder that cannot be renamed (a mount point, the current folder, one in a folder that is not to
  be written) is filled file by file instead, each renamed. There the JSON files come last,
  config.json the very last, and go first: without it the folder is not taken for a whole one.

  Args:
    directory: of the output.
    refusal: the InputError's sentence where it cannot be written, with {directory} and {error} to
      be filled in; by default one that names the flag --output.
    ours: of a path inside of the folder, whether such a file is an earlier output's; others stay.
      By default all that is there is replaced.
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
      or f'cannot write to {place} ({e.strerror}); expected a writable folder for --output; '
      'name another'
    ) from e
  try:
    aside = os.path.join(hidden, 'new')
    os.mkdir(aside)  # mkdtemp's own is private, whatever the umask says
    yield aside
    _put_in_place(aside, target, hidden, ours)
    made = []
  except OSError as e:
    raise InputError(
      refusal.format(directory=directory, error=e)
      or f'cannot write {directory} ({e.strerror or e}); expected room and leave to write; '
      'free some or name another --output'
    ) from e
  finally:
    shutil.rmtree(hidden, ignore_errors=True)
    os.close(held)
    for folder in made:
      with contextlib.suppress(OSError):
        os.rmdir(folder)


def remove_leftovers(target):
  """Removes what killed processes left of this output, and puts an old output back that one had
  taken away and not replaced.
  """
  for hidden in _leftovers(os.path.realpath(target)):
    with contextlib.suppress(OSError), _held(hidden):
      old = os.path.join(hidden, 'old')
      if os.path.lexists(old) and not os.path.lexists(target):
        os.rename(old, target)
      shutil.rmtree(hidden, ignore_errors=True)


def _leftovers(target) -> list[str]:
  """Hidden folders of an output, of processes that are at work or were killed."""
  start = _hidden_name(target)
  found = []
  for place in {target, os.path.dirname(target)}:
    with contextlib.suppress(OSError):
      found += [os.path.join(place, name) for name in os.listdir(place) if name.startswith(start)]
  return found


def _hidden_name(target) -> str:
  return f'.{os.path.basename(target)}{MARK}'


def _make_hidden(place, target) -> tuple[str, int]:
  """A new hidden folder, and the open file by which this process holds it."""
  while True:
    hidden = tempfile.mkdtemp(prefix=_hidden_name(target), dir=place)
    with contextlib.suppress(FileNotFoundError):  # another start took it for a dead process's
      held = os.open(hidden, os.O_RDONLY)
      with contextlib.suppress(OSError):  # a file system without locks: nobody takes it for dead
        fcntl.flock(held, fcntl.LOCK_EX)
      if os.path.isdir(hidden):
        break
      os.close(held)
  with open(os.path.join(hidden, '.gitignore'), 'w', encoding='utf-8') as f:
    f.write('*\n')
  return hidden, held


@contextlib.contextmanager
def _held(hidden):
  """OSError where another process holds the folder; it lets go of it when it ends, however."""
  file = os.open(hidden, os.O_RDONLY)
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield
  finally:
    os.close(file)


def make_folders(folder) -> list[str]:
  """Makes a folder and those above it; returns the new ones, the innermost first."""
  new, above = [], folder
  while not os.path.lexists(above):
    new.append(above)
    above = os.path.dirname(above)
  os.makedirs(folder, exist_ok=True)
  return new


# Where it is filled, and how it gets into its place.


def _place(target) -> str:
  """Where the hidden folder of an output is made: beside it, or in it if it cannot be renamed."""
  above = os.path.dirname(target)
  if not os.path.isdir(target):
    return above
  return target if _stays(target) or not os.access(above, os.W_OK | os.X_OK) else above


def _stays(target) -> bool:
  """Whether a folder cannot be renamed, or should not, since this process's shell stands in it."""
  if os.path.commonpath([target, os.getcwd()]) == target:
    return True
  return os.path.ismount(target) or target in _mounts()


def _mounts() -> set[str]:
  """Mount points of this process, also those that show a part of a file system again."""
  try:
    with open('/proc/self/mountinfo', encoding='utf-8', errors='surrogateescape') as f:
      names = [line.split(' ')[4] for line in f]
  except OSError:  # no Linux
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
  """Lets two folders change their names in one step; False where the system has no such step."""
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
  """In two steps. A process that is killed between them leaves the old one as `old`, from where
  the next start, or the error here, brings it back.
  """
  os.rename(target, old)
  try:
    os.rename(aside, target)
  except OSError:
    os.rename(old, target)
    raise


def _link_others(target, aside, ours):
  """Gives what is in `target` and no output's a second name in `aside`, where that is free."""
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
      if e.errno == errno.EXDEV:  # a mount inside of the folder
        raise
      shutil.copy2(source, other, follow_symlinks=False)  # a file system without second names


def _make_same_folders(path, target, aside):
  """Makes the folder `path` in `aside` as it is in `target`."""
  if path and not os.path.isdir(os.path.join(aside, path)):
    _make_same_folders(os.path.dirname(path), target, aside)
    os.mkdir(os.path.join(aside, path))
    shutil.copystat(os.path.join(target, path), os.path.join(aside, path))


def _move_files(aside, target, ours):
  """Moves each file of a folder to its place in another, in which no earlier output stays."""

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
  """Removes the folder `path` in `target`, and those above it, where nothing is left in them."""
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
  """Paths inside of a folder: files, links, and empty folders; hidden ones of ours left out."""
  found = []
  for at, folders, names in os.walk(folder):
    folders[:] = [name for name in folders if MARK not in name]
    links = [name for name in folders if os.path.islink(os.path.join(at, name))]
    empty = [] if folders or names or at == folder else ['']
    found += [os.path.relpath(os.path.join(at, name), folder) for name in names + links + empty]
  return found


def _is_folder(path) -> bool:
  return stat.S_ISDIR(os.lstat(path).st_mode)
