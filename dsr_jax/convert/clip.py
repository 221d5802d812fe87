"""Reads and writes CLIP directories in the Hugging Face layout. Leaves have the layout described in
`table`; this module has the names.
"""

import functools
import json
import pathlib
import re
import shutil

import jax
import numpy as np
from safetensors.numpy import save_file
from transformers import AutoTokenizer

from dsr_jax import files
from dsr_jax.convert import configs, weights
from dsr_jax.convert.configs import MOST, shown, whole
from dsr_jax.errors import InputError, first_line
from dsr_jax.models import clip

# Our module path -> their path; the first pattern that matches the whole path wins. {layer} is the
# index on the stacked axis.
NAMES = (
  (
    r'(?P<tower>text_model|vision_model)/layers/(?P<rest>.+)',
    '{tower}.encoder.layers.{layer}.{rest}',
  ),
  (r'(?P<tower>text_model|vision_model)/(?P<rest>\w+_embedding)', '{tower}.embeddings.{rest}'),
  (
    r'(?P<tower>text_model|vision_model|text_projection|visual_projection|logit_scale)(/(?P<rest>.+))?',
    '{tower}.{rest}',
  ),
)
IGNORED = (
  'text_model.embeddings.position_ids',
  'vision_model.embeddings.position_ids',
)  # 0, 1, 2 ... in older files
_LEAVES = dict(kernel='weight', scale='weight', embedding='weight', bias='bias')
_TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}
_FROM_TORCH = {2: (1, 0), 4: (2, 3, 1, 0)}


def _eos_id(text) -> int:
  """The EOS id. 0 is valid; some configurations have an id beyond the vocabulary, which never
  occurs in a text.
  """
  found = text['eos_token_id']
  if type(found) is not int or not 0 <= found <= MOST['vocab_size']:
    raise InputError(
      f'text_config.eos_token_id in config.json is {shown(found)}, not a whole number from 0 to '
      f'{MOST["vocab_size"]:,}; fetch the file again'
    )
  return found


@functools.lru_cache(maxsize=4)
def read_config(directory) -> clip.ClipConfig:
  """config.json and preprocessor_config.json -> `ClipConfig`. InputError if it is not a CLIP."""
  directory = pathlib.Path(directory)
  if not directory.is_dir():
    raise InputError(
      f'there is no directory {directory}; set method.clip_reward.model to a CLIPModel in the '
      'Hugging Face layout'
    )
  content = files.read_json(directory / 'config.json')
  if content.get('model_type') != 'clip':
    raise InputError(
      f'{directory} has a model of type {content.get("model_type")!r}, not clip; set '
      'method.clip_reward.model to a CLIPModel in the Hugging Face layout'
    )
  # Use transformers' defaults: published files omit values that equal them.
  text = dict(
    vocab_size=49408,
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=8,
    max_position_embeddings=77,
    eos_token_id=49407,
  ) | configs.object_in(content, 'text_config')
  vision = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    image_size=224,
    patch_size=32,
  ) | configs.object_in(content, 'vision_config')
  # transformers 5 writes it as a section of processor_config.json
  settings = files.read_json(directory / 'preprocessor_config.json', default={})
  if not settings:
    processor = files.read_json(directory / 'processor_config.json', default={})
    settings = configs.object_in(processor, 'image_processor')
  default = clip.ClipConfig.__dataclass_fields__
  return clip.ClipConfig(
    text=_tower(text, 'text_config'),
    vision=_tower(vision, 'vision_config'),
    projection_dim=whole(content.get('projection_dim') or 512, 'hidden_size', '', 'projection_dim'),
    vocab_size=whole(text['vocab_size'], 'vocab_size', 'text_config'),
    max_positions=whole(text['max_position_embeddings'], 'max_position_embeddings', 'text_config'),
    eos_id=_eos_id(text),
    image_size=whole(vision['image_size'], 'image_size', 'vision_config'),
    patch_size=whole(vision['patch_size'], 'patch_size', 'vision_config'),
    mean=_three(settings.get('image_mean') or default['mean'].default, 'image_mean'),
    std=_three(settings.get('image_std') or default['std'].default, 'image_std'),
  )


def _three(value, key):
  """Checks a list of one number per color channel."""
  fine = isinstance(value, (list, tuple)) and len(value) == 3
  if not fine or not all(type(x) in (int, float) and abs(x) < 1e6 for x in value):
    raise InputError(
      f'{key} in the processor of a CLIP is {configs.shown(value)}, not three numbers; fetch the '
      'file again'
    )
  return tuple(value)


def _tower(section, name):
  act = section.get('hidden_act', 'quick_gelu')
  if act not in ('quick_gelu', 'gelu'):
    raise InputError(
      f'hidden_act of a CLIP is {configs.shown(act)}; use a CLIP with quick_gelu or gelu'
    )
  sizes = ('hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads')
  return clip.TowerConfig(
    *(whole(section[key], key, name) for key in sizes),
    act=act,
    layer_norm_eps=configs.above_zero(
      section.get('layer_norm_eps') or 1e-5, 'layer_norm_eps', name
    ),
  )


