"""Tensors of a checkpoint as views of its files: safetensors or torch's .bin, single or sharded
with an index.

Files are memory-mapped, so a tensor uses memory only while its pages are read, and those belong to
the file. Torch reads pickled files with `weights_only=True`, so no code in them runs.
"""

import hashlib
import json
import pathlib
import pickle

import ml_dtypes  # registers bfloat16 with NumPy
import numpy as np
from safetensors import SafetensorError, safe_open

from dsr_jax import files
from dsr_jax.errors import InputError, first_line

# (single file, index of shards); the first form found in a directory is read.
FORMS = (
  ('model.safetensors', 'model.safetensors.index.json'),
  ('pytorch_model.bin', 'pytorch_model.bin.index.json'),
)
DTYPES = dict(
  F64=np.float64,
  F32=np.float32,
  F16=np.float16,
  BF16=ml_dtypes.bfloat16,
  I64=np.int64,
  I32=np.int32,
  I16=np.int16,
  I8=np.int8,
  U8=np.uint8,
  BOOL=np.bool_,
)
_BLOCK = 1 << 18  # numbers checked at once
DTYPE_NAMES = {np.dtype(kind): name for name, kind in DTYPES.items()}


class Checkpoint:
  """The tensors of a directory. found: name -> (shape, dtype name); read(name): the tensor, as a
  view in the file's dtype.
  """

  def __init__(self, directory, forms=FORMS):
    self.directory, self._forms = pathlib.Path(directory), forms
    single, index_name = self._form()
    index = {} if (self.directory / single).is_file() else self._index(index_name)
    self.files = [
      self.directory / name for name in (sorted(set(index.values())) if index else [single])
    ]
    self._check_files(index_name)
    self._tensors, self.found = {}, {}
    for path in self.files:
      for name, (found, value) in read_file(path).items():
        if name in self._tensors:
          raise InputError(
            f'the tensor {name} is in two files of {self.directory}; fetch them again'
          )
        self._tensors[name], self.found[name] = value, found
    absent = sorted(index.keys() - self._tensors.keys())
    if absent:
      raise InputError(
        f'{len(absent)} tensors of {index_name} are in none of its files ({", ".join(absent[:5])}'
        f'{" ..." * (len(absent) > 5)}); fetch the checkpoint in {self.directory} again'
      )

  def read(self, name):
    """The tensor as a NumPy view of the file, in the file's dtype. Do not write to it."""
    return self._tensors[name]

  def check_finite(self, names):
    """Reads the named tensors. InputError naming those with a NaN or an infinity."""
    bad = [name for name in names if not is_finite(self._tensors[name])]
    if bad:
      raise InputError(
        f'some numbers are not finite in {self.directory}: in {", ".join(bad[:5])}'
        f'{f" and {len(bad) - 5} more" * (len(bad) > 5)} of {len(self.found)} tensors; fetch the '
        'weights again, or save them again from before they diverged'
      )

  def digest(self):
    """sha256 over the weight files, hexadecimal."""
    digest = hashlib.sha256()
    for path in self.files:
      with open(path, 'rb') as f:
        while block := f.read(1 << 24):
          digest.update(block)
    return digest.hexdigest()

  def _form(self):
    for form in self._forms:
      if any((self.directory / name).is_file() for name in form):
        return form
    others = sorted(
      p.name
      for pattern in ('*.bin', '*.safetensors', '*.pt', '*.pth', '*.gguf')
      for p in self.directory.glob(pattern)
    )
    raise InputError(
      f'{self.directory} has {"only " + ", ".join(others) if others else "no weights"}; fetch the '
      f'whole checkpoint: {self._forms[0][0]} or {self._forms[1][0]}, or shards with their index'
    )

  def _index(self, name):
    index = files.read_json(self.directory / name).get('weight_map')
    if (
      not isinstance(index, dict)
      or not index
      or not all(isinstance(v, str) for v in index.values())
    ):
      raise InputError(
        f'{self.directory / name} has no weight_map with names and files; fetch it again'
      )
    outside = sorted(file for file in set(index.values()) if pathlib.Path(file).name != file)
    if outside:
      raise InputError(
        f'{self.directory / name} names the file {outside[0]!r}, but only plain file names are '
        'allowed; fetch it again'
      )
    return index

  def _check_files(self, index_name):
    missing = [path.name for path in self.files if not path.is_file()]
    if missing:
      raise InputError(
        f'{index_name} names {len(self.files)} files, of which {len(missing)} are not in '
        f'{self.directory} ({", ".join(missing)}); fetch the missing ones'
      )


