"""config.json of every form the facts list <-> JanusConfig."""

import dataclasses
import json

import pytest
from transformers import AutoConfig

from dsr_jax import convert
from dsr_jax.convert import configs
from dsr_jax.errors import InputError
from dsr_jax.models.janus.config import JanusConfig, Templates


def full_size(width, **text):
  """The config.json of the community checkpoints, as far as it matters."""
  return dict(
    model_type='janus',
    image_token_id=100581,
    torch_dtype='bfloat16',
    text_config=dict(
      model_type='llama',
      vocab_size=102400,
      hidden_size=width,
      rope_theta=10000.0,
      rope_scaling=None,
      rms_norm_eps=1e-6,
      max_position_embeddings=16384,
      head_dim=128,
      **text,
    ),
    vision_config=dict(
      hidden_size=1024,
      num_hidden_layers=24,
      num_attention_heads=16,
      mlp_ratio=4.0,
      layer_norm_eps=1e-6,
      image_size=384,
      patch_size=16,
      num_image_tokens=576,
      projection_dim=width,
      depth=2,
      attention_bias=True,
      use_qk_norm=False,
    ),
    vq_config=dict(
      embed_dim=8,
      num_embeddings=16384,
      latent_channels=256,
      base_channels=128,
      num_res_blocks=2,
      channel_multiplier=[1, 1, 2, 2, 4],
      num_patches=24,
      projection_dim=width,
      num_hidden_layers=2,
      image_token_embed_dim=width,
      depth=2,
      double_latent=False,
    ),
  )


def pro_1b():
  return full_size(
    2048,
    intermediate_size=5632,
    num_hidden_layers=24,
    num_attention_heads=16,
    num_key_value_heads=16,
  )


def test_the_published_files_give_the_named_configs():
  assert configs.from_json(pro_1b()) == JanusConfig.janus_pro_1b()
  pro_7b = full_size(4096, intermediate_size=11008, num_hidden_layers=30, num_attention_heads=32)
  assert configs.from_json(pro_7b) == JanusConfig.janus_pro_7b()


def test_missing_keys_take_the_defaults_of_transformers():
  content = full_size(4096, num_hidden_layers=30)
  for key in ('head_dim', 'hidden_size', 'rope_theta', 'rope_scaling', 'rms_norm_eps'):
    del content['text_config'][key]
  for key in (
    'hidden_size',
    'num_hidden_layers',
    'num_attention_heads',
    'mlp_ratio',
    'image_size',
    'patch_size',
    'num_image_tokens',
    'layer_norm_eps',
    'depth',
  ):
    del content['vision_config'][key]
  for key in (
    'embed_dim',
    'num_embeddings',
    'latent_channels',
    'base_channels',
    'channel_multiplier',
  ):
    del content['vq_config'][key]
  assert configs.from_json(content) == JanusConfig.janus_pro_7b()


def test_rope_parameters_of_transformers_5_are_read():
  content = pro_1b()
  del (
    content['text_config']['rope_theta'],
    content['text_config']['rope_scaling'],
    content['torch_dtype'],
  )
  content['text_config']['rope_parameters'] = dict(rope_theta=5e5, rope_type='default')
  content['dtype'] = 'float32'
  assert configs.from_json(content).text.rope_theta == 5e5


def test_what_is_written_reads_back_the_same_here_and_in_transformers(tmp_path):
  templates = Templates(1, 2, 3, 4, 5, 6, (1,), (4,), (1, 4), (5,), (7,))
  config = dataclasses.replace(JanusConfig.scenes(), templates=templates)
  config = dataclasses.replace(
    config, text=dataclasses.replace(config.text, rope_theta=2e4, rms_norm_eps=1e-5)
  )
  content = json.loads(json.dumps(configs.to_json(config)))
  assert dataclasses.replace(configs.from_json(content), templates=templates) == config
  (tmp_path / 'config.json').write_text(json.dumps(content))
  theirs = AutoConfig.from_pretrained(tmp_path)
  assert theirs.tie_word_embeddings is False and theirs.image_token_id == 6
  assert (
    theirs.text_config.rope_parameters['rope_theta'] == 2e4
    and theirs.text_config.head_dim == config.text.head_dim
  )
  assert theirs.vq_config.num_patches == config.grid
  assert dataclasses.replace(configs.from_json(theirs.to_dict()), templates=templates) == config


