"""What people have: zips, tar archives and folders of pictures, read as they are, one picture after
the other, in an order that is always the same.

A source is a list of volumes (a zip, a folder, a numbered archive), each with an identity by which
a preparation that was stopped knows it again.
"""

from collections.abc import Callable, Iterator
import contextlib
import functools
import gzip
import hashlib
import io
import os
import re
import tarfile
from typing import NamedTuple, Protocol
import zipfile
import zlib

from dsr_jax import cli, images, inputs
from dsr_jax.data import folders, prepared
from dsr_jax.errors import InputError

MAX_FILE_BYTES = 256 << 20  # of one picture; more is no picture, or a bomb
TAR_SUFFIXES = ('.tgz', '.tar.gz', '.tar')
_PEEKED = 16  # bytes that tell a picture
_CHUNK = 1 << 20
_TAR_BLOCK = 512
_DAMAGE = (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile)


class NoPicture(Exception):
  """What is passed over; the message says what it is, in the plural."""


class Item(NamedTuple):
  """name: inside of its volume. read: gives the bytes, in any thread; InputError where they cannot
  be had, NoPicture where they are something else.
  """

  name: str
  read: Callable[[], bytes]


class Volume(Protocol):
  """name: for people. identity: differs where the content does. number: of items, None if unknown
  beforehand. num_bytes: about those of all items.
  """

  name: str
  identity: str
  number: int | None
  num_bytes: int

  def items(self, start: int) -> Iterator[Item]:
    """Items from number `start` on."""
    ...


def open_source(path: str, dataset: str) -> list[Volume]:
  """The volumes of --source.

  Raises InputError where there is none, or it is damaged, encrypted or leads outside.
  """
  if not os.path.lexists(path):
    raise InputError(
      f'found nothing at {inputs.shown(path)}; expected a zip, .tgz archives or a folder; name it '
      'in --source'
    )
  if os.path.isdir(path):
    return _in_folder(path, dataset)
  return [_archive(path)]


def _in_folder(path, dataset):
  if os.path.isfile(os.path.join(path, prepared.INFO)):
    return [_PreparedSet(path)]
  if dataset == 'coco':
    # As COCO is downloaded: annotations, and other years, may lie beside it.
    for name, kind in (('train2017', os.path.isdir), ('train2017.zip', os.path.isfile)):
      inside = os.path.join(path, name)
      if kind(inside):
        cli.log(f'reading      {inputs.shown(inside)}')
        return _in_folder(inside, '') if kind is os.path.isdir else [_archive(inside)]
    newest = prepared.locate('coco/2017', path)
    if newest:
      return [_PreparedSet(newest)]
  if dataset == 'journeydb':
    archives = sorted(_archives(path), key=_by_number)
    if archives:
      cli.log(f'reading      {len(archives)} archives of {inputs.shown(path)}')
      return [_Tar(os.path.join(path, name), name) for name in archives]
  return [_Folder(path)]


def _archives(path):
  for folder, subfolders, names in os.walk(path):
    subfolders[:] = [name for name in subfolders if not name.startswith('.')]
    for name in names:
      if name.lower().endswith(TAR_SUFFIXES) and not name.startswith('.'):
        yield os.path.relpath(os.path.join(folder, name), path).replace(os.sep, '/')


def _by_number(name):
  """10.tgz comes after 9.tgz."""
  return [(int(part), '') if part.isdigit() else (-1, part) for part in re.split(r'(\d+)', name)]


def _archive(path):
  with inputs.open_plain(path, 'a zip or tar archive') as file:
    beginning = file.read(262 + 3)
  if not beginning:
    raise InputError(
      f'found the empty file {inputs.shown(path)}; expected a zip or tar archive; fetch it again'
    )
  if beginning.startswith(b'PK'):
    return _Zip(path)
  if beginning.startswith(b'\x1f\x8b') or beginning[257:262] == b'ustar':
    return _Tar(path, os.path.basename(path))
  raise InputError(
    f'found {inputs.shown(path)} to be neither a zip nor a tar archive, plain or gzipped; expected '
    'one, or a folder; check --source'
  )


