"""A smoke run: three steps with all parts, to see that they work together.

python -m dsr_jax.main --config=configs/scenes_tiny.py --workdir=/tmp/tiny
"""

from dsr_jax.configs import common


def get_config():
  """The smoke run."""
  config = common.on_scenes()
  m = config.method
  m.group_size = 2
  m.inputs_per_step = 4
  m.steps = 3
  m.warmup_steps = 1
  m.max_text_tokens = 12
  m.learning_rate = 1e-4
  s = config.system
  s.frozen_every = s.samples_every = s.eval_every = s.save_every = 1
  e = config.eval
  e.prompts_per_task = e.quick_prompts_per_task = 1
  e.images_per_prompt = 1
  e.pictures = e.quick_pictures = 2
  e.chunk = 6
  e.watched = 2
  return config
