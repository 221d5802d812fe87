"""config.json of the original layout <-> JanusConfig.

The file gives class names for its towers but few sizes, which are built into the original code. A
size therefore comes from, in this order: our own section `dsr_jax` (written for models with other
than the published sizes, and ignored by other readers), the published towers if the widths match,
the shapes of the tensors. Missing keys of the language model take LlamaConfig's defaults, as in the
original code.

Source: deepseek-ai/Janus janus/models/{modeling_vlm,clip_encoder,siglip_vit,vq_model}.py.
"""

import collections
import dataclasses
import re

from dsr_jax.convert.configs import (
  MOST,
  MOST_LEVELS,
  multiples,
  object_in,
  shown,
  text_from,
  text_misfits,
  whole,
)
from dsr_jax.errors import InputError
from dsr_jax.models.janus.config import JanusConfig, VisionConfig, VQConfig

OURS = 'dsr_jax'  # our section of config.json
_SECTIONS = (
  'vision_config',
  'aligner_config',
  'gen_vision_config',
  'gen_aligner_config',
  'gen_head_config',
)
_CLASSES = dict(
  vision_config='CLIPVisionTower',
  aligner_config='MlpProjector',
  gen_vision_config='VQ-16',
  gen_aligner_config='MlpProjector',
  gen_head_config='vision_head',
)
_PUBLISHED = JanusConfig.janus_pro_1b()
_MODEL_NAME = 'siglip_large_patch16_384'
_HEADS = 16  # in every tower of the original code
_EPS = 1e-6  # in every norm outside the language model


def from_json(content, shapes):
  """config.json object, and tensor name -> shape -> `JanusConfig` without templates. InputError
  names everything that does not fit.
  """
  sections = {name: content.get(name) for name in (*_SECTIONS, 'language_config')}
  broken = [name for name, section in sections.items() if not isinstance(section, dict)]
  if broken:
    raise InputError(
      f'config.json has no {", ".join(broken)}; fetch the config.json of a Janus-Pro again'
    )
  params = {name: object_in(sections[name], 'params', f'{name}.') for name in _SECTIONS}
  ours = object_in(content, OURS)
  config = JanusConfig(
    text=text_from(sections['language_config'], 'language_config'),
    vision=_vision(params, object_in(ours, 'vision', f'{OURS}.'), shapes),
    vq=_vq(params, object_in(ours, 'vq', f'{OURS}.'), shapes),
  )
  wrong = list(_misfits(sections, params, config))
  if wrong:
    raise InputError(
      f'config.json does not have the structure of Janus-Pro: {"; ".join(wrong)}; use a Janus-Pro '
      'checkpoint'
    )
  return config


def to_json(config, dtype='float32', system_prompt=True):
  """`JanusConfig` -> config.json object. InputError for features that the original code does not
  support.
  """
  text, vision, vq = config.text, config.vision, config.vq
  if vision.layer_norm_eps != _EPS:
    raise InputError(
      f'the vision tower has layer_norm_eps {vision.layer_norm_eps}, but the original code has '
      f'only {_EPS}; convert to --format=hf'
    )

  def section(kind, **params):
    return dict(cls=_CLASSES[f'{kind}_config'], model_type=kind, params=params)

  language = dict(
    model_type='llama',
    vocab_size=text.vocab_size,
    hidden_size=text.hidden_size,
    intermediate_size=text.intermediate_size,
    num_hidden_layers=text.num_hidden_layers,
    num_attention_heads=text.num_attention_heads,
    num_key_value_heads=text.num_attention_heads,
    max_position_embeddings=text.max_position_embeddings,
    rms_norm_eps=text.rms_norm_eps,
    rope_theta=text.rope_theta,
    tie_word_embeddings=False,
    torch_dtype=dtype,
  )
  if text.head_dim * text.num_attention_heads != text.hidden_size:
    language['head_dim'] = text.head_dim  # supported by transformers 4.48 and later
  width, codes = text.hidden_size, vq.num_embeddings
  content = dict(
    architectures=['MultiModalityCausalLM'],
    model_type='multi_modality',
    torch_dtype=dtype,
    vision_config=section(
      'vision',
      image_size=vision.image_size,
      model_name=_MODEL_NAME,
      select_feature='same',
      select_layer=-1,
    ),
    aligner_config=section(
      'aligner', depth=2, input_dim=vision.hidden_size, n_embed=width, projector_type='mlp_gelu'
    ),
    gen_vision_config=section('gen_vision', image_token_size=codes, n_embed=vq.embed_dim),
    gen_aligner_config=section(
      'gen_aligner', depth=2, input_dim=vq.embed_dim, n_embed=width, projector_type='mlp_gelu'
    ),
    gen_head_config=section(
      'gen_head', image_token_embed=width, image_token_size=codes, n_embed=width
    ),
    language_config=language,
  )
  ours = {}
  if vision != _PUBLISHED.vision:
    ours['vision'] = dict(
      layers=vision.num_hidden_layers,
      heads=vision.num_attention_heads,
      mlp_width=vision.intermediate_size,
      patch_size=vision.patch_size,
    )
  if vq != _PUBLISHED.vq:
    ours['vq'] = dict(
      base_channels=vq.base_channels,
      channel_multiplier=list(vq.channel_multiplier),
      num_res_blocks=vq.num_res_blocks,
      latent_channels=vq.latent_channels,
    )
  if not system_prompt:
    ours['system_prompt'] = False
  return {**content, OURS: ours} if ours else content


