"""What the configs share: the paper's settings (every key and its meaning: dsr_jax/config.py).

Your own config file can start from here, with `from dsr_jax.configs import common`.
"""

from dsr_jax import config as config_lib
from dsr_jax.scenes import grammar


def get_config():
  """The paper's numbers, locked."""
  config = config_lib.defaults()
  config.lock()
  return config


def on_scenes():
  """Both tasks in the small world, on a laptop."""
  config = get_config()
  config.model = 'scenes'
  config.data.prompts = config.data.images = 'scenes'
  config.data.max_prompt_tokens = 48  # the grammar's longest text
  config.method.max_text_tokens = 48
  # the question that the embedded model was trained with
  config.method.question = config.method.instruction = grammar.QUESTION_DESCRIBE
  config.method.guidance = 2.0  # best for the embedded base at temperature 1, on validation
  config.system.compute_dtype = 'float32'  # the fastest type on a CPU
  config.system.remat = False  # an image has 64 codes, so activations are small
  config.system.logprob_chunk = 0
  config.system.decode_segment = 32  # of 64 codes; half of it compiles longer and runs no faster
  config.system.cpu_devices = 0  # all cores
  config.system.mesh.data, config.system.mesh.fsdp = -1, 1
  config.system.log_every = 1
  return config
