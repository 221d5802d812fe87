"""config.json of the Hugging Face layout <-> JanusConfig, and the language model's part of both
layouts.

The file is not trusted: every size must be a whole number within `MOST`, or the error names it.
Missing keys take the defaults of transformers' LlamaConfig, JanusVisionConfig and JanusVQVAEConfig,
because published files are partial. One error lists everything that our model cannot express.
"""

import math

from dsr_jax.errors import InputError
from dsr_jax.models.janus.config import JanusConfig, TextConfig, VisionConfig, VQConfig

_TEXT = dict(
  vocab_size=32000,
  hidden_size=4096,
  intermediate_size=11008,
  num_hidden_layers=32,
  num_attention_heads=32,
  rms_norm_eps=1e-6,
  max_position_embeddings=2048,
)
_VISION = dict(
  hidden_size=1024,
  num_hidden_layers=24,
  num_attention_heads=16,
  image_size=384,
  patch_size=16,
  layer_norm_eps=1e-6,
)
_VQ = dict(
  num_embeddings=16384,
  embed_dim=8,
  latent_channels=256,
  base_channels=128,
  channel_multiplier=(1, 1, 2, 2, 4),
  num_res_blocks=2,
)

# Larger sizes are treated as mistakes; each limit is far above any Janus.
MOST = dict(
  num_hidden_layers=512,
  num_attention_heads=1024,
  num_res_blocks=8,
  hidden_size=2**17,
  intermediate_size=2**19,
  head_dim=2**13,
  vocab_size=2**24,
  max_position_embeddings=2**24,
  image_size=2**13,
  patch_size=2**8,
  num_embeddings=2**24,
  embed_dim=2**13,
  latent_channels=2**13,
  base_channels=2**13,
)
MOST_LEVELS, MOST_MULTIPLE = 8, 64  # of vq_config.channel_multiplier

# (key, its default in transformers, the only value that our model supports)
_FIXED_TEXT = (
  ('model_type', 'llama', 'llama'),
  ('hidden_act', 'silu', 'silu'),
  ('attention_bias', False, False),
  ('mlp_bias', False, False),
)
_FIXED = (
  ('vision_config', 'num_channels', 3, 3),
  ('vision_config', 'hidden_act', 'gelu', 'gelu'),
  ('vision_config', 'attention_bias', True, True),
  ('vision_config', 'use_qk_norm', False, False),
  ('vision_config', 'depth', 2, 2),
  ('vq_config', 'double_latent', False, False),
  ('vq_config', 'in_channels', 3, 3),
  ('vq_config', 'out_channels', 3, 3),
  ('vq_config', 'num_hidden_layers', 2, 2),
  ('vq_config', 'hidden_act', 'gelu', 'gelu'),
)


def from_json(content):
  """config.json object -> `JanusConfig` without templates. InputError naming every key that does
  not fit.
  """
  sections = {
    name: object_in(content, name) for name in ('text_config', 'vision_config', 'vq_config')
  }
  config = JanusConfig(
    text=text_from(sections['text_config'], 'text_config'),
    vision=_vision(sections['vision_config']),
    vq=_vq(sections['vq_config']),
  )
  wrong = list(_unsupported(sections, config))
  if wrong:
    raise InputError(
      f'config.json does not have the structure of Janus-Pro: {"; ".join(wrong)}; use a Janus-Pro '
      'checkpoint'
    )
  return config