def load(directory):
  """Parameters of a CLIP: nested dict of float32 NumPy arrays. InputError naming every wrong
  tensor.
  """
  abstract = jax.eval_shape(lambda: clip.create(read_config(directory)))
  checkpoint = weights.Checkpoint(directory)
  wanted = _entries(abstract)
  found = {name: shape for name, (shape, _) in checkpoint.found.items() if name not in IGNORED}
  want = {name: shape for name, shape, _, _ in wanted}
  wrong = [f'missing {name}' for name in sorted(want.keys() - found.keys())]
  wrong += [f'unknown {name}' for name in sorted(found.keys() - want.keys())]
  wrong += [
    f'{name} {found[name]} instead of {want[name]}'
    for name in sorted(want.keys() & found.keys())
    if found[name] != want[name]
  ]
  if wrong:
    raise InputError(
      f'the tensors in {directory} do not fit its config.json: {"; ".join(wrong)}; fetch the '
      'weights and config.json of one CLIPModel'
    )
  leaves, tree = jax.tree.flatten(jax.tree.map(lambda x: np.empty(x.shape, np.float32), abstract))
  kernels = _kernels(abstract)
  for name, _, leaf, layer in wanted:
    value, target = checkpoint.read(name), leaves[leaf]
    value = value.transpose(_FROM_TORCH[value.ndim]) if kernels[leaf] else value
    target[... if layer is None else layer] = value
  checkpoint.check_finite(name for name, _, _, _ in wanted)
  return jax.tree.unflatten(tree, leaves)


def digest(directory) -> str:
  """sha256 over the weight files, hexadecimal."""
  return weights.Checkpoint(directory).digest()


def encode(directory, texts) -> np.ndarray:
  """Texts -> ids (B, T) int32 from the CLIP's own tokenizer, with T the model's length."""
  return encode_texts(_tokenizer(str(directory)), texts, read_config(directory).max_positions)


def encode_texts(tokenizer, texts, length: int) -> np.ndarray:
  """Texts -> ids (B, length) int32, each ended and padded with EOS; truncates longer texts, as
  CLIP's processor does.
  """
  eos = tokenizer.eos_token_id
  out = np.full((len(texts), length), eos, np.int32)
  for row, text in zip(out, texts):
    ids = [i for i in tokenizer.encode(text) if i != eos][: length - 1]
    row[: len(ids)] = ids
  return out


@functools.lru_cache(maxsize=4)
def _tokenizer(directory):
  try:
    return AutoTokenizer.from_pretrained(directory)
  except (OSError, ValueError) as e:
    raise InputError(
      f'{directory} has no tokenizer ({first_line(e)}); fetch the tokenizer files of a CLIPModel'
    ) from e


def save(directory, config: clip.ClipConfig, params, tokenizer_dir):
  """Writes a CLIP directory, with the tokenizer of another model directory."""
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  leaves = [np.asarray(x) for x in jax.tree.leaves(params)]
  kernels = _kernels(params)
  tensors = {}
  for name, _, leaf, layer in _entries(params):
    value = leaves[leaf] if layer is None else leaves[leaf][layer]
    tensors[name] = np.asarray(
      value.transpose(_TO_TORCH[value.ndim]) if kernels[leaf] else value, order='C'
    )  # keeps a scalar a scalar
  save_file(tensors, directory / 'model.safetensors', metadata=dict(format='pt'))

  def tower(t):
    return dict(
      hidden_size=t.hidden_size,
      intermediate_size=t.intermediate_size,
      num_hidden_layers=t.num_hidden_layers,
      num_attention_heads=t.num_attention_heads,
      hidden_act=t.act,
      layer_norm_eps=t.layer_norm_eps,
      projection_dim=config.projection_dim,
    )

  content = dict(
    model_type='clip',
    architectures=['CLIPModel'],
    projection_dim=config.projection_dim,
    text_config=dict(
      tower(config.text),
      model_type='clip_text_model',
      vocab_size=config.vocab_size,
      eos_token_id=config.eos_id,
      max_position_embeddings=config.max_positions,
    ),
    vision_config=dict(
      tower(config.vision),
      model_type='clip_vision_model',
      image_size=config.image_size,
      patch_size=config.patch_size,
    ),
  )
  side = dict(
    image_processor_type='CLIPImageProcessor',
    do_resize=True,
    size=dict(height=config.image_size, width=config.image_size),
    do_center_crop=False,
    do_rescale=True,
    rescale_factor=1 / 255,
    do_normalize=True,
    image_mean=list(config.mean),
    image_std=list(config.std),
    resample=3,
  )
  for name, object_ in (('config.json', content), ('preprocessor_config.json', side)):
    (directory / name).write_text(json.dumps(object_, indent=2) + '\n', encoding='utf-8')
  for name in ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json'):
    shutil.copyfile(pathlib.Path(tokenizer_dir) / name, directory / name)


def _kernels(params):
  """For each leaf, whether torch stores it as a transposed matrix."""
  return [str(path[-1].key) == 'kernel' for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def _entries(params):
  """(name, shape, index of the leaf, layer or None) of every tensor."""
  found = []
  for leaf, (path, value) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
    keys = [str(key.key) for key in path]
    module, last = ('/'.join(keys[:-1]), keys[-1]) if keys[-1] in _LEAVES else ('/'.join(keys), '')
    stacked = '/layers/' in module
    shape = tuple(value.shape[1:] if stacked else value.shape)
    if last == 'kernel':
      shape = tuple(shape[axis] for axis in _TO_TORCH[len(shape)])
    for layer in range(value.shape[0]) if stacked else [None]:
      found.append(
        (f'{_foreign(module, layer)}.{_LEAVES.get(last, "")}'.rstrip('.'), shape, leaf, layer)
      )
  return found


def _foreign(module, layer):
  pattern, template = next((p, t) for p, t in NAMES if re.fullmatch(p, module))
  groups = {
    k: (v or '').replace('/', '.') for k, v in re.fullmatch(pattern, module).groupdict().items()
  }
  return template.format(layer=layer, **groups).rstrip('.')
