"""The Hugging Face layout in and out: names, tying, dtypes, shards, and every way a directory can
be wrong.
"""

import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import GenerationConfig, JanusForConditionalGeneration

from dsr_jax import convert
from dsr_jax.convert import __main__ as command
from dsr_jax.convert import sidefiles, table, weights, writing
from dsr_jax.convert.directory import DTYPES
from dsr_jax.errors import InputError
from dsr_jax.models.janus import model as janus
from dsr_jax.models.janus.config import JanusConfig

WEIGHTS = 'model.safetensors'
EMBED, HEAD = table.EMBED['hf'], table.HEAD['hf']


@pytest.fixture
def copy(hf_directory, tmp_path):
  """A copy of the tiny model directory, to be damaged."""
  return pathlib.Path(shutil.copytree(hf_directory, tmp_path / 'copy'))


def change_tensors(directory, change):
  tensors = load_file(directory / WEIGHTS)
  change(tensors)
  save_file(tensors, directory / WEIGHTS, metadata=dict(format='pt'))


def shard(directory, count=3):
  """Splits the single file of a directory into shards with an index."""
  tensors = load_file(directory / WEIGHTS)
  weight_map = {}
  for i in range(count):
    part = {name: tensors[name] for name in sorted(tensors)[i::count]}
    save_file(part, directory / f'model-{i}.safetensors')
    weight_map.update(dict.fromkeys(part, f'model-{i}.safetensors'))
  (directory / WEIGHTS).unlink()
  (directory / 'model.safetensors.index.json').write_text(
    json.dumps(dict(metadata={}, weight_map=weight_map))
  )


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


# Names and numbers.


@pytest.mark.parametrize(
  'config, tensors, parameters',
  [
    (JanusConfig.janus_pro_1b(), 964, 2_076_636_811),
    (JanusConfig.janus_pro_7b(), 1018, 7_407_773_323),
  ],
)
def test_full_size_models_have_the_published_number_of_tensors_and_parameters(
  config, tensors, parameters
):
  wanted = table.entries(janus.abstract_params(config))
  assert len(wanted) == tensors
  assert sum(int(np.prod(entry.shape, dtype=np.int64)) for entry in wanted) == parameters


def test_names_and_shapes_are_those_of_transformers(bundle, hf_model):
  want = {name: tuple(value.shape) for name, value in hf_model.state_dict().items()}
  assert {entry.name: entry.shape for entry in table.entries(bundle.params)} == want


def test_parameters_are_float32_numpy_in_the_tree_of_the_model(bundle):
  abstract = janus.abstract_params(bundle.config)
  assert jax.tree.structure(abstract) == jax.tree.structure(bundle.params)
  assert all(
    type(leaf) is np.ndarray and leaf.dtype == np.float32 for leaf in jax.tree.leaves(bundle.params)
  )


def test_kernels_are_transposed_and_layers_stacked(bundle, hf_model):
  state = {name: value.numpy() for name, value in hf_model.state_dict().items()}
  layers = bundle.params['language_model']['layers']
  np.testing.assert_array_equal(
    layers['mlp']['up_proj']['kernel'][1],
    state['model.language_model.layers.1.mlp.up_proj.weight'].T,
  )
  np.testing.assert_array_equal(
    bundle.params['vqmodel']['encoder']['conv_in']['kernel'][0, 1, 2],
    state['model.vqmodel.encoder.conv_in.weight'][:, 2, 0, 1],
  )
  np.testing.assert_array_equal(
    bundle.params['generation_aligner']['hidden_layer']['kernel'],
    state['model.generation_aligner.hidden_layers.0.weight'].T,
  )


def test_load_then_save_then_load_is_bit_exact(bundle, hf_directory, tmp_path):
  convert.save(tmp_path / 'out', bundle.config, bundle.params, hf_directory)
  again = convert.load(tmp_path / 'out')
  equal(bundle.params, again.params)
  assert again.config == bundle.config
  theirs, ours = load_file(hf_directory / WEIGHTS), load_file(tmp_path / 'out' / WEIGHTS)
  assert theirs.keys() == ours.keys() and all(
    np.array_equal(theirs[name], ours[name]) for name in theirs
  )


def test_shards_read_as_the_single_file_does(bundle, copy):
  shard(copy)
  equal(bundle.params, convert.load(copy).params)


def test_large_models_are_written_in_shards_that_transformers_reads(
  bundle, hf_directory, tmp_path, monkeypatch
):
  monkeypatch.setattr(writing, 'SHARD_BYTES', 1 << 20)
  convert.save(tmp_path / 'out', bundle.config, bundle.params, hf_directory)
  assert len(list((tmp_path / 'out').glob('model-*-of-*.safetensors'))) > 1
  equal(bundle.params, convert.load(tmp_path / 'out').params)
  _, info = JanusForConditionalGeneration.from_pretrained(
    tmp_path / 'out', output_loading_info=True
  )
  assert not info['missing_keys'] and not info['unexpected_keys']


