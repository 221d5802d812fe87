"""Both tasks of a small Show-o reinforced in the small world, as configs/scenes.py does it with a
Janus.

  python -m dsr_jax.pretrain --config=configs/scenes_showo_pretrain.py --workdir=runs/showo_base
  python -m dsr_jax.main --config=configs/scenes_showo.py --workdir=runs/scenes_showo

The base is made by the first command; it is not shipped. Worth touching besides what the other one
names: `method.picture_likelihood`, `method.prompt_drop`, `method.sampling_steps`.
"""

from dsr_jax.configs import scenes


def get_config():
  """The same run on the other backbone."""
  config = scenes.get_config()
  config.model = 'runs/showo_base/model'
  # the Janus' own bests on validation; nobody has looked for this one's
  config.eval.tuned_temperature = -1.0
  return config
