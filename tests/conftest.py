"""A tiny random Janus in the Hugging Face layout, made with transformers, and the same model as
ours reads it.
"""

import atexit
import gc
import importlib.metadata
import json
import os
import pathlib
import shutil
import tempfile

# Tests compile much and compute little: the compiler's cheapest level, and its plain way of fusing,
# take a third of the time, and no
# program is compiled twice by the processes of one session. Set before JAX is imported;
# subprocesses inherit it.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
if 'optimization_level' not in os.environ.get('XLA_FLAGS', ''):
  plain = ' --xla_cpu_use_fusion_emitters=false' * importlib.metadata.version('jaxlib').startswith(
    '0.10.'
  )  # later ones do not know it
  os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') + ' --xla_backend_optimization_level=0' + plain
  )
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='dsr_jax_tests_')
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.2'
  atexit.register(shutil.rmtree, os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)

import jax
import pytest

TEXTS = [
  'a red circle left of a blue square',
  'two small green rings and 3 dotted stars.',
  'Is there a red disc?',
  'yes',
  'no',
  'a large striped diamond',
]


def tiny_hf_config(ids):
  """Sizes that differ wherever they may, so that a swapped axis shows; ids: special token -> id."""
  from transformers import JanusConfig

  from dsr_jax.models.janus.processor import BOS, EOS, IMAGE, PAD

  return JanusConfig(
    text_config=dict(
      model_type='llama',
      vocab_size=360,
      hidden_size=48,
      intermediate_size=80,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=4,
      head_dim=16,
      rms_norm_eps=1e-6,
      max_position_embeddings=256,
      pad_token_id=ids[PAD],
      bos_token_id=ids[BOS],
      eos_token_id=ids[EOS],
    ),
    vision_config=dict(
      hidden_size=32,
      num_hidden_layers=2,
      num_attention_heads=2,
      mlp_ratio=3.0,
      image_size=16,
      patch_size=4,
      num_image_tokens=16,
      projection_dim=48,
    ),
    vq_config=dict(
      num_embeddings=40,
      embed_dim=8,
      latent_channels=24,
      base_channels=32,
      channel_multiplier=[1, 1, 2],
      num_res_blocks=2,
      projection_dim=48,
      image_token_embed_dim=48,
    ),
    image_token_id=ids[IMAGE],
    tie_word_embeddings=False,
  )


def randomise(model, seed=0):
  """Weights that make every part matter: heads with logits of std about 2, a non-zero pad row, a
  unit-norm codebook.
  """
  import torch

  generator = torch.Generator().manual_seed(seed)

  def normal(shape):
    return torch.randn(shape, generator=generator)

  with torch.no_grad():
    for name, value in model.named_parameters():
      if name.endswith('bias'):
        value.copy_(0.1 * normal(value.shape))
      elif value.ndim == 1:  # norms
        value.copy_(1 + 0.1 * normal(value.shape))
      elif 'embed' in name and value.ndim == 2:
        value.copy_(normal(value.shape))  # the pad row too
      else:
        gain = (
          2.0 if name in ('lm_head.weight', 'model.generation_head.vision_head.weight') else 1.0
        )
        value.copy_(gain * normal(value.shape) * value[0].numel() ** -0.5)
    codebook = model.model.vqmodel.quantize.embedding.weight
    codebook.copy_(
      torch.nn.functional.normalize(codebook, dim=-1)
    )  # transformers' encoder does not normalise
  return model


def write_hf_directory(directory, seed=0):
  """Writes the tiny model, complete; returns the transformers model."""
  from transformers import JanusForConditionalGeneration

  from dsr_jax.models.janus import processor as processor_lib

  side = dict(texts=TEXTS * 20, vocab_size=330, directory=directory, image_size=16, patch_size=4)
  tokenizer = processor_lib.make_tokenizer(**side).tokenizer
  ids = {token: tokenizer.convert_tokens_to_ids(token) for token in processor_lib.SPECIALS}
  model = JanusForConditionalGeneration(tiny_hf_config(ids)).eval()
  randomise(model, seed).save_pretrained(directory)
  processor_lib.make_tokenizer(**side)  # save_pretrained wrote a generation_config.json of its own
  return model


@pytest.fixture(scope='module', autouse=True)
def programs_are_freed():
  """Each compiled program holds hundreds of memory maps, and a process may have 65,530: one that
  ran many files would crash.
  """
  yield
  jax.clear_caches()
  gc.collect()


@pytest.fixture(scope='session')
def hf_directory(tmp_path_factory):
  """A complete model directory; not to be written to."""
  directory = tmp_path_factory.mktemp('tiny_janus')
  write_hf_directory(directory)
  return directory


@pytest.fixture(scope='session')
def hf_model(hf_directory):
  """The model as transformers loads it, float32."""
  import torch
  from transformers import JanusForConditionalGeneration

  torch.set_num_threads(1)
  model, info = JanusForConditionalGeneration.from_pretrained(
    hf_directory, dtype=torch.float32, output_loading_info=True
  )
  assert not info['missing_keys'] and not info['unexpected_keys'], info
  return model.eval()


@pytest.fixture(scope='session')
def bundle(hf_directory):
  """The model as `convert.load` gives it."""
  from dsr_jax import convert

  return convert.load(hf_directory)


@pytest.fixture(scope='session')
def model(bundle):
  """The same as a module."""
  from flax import nnx

  from dsr_jax.models.janus import model as janus

  return nnx.merge(janus.graphdef_of(bundle.config), jax.tree.map(jax.numpy.asarray, bundle.params))


@pytest.fixture(scope='session')
def original(hf_directory, hf_model, tmp_path_factory):
  """(directory, state dict): the tiny model in the original layout, bfloat16, in one .bin; not to
  be written to.
  """
  import original_layout

  directory = tmp_path_factory.mktemp('original') / 'tiny'
  return directory, original_layout.write(directory, hf_directory, hf_model)


@pytest.fixture
def original_copy(original, tmp_path):
  """A copy of the original layout, to be damaged."""
  return pathlib.Path(shutil.copytree(original[0], tmp_path / 'copy'))


@pytest.fixture(scope='session')
def make_run(original, tmp_path_factory):
  """Function (trained tree, method overrides) -> the workdir of a run that began with the original
  layout's tiny model.
  """
  from dsr_jax import config as config_lib
  from dsr_jax import convert
  from dsr_jax.runtime import checkpoints

  def make(trained, **method):
    folder = tmp_path_factory.mktemp('run')
    source = convert.Stored(original[0]).source()
    about = {
      'method': {**config_lib.to_json(config_lib.Config())['method'], **method},
      'data': {'prompts': 'mine.txt'},
      'model': {'name': str(original[0]), 'fingerprint': source['hash']},
    }
    kept = checkpoints.Checkpoints(str(folder), about)
    kept.save(
      7, {'params': trained, 'opt_state': {'mu': jax.numpy.zeros(3)}, 'step': jax.numpy.int32(7)}
    )
    kept.wait()
    kept.close()
    return folder

  return make


@pytest.fixture
def edit_json():
  """Function (path, change): applies `change` to a JSON file's object in place."""

  def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))

  return edit
