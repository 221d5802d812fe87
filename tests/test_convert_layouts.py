"""The original layout against a mapping of the tests' own, both layouts against the published lists, and everything on the way."""

import csv
import gzip
import json
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import original_layout
import pytest
from safetensors.numpy import load_file, save_file
import torch

from dsr_jax import convert
from dsr_jax.convert import __main__ as command, configs_deepseek, directory as directory_lib, placing, table, weights, writing
from dsr_jax.errors import InputError
from dsr_jax.models import janus
from dsr_jax.models.config import JanusConfig

ROOT = pathlib.Path(__file__).parent.parent
WEIGHTS = 'model.safetensors'
KEPT = directory_lib.KEPT_ASIDE


@pytest.fixture(scope='module')
def original(hf_directory, hf_model, tmp_path_factory):
  """(directory, state dict): the tiny model in the original layout, bfloat16, in one .bin; not to be written to."""
  directory = tmp_path_factory.mktemp('original') / 'tiny'
  return directory, original_layout.write(directory, hf_directory, hf_model)


@pytest.fixture
def copy(original, tmp_path):
  """A copy of the original layout, to be damaged."""
  return pathlib.Path(shutil.copytree(original[0], tmp_path / 'copy'))


def to_numpy(tensor):
  tensor = tensor.detach()
  return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def same_tensors(ours, theirs):
  """Names, types, shapes and every bit."""
  assert ours.keys() == theirs.keys()
  for name, value in theirs.items():
    value = to_numpy(value) if isinstance(value, torch.Tensor) else value
    assert ours[name].dtype == value.dtype and ours[name].shape == value.shape, name
    assert ours[name].tobytes() == np.ascontiguousarray(value).tobytes(), name


def run(source, target, layout='hf', **options):
  return command.convert(str(source), str(target), layout, **options)


# The tables.


def published(size, layout):
  with gzip.open(ROOT / f'tests/keys/janus_pro_{size}.{layout}.tsv.gz', 'rt') as f:
    return {row['name']: tuple(int(n) for n in row['shape'].split('x')) for row in csv.DictReader(f, delimiter='\t')}


@pytest.mark.parametrize('layout, totals', [('hf', (2_076_636_811, 7_407_773_323)), ('deepseek', (2_089_232_011, 7_420_368_523))])
def test_full_size_models_have_exactly_the_published_tensors(layout, totals):
  for size, config, total in zip(('1b', '7b'), (JanusConfig.janus_pro_1b(), JanusConfig.janus_pro_7b()), totals):
    ours = {entry.name: entry.shape for entry in table.entries(janus.abstract_params(config), layout)}
    ours |= table.unused(config.vision, layout)
    assert ours == published(size, layout)
    assert sum(int(np.prod(shape, dtype=np.int64)) for name, shape in ours.items() if 'codebook_used' not in name) == total


@pytest.mark.parametrize('layout', table.LAYOUTS)
def test_every_row_of_a_table_names_a_module(layout):
  modules = {'/'.join(str(key.key) for key in path[:-1])
             for path, _ in jax.tree_util.tree_leaves_with_path(janus.abstract_params(JanusConfig.tiny()))}
  for i, (pattern, *_) in enumerate(table.LAYOUTS[layout]):
    earlier = [row[0] for row in table.LAYOUTS[layout][:i]]
    assert any(re.fullmatch(pattern, m) and not any(re.fullmatch(p, m) for p in earlier) for m in modules), pattern


# The original layout in.


def test_the_original_layout_loads_as_the_other_does(original, bundle):
  loaded = convert.load(original[0])
  rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), bundle.params)
  jax.tree.map(np.testing.assert_array_equal, loaded.params, rounded)
  assert loaded.config.text == bundle.config.text and loaded.config.vq == bundle.config.vq
  assert loaded.config.vision == bundle.config.vision
  # The original's processor always puts its system prompt first; the tiny model's other directory does not.
  assert len(loaded.config.templates.understanding_prefix) > len(bundle.config.templates.understanding_prefix)
  assert loaded.config.templates.generation_prefix == bundle.config.templates.generation_prefix


