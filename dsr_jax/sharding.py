"""The mesh and all shardings: the only module that names mesh axes.

Axes of the mesh: `data` replicates, `fsdp` splits parameters and inputs, `tp` splits heads, widths
and vocabularies. Inputs (rows) are split over data and fsdp together. In training, a parameter is
split over fsdp and tp; in decoding, it is gathered over fsdp. Call the functions on arrays inside
jit, under `jax.set_mesh`; on one device they do nothing.
"""

import math
import re

import jax
from jax.experimental import mesh_utils, multihost_utils
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from dsr_jax.errors import InputError

AXES = ('data', 'fsdp', 'tp')
ROWS = ('data', 'fsdp')
# Pixels that a device encodes or decodes at once: an image of 384 x 384 needs about 300 MiB of
# temporary memory.
PIXELS_AT_ONCE = {'gpu': 2**20}
PIXELS_AT_ONCE_ELSEWHERE = 2**18

# Parameter shardings for the rules of the families. `..._OUT` splits a kernel's outputs over tp
# (column parallel), `..._IN` its inputs (row parallel). Stacked layers have a leading layer axis,
# which is never split.
TP_OUT = P('fsdp', 'tp')
TP_IN = P('tp', 'fsdp')
STACKED_TP_OUT = P(None, 'fsdp', 'tp')
STACKED_TP_IN = P(None, 'tp', 'fsdp')
FSDP_OUT = P(None, 'fsdp')  # replicated over tp, if the other axis does not divide evenly
FSDP_IN = P('fsdp')
STACKED_TP = P(None, 'tp')  # biases of column-parallel layers
WHOLE = P()

# Rules for every family: adapters, weights of rewards, and vectors are small, so replicate them.
_RULES_BEFORE = ((r'(^|/)(lora|reward_params)/', WHOLE),)
_RULES_AFTER = ((r'(bias|scale)$', WHOLE),)


# The mesh.


