"""The files of a prepared set: shards, the note of the progress, and the files that TFDS needs.

Shards have a fixed number of images, in the order of the source. A finished shard is renamed to its
final name, and then noted. TFDS' own files come last; without them, the folder does not count as a
data set. So a preparation can be killed at any point: the next one resumes it, and ends with the
same bytes.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile

from array_record.python import array_record_module as array_record
from etils import epath
import numpy as np
import tensorflow_datasets as tfds

from dsr_jax import files, inputs
from dsr_jax.data import known, prepared
from dsr_jax.errors import InputError, first_line

PICTURES_A_SHARD = 2048
SPARE_BYTES = 64 << 20
LICENSE = 'LICENSE'
LOCK = '.lock'
# Images are already compressed; groups of one allow reading single images.
_OPTIONS = 'group_size:1,uncompressed'


def features():
  """The features of an example: the file's bytes and name, and the image's size as stored."""
  return tfds.features.FeaturesDict(
    {
      'image': tfds.features.Image(shape=(None, None, 3)),
      'file_name': tfds.features.Text(),
      'width': tfds.features.Scalar(np.int32),
      'height': tfds.features.Scalar(np.int32),
    }
  )


class Place:
  """The folder of a set that is being prepared, on a disk or in a bucket, for one process.

  A context that holds the folder's lock. For a bucket, shards are written to this machine's disk
  and then uploaded.
  """

  def __init__(self, data_dir: str, name: str):
    self.directory = os.path.join(data_dir, name, prepared.VERSION)
    self.remote = prepared.is_remote(data_dir)
    self._path = epath.Path(self.directory)
    self._holding = contextlib.ExitStack()
    self._aside = self.directory
    self._made: list[str] = []  # new folders, innermost first

  def __enter__(self):
    with self.writing(), contextlib.ExitStack() as holding:
      if self.remote:
        self._path.mkdir(parents=True, exist_ok=True)
        self._aside = holding.enter_context(tempfile.TemporaryDirectory(prefix='dsr_jax_'))
      else:
        self._made = files.make_folders(os.path.abspath(self.directory))
        lock = holding.enter_context(open(os.path.join(self.directory, LOCK), 'a'))
        try:
          fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
          raise InputError(
            f'another preparation is running in {self.directory}; wait for it to end, or stop it'
          ) from e
      self._holding = holding.pop_all()
    return self

  def __exit__(self, *_):
    with contextlib.suppress(OSError):
      if not self.remote and os.listdir(self.directory) == [LOCK]:  # nothing was written
        os.unlink(os.path.join(self.directory, LOCK))
        for folder in self._made:  # not the user's own folders, even if they are empty
          os.rmdir(folder)
    self._holding.close()

  @contextlib.contextmanager
  def writing(self):
    """Turns an error of the disk inside into an InputError."""
    try:
      yield
    # array_record raises RuntimeError for every error of the system.
    except (OSError, RuntimeError) as e:
      raise InputError(
        f'cannot write {inputs.shown(self.directory)} ({first_line(e)}); free some space or fix '
        'its permissions, and the same command resumes'
      ) from e

  def check_room(self, need: int):
    """InputError if the disk has no room for `need` more bytes."""
    if self.remote:
      return
    free = shutil.disk_usage(self.directory).free
    if free < need + SPARE_BYTES:
      raise InputError(
        f'{inputs.shown(self.directory)} has {free >> 20} MiB free, but the images need about '
        f'{(need + SPARE_BYTES) >> 20} MiB; free some space, or name another --data_dir'
      )

  def aside(self, name: str) -> str:
    """The path where a file is written before it gets its final name."""
    return os.path.join(self._aside, f'{name}.new')

  def put(self, name: str):
    """Renames the file written at `aside` to its final name, or uploads it."""
    if self.remote:
      epath.Path(self.aside(name)).copy(self._path / name, overwrite=True)
      os.unlink(self.aside(name))
    else:
      os.replace(self.aside(name), os.path.join(self.directory, name))

  def write(self, name: str, data: bytes):
    """Writes a small file atomically."""
    with self.writing():
      if self.remote:
        (self._path / name).write_bytes(data)
      else:
        files.write_bytes(os.path.join(self.directory, name), data)

  def read_json(self, name: str):
    """The JSON value in a file; None if it is missing or not JSON."""
    try:
      return json.loads((self._path / name).read_text())
    except (OSError, ValueError):
      return None

  def size(self, name: str) -> int:
    """The size of a file in bytes; -1 if there is none."""
    path = self._path / name
    return path.stat().length if path.exists() else -1

  def clear(self):
    """Removes everything that a preparation wrote here."""
    with self.writing():
      if not self._path.exists():
        return
      # First the file that makes it a data set.
      names = sorted(path.name for path in self._path.iterdir() if path.name != LOCK)
      for name in (prepared.INFO, prepared.RECORD, *names):
        (self._path / name).unlink(missing_ok=True)


class ShardWriter:
  """Writes records into shards; `finish` returns the facts of each finished one."""

  def __init__(self, place: Place, name: str, first: int, size: int):
    self._place, self._name, self._size = place, name, size
    self._index, self._count = first, 0
    self._writer, self._digest = None, None

  @property
  def file(self) -> str:
    return prepared.SHARD.format(name=self._name, split=prepared.SPLIT, index=self._index)

  @property
  def count(self) -> int:
    """The number of records in the unfinished shard."""
    return self._count

  @property
  def is_full(self) -> bool:
    return self._count == self._size

  def write(self, record: bytes):
    with self._place.writing():
      if self._writer is None:
        self._writer = array_record.ArrayRecordWriter(self._place.aside(self.file), _OPTIONS)
        self._digest = hashlib.sha256()
      self._writer.write(record)
    self._digest.update(record)
    self._count += 1

  def finish(self) -> dict:
    """Ends the shard; returns its entry in the note: {'examples', 'bytes', 'sha256'}, the last of
    its records' bytes.
    """
    with self._place.writing():
      self._writer.close()
      aside = self._place.aside(self.file)
      # A failed write may show only here.
      reader = array_record.ArrayRecordReader(aside)
      if reader.num_records() != self._count:
        raise OSError(f'{aside} has {reader.num_records()} of {self._count} images')
      reader.close()
      size = os.path.getsize(aside)
      with open(aside, 'rb') as file:
        os.fsync(file.fileno())
      self._place.put(self.file)
    done = {'examples': self._count, 'bytes': size, 'sha256': self._digest.hexdigest()}
    self._writer, self._count, self._index = None, 0, self._index + 1
    return done

  def drop(self):
    """Removes the unfinished shard."""
    if self._writer is not None:
      with contextlib.suppress(OSError, RuntimeError):
        self._writer.close()
      with contextlib.suppress(OSError):
        os.unlink(self._place.aside(self.file))
      self._writer = None


def serializer():
  """(bytes, name, width, height) -> a record; the same bytes in every process."""
  serialize = tfds.core.example_serializer.ExampleSerializer(features().get_serialized_info())

  def record(data: bytes, name: str, width: int, height: int) -> bytes:
    example = serialize.get_tf_example(
      {'image': data, 'file_name': name, 'width': width, 'height': height}
    )
    # The fields are a map, whose order varies between processes otherwise.
    return example.SerializeToString(deterministic=True)

  return record


def write_info(place: Place, name: str, dataset: known.Known, lengths, num_bytes: int):
  """Writes features.json, the license, and last dataset_info.json, which makes it a data set."""
  with tempfile.TemporaryDirectory() as aside:
    template = tfds.core.ShardedFileTemplate(
      data_dir=aside,
      dataset_name=name,
      split=prepared.SPLIT,
      filetype_suffix='array_record',
      template='{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}',
    )
    split = tfds.core.SplitInfo(
      name=prepared.SPLIT, shard_lengths=lengths, num_bytes=num_bytes, filename_template=template
    )
    identity = tfds.core.dataset_info.DatasetIdentity(
      name=name,
      version=tfds.core.Version(prepared.VERSION),
      data_dir=aside,
      module_name='dsr_jax.prepare',
    )
    info = tfds.core.DatasetInfo(
      builder=identity,
      description=dataset.description,
      features=features(),
      homepage=dataset.homepage or None,
      license=f'{dataset.license}. {dataset.terms}',
      disable_shuffling=True,
    )
    info.set_file_format('array_record')
    info.set_splits(tfds.core.splits.SplitDict([split]))
    info.write_to_directory(aside)
    for file in (prepared.FEATURES, prepared.INFO):
      with open(os.path.join(aside, file), 'rb') as written:
        content = written.read()
      if file == prepared.INFO:
        place.write(LICENSE, f'{dataset.license}\n\n{dataset.terms}\n'.encode())
      place.write(file, content)
