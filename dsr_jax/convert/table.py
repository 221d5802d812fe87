"""Which tensor of a checkpoint is which leaf of ours: the one table of foreign names.

A leaf's last name and its rank say how it is laid out, so the table speaks of modules only:

  ours                      torch                        change
  kernel (in, out)          weight (out, in)             transposed
  kernel (kh, kw, in, out)  weight (out, in, kh, kw)     transposed
  scale, embedding          weight                       none
  bias                      bias                         none

Transformer layers are stacked on axis 0 here and are tensors of their own there.
"""

import re
from typing import NamedTuple

import jax
import numpy as np

# Our module path -> Hugging Face module path; the first pattern that matches the whole path wins. {layer} is the index
# on the stacked axis. A further layout is a further table of this form.
HUGGING_FACE = (
  (r'language_model/layers/(?P<rest>.+)', 'model.language_model.layers.{layer}.{rest}'),
  (r'lm_head', 'lm_head'),
  (r'vision_model/(?P<rest>patch_embedding|position_embedding)', 'model.vision_model.embeddings.{rest}'),
  (r'vision_model/layers/(?P<rest>.+)', 'model.vision_model.encoder.layers.{layer}.{rest}'),
  (r'(?P<rest>aligner|generation_aligner)/hidden_layer', 'model.{rest}.hidden_layers.0'),
  (r'vqmodel/quantize', 'model.vqmodel.quantize.embedding'),
  (r'(?P<rest>(language_model|vision_model|aligner|generation_aligner|generation_embeddings|generation_head|vqmodel)'
   r'(/.+)?)', 'model.{rest}'),
)
EMBED, HEAD = 'model.language_model.embed_tokens.weight', 'lm_head.weight'

_STACKED = re.compile(r'(language_model|vision_model)/layers/')
_LEAVES = dict(kernel='weight', scale='weight', embedding='weight', bias='bias')
_TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}  # of kernels, by rank
_FROM_TORCH = {2: (1, 0), 4: (2, 3, 1, 0)}


class Entry(NamedTuple):
  """One tensor of the checkpoint.

  leaf: place in `jax.tree.leaves` order; layer: index on its stacked axis or None; shape: in the checkpoint.
  """
  name: str
  shape: tuple[int, ...]
  leaf: int
  layer: int | None
  kernel: bool

  def to_torch(self, value):
    """Our leaf -> this tensor."""
    value = value if self.layer is None else value[self.layer]
    return value.transpose(_TO_TORCH[value.ndim]) if self.kernel else value

  def from_torch(self, value):
    """This tensor -> our leaf (of one layer)."""
    return value.transpose(_FROM_TORCH[value.ndim]) if self.kernel else value


def entries(params, table=HUGGING_FACE):
  """All tensors of a checkpoint, for a tree of parameters or of their shapes, in the tree's order."""
  found = []
  for leaf, (path, value) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
    *module, last = [str(key.key) for key in path]
    module, kernel = '/'.join(module), last == 'kernel'
    stacked = _STACKED.match(module)
    shape = value.shape[1:] if stacked else value.shape
    shape = tuple(shape[axis] for axis in _TO_TORCH[len(shape)]) if kernel else tuple(shape)
    for layer in range(value.shape[0]) if stacked else [None]:
      found.append(Entry(f'{_foreign(module, table, layer)}.{_LEAVES[last]}', shape, leaf, layer, kernel))
  assert len({entry.name for entry in found}) == len(found), 'two leaves share a tensor name'
  return found


def _foreign(module, table, layer):
  for pattern, template in table:
    if match := re.fullmatch(pattern, module):
      rest = match.groupdict().get('rest', '').replace('/', '.')
      return template.format(layer=layer, rest=rest)
  raise KeyError(f'no name for the module {module}')


def mistakes(wanted, found):
  """Everything wrong with a checkpoint: sentences, empty if it fits.

  Args:
    wanted: the `entries`.
    found: name -> (shape, dtype name).
  """
  want = {entry.name: entry.shape for entry in wanted}
  said = []
  missing, extra = sorted(want.keys() - found.keys()), sorted(found.keys() - want.keys())
  if missing:
    said.append(f'{len(missing)} missing: {", ".join(missing)}')
  if extra:
    said.append(f'{len(extra)} unknown: {", ".join(extra)}')
  shapes = [f'{name} {found[name][0]} instead of {want[name]}' for name in sorted(want.keys() & found.keys())
            if found[name][0] != want[name]]
  if shapes:
    said.append(f'{len(shapes)} of another shape: {", ".join(shapes)}')
  dtypes = [f'{name} {found[name][1]}' for name in sorted(want.keys() & found.keys())
            if found[name][1] not in ('F32', 'BF16', 'F16', 'F64')]
  if dtypes:
    said.append(f'{len(dtypes)} not floating: {", ".join(dtypes)}')
  return said


def assemble(abstract, wanted, read):
  """The tree of float32 numpy arrays, one tensor in memory beside it.

  Args:
    abstract: tree of shapes.
    wanted: its `entries`.
    read: name -> numpy array of any floating dtype.
  """
  leaves, tree = jax.tree.flatten(abstract)
  out = [np.empty(leaf.shape, np.float32) for leaf in leaves]
  for entry in wanted:
    target = out[entry.leaf] if entry.layer is None else out[entry.leaf][entry.layer]
    target[...] = entry.from_torch(read(entry.name))  # widens bfloat16 and float16
  return jax.tree.unflatten(tree, out)