@pytest.mark.parametrize('form', ['bin shards', 'safetensors', 'safetensors shards'])
def test_every_form_of_the_files_is_read_alike(original, copy, form):
  (copy / 'pytorch_model.bin').unlink()
  if form == 'bin shards':
    original_layout.save_bins(copy, original[1], 3)
  else:
    tensors = {name: to_numpy(value) for name, value in original[1].items()}
    names = sorted(tensors)
    parts = [names] if form == 'safetensors' else [names[0::2], names[1::2]]
    files = [WEIGHTS] if form == 'safetensors' else ['model-a.safetensors', 'model-b.safetensors']
    for file, part in zip(files, parts):
      save_file({name: np.ascontiguousarray(tensors[name]) for name in part}, copy / file)
    if len(files) > 1:
      (copy / 'model.safetensors.index.json').write_text(json.dumps(dict(
        weight_map={name: file for file, part in zip(files, parts) for name in part})))
  one, other = convert.load(original[0]), convert.load(copy)
  jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
  same_tensors(other.kept_aside, one.kept_aside)


def test_a_checkpoint_written_by_hand_of_unaligned_tensors_is_read(tmp_path):
  # a header of any length, and tensors at odd offsets, are allowed
  values = dict(a=np.array([True]), b=np.arange(3, dtype=np.float32), c=np.arange(2, dtype=ml_dtypes.bfloat16))
  header, offset = {}, 0
  for name, kind in (('a', 'BOOL'), ('b', 'F32'), ('c', 'BF16')):
    header[name] = dict(dtype=kind, shape=list(values[name].shape), data_offsets=[offset, offset + values[name].nbytes])
    offset += values[name].nbytes
  head = json.dumps(header).encode()
  (tmp_path / WEIGHTS).write_bytes(len(head).to_bytes(8, 'little') + head + b''.join(v.tobytes() for v in values.values()))
  checkpoint = weights.Checkpoint(tmp_path)
  same_tensors({name: checkpoint.read(name) for name in values}, values)


# Round trips.


def odd_model(tmp_path, hf_directory):
  """Another random transformers model: three layers, an odd vocabulary, more levels in the tokenizer, a tower of 3 heads."""
  from transformers import JanusConfig as HfConfig, JanusForConditionalGeneration
  from conftest import randomise, tiny_hf_config
  from dsr_jax.processor import Processor, SPECIALS
  tokenizer = Processor.from_directory(hf_directory).tokenizer
  config = tiny_hf_config({t: tokenizer.convert_tokens_to_ids(t) for t in SPECIALS}).to_dict()
  config['text_config'] |= dict(vocab_size=333, hidden_size=36, intermediate_size=51, num_hidden_layers=3,
                                num_attention_heads=3, num_key_value_heads=3, head_dim=12)
  config['vision_config'] |= dict(hidden_size=27, num_hidden_layers=3, num_attention_heads=3, mlp_ratio=2.0, image_size=24,
                                  patch_size=8, num_image_tokens=9, projection_dim=36)
  config['vq_config'] |= dict(num_embeddings=37, embed_dim=5, latent_channels=11, base_channels=32, num_res_blocks=1,
                              channel_multiplier=[1, 3, 1, 2], projection_dim=36, image_token_embed_dim=36)
  config['tie_word_embeddings'] = False
  return randomise(JanusForConditionalGeneration(HfConfig.from_dict(config)).eval(), 1)


@pytest.mark.parametrize('odd', [False, True])
def test_there_and_back_again_is_bit_exact(odd, hf_directory, hf_model, tmp_path):
  """original -> HF -> original -> our parameters -> original and HF."""
  model = odd_model(tmp_path, hf_directory) if odd else hf_model
  tensors = original_layout.write(tmp_path / 'o', hf_directory, model, dtype=torch.float32 if odd else torch.bfloat16, seed=2)
  run(tmp_path / 'o', tmp_path / 'h')
  hf = {name: value.to(torch.float32 if odd else torch.bfloat16) for name, value in model.state_dict().items()}
  same_tensors(load_file(tmp_path / 'h' / WEIGHTS), hf)
  run(tmp_path / 'h', tmp_path / 'o2', 'deepseek')
  same_tensors(load_file(tmp_path / 'o2' / WEIGHTS), tensors)
  ours = convert.load(tmp_path / 'o2')
  dtype = 'float32' if odd else 'bfloat16'
  zeros = convert.save(tmp_path / 'o3', ours.config, ours.params, tmp_path / 'o2', dtype=dtype, layout='deepseek',
                       kept_aside=ours.kept_aside)
  assert zeros == []
  same_tensors(load_file(tmp_path / 'o3' / WEIGHTS), tensors)
  convert.save(tmp_path / 'h2', ours.config, ours.params, tmp_path / 'o3', dtype=dtype)
  same_tensors(load_file(tmp_path / 'h2' / WEIGHTS), hf)
  # What was measured from the tensors at first is written down since, and reads the same.
  assert convert.load(tmp_path / 'o3').config == ours.config == convert.load(tmp_path / 'o').config
  assert json.loads((tmp_path / 'o2/config.json').read_text())['torch_dtype'] == dtype