@pytest.mark.parametrize('kind', [ml_dtypes.bfloat16, np.float16])
def test_half_precision_files_widen_exactly(bundle, copy, kind):
  change_tensors(copy, lambda t: t.update({name: value.astype(kind) for name, value in t.items()}))
  equal(
    jax.tree.map(lambda x: x.astype(kind).astype(np.float32), bundle.params),
    convert.load(copy).params,
  )


def test_saving_in_bfloat16_rounds_once(bundle, hf_directory, tmp_path):
  convert.save(tmp_path / 'out', bundle.config, bundle.params, hf_directory, dtype='bfloat16')
  equal(
    jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), bundle.params),
    convert.load(tmp_path / 'out').params,
  )


def test_the_source_hash_follows_the_weights(bundle, copy):
  assert convert.load(copy).source['hash'] == bundle.source['hash']
  change_tensors(copy, lambda t: t.update({HEAD: t[HEAD] + 1}))
  assert convert.load(copy).source['hash'] != bundle.source['hash']


# Tying (transformers ties by default where the key is absent, but keeps two different tensors of a
# file apart).


@pytest.mark.parametrize('tied', [True, False, None])
def test_a_head_in_the_file_is_used_whatever_the_config_says(bundle, copy, edit_json, tied):
  edit_json(
    copy / 'config.json',
    lambda c: c.pop('tie_word_embeddings') if tied is None else c.update(tie_word_embeddings=tied),
  )
  equal(bundle.params, convert.load(copy).params)


@pytest.mark.parametrize('tied', [True, None])
def test_a_tied_file_without_a_head_uses_the_embedding(bundle, copy, edit_json, tied):
  edit_json(
    copy / 'config.json',
    lambda c: c.pop('tie_word_embeddings') if tied is None else c.update(tie_word_embeddings=tied),
  )
  change_tensors(copy, lambda t: t.pop(HEAD))
  params = convert.load(copy).params
  np.testing.assert_array_equal(
    params['lm_head']['kernel'], params['language_model']['embed_tokens']['embedding'].T
  )


def test_an_untied_file_without_a_head_is_refused(copy):
  change_tensors(copy, lambda t: t.pop(HEAD))
  with pytest.raises(InputError, match='1 missing: lm_head.weight'):
    convert.load(copy)


def test_exports_are_untied_and_hold_both_tensors(bundle, hf_directory, tmp_path):
  convert.save(tmp_path / 'out', bundle.config, bundle.params, hf_directory)
  assert json.loads((tmp_path / 'out/config.json').read_text())['tie_word_embeddings'] is False
  assert {EMBED, HEAD} <= load_file(tmp_path / 'out' / WEIGHTS).keys()


# Damaged directories.


def test_every_wrong_tensor_is_named_in_one_error(copy):

  def change(tensors):
    del tensors['model.aligner.fc1.bias']
    del tensors['model.vqmodel.quant_conv.weight']
    tensors['model.surplus.weight'] = np.zeros(3, np.float32)
    tensors['model.language_model.norm.weight'] = np.zeros(7, np.float32)
    tensors['model.generation_aligner.fc1.bias'] = np.zeros(48, np.int32)

  change_tensors(copy, change)
  with pytest.raises(InputError) as e:
    convert.load(copy)
  for part in (
    '2 missing: model.aligner.fc1.bias, model.vqmodel.quant_conv.weight',
    '1 unknown: model.surplus.weight',
    'model.language_model.norm.weight (7,) instead of (48,)',
    'model.generation_aligner.fc1.bias I32',
  ):
    assert part in str(e.value)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_a_number_that_is_not_finite_is_named(copy, bundle, dtype, bad):
  name = 'model.language_model.layers.1.mlp.up_proj.weight'

  def change(tensors):
    for key in tensors:
      tensors[key] = tensors[key].astype(DTYPES[dtype])
    tensors[name][3, 5] = bad

  change_tensors(copy, change)
  tensors = len(table.entries(bundle.params))
  with pytest.raises(InputError, match=f'not finite in .*: in {name} of {tensors} tensors'):
    convert.load(copy)
  with pytest.raises(InputError, match='not finite'):
    command.convert(str(copy), str(copy.parent / 'out'), 'hf')


def test_a_number_that_float32_cannot_hold_is_not_finite():
  assert weights.is_finite(np.array([1e38, -1e38]))
  assert not weights.is_finite(np.array([1e300]))
  assert weights.is_finite(np.array([], np.float32))
  many = np.ones((3, weights._BLOCK), np.float16)
  assert weights.is_finite(many)
  many[2, -1] = np.nan
  assert not weights.is_finite(many) and not weights.is_finite(many.T)


@pytest.mark.parametrize('keep', [0, 4, 500, -1])
def test_a_truncated_file_is_refused(copy, keep):
  content = (copy / WEIGHTS).read_bytes()
  (copy / WEIGHTS).write_bytes(content[:keep])
  with pytest.raises(InputError, match='truncated or damaged'):
    convert.load(copy)


