"""Show-o with the paper's settings (A.3), on your own prompts and images.

  python -m dsr_jax.main --config=configs/showo.py --workdir=runs/showo \
      --config.data.prompts=prompts.txt --config.data.images=pictures

The weights are downloaded with their image tokenizer and text tokenizer, and kept in the Hub's
cache; `--config.model=DIR` names a directory instead. The default is the model for 512 pixels, the
usual base for reinforcement; `--config.model=showlab/show-o --config.method.guidance=2.75` selects
the one for 256. For a slice of many devices, use `--config=configs/showo.py:v5e:8x8`
(configs/slices.py). Settings worth changing: `method.picture_likelihood`, `method.prompt_drop`,
`method.sampling_steps` (docs/showo.md).
"""

from dsr_jax.configs import common, slices


def get_config(arg=None):
  """The paper's run on the second backbone; arg: a slice from configs/slices.py."""
  config = common.get_config()
  config.model = 'showlab/show-o-512x512'
  config.data.prompts = 't2i_compbench'  # the paper's 5,600; or a file, one prompt per line
  config.data.images = 'coco:2800+journeydb:2800'  # prepared by dsr_jax.prepare; or a folder
  config.data.max_prompt_tokens = 126  # the model's limit
  config.method.guidance = 6.0  # the original's 5, in whose convention 0 is no guidance
  s = config.system
  # inputs of a task per chunk, 8 candidates each; a multiple of mesh.data x mesh.fsdp
  s.rollout_chunk = 8
  s.update_chunk = 8
  # positions, of 1,024, whose logits are held at a time
  s.logprob_chunk = 256
  slices.apply(config, 'showo', arg)
  return config