def test_other_types_than_the_models_survive_as_they_are(original, tmp_path, copy):
  tensors = dict(original[1])
  used = 'gen_vision_model.quantize.codebook_used'
  tensors[used] = tensors[used].float()
  tensors['gen_embed.weight'] = tensors['gen_embed.weight'].half()
  original_layout.save_bins(copy, tensors, 1)
  run(copy, tmp_path / 'h')
  run(tmp_path / 'h', tmp_path / 'o', 'deepseek')
  same_tensors(load_file(tmp_path / 'o' / WEIGHTS), tensors)


def test_from_the_other_layout_the_unused_tensors_are_announced_zeros(hf_directory, hf_model, tmp_path, capsys):
  result = run(hf_directory, tmp_path / 'o', 'deepseek')
  unused = table.unused(convert.load(hf_directory).config.vision, 'deepseek')
  assert set(result['zeros']) == unused.keys() and len(unused) == 14
  assert 'made as zeros: 14 tensors' in capsys.readouterr().err and 'attn_pool.latent' in (tmp_path / 'o/README.md').read_text()
  written = load_file(tmp_path / 'o' / WEIGHTS)
  want = original_layout.state_dict(hf_model.state_dict())
  assert written.keys() == want.keys()
  assert not any(written[name].any() for name in unused)
  assert {name: written[name].shape for name in unused} == unused
  same_tensors({k: v for k, v in written.items() if k not in unused}, {k: v for k, v in want.items() if k not in unused})


def test_one_type_for_all_weights_can_be_asked_for(original, tmp_path):
  run(original[0], tmp_path / 'h', dtype='float32')
  assert {value.dtype for value in load_file(tmp_path / 'h' / WEIGHTS).values()} == {np.dtype('float32')}
  assert json.loads((tmp_path / 'h/config.json').read_text())['dtype'] == 'float32'


# What the exported directory is good for.


def test_transformers_reads_what_was_the_original_layout(original, hf_model, tmp_path):
  from transformers import AutoProcessor, AutoTokenizer, JanusForConditionalGeneration
  from PIL import Image
  run(original[0], tmp_path / 'h')
  model, info = JanusForConditionalGeneration.from_pretrained(tmp_path / 'h', dtype=torch.float32, output_loading_info=True)
  assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info
  rounded = {name: value.bfloat16().float() for name, value in hf_model.state_dict().items()}
  assert all(torch.equal(value, rounded[name]) for name, value in model.state_dict().items())
  assert not model.config.tie_word_embeddings and model.generation_config.guidance_scale == 5
  # Tokens: begin-of-sentence comes by itself, though the file left that to the original's class.
  ours = convert.load(tmp_path / 'h')
  t = ours.config.templates
  tokenizer, processor = AutoTokenizer.from_pretrained(tmp_path / 'h'), AutoProcessor.from_pretrained(tmp_path / 'h')
  want = list(t.generation_prefix) + ours.processor.encode_prompt('a red circle') + list(t.generation_suffix)
  assert tokenizer('<|User|>: a red circle\n\n<|Assistant|>:<begin_of_image>')['input_ids'] == want
  assert tokenizer.padding_side == 'left' and tokenizer.pad_token_id == t.pad_id
  chat = [dict(role='user', content=[dict(type='image'), dict(type='text', text='Is there a disc?')])]
  text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
  ids = processor(text=text, images=[Image.new('RGB', (20, 10))], return_tensors='np')['input_ids'][0].tolist()
  assert ids == (list(t.understanding_prefix) + [t.image_id] * 16 + list(t.understanding_infix)
                 + ours.processor.encode_question('Is there a disc?') + list(t.understanding_suffix))


def test_a_directory_that_transformers_itself_saved_becomes_either_layout(hf_directory, hf_model, tmp_path):
  """transformers 5 writes fewer files than the published directories have, and other keys in config.json."""
  from transformers import AutoProcessor, JanusForConditionalGeneration
  hf_model.save_pretrained(tmp_path / 'saved')
  AutoProcessor.from_pretrained(hf_directory).save_pretrained(tmp_path / 'saved')
  (tmp_path / 'saved/generation_config.json').unlink(missing_ok=True)
  assert not (tmp_path / 'saved/preprocessor_config.json').exists()
  run(tmp_path / 'saved', tmp_path / 'h')
  run(tmp_path / 'h', tmp_path / 'o', 'deepseek')
  run(tmp_path / 'o', tmp_path / 'again')
  for name in ('h', 'again'):
    same_tensors(load_file(tmp_path / name / WEIGHTS), hf_model.state_dict())
    model = JanusForConditionalGeneration.from_pretrained(tmp_path / name)
    assert model.generation_config.guidance_scale == 5 and model.generation_config.generation_kwargs
    processors = [AutoProcessor.from_pretrained(d) for d in (hf_directory, tmp_path / name)]
    from PIL import Image
    asked = [p(text='<image_placeholder> a red circle', images=[Image.new('RGB', (20, 10))], return_tensors='np') for p in processors]
    assert all((asked[0][key] == asked[1][key]).all() for key in asked[0])


