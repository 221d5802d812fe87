"""The CLIP reward (appendix A.4 of the paper), which has its own weights."""

from dsr_jax.convert import clip as clip_files
from dsr_jax.models import clip as clip_lib
from dsr_jax.rewards.base import RewardInputs


def clip(x: RewardInputs):
  """Cosine similarity of image and prompt, (B, G)."""
  config = clip_files.read_config(x.method.clip_reward.model)
  return clip_lib.similarity(config, x.reward_params, x.picture.pixels, x.extra['clip_ids'])


def load(method):
  """Loads the weights of `method.clip_reward.model`."""
  return clip_files.load(method.clip_reward.model)
