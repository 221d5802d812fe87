"""Show-o's three repositories, in and out."""

import gzip
import json
import shutil

import jax
import numpy as np
from places import ROOT
import pytest
from safetensors.numpy import load_file, save_file
import tiny_showo
import torch

from benchmarks import torch_phi
from dsr_jax import config as config_lib
from dsr_jax import convert, saved_config
from dsr_jax.convert import __main__ as command
from dsr_jax.convert import adapter, locate, table, writing
from dsr_jax.convert.showo import directory as directory_lib
from dsr_jax.errors import InputError
from dsr_jax.models.common import lora
from dsr_jax.models.showo import model as showo
from dsr_jax.models.showo.config import ShowoConfig
from dsr_jax.models.showo.family import SHOWO
from dsr_jax.runtime import checkpoints
from dsr_jax.state import TrainState

WEIGHTS = 'pytorch_model.safetensors'


@pytest.fixture(scope='module')
def hub(tmp_path_factory):
  """(folder of the three, state dicts of model and image tokenizer); not to be written to."""
  folder = tmp_path_factory.mktemp('hub')
  return folder, *tiny_showo.write(folder)


@pytest.fixture
def copy(hub, tmp_path):
  return shutil.copytree(hub[0], tmp_path / 'copy')


def same(params, model, magvit):
  """Parameters of ours against the original's tensors."""
  leaves = jax.tree.leaves(params)
  for entry in table.entries(params, 'showo'):
    theirs = {**model, **magvit}[entry.name].float().numpy()
    np.testing.assert_array_equal(entry.atoms[0].of_leaf(leaves[entry.atoms[0].leaf]), theirs)


def keys(name):
  """The tensors of a published file, name -> (shape, dtype)."""
  with gzip.open(ROOT / f'tests/keys/{name}.tsv.gz', 'rt') as f:
    rows = [line.split() for line in f]
  return {n: (tuple(map(int, shape.split('x'))), dtype) for n, shape, dtype in rows}


@pytest.mark.parametrize('config', [ShowoConfig.showo_256(), ShowoConfig.showo_512()])
def test_every_tensor_of_the_published_files_has_its_place(config):
  want = {name: shape for name, (shape, _) in {**keys('showo'), **keys('magvitv2')}.items()}
  ours = {e.name: e.shape for e in table.entries(showo.abstract_params(config), 'showo')}
  kept = {n: x.shape for n, x in directory_lib.buffers(config.vq.bits).items()}
  assert ours | kept == want and len(want) == 437 + 382
  assert keys('magvitv2')['quantize.power_vals'][1] == 'int64'


@pytest.mark.parametrize('weights', ['safetensors', 'bin'])
def test_three_repositories_side_by_side_are_a_model(hub, tmp_path, weights):
  folder = hub[0]
  if weights == 'bin':
    folder = tmp_path / 'hub'
    tiny_showo.write(folder, weights='bin')
  bundle = convert.load(folder / 'show-o')
  same(bundle.params, *hub[1:])
  config = bundle.config
  assert (config.text.num_attention_heads, config.text.head_dim) == (2, 12)
  assert config.vq.encoder_widths == (1, 2) and config.vq.decoder_blocks == (1, 2)
  assert (config.num_codes, config.image_size, config.sampling_steps) == (16, 8, 18)
  assert bundle.processor.templates.soi_id == config.text.vocab_size + 1
  assert config.first_code == config.text.vocab_size + 10


def test_a_directory_written_and_read_again_is_the_same_to_the_bit(hub, tmp_path):
  target = tmp_path / 'whole'
  result = command.convert(str(hub[0] / 'show-o'), str(target), 'showo')
  assert result['tensors'] == len(hub[1]) + len(hub[2]) - 2
  for path, state in ((target, hub[1]), (target / 'magvitv2', hub[2])):
    written = load_file(path / WEIGHTS)
    assert written.keys() == state.keys()
    for name, value in state.items():
      assert written[name].dtype == value.numpy().dtype, name
      np.testing.assert_array_equal(written[name], value.numpy())
  theirs, ours = (
    json.loads((path / 'config.json').read_text()) for path in (hub[0] / 'show-o', target)
  )
  assert {k: v for k, v in ours.items() if k != 'dsr_jax'} == theirs
  paths = [str(path.relative_to(target)) for path in target.rglob('*.*')]
  assert all(writing.is_export(path) for path in paths), paths  # what --overwrite replaces
  # In one directory, and whole without the others.
  again = convert.load(target)
  same(again.params, *hub[1:])
  first = convert.load(hub[0] / 'show-o')
  assert again.config == first.config
  words = json.loads((target / 'tokenizer.json').read_text())['added_tokens']
  assert [w['content'] for w in words[-3:]] == ['<|t2v|>', '<|v2v|>', '<|lvg|>']
  assert 'library_name: diffusers' in (target / 'README.md').read_text()


