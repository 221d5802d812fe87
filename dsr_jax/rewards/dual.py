"""The dual self-rewards (arXiv 2506.07963, eq. 3): how likely is the original input, given a
sampled output? They are means over tokens of plain conditional log-probabilities in nats, without
guidance and at temperature 1.

  R_G  reward of a drawn image:  log p(prompt | image) / |prompt|
  R_U  reward of a written text: log p(image's codes | text) / N

Axes: B inputs, G samples, T text tokens, N image codes.
"""

import jax
import jax.numpy as jnp

from dsr_jax.losses import mean_logp
from dsr_jax.models.unified import (
  Picture,
  Scoring,
  Text,
  UnifiedModel,
  as_answer,
  as_prompt,
)
from dsr_jax.rewards.base import RewardInputs


def generation(
  model: UnifiedModel,
  pictures: Picture,
  prompt: Text,
  instruction: Text,
  how: Scoring,
  *,
  eos_id: int | None = None,
  keys=None,
):
  """R_G, for code outside the step: the mean log-probability of the prompt's tokens given each
  sampled image. In the step, `dual` computes the same.

  Args:
    pictures: (B, G, ...), the sampled codes as decoded by the image tokenizer.
    prompt: (B, Tp), the original prompt's content.
    instruction: (Ti,), the question about the image.
    how: `Scoring`.
    eos_id: if given, the end-of-text token counts too.
    keys: (B,), or None for a model whose likelihoods need none.

  Returns:
    Rewards (B, G) and per-token log-probabilities (B, G, Tp or Tp + 1), float32.
  """
  logps, mask = prompt_logps(model, pictures, prompt, instruction, how, eos_id=eos_id, keys=keys)
  return jax.lax.stop_gradient((mean_logp(logps, mask), logps))


def of_prompts(model, pictures: Picture, prompt: Text, instruction: Text, how, *, eos_id, keys):
  """R_G (B, G) as a differentiable function of the images' pixels; see `generation`."""
  return mean_logp(
    *prompt_logps(model, pictures, prompt, instruction, how, eos_id=eos_id, keys=keys)
  )


def understanding(model: UnifiedModel, codes, texts: Text, how: Scoring, *, eos_id: int, keys=None):
  """R_U, for code outside the step: the mean log-probability of the original image's codes given
  each sampled text. In the step, `dual` computes the same.

  Args:
    codes: (B, N), the codes of the original image.
    texts: (B, G, T), sampled; their end-of-text token is not part of the prompt.
    how: `Scoring`.
    eos_id: the token that ends a text.
    keys: (B,), or None for a model whose likelihoods need none.

  Returns:
    Rewards (B, G), where an empty text gets the worst reward of its group, and per-token
    log-probabilities (B, G, N), float32.
  """
  prompt = as_prompt(model, texts)
  logps, mask = code_logps(model, codes[:, None], prompt, how, keys=keys)
  rewards = worst_where_empty(mean_logp(logps, mask), texts, eos_id)
  return jax.lax.stop_gradient((rewards, logps))


def dual(x: RewardInputs):
  """R_G of drawn images or R_U of written texts, eq. 3: the reward in the step."""
  return mean_logp(*reversed_logps(x))


# The two reversed likelihoods, which the other self-rewards also use.


def reversed_logps(x: RewardInputs):
  """Log-probabilities (B, G, T or N) of the original input given each sample, and their mask."""
  if x.task == 'generation':
    return prompt_given_samples(x, x.text)  # x.text are the prompts, x.picture the samples
  # x.text are the samples, x.picture the originals.
  prompt = as_prompt(x.model, x.text)
  return code_logps(x.model, x.picture.codes[:, None], prompt, x.scoring, keys=x.score_keys)


def prompt_given_samples(x: RewardInputs, prompt: Text):
  """Log-probabilities (B, G, T) of each input's prompt, (B, T), given each drawn image, and their
  mask.
  """
  return prompt_logps(
    x.model,
    x.picture,
    prompt,
    x.question,
    x.scoring,
    eos_id=counted_eos(x),
    keys=x.score_keys,
  )


def prompt_logps(model, pictures: Picture, prompt: Text, instruction: Text, how, *, eos_id, keys):
  """Log-probabilities (B, G, T) of each input's prompt, (B, T), given each image (B, G, ...), and
  their mask (B, 1, T).
  """
  if eos_id is not None:
    prompt = with_eos(prompt, eos_id)
  prompt = as_answer(model, prompt)
  rows = prompt.ids.shape[0]
  answer = Text(prompt.ids[:, None], prompt.mask[:, None])
  question = Text(*(jnp.broadcast_to(x, (rows, *x.shape)) for x in instruction))
  return model.text_logps(pictures, question, answer, keys, how).logp, answer.mask


def code_logps(model, codes, text: Text, how: Scoring, *, keys):
  """Log-probabilities (B, G, N) of codes (B, h, N) given texts (B, g, T), and their mask."""
  logps = model.picture_logps(text, codes, keys, how).logp
  return logps, jnp.ones(logps.shape, bool)


def counted_eos(x: RewardInputs) -> int | None:
  """The end-of-text id if it counts in R_G (`method.eos_in_reward`), else None."""
  return x.eos_id if x.method.eos_in_reward else None


def with_eos(text: Text, eos_id: int) -> Text:
  """Appends the end-of-text token to left-justified content: (..., T) -> (..., T + 1)."""
  room = [(0, 0)] * (text.ids.ndim - 1) + [(0, 1)]
  ids, mask = jnp.pad(text.ids, room), jnp.pad(text.mask, room)
  end = jnp.arange(ids.shape[-1]) == jnp.sum(mask, axis=-1, keepdims=True)
  return Text(jnp.where(end, eos_id, ids), mask | end)


def worst_where_empty(rewards, texts: Text, eos_id: int):
  """Replaces the reward (B, G) of a text without content by the worst reward of its group."""
  empty = ~jnp.any(texts.mask & (texts.ids != eos_id), axis=-1)
  worst = jnp.min(jnp.where(empty, jnp.inf, rewards), axis=-1, keepdims=True)
  return jnp.where(empty & jnp.isfinite(worst), worst, rewards)
