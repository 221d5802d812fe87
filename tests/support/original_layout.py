"""A tiny model in the original layout, made from a transformers model by a mapping written here,
apart from the package's.

Follows the names of deepseek-ai/Janus' modules, as transformers' convert_janus_weights_to_hf.py
does the other way round.
"""

import json
import pathlib
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import torch

RENAMES = (
  (r'^model\.language_model\.', 'language_model.model.'),
  (r'^lm_head\.', 'language_model.lm_head.'),
  (r'^model\.generation_embeddings\.', 'gen_embed.'),
  (r'^model\.generation_aligner\.fc1\.', 'gen_aligner.layers.0.'),
  (r'^model\.generation_aligner\.hidden_layers\.0\.', 'gen_aligner.layers.2.'),
  (r'^model\.aligner\.fc1\.', 'aligner.layers.0.'),
  (r'^model\.aligner\.hidden_layers\.0\.', 'aligner.layers.2.'),
  (r'^model\.generation_head\.proj_out\.', 'gen_head.output_mlp_projector.'),
  (r'^model\.generation_head\.', 'gen_head.'),
  (r'^model\.vqmodel\.', 'gen_vision_model.'),
  (r'\.(down|up)\.(\d+)\.', r'.conv_blocks.\2.'),
  (r'\.block\.(\d+)\.', r'.res.\1.'),
  (r'\.mid\.block_1\.', '.mid.0.'),
  (r'\.mid\.attn_1\.', '.mid.1.'),
  (r'\.mid\.block_2\.', '.mid.2.'),
  (
    r'^model\.vision_model\.embeddings\.patch_embedding\.',
    'vision_model.vision_tower.patch_embed.proj.',
  ),
  (
    r'^model\.vision_model\.embeddings\.position_embedding\.weight$',
    'vision_model.vision_tower.pos_embed',
  ),
  (r'^model\.vision_model\.post_layernorm\.', 'vision_model.vision_tower.norm.'),
  (r'^model\.vision_model\.encoder\.layers\.', 'vision_model.vision_tower.blocks.'),
  (r'\.self_attn\.projection_layer\.', '.attn.proj.'),
  (r'(tower\.blocks\.\d+)\.layer_norm', r'\1.norm'),
)


def state_dict(hf_state, seed=0):
  """A transformers state dict -> the original's, with a random attention pool and random usage
  counts.
  """
  out = {}
  for name, value in hf_state.items():
    for pattern, to in RENAMES:
      name = re.sub(pattern, to, name)
    out[name] = value.clone()
  tower = 'vision_model.vision_tower.'
  out[tower + 'pos_embed'] = out[tower + 'pos_embed'][None]
  blocks = {
    re.match(r'.*blocks\.\d+\.', name).group(0)
    for name in out
    if name.startswith(tower + 'blocks.')
  }
  for block in blocks:
    for kind in ('weight', 'bias'):
      out[f'{block}attn.qkv.{kind}'] = torch.cat(
        [out.pop(f'{block}self_attn.{x}_proj.{kind}') for x in 'qkv']
      )
  generator = torch.Generator().manual_seed(seed)
  width, inner = out[tower + 'pos_embed'].shape[-1], out[f'{min(blocks)}mlp.fc1.weight'].shape[0]
  pool = dict(
    latent=(1, 1, width),
    q=(width, width),
    kv=(2 * width, width),
    proj=(width, width),
    norm=(width,),
  )
  pool |= {'mlp.fc1': (inner, width), 'mlp.fc2': (width, inner)}
  kind = out['gen_embed.weight'].dtype

  def random(*shape):
    return torch.randn(shape, generator=generator).to(kind)

  for name, shape in pool.items():
    if name == 'latent':
      out[f'{tower}attn_pool.latent'] = random(*shape)
    else:
      out |= {
        f'{tower}attn_pool.{name}.weight': random(*shape),
        f'{tower}attn_pool.{name}.bias': random(shape[0]),
      }
  out['gen_vision_model.quantize.codebook_used'] = random(65536)
  return out