def _damaged(path, error) -> InputError:
  reason = ' '.join(str(error).split())[:200] or type(error).__name__
  return InputError(
    f'found {inputs.shown(path)} cut short or damaged ({reason}); expected a whole archive; fetch '
    'it again, then run the same command'
  )


def _check_inside(name, path):
  """InputError for a member whose name leads out of its archive."""
  parts = re.split(r'[/\\]', name)
  if parts[0] == '' or '..' in parts or re.match(r'[A-Za-z]:', name):
    raise InputError(
      f'found the path {inputs.shown(name)!r} in {inputs.shown(path)}, which leads outside of it; '
      'expected paths inside; take an archive from where you trust it'
    )


def _is_hidden(name):
  return any(part.startswith(('.', '__MACOSX')) and part != '.' for part in name.split('/'))


def _picture_of(name: str, size: int, file) -> bytes:
  """The bytes of one open file, if it is a picture by its contents or, damaged, by its name."""
  beginning = file.read(_PEEKED)
  named = name.lower().endswith(folders.SUFFIXES)
  if size > MAX_FILE_BYTES:
    if not named and not images.is_known(io.BytesIO(beginning)):
      raise NoPicture('no pictures')
    raise InputError(
      f'found {inputs.shown(name)} to have {size} bytes; expected at most {MAX_FILE_BYTES}; leave '
      'it out'
    )
  # One byte more than it says, so that what says too little does not fill the memory.
  data = beginning + file.read(MAX_FILE_BYTES + 1 - len(beginning))
  if len(data) > MAX_FILE_BYTES:
    raise InputError(
      f'found {inputs.shown(name)} larger than it says; expected {size} bytes; leave it out'
    )
  if not named and not images.is_known(io.BytesIO(data)):
    raise NoPicture('no pictures')
  return data


# A zip.


class _Zip:
  """Members in the order of the zip's own directory, read from where they lie."""

  def __init__(self, path):
    self.name, self._path = os.path.basename(path), path
    try:
      self._zip = zipfile.ZipFile(path)
      members = [member for member in self._zip.infolist() if not member.is_dir()]
    except (*_DAMAGE, ValueError, NotImplementedError) as e:
      raise _damaged(path, e) from e
    digest = hashlib.sha256()
    for member in members:
      _check_inside(member.orig_filename, path)
      if member.flag_bits & 0x1:
        raise InputError(
          f'found {inputs.shown(path)} encrypted ({inputs.shown(member.filename)}); expected a zip '
          'without a password; unpack it and name the folder'
        )
      line = f'{member.filename} {member.file_size} {member.CRC}\n'
      digest.update(line.encode('utf-8', 'surrogateescape'))
    self._members = members
    self.identity = f'zip {digest.hexdigest()}'
    self.number = len(members)
    self.num_bytes = sum(min(member.file_size, MAX_FILE_BYTES) for member in members)

  def items(self, start):
    for member in self._members[start:]:
      yield Item(member.filename, functools.partial(self._read, member))

  def _read(self, member):
    if _is_hidden(member.filename):
      raise NoPicture('hidden')
    try:
      with self._zip.open(member) as file:
        return _picture_of(member.filename, member.file_size, file)
    except (*_DAMAGE, NotImplementedError, RuntimeError) as e:
      raise _damaged(f'{member.filename} in {self._path}', e) from e


# A tar archive.


class _Tail:
  """A file that is read onwards, of which the last bytes are kept."""

  def __init__(self, file):
    self._file, self._last, self._end = file, b'', 0

  def read(self, number):
    data = self._file.read(number)
    self._end += len(data)
    self._last = (self._last + data)[-4 * max(number, _TAR_BLOCK) :]
    return data

  def block(self, offset):
    """The bytes of a block among the last ones; fewer where the file ends before."""
    begin = offset - (self._end - len(self._last))
    return self._last[begin : begin + _TAR_BLOCK] if begin >= 0 else b''


