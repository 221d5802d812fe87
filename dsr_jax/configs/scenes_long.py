"""The default run with as many samples as the paper's 438 steps of 128 inputs: 1,752 steps of 32,
in about 40 minutes on two fast CPU cores.

  python -m dsr_jax.main --config=configs/scenes_long.py --workdir=runs/scenes_long
"""

from dsr_jax.configs import scenes


def get_config():
  """The long run."""
  config = scenes.get_config()
  config.method.steps = 1752
  s = config.system
  s.frozen_every = 20
  s.samples_every = s.eval_every = 219
  s.save_every = 73
  return config
