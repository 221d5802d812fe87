"""A folder of anyone's own pictures: what counts as one, and that all of them are looked at before
the first step.

Contents decide, not names. What is passed over is counted and said; what is a picture and does not
decode is an error that names all of them, or left out and counted. A picture's identity is the hash
of its bytes. Looking at 20,000 of them takes a minute or two, so what was found is kept in the
user's cache, and a file of the same size and times is not looked at again.
"""

import collections
from collections.abc import Iterable, Sequence
import concurrent.futures
import contextlib
import hashlib
import io
import os
import re
import time
from typing import NamedTuple

import PIL

from dsr_jax import cli, files, images, inputs
from dsr_jax.data import order
from dsr_jax.errors import InputError

# A file so called is a picture, or a damaged one.
SUFFIXES = (
  *('.avif', '.bmp', '.gif', '.jfif', '.jp2', '.jpe', '.jpeg', '.jpg', '.pbm', '.pgm', '.png'),
  *('.pnm', '.ppm', '.qoi', '.tif', '.tiff', '.webp'),
)
DECODED = 20_000  # pictures of a folder that are all decoded before the first step
SAMPLED = 1_000  # of a larger one, so many
SHOWN = 5  # names in a sentence
# A file that changed so shortly before it was looked at may change again with the same times.
RACY_NS = 2_000_000_000
_REASONS = [
  re.compile(pattern, re.DOTALL)
  for pattern in (
    r'(?:unreadable as a picture|cut short or damaged) \((.*)\)$',
    r'^found the (empty file)',
    r' to have (\d+ (?:x|bytes).*)$',
    r'^cannot read .* \((.*)\)$',
  )
]
CACHE_VARIABLE = 'DSR_JAX_CACHE'


# What is there.


class Found(NamedTuple):
  """Paths relative to a folder with '/', sorted. passed_over: why -> paths."""

  names: list[str]
  passed_over: dict[str, list[str]]


def find(directory: str) -> Found:
  """The pictures in `directory` and below. Each real folder is read once, also one behind a link;
  hidden files and folders are passed over.

  Raises InputError where there is no picture or a folder cannot be read.
  """
  if not os.path.isdir(directory):
    raise InputError(
      f'found no folder {inputs.shown(directory)}; expected a folder of images; name another'
    )
  names, passed_over = [], collections.defaultdict(list)
  for name, why in _walk(directory):
    if not why and not _is_picture(os.path.join(directory, name)):
      why = 'no pictures'
    if why:
      passed_over[why].append(name)
    else:
      names.append(name)
  found = Found(sorted(names), {why: sorted(passed_over[why]) for why in sorted(passed_over)})
  if not names:
    there = said_of(found.passed_over)
    raise InputError(
      f'found no image in {inputs.shown(directory)}{there and f" ({there})"}; expected PNG, JPEG, '
      'WebP, TIFF, AVIF, GIF or BMP files; name another folder'
    )
  return found


def said_of(passed_over: dict[str, Sequence[str]]) -> str:
  """'3 no pictures (a.txt, b.csv, c.md); 1 links to nothing (x.jpg)'."""
  return '; '.join(f'{len(names)} {why} ({shown(names)})' for why, names in passed_over.items())


def shown(names: Iterable[str]) -> str:
  """A few names, and that there are more."""
  names = list(names)
  more = f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
  return ', '.join(inputs.shown(name) for name in names[:SHOWN]) + more


def _walk(directory):
  """(relative path, why it is passed over or '') of all that is there, a folder as a whole."""
  read = set()
  folders, links = collections.deque(['']), []
  while folders or links:
    if folders:
      folder = folders.popleft()
    else:
      # A folder's own place goes before the links to it, so that these come last.
      links.sort()
      folder = links.pop(0)
    real = os.path.realpath(os.path.join(directory, folder))
    if real in read:
      yield folder, 'links to folders that are read'
      continue
    read.add(real)
    for entry in _entries(os.path.join(directory, folder)):
      name = f'{folder}/{entry.name}' if folder else entry.name
      if entry.name.startswith('.'):
        yield name, 'hidden'
      elif entry.is_dir(follow_symlinks=False):
        folders.append(name)
      elif entry.is_symlink() and entry.is_dir():
        links.append(name)
      elif not os.path.exists(entry.path):
        yield name, 'links to nothing'
      elif not entry.is_file():
        yield name, 'no plain files'
      else:
        yield name, ''


