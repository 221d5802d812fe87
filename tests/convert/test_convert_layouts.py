"""The original layout against a mapping of the tests' own, both layouts against the published
lists, and round trips.
"""

import csv
import gzip
import json
import pathlib
import re
import shutil

from flax import nnx
import jax
import ml_dtypes
import numpy as np
import original_layout
from PIL import Image
from places import ROOT
import pytest
from safetensors.numpy import load_file, save_file
import tiny_janus
import torch
from transformers import AutoProcessor, AutoTokenizer, JanusForConditionalGeneration
from transformers import JanusConfig as HfConfig

from dsr_jax import convert
from dsr_jax.convert import __main__ as command
from dsr_jax.convert import configs_deepseek, table, weights
from dsr_jax.errors import InputError
from dsr_jax.models.janus import model as janus
from dsr_jax.models.janus.config import JanusConfig
from dsr_jax.models.janus.processor import SPECIALS, Processor

WEIGHTS = 'model.safetensors'


def run(source, target, layout='hf', **options):
  return command.convert(str(source), str(target), layout, **options)


# The tables.


def published(size, layout):
  with gzip.open(ROOT / f'tests/keys/janus_pro_{size}.{layout}.tsv.gz', 'rt') as f:
    return {
      row['name']: tuple(int(n) for n in row['shape'].split('x'))
      for row in csv.DictReader(f, delimiter='\t')
    }


@pytest.mark.parametrize(
  'layout, totals',
  [('hf', (2_076_636_811, 7_407_773_323)), ('deepseek', (2_089_232_011, 7_420_368_523))],
)
def test_full_size_models_have_exactly_the_published_tensors(layout, totals):
  for size, config, total in zip(
    ('1b', '7b'), (JanusConfig.janus_pro_1b(), JanusConfig.janus_pro_7b()), totals
  ):
    ours = {
      entry.name: entry.shape for entry in table.entries(janus.abstract_params(config), layout)
    }
    ours |= table.unused(config.vision, layout)
    assert ours == published(size, layout)
    assert (
      sum(
        int(np.prod(shape, dtype=np.int64))
        for name, shape in ours.items()
        if 'codebook_used' not in name
      )
      == total
    )


@pytest.mark.parametrize('layout', table.LAYOUTS)
def test_every_row_of_a_table_names_a_module(layout):
  modules = {
    '/'.join(str(key.key) for key in path[:-1])
    for path, _ in jax.tree_util.tree_leaves_with_path(janus.abstract_params(JanusConfig.tiny()))
  }
  for i, (pattern, *_) in enumerate(table.LAYOUTS[layout]):
    earlier = [row[0] for row in table.LAYOUTS[layout][:i]]
    assert any(
      re.fullmatch(pattern, m) and not any(re.fullmatch(p, m) for p in earlier) for m in modules
    ), pattern


# The original layout in.


def test_the_original_layout_loads_as_the_other_does(original, bundle):
  loaded = convert.load(original[0])
  rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), bundle.params)
  jax.tree.map(np.testing.assert_array_equal, loaded.params, rounded)
  assert loaded.config.text == bundle.config.text and loaded.config.vq == bundle.config.vq
  assert loaded.config.vision == bundle.config.vision
  # The original's processor always puts its system prompt first; the tiny model's other directory
  # does not.
  assert len(loaded.config.templates.understanding_prefix) > len(
    bundle.config.templates.understanding_prefix
  )
  assert loaded.config.templates.generation_prefix == bundle.config.templates.generation_prefix


@pytest.mark.parametrize('form', ['bin shards', 'safetensors', 'safetensors shards'])
def test_every_form_of_the_files_is_read_alike(original, original_copy, form):
  (original_copy / 'pytorch_model.bin').unlink()
  if form == 'bin shards':
    original_layout.save_bins(original_copy, original[1], 3)
  else:
    tensors = {name: original_layout.to_numpy(value) for name, value in original[1].items()}
    names = sorted(tensors)
    parts = [names] if form == 'safetensors' else [names[0::2], names[1::2]]
    files = [WEIGHTS] if form == 'safetensors' else ['model-a.safetensors', 'model-b.safetensors']
    for file, part in zip(files, parts):
      save_file({name: np.ascontiguousarray(tensors[name]) for name in part}, original_copy / file)
    if len(files) > 1:
      (original_copy / 'model.safetensors.index.json').write_text(
        json.dumps(
          dict(weight_map={name: file for file, part in zip(files, parts) for name in part})
        )
      )
  one, other = convert.load(original[0]), convert.load(original_copy)
  jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
  original_layout.same_tensors(other.kept_aside, one.kept_aside)


