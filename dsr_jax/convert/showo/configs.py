"""config.json of a Show-o <-> `ShowoConfig`.

The file gives the sizes of neither the language model nor the image tokenizer: they follow from the
tensors. This project stores further facts in its own section, which other readers ignore.
"""

import re

from dsr_jax.errors import InputError
from dsr_jax.models.showo.config import (
  NEW_WORDS,
  PROMPT_TOKENS,
  MagvitConfig,
  PhiConfig,
  ShowoConfig,
)

DIFFUSERS = '0.30.1'  # the version that wrote the original files
_LAYER = 'showo.model.layers.0'


def from_json(content, found, magvit_found, directory) -> ShowoConfig:
  """config.json object and the shapes of both checkpoints -> `ShowoConfig` without templates.

  found, magvit_found: name -> (shape, dtype name). directory: for errors.
  """
  clip = content.get('w_clip_vit') or any(name.startswith('mm_projector.') for name in found)
  if clip:
    raise InputError(
      f'the Show-o in {directory} reads images through CLIP (w_clip_vit); use one that reads '
      'codes, showlab/show-o or showlab/show-o-512x512'
    )
  ours = content.get('dsr_jax') or {}
  try:
    rows, width = found['showo.model.embed_tokens.weight'][0]
    head = found[f'{_LAYER}.self_attn.q_layernorm.weight'][0][0]
    inner = found[f'{_LAYER}.mlp.fc1.weight'][0][0]
    layers = _count(found, r'showo\.model\.layers\.(\d+)\.')
    vq = _magvit(magvit_found)
    words = rows - NEW_WORDS - vq.num_embeddings - 1
    heads, odd = divmod(width, head)
    codes = _whole(content.get('num_vq_tokens', 256))
    steps = _whole(ours.get('sampling_steps', 50 if codes == 1024 else 18))
    config = ShowoConfig(
      text=PhiConfig(
        words,
        width,
        inner,
        layers,
        heads,
        max_position_embeddings=_whole(ours.get('max_position_embeddings', 2048)),
      ),
      vq=vq,
      num_codes=codes,
      prompt_tokens=_whole(ours.get('prompt_tokens', PROMPT_TOKENS)),
      sampling_steps=steps,
      sampling_noise=_noise(ours.get('sampling_noise', 1.0)),
    )
  except (KeyError, ValueError, TypeError, IndexError, AttributeError) as e:
    raise InputError(
      f'the tensors or the config.json in {directory} do not give the sizes of a Show-o and its '
      f'image tokenizer ({e}); fetch both again'
    ) from e
  wrong = []
  if odd or head % 4 or words < 1:
    wrong.append(f'{width} columns, heads of {head} and {rows} rows')
  if config.grid**2 != codes:
    wrong.append(f'num_vq_tokens {codes}')
  for key, value in _named(config).items():
    if content.get(key, value) != value:
      wrong.append(f'{key} {str(content[key])[:40]} instead of {value}')
  if wrong:
    raise InputError(
      f'config.json and tensors in {directory} are not those of one Show-o: {"; ".join(wrong)}; '
      'fetch them again'
    )
  return config


def to_json(config: ShowoConfig, processor) -> dict:
  """`ShowoConfig` -> config.json object, as in the original, with our section."""
  return dict(
    _class_name='Showo',
    _diffusers_version=DIFFUSERS,
    **_named(config),
    llm_model_path='microsoft/phi-1_5',
    load_from_showo=True,
    num_vq_tokens=config.num_codes,
    w_clip_vit=False,
    dsr_jax=dict(
      template=processor.template,
      sampling_steps=config.sampling_steps,
      sampling_noise=config.sampling_noise,
      prompt_tokens=config.prompt_tokens,
      max_position_embeddings=config.text.max_position_embeddings,
    ),
  )


def magvit_json() -> dict:
  return dict(_class_name='MAGVITv2', _diffusers_version=DIFFUSERS)


def _named(config):
  """The entries of config.json that follow from the sizes."""
  return dict(
    codebook_size=config.vq.num_embeddings,
    llm_vocab_size=config.text.vocab_size,
    mask_token_id=config.mask_id,
    vocab_size=config.rows,
  )


def _magvit(found) -> MagvitConfig:
  bits = found['encoder.quant_conv.weight'][0][0]
  base = found['encoder.conv_in.weight'][0][0]

  def levels(side):
    return range(_count(found, side.replace('.', r'\.') + r'\.(\d+)\.'))

  def widths(side):
    return tuple(
      _multiple(found[f'{side}.{n}.block.0.conv1.weight'][0][0], base) for n in levels(side)
    )

  def blocks(side):
    return tuple(_count(found, rf'{side}\.{n}\.block\.(\d+)\.') for n in levels(side))

  return MagvitConfig(
    bits=bits,
    base_channels=base,
    encoder_widths=widths('encoder.down'),
    encoder_blocks=blocks('encoder.down'),
    decoder_widths=widths('decoder.up'),
    decoder_blocks=blocks('decoder.up'),
  )


def _multiple(width, base):
  if width % base:
    raise ValueError(f'a level has {width} channels, not a multiple of {base}')
  return width // base


def _count(found, pattern):
  """The count of numbered names that match a pattern, from 0."""
  numbers = {int(m.group(1)) for name in found if (m := re.match(pattern, name))}
  if numbers != set(range(len(numbers))) or not numbers or len(numbers) > 512:
    raise ValueError(f'the names {pattern} are not numbered without gaps')
  return len(numbers)


def _noise(value):
  if type(value) not in (int, float) or not 0 <= value < 1e6:
    raise ValueError(f'sampling_noise {str(value)[:40]} is not a number of at least 0')
  return float(value)


def _whole(value):
  if type(value) is not int or not 1 <= value <= 2**24:
    raise ValueError(f'{str(value)[:40]} is not a whole number above 0')
  return value
