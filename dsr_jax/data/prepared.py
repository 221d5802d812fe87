"""Prepared image data sets in the TFDS layout with ArrayRecord files: those of `dsr_jax.prepare`,
and COCO 2017 as prepared by TFDS.

    DATA_DIR/coco/1.0.0/                          DATA_DIR/coco/2017/1.1.0/
      dataset_info.json  features.json              the same files, by TFDS
      coco-train.array_record-00000 ...
      prepared.json

They are read without TensorFlow, by index, as the bytes of each image. From a bucket, the needed
shards are first copied to this machine's disk.
"""

from collections.abc import Sequence
import hashlib
import io
import json
import os
import re
import resource
import shutil

from etils import epath

from dsr_jax import cli, images, inputs
from dsr_jax.data import folders, order
from dsr_jax.errors import InputError, first_line

VERSION = '1.0.0'
SPLIT = 'train'
INFO, FEATURES, RECORD = 'dataset_info.json', 'features.json', 'prepared.json'
SHARD = '{name}-{split}.array_record-{index:05d}'
SPARE_BYTES = 256 << 20  # to leave free on the disk that shards are copied to
_NAME = re.compile(r'[a-z][a-z0-9_]*(/[A-Za-z0-9_.]+)?')
_VERSION = re.compile(r'\d+\.\d+\.\d+')


def is_remote(directory: str) -> bool:
  """Whether a folder is in a bucket."""
  return '://' in os.fspath(directory)


def check_reachable(directory: str, name: str):
  """InputError for a bucket that cannot be reached. name: the flag or key."""
  if not is_remote(directory):
    return
  try:
    epath.Path(directory).exists()
  except Exception as e:  # a missing package, or any error of the store's package
    raise InputError(
      f'cannot reach {name}={directory} ({first_line(e)}); gs://BUCKET/FOLDER needs the package '
      'gcsfs and permission to read: fix that, or name a folder'
    ) from e


# Locating a set.


def is_name(name: str) -> bool:
  """Whether this is a valid name for a data set, such as `coco` or `coco/2017`."""
  return _NAME.fullmatch(name) is not None


def locate(name: str, data_dir: str) -> str | None:
  """The folder of a prepared set: the newest version of `name` (for `coco`, also TFDS' coco/2017)
  or None.
  """
  if not is_name(name):
    return None
  for candidate in (name, 'coco/2017') if name == 'coco' else (name,):
    found = _newest(epath.Path(data_dir) / candidate)
    if found:
      return found
  return None


def _newest(folder) -> str | None:
  try:
    versions = [path for path in folder.iterdir() if _VERSION.fullmatch(path.name)]
  except OSError:
    return None
  versions.sort(key=lambda path: [int(part) for part in path.name.split('.')])
  return next((os.fspath(path) for path in reversed(versions) if (path / INFO).exists()), None)


def begun(name: str, data_dir: str) -> dict | None:
  """The notes of an unfinished preparation of a set, or None."""
  record = _read(epath.Path(data_dir) / name / VERSION / RECORD)
  return record if isinstance(record, dict) else None


def _read(path):
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError):
    return None


# A set.