def is_finite(value) -> bool:
  """Whether all numbers of an array are finite in float32; checks block by block."""
  flat = value.reshape(-1)
  return all(_is_finite(flat[first : first + _BLOCK]) for first in range(0, flat.size, _BLOCK))


def _is_finite(block) -> bool:
  if block.dtype == np.float64:
    return bool(np.all(np.abs(block) <= np.finfo(np.float32).max))  # False for NaN
  # As integers, infinity follows the largest finite number, and NaNs follow infinity. Comparing
  # integers is faster than isfinite, for bfloat16 by far.
  bits = block.view(f'u{block.dtype.itemsize}')
  infinity = np.array(np.inf, block.dtype).view(bits.dtype)
  return bool(np.max(bits & ~np.array(-0.0, block.dtype).view(bits.dtype)) < infinity)


def read_file(path):
  """A weight file -> name -> ((shape, dtype name), NumPy view of the file)."""
  files.check_no_pointer(path)
  return _read_bin(path) if path.suffix == '.bin' else _read_safetensors(path)


def _read_safetensors(path):
  try:
    with safe_open(str(path), framework='np'):
      pass  # safetensors checks the header, the offsets and the length of the file
  except (SafetensorError, OSError) as e:
    raise InputError(
      f'{path} is truncated or damaged ({first_line(e)}); fetch the whole safetensors file again'
    ) from e
  with open(path, 'rb') as f:
    size = int.from_bytes(f.read(8), 'little')
    header = json.loads(f.read(size))
  empty = path.stat().st_size == 8 + size  # nothing to map
  data = np.empty(0, np.uint8) if empty else np.asarray(np.memmap(path, np.uint8, 'r'))[8 + size :]
  header.pop('__metadata__', None)
  tensors = {}
  for name, info in header.items():
    shape, (first, end) = tuple(info['shape']), info['data_offsets']
    kind = DTYPES.get(info['dtype'])  # other dtypes are not read but reported as mistakes
    value = None if kind is None else data[first:end].view(kind).reshape(shape)
    tensors[name] = (shape, info['dtype']), value
  return tensors


def _read_bin(path):
  try:
    import torch  # noqa: PLC0415  (only .bin files need it)
  except ImportError as e:
    raise InputError(
      f'{path.name} is a file of torch, and torch is not installed; pip install "dsr_jax[torch]", '
      'or fetch the checkpoint as safetensors'
    ) from e
  try:
    content = torch.load(path, map_location='cpu', mmap=True, weights_only=True)
  except pickle.UnpicklingError as e:
    raise InputError(
      f'{path} is damaged, or has more than tensors in its state dict ({first_line(e)}); nothing '
      'in it was run: fetch the checkpoint from its source again, or as safetensors'
    ) from e
  except (RuntimeError, OSError, EOFError, ValueError, KeyError) as e:
    raise InputError(
      f'{path} is truncated, damaged or from a torch before 1.6 ({first_line(e)}); fetch the file '
      'of torch.save again'
    ) from e
  if not isinstance(content, dict) or not all(
    isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
  ):
    raise InputError(
      f"{path} has no plain state dict of names and tensors; save the model's state_dict()"
    )
  return {name: _from_torch(value) for name, value in content.items()}


def _from_torch(tensor):
  """torch tensor -> ((shape, dtype name), NumPy view)."""
  import torch  # noqa: PLC0415  (only .bin files need it)

  tensor = tensor.detach()
  if tensor.dtype == torch.bfloat16:
    value = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
  elif str(tensor.dtype).startswith('torch.float8') or tensor.is_quantized:
    return (tuple(tensor.shape), str(tensor.dtype)), None
  else:
    value = tensor.numpy()
  return (tuple(value.shape), DTYPE_NAMES.get(value.dtype, str(value.dtype))), value