def to_json(config, dtype='float32'):
  """`JanusConfig` with templates -> config.json object, for transformers 4.52 and later."""
  text, vision, vq, ids = config.text, config.vision, config.vq, config.templates
  return dict(
    architectures=['JanusForConditionalGeneration'],
    model_type='janus',
    # Without this key, transformers ties the head to the embedding; Janus has a separate head.
    tie_word_embeddings=False,
    dtype=dtype,
    image_token_id=ids.image_id,
    bos_token_id=ids.bos_id,
    eos_token_id=ids.eos_id,
    pad_token_id=ids.pad_id,
    text_config=dict(
      model_type='llama',
      vocab_size=text.vocab_size,
      hidden_size=text.hidden_size,
      intermediate_size=text.intermediate_size,
      num_hidden_layers=text.num_hidden_layers,
      num_attention_heads=text.num_attention_heads,
      num_key_value_heads=text.num_attention_heads,
      head_dim=text.head_dim,
      hidden_act='silu',
      attention_bias=False,
      mlp_bias=False,
      rms_norm_eps=text.rms_norm_eps,
      rope_theta=text.rope_theta,
      rope_scaling=None,
      max_position_embeddings=text.max_position_embeddings,
      tie_word_embeddings=False,
      bos_token_id=ids.bos_id,
      eos_token_id=ids.eos_id,
      pad_token_id=ids.pad_id,
    ),
    vision_config=dict(
      model_type='janus_vision_model',
      hidden_size=vision.hidden_size,
      num_hidden_layers=vision.num_hidden_layers,
      num_attention_heads=vision.num_attention_heads,
      mlp_ratio=vision.intermediate_size / vision.hidden_size,
      image_size=vision.image_size,
      patch_size=vision.patch_size,
      num_image_tokens=vision.num_patches,
      num_channels=3,
      layer_norm_eps=vision.layer_norm_eps,
      hidden_act='gelu',
      attention_bias=True,
      use_qk_norm=False,
      depth=2,
      projection_dim=text.hidden_size,
    ),
    vq_config=dict(
      model_type='janus_vqgan',
      num_embeddings=vq.num_embeddings,
      embed_dim=vq.embed_dim,
      latent_channels=vq.latent_channels,
      base_channels=vq.base_channels,
      channel_multiplier=list(vq.channel_multiplier),
      num_res_blocks=vq.num_res_blocks,
      num_patches=config.grid,
      double_latent=False,
      in_channels=3,
      out_channels=3,
      hidden_act='gelu',
      num_hidden_layers=2,
      projection_dim=text.hidden_size,
      image_token_embed_dim=text.hidden_size,
    ),
  )


def layout_of(content):
  """The layout of a config.json: 'hf' or 'deepseek'. InputError for another model's."""
  kind = content.get('model_type')
  if kind not in ('janus', 'multi_modality'):
    raise InputError(
      f'config.json is for a model of type {shown(kind)}; use a Janus-Pro checkpoint, whose type '
      'is janus (the Hugging Face layout) or multi_modality (the original one)'
    )
  return 'hf' if kind == 'janus' else 'deepseek'


# Values of an untrusted file.


def object_in(content, name, where=''):
  """The object `name` of config.json, or of its part `where`; {} if it is absent or null."""
  value = content.get(name)
  if value is None:
    return {}
  if not isinstance(value, dict):
    raise InputError(
      f'{where}{name} in config.json is {shown(value)}, not an object; fetch the file again'
    )
  return value


def whole(value, key, where, name=''):
  """Checks a size against its key in `MOST`.

  where: the part of config.json, for the error, '' at its top; name: what the size is called there,
  if not `key`.
  """
  if type(value) is not int or not 1 <= value <= MOST[key]:
    place = '.'.join(part for part in (where, name or key) if part)
    raise InputError(
      f'{place} in config.json is {shown(value)}, not a whole number from 1 to {MOST[key]:,}; '
      'fetch the file again'
    )
  return value


def above_zero(value, key, where):
  """A number that must be positive and finite as float32."""
  if type(value) not in (int, float) or not 1e-30 <= value <= 1e30:
    raise InputError(
      f'{where}.{key} in config.json is {shown(value)}, not a number above 0; fetch the file again'
    )
  return float(value)


def multiples(value, where):
  """The VQ model's channel_multiplier, as a tuple."""
  fine = isinstance(value, (list, tuple)) and 1 <= len(value) <= MOST_LEVELS
  if not fine or not all(type(m) is int and 1 <= m <= MOST_MULTIPLE for m in value):
    raise InputError(
      f'{where}.channel_multiplier in config.json is {shown(value)}, not 1 to {MOST_LEVELS} whole '
      f'numbers from 1 to {MOST_MULTIPLE}; fetch the file again'
    )
  return tuple(value)


def shown(value) -> str:
  """A value for an error message, shortened if it is long."""
  text = repr(value)
  return text if len(text) <= 60 else f'{text[:60]} ...'


# Parts.