class Prepared:
  """The images of a prepared set, by index, as the bytes of their files.

  Args:
    directory: the folder of one version, with dataset_info.json.
    name: its name in errors and on the terminal.

  Raises InputError if it is not a prepared set, is not ArrayRecord, has no images, or is damaged.
  """

  def __init__(self, directory: str, name: str):
    self._directory, self._name = directory, name
    info = _read(epath.Path(directory) / INFO)
    if not isinstance(info, dict) or not info.get('splits'):
      raise InputError(
        f'{directory}/{INFO} is unreadable or has no splits, unlike what TFDS or dsr_jax.prepare '
        'writes; prepare the set again'
      )
    _check_format(info, directory)
    try:
      splits = {split['name']: split for split in info['splits']}
    except (KeyError, TypeError) as e:
      raise self._damaged(e) from e
    if SPLIT not in splits and len(splits) > 1:
      raise InputError(
        f'{directory} has the splits {", ".join(splits)}, but none called {SPLIT}; name another set'
      )
    self._split = splits.get(SPLIT) or next(iter(splits.values()))
    try:
      self._dataset = info['name']
      self._lengths = [int(n) for n in self._split.get('shardLengths', [])]
      self._files = [self._file(shard) for shard in range(len(self._lengths))]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
      raise self._damaged(e) from e
    self._record = _read(epath.Path(directory) / RECORD)
    self._source = None

  def __len__(self) -> int:
    return sum(self._lengths)

  @property
  def name(self) -> str:
    return self._name

  def open(self, indices: Sequence[int], bad_images: str = 'error', seed: int = 0) -> list[int]:
    """Makes these images readable; returns those that decode.

    `dsr_jax.prepare` has already decoded its own sets. Of other sets, this decodes all images if
    there are at most `folders.DECODED`, else a sample.
    """
    self.connect(indices)
    if self._record is not None:
      return list(indices)
    return self._decoding(list(indices), bad_images, seed)

  def connect(self, indices: Sequence[int]):
    """Makes these images readable; copies their shards if they are in a bucket."""
    import tensorflow_datasets as tfds  # noqa: PLC0415 (takes seconds, and few runs need it)

    directory = self._directory
    needed = self._shards_of(indices)
    if is_remote(directory):
      directory = _copy(directory, needed)
    self._check_shards(directory, needed)
    _allow_files(len(self._lengths))
    try:
      builder = tfds.builder_from_directory(directory)
      features = dict(builder.info.features)
      if not isinstance(features.get('image'), tfds.features.Image):
        raise InputError(
          f'{self._directory} has no images: its features are {", ".join(features)}, and none is '
          'an image feature called image; name another set'
        )
      self._source = builder.as_data_source(
        self._split['name'], decoders={'image': tfds.decode.SkipDecoding()}
      )
    except (OSError, ValueError, KeyError, NotImplementedError, RuntimeError, AttributeError) as e:
      raise self._damaged(e) from e

  def _shards_of(self, indices) -> list[str]:
    """Names of the files that contain the given images."""
    ends, total = [], 0
    for length in self._lengths:
      total += length
      ends.append(total)
    held, shard = set(), 0
    for index in sorted(indices):
      while index >= ends[shard]:
        shard += 1
      held.add(shard)
    return [self._files[shard] for shard in sorted(held)]

  def _file(self, shard):
    template = (
      self._split.get('filepathTemplate') or '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'
    )
    numbers = f'{shard:05d}', f'{len(self._lengths):05d}'
    name = template.format(
      DATASET=self._dataset,
      SPLIT=self._split['name'],
      FILEFORMAT='array_record',
      SHARD_INDEX=numbers[0],
      NUM_SHARDS=numbers[1],
      SHARD_X_OF_Y='-of-'.join(numbers),
    )
    if name != os.path.basename(name):  # it will be written to a cache folder
      raise ValueError(f'{name} is not a file name')
    return name

  def _check_shards(self, directory, needed):
    """InputError unless these files exist with their original sizes."""
    sizes = {}
    if self._record is not None:
      sizes = {self._files[i]: shard['bytes'] for i, shard in enumerate(self._record['shards'])}
    for name in needed:
      path = os.path.join(directory, name)
      try:
        size = os.stat(path).st_size
      except OSError as e:
        raise InputError(
          f'cannot read {path} ({e.strerror}), which should be a shard of {self._name}; prepare '
          'the set again'
        ) from e
      if sizes.get(name, size) != size:
        raise InputError(
          f'{path} has {size} bytes instead of {sizes[name]}; remove {directory} and prepare the '
          'set again'
        )

  def _damaged(self, error) -> InputError:
    return InputError(
      f'cannot read the data set in {self._directory} ({type(error).__name__}: '
      f'{" ".join(str(error).split())[:200]}), which TFDS or dsr_jax.prepare should have written; '
      'prepare it again'
    )

  def _decoding(self, indices, bad_images, seed) -> list[int]:
    tried = indices
    if len(indices) > folders.DECODED:
      tried = [indices[i] for i in order.choice(seed, len(indices), folders.SAMPLED)]
    if len(tried) >= folders.SAMPLED:
      cli.log(f'checking     {len(tried)} of {len(indices)} images of {self._name}')

    def fault(index):
      try:
        name, data = self.read(index)
        images.verify(io.BytesIO(data), name)
      except InputError as e:
        return folders.fault_of(e)
      return ''

    with folders.pool() as pool:
      faults = dict(zip(tried, pool.map(fault, tried)))
    faults = {index: why for index, why in faults.items() if why}
    if not faults:
      return indices
    named = folders.shown_faults({self.read(i)[0]: why for i, why in faults.items()})
    said = f'{len(faults)} of {len(tried)} images of {self._name} that do not decode ({named})'
    if bad_images == 'error' or len(faults) == len(indices):
      raise InputError(
        f'found {said}; prepare the set again, or leave them out with data.bad_images=skip'
      )
    cli.log(f'left out     {said}')
    return [index for index in indices if index not in faults]

  def read(self, index: int) -> tuple[str, bytes]:
    """(its name in errors, the bytes of its file); after `open`, in any thread."""
    name, data = self.read_named(index)
    return f'{name} of {self._name}', data

  def read_named(self, index: int) -> tuple[str, bytes]:
    """(the name of its file, the bytes of its file); after `connect`, in any thread."""
    try:
      example = self._source[index]
    except (OSError, RuntimeError, ValueError, IndexError, KeyError) as e:
      raise self._damaged(e) from e
    name = example.get('file_name', example.get('image/filename', b''))
    return name.decode('utf-8', 'replace') or f'picture {index}', example['image']

  def identity(self, indices: Sequence[int]) -> str:
    """A text that changes if the set or the chosen images change."""
    if self._record is not None:
      whole = self._record['sha256']
    else:
      info = (epath.Path(self._directory) / INFO).read_bytes()
      whole = hashlib.sha256(info).hexdigest()
    chosen = hashlib.sha256(','.join(map(str, indices)).encode()).hexdigest()
    return f'{whole} {len(indices)} {chosen}'