def resolve(mesh, devices: int) -> dict[str, int]:
  """`config.Mesh` (sizes of data, fsdp, tp; one may be -1) -> sizes by axis. InputError if they do
  not match the number of devices.
  """
  sizes = [getattr(mesh, axis) for axis in AXES]
  known = math.prod(s for s in sizes if s != -1)
  if devices % known or (-1 not in sizes and known != devices):
    named = ' x '.join('(the rest)' if s == -1 else str(s) for s in sizes)
    raise InputError(
      f'system.mesh data x fsdp x tp = {named} does not fit {devices} '
      f'device{"s" * (devices != 1)}, but only {"a multiple of " * (-1 in sizes)}{known}; change '
      'system.mesh, or set one of its sizes to -1'
    )
  return {axis: devices // known if s == -1 else s for axis, s in zip(AXES, sizes)}


def make_mesh(mesh, devices=None) -> jax.sharding.Mesh:
  """`config.Mesh` -> a mesh of the given devices (None: all). InputError if they do not match."""
  devices = jax.devices() if devices is None else devices
  sizes = resolve(mesh, len(devices))
  # One side of a TPU's torus may hold two axes, such as tp=4 on 8x8; `jax.make_mesh` allows that
  # only on a v5e.
  placed = mesh_utils.create_device_mesh(
    tuple(sizes.values()), devices, allow_split_physical_axes=True
  )
  return jax.sharding.Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def ways(axes) -> int:
  """The number of parts into which inputs are split. axes: sizes of the mesh by axis."""
  return math.prod(axes[axis] for axis in ROWS)


def check_fits(axes, heads: int, chunks: dict[str, int]):
  """InputError unless the attention heads divide evenly over tp, and every chunk of inputs over
  data x fsdp. chunks: {config key: inputs at once}.
  """
  tp, n = axes['tp'], ways(axes)
  if heads % tp:
    raise InputError(
      f'system.mesh.tp is {tp}, but the model has {heads} attention heads; set it to a divisor of '
      f'{heads}'
    )
  for key, rows in chunks.items():
    if rows % n:
      raise InputError(
        f'{rows} inputs of a task are computed at once, which is not a multiple of system.mesh '
        f'data x fsdp = {n}; change {key} or method.inputs_per_step, or use more tp and less fsdp'
      )


# Shardings of a state.


def path_name(path) -> str:
  """A key path of a nested dict as `a/b/0/c`."""
  return '/'.join(str(getattr(k, 'key', getattr(k, 'idx', getattr(k, 'name', k)))) for k in path)


def _layout_of(path, shape, rules):
  """(pattern, sharding) of the first rule that matches a parameter; (None, WHOLE) for scalars."""
  name = path_name(path)
  for pattern, layout in (*_RULES_BEFORE, *rules, *_RULES_AFTER):
    if re.search(pattern, name):
      return pattern, layout
  if shape:
    raise ValueError(f'no sharding rule matches {name} {tuple(shape)}: add one to the family')
  return None, WHOLE


def _fits(spec, shape, mesh):
  return len(spec) <= len(shape) and all(
    a is None or n % mesh.shape[a] == 0 for a, n in zip(spec, shape)
  )


def shardings(state, mesh, rules):
  """The sharding of each array of a state.

  rules: (path pattern, sharding), the first match wins (`Family.sharding_rules`). Optimizer moments
  are sharded like the parameter whose path ends theirs; scalars are replicated.

  Raises:
    InputError: a parameter does not divide evenly over the mesh.
    ValueError: a parameter matches no rule, or a rule of the family matches no parameter.
  """
  used = set()

  def place(path, x):
    pattern, spec = _layout_of(path, x.shape, rules)
    used.add(pattern)
    if not _fits(spec, x.shape, mesh):
      raise InputError(
        f'{path_name(path)} has the size {" x ".join(map(str, x.shape))}, which system.mesh '
        f'{dict(mesh.shape)} cannot divide evenly as {spec}; use smaller fsdp or tp, and more data'
      )
    return NamedSharding(mesh, spec)

  layout = jax.tree_util.tree_map_with_path(place, state)
  unused = [pattern for pattern, _ in rules if pattern not in used]
  if unused:
    raise ValueError(f'sharding rules that match no parameter: {", ".join(unused)}')
  return layout


def whole(mesh) -> NamedSharding:
  """Replicated: a copy on every device."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh, rows: int | None = None) -> NamedSharding:
  """Splits axis 0 over data and fsdp if it divides evenly; otherwise, or for None, replicates."""
  return NamedSharding(mesh, P(ROWS) if rows and rows % ways(mesh.shape) == 0 else P())


def rows_here(mesh, rows: int) -> tuple[int, int]:
  """First and last (exclusive) row on this process's devices."""
  by_device = batch_sharding(mesh, rows).addressable_devices_indices_map((rows,))
  held = [index[0].indices(rows) for index in by_device.values() if index is not None]
  return min(start for start, _, _ in held), max(stop for _, stop, _ in held)


def place_batch(batch, mesh, first: int, rows: int):
  """Places a step's inputs on the mesh. batch: arrays of this process's rows, which begin at row
  `first` of all rows; arrays with less than two axes have no rows and are replicated.
  """

  def put(x):
    if np.ndim(x) < 2:
      return jax.make_array_from_callback(
        np.shape(x), whole(mesh), lambda index: np.asarray(x)[index]
      )

    def here(index):
      return x[slice(*(i - first for i in index[0].indices(rows)[:2]))]

    return jax.make_array_from_callback((rows, *x.shape[1:]), batch_sharding(mesh, rows), here)

  return jax.tree.map(put, batch)


def place(tree, layout):
  """Host arrays -> arrays on the mesh; each process copies only the parts on its own devices. The
  tree and its layout may be any pytrees.

  A leaf with a method `placed` places itself, piece by piece: `convert.load` returns such leaves
  for arrays that are still in files.
  """

  def put(x, where):
    return (
      x.placed(where)
      if hasattr(x, 'placed')
      else jax.make_array_from_callback(x.shape, where, lambda index: x[index])
    )

  return jax.tree.map(put, tree, layout)


def fetch(x) -> np.ndarray:
  """The complete array on this process's host, for any sharding. All processes must call it."""
  if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
    return np.asarray(x)
  return multihost_utils.process_allgather(x, tiled=True)


# Inside jit.


def _mesh():
  """The mesh inside jit, or None with a single device."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.size == 1 else mesh


def _constrain(x, *spec):
  """Constrains the first axes of x to `spec`, where they divide evenly; `...` stands for the axes
  in between.
  """
  mesh = _mesh()
  if mesh is None:
    return x
  if ... in spec:
    at = spec.index(...)
    spec = (*spec[:at], *(None,) * (x.ndim - len(spec) + 1), *spec[at + 1 :])

  def size(axes):
    return math.prod(mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ()))

  fitting = [axes if n % size(axes) == 0 else None for axes, n in zip(spec, x.shape)]
  return jax.lax.with_sharding_constraint(x, P(*fitting))


def split_rows(x):
  """x: (rows, ...), with rows split over data and fsdp, replicated over tp."""
  return _constrain(x, ROWS)


def split_heads(x, stacked: bool = False):
  """x: (rows, heads, ...), with heads split over tp. stacked: x has a leading layer axis."""
  return _constrain(x, *(None,) * stacked, ROWS, 'tp')


def split_vocabulary(x):
  """x: (rows, ..., vocabulary), with the vocabulary split over tp."""
  return _constrain(x, ROWS, ..., 'tp')


def split_params(tree, rules):
  """Parameters or gradients in the training sharding."""

  def training(layout):
    return layout

  return _constrain_params(tree, rules, training)


def gather_for_rollout(params, rules):
  """Parameters in the decoding sharding: gathered over fsdp once and still split over tp, so that
  no decode step gathers weights.
  """

  def gathered(layout):
    return P(*('tp' if axis == 'tp' else None for axis in layout))

  return _constrain_params(params, rules, gathered)


def _constrain_params(tree, rules, change):
  mesh = _mesh()
  if mesh is None:
    return tree

  def constrain(path, x):
    _, layout = _layout_of(path, x.shape, rules)
    return jax.lax.with_sharding_constraint(x, change(layout))

  return jax.tree_util.tree_map_with_path(constrain, tree)


def keep_whole(x):
  """Replicates x on every device; for small arrays that are read at every token."""
  return _constrain(x, *(None,) * x.ndim)


def look_up(table, ids):
  """table (V, D) at ids (rows, ...) -> (rows, ..., D). If V is split, each device looks up its own
  part, and one sum joins the parts.
  """
  mesh = _mesh()
  if mesh is None or mesh.shape['tp'] == 1:
    return table[ids]
  rows = P(ROWS) if ids.ndim > 1 and ids.shape[0] % ways(mesh.shape) == 0 else P()

  def local(table, ids):
    place = ids - jax.lax.axis_index('tp') * table.shape[0]
    here = (place >= 0) & (place < table.shape[0])
    return jax.lax.psum(
      jnp.where(here[..., None], table[jnp.clip(place, 0, table.shape[0] - 1)], 0), 'tp'
    )

  return jax.shard_map(local, in_specs=(P('tp'), rows), out_specs=rows)(table, ids)


def pick(x, index):
  """x (..., V) at index (...) -> (...). If the vocabulary is split, this is a masked sum, because
  indexing would gather it.
  """
  mesh = _mesh()
  if mesh is None or mesh.shape['tp'] == 1:
    return jnp.take_along_axis(x, index[..., None], axis=-1)[..., 0]
  return jnp.sum(jnp.where(jnp.arange(x.shape[-1]) == index[..., None], x, 0), axis=-1)


def pick_each(x, index):
  """x (R, T, V) at index (R, C, T) -> (R, C, T): several entries of each distribution."""
  mesh = _mesh()
  if mesh is None or mesh.shape['tp'] == 1:
    return jnp.moveaxis(jnp.take_along_axis(x, jnp.moveaxis(index, 1, 2), axis=-1), 2, 1)
  return pick(x[:, None], index)


def by_rows_and_heads(fn, arrays, heads, out_heads):
  """Computes fn(*arrays) with each device on its own rows and heads.

  arrays: (rows, ...) and scalars. heads, out_heads: the head axis of each array and of each result,
  or None if it has none.
  """
  mesh = _mesh()
  if mesh is None:
    return fn(*arrays)
  rows, count = arrays[0].shape[0], arrays[0].shape[heads[0]]
  first = ROWS if rows % ways(mesh.shape) == 0 else None
  tp = 'tp' if count % mesh.shape['tp'] == 0 else None

  def spec(axis):
    return P(first) if axis is None else P(first, *(None,) * (axis - 1), tp)

  given = tuple(spec(axis) if jnp.ndim(x) else P() for x, axis in zip(arrays, heads))
  return jax.shard_map(fn, in_specs=given, out_specs=tuple(map(spec, out_heads)), check_vma=False)(
    *arrays
  )


def over_pictures(fn, params, x, pixels: int):
  """Computes fn(params, x) for x (images, ...), with the images split over all axes of the mesh
  and processed a few at a time.

  params: replicated. pixels: number of pixels per image. fn must treat each image separately.
  """
  chunk = max(PIXELS_AT_ONCE.get(jax.default_backend(), PIXELS_AT_ONCE_ELSEWHERE) // pixels, 1)

  def run(params, x):
    rows = x.shape[0]
    count = next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= chunk)
    if count == 1:
      return fn(params, x)
    out = jax.lax.map(lambda part: fn(params, part), x.reshape(count, rows // count, *x.shape[1:]))
    return jax.tree.map(lambda y: y.reshape(rows, *y.shape[2:]), out)

  mesh = _mesh()

  def size(axes):
    return math.prod(mesh.shape[a] for a in axes)

  axes = (
    () if mesh is None else next(axes for axes in (AXES, ROWS, ()) if x.shape[0] % size(axes) == 0)
  )
  if not axes:
    return run(params, x)
  return jax.shard_map(run, in_specs=(P(), P(axes)), out_specs=P(axes))(params, x)
