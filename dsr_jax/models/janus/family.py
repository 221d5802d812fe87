"""What the rest of the project needs to know about Janus, in addition to its module."""

from dsr_jax import sharding
from dsr_jax.models.janus import model
from dsr_jax.models.janus.config import ROLES, JanusConfig, Templates
from dsr_jax.models.unified import Counts, Family


def _room(config: JanusConfig) -> int:
  """An image takes as many tokens as it has patches (read) or codes (drawn): the larger number."""
  t, vision = config.templates, config.vision
  reading = len(t.understanding_prefix + t.understanding_infix + t.understanding_suffix)
  drawing = len(t.generation_prefix + t.generation_suffix)
  taken = max(reading + vision.num_patches, drawing + config.num_codes)
  return config.text.max_position_embeddings - taken


_ATTENTION = ('q_proj', 'k_proj', 'v_proj', 'o_proj')
_MLP = ('gate_proj', 'up_proj', 'down_proj')
_LAYERS = ('language_model', 'layers')
_IS_EXACT = 'draws code by code, and has an exact likelihood of a picture'


def _num_heads(config: JanusConfig) -> int:
  return config.text.num_attention_heads


def _counts(config: JanusConfig) -> Counts:
  t, v = config.text, config.vision
  width, inner = t.hidden_size, t.num_attention_heads * t.head_dim
  # The vision tower and its aligner, per image.
  n = v.num_patches
  layer = (
    2 * n * (4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size)
    + 4 * n * n * v.hidden_size
  )
  eye = v.num_hidden_layers * layer + 2 * n * (
    3 * v.patch_size**2 * v.hidden_size + v.hidden_size * width + width**2
  )
  image_head, text_head = width * (width + config.vq.num_embeddings), width * t.vocab_size
  return Counts(
    layer=4 * width * inner + 3 * width * t.intermediate_size,
    adapted=4 * (width + inner) + 3 * (width + t.intermediate_size),
    image_head=image_head,
    text_head=text_head,
    tables=image_head + 2 * text_head,
    reading_tokens=n,
    eye_operations=eye,
  )


def _stand_in(config: JanusConfig) -> Templates:
  last = config.text.vocab_size - 1
  return Templates(
    bos_id=1,
    eos_id=2,
    pad_id=0,
    boi_id=3,
    eoi_id=4,
    image_id=5,
    generation_prefix=(1, 6, 7),
    generation_suffix=(8, 6, 3),
    understanding_prefix=(1, 6, 7, 3),
    understanding_infix=(4, 8),
    understanding_suffix=(8, 6, 7),
    forbidden_text_ids=(0, 1, 3, 4, 5, last),
  )


JANUS = Family(
  name='Janus',
  config_type=JanusConfig,
  graphdef=model.graphdef_of,
  shapes=model.abstract_params,
  spec=model.spec_of,
  num_heads=_num_heads,
  sharding_rules=(
    (
      r'language_model/layers/.*/(q_proj|k_proj|v_proj|gate_proj|up_proj)/kernel$',
      sharding.STACKED_TP_OUT,
    ),
    (r'language_model/layers/.*/(o_proj|down_proj)/kernel$', sharding.STACKED_TP_IN),
    (r'language_model/embed_tokens/embedding$', sharding.TP_IN),
    (r'lm_head/kernel$', sharding.TP_OUT),
    # One sum over tp before the activation, so that logits stay split.
    (r'generation_head/proj_out/kernel$', sharding.TP_IN),
    (r'generation_head/vision_head/kernel$', sharding.TP_OUT),
    # Small, so every device holds all of it.
    (
      r'(vision_model|vqmodel|aligner|generation_aligner|generation_embeddings)/',
      sharding.WHOLE,
    ),
  ),
  trainable_parts={
    'language_model+gen_head': ('language_model', 'lm_head', 'generation_head'),
    'language_model': ('language_model', 'lm_head'),
    'all_but_vq': (
      'aligner',
      'generation_aligner',
      'generation_embeddings',
      'generation_head',
      'language_model',
      'lm_head',
      'vision_model',
    ),
    'lora': (),
  },
  image_tokenizer='vqmodel',
  lora_targets={
    **{name: (*_LAYERS, 'self_attn', name) for name in _ATTENTION},
    **{name: (*_LAYERS, 'mlp', name) for name in _MLP},
  },
  counts=_counts,
  stand_in=_stand_in,
  only={
    'method.picture_likelihood': (('one_step',), _IS_EXACT),
    'method.elbo_draws': ((1,), _IS_EXACT),
    'method.prompt_drop': ((-1.0, 0.0), _IS_EXACT),
    'method.prompt_drop_way': (('delete',), _IS_EXACT),
    'method.sampling_steps': ((-1,), _IS_EXACT),
    'method.sampling_noise': ((-1.0,), _IS_EXACT),
  },
  room=_room,
  templates=tuple(ROLES),
)