def test_a_checkpoint_written_by_hand_of_unaligned_tensors_is_read(tmp_path):
  # a header of any length, and tensors at odd offsets, are allowed
  values = dict(
    a=np.array([True]), b=np.arange(3, dtype=np.float32), c=np.arange(2, dtype=ml_dtypes.bfloat16)
  )
  header, offset = {}, 0
  for name, kind in (('a', 'BOOL'), ('b', 'F32'), ('c', 'BF16')):
    header[name] = dict(
      dtype=kind,
      shape=list(values[name].shape),
      data_offsets=[offset, offset + values[name].nbytes],
    )
    offset += values[name].nbytes
  head = json.dumps(header).encode()
  (tmp_path / WEIGHTS).write_bytes(
    len(head).to_bytes(8, 'little') + head + b''.join(v.tobytes() for v in values.values())
  )
  checkpoint = weights.Checkpoint(tmp_path)
  original_layout.same_tensors({name: checkpoint.read(name) for name in values}, values)


# Round trips.


def odd_model(tmp_path, hf_directory):
  """Another random transformers model: three layers, an odd vocabulary, more levels in the
  tokenizer, a tower of 3 heads.
  """
  tokenizer = Processor.from_directory(hf_directory).tokenizer
  config = tiny_janus.tiny_hf_config(
    {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIALS}
  ).to_dict()
  config['text_config'] |= dict(
    vocab_size=333,
    hidden_size=36,
    intermediate_size=51,
    num_hidden_layers=3,
    num_attention_heads=3,
    num_key_value_heads=3,
    head_dim=12,
  )
  config['vision_config'] |= dict(
    hidden_size=27,
    num_hidden_layers=3,
    num_attention_heads=3,
    mlp_ratio=2.0,
    image_size=24,
    patch_size=8,
    num_image_tokens=9,
    projection_dim=36,
  )
  config['vq_config'] |= dict(
    num_embeddings=37,
    embed_dim=5,
    latent_channels=11,
    base_channels=32,
    num_res_blocks=1,
    channel_multiplier=[1, 3, 1, 2],
    projection_dim=36,
    image_token_embed_dim=36,
  )
  config['tie_word_embeddings'] = False
  return tiny_janus.randomise(JanusForConditionalGeneration(HfConfig.from_dict(config)).eval(), 1)


@pytest.mark.parametrize('odd', [False, True])
def test_there_and_back_again_is_bit_exact(odd, hf_directory, hf_model, tmp_path):
  """original -> HF -> original -> our parameters -> original and HF."""
  model = odd_model(tmp_path, hf_directory) if odd else hf_model
  tensors = original_layout.write(
    tmp_path / 'o', hf_directory, model, dtype=torch.float32 if odd else torch.bfloat16, seed=2
  )
  run(tmp_path / 'o', tmp_path / 'h')
  hf = {
    name: value.to(torch.float32 if odd else torch.bfloat16)
    for name, value in model.state_dict().items()
  }
  original_layout.same_tensors(load_file(tmp_path / 'h' / WEIGHTS), hf)
  run(tmp_path / 'h', tmp_path / 'o2', 'deepseek')
  original_layout.same_tensors(load_file(tmp_path / 'o2' / WEIGHTS), tensors)
  ours = convert.load(tmp_path / 'o2')
  dtype = 'float32' if odd else 'bfloat16'
  zeros = convert.save(
    tmp_path / 'o3',
    ours.config,
    ours.params,
    tmp_path / 'o2',
    dtype=dtype,
    layout='deepseek',
    kept_aside=ours.kept_aside,
  )
  assert zeros == []
  original_layout.same_tensors(load_file(tmp_path / 'o3' / WEIGHTS), tensors)
  convert.save(tmp_path / 'h2', ours.config, ours.params, tmp_path / 'o3', dtype=dtype)
  original_layout.same_tensors(load_file(tmp_path / 'h2' / WEIGHTS), hf)
  # What was measured from the tensors at first is written down since, and reads the same.
  assert convert.load(tmp_path / 'o3').config == ours.config == convert.load(tmp_path / 'o').config
  assert json.loads((tmp_path / 'o2/config.json').read_text())['torch_dtype'] == dtype


