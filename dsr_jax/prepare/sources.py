"""Sources of images: zips, tar archives and folders, read without unpacking, one image after the
other, always in the same order.

A source is a list of volumes (a zip, a folder, a numbered archive). Each has an identity, by which
a resumed preparation recognizes it.
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

MAX_FILE_BYTES = 256 << 20  # per image; a larger file is not an image, or is a zip bomb
TAR_SUFFIXES = ('.tgz', '.tar.gz', '.tar')
_PEEKED = 16  # bytes that identify an image
_CHUNK = 1 << 20
_TAR_BLOCK = 512
_DAMAGE = (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile)


class NoPicture(Exception):
  """An item that is passed over; the message says what it is, in the plural."""


class Item(NamedTuple):
  """name: inside its volume. read: returns the bytes, in any thread; raises InputError if they
  cannot be read, NoPicture if they are not an image.
  """

  name: str
  read: Callable[[], bytes]


class Volume(Protocol):
  """name: for messages. identity: differs if the content does. number: of items, None if unknown
  in advance. num_bytes: approximate total of all items.
  """

  name: str
  identity: str
  number: int | None
  num_bytes: int

  def items(self, start: int) -> Iterator[Item]:
    """The items from number `start` on."""
    ...


def open_source(path: str, dataset: str) -> list[Volume]:
  """The volumes of --source.

  Raises InputError if there is none, or if it is damaged, encrypted or has paths that lead outside.
  """
  if not os.path.lexists(path):
    raise InputError(
      f'--source is {inputs.shown(path)}, which does not exist; name a zip, a .tgz archive or a '
      'folder'
    )
  if os.path.isdir(path):
    return _in_folder(path, dataset)
  return [_archive(path)]


def _in_folder(path, dataset):
  if os.path.isfile(os.path.join(path, prepared.INFO)):
    return [_PreparedSet(path)]
  if dataset == 'coco':
    # A download folder of COCO may also hold annotations and other years.
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
    raise InputError(f'{inputs.shown(path)} is empty, not a zip or tar archive; download it again')
  if beginning.startswith(b'PK'):
    return _Zip(path)
  if beginning.startswith(b'\x1f\x8b') or beginning[257:262] == b'ustar':
    return _Tar(path, os.path.basename(path))
  raise InputError(
    f'{inputs.shown(path)} is neither a zip nor a tar archive, plain or gzipped; set --source to '
    'one, or to a folder'
  )


def _damaged(path, error) -> InputError:
  reason = ' '.join(str(error).split())[:200] or type(error).__name__
  return InputError(
    f'{inputs.shown(path)} is cut short or damaged ({reason}); download it again, then run the '
    'same command'
  )


def _check_inside(name, path):
  """InputError for a member whose path leads outside its archive."""
  parts = re.split(r'[/\\]', name)
  if parts[0] == '' or '..' in parts or re.match(r'[A-Za-z]:', name):
    raise InputError(
      f'{inputs.shown(path)} has the path {inputs.shown(name)!r}, which leads outside the archive; '
      'use an archive from a source that you trust'
    )


def _is_hidden(name):
  return any(part.startswith(('.', '__MACOSX')) and part != '.' for part in name.split('/'))


def _picture_of(name: str, size: int, file) -> bytes:
  """The bytes of an open file, if it is an image by its contents or (a damaged one) by its name."""
  beginning = file.read(_PEEKED)
  named = name.lower().endswith(folders.SUFFIXES)
  if size > MAX_FILE_BYTES:
    if not named and not images.is_known(io.BytesIO(beginning)):
      raise NoPicture('unrecognized')
    raise InputError(
      f'{inputs.shown(name)} has {size} bytes, more than the limit of {MAX_FILE_BYTES}; leave it '
      'out'
    )
  # At most one byte above the limit, as a file that states a wrong size could fill the memory.
  data = beginning + file.read(MAX_FILE_BYTES + 1 - len(beginning))
  if len(data) > MAX_FILE_BYTES:
    raise InputError(
      f'{inputs.shown(name)} is larger than the {size} bytes that it states; leave it out'
    )
  if not named and not images.is_known(io.BytesIO(data)):
    raise NoPicture('unrecognized')
  return data


# A zip.


class _Zip:
  """Members in the order of the zip's directory, read in place."""

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
          f'{inputs.shown(path)} is encrypted ({inputs.shown(member.filename)}); unpack it and '
          'name the folder in --source'
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
  """A file that is read sequentially and keeps its last bytes."""

  def __init__(self, file):
    self._file, self._last, self._end = file, b'', 0

  def read(self, number):
    data = self._file.read(number)
    self._end += len(data)
    self._last = (self._last + data)[-4 * max(number, _TAR_BLOCK) :]
    return data

  def block(self, offset):
    """The bytes of a block among the last ones; fewer if the file ends earlier."""
    begin = offset - (self._end - len(self._last))
    return self._last[begin : begin + _TAR_BLOCK] if begin >= 0 else b''


class _Tar:
  """Members in the order of the archive. A tar archive has no directory, so it is read from start
  to end; nothing is unpacked.
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
        # tarfile takes anything that is not a header for the end, which must be zeros.
        if tail.block(archive.offset) != bytes(_TAR_BLOCK):
          raise EOFError(f'its end is missing after {archive.offset} bytes')
        while file.read(_CHUNK):  # up to gzip's checksum
          pass
    except _DAMAGE as e:
      raise _damaged(self._path, e) from e

  def _members(self, archive, start):
    number = 0
    while (member := archive.next()) is not None:
      archive.members = []  # otherwise it keeps them all
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
  """Calls `function` now; returns a function that gives its result, or raises its error, later."""
  try:
    result = function(*args)
  except (InputError, NoPicture) as e:
    return functools.partial(_raise, e)
  return lambda: result


def _raise(error):
  raise error


# A folder.


class _Folder:
  """The images of a folder and its subfolders, sorted by path."""

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
    with inputs.open_plain(path, 'an image file') as file:
      try:
        return _picture_of(name, os.fstat(file.fileno()).st_size, file)
      except OSError as e:
        raise InputError(f'cannot read {inputs.shown(path)} ({e.strerror}); check the disk') from e


# A set prepared by TFDS.


class _PreparedSet:
  """The images of a TFDS data set, without its other features."""

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
