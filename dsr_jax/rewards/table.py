"""The rewards by name (`method.reward`)."""

import jax
import jax.numpy as jnp

from dsr_jax.rewards import clip, controls, dual, variants
from dsr_jax.rewards.base import Reward, RewardInputs

REWARDS = {
  'dual': Reward(dual.dual),
  'probability': Reward(variants.probability),
  'pmi': Reward(variants.pmi),
  'contrastive': Reward(variants.contrastive, fields=('negatives',)),
  'vqa': Reward(variants.vqa, fields=('yes_question',)),
  'clip': Reward(
    clip.clip, fields=('clip',), tasks=('generation',), load=clip.load, self_reward=False
  ),
  'random': Reward(controls.random, self_reward=False),
  'forward': Reward(controls.forward),
  'shuffled': Reward(controls.shuffled, fields=('others',)),
  'judge': Reward(controls.judge, fields=('vocabulary',), self_reward=False),
}


def score(x: RewardInputs):
  """The configured reward of each sample, (B, G) float32. An empty text has the worst of its
  group.
  """
  rewards = REWARDS[x.method.reward].function(x).astype(jnp.float32)
  if x.task == 'understanding':
    rewards = dual.worst_where_empty(rewards, x.text, x.eos_id)
  return jax.lax.stop_gradient(rewards)