def _vision(params, ours, shapes):
  width = whole(
    params['aligner_config'].get('input_dim', _PUBLISHED.vision.hidden_size),
    'hidden_size',
    'aligner_config.params',
    'input_dim',
  )
  known = _PUBLISHED.vision
  if width == known.hidden_size and not ours:
    found = dict(
      layers=known.num_hidden_layers, mlp_width=known.intermediate_size, patch_size=known.patch_size
    )
  else:
    blocks = r'vision_model\.vision_tower\.blocks\.(\d+)\.'
    found = dict(
      layers=_count(shapes, blocks),
      mlp_width=_common(shapes, blocks + r'mlp\.fc1\.weight', 0),
      patch_size=_common(shapes, r'vision_model\.vision_tower\.patch_embed\.proj\.weight', -1),
    )
  names = dict(
    layers='num_hidden_layers',
    heads='num_attention_heads',
    mlp_width='intermediate_size',
    patch_size='patch_size',
  )
  sizes = {'heads': _HEADS, **found, **_said(ours, names, 'vision')}
  image_size = params['vision_config'].get('image_size', known.image_size)
  return VisionConfig(
    hidden_size=width,
    image_size=whole(image_size, 'image_size', 'vision_config.params'),
    layer_norm_eps=_EPS,
    **{names[key]: size for key, size in sizes.items()},
  )


def _said(ours, names, part):
  """The sizes in a part of our section. names: its keys, in `MOST`."""
  return {key: whole(ours[key], names[key], f'{OURS}.{part}') for key in names if key in ours}