def _entries(folder):
  try:
    with os.scandir(folder) as entries:
      return sorted(entries, key=lambda entry: entry.name)
  except OSError as e:
    raise InputError(
      f'cannot read the folder {inputs.shown(folder)} ({e.strerror}); expected leave to read all '
      'of the pictures; change its permissions or take it away'
    ) from e


def _is_picture(path):
  if path.lower().endswith(SUFFIXES):
    return True
  try:
    with inputs.open_plain(path, 'a picture file') as file:
      return images.is_known(file)
  except (InputError, OSError):
    return False


# What it holds.


class Record(NamedTuple):
  """sha256: of the file's bytes. fault: why it does not decode, '' if it does, None if untried."""

  sha256: str
  fault: str | None


class Folder:
  """The pictures of a folder that are to be used, by index, as the bytes of their files.

  Args:
    directory: the folder.
    bad_images: 'error' or 'skip', of what does not decode.
    seed: which pictures of a large folder are decoded.

  Raises InputError where there is none, or some do not decode.
  """

  def __init__(self, directory: str, bad_images: str = 'error', seed: int = 0):
    self._directory, found = directory, find(directory)
    if found.passed_over:
      cli.log(f'passed over  in {inputs.shown(directory)}: {said_of(found.passed_over)}')
    self._names = found.names
    tried = range(len(self._names))
    if len(tried) > DECODED:
      tried = order.choice(seed, len(tried), SAMPLED)
    names = [self._names[i] for i in tried]
    if len(names) >= SAMPLED:
      cli.log(f'opening      {len(names)} of {len(self._names)} pictures of {directory}')
    records = inspect(directory, names, decode=True)
    faults = {name: records[name].fault for name in names if records[name].fault}
    if faults:
      self._leave_out(faults, len(names), bad_images)

  def _leave_out(self, faults, tried, bad_images):
    said = (
      f'{len(faults)} of {tried} pictures in {inputs.shown(self._directory)} that do not decode '
      f'({shown_faults(faults)})'
    )
    if bad_images == 'error' or len(faults) == len(self._names):
      raise InputError(
        f'found {said}; expected whole pictures; mend or remove them, or leave them out with '
        'data.bad_images=skip'
      )
    cli.log(f'left out     {said}')
    self._names = [name for name in self._names if name not in faults]

  def __len__(self) -> int:
    return len(self._names)

  @property
  def names(self) -> list[str]:
    """Paths relative to the folder, by index."""
    return self._names

  def read(self, index: int) -> tuple[str, bytes]:
    """(what errors call it, the bytes of its file)."""
    path = os.path.join(self._directory, self._names[index])
    return inputs.shown(path), _read(path)

  def hashes(self, indices: Sequence[int]) -> list[str]:
    """SHA-256 of the bytes of some pictures."""
    names = [self._names[i] for i in indices]
    records = inspect(self._directory, names)
    return [records[name].sha256 for name in names]

  def identity(self, indices: Sequence[int]) -> str:
    """Names and hashes of some pictures, a line each."""
    pairs = zip(self.hashes(indices), indices)
    return '\n'.join(f'{sha256} {self._names[i]}' for sha256, i in pairs)


def shown_faults(faults: dict[str, str]) -> str:
  """'a.jpg: empty, b.png: no format that is known and 3 more'."""
  first = list(faults.items())[:SHOWN]
  more = f' and {len(faults) - SHOWN} more' if len(faults) > SHOWN else ''
  return ', '.join(f'{inputs.shown(name)}: {fault}' for name, fault in first) + more


