"""What the rest of the project needs to know of Show-o besides its module."""

from dsr_jax import sharding
from dsr_jax.models.showo import model
from dsr_jax.models.showo.config import ShowoConfig
from dsr_jax.models.unified import Family

_ATTENTION = ('q_proj', 'k_proj', 'v_proj', 'dense')
_MLP = ('fc1', 'fc2')
_LAYERS = ('language_model', 'layers')
_WHOLE_MODEL = ('language_model', 'lm_head')  # one head for words and codes


def _num_heads(config: ShowoConfig) -> int:
  return config.text.num_attention_heads


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
    # 58,498 rows have no even parts.
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
)
