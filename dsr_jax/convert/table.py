"""Maps checkpoint tensors to our parameter leaves: one table of foreign names per layout.

The last name of a leaf and its rank determine its memory layout, so the tables list only modules:

  ours                      torch                        change
  kernel (in, out)          weight (out, in)             transposed
  kernel (kh, kw, in, out)  weight (out, in, kh, kw)     transposed
  scale, embedding          weight                       none
  bias                      bias                         none

We stack transformer layers on axis 0; checkpoints store them as separate tensors. One layer of one
leaf, in torch's orientation, is an atom. Every layout consists of the same atoms, one per tensor or
several side by side, so converting between layouts changes no number.

Sources: the names of deepseek-ai/Janus (janus/models/*.py) and of transformers' modeling_janus.py.
"""

import re
from typing import NamedTuple

import jax
import numpy as np

# Rows: our module path, the foreign path, and optionally a special case. The first pattern that
# matches the whole path wins. {layer} is the index on the stacked axis; other braces are groups of
# the pattern. The special case is an int (the tensor holds several modules side by side on axis 0,
# and this one has that index) or BARE (the name ends there, and there is a leading axis of 1).
BARE = 'bare'

HUGGING_FACE = (
  (r'language_model/layers/(?P<rest>.+)', 'model.language_model.layers.{layer}.{rest}'),
  (r'lm_head', 'lm_head'),
  (
    r'vision_model/(?P<rest>patch_embedding|position_embedding)',
    'model.vision_model.embeddings.{rest}',
  ),
  (r'vision_model/layers/(?P<rest>.+)', 'model.vision_model.encoder.layers.{layer}.{rest}'),
  (r'(?P<rest>aligner|generation_aligner)/hidden_layer', 'model.{rest}.hidden_layers.0'),
  (r'vqmodel/quantize', 'model.vqmodel.quantize.embedding'),
  (
    r'(?P<rest>(language_model|vision_model|aligner|generation_aligner|generation_embeddings|generation_head|vqmodel)'
    r'(/.+)?)',
    'model.{rest}',
  ),
)

_TOWER = 'vision_model.vision_tower'
_CODER = r'vqmodel/(?P<side>encoder|decoder)'
DEEPSEEK = (
  (r'language_model/layers/(?P<rest>.+)', 'language_model.model.layers.{layer}.{rest}'),
  (r'language_model/(?P<rest>.+)', 'language_model.model.{rest}'),
  (r'lm_head', 'language_model.lm_head'),
  (r'vision_model/patch_embedding', f'{_TOWER}.patch_embed.proj'),
  (r'vision_model/position_embedding', f'{_TOWER}.pos_embed', BARE),
  (r'vision_model/layers/self_attn/q_proj', f'{_TOWER}.blocks.{{layer}}.attn.qkv', 0),
  (r'vision_model/layers/self_attn/k_proj', f'{_TOWER}.blocks.{{layer}}.attn.qkv', 1),
  (r'vision_model/layers/self_attn/v_proj', f'{_TOWER}.blocks.{{layer}}.attn.qkv', 2),
  (r'vision_model/layers/self_attn/projection_layer', f'{_TOWER}.blocks.{{layer}}.attn.proj'),
  (r'vision_model/layers/layer_(?P<rest>norm[12])', f'{_TOWER}.blocks.{{layer}}.{{rest}}'),
  (r'vision_model/layers/(?P<rest>mlp/fc[12])', f'{_TOWER}.blocks.{{layer}}.{{rest}}'),
  (r'vision_model/post_layernorm', f'{_TOWER}.norm'),
  (r'aligner/fc1', 'aligner.layers.0'),
  (r'aligner/hidden_layer', 'aligner.layers.2'),
  (r'generation_aligner/fc1', 'gen_aligner.layers.0'),
  (r'generation_aligner/hidden_layer', 'gen_aligner.layers.2'),
  (r'generation_embeddings', 'gen_embed'),
  (r'generation_head/proj_out', 'gen_head.output_mlp_projector'),
  (r'generation_head/vision_head', 'gen_head.vision_head'),
  (r'vqmodel/quantize', 'gen_vision_model.quantize.embedding'),
  (
    _CODER + r'/(down|up)/(?P<level>\d+)/block/(?P<rest>.+)',
    'gen_vision_model.{side}.conv_blocks.{level}.res.{rest}',
  ),
  (_CODER + r'/(down|up)/(?P<rest>.+)', 'gen_vision_model.{side}.conv_blocks.{rest}'),
  (_CODER + r'/mid/block_1/(?P<rest>.+)', 'gen_vision_model.{side}.mid.0.{rest}'),
  (_CODER + r'/mid/attn_1/(?P<rest>.+)', 'gen_vision_model.{side}.mid.1.{rest}'),
  (_CODER + r'/mid/block_2/(?P<rest>.+)', 'gen_vision_model.{side}.mid.2.{rest}'),
  (r'vqmodel/(?P<rest>.+)', 'gen_vision_model.{rest}'),
)

# Show-o: names that begin with `showo.` are in its own file, the others in showlab/magvitv2.
SHOWO = (
  (r'language_model/layers/(?P<rest>.+)', 'showo.model.layers.{layer}.{rest}'),
  (r'language_model/norm', 'showo.model.final_layernorm'),
  (r'language_model/(?P<rest>.+)', 'showo.model.{rest}'),
  (r'lm_head', 'showo.lm_head'),
  (r'vqmodel/(?P<rest>.+)', '{rest}'),
)

LAYOUTS = {'hf': HUGGING_FACE, 'deepseek': DEEPSEEK, 'showo': SHOWO}
# The text embedding and the text head, by layout: if a file has no head and the config ties the
# two, the embedding serves as both.
EMBED = {
  'hf': 'model.language_model.embed_tokens.weight',
  'deepseek': 'language_model.model.embed_tokens.weight',
}
HEAD = {'hf': 'lm_head.weight', 'deepseek': 'language_model.lm_head.weight'}

