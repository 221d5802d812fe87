"""What the rest of the project needs to know of Janus besides its module."""

from dsr_jax import sharding
from dsr_jax.models.janus import model
from dsr_jax.models.janus.config import ROLES, JanusConfig
from dsr_jax.models.unified import Family


def _room(config: JanusConfig) -> int:
  """A picture is read as patches and drawn as codes: whichever are more."""
  t, vision = config.templates, config.vision
  reading = len(t.understanding_prefix + t.understanding_infix + t.understanding_suffix)
  drawing = len(t.generation_prefix + t.generation_suffix)
  taken = max(reading + vision.num_patches, drawing + config.num_codes)
  return config.text.max_position_embeddings - taken


_ATTENTION = ('q_proj', 'k_proj', 'v_proj', 'o_proj')
_MLP = ('gate_proj', 'up_proj', 'down_proj')
_LAYERS = ('language_model', 'layers')


def _num_heads(config: JanusConfig) -> int:
  return config.text.num_attention_heads


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
    # Small, whole everywhere.
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
  room=_room,
  templates=tuple(ROLES),
)
