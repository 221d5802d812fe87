"""A longer and cooler run than the default, with the initial model as the scorer: 438 steps, in
about ten minutes on two fast CPU cores. It draws better, and its descriptions hallucinate less than
after as many steps of the default (docs/study/levers.md).

  python -m dsr_jax.main --config=configs/scenes_long.py --workdir=runs/scenes_long
"""

from dsr_jax.configs import scenes


def get_config():
  """The long run."""
  config = scenes.get_config()
  config.method.scorer = 'frozen'
  config.method.temperature = 0.3
  config.method.steps = 438
  s = config.system
  s.samples_every = s.eval_every = 73
  s.save_every = 73
  # The base draws best at this temperature and guidance, and worse at the run's.
  config.eval.tuned_temperature = 0.5
  config.eval.tuned_guidance = 2.0
  return config
