"""A longer run than the default, with the initial model as the scorer: 438 steps, in about ten
minutes on two fast CPU cores. With one seed, 1,752 steps drew worse, and descriptions hallucinated
less than with the policy as the scorer (docs/study/levers.md).

  python -m dsr_jax.main --config=configs/scenes_long.py --workdir=runs/scenes_long
"""

from dsr_jax.configs import scenes


def get_config():
  """The long run."""
  config = scenes.get_config()
  config.method.scorer = 'frozen'
  config.method.steps = 438
  s = config.system
  s.samples_every = s.eval_every = 73
  s.save_every = 73
  return config
