"""Tensors in safetensors files, single or sharded with an index. Pickled files are never opened."""

import contextlib
import hashlib
import json
import pathlib

import numpy as np

from dsr_jax.errors import InputError
from dsr_jax.processor import read_json

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
SHARD_BYTES = 4 << 30


class Checkpoint:
  """The tensors of a directory: `found` maps names to (shape, dtype name); `read(name)` loads one."""

  def __init__(self, directory, stack):
    self.directory = pathlib.Path(directory)
    index = self._index()
    self.files = [self.directory / name for name in (sorted(set(index.values())) if index else [SINGLE])]
    self._check_files()
    self._owner, self.found = {}, {}
    for path in self.files:
      handle = stack.enter_context(_open(path))
      for name in handle.keys():
        if name in self._owner:
          raise InputError(f'found the tensor {name} in two files of {self.directory}; expected one; fetch them again')
        part = handle.get_slice(name)
        self._owner[name] = handle
        self.found[name] = tuple(part.get_shape()), part.get_dtype()
    absent = sorted(index.keys() - self._owner.keys())
    if absent:
      raise InputError(f'found {len(absent)} tensors of {INDEX} in none of its files ({", ".join(absent[:5])} ...); '
                       f'expected all in {self.directory}; fetch the checkpoint again')

  def read(self, name):
    """The tensor as numpy, in the file's dtype."""
    return self._owner[name].get_tensor(name)

  def digest(self):
    """sha256 over the weight files, hexadecimal."""
    digest = hashlib.sha256()
    for path in self.files:
      with open(path, 'rb') as f:
        while block := f.read(1 << 24):
          digest.update(block)
    return digest.hexdigest()

  def _index(self):
    if (self.directory / SINGLE).is_file() or not (self.directory / INDEX).is_file():
      return {}
    index = read_json(self.directory / INDEX).get('weight_map')
    if not isinstance(index, dict) or not index or not all(isinstance(v, str) for v in index.values()):
      raise InputError(f'found no weight_map in {self.directory / INDEX}; expected names and files; fetch it again')
    outside = sorted(name for name in set(index.values()) if pathlib.Path(name).name != name)
    if outside:
      raise InputError(f'found the file name {outside[0]!r} in {self.directory / INDEX}; expected plain file names; '
                       'fetch it again')
    return index

  def _check_files(self):
    missing = [path.name for path in self.files if not path.is_file()]
    if not missing:
      return
    if len(missing) < len(self.files) or missing != [SINGLE]:
      raise InputError(f'found {INDEX} naming {len(self.files)} files, of which {len(missing)} are not in '
                       f'{self.directory} ({", ".join(missing)}); expected all; fetch the missing ones')
    others = sorted(p.name for pattern in ('*.bin', '*.safetensors') for p in self.directory.glob(pattern))
    raise InputError(f'found {"only " + ", ".join(others) if others else "no weights"} in {self.directory}; expected '
                     f'{SINGLE} or {INDEX} with its shards; fetch the whole checkpoint as safetensors')


@contextlib.contextmanager
def open_checkpoint(directory):
  """Context of a `Checkpoint`; its files are memory-mapped while it is open."""
  with contextlib.ExitStack() as stack:
    yield Checkpoint(directory, stack)


def _open(path):
  import ml_dtypes  # registers bfloat16 with numpy, which safetensors asks for  # noqa: F401
  from safetensors import SafetensorError, safe_open
  try:
    return safe_open(str(path), framework='np')
  except (SafetensorError, OSError) as e:
    raise InputError(f'found {path} truncated or damaged ({e}); expected a whole safetensors file; '
                     'fetch it again') from e


def write(directory, wanted, leaves, dtype='float32'):
  """Writes tensors as safetensors, sharded with an index above `SHARD_BYTES`.

  Args:
    directory: where to.
    wanted: the `table.entries`.
    leaves: our arrays, in `jax.tree.leaves` order.
    dtype: 'float32', 'bfloat16' or 'float16', of the files.
  """
  import ml_dtypes
  kinds = dict(float32=np.float32, bfloat16=ml_dtypes.bfloat16, float16=np.float16)
  if dtype not in kinds:
    raise InputError(f'found dtype {dtype!r}; expected one of {sorted(kinds)}; choose one')
  kind = np.dtype(kinds[dtype])
  shards = _shards(wanted, kind.itemsize)
  names = [SINGLE] if len(shards) == 1 else [
    f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors' for i in range(len(shards))]
  for name, shard in zip(names, shards):
    _write_file(directory / name, shard, leaves, kind)
  if len(shards) > 1:
    total = sum(int(np.prod(entry.shape)) for entry in wanted) * kind.itemsize
    weight_map = {entry.name: name for name, shard in zip(names, shards) for entry in shard}
    (directory / INDEX).write_text(json.dumps(dict(
      metadata=dict(total_size=total), weight_map=dict(sorted(weight_map.items()))), indent=2) + '\n')


def _shards(wanted, itemsize):
  shards, size = [[]], 0
  for entry in wanted:
    needed = int(np.prod(entry.shape)) * itemsize
    if shards[-1] and size + needed > SHARD_BYTES:
      shards.append([])
      size = 0
    shards[-1].append(entry)
    size += needed
  return shards


def _write_file(path, shard, leaves, kind):
  from safetensors import SafetensorError
  from safetensors.numpy import save_file
  tensors = {entry.name: np.ascontiguousarray(entry.to_torch(np.asarray(leaves[entry.leaf])).astype(kind))
             for entry in shard}
  try:
    save_file(tensors, path, metadata=dict(format='pt'))  # transformers refuses files without this key
  except SafetensorError as e:  # a full disk comes out of safetensors as its own error
    raise OSError(str(e)) from e
