"""Reads parameters from stored tensors piece by piece, directly into their final memory.

Beyond the parameters, this needs memory only for the piece being read; mapped pages belong to the
files.
"""

import functools
import math

import jax
import numpy as np

SLAB_BYTES = 128 << 20  # bytes copied at once
_COLUMNS = 64


class Leaf:
  """A float32 leaf of the parameters that is still in files. Indexing, `numpy.asarray` and `placed`
  read it.

  layers: views in our orientation, one per layer of a stacked leaf, or a single view.
  """

  dtype = np.dtype(np.float32)

  def __init__(self, shape, layers, stacked):
    self.shape, self._layers, self._stacked = tuple(shape), layers, stacked

  @property
  def ndim(self):
    return len(self.shape)

  @property
  def size(self):
    return math.prod(self.shape)

  @property
  def nbytes(self):
    return self.size * self.dtype.itemsize

  def __getitem__(self, index):
    """index: slices of step 1, at most one per axis -> a NumPy array."""
    index = index if isinstance(index, tuple) else (index,)
    index = [
      slice(*s.indices(size)[:2])
      for s, size in zip((*index, *[slice(None)] * self.ndim), self.shape)
    ]
    out = np.empty([s.stop - s.start for s in index], self.dtype)
    self._read_into(out, tuple(index))
    return out

  def __array__(self, dtype=None, copy=None):
    del copy  # the result is always a copy
    return self[:].astype(dtype or self.dtype, copy=False)

  def placed(self, sharding):
    """Returns a `jax.Array`. Reads each device's part separately, so a process reads only the parts
    on its own devices.
    """
    parts = [
      self._on_device(
        tuple(slice(*s.indices(size)[:2]) for s, size in zip(index, self.shape)), device
      )
      for device, index in sharding.addressable_devices_indices_map(self.shape).items()
    ]
    return jax.make_array_from_single_device_arrays(self.shape, sharding, parts)

  def _on_device(self, index, device):
    """self[index] on one device, in slabs along axis 0 if it is large."""
    first, end = index[0].start, index[0].stop
    shape = tuple(s.stop - s.start for s in index)
    rows = max(1, SLAB_BYTES // max(1, math.prod(shape[1:]) * self.dtype.itemsize))
    if end - first <= rows:
      return jax.device_put(self[index], device)
    whole = _zeros(shape, jax.sharding.SingleDeviceSharding(device))
    for row in range(first, end, rows):
      slab = jax.device_put(self[(slice(row, min(row + rows, end)), *index[1:])], device)
      whole = _write_slab(whole, slab, row - first)
      whole.block_until_ready()  # otherwise slabs would queue up in memory
    return whole

  def _read_into(self, out, index):
    if not self._stacked:
      _copy(out, self._layers[0][index])
      return
    for place, layer in enumerate(range(index[0].start, index[0].stop)):
      _copy(out[place, ...], self._layers[layer][index[1:]])


def _copy(out, view):
  """out[...] = view, with widening. Copies a transposed matrix in blocks of columns, which is three
  times as fast as a single copy.
  """
  if view.ndim != 2 or view.strides[0] >= view.strides[1]:
    out[...] = view
    return
  for first in range(0, view.shape[1], _COLUMNS):
    block = slice(first, first + _COLUMNS)
    out[:, block] = view[:, block].astype(out.dtype)


def leaves(abstract, wanted, read):
  """A tree of `Leaf`s for a tree of shapes. wanted: its `table.entries`; read: name -> the tensor,
  as a view.
  """
  views = [{} for _ in jax.tree.leaves(abstract)]
  for entry in wanted:
    for atom, value in zip(entry.atoms, entry.split(read(entry.name))):
      views[atom.leaf][atom.layer] = atom.as_leaf(value)
  shapes, tree = jax.tree.flatten(abstract)
  made = []
  for leaf, by_layer in zip(shapes, views):
    stacked = None not in by_layer
    made.append(
      Leaf(
        leaf.shape,
        [by_layer[i] for i in sorted(by_layer)] if stacked else [by_layer[None]],
        stacked,
      )
    )
  return jax.tree.unflatten(tree, made)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _zeros(shape, sharding):
  return jax.lax.with_sharding_constraint(jax.numpy.zeros(shape), sharding)


@functools.partial(jax.jit, donate_argnums=0)
def _write_slab(whole, slab, first):
  return jax.lax.dynamic_update_slice_in_dim(whole, slab, first, axis=0)