def test_what_follows_from_the_rest_of_the_original_layout_is_made(original, copy, tmp_path):
  for name in ('processor_config.json', 'preprocessor_config.json', 'tokenizer_config.json', 'special_tokens_map.json'):
    (copy / name).unlink()
  for layout in ('deepseek', 'hf'):
    run(original[0], tmp_path / f'whole_{layout}', layout)
    run(copy, tmp_path / f'made_{layout}', layout)
    names = lambda which: {p.name for p in (tmp_path / f'{which}_{layout}').iterdir()}
    assert names('made') == names('whole')
    assert convert.load(tmp_path / f'made_{layout}').config == convert.load(tmp_path / f'whole_{layout}').config


def test_the_original_code_finds_its_own_files(original, hf_directory, tmp_path):
  run(hf_directory, tmp_path / 'o', 'deepseek')
  for name in ('processor_config.json', 'preprocessor_config.json', 'config.json'):
    ours, theirs = (json.loads((d / name).read_text()) for d in (tmp_path / 'o', original[0]))
    for key, value in theirs.items():
      if key not in ('torch_dtype', 'transformers_version', 'dsr_jax', 'language_config', 'num_image_tokens'):
        assert {**ours[key], **value} == ours[key] if isinstance(value, dict) else ours[key] == value, (name, key)
  assert 'num_image_tokens' in json.loads((tmp_path / 'o/processor_config.json').read_text())
  assert (tmp_path / 'o/tokenizer.json').read_bytes() == (hf_directory / 'tokenizer.json').read_bytes()
  one, other = convert.load(hf_directory).config, convert.load(tmp_path / 'o').config
  assert one == other  # templates and system prompt too


def test_a_codebook_whose_rows_are_no_unit_vectors_is_normalised_as_the_original_does(original, copy, hf_model):
  """transformers' encoder does not, so it is asked with the rows of length one, which must be the same codes."""
  from flax import nnx
  name = 'gen_vision_model.quantize.embedding.weight'
  tensors = {k: v.float() for k, v in original[1].items()}
  lengths = torch.rand(tensors[name].shape[0], 1, generator=torch.Generator().manual_seed(3)) * 5 + 0.1
  tensors[name] = tensors[name] * lengths
  original_layout.save_bins(copy, tensors, 1)
  bundle = convert.load(copy)
  assert np.ptp(np.linalg.norm(bundle.params['vqmodel']['quantize']['embedding'], axis=-1)) > 1
  model = nnx.merge(janus.graphdef_of(bundle.config), jax.tree.map(jax.numpy.asarray, bundle.params))
  pixels = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
  rounded = {k: v.bfloat16().float() for k, v in hf_model.state_dict().items()}
  rounded['model.vqmodel.quantize.embedding.weight'] = torch.nn.functional.normalize(tensors[name], dim=-1)
  oracle = type(hf_model)(hf_model.config).eval()
  oracle.load_state_dict(rounded)
  with torch.no_grad():
    codes = oracle.model.vqmodel.encode(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).image_tokens.reshape(2, -1)
    decoded = oracle.decode_image_tokens(codes)
  np.testing.assert_array_equal(jax.jit(model.vqmodel.encode)(pixels), codes)
  np.testing.assert_allclose(jax.jit(model.vqmodel.decode)(codes.numpy()), decoded, atol=1e-4)


# Configurations.


def published_config(width, **language):
  section = lambda cls, **params: dict(cls=cls, params=params)
  aligner = lambda inputs: section('MlpProjector', depth=2, input_dim=inputs, n_embed=width, projector_type='mlp_gelu')
  return dict(
    model_type='multi_modality', torch_dtype='bfloat16', aligner_config=aligner(1024), gen_aligner_config=aligner(8),
    gen_head_config=section('vision_head', image_token_embed=width, image_token_size=16384, n_embed=width),
    gen_vision_config=section('VQ-16', image_token_size=16384, n_embed=8),
    vision_config=section('CLIPVisionTower', image_size=384, model_name='siglip_large_patch16_384', select_feature='same',
                          select_layer=-1),
    language_config=dict(max_position_embeddings=16384, model_type='llama', torch_dtype='bfloat16', vocab_size=102400, **language))


