"""The mesh and where everything lies on it: the only module that names mesh axes.

Axes of the mesh: `data` copies, `fsdp` splits parameters and inputs, `tp` splits heads, widths and vocabularies. Inputs (rows) are
split over data and fsdp together.
"""

import math
import re

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from dsr_jax.errors import InputError

AXES = ('data', 'fsdp', 'tp')

# Path of a parameter -> its layout; first match wins. Stacked layers carry a leading layer axis, which is never split.
RULES = (
    (r'language_model/layers/.*/(q_proj|k_proj|v_proj|gate_proj|up_proj)/kernel$', P(None, 'fsdp', 'tp')),
    (r'language_model/layers/.*/(o_proj|down_proj)/kernel$', P(None, 'tp', 'fsdp')),
    (r'language_model/embed_tokens/embedding$', P('tp', 'fsdp')),
    (r'lm_head/kernel$', P('fsdp', 'tp')),
    (r'generation_head/proj_out/kernel$', P('fsdp', 'tp')),
    (r'generation_head/vision_head/kernel$', P('tp', 'fsdp')),
    (r'(vision_model|vqmodel|aligner|generation_aligner|generation_embeddings)/', P()),  # small, whole everywhere
    (r'(bias|scale)$', P()),
)


def make_mesh(mesh) -> jax.sharding.Mesh:
  """`config.Mesh` (sizes of data, fsdp, tp; one may be -1) -> a mesh of all devices. InputError where they do not match."""
  sizes = [mesh.data, mesh.fsdp, mesh.tp]
  devices = jax.device_count()
  if -1 in sizes:
    known = math.prod(s for s in sizes if s != -1)
    sizes[sizes.index(-1)] = devices // known
  if math.prod(sizes) != devices:
    raise InputError(f'found {devices} device{"s" * (devices != 1)}; expected system.mesh data x fsdp x tp = '
                     f'{" x ".join(map(str, sizes))} = {math.prod(sizes)} of them; change system.mesh, or set one of its sizes to -1')
  return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def path_name(path) -> str:
  """A key path of a nested dict as `a/b/0/c`."""
  return '/'.join(str(getattr(k, 'key', getattr(k, 'idx', getattr(k, 'name', k)))) for k in path)


def shardings(tree, mesh):
  """The layout of each array of a state. Optimizer moments lie as the parameter whose path ends theirs; scalars are whole."""

  def place(path, x):
    name = path_name(path)
    spec = next((spec for pattern, spec in RULES if re.search(pattern, name)), P())
    if len(spec) != len(x.shape):
      spec = P()
    fits = all(axis is None or size % mesh.shape[axis] == 0 for axis, size in zip(spec, x.shape))
    return NamedSharding(mesh, spec if fits else P())

  return jax.tree_util.tree_map_with_path(place, tree)


def batch_sharding(mesh, rows: int | None = None) -> NamedSharding:
  """Axis 0 over data and fsdp where it divides; None or too few rows: whole everywhere."""
  ways = mesh.shape['data'] * mesh.shape['fsdp']
  return NamedSharding(mesh, P(('data', 'fsdp')) if rows and rows % ways == 0 else P())


def split_rows(x):
  """Inside jit: constrains axis 0 to be split over data and fsdp where it divides."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  ways = mesh.shape['data'] * mesh.shape['fsdp']
  return jax.lax.with_sharding_constraint(x, P(('data', 'fsdp'))) if x.shape[0] % ways == 0 else x


def gather_for_rollout(params):
  """Inside jit: the layout for decoding. Gathered over fsdp once, kept split over tp, so that no decode step gathers weights."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return params

  def place(path, x):
    name = path_name(path)
    spec = next((spec for pattern, spec in RULES if re.search(pattern, name)), P())
    spec = P(*('tp' if axis == 'tp' else None for axis in spec))
    fits = len(spec) <= x.ndim and all(a is None or n % mesh.shape[a] == 0 for a, n in zip(spec, x.shape))
    return jax.lax.with_sharding_constraint(x, spec if fits else P())

  return jax.tree_util.tree_map_with_path(place, params)