def test_mlp_ratio_gives_back_the_exact_inner_width():
  templates = Templates(1, 2, 3, 4, 5, 6, (1,), (4,), (1, 4), (5,), (7,))
  for width in (96, 160, 1152):
    for inner in range(width, 4 * width, 37):
      vision = dataclasses.replace(
        JanusConfig.scenes().vision, hidden_size=width, intermediate_size=inner
      )
      config = dataclasses.replace(JanusConfig.scenes(), vision=vision, templates=templates)
      ratio = configs.to_json(config)['vision_config']['mlp_ratio']
      assert int(width * ratio) == inner


@pytest.mark.parametrize('kind, found', [('llama', "'llama'"), (None, 'None')])
def test_another_model_is_refused(kind, found):
  with pytest.raises(InputError, match=found):
    configs.layout_of(dict(pro_1b(), model_type=kind))


def test_the_layout_is_told_by_the_model_type():
  assert configs.layout_of(dict(model_type='janus')) == 'hf'
  assert configs.layout_of(dict(model_type='multi_modality')) == 'deepseek'


@pytest.mark.parametrize(
  'section, key, value, found',
  [
    ('text_config', 'num_key_value_heads', 4, 'grouped attention'),
    ('text_config', 'rope_scaling', dict(type='linear', factor=2.0), "'linear'"),
    ('text_config', 'rope_parameters', dict(rope_type='llama3', rope_theta=1e4), "'llama3'"),
    ('text_config', 'model_type', 'qwen2', "'qwen2'"),
    ('text_config', 'attention_bias', True, 'attention_bias'),
    ('vision_config', 'use_qk_norm', True, 'use_qk_norm'),
    ('vision_config', 'hidden_act', 'gelu_pytorch_tanh', 'gelu_pytorch_tanh'),
    ('vision_config', 'projection_dim', 4096, 'text width 2048'),
    ('vision_config', 'num_image_tokens', 64, 'num_image_tokens 64'),
    ('vision_config', 'image_size', [384, 256], 'not a square'),
    ('vq_config', 'double_latent', True, 'double_latent'),
    ('vq_config', 'channel_multiplier', [1, 2], '2 levels'),
    ('vq_config', 'base_channels', 100, 'multiple of 32'),
    (
      'text_config',
      'hidden_size',
      'wide',
      "text_config.hidden_size in config.json is 'wide', .*a whole number",
    ),
    ('text_config', 'hidden_size', True, 'a whole number'),
    ('text_config', 'hidden_size', '2048', 'a whole number'),
    ('text_config', 'vocab_size', 10**12, 'from 1 to 16,777,216'),
    ('text_config', 'num_hidden_layers', 10**7, 'from 1 to 512'),
    ('text_config', 'num_hidden_layers', -1, 'a whole number'),
    (
      'text_config',
      'rope_scaling',
      'linear',
      "text_config.rope_scaling in config.json is 'linear', .*an object",
    ),
    ('text_config', 'rope_theta', float('nan'), 'a number above 0'),
    ('text_config', 'rms_norm_eps', 'x' * 999, r"rms_norm_eps in config.json is 'x{59} \.\.\.,"),
    (
      'vision_config',
      'mlp_ratio',
      float('inf'),
      'mlp_ratio in config.json is inf, .*a number above 0',
    ),
    ('vision_config', 'mlp_ratio', 1e29, 'intermediate_size .*a whole number'),
    ('vq_config', 'channel_multiplier', 3, '1 to 8 whole numbers'),
    ('vq_config', 'channel_multiplier', [1] * 99, '1 to 8 whole numbers'),
    ('vq_config', 'num_res_blocks', 10**6, 'from 1 to 8'),
  ],
)
def test_what_the_model_cannot_express_is_refused(section, key, value, found):
  content = pro_1b()
  content[section][key] = value
  with pytest.raises(InputError, match=found):
    configs.from_json(content)


def test_json_that_no_reader_expects_is_refused_at_once(tmp_path):
  for text in ('[' * 10_000 + ']' * 10_000, '{"model_type": ' + '{"a": ' * 10_000, '\ufeff{}', '3'):
    (tmp_path / 'config.json').write_text(text)
    with pytest.raises(InputError, match='config.json (cannot be read as JSON|holds a int)'):
      convert.read_config(tmp_path)


def test_every_misfit_is_named_in_one_error():
  content = pro_1b()
  content['text_config'].update(hidden_act='relu', num_key_value_heads=2)
  content['vq_config']['in_channels'] = 4
  with pytest.raises(InputError) as e:
    configs.from_json(content)
  assert all(part in str(e.value) for part in ('hidden_act', 'num_key_value_heads', 'in_channels'))
