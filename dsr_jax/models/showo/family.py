"""What the rest of the project needs to know about Show-o, in addition to its module."""

import dataclasses

from dsr_jax import sharding
from dsr_jax.models.showo import model
from dsr_jax.models.showo.config import TEMPLATES, ShowoConfig, Templates
from dsr_jax.models.unified import Counts, Family

_ATTENTION = ('q_proj', 'k_proj', 'v_proj', 'dense')
_MLP = ('fc1', 'fc2')
_LAYERS = ('language_model', 'layers')
_WHOLE_MODEL = ('language_model', 'lm_head')  # one head for text tokens and codes


def _num_heads(config: ShowoConfig) -> int:
  return config.text.num_attention_heads


def _room(config: ShowoConfig) -> int:
  """An image takes more positions when it is read than when it is drawn."""
  t = config.templates
  frame = len(t.understanding_infix) + len(t.understanding_suffix)
  return config.text.max_position_embeddings - config.reading_tokens - frame


def _drawn_as(config: ShowoConfig, steps: int, noise: float) -> ShowoConfig:
  return dataclasses.replace(config, sampling_steps=steps, sampling_noise=noise)


def _counts(config: ShowoConfig) -> Counts:
  width, inner = config.text.hidden_size, config.text.intermediate_size
  return Counts(
    layer=4 * width**2 + 2 * width * inner,
    adapted=8 * width + 2 * (width + inner),
    image_head=width * config.vq.num_embeddings,
    text_head=width * config.text.vocab_size,
    tables=2 * width * config.rows,
    reading_tokens=config.reading_tokens,
    steps=config.sampling_steps,
    block=config.num_codes + 2,
  )


def _stand_in(config: ShowoConfig) -> Templates:
  first = config.text.vocab_size  # Show-o's own tokens: padding, soi, eoi, ...
  soi, eoi, t2i, mmu = first + 1, first + 2, first + 5, first + 6
  return Templates(
    eos_id=2,
    pad_id=first,
    soi_id=soi,
    eoi_id=eoi,
    generation_prefix=(t2i, 2),
    generation_suffix=(2, soi),
    understanding_prefix=(mmu, soi),
    understanding_infix=(eoi, 2, 3, 4, 5, 6),
    understanding_suffix=(7, 8, 9, 10),
  )


SHOWO = Family(
  name='Show-o',
  config_type=ShowoConfig,
  graphdef=model.graphdef_of,
  shapes=model.abstract_params,
  spec=model.spec_of,
  num_heads=_num_heads,
  sharding_rules=(
    (r'language_model/layers/.*/(q_proj|k_proj|v_proj|fc1)/kernel$', sharding.STACKED_TP_OUT),
    (r'language_model/layers/.*/(q_proj|k_proj|v_proj|fc1)/bias$', sharding.STACKED_TP),
    (r'language_model/layers/.*/(dense|fc2)/kernel$', sharding.STACKED_TP_IN),
    # 58,498 rows cannot be split evenly.
    (r'language_model/embed_tokens/embedding$', sharding.FSDP_OUT),
    (r'lm_head/kernel$', sharding.FSDP_IN),
    (r'vqmodel/', sharding.WHOLE),
  ),
  trainable_parts={
    'language_model+gen_head': _WHOLE_MODEL,
    'language_model': _WHOLE_MODEL,
    'all_but_vq': _WHOLE_MODEL,
    'lora': (),
  },
  image_tokenizer='vqmodel',
  lora_targets={
    **{name: (*_LAYERS, 'self_attn', name) for name in _ATTENTION},
    **{name: (*_LAYERS, 'mlp', name) for name in _MLP},
  },
  counts=_counts,
  stand_in=_stand_in,
  room=_room,
  templates=TEMPLATES,
  only={
    'method.cfg_interval': ((0,), 'draws a picture in steps, not code by code'),
    'method.credit': (
      ('equal', 'guidance', 'rarity'),
      'draws no code before another, and reads codes instead of pixels',
    ),
    'method.policy_guidance': ((False,), 'has no likelihood of what its guided sampler draws'),
    'system.cache_dtype': (('',), 'keeps no cache while it draws'),
  },
  drawn_as=_drawn_as,
)
