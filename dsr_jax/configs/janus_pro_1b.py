"""Janus-Pro-1B with the paper's settings, on the paper's prompts and images.

  python -m dsr_jax.main --config=configs/janus_pro_1b.py --workdir=runs/janus_pro_1b

Prepare COCO and JourneyDB first (docs/data.md); for your own inputs add
`--config.data.prompts=prompts.txt --config.data.images=pictures`.

The weights are downloaded (about 4.2 GB) and kept in the Hub's cache; `--config.model=DIR` names a
directory in either layout instead. Settings worth changing: `method.task`, `method.steps`,
`system.mesh`, `system.rollout_chunk`, `system.update_chunk`;
`--config=configs/janus_pro_1b.py:h100:1` sets the last three for one accelerator, `:v5e:2x4` for a
slice of several; `:trl` reads the paper's batch size the other way (configs/slices.py).
"""

from dsr_jax.configs import common, slices


def get_config(arg=None):
  """The paper's run on the small published model; arg: a slice from configs/slices.py."""
  config = paper()
  slices.apply(config, '1b', arg)
  return config


def paper():
  """The paper's numbers, on any device."""
  config = common.get_config()
  config.model = 'deepseek-community/Janus-Pro-1B'
  config.data.prompts = 't2i_compbench'  # the paper's 5,600; or a file, one prompt per line
  # the paper's, unpaired; prepared by dsr_jax.prepare; or a folder
  config.data.images = 'coco:2800+journeydb:2800'
  config.data.max_prompt_tokens = 128
  s = config.system
  # inputs of a task per chunk, 8 candidates each; a multiple of mesh.data x mesh.fsdp
  s.rollout_chunk = 16
  s.update_chunk = 16
  # a third of 576 codes keeps the program short; on a GPU an image is drawn in one segment anyway
  s.decode_segment = 192
  return config
