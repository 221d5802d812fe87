"""A folder of a user's own images: finds the images, and checks all of them before the first step.

File contents decide, not names. Other files are skipped, counted and reported. Images that do not
decode raise an error that lists all of them, or are omitted and counted. An image's identity is the
hash of its bytes. Checking 20,000 images takes a minute or two, so the user's cache stores the
results, and a file with the same size and times is not checked again.
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

# A file with such a suffix is an image, perhaps a damaged one.
SUFFIXES = (
  *('.avif', '.bmp', '.gif', '.jfif', '.jp2', '.jpe', '.jpeg', '.jpg', '.pbm', '.pgm', '.png'),
  *('.pnm', '.ppm', '.qoi', '.tif', '.tiff', '.webp'),
)
DECODED = 20_000  # folders up to this number of images are fully decoded before the first step
SAMPLED = 1_000  # images to decode in a larger folder
SHOWN = 5  # names in a sentence
# A file that changed this shortly before its check may change again within the same timestamp.
RACY_NS = 2_000_000_000
_REASONS = [
  re.compile(pattern, re.DOTALL)
  for pattern in (
    r'(?:not a readable image|cut short or damaged) \((.*)$',
    r'(?:found the|is an) (empty file)',
    r' (?:is|has|to have) (\d+ x \d+ pixels, \d+ in all|\d+ bytes|more than \d+ pixels|'
    r'values from [^;]*|larger than the \d+ bytes that it states)',
    r'^cannot read .*(?: \(|: it is )(.*?)(?:\),|, but |$)',
  )
]
CACHE_VARIABLE = 'DSR_JAX_CACHE'


# Finding the images.


class Found(NamedTuple):
  """Paths relative to a folder, with '/', sorted. passed_over: reason -> skipped paths."""

  names: list[str]
  passed_over: dict[str, list[str]]


def find(directory: str) -> Found:
  """The images in `directory` and below. Each real folder is read once, even behind a link; hidden
  files and folders are skipped.

  Raises InputError if there is no image or a folder cannot be read.
  """
  if not os.path.isdir(directory):
    raise InputError(f'there is no folder {inputs.shown(directory)}; name a folder of images')
  names, passed_over = [], collections.defaultdict(list)
  for name, why in _walk(directory):
    if not why and not _is_picture(os.path.join(directory, name)):
      why = 'unrecognized'
    if why:
      passed_over[why].append(name)
    else:
      names.append(name)
  found = Found(sorted(names), {why: sorted(passed_over[why]) for why in sorted(passed_over)})
  if not names:
    there = said_of(found.passed_over)
    raise InputError(
      f'there is no image in {inputs.shown(directory)}{there and f" ({there})"}; name a folder of '
      'PNG, JPEG, WebP, TIFF, AVIF, GIF or BMP files'
    )
  return found


def said_of(passed_over: dict[str, Sequence[str]]) -> str:
  """Such as '3 unrecognized (a.txt, b.csv, c.md); 1 links to nothing (x.jpg)'."""
  return '; '.join(f'{len(names)} {why} ({shown(names)})' for why, names in passed_over.items())


def shown(names: Iterable[str]) -> str:
  """The first few names, and a note if there are more."""
  names = list(names)
  more = f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
  return ', '.join(inputs.shown(name) for name in names[:SHOWN]) + more


def _walk(directory):
  """(relative path, reason to skip it or '') of every entry; a skipped folder is one entry."""
  read = set()
  folders, links = collections.deque(['']), []
  while folders or links:
    if folders:
      folder = folders.popleft()
    else:
      # A folder's own path takes precedence over links to it, so links come last.
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
      f'cannot read the folder {inputs.shown(folder)} ({e.strerror}); fix its permissions, or '
      'remove it'
    ) from e


def _is_picture(path):
  if path.lower().endswith(SUFFIXES):
    return True
  try:
    with inputs.open_plain(path, 'an image file') as file:
      return images.is_known(file)
  except (InputError, OSError):
    return False


# Checking the images.


class Record(NamedTuple):
  """sha256: hash of the bytes. fault: why it does not decode; '' if it does, None if untested."""

  sha256: str
  fault: str | None


class Folder:
  """The usable images of a folder, by index, as the bytes of their files.

  Args:
    directory: the folder.
    bad_images: 'error' or 'skip', for images that do not decode.
    seed: selects the images of a large folder to decode.

  Raises InputError if there are none, or if some do not decode.
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
      cli.log(f'checking     {len(names)} of {len(self._names)} images of {directory}')
    records = inspect(directory, names, decode=True)
    faults = {name: records[name].fault for name in names if records[name].fault}
    if faults:
      self._leave_out(faults, len(names), bad_images)

  def _leave_out(self, faults, tried, bad_images):
    said = (
      f'{len(faults)} of {tried} images in {inputs.shown(self._directory)} that do not decode '
      f'({shown_faults(faults)})'
    )
    if bad_images == 'error' or len(faults) == len(self._names):
      raise InputError(
        f'found {said}; repair or remove them, or leave them out with data.bad_images=skip'
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
    """(its name in errors, the bytes of its file)."""
    path = os.path.join(self._directory, self._names[index])
    return inputs.shown(path), _read(path)

  def hashes(self, indices: Sequence[int]) -> list[str]:
    """SHA-256 of the bytes of the given images."""
    names = [self._names[i] for i in indices]
    records = inspect(self._directory, names)
    return [records[name].sha256 for name in names]

  def identity(self, indices: Sequence[int]) -> str:
    """Names and hashes of the given images, one per line."""
    pairs = zip(self.hashes(indices), indices)
    return '\n'.join(f'{sha256} {self._names[i]}' for sha256, i in pairs)


def shown_faults(faults: dict[str, str]) -> str:
  """Such as 'a.jpg: empty, b.png: unknown format and 3 more'."""
  first = list(faults.items())[:SHOWN]
  more = f' and {len(faults) - SHOWN} more' if len(faults) > SHOWN else ''
  return ', '.join(f'{inputs.shown(name)}: {fault}' for name, fault in first) + more


def fault_of(error: InputError) -> str:
  """The reason in an error about an image: the text in parentheses, or the start of the message.

  `_REASONS` matches the messages of `images`, `inputs.open_plain`, `prepare.sources` and `_read`.
  """
  found = str(error).partition('); ')[0]
  for pattern in _REASONS:
    reason = pattern.search(found)
    if reason:
      return reason[1]
  return found.removeprefix('found ')


def inspect(directory: str, names: Sequence[str], decode: bool = False) -> dict[str, Record]:
  """The records of the given images. decode: also test whether they decode."""
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
  """Threads for decoding: Pillow releases the GIL."""
  return concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1), 'pictures')


