"""What the configs share: the paper's settings (every key and its meaning: dsr_jax/config.py).

An own file starts from here, with `from dsr_jax.configs import common`.
"""

from dsr_jax import config as config_lib
from dsr_jax.scenes import grammar


def get_config():
  """The paper's numbers, locked."""
  config = config_lib.defaults()
  config.lock()
  return config


def on_scenes():
  """Both tasks in the small world, on whatever a laptop has."""
  config = get_config()
  config.model = 'scenes'
  config.data.prompts = config.data.images = 'scenes'
  config.data.max_prompt_tokens = 48  # the grammar's longest text
  config.method.max_text_tokens = 48
  # one that the embedded model was taught
  config.method.question = config.method.instruction = grammar.QUESTION_DESCRIBE
  config.method.guidance = 2.0  # what the embedded base likes best at T 1, found on validation
  config.system.compute_dtype = 'float32'  # the fast type on CPU
  config.system.remat = False  # a picture has 64 codes: activations are small
  config.system.logprob_chunk = 0
  config.system.log_every = 1
  return config