def test_other_types_than_the_models_survive_as_they_are(original, tmp_path, original_copy):
  tensors = dict(original[1])
  used = 'gen_vision_model.quantize.codebook_used'
  tensors[used] = tensors[used].float()
  tensors['gen_embed.weight'] = tensors['gen_embed.weight'].half()
  original_layout.save_bins(original_copy, tensors, 1)
  run(original_copy, tmp_path / 'h')
  run(tmp_path / 'h', tmp_path / 'o', 'deepseek')
  original_layout.same_tensors(load_file(tmp_path / 'o' / WEIGHTS), tensors)


def test_from_the_other_layout_the_unused_tensors_are_announced_zeros(
  hf_directory, hf_model, tmp_path, capsys
):
  result = run(hf_directory, tmp_path / 'o', 'deepseek')
  unused = table.unused(convert.load(hf_directory).config.vision, 'deepseek')
  assert set(result['zeros']) == unused.keys() and len(unused) == 14
  assert (
    'written as zeros: 14 tensors' in capsys.readouterr().err
    and 'attn_pool.latent' in (tmp_path / 'o/README.md').read_text()
  )
  written = load_file(tmp_path / 'o' / WEIGHTS)
  want = original_layout.state_dict(hf_model.state_dict())
  assert written.keys() == want.keys()
  assert not any(written[name].any() for name in unused)
  assert {name: written[name].shape for name in unused} == unused
  original_layout.same_tensors(
    {k: v for k, v in written.items() if k not in unused},
    {k: v for k, v in want.items() if k not in unused},
  )


def test_one_type_for_all_weights_can_be_asked_for(original, tmp_path):
  run(original[0], tmp_path / 'h', dtype='float32')
  assert {value.dtype for value in load_file(tmp_path / 'h' / WEIGHTS).values()} == {
    np.dtype('float32')
  }
  assert json.loads((tmp_path / 'h/config.json').read_text())['dtype'] == 'float32'


# What the exported directory is good for.


def test_transformers_reads_what_was_the_original_layout(original, hf_model, tmp_path):
  run(original[0], tmp_path / 'h')
  model, info = JanusForConditionalGeneration.from_pretrained(
    tmp_path / 'h', dtype=torch.float32, output_loading_info=True
  )
  assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info
  rounded = {name: value.bfloat16().float() for name, value in hf_model.state_dict().items()}
  assert all(torch.equal(value, rounded[name]) for name, value in model.state_dict().items())
  assert not model.config.tie_word_embeddings and model.generation_config.guidance_scale == 5
  # Tokens: begin-of-sentence comes by itself, though the file left that to the original's class.
  ours = convert.load(tmp_path / 'h')
  t = ours.config.templates
  tokenizer, processor = (
    AutoTokenizer.from_pretrained(tmp_path / 'h'),
    AutoProcessor.from_pretrained(tmp_path / 'h'),
  )
  want = (
    list(t.generation_prefix)
    + ours.processor.encode_prompt('a red circle')
    + list(t.generation_suffix)
  )
  assert tokenizer('<|User|>: a red circle\n\n<|Assistant|>:<begin_of_image>')['input_ids'] == want
  assert tokenizer.padding_side == 'left' and tokenizer.pad_token_id == t.pad_id
  chat = [
    dict(role='user', content=[dict(type='image'), dict(type='text', text='Is there a disc?')])
  ]
  text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
  ids = processor(text=text, images=[Image.new('RGB', (20, 10))], return_tensors='np')['input_ids'][
    0
  ].tolist()
  assert ids == (
    list(t.understanding_prefix)
    + [t.image_id] * 16
    + list(t.understanding_infix)
    + ours.processor.encode_question('Is there a disc?')
    + list(t.understanding_suffix)
  )