def _gone_is_said(look, directory):
  def looked(name):
    try:
      return look(name)
    except OSError as e:
      raise InputError(
        f'cannot read {inputs.shown(os.path.join(directory, name))} ({e.strerror}); start again, '
        'and do not change the folder meanwhile'
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
  with inputs.open_plain(path, 'an image file') as file:
    try:
      return file.read()
    except OSError as e:
      raise InputError(f'cannot read {inputs.shown(path)} ({e.strerror}); check the disk') from e


# Cached records.


def cache_directory() -> str:
  """The user's cache folder: $DSR_JAX_CACHE, else in XDG's."""
  base = os.environ.get('XDG_CACHE_HOME') or os.path.join('~', '.cache')
  named = os.environ.get(CACHE_VARIABLE) or os.path.join(base, 'dsr_jax')
  return os.path.expanduser(named)


class _Cache:
  """Records of a folder's files with their sizes and times; empty if they cannot be stored."""

  def __init__(self, directory):
    real = os.fsencode(os.path.realpath(directory))
    name = f'{hashlib.sha256(real).hexdigest()[:32]}.json'
    self._path = os.path.join(cache_directory(), 'pictures', name)
    self._began = time.time_ns()
    self._records = {}
    self._changed = False
    # This version of Pillow may read files that another version could not.
    with contextlib.suppress(InputError, ValueError, TypeError, KeyError, AttributeError):
      found = files.read_json_or_none(self._path)
      if found['pillow'] == PIL.__version__ and found['pixels'] == images.max_pixels():
        self._records = dict(found['files'])

  def get(self, name, status) -> Record | None:
    """The record of a file with exactly this size and these times."""
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