def published_1b():
  return published_config(2048, hidden_size=2048, intermediate_size=5632, num_attention_heads=16, num_hidden_layers=24,
                          num_key_value_heads=16)


def test_the_published_files_give_the_named_configs():
  assert configs_deepseek.from_json(published_1b(), published('1b', 'deepseek')) == JanusConfig.janus_pro_1b()
  # The 7B file leaves out width, inner width and heads: they are LlamaConfig's defaults.
  seven = published_config(4096, num_hidden_layers=30)
  assert configs_deepseek.from_json(seven, published('7b', 'deepseek')) == JanusConfig.janus_pro_7b()


@pytest.mark.parametrize('config, shapes', [(JanusConfig.janus_pro_1b(), '1b'), (JanusConfig.janus_pro_7b(), '7b')])
def test_what_is_written_for_published_sizes_has_no_section_of_ours_and_reads_back(config, shapes):
  content = configs_deepseek.to_json(config, 'bfloat16')
  assert configs_deepseek.OURS not in content
  assert configs_deepseek.from_json(json.loads(json.dumps(content)), published(shapes, 'deepseek')) == config


def test_a_wrong_tensor_does_not_mislead_the_measured_sizes(original, copy):
  tensors = dict(original[1])
  tensors['gen_vision_model.encoder.conv_in.weight'] = torch.zeros(3, 3)
  tensors['vision_model.vision_tower.blocks.1.mlp.fc1.weight'] = torch.zeros(5, 32)
  original_layout.save_bins(copy, tensors, 1)
  with pytest.raises(InputError) as e:
    convert.load(copy)
  assert '2 of another shape: gen_vision_model.encoder.conv_in.weight (3, 3) instead of' in str(e.value)
  assert 'blocks.1.mlp.fc1.weight (5, 32) instead of (96, 32)' in str(e.value) and 'missing' not in str(e.value)


@pytest.mark.parametrize('change, found', [
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
  (lambda c: c['language_config'].update(hidden_size='wide'), 'not a number'),
  (lambda c: c['vision_config']['params'].update(image_size=100), 'pictures of 100 pixels'),
])
def test_what_the_model_cannot_express_is_refused(change, found):
  content = published_1b()
  change(content)
  with pytest.raises(InputError, match=re.escape(found)):
    configs_deepseek.from_json(content, published('1b', 'deepseek'))


def test_a_tower_that_the_original_code_does_not_have_is_not_written(hf_directory, edit_json, tmp_path):
  source = pathlib.Path(shutil.copytree(hf_directory, tmp_path / 'copy'))
  edit_json(source / 'config.json', lambda c: c['vision_config'].update(layer_norm_eps=1e-5))
  with pytest.raises(InputError, match='layer_norm_eps'):
    run(source, tmp_path / 'o', 'deepseek')
  assert not (tmp_path / 'o').exists()


@pytest.mark.parametrize('tied', [True, False, None])
def test_the_head_of_the_original_layout(original, copy, edit_json, tied):
  """In the file it is used, whatever the config says; without it the embedding serves, where the config ties them."""
  change = lambda c: c['language_config'].pop('tie', None) if tied is None else c['language_config'].update(tie_word_embeddings=tied)
  edit_json(copy / 'config.json', change)
  params = convert.load(copy).params
  np.testing.assert_array_equal(params['lm_head']['kernel'].T, original[1]['language_model.lm_head.weight'].float().numpy())
  tensors = {k: v for k, v in original[1].items() if k != 'language_model.lm_head.weight'}
  original_layout.save_bins(copy, tensors, 1)
  if tied:
    params = convert.load(copy).params
    np.testing.assert_array_equal(params['lm_head']['kernel'].T, params['language_model']['embed_tokens']['embedding'])
  else:
    with pytest.raises(InputError, match='1 missing: language_model.lm_head.weight'):
      convert.load(copy)


def test_a_model_without_a_head_of_its_own_is_exported_with_one(hf_directory, edit_json, tmp_path):
  source = pathlib.Path(shutil.copytree(hf_directory, tmp_path / 'copy'))
  edit_json(source / 'config.json', lambda c: c.pop('tie_word_embeddings'))
  tensors = load_file(source / WEIGHTS)
  del tensors['lm_head.weight']
  save_file(tensors, source / WEIGHTS, metadata=dict(format='pt'))
  run(source, tmp_path / 'o', 'deepseek')
  written = load_file(tmp_path / 'o' / WEIGHTS)
  np.testing.assert_array_equal(written['language_model.lm_head.weight'], tensors['model.language_model.embed_tokens.weight'])


