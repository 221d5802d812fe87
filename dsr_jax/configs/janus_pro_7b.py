"""Janus-Pro-7B, the model of the paper, with its settings, on its prompts and pictures.

  python -m dsr_jax.main --config=configs/janus_pro_7b.py --workdir=runs/janus_pro_7b

COCO and JourneyDB are prepared first (docs/data.md); for your own inputs add
`--config.data.prompts=prompts.txt --config.data.images=pictures`.

The weights are downloaded (about 14.8 GB) and kept in the Hub's cache; `--config.model=DIR` names a
directory in either layout instead. Training all of it takes float32 masters with two moments, 78
GiB, split over system.mesh; with `--config.method.trainable=lora` next to none of that.
`--config=configs/janus_pro_7b.py:h100:1` is that on one accelerator, `:v5e:8x8` sets mesh and
chunks for a slice of many, `:trl` is the paper's batch in its other reading (configs/slices.py).
"""

from dsr_jax.configs import janus_pro_1b, slices


def get_config(arg=None):
  """The paper's run; arg: a slice of configs/slices.py."""
  config = janus_pro_1b.paper()
  config.model = 'deepseek-community/Janus-Pro-7B'
  # a row of the 7B model takes about three times the memory of one of the 1B
  config.system.update_chunk = 8
  slices.apply(config, '7b', arg)
  return config
