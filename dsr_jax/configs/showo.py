"""Show-o with the paper's settings (A.3), on your own prompts and pictures.

  python -m dsr_jax.main --config=configs/showo.py --workdir=runs/showo \
      --config.data.prompts=prompts.txt --config.data.images=pictures

The weights are downloaded, with the image tokenizer and the text tokenizer that belong to them, and
kept in the Hub's cache; `--config.model=DIR` names a directory instead. 512 pixels by default, the
usual base of reinforcement; `--config.model=showlab/show-o --config.method.guidance=2.75` is the
model of 256. For a slice of many devices `--config=configs/showo.py:v5e:8x8` (configs/slices.py).
Worth touching: `method.picture_likelihood`, `method.prompt_drop`, `method.sampling_steps`
(docs/showo.md).
"""

from dsr_jax.configs import common, slices


def get_config(arg=None):
  """The paper's run on the second backbone; arg: a slice of configs/slices.py."""
  config = common.get_config()
  config.model = 'showlab/show-o-512x512'
  config.data.prompts = 't2i_compbench'  # the paper's 5,600; or a file with a line a prompt
  config.data.images = 'coco:2800+journeydb:2800'  # as dsr_jax.prepare made them; or a folder
  config.data.max_prompt_tokens = 126  # the model's room
  config.method.guidance = 6.0  # the original's 5, which counts from the conditional
  s = config.system
  # inputs of a task at once, 8 candidates each; a multiple of mesh.data x mesh.fsdp
  s.rollout_chunk = 8
  s.update_chunk = 8
  # places whose logits are held at a time, of 1,024
  s.logprob_chunk = 256
  slices.apply(config, 'showo', arg)
  return config