# Runs.


@pytest.fixture(scope='module')
def make_run(original, tmp_path_factory):
  """Function (trained tree, method overrides) -> the workdir of a run that began with the original layout's tiny model."""
  from dsr_jax import checkpoints, config as config_lib

  def make(trained, **method):
    folder = tmp_path_factory.mktemp('run')
    source = convert.Stored(original[0]).source()
    about = {'method': {**config_lib.to_json(config_lib.Config())['method'], **method}, 'data': {'prompts': 'mine.txt'},
             'model': {'name': str(original[0]), 'fingerprint': source['hash']}}
    kept = checkpoints.Checkpoints(str(folder), about)
    kept.save(7, {'params': trained, 'opt_state': {'mu': jax.numpy.zeros(3)}, 'step': jax.numpy.int32(7)})
    kept.wait()
    kept.close()
    return folder

  return make


def head_of(original, factor):
  return {'lm_head': {'kernel': jax.numpy.asarray(original[1]['language_model.lm_head.weight'].float().numpy().T) * factor}}


def test_a_run_becomes_either_layout_with_the_source_models_other_tensors(original, make_run, tmp_path):
  workdir = make_run(head_of(original, 1.001), guidance=2.5)
  (workdir / 'summary.json').write_text(json.dumps(dict(
    step=7, steps=7, evaluation={'generation': dict(before=20.0, after=28.5, step=7)}, rewards={})))
  run(f'{workdir}@7', tmp_path / 'o', 'deepseek')
  name = 'language_model.lm_head.weight'
  want = {**original[1], name: original[1][name].float() * 1.001}
  same_tensors(load_file(tmp_path / 'o' / WEIGHTS), want)  # the trained leaf keeps every bit, the others are as they were
  run(workdir, tmp_path / 'h')
  assert json.loads((tmp_path / 'h/generation_config.json').read_text())['guidance_scale'] == 2.5
  card = (tmp_path / 'h/README.md').read_text()
  for part in ('step of the run: 7', '| objective | simpo |', '| prompts | mine.txt |', '| generation | 20.0000 | 28.5000 |'):
    assert part in card
  assert str(tmp_path) not in card and str(original[0]) not in card
  np.testing.assert_array_equal(convert.load(tmp_path / 'h').params['lm_head']['kernel'], want[name].numpy().T)


def test_a_run_of_two_models_is_asked_which(original, make_run, tmp_path):
  workdir = make_run({'generator': head_of(original, 2), 'understander': head_of(original, 3)}, strategy='separate')
  with pytest.raises(InputError, match=':generator or .*:understander'):
    run(workdir, tmp_path / 'x')
  for role, factor in (('generator', 2), ('understander', 3)):
    run(f'{workdir}@7:{role}', tmp_path / role)
    np.testing.assert_array_equal(convert.load(tmp_path / role).params['lm_head']['kernel'],
                                  head_of(original, factor)['lm_head']['kernel'])


def test_a_role_of_a_run_of_one_model_is_refused(original, make_run, tmp_path):
  with pytest.raises(InputError, match='trained one model'):
    run(f'{make_run(head_of(original, 1))}:generator', tmp_path / 'x')


def test_adapters_are_folded_in(original, make_run, tmp_path):
  from dsr_jax import lora
  base = convert.load(original[0])
  adapters = lora.init(base.params, 3, 0)
  adapters = jax.tree.map(lambda x: x + 0.1, adapters)
  run(make_run({'lora': adapters}), tmp_path / 'h')
  got = convert.load(tmp_path / 'h').params
  want = lora.merged(base.params, adapters)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
  kernel = lambda params: params['language_model']['layers']['mlp']['down_proj']['kernel']
  assert np.abs(kernel(got) - kernel(base.params)).max() > 0.01


# Memory.


def test_converting_holds_a_piece_at_a_time(hf_directory, tmp_path, monkeypatch):
  size = (hf_directory / WEIGHTS).stat().st_size
  monkeypatch.setattr(writing, 'PIECE_BYTES', 1 << 14)
  stored = convert.Stored(hf_directory)
  tracemalloc.start()
  convert.export(tmp_path / 'o', 'deepseek', stored.config, stored.processor, stored.atom, hf_directory, kept_aside={},
                 dtype='bfloat16')
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert size > 1 << 20 and peak < size / 2  # tokenizer and names are most of it


