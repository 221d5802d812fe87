"""Control rewards, to compare a gain with.

Axes: B inputs, G samples, N image codes, H W pixels.
"""

import functools

import jax
import jax.numpy as jnp

from dsr_jax import images
from dsr_jax.errors import InputError
from dsr_jax.losses import mean_logp
from dsr_jax.models.unified import Picture, Text, without_eos
from dsr_jax.rewards import scenes_judge
from dsr_jax.rewards.base import RewardInputs, codes_of
from dsr_jax.rewards.dual import code_logps, dual
from dsr_jax.scenes import judge as scenes_rules
from dsr_jax.scenes import world


def random(x: RewardInputs):
  """A random number in [0, 1) from the sample's key."""

  def draw(key):
    return jax.random.uniform(jax.random.fold_in(key, 2**31 - 1))  # sampling folds in token indices

  return jax.vmap(jax.vmap(draw))(x.sample_keys)


def forward(x: RewardInputs):
  """The mean log-probability of the sample given its input: is the reward mere confidence?"""
  if x.task == 'generation':
    prompt = Text(x.text.ids[:, None], x.text.mask[:, None])
    return mean_logp(*code_logps(x.model, x.picture.codes, prompt, x.scoring, keys=x.score_keys))
  picture = Picture(*(y[:, None] for y in x.picture))
  scores = x.model.text_logps(picture, x.question, x.text, x.score_keys, x.scoring)
  return mean_logp(scores.logp, x.text.mask)


def shuffled(x: RewardInputs):
  """R_G and R_U with a different input: does the reward depend on the input at all?"""
  if x.task == 'generation':
    x = x._replace(text=Text(x.extra['other_ids'], x.extra['other_mask']))
  else:
    x = x._replace(picture=Picture(codes_of(x.model, x.extra['other_pixels']), None))
  return dual(x)


def judge(x: RewardInputs):
  """The exact judge of Scenes: the share of a prompt's atoms in the image, or a text's F1.

  Extra things in an image cost nothing.
  """
  return _judged(x, scenes_judge.verdicts_on_pictures)


def judge_strict(x: RewardInputs):
  """As `judge`, but an image counts (1) only if it shows what the prompt says and nothing else."""
  rule = functools.partial(scenes_judge.verdicts_on_pictures, rule=scenes_rules.strict)
  return _judged(x, rule)


def _judged(x: RewardInputs, on_pictures):
  """Verdicts of the judge of Scenes; `on_pictures` judges images.

  This is the one exception to the rule that a step has no host transfers: the judge is NumPy code
  on the host. If `method.judge_accuracy` is below 1, that share of the verdicts v stays correct,
  and the others become 1 - v; the sample's key decides.
  """
  inputs, group = x.sample_keys.shape
  side = x.picture.pixels.shape[-2]
  if side != world.IMAGE_SIZE:
    raise InputError(
      f'method.reward={x.method.reward} reads images of Scenes, {world.IMAGE_SIZE} x '
      f'{world.IMAGE_SIZE} pixels, but the model has {side} x {side}; choose another reward'
    )
  pixels = images.levels(x.picture.pixels)
  if x.task == 'generation':
    text, verdicts = x.text, on_pictures
  else:
    text, verdicts = without_eos(x.text, x.eos_id), scenes_judge.verdicts_on_texts
  verdict = jax.pure_callback(
    verdicts,
    jax.ShapeDtypeStruct((inputs, group), jnp.float32),
    pixels,
    text.ids,
    text.mask,
    x.extra['token_bytes'],
    x.extra['token_ends'],
    vmap_method='sequential',
  )
  wrong = random(x) >= x.method.judge_accuracy
  return jnp.where(wrong, 1.0 - verdict, verdict)
