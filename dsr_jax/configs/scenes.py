"""The default of `make run`: reinforces both tasks in the small world, in about three minutes on
two fast CPU cores.

  python -m dsr_jax.main --config=configs/scenes.py --workdir=runs/scenes

Settings worth changing: `method.task` (unified, generation, understanding), `method.objective`,
`method.learning_rate`, `method.group_size`, `method.guidance`, `method.seed`.
"""

from dsr_jax.configs import common


def get_config():
  """The default run."""
  config = common.on_scenes()
  m = config.method
  # all eight candidates learn; with few inputs per step, SimPO's pairs raise the entropy of images
  # (docs/scenes.md)
  m.objective = 'grpo'
  m.inputs_per_step = 32  # 16 prompts and 16 images, 8 candidates each
  m.steps = 100
  m.learning_rate = 2e-4
  # The embedded base draws best at this temperature with guidance 2, on validation. What training
  # gains comes on top (docs/study/levers.md).
  m.temperature = 0.5
  s = config.system
  s.frozen_every = 10
  s.samples_every = 25
  s.eval_every = 50
  s.save_every = 25
  return config