def _vq(params, ours, shapes):
  known = _PUBLISHED.vq
  coder = r'gen_vision_model\.(encoder|decoder)\.'
  base = _common(
    shapes,
    r'gen_vision_model\.(encoder\.conv_in\.(weight|bias)|decoder\.norm_out\.(weight|bias))',
    0,
  )
  if base == known.base_channels and not ours:
    found = dict(
      base_channels=base,
      channel_multiplier=known.channel_multiplier,
      num_res_blocks=known.num_res_blocks,
      latent_channels=known.latent_channels,
    )
  else:
    levels = _count(shapes, coder + r'conv_blocks\.(?P<number>\d+)\.')
    block = r'gen_vision_model\.encoder\.conv_blocks\.'
    widths = [
      _common(shapes, rf'{block}{level}\.res\.\d+\.(conv[12]|norm2)\.bias', 0)
      for level in range(levels)
    ]
    found = dict(
      base_channels=base,
      channel_multiplier=[w // max(base, 1) for w in widths],
      num_res_blocks=_count(shapes, block + r'\d+\.res\.(?P<number>\d+)\.'),
      latent_channels=_common(
        shapes,
        r'gen_vision_model\.(encoder\.conv_out\.(weight|bias)|'
        r'post_quant_conv\.(weight|bias))',
        0,
      ),
    )
  names = {key: key for key in ('latent_channels', 'base_channels', 'num_res_blocks')}
  sizes = {**found, **_said(ours, names, 'vq')}
  if 'channel_multiplier' in ours:
    sizes['channel_multiplier'] = multiples(ours['channel_multiplier'], f'{OURS}.vq')
  p, where = params['gen_vision_config'], 'gen_vision_config.params'
  codes, width = p.get('image_token_size', known.num_embeddings), p.get('n_embed', known.embed_dim)
  return VQConfig(
    num_embeddings=whole(codes, 'num_embeddings', where, 'image_token_size'),
    embed_dim=whole(width, 'embed_dim', where, 'n_embed'),
    **{**sizes, 'channel_multiplier': tuple(sizes['channel_multiplier'])},
  )


def _common(shapes, pattern, axis):
  """The most common size along an axis among the tensors of a pattern, so that one wrong tensor is
  reported as a mistake instead of setting the size.
  """
  sizes = collections.Counter(
    shape[axis] for name, shape in shapes.items() if shape and re.fullmatch(pattern, name)
  )
  return sizes.most_common(1)[0][0] if sizes else 0


def _count(shapes, pattern):
  """One more than the largest number in a pattern's last group."""
  numbers = [
    int(match.group(match.lastindex)) for name in shapes if (match := re.match(pattern, name))
  ]
  return max(numbers, default=-1) + 1


def _misfits(sections, params, config):
  """Sentences about features that our model does not support, and about contradictory numbers."""
  text, vq = config.text, config.vq
  for name, only in _CLASSES.items():
    if sections[name].get('cls') != only:
      yield f'{name}.cls {shown(sections[name].get("cls"))} (only {only!r} is supported)'
  width, codes = text.hidden_size, vq.num_embeddings
  fixed = (
    ('vision_config', 'select_layer', -1),
    ('vision_config', 'select_feature', 'same'),
    ('vision_config', 'pixel_mean', None),
    ('vision_config', 'pixel_std', None),
    ('aligner_config', 'depth', 2),
    ('aligner_config', 'projector_type', 'mlp_gelu'),
    ('aligner_config', 'n_embed', width),
    ('gen_aligner_config', 'depth', 2),
    ('gen_aligner_config', 'projector_type', 'mlp_gelu'),
    ('gen_aligner_config', 'n_embed', width),
    ('gen_aligner_config', 'input_dim', vq.embed_dim),
    ('gen_head_config', 'n_embed', width),
    ('gen_head_config', 'image_token_embed', width),
    ('gen_head_config', 'image_token_size', codes),
  )
  for name, key, only in fixed:
    value = params[name].get(key, only)
    if value != only:
      yield f'{name}.params.{key} {shown(value)} (must be {only!r})'
  yield from text_misfits(sections['language_config'], text, 'language_config')
  yield from size_misfits(config)


def size_misfits(config):
  """Sentences about incompatible sizes."""
  vision, vq = config.vision, config.vq
  # For sizes that config.json does not give, use the tensors' names and shapes.
  for part in (vision, vq):
    for field in dataclasses.fields(part):
      size = getattr(part, field.name)
      if isinstance(size, int) and size > MOST.get(field.name, size):
        yield f'{field.name} {size} (at most {MOST[field.name]})'
  if len(vq.channel_multiplier) > MOST_LEVELS:
    yield f'{len(vq.channel_multiplier)} levels of the VQ model (at most {MOST_LEVELS})'
  if vision.patch_size < 1 or vision.image_size % vision.patch_size:
    yield f'images of {vision.image_size} pixels with patches of {vision.patch_size}'
  if vq.downsampling != vision.patch_size:
    yield (
      f'{len(vq.channel_multiplier)} levels of the VQ model with patches of '
      f'{vision.patch_size} pixels'
    )
  if vision.num_attention_heads < 1 or vision.hidden_size % vision.num_attention_heads:
    yield f'a vision tower of width {vision.hidden_size} for {vision.num_attention_heads} heads'
  if vq.base_channels < 1 or any(vq.base_channels * m % 32 for m in vq.channel_multiplier):
    yield f'a VQ model of {vq.base_channels} channels (every level must be a multiple of 32)'
