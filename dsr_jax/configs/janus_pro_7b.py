"""Janus-Pro-7B, the paper's model, with the paper's settings, prompts and images.

  python -m dsr_jax.main --config=configs/janus_pro_7b.py --workdir=runs/janus_pro_7b

Prepare COCO and JourneyDB first (docs/data.md); for your own inputs add
`--config.data.prompts=prompts.txt --config.data.images=pictures`.

The weights are downloaded (about 14.8 GB) and kept in the Hub's cache; `--config.model=DIR` names a
directory in either layout instead. Training the whole language model takes 78 GiB for
float32 master weights and two moments, split over system.mesh; `--config.method.trainable=lora`
takes almost none of that. `--config=configs/janus_pro_7b.py:h100:1` does this on one accelerator,
`:v5e:8x8` sets mesh and chunks for a slice of many, `:trl` reads the paper's batch size the other
way (configs/slices.py).
"""

from dsr_jax.configs import janus_pro_1b, slices


def get_config(arg=None):
  """The paper's run; arg: a slice from configs/slices.py."""
  config = janus_pro_1b.paper()
  config.model = 'deepseek-community/Janus-Pro-7B'
  # a row of the 7B model takes about three times the memory of a row of the 1B
  config.system.update_chunk = 8
  slices.apply(config, '7b', arg)
  return config
