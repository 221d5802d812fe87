"""The default of `make run`: both tasks reinforced in the small world, on a laptop, in some ten minutes.

  python -m dsr_jax.main --config=configs/scenes.py --workdir=runs/scenes

Worth touching: `method.task` (unified, generation, understanding), `method.learning_rate`, `method.group_size`,
`method.guidance`, `method.seed`.
"""

from configs import common


def get_config(arg=None):
  """The default run; `arg` is not used."""
  del arg
  config = common.on_scenes()
  m = config.method
  m.inputs_per_step = 32  # 16 prompts and 16 pictures, 8 candidates each
  m.steps = 80
  m.learning_rate = 5e-5  # at 2e-4 the noise of sixteen pairs alone costs counting half of its score in twenty steps
  s = config.system
  s.frozen_every = 5
  s.samples_every = 20
  s.eval_every = 20
  s.save_every = 20
  config.eval.tuned_temperature, config.eval.tuned_guidance = 0.5, 2.0  # the embedded base's best on validation
  return config
