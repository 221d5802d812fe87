"""A longer run than the default: 438 steps, about ten minutes on two fast CPU cores, by the time of
a step. It draws better. The initial model scores, and a stronger pull to it keeps descriptions from
hallucinating more than that model's (docs/study/levers.md).

  python -m dsr_jax.main --config=configs/scenes_long.py --workdir=runs/scenes_long
"""

from dsr_jax.configs import scenes


def get_config():
  """The long run."""
  config = scenes.get_config()
  m = config.method
  m.scorer = 'frozen'
  m.kl = 0.1
  m.steps = 438
  s = config.system
  s.samples_every = s.eval_every = 73
  s.save_every = 73
  return config