def text_from(section, name):
  """The language model's section of either layout -> `TextConfig`, with LlamaConfig's defaults."""
  values = {key: section.get(key, default) for key, default in _TEXT.items()}
  eps = above_zero(values.pop('rms_norm_eps'), 'rms_norm_eps', name)
  sizes = {key: whole(value, key, name) for key, value in values.items()}
  rope = object_in(section, 'rope_parameters', f'{name}.')
  rope = rope or object_in(section, 'rope_scaling', f'{name}.')
  theta = rope.get('rope_theta') or section.get('rope_theta') or 10000.0
  head_dim = section.get('head_dim')
  if head_dim is None:
    head_dim = sizes['hidden_size'] // sizes['num_attention_heads']
  return TextConfig(
    **sizes,
    head_dim=whole(head_dim, 'head_dim', name),
    rms_norm_eps=eps,
    rope_theta=above_zero(theta, 'rope_theta', name),
  )


def _vision(section):
  name = 'vision_config'
  values = {key: section.get(key, default) for key, default in _VISION.items()}
  for key in ('image_size', 'patch_size'):  # transformers allows a pair; ours must be square
    pair = values[key]
    if isinstance(pair, list):
      if len(pair) != 2 or pair[0] != pair[1]:
        raise InputError(
          f'{name}.{key} in config.json is {shown(pair)}, not a square; use a Janus-Pro checkpoint'
        )
      values[key] = pair[0]
  eps = above_zero(values.pop('layer_norm_eps'), 'layer_norm_eps', name)
  sizes = {key: whole(value, key, name) for key, value in values.items()}
  ratio = above_zero(section.get('mlp_ratio', 4.0), 'mlp_ratio', name)
  inner = whole(math.floor(sizes['hidden_size'] * ratio), 'intermediate_size', name)
  return VisionConfig(**sizes, intermediate_size=inner, layer_norm_eps=eps)


def _vq(section):
  values = {key: section.get(key, default) for key, default in _VQ.items()}
  multiplier = multiples(values.pop('channel_multiplier'), 'vq_config')
  sizes = {key: whole(value, key, 'vq_config') for key, value in values.items()}
  return VQConfig(**sizes, channel_multiplier=multiplier)


def _unsupported(sections, config):
  """Sentences about features that our model does not support."""
  text, vision, vq = config.text, config.vision, config.vq
  for name, key, default, only in _FIXED:
    value = sections[name].get(key, default)
    if value != only:
      yield f'{name}.{key} {shown(value)} (only {only!r} is supported)'
  yield from text_misfits(sections['text_config'], text, 'text_config')
  for name, key in (
    ('vision_config', 'projection_dim'),
    ('vq_config', 'projection_dim'),
    ('vq_config', 'image_token_embed_dim'),
  ):
    value = sections[name].get(key, 2048)
    if value != text.hidden_size:
      yield f'{name}.{key} {shown(value)} (must be the text width {text.hidden_size})'
  tokens = sections['vision_config'].get('num_image_tokens', 576)
  if vision.image_size % vision.patch_size or tokens != vision.num_patches:
    yield (
      f'vision_config.num_image_tokens {shown(tokens)} with images of {vision.image_size} and '
      f'patches of {vision.patch_size} pixels'
    )
  if vq.downsampling != vision.patch_size:
    yield (
      f'{len(vq.channel_multiplier)} levels of vq_config with patches of {vision.patch_size} pixels'
    )
  if vision.hidden_size % vision.num_attention_heads:
    yield f'vision_config.hidden_size {vision.hidden_size} for {vision.num_attention_heads} heads'
  if any(vq.base_channels * m % 32 for m in vq.channel_multiplier):
    yield f'vq_config.base_channels {vq.base_channels} (every level must be a multiple of 32)'


def text_misfits(section, text, name):
  """Sentences about features that our language model does not support. section: the part `name` of
  config.json; text: the config made from it.
  """
  for key, default, only in _FIXED_TEXT:
    value = section.get(key, default)
    if value != only:
      yield f'{name}.{key} {shown(value)} (only {only!r} is supported)'
  groups = section.get('num_key_value_heads') or text.num_attention_heads
  if groups != text.num_attention_heads:
    yield (
      f'{name}.num_key_value_heads {shown(groups)} (grouped attention; must be '
      f'{text.num_attention_heads}, one per head)'
    )
  for key in ('rope_scaling', 'rope_parameters'):
    rope = object_in(section, key, f'{name}.')
    kind = rope.get('rope_type', rope.get('type', 'default'))
    if kind != 'default':
      yield f'{name}.{key} of type {shown(kind)} (only unscaled rotary embeddings are supported)'