@pytest.mark.parametrize('slab, parts', [(1 << 11, ['lm_head']), (1 << 30, ['lm_head', 'language_model', 'vqmodel'])])
def test_leaves_go_to_their_shards_on_eight_devices(hf_directory, slab, parts):
  """As NumPy arrays, whatever the size of the slabs; each device asked only for its own part."""
  code = f'''
import jax, numpy as np, pathlib
jax.config.update('jax_num_cpu_devices', 8)
from dsr_jax import convert, sharding, config
from dsr_jax.convert import placing
placing.SLAB_BYTES = {slab}
mesh = sharding.make_mesh(config.Mesh(data=1, fsdp=4, tp=2))
whole = convert.load({str(hf_directory)!r})
lazy = convert.load({str(hf_directory)!r}, lambda leaf: leaf)
layout = sharding.shardings(whole.params | {{'lora': {{'a': np.zeros((1, 1))}}, 'reward': {{'a': np.zeros((1, 1))}}}}, mesh)
asked = []
read = placing.Leaf.__getitem__
placing.Leaf.__getitem__ = lambda self, index: asked.append(read(self, index)) or asked[-1]
for name in {parts}:
  placed = sharding.place(lazy.params[name], layout[name])
  jax.tree.map(lambda a, b, s: (np.testing.assert_array_equal(a, b), a.sharding.is_equivalent_to(s, a.ndim) or 1 / 0),
               placed, whole.params[name], layout[name])
  if name == 'lm_head':
    kernel = whole.params['lm_head']['kernel']
    assert sum(x.nbytes for x in asked) == kernel.nbytes and max(x.nbytes for x in asked) <= kernel.nbytes // 8
print('good')
'''
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert done.stdout == 'good\n', done.stderr[-2000:]


def test_a_leaf_reads_what_it_is_asked_for(hf_directory):
  whole, lazy = convert.load(hf_directory).params, convert.load(hf_directory, lambda leaf: leaf).params
  for path in (('language_model', 'layers', 'mlp', 'up_proj', 'kernel'), ('lm_head', 'kernel'), ('vqmodel', 'quant_conv', 'kernel')):
    a, b = whole, lazy
    for key in path:
      a, b = a[key], b[key]
    assert isinstance(b, placing.Leaf) and (b.shape, b.ndim, b.size, b.nbytes) == (a.shape, a.ndim, a.size, a.nbytes)
    np.testing.assert_array_equal(b, a)
    np.testing.assert_array_equal(b[-1:, 1:3], a[-1:, 1:3])
    np.testing.assert_array_equal(b[1:], a[1:])


# Bad input.


@pytest.mark.parametrize('change, found', [
  (lambda d: (d / 'config.json').unlink(), 'no config.json'),
  (lambda d: (d / 'config.json').write_text(json.dumps(dict(model_type='llama'))), "type 'llama'"),
  (lambda d: (d / 'tokenizer.json').unlink(), 'no tokenizer.json'),
  (lambda d: (d / 'pytorch_model.bin').unlink(), 'no weights'),
  (lambda d: (d / 'pytorch_model.bin').write_bytes(b''), 'truncated|damaged'),
  (lambda d: (d / 'pytorch_model.bin').write_bytes((d / 'pytorch_model.bin').read_bytes()[:9999]), 'truncated|damaged'),
  (lambda d: (d / 'pytorch_model.bin').rename(d / 'model.pth'), 'only model.pth'),
])
def test_a_damaged_source_is_one_sentence_and_leaves_nothing(copy, tmp_path, change, found):
  change(copy)
  with pytest.raises(InputError, match=found) as e:
    run(copy, tmp_path / 'h')
  assert '\n' not in str(e.value) and '; expected' in str(e.value)
  assert [path.name for path in tmp_path.iterdir()] == ['copy']


def test_half_a_sharded_bin_is_refused(original, copy):
  (copy / 'pytorch_model.bin').unlink()
  original_layout.save_bins(copy, original[1], 3)
  (copy / 'pytorch_model-00002-of-00003.bin').unlink()
  with pytest.raises(InputError, match='pytorch_model-00002-of-00003.bin'):
    convert.load(copy)


def test_every_wrong_tensor_of_the_original_layout_is_named_in_one_error(original, copy):
  tensors = dict(original[1])
  del tensors['gen_embed.weight'], tensors['vision_model.vision_tower.attn_pool.kv.bias']
  tensors['surplus'] = torch.zeros(3)
  tensors['vision_model.vision_tower.blocks.0.attn.qkv.bias'] = torch.zeros(32)
  tensors['vision_model.vision_tower.pos_embed'] = tensors['vision_model.vision_tower.pos_embed'][0]
  tensors['aligner.layers.0.bias'] = torch.zeros(48, dtype=torch.int32)
  original_layout.save_bins(copy, tensors, 1)
  with pytest.raises(InputError) as e:
    convert.load(copy)
  for part in ('2 missing: gen_embed.weight, vision_model.vision_tower.attn_pool.kv.bias', '1 unknown: surplus',
               'attn.qkv.bias (32,) instead of (96,)', 'pos_embed (16, 32) instead of (1, 16, 32)', 'aligner.layers.0.bias I32'):
    assert part in str(e.value)