def test_a_directory_that_transformers_itself_saved_becomes_either_layout(
  hf_directory, hf_model, tmp_path
):
  """transformers 5 writes fewer files than the published directories have, and other keys in
  config.json.
  """
  hf_model.save_pretrained(tmp_path / 'saved')
  AutoProcessor.from_pretrained(hf_directory).save_pretrained(tmp_path / 'saved')
  (tmp_path / 'saved/generation_config.json').unlink(missing_ok=True)
  assert not (tmp_path / 'saved/preprocessor_config.json').exists()
  run(tmp_path / 'saved', tmp_path / 'h')
  run(tmp_path / 'h', tmp_path / 'o', 'deepseek')
  run(tmp_path / 'o', tmp_path / 'again')
  for name in ('h', 'again'):
    original_layout.same_tensors(load_file(tmp_path / name / WEIGHTS), hf_model.state_dict())
    model = JanusForConditionalGeneration.from_pretrained(tmp_path / name)
    assert model.generation_config.guidance_scale == 5 and model.generation_config.generation_kwargs
    processors = [AutoProcessor.from_pretrained(d) for d in (hf_directory, tmp_path / name)]
    asked = [
      p(
        text='<image_placeholder> a red circle',
        images=[Image.new('RGB', (20, 10))],
        return_tensors='np',
      )
      for p in processors
    ]
    assert all((asked[0][key] == asked[1][key]).all() for key in asked[0])


def test_what_follows_from_the_rest_of_the_original_layout_is_made(
  original, original_copy, tmp_path
):
  for name in (
    'processor_config.json',
    'preprocessor_config.json',
    'tokenizer_config.json',
    'special_tokens_map.json',
  ):
    (original_copy / name).unlink()
  for layout in ('deepseek', 'hf'):
    run(original[0], tmp_path / f'whole_{layout}', layout)
    run(original_copy, tmp_path / f'made_{layout}', layout)

    made, whole = (
      {p.name for p in (tmp_path / f'{which}_{layout}').iterdir()} for which in ('made', 'whole')
    )
    assert made == whole
    assert (
      convert.load(tmp_path / f'made_{layout}').config
      == convert.load(tmp_path / f'whole_{layout}').config
    )


def test_the_original_code_finds_its_own_files(original, hf_directory, tmp_path):
  run(hf_directory, tmp_path / 'o', 'deepseek')
  for name in ('processor_config.json', 'preprocessor_config.json', 'config.json'):
    ours, theirs = (json.loads((d / name).read_text()) for d in (tmp_path / 'o', original[0]))
    for key, value in theirs.items():
      if key not in (
        'torch_dtype',
        'transformers_version',
        'dsr_jax',
        'language_config',
        'num_image_tokens',
      ):
        assert (
          {**ours[key], **value} == ours[key] if isinstance(value, dict) else ours[key] == value
        ), (name, key)
  assert 'num_image_tokens' in json.loads((tmp_path / 'o/processor_config.json').read_text())
  assert (tmp_path / 'o/tokenizer.json').read_bytes() == (
    hf_directory / 'tokenizer.json'
  ).read_bytes()
  one, other = convert.load(hf_directory).config, convert.load(tmp_path / 'o').config
  assert one == other  # templates and system prompt too