def fault_of(error: InputError) -> str:
  """The reason inside a sentence about a picture: what stands in its brackets, or its beginning."""
  found = str(error).partition('; expected')[0]
  for pattern in _REASONS:
    reason = pattern.search(found)
    if reason:
      return reason[1]
  return found.removeprefix('found ')


def inspect(directory: str, names: Sequence[str], decode: bool = False) -> dict[str, Record]:
  """The records of some pictures; decode: whether it must be known that they decode."""
  cache = _Cache(directory)

  def look(name):
    path = os.path.join(directory, name)
    status = os.stat(path)
    known = cache.get(name, status)
    if known is not None and (known.fault is not None or not decode):
      return name, status, known
    return name, status, _look(path, decode)

  found = {}
  with pool() as workers:
    for name, status, record in workers.map(_gone_is_said(look, directory), names):
      found[name] = record
      cache.put(name, status, record)
  cache.write()
  return found


def pool() -> concurrent.futures.ThreadPoolExecutor:
  """Threads that decode: Pillow works outside the interpreter's lock."""
  return concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1), 'pictures')


def _gone_is_said(look, directory):
  def looked(name):
    try:
      return look(name)
    except OSError as e:
      raise InputError(
        f'cannot read {inputs.shown(os.path.join(directory, name))} ({e.strerror}); expected the '
        'folder to stay as it is; start again'
      ) from e

  return looked


def _look(path, decode) -> Record:
  try:
    data = _read(path)
    fault = None
    if decode:
      images.verify(io.BytesIO(data), inputs.shown(path))
      fault = ''
  except InputError as e:
    data, fault = b'', fault_of(e)
  return Record(hashlib.sha256(data).hexdigest(), fault)


def _read(path) -> bytes:
  with inputs.open_plain(path, 'a picture file') as file:
    try:
      return file.read()
    except OSError as e:
      raise InputError(
        f'cannot read {inputs.shown(path)} ({e.strerror}); expected a picture file; check the disk'
      ) from e


# What is known of it.


def cache_directory() -> str:
  """The user's folder for what can be made anew: $DSR_JAX_CACHE, else XDG's."""
  base = os.environ.get('XDG_CACHE_HOME') or os.path.join('~', '.cache')
  named = os.environ.get(CACHE_VARIABLE) or os.path.join(base, 'dsr_jax')
  return os.path.expanduser(named)


class _Cache:
  """Records of a folder's files with their sizes and times; without a place to keep them, none."""

  def __init__(self, directory):
    real = os.fsencode(os.path.realpath(directory))
    name = f'{hashlib.sha256(real).hexdigest()[:32]}.json'
    self._path = os.path.join(cache_directory(), 'pictures', name)
    self._began = time.time_ns()
    self._records = {}
    self._changed = False
    # What another version of Pillow could not read, this one may.
    with contextlib.suppress(InputError, ValueError, TypeError, KeyError, AttributeError):
      found = files.read_json_or_none(self._path)
      if found['pillow'] == PIL.__version__ and found['pixels'] == images.max_pixels():
        self._records = dict(found['files'])

  def get(self, name, status) -> Record | None:
    """What is known of a file of this very size and these times."""
    try:
      size, modified, changed, looked, sha256, fault = self._records[name]
      if [size, modified, changed] != _stamp(status) or looked - changed < RACY_NS:
        return None
      return Record(sha256, fault)
    except (KeyError, TypeError, ValueError):
      return None

  def put(self, name, status, record):
    entry = [*_stamp(status), self._began, *record]
    if self.get(name, status) != record:
      self._records[name] = entry
      self._changed = True

  def write(self):
    if not self._changed:
      return
    content = {'pillow': PIL.__version__, 'pixels': images.max_pixels(), 'files': self._records}
    with contextlib.suppress(OSError):
      files.write_json(self._path, content)


def _stamp(status):
  return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
