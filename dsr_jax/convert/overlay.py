"""A run's parameters for the converter: the trained ones from the run, the rest from the model that
it started from.
"""

import jax
import numpy as np

from dsr_jax import families
from dsr_jax.convert import locate as model_source


def reader(stored, trained):
  """A function `table.Atom` -> array. stored: the `Stored` base; trained: see `locate.Located`."""
  if 'lora' in trained:
    return _with_adapters(stored, trained['lora'])
  leaves = jax.tree.leaves(model_source.merged(stored.abstract, trained))

  def of_base(leaf):
    return isinstance(leaf, jax.ShapeDtypeStruct)

  return lambda atom: (
    stored.atom(atom) if of_base(leaves[atom.leaf]) else atom.of_leaf(leaves[atom.leaf])
  )


def _with_adapters(stored, adapters):
  """Kernels with their adapters folded in, in float32, one layer at a time."""
  targets = families.family_of(stored.config).lora_targets
  places = {(*path, 'kernel'): name for name, path in targets.items()}

  def names(path):
    return tuple(str(key.key) for key in path)

  by_index = [
    places.get(names(path)) for path, _ in jax.tree_util.tree_leaves_with_path(stored.abstract)
  ]

  def read(atom):
    name = by_index[atom.leaf]
    if name is None:
      return stored.atom(atom)
    a, b = (np.asarray(adapters[name][x][atom.layer], np.float32) for x in 'ab')
    return stored.atom(atom).astype(np.float32) + (a @ b).T  # a kernel's atom is transposed

  return read