def test_half_a_sharded_checkpoint_is_refused(copy):
  shard(copy)
  (copy / 'model-1.safetensors').unlink()
  with pytest.raises(InputError, match='model-1.safetensors'):
    convert.load(copy)


def test_an_index_naming_a_tensor_that_no_shard_holds_is_refused(copy, edit_json):
  shard(copy)
  edit_json(
    copy / 'model.safetensors.index.json',
    lambda c: c['weight_map'].update(ghost='model-1.safetensors'),
  )
  with pytest.raises(InputError, match='ghost'):
    convert.load(copy)


def test_an_index_pointing_outside_the_directory_is_refused(copy, edit_json):
  shard(copy)
  edit_json(
    copy / 'model.safetensors.index.json',
    lambda c: c['weight_map'].update(ghost='../model-1.safetensors'),
  )
  with pytest.raises(InputError, match='plain file names'):
    convert.load(copy)


@pytest.mark.parametrize(
  'name, found',
  [
    ('config.json', 'no config.json'),
    ('tokenizer.json', 'no tokenizer.json'),
    (WEIGHTS, 'no weights'),
  ],
)
def test_a_missing_file_is_named(copy, name, found):
  (copy / name).unlink()
  with pytest.raises(InputError, match=found):
    convert.load(copy)


def test_a_missing_directory_is_named(tmp_path):
  with pytest.raises(InputError, match='no directory'):
    convert.load(tmp_path / 'none')


def test_the_tokenizer_of_another_model_is_refused(copy, edit_json):
  edit_json(copy / 'config.json', lambda c: c.update(image_token_id=7))
  with pytest.raises(InputError, match='image_token_id is 7'):
    convert.load(copy)


# Writing.


def test_a_saved_directory_is_complete_and_nothing_is_left_beside_it(
  bundle, hf_directory, tmp_path
):
  convert.save(tmp_path / 'out', bundle.config, bundle.params, hf_directory, card='# Ours\n')
  names = {path.name for path in (tmp_path / 'out').iterdir()}
  assert names == {
    'config.json',
    WEIGHTS,
    'README.md',
    'tokenizer.json',
    'tokenizer_config.json',
    'special_tokens_map.json',
    'chat_template.jinja',
    'processor_config.json',
    'preprocessor_config.json',
    'generation_config.json',
  }
  assert (tmp_path / 'out/README.md').read_text().endswith('# Ours\n')
  assert [path.name for path in tmp_path.iterdir()] == ['out']


def test_the_guidance_weight_can_be_named(bundle, hf_directory, tmp_path):
  convert.save(tmp_path / 'out', bundle.config, bundle.params, hf_directory, guidance=3.0)
  settings = GenerationConfig.from_pretrained(tmp_path / 'out')
  assert settings.guidance_scale == 3.0
  assert settings.generation_kwargs == dict(boi_token_id=bundle.config.templates.boi_id)


def test_a_full_target_is_refused_unless_overwritten(bundle, hf_directory, tmp_path):
  target = tmp_path / 'out'
  target.mkdir()
  (target / 'mine.txt').write_text('keep')
  with pytest.raises(InputError, match='not empty'):
    convert.save(target, bundle.config, bundle.params, hf_directory)
  assert [path.name for path in target.iterdir()] == ['mine.txt']
  convert.save(target, bundle.config, bundle.params, hf_directory, overwrite=True)
  assert (target / 'mine.txt').read_text() == 'keep'
  convert.load(target)


def test_a_disk_that_fills_up_leaves_nothing(bundle, hf_directory, tmp_path, monkeypatch):

  def full(*args):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(writing, '_write_array', full)
  with pytest.raises(InputError, match='No space left'):
    convert.save(tmp_path / 'out', bundle.config, bundle.params, hf_directory)
  assert not list(tmp_path.iterdir())


def test_a_failed_overwrite_leaves_the_old_model(bundle, hf_directory, copy, monkeypatch):
  monkeypatch.setattr(sidefiles, 'write_card', lambda *args: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    convert.save(copy, bundle.config, bundle.params, hf_directory, overwrite=True)
  monkeypatch.undo()
  equal(bundle.params, convert.load(copy).params)
  assert [path.name for path in copy.parent.iterdir()] == ['copy']


def test_parameters_of_another_size_are_not_written(bundle, hf_directory, tmp_path):
  params = jax.tree.map(lambda x: x, bundle.params)
  params['lm_head'] = dict(kernel=params['lm_head']['kernel'].T)
  with pytest.raises(InputError, match='lm_head.weight'):
    convert.save(tmp_path / 'out', bundle.config, params, hf_directory)
  assert not list(tmp_path.iterdir())


def test_a_source_without_a_processor_is_refused(bundle, copy, tmp_path):
  (copy / 'processor_config.json').unlink()
  with pytest.raises(InputError, match='lacks processor_config.json'):
    convert.save(tmp_path / 'out', bundle.config, bundle.params, copy)