def test_a_written_model_loads_into_transformers_phi(hub, tmp_path):
  target = tmp_path / 'whole'
  command.convert(str(hub[0] / 'show-o'), str(target), 'showo', dtype='bfloat16')
  from safetensors.torch import load_file as load_torch  # noqa: PLC0415

  written = load_torch(target / WEIGHTS)
  assert {v.dtype for v in written.values()} == {torch.bfloat16}

  phi = torch_phi.language_model(
    rows=json.loads((target / 'config.json').read_text())['vocab_size'],
    width=tiny_showo.WIDTH,
    inner=tiny_showo.INNER,
    layers=tiny_showo.LAYERS,
    heads=tiny_showo.HEADS,
  )
  phi.load_state_dict({k.removeprefix('showo.'): v for k, v in written.items()}, strict=True)


# Runs.


def make_run(folder, base, trained, **method):
  about = {
    'method': {**saved_config.to_json(config_lib.Config())['method'], **method},
    'data': {'prompts': 'mine.txt'},
    'model': {'name': str(base), 'fingerprint': convert.open_stored(base).source()['hash']},
  }
  kept = checkpoints.Checkpoints(str(folder), about)
  state = TrainState(
    step=jax.numpy.int32(7), params=trained, opt_state={'mu': jax.numpy.zeros(3)}, fixed_params={}
  )
  kept.save(7, state)
  kept.wait()
  kept.close()
  return folder


def test_adapters_are_folded_in_or_written_alone(hub, tmp_path):
  base = hub[0] / 'show-o'
  params = convert.load(base).params
  adapters = jax.tree.map(lambda x: x + 0.1, lora.init(params, SHOWO.lora_targets, 3, 0))
  run = make_run(
    tmp_path / 'run', base, {'lora': adapters}, trainable='lora', guidance=2.5, template='demo'
  )
  command.convert(str(run), str(tmp_path / 'merged'), 'showo')
  want = lora.merged(params, SHOWO.lora_targets, adapters)
  got = convert.load(tmp_path / 'merged').params
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
  settings = json.loads((tmp_path / 'merged/generation_config.json').read_text())
  assert settings['guidance_scale'] == 2.5
  command.convert(str(run), str(tmp_path / 'alone'), 'peft')
  back = adapter.load(tmp_path / 'alone', tiny_showo.LAYERS, SHOWO)
  card = (tmp_path / 'alone' / 'README.md').read_text()
  assert '- show-o\n' in card and 'Janus' not in card
  jax.tree.map(np.testing.assert_array_equal, back, jax.tree.map(np.asarray, adapters))
  names = load_file(tmp_path / 'alone/adapter_model.safetensors')
  assert 'base_model.model.showo.model.layers.1.self_attn.dense.lora_A.weight' in names
  with pytest.raises(InputError, match='a Show-o; use showo'):
    command.convert(str(run), str(tmp_path / 'x'), 'hf')


def test_a_janus_is_no_show_o(hf_directory, tmp_path):
  with pytest.raises(InputError, match='a Janus; use hf or deepseek'):
    command.convert(str(hf_directory), str(tmp_path / 'x'), 'showo')


# Bad directories: one sentence each.


def refused(directory, match):
  with pytest.raises(InputError, match=match) as e:
    convert.load(directory)
  assert '\n' not in str(e.value)


def test_a_model_alone_names_what_it_lacks(copy):
  shutil.rmtree(copy / 'phi-1_5')
  refused(copy / 'show-o', 'tokenizer.json')
  shutil.rmtree(copy / 'magvitv2')
  refused(copy / 'show-o', 'showlab/magvitv2.*microsoft/phi-1_5')


def test_an_image_tokenizer_alone_is_no_model(copy):
  refused(copy / 'magvitv2', 'only an image tokenizer')


def test_the_variant_that_reads_through_clip_is_refused(copy, edit_json):
  edit_json(copy / 'show-o/config.json', lambda c: c.update(w_clip_vit=True))
  refused(copy / 'show-o', 'CLIP')
  edit_json(copy / 'show-o/config.json', lambda c: c.update(w_clip_vit=False))
  tensors = load_file(copy / 'show-o' / WEIGHTS)
  tensors['mm_projector.0.weight'] = np.zeros((24, 8), np.float32)
  save_file(tensors, copy / 'show-o' / WEIGHTS)
  refused(copy / 'show-o', 'CLIP')


class Harmful:
  """Makes a file when it is unpickled."""

  def __init__(self, path):
    self.path = str(path)

  def __reduce__(self):
    return (open, (self.path, 'w'))


