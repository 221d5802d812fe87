"""What the tests share: a tiny random Janus in both layouts, and runs that began with it.

torch and transformers take seconds to import, so only the fixtures that need them do.
"""

import atexit
import gc
import importlib.metadata
import json
import os
import pathlib
import shutil
import signal
import tempfile

# Tests compile much and compute little: the compiler's cheapest level, and its plain way of fusing,
# take a third of the time, and no program is compiled twice by the processes of one session. Set
# before JAX is imported; subprocesses inherit it.
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
# In the background of a shell Ctrl-C is ignored, and what a test starts would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)
# What is remembered of pictures stays out of the home of whoever runs the tests.
if 'DSR_JAX_CACHE' not in os.environ:
  os.environ['DSR_JAX_CACHE'] = tempfile.mkdtemp(prefix='dsr_jax_cache_')
  atexit.register(shutil.rmtree, os.environ['DSR_JAX_CACHE'], ignore_errors=True)

from flax import nnx
import jax
import pytest

from dsr_jax import config as config_lib
from dsr_jax import convert, saved_config
from dsr_jax.models.janus import model as janus
from dsr_jax.runtime import checkpoints
from dsr_jax.state import TrainState


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
  import tiny_janus  # noqa: PLC0415

  directory = tmp_path_factory.mktemp('tiny_janus')
  tiny_janus.write_hf_directory(directory)
  return directory


@pytest.fixture(scope='session')
def hf_model(hf_directory):
  """The model as transformers loads it, float32."""
  import torch  # noqa: PLC0415
  from transformers import JanusForConditionalGeneration  # noqa: PLC0415

  torch.set_num_threads(1)
  model, info = JanusForConditionalGeneration.from_pretrained(
    hf_directory, dtype=torch.float32, output_loading_info=True
  )
  assert not info['missing_keys'] and not info['unexpected_keys'], info
  return model.eval()


@pytest.fixture(scope='session')
def bundle(hf_directory):
  """The model as `convert.load` gives it."""
  return convert.load(hf_directory)


@pytest.fixture(scope='session')
def model(bundle):
  """The same as a module."""
  return nnx.merge(janus.graphdef_of(bundle.config), jax.tree.map(jax.numpy.asarray, bundle.params))


@pytest.fixture(scope='session')
def original(hf_directory, hf_model, tmp_path_factory):
  """(directory, state dict): the tiny model in the original layout, bfloat16, in one .bin; not to
  be written to.
  """
  import original_layout  # noqa: PLC0415

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

  def make(trained, **method):
    folder = tmp_path_factory.mktemp('run')
    source = convert.Stored(original[0]).source()
    about = {
      'method': {**saved_config.to_json(config_lib.Config())['method'], **method},
      'data': {'prompts': 'mine.txt'},
      'model': {'name': str(original[0]), 'fingerprint': source['hash']},
    }
    kept = checkpoints.Checkpoints(str(folder), about)
    state = TrainState(
      step=jax.numpy.int32(7),
      params=trained,
      opt_state={'mu': jax.numpy.zeros(3)},
      fixed_params={},
    )
    kept.save(7, state)
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