class _Tar:
  """Members in the order in which they lie; a tar archive has no directory, so all of it is read
  through, and nothing of it is unpacked.
  """

  number = None

  def __init__(self, path, name):
    self.name, self._path = name, path
    with inputs.open_plain(path, 'a tar archive') as file:
      size = os.fstat(file.fileno()).st_size
      digest = hashlib.sha256(file.read(_CHUNK))
      self._gzipped = _begins(file, b'\x1f\x8b')
      file.seek(max(0, size - _CHUNK))
      digest.update(file.read())
    self.identity = f'tar {name} {size} {digest.hexdigest()}'
    self.num_bytes = size

  def items(self, start):
    try:
      with contextlib.ExitStack() as opened:
        file = opened.enter_context(inputs.open_plain(self._path, 'a tar archive'))
        if self._gzipped:
          file = opened.enter_context(gzip.GzipFile(fileobj=file))
        tail = _Tail(file)
        archive = opened.enter_context(tarfile.open(fileobj=tail, mode='r|'))
        yield from self._members(archive, start)
        # tarfile takes whatever is no header for the end: there it must be zeros.
        if tail.block(archive.offset) != bytes(_TAR_BLOCK):
          raise EOFError(f'its end is missing after {archive.offset} bytes')
        while file.read(_CHUNK):  # to gzip's checksum
          pass
    except _DAMAGE as e:
      raise _damaged(self._path, e) from e

  def _members(self, archive, start):
    number = 0
    while (member := archive.next()) is not None:
      archive.members = []  # it would keep them all
      _check_inside(member.name, self._path)
      if member.isdir():
        continue
      number += 1
      if number > start:
        yield Item(member.name, _result_of(_read_member, archive, member))


def _begins(file, signature):
  file.seek(0)
  return file.read(len(signature)) == signature


def _read_member(archive, member):
  if not member.isreg():
    raise NoPicture('no plain files')
  if _is_hidden(member.name):
    raise NoPicture('hidden')
  return _picture_of(member.name, member.size, archive.extractfile(member))


def _result_of(function, *args):
  """Calls at once; returns what gives the result, or raises what it raised, later."""
  try:
    result = function(*args)
  except (InputError, NoPicture) as e:
    return functools.partial(_raise, e)
  return lambda: result


def _raise(error):
  raise error


# A folder.


class _Folder:
  """The pictures of a folder and those below, sorted by path."""

  def __init__(self, path):
    self.name, self._path = os.path.basename(os.path.abspath(path)), path
    found = folders.find(path)
    if found.passed_over:
      cli.log(f'passed over  in {inputs.shown(path)}: {folders.said_of(found.passed_over)}')
    self._names = found.names
    digest = hashlib.sha256()
    self.num_bytes = 0
    for name in self._names:
      status = os.stat(os.path.join(path, name))
      self.num_bytes += min(status.st_size, MAX_FILE_BYTES)
      line = f'{name} {status.st_size} {status.st_mtime_ns}\n'
      digest.update(line.encode('utf-8', 'surrogateescape'))
    self.identity = f'folder {digest.hexdigest()}'
    self.number = len(self._names)

  def items(self, start):
    for name in self._names[start:]:
      yield Item(name, functools.partial(self._read, name))

  def _read(self, name):
    path = os.path.join(self._path, name)
    with inputs.open_plain(path, 'a picture file') as file:
      try:
        return _picture_of(name, os.fstat(file.fileno()).st_size, file)
      except OSError as e:
        raise InputError(f'cannot read {inputs.shown(path)} ({e.strerror}); expected a file') from e


# A set that TFDS prepared.


class _PreparedSet:
  """The pictures of a TFDS data set, without all else that it may hold."""

  def __init__(self, directory):
    self.name, self._stored = directory, prepared.Prepared(directory, directory)
    self.number = len(self._stored)
    self.identity = f'tfds {self._stored.identity(range(self.number))}'
    self.num_bytes = sum(entry.stat().st_size for entry in os.scandir(directory) if entry.is_file())
    self._stored.connect(range(self.number))

  def items(self, start):
    for index in range(start, self.number):
      name, data = self._stored.read_named(index)
      yield Item(name, functools.partial(bytes, data))