def test_a_codebook_whose_rows_are_no_unit_vectors_is_normalised_as_the_original_does(
  original, original_copy, hf_model
):
  """transformers' encoder does not, so it is asked with the rows of length one, which must be the
  same codes.
  """
  name = 'gen_vision_model.quantize.embedding.weight'
  tensors = {k: v.float() for k, v in original[1].items()}
  lengths = (
    torch.rand(tensors[name].shape[0], 1, generator=torch.Generator().manual_seed(3)) * 5 + 0.1
  )
  tensors[name] = tensors[name] * lengths
  original_layout.save_bins(original_copy, tensors, 1)
  bundle = convert.load(original_copy)
  assert np.ptp(np.linalg.norm(bundle.params['vqmodel']['quantize']['embedding'], axis=-1)) > 1
  model = nnx.merge(
    janus.graphdef_of(bundle.config), jax.tree.map(jax.numpy.asarray, bundle.params)
  )
  pixels = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
  rounded = {k: v.bfloat16().float() for k, v in hf_model.state_dict().items()}
  rounded['model.vqmodel.quantize.embedding.weight'] = torch.nn.functional.normalize(
    tensors[name], dim=-1
  )
  oracle = type(hf_model)(hf_model.config).eval()
  oracle.load_state_dict(rounded)
  with torch.no_grad():
    codes = oracle.model.vqmodel.encode(
      torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    ).image_tokens.reshape(2, -1)
    decoded = oracle.decode_image_tokens(codes)
  np.testing.assert_array_equal(jax.jit(model.vqmodel.encode)(pixels), codes)
  np.testing.assert_allclose(jax.jit(model.vqmodel.decode)(codes.numpy()), decoded, atol=1e-4)


# Configurations.


def published_config(width, **language):
  def section(cls, **params):
    return dict(cls=cls, params=params)

  def aligner(inputs):
    return section(
      'MlpProjector', depth=2, input_dim=inputs, n_embed=width, projector_type='mlp_gelu'
    )

  return dict(
    model_type='multi_modality',
    torch_dtype='bfloat16',
    aligner_config=aligner(1024),
    gen_aligner_config=aligner(8),
    gen_head_config=section(
      'vision_head', image_token_embed=width, image_token_size=16384, n_embed=width
    ),
    gen_vision_config=section('VQ-16', image_token_size=16384, n_embed=8),
    vision_config=section(
      'CLIPVisionTower',
      image_size=384,
      model_name='siglip_large_patch16_384',
      select_feature='same',
      select_layer=-1,
    ),
    language_config=dict(
      max_position_embeddings=16384,
      model_type='llama',
      torch_dtype='bfloat16',
      vocab_size=102400,
      **language,
    ),
  )


def published_1b():
  return published_config(
    2048,
    hidden_size=2048,
    intermediate_size=5632,
    num_attention_heads=16,
    num_hidden_layers=24,
    num_key_value_heads=16,
  )


def test_the_published_files_give_the_named_configs():
  assert (
    configs_deepseek.from_json(published_1b(), published('1b', 'deepseek'))
    == JanusConfig.janus_pro_1b()
  )
  # The 7B file leaves out width, inner width and heads: they are LlamaConfig's defaults.
  seven = published_config(4096, num_hidden_layers=30)
  assert (
    configs_deepseek.from_json(seven, published('7b', 'deepseek')) == JanusConfig.janus_pro_7b()
  )


@pytest.mark.parametrize(
  'config, shapes', [(JanusConfig.janus_pro_1b(), '1b'), (JanusConfig.janus_pro_7b(), '7b')]
)
def test_what_is_written_for_published_sizes_has_no_section_of_ours_and_reads_back(config, shapes):
  content = configs_deepseek.to_json(config, 'bfloat16')
  assert configs_deepseek.OURS not in content
  assert (
    configs_deepseek.from_json(json.loads(json.dumps(content)), published(shapes, 'deepseek'))
    == config
  )


def test_a_wrong_tensor_does_not_mislead_the_measured_sizes(original, original_copy):
  tensors = dict(original[1])
  tensors['gen_vision_model.encoder.conv_in.weight'] = torch.zeros(3, 3)
  tensors['vision_model.vision_tower.blocks.1.mlp.fc1.weight'] = torch.zeros(5, 32)
  original_layout.save_bins(original_copy, tensors, 1)
  with pytest.raises(InputError) as e:
    convert.load(original_copy)
  assert '2 of another shape: gen_vision_model.encoder.conv_in.weight (3, 3) instead of' in str(
    e.value
  )
  assert 'blocks.1.mlp.fc1.weight (5, 32) instead of (96, 32)' in str(
    e.value
  ) and 'missing' not in str(e.value)