USAGE_COUNTS = 65536  # length of the usage statistics, for any codebook size

_STACKED = re.compile(r'(language_model|vision_model)/layers/')
_LEAVES = dict(kernel='weight', scale='weight', embedding='weight', bias='bias')
_TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}  # of kernels, by rank
_FROM_TORCH = {2: (1, 0), 4: (2, 3, 1, 0)}


class Atom(NamedTuple):
  """One layer of one leaf, in torch's orientation.

  leaf: index in `jax.tree.leaves` order; layer: index on its stacked axis, or None; shape: torch's.
  """

  leaf: int
  layer: int | None
  shape: tuple[int, ...]
  kernel: bool

  def of_leaf(self, value):
    """Our leaf -> this atom, a view."""
    value = value if self.layer is None else value[self.layer]
    return value.transpose(_TO_TORCH[value.ndim]) if self.kernel else value

  def as_leaf(self, value):
    """This atom -> our leaf, or one layer of it, a view."""
    return value.transpose(_FROM_TORCH[value.ndim]) if self.kernel else value


class Entry(NamedTuple):
  """One tensor of a checkpoint: its atoms, side by side on axis 0 of `shape` (after the leading
  axis of 1, if there is one).
  """

  name: str
  shape: tuple[int, ...]
  atoms: tuple[Atom, ...]

  def split(self, value):
    """This tensor -> its atoms, as views."""
    if len(self.atoms) == 1:
      return [value.reshape(self.atoms[0].shape)]
    ends = np.cumsum([atom.shape[0] for atom in self.atoms])
    return [value[end - atom.shape[0] : end] for atom, end in zip(self.atoms, ends)]


def entries(params, layout='hf'):
  """All tensors of a checkpoint in a layout, in the order of the tree `params`, which holds
  parameters or shapes.
  """
  table, parts, bare = LAYOUTS[layout], {}, set()
  for leaf, (path, value) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
    *module, last = [str(key.key) for key in path]
    module, kernel = '/'.join(module), last == 'kernel'
    stacked = _STACKED.match(module)
    shape = value.shape[1:] if stacked else value.shape
    shape = tuple(shape[axis] for axis in _TO_TORCH[len(shape)]) if kernel else tuple(shape)
    for layer in range(value.shape[0]) if stacked else [None]:
      name, special = _foreign(module, table, layer)
      if special == BARE:
        bare.add(name)
      else:
        name = f'{name}.{_LEAVES[last]}'
      place = special if isinstance(special, int) else 0
      assert place not in parts.setdefault(name, {}), f'two leaves share the tensor {name}'
      parts[name][place] = Atom(leaf, layer, shape, kernel)
  return [
    _entry(name, tuple(atoms[i] for i in sorted(atoms)), name in bare)
    for name, atoms in parts.items()
  ]


def _entry(name, atoms, bare):
  rows = sum(atom.shape[0] for atom in atoms)
  return Entry(name, ((1,) if bare else ()) + (rows, *atoms[0].shape[1:]), atoms)


def _foreign(module, table, layer):
  for pattern, template, *special in table:
    if match := re.fullmatch(pattern, module):
      groups = {key: value.replace('/', '.') for key, value in match.groupdict().items() if value}
      return template.format(layer=layer, **groups), special[0] if special else None
  raise KeyError(f'no name for the module {module}')


def unused(vision, layout):
  """Tensors of a layout that no forward pass reads, name -> shape: the vision tower's attention
  pool, and usage statistics.

  They are kept aside when such a checkpoint is read, and restored when one is written. vision: the
  `VisionConfig`.
  """
  if layout != 'deepseek':
    return {}
  w, inner = vision.hidden_size, vision.intermediate_size
  linear = dict(q=(w, w), kv=(2 * w, w), proj=(w, w), norm=(w,))
  linear['mlp.fc1'], linear['mlp.fc2'] = (inner, w), (w, inner)
  shapes = {f'{_TOWER}.attn_pool.latent': (1, 1, w)}
  for name, shape in linear.items():
    shapes[f'{_TOWER}.attn_pool.{name}.weight'] = shape
    shapes[f'{_TOWER}.attn_pool.{name}.bias'] = shape[:1]
  shapes['gen_vision_model.quantize.codebook_used'] = (USAGE_COUNTS,)
  return shapes


NAMED = 20  # mistakes of a kind that an error lists; beyond that, it also gives their number


def mistakes(want, found):
  """All mistakes in a checkpoint, as sentences; empty if it fits.

  Args:
    want: name -> shape.
    found: name -> (shape, dtype name).
  """
  said = []
  missing, extra = sorted(want.keys() - found.keys()), sorted(found.keys() - want.keys())
  if missing:
    said.append(f'{len(missing)} missing: {_listed(missing)}')
  if extra:
    said.append(f'{len(extra)} unknown: {_listed(extra)}')
  shapes = [
    f'{name} {found[name][0]} instead of {want[name]}'
    for name in sorted(want.keys() & found.keys())
    if found[name][0] != want[name]
  ]
  if shapes:
    said.append(f'{len(shapes)} of another shape: {_listed(shapes)}')
  dtypes = [
    f'{name} {found[name][1]}'
    for name in sorted(want.keys() & found.keys())
    if found[name][1] not in ('F32', 'BF16', 'F16', 'F64')
  ]
  if dtypes:
    said.append(f'{len(dtypes)} not floating: {_listed(dtypes)}')
  return said


def _listed(names):
  return ', '.join([*names[:NAMED], *['...'] * (len(names) > NAMED)])
