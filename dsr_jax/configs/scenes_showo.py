"""Reinforces both tasks of a small Show-o in the small world, as configs/scenes.py does for a
Janus.

  python -m dsr_jax.pretrain --config=configs/scenes_showo_pretrain.py --workdir=runs/showo_base
  python -m dsr_jax.main --config=configs/scenes_showo.py --workdir=runs/scenes_showo

The first command trains the base, which is not shipped and draws a quarter of the prompts right
(docs/showo.md).
Settings worth changing besides those in configs/scenes.py: `method.picture_likelihood`,
`method.prompt_drop`, `method.sampling_steps`.
"""

from dsr_jax.configs import scenes


def get_config():
  """The same run on the other backbone."""
  config = scenes.get_config()
  config.model = 'runs/showo_base/model'
  config.method.temperature = 1.0  # other temperatures were not searched for this base
  config.method.guidance = 3.0  # best at temperature 1, on validation
  # an image takes 32 full passes: few at once, which stay in the processor's cache
  config.system.rollout_chunk = 2
  config.eval.chunk = 4
  return config