@pytest.mark.parametrize(
  'change, found',
  [
    (lambda c: c.pop('gen_head_config'), 'no gen_head_config'),
    (lambda c: c['vision_config'].update(cls='SAMTower'), "'SAMTower'"),
    (lambda c: c['vision_config']['params'].update(select_layer=-2), 'select_layer -2'),
    (lambda c: c['vision_config']['params'].update(pixel_mean=[0.5]), 'pixel_mean'),
    (lambda c: c['aligner_config']['params'].update(depth=3), 'aligner_config.params.depth 3'),
    (lambda c: c['gen_aligner_config']['params'].update(n_embed=4096), 'n_embed 4096'),
    (lambda c: c['gen_head_config']['params'].update(image_token_size=8), 'image_token_size 8'),
    (lambda c: c['gen_vision_config'].update(cls='VQ-8'), "'VQ-8'"),
    (lambda c: c['language_config'].update(num_key_value_heads=4), 'grouped attention'),
    (lambda c: c['language_config'].update(rope_scaling=dict(type='linear', factor=2)), "'linear'"),
    (lambda c: c['language_config'].update(hidden_size='wide'), 'not a whole number'),
    (
      lambda c: c['aligner_config']['params'].update(input_dim='wide'),
      'aligner_config.params.input_dim in config.json',
    ),
    (lambda c: c['vision_config']['params'].update(image_size=100), 'images of 100 pixels'),
  ],
)
def test_what_the_model_cannot_express_is_refused(change, found):
  content = published_1b()
  change(content)
  with pytest.raises(InputError, match=re.escape(found)):
    configs_deepseek.from_json(content, published('1b', 'deepseek'))


def test_a_tower_that_the_original_code_does_not_have_is_not_written(
  hf_directory, edit_json, tmp_path
):
  source = pathlib.Path(shutil.copytree(hf_directory, tmp_path / 'copy'))
  edit_json(source / 'config.json', lambda c: c['vision_config'].update(layer_norm_eps=1e-5))
  with pytest.raises(InputError, match='layer_norm_eps'):
    run(source, tmp_path / 'o', 'deepseek')
  assert not (tmp_path / 'o').exists()


@pytest.mark.parametrize('tied', [True, False, None])
def test_the_head_of_the_original_layout(original, original_copy, edit_json, tied):
  """In the file it is used, whatever the config says; without it the embedding serves, where the
  config ties them.
  """

  def change(c):
    return (
      c['language_config'].pop('tie', None)
      if tied is None
      else c['language_config'].update(tie_word_embeddings=tied)
    )

  edit_json(original_copy / 'config.json', change)
  params = convert.load(original_copy).params
  np.testing.assert_array_equal(
    params['lm_head']['kernel'].T, original[1]['language_model.lm_head.weight'].float().numpy()
  )
  tensors = {k: v for k, v in original[1].items() if k != 'language_model.lm_head.weight'}
  original_layout.save_bins(original_copy, tensors, 1)
  if tied:
    params = convert.load(original_copy).params
    np.testing.assert_array_equal(
      params['lm_head']['kernel'].T, params['language_model']['embed_tokens']['embedding']
    )
  else:
    with pytest.raises(InputError, match='1 missing: language_model.lm_head.weight'):
      convert.load(original_copy)


def test_a_model_without_a_head_of_its_own_is_exported_with_one(hf_directory, edit_json, tmp_path):
  source = pathlib.Path(shutil.copytree(hf_directory, tmp_path / 'copy'))
  edit_json(source / 'config.json', lambda c: c.pop('tie_word_embeddings'))
  tensors = load_file(source / WEIGHTS)
  del tensors['lm_head.weight']
  save_file(tensors, source / WEIGHTS, metadata=dict(format='pt'))
  run(source, tmp_path / 'o', 'deepseek')
  written = load_file(tmp_path / 'o' / WEIGHTS)
  np.testing.assert_array_equal(
    written['language_model.lm_head.weight'], tensors['model.language_model.embed_tokens.weight']
  )