def test_a_pickle_of_more_than_tensors_is_not_run(copy):
  (copy / 'show-o' / WEIGHTS).unlink()
  torch.save({'a': Harmful(copy / 'was_run')}, copy / 'show-o/pytorch_model.bin')
  refused(copy / 'show-o', 'more than tensors')
  assert not (copy / 'was_run').exists()
  torch.save([torch.zeros(2)], copy / 'show-o/pytorch_model.bin')
  refused(copy / 'show-o', 'no plain state dict')


@pytest.mark.parametrize('part', ['show-o', 'magvitv2'])
def test_tensors_that_lack_or_are_too_many_are_named(copy, part):
  tensors = load_file(copy / part / WEIGHTS)
  gone = 'showo.lm_head.bias' if part == 'show-o' else 'decoder.conv_out.bias'
  del tensors[gone]
  tensors['more'] = np.zeros(3, np.float32)
  save_file(tensors, copy / part / WEIGHTS)
  refused(copy / 'show-o', f'1 missing: {gone}; 1 unknown: more')


def test_a_config_of_other_sizes_is_refused(copy, edit_json):
  edit_json(copy / 'show-o/config.json', lambda c: c.update(llm_vocab_size=50295))
  refused(copy / 'show-o', 'llm_vocab_size 50295')
  edit_json(copy / 'show-o/config.json', lambda c: c.update(num_vq_tokens=17))
  refused(copy / 'show-o', 'num_vq_tokens 17')
  edit_json(copy / 'show-o/config.json', lambda c: c.update(num_vq_tokens='many'))
  refused(copy / 'show-o', 'do not give the sizes')


def test_the_tokenizer_of_another_model_is_refused(copy, hf_directory):
  shutil.copy(hf_directory / 'tokenizer.json', copy / 'phi-1_5/tokenizer.json')
  refused(copy / 'show-o', r'has no <\|endoftext\|>')


def test_a_prompt_longer_than_the_models_room_is_refused(hub):
  processor = convert.read_config(hub[0] / 'show-o')[1]
  with pytest.raises(InputError, match='more than the limit of 126'):
    processor.encode_prompt('yes ' * 200)
  with pytest.raises(InputError, match=r'special token <\|soi\|>'):
    processor.encode_prompt('a red <|soi|> circle')


def test_a_model_is_found_and_asked_with_the_guidance_of_its_family(hub):
  source = locate.resolve(str(hub[0] / 'show-o'))
  assert source.method.guidance == 2.75 and source.method.crop == 'crop'
  assert source.method.template == 'demo'
  assert source.bundle.params['lm_head']['bias'].shape == (source.bundle.config.rows,)


def test_a_repository_of_the_hub_brings_the_other_two(hub, tmp_path, monkeypatch):
  asked = []

  def snapshot(repository, **_):
    asked.append(repository)
    return str(hub[0] / repository.split('/')[1])

  monkeypatch.setattr('huggingface_hub.snapshot_download', snapshot)
  monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
  directory = locate.directory_of('showlab/show-o')
  assert asked == ['showlab/show-o', 'showlab/magvitv2', 'microsoft/phi-1_5']
  same(convert.load(directory).params, *hub[1:])
  assert locate.directory_of('showlab/show-o') == directory


# The processor.


def test_words_of_both_forms_are_found_in_the_vocabulary(hub):
  processor = convert.read_config(hub[0] / 'show-o')[1]
  answer, prompt = (
    processor.encode_answer('a red circle left of a blue square'),
    processor.encode_prompt('a red circle left of a blue square'),
  )
  assert answer[0] != prompt[0] and answer[1:-1] == prompt[1:]
  as_prompt, as_answer = (
    np.frombuffer(x, np.int32)
    for x in (processor.templates.as_prompt, processor.templates.as_answer)
  )
  assert as_prompt[answer[0]] == prompt[0] and as_answer[prompt[0]] == answer[0]
  assert as_prompt[prompt[0]] == prompt[0] and as_answer[answer[0]] == answer[0]
  assert (
    processor.decode(answer) == processor.decode(prompt) == 'a red circle left of a blue square'
  )


def test_templates_frame_a_question_as_it_is_asked_or_as_it_was_tuned(hub):
  processor = convert.read_config(hub[0] / 'show-o')[1]
  t, words = processor.templates, processor.tokenizer

  def shown(ids):
    return words.decode(ids, clean_up_tokenization_spaces=False)

  asked = [*t.understanding_infix, *processor.encode_question('yes'), *t.understanding_suffix]
  assert shown(asked) == '<|eoi|><|endoftext|>USER: \nyes ASSISTANT:'
  tuned = processor.with_template('tuned')
  t = tuned.templates
  asked = [*t.understanding_infix, *tuned.encode_question('yes'), *t.understanding_suffix]
  assert shown(asked) == '<|eoi|>USER: yes ASSISTANT:'
  assert shown([*t.generation_prefix, *t.generation_suffix]) == (
    '<|t2i|><|endoftext|><|endoftext|><|soi|>'
  )