def config_json(hf_config):
  """A transformers JanusConfig -> config.json's object, with the keys that the published file
  has.
  """
  text, vision, vq = hf_config.text_config, hf_config.vision_config, hf_config.vq_config
  width = text.hidden_size

  def section(cls, **params):
    return dict(cls=cls, params=params)

  def aligner(inputs):
    return section(
      'MlpProjector', depth=2, input_dim=inputs, n_embed=width, projector_type='mlp_gelu'
    )

  language = dict(
    model_type='llama',
    torch_dtype='bfloat16',
    hidden_size=width,
    **{
      key: getattr(text, key)
      for key in (
        'intermediate_size',
        'max_position_embeddings',
        'num_attention_heads',
        'num_hidden_layers',
        'num_key_value_heads',
        'vocab_size',
        'head_dim',
      )
    },
  )
  return dict(
    model_type='multi_modality',
    architectures=['MultiModalityCausalLM'],
    torch_dtype='bfloat16',
    transformers_version='4.33.1',
    language_config=language,
    aligner_config=aligner(vision.hidden_size),
    gen_aligner_config=aligner(vq.embed_dim),
    gen_head_config=section(
      'vision_head', image_token_embed=width, image_token_size=vq.num_embeddings, n_embed=width
    ),
    gen_vision_config=section('VQ-16', image_token_size=vq.num_embeddings, n_embed=vq.embed_dim),
    vision_config=section(
      'CLIPVisionTower',
      image_size=vision.image_size,
      model_name='siglip_large_patch16_384',
      select_feature='same',
      select_layer=-1,
    ),
    dsr_jax=dict(vision=dict(heads=vision.num_attention_heads)),
  )  # the only size that no tensor tells


def write(directory, hf_directory, hf_model, *, dtype=torch.bfloat16, bins=1, seed=0):
  """Writes the original layout of a transformers model, in `bins` .bin files; returns its state
  dict.

  tokenizer.json is as DeepSeek ships it: the class that reads it adds begin-of-sentence, not the
  file.
  """
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True)
  tensors = state_dict(
    {name: value.to(dtype) for name, value in hf_model.state_dict().items()}, seed
  )
  save_bins(directory, tensors, bins)
  (directory / 'config.json').write_text(json.dumps(config_json(hf_model.config)))
  tokenizer = json.loads((hf_directory / 'tokenizer.json').read_text())
  tokenizer['post_processor'] = dict(
    type='ByteLevel', add_prefix_space=True, trim_offsets=False, use_regex=True
  )
  (directory / 'tokenizer.json').write_text(json.dumps(tokenizer))
  shutil.copyfile(hf_directory / 'special_tokens_map.json', directory / 'special_tokens_map.json')
  (directory / 'tokenizer_config.json').write_text(
    json.dumps(
      dict(
        add_bos_token=True,
        add_eos_token=False,
        model_max_length=16384,
        tokenizer_class='LlamaTokenizer',
        pad_token=None,
      )
    )
  )
  (directory / 'processor_config.json').write_text(
    json.dumps(
      dict(
        add_special_token=False,
        ignore_id=-100,
        image_tag='<image_placeholder>',
        mask_prompt=True,
        num_image_tokens=576,
        processor_class='VLChatProcessor',
        sft_format='deepseek',
      )
    )
  )
  (directory / 'preprocessor_config.json').write_text(
    json.dumps(
      dict(
        image_processor_type='VLMImageProcessor',
        image_size=hf_model.config.vision_config.image_size,
        min_size=14,
      )
    )
  )
  return tensors


def save_bins(directory, tensors, count):
  """pytorch_model.bin, or shards with their index."""
  # The usage counts are a Parameter inside a buffer in the original, and are saved as one.
  tensors = {
    name: torch.nn.Parameter(value) if 'codebook_used' in name else value
    for name, value in tensors.items()
  }
  if count == 1:
    torch.save(tensors, directory / 'pytorch_model.bin')
    return
  weight_map = {}
  for i in range(count):
    part = {name: tensors[name] for name in sorted(tensors)[i::count]}
    file = f'pytorch_model-{i + 1:05d}-of-{count:05d}.bin'
    torch.save({name: value.clone() for name, value in part.items()}, directory / file)
    weight_map |= dict.fromkeys(part, file)
  (directory / 'pytorch_model.bin.index.json').write_text(
    json.dumps(dict(metadata={}, weight_map=weight_map))
  )


def to_numpy(tensor):
  tensor = tensor.detach()
  return (
    tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if tensor.dtype == torch.bfloat16
    else tensor.numpy()
  )


def same_tensors(ours, theirs):
  """Names, types, shapes and every bit."""
  assert ours.keys() == theirs.keys()
  for name, value in theirs.items():
    value = to_numpy(value) if isinstance(value, torch.Tensor) else value
    assert ours[name].dtype == value.dtype and ours[name].shape == value.shape, name
    assert ours[name].tobytes() == np.ascontiguousarray(value).tobytes(), name


def head_of(original, factor):
  """A trained tree: the head of the fixture `original`, times `factor`."""
  return {
    'lm_head': {
      'kernel': jax.numpy.asarray(original[1]['language_model.lm_head.weight'].float().numpy().T)
      * factor
    }
  }
