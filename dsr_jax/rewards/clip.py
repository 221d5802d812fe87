"""The CLIP reward (the paper's A.4): an external reward with weights of its own."""

from dsr_jax.convert import clip as clip_files
from dsr_jax.models import clip as clip_lib
from dsr_jax.rewards.base import RewardInputs


def clip(x: RewardInputs):
  """Cosine similarity of picture and prompt, (B, G)."""
  config = clip_files.read_config(x.method.clip_reward.model)
  return clip_lib.similarity(config, x.reward_params, x.picture.pixels, x.extra['clip_ids'])


def load(method):
  """The weights of `method.clip_reward.model`."""
  return clip_files.load(method.clip_reward.model)