def _check_format(info, directory):
  """InputError if a set has no ArrayRecord files; other formats do not count."""
  formats = (info.get('fileFormat', 'tfrecord'), *info.get('alternativeFileFormats', []))
  if 'array_record' not in formats:
    raise InputError(
      f'{directory} is prepared as {formats[0]}, but only array_record can be read without '
      'TensorFlow; convert it with: tfds convert_format '
      f'--dataset_version_dir={directory} --out_file_format=array_record'
    )


def _allow_files(number):
  """Raises the soft limit of open files if it is low: every shard that is read stays open."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  wanted = number + 512
  if soft != resource.RLIM_INFINITY and soft < wanted:
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


# From a bucket.


def _copy(remote: str, needed: Sequence[str]) -> str:
  """Copies a set's small files and the needed shards to this machine's disk; returns the folder.
  Does not copy a file again if one with its size is there.
  """
  source = epath.Path(remote)
  local = os.path.join(folders.cache_directory(), 'data')
  try:
    small = [name for name in (INFO, FEATURES, RECORD) if (source / name).exists()]
    # A set that was prepared again goes to another folder.
    place = hashlib.sha256(remote.encode())
    for name in small:
      place.update((source / name).read_bytes())
    local = os.path.join(local, place.hexdigest()[:32])
    os.makedirs(local, exist_ok=True)
    sizes = {name: (source / name).stat().length for name in (*small, *needed)}
    missing = [name for name in sizes if _size(os.path.join(local, name)) != sizes[name]]
    _check_room(local, sum(sizes[name] for name in missing), remote)
    if missing:
      cli.log(f'copying      {len(missing)} files of {remote} to {local}')
    for name in missing:
      aside = os.path.join(local, f'{name}.{os.getpid()}.new')
      (source / name).copy(aside, overwrite=True)
      os.replace(aside, os.path.join(local, name))
  except OSError as e:
    raise InputError(
      f'cannot copy {remote} to {local} ({e.strerror or e}); check the bucket and the free space, '
      f'or set {folders.CACHE_VARIABLE} to another folder'
    ) from e
  return local


def _size(path):
  return os.stat(path).st_size if os.path.exists(path) else -1


def _check_room(local, need, remote):
  free = shutil.disk_usage(local).free
  if free < need + SPARE_BYTES:
    raise InputError(
      f'{inputs.shown(local)} has {free >> 20} MiB free, but the shards of {remote} need '
      f'{(need + SPARE_BYTES) >> 20} MiB; free some space, or set {folders.CACHE_VARIABLE} to a '
      'folder on another disk'
    )
