"""Writes safetensors files piece by piece, so that the whole model is never in memory."""

from collections.abc import Callable
import json
import re
from typing import Any, NamedTuple

import numpy as np

from dsr_jax import files
from dsr_jax.convert import sidefiles
from dsr_jax.convert.weights import DTYPE_NAMES, FORMS

SHARD_BYTES = 4 << 30
PIECE_BYTES = 64 << 20
SPARE_BYTES = 64 << 20  # tokenizer, configuration, card
# Files that an export writes in addition to `sidefiles.FILES`.
_FILES = (
  *FORMS[0],
  'config.json',
  'README.md',
  'before_after.png',
  'kept_aside/tensors.safetensors',
  'adapter_model.safetensors',
  'adapter_config.json',
  # of a Show-o
  'pytorch_model.safetensors',
  'vocab.json',
  'merges.txt',
  'magvitv2/config.json',
  'magvitv2/pytorch_model.safetensors',
)
_SHARD = r'model-\d{5}-of-\d{5}\.safetensors'


class Tensor(NamedTuple):
  """A tensor to write. parts(): its pieces along the first axis, in order; dtype: in the file."""

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  parts: Callable[[], list[Any]]

  @property
  def nbytes(self):
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def check_room(directory, tensors):
  """InputError unless the disk of `directory` has room for the tensors."""
  files.check_room(directory, sum(t.nbytes for t in tensors) + SPARE_BYTES)


def is_export(path: str) -> bool:
  """Whether an export writes this path in its target; all other files are the user's."""
  return path in (*sidefiles.FILES, *_FILES) or bool(re.fullmatch(_SHARD, path))


def write(directory, tensors):
  """Writes tensors as one safetensors file, or as shards with an index if they exceed
  `SHARD_BYTES`.
  """
  single, index = FORMS[0]
  shards = _shards(tensors)
  names = (
    [single]
    if len(shards) == 1
    else [f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors' for i in range(len(shards))]
  )
  for name, shard in zip(names, shards):
    write_file(directory / name, shard)
  if len(shards) > 1:
    weight_map = {tensor.name: name for name, shard in zip(names, shards) for tensor in shard}
    (directory / index).write_text(
      json.dumps(
        dict(
          metadata=dict(total_size=sum(t.nbytes for t in tensors)),
          weight_map=dict(sorted(weight_map.items())),
        ),
        indent=2,
      )
      + '\n',
      encoding='utf-8',
    )


def write_file(path, tensors):
  """Writes one safetensors file."""
  tensors = sorted(tensors, key=lambda t: -t.dtype.itemsize)  # stable; aligns every tensor
  # transformers refuses files without `format`.
  header, offset = {'__metadata__': {'format': 'pt'}}, 0
  for tensor in tensors:
    header[tensor.name] = dict(
      dtype=DTYPE_NAMES[tensor.dtype],
      shape=list(tensor.shape),
      data_offsets=[offset, offset + tensor.nbytes],
    )
    offset += tensor.nbytes
  header = json.dumps(header, separators=(',', ':')).encode()
  header += b' ' * (-len(header) % 8)
  with open(path, 'wb') as f:
    f.write(len(header).to_bytes(8, 'little') + header)
    for tensor in tensors:
      before = f.tell()
      for part in tensor.parts():
        _write_array(f, part, tensor.dtype)
      assert f.tell() - before == tensor.nbytes, tensor.name


def _write_array(f, array, dtype):
  """Writes the row-major bytes of an array (NumPy or JAX), cast piece by piece."""
  array = np.asarray(array)
  row = max(1, int(np.prod(array.shape[1:], dtype=np.int64)) * dtype.itemsize)
  rows = max(1, PIECE_BYTES // row)
  for first in range(0, array.shape[0], rows):
    piece = np.ascontiguousarray(array[first : first + rows].astype(dtype, copy=False))
    f.write(piece.reshape(-1).view(np.uint8).data)


def _shards(tensors):
  shards, size = [[]], 0
  for tensor in tensors:
    if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
      shards.append([])
      size = 0
    shards[-1].append(tensor)
    size += tensor.nbytes
  return shards