def test_code_in_a_pickle_is_never_run(copy, tmp_path):

  class Evil:

    def __reduce__(self):
      return (pathlib.Path.touch, (tmp_path / 'ran',))

  for write in (lambda f: torch.save({'a': Evil()}, f), lambda f: f.write(pickle.dumps({'a': Evil()}))):
    with open(copy / 'pytorch_model.bin', 'wb') as f:
      write(f)
    with pytest.raises(InputError, match='more than tensors|damaged') as e:
      convert.load(copy)
    assert '\n' not in str(e.value) and not (tmp_path / 'ran').exists()


def test_a_pickle_of_something_else_is_refused(copy):
  torch.save([torch.zeros(3)], copy / 'pytorch_model.bin')
  with pytest.raises(InputError, match='no plain state dict'):
    convert.load(copy)


def test_without_torch_a_bin_file_is_one_sentence(copy, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(InputError, match='no torch installed'):
    convert.load(copy)


def test_kept_tensors_of_another_model_are_refused(original, tmp_path):
  run(original[0], tmp_path / 'h')
  tensors = load_file(tmp_path / 'h' / KEPT)
  save_file({**tensors, 'odd': np.zeros(2, np.float32)}, tmp_path / 'h' / KEPT)
  with pytest.raises(InputError, match='1 unknown: odd'):
    convert.load(tmp_path / 'h')


def test_a_full_target_is_refused_unless_overwritten(original, tmp_path):
  (tmp_path / 'h').mkdir()
  (tmp_path / 'h/mine.txt').write_text('keep')
  with pytest.raises(InputError, match='not empty.*--overwrite'):
    run(original[0], tmp_path / 'h')
  assert [path.name for path in (tmp_path / 'h').iterdir()] == ['mine.txt']
  run(original[0], tmp_path / 'h', overwrite=True)
  assert convert.load(tmp_path / 'h') and [path.name for path in tmp_path.iterdir()] == ['h']


def test_a_target_that_holds_the_source_is_refused_even_to_be_overwritten(original, make_run, tmp_path):
  run(original[0], tmp_path / 'h')
  workdir = make_run(head_of(original, 1.001))
  for source, target in ((tmp_path / 'h', tmp_path / 'h'), (tmp_path / 'h', tmp_path), (f'{workdir}@7', workdir), (workdir, workdir.parent)):
    with pytest.raises(InputError, match='found the source .* in the target'):
      run(source, target, overwrite=True)
  assert convert.load(tmp_path / 'h') and (workdir / 'checkpoints/7').is_dir()


def test_a_disk_that_is_too_small_is_found_out_before_anything_is_written(original, tmp_path, monkeypatch):
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: type('Usage', (), dict(free=1 << 20))())
  with pytest.raises(InputError, match='found 1 MiB free'):
    run(original[0], tmp_path / 'h')
  assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_the_target_absent(original, tmp_path):
  """The system itself refuses to let a file grow beyond a megabyte."""
  code = f'''
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
sys.argv = ['convert', '--source={original[0]}', '--target={tmp_path / 'h'}', '--format=hf']
from dsr_jax.convert import __main__ as command
command.define_flags()
command.run_main(command.main)
'''
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 2 and done.stdout == '', done.stderr
  assert 'error: found' in done.stderr and 'not writable' in done.stderr and 'Traceback' not in done.stderr
  assert not list(tmp_path.iterdir())


def test_the_command_line(original, tmp_path):
  call = lambda *args: subprocess.run([sys.executable, '-m', 'dsr_jax.convert', *args], cwd=ROOT, capture_output=True, text=True)
  done = call(f'--source={original[0]}', f'--target={tmp_path / "h"}', '--format=hf')
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout)['tensors'] == len(load_file(tmp_path / 'h' / WEIGHTS))
  for args, found in ((['--target=x', '--format=hf'], 'found no --source'),
                      (['--source=scenes', '--target=x', '--format=onnx'], 'found --format=onnx; expected hf or deepseek')):
    done = call(*args)
    assert done.returncode == 2 and done.stdout == '' and done.stderr.startswith(f'error: {found}') and done.stderr.count('\n') == 1
