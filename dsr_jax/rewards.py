"""The dual self-rewards (arXiv 2506.07963, eq. 3): how likely the original input is, given a sampled output.

Both are means over tokens of plain conditional log-probabilities in nats (no guidance, temperature 1), never differentiated.
Axes: B inputs, G candidates, T text tokens, N image codes.
"""

import jax
import jax.numpy as jnp

from dsr_jax.losses import mean_logp
from dsr_jax.models.unified import Picture, Scoring, Text, UnifiedModel


def generation(model: UnifiedModel, pictures: Picture, prompt: Text, instruction: Text, how: Scoring, *, eos_id: int | None = None,
               keys=None):
  """R_G: mean log-probability of the prompt's tokens, read off each sampled picture.

  Args:
    pictures: (B, G, ...), as the VQ decoder draws the sampled codes.
    prompt: (B, Tp), the original prompt's content.
    instruction: (Ti,), what the model is asked about the picture.
    eos_id: counts the end-of-text token too, if given.

  Returns:
    Rewards (B, G) and per-token log-probabilities (B, G, Tp or Tp + 1), float32.
  """
  inputs = prompt.ids.shape[0]
  if eos_id is not None:
    prompt = with_eos(prompt, eos_id)
  asked = Text(*(jnp.broadcast_to(x, (inputs, *x.shape)) for x in instruction))
  answer = Text(prompt.ids[:, None], prompt.mask[:, None])
  scores = model.text_logps(pictures, asked, answer, keys, how)
  return jax.lax.stop_gradient((mean_logp(scores.logp, answer.mask), scores.logp))


def understanding(model: UnifiedModel, codes, texts: Text, how: Scoring, *, eos_id: int, keys=None):
  """R_U: mean log-probability of the original picture's codes, drawn from each sampled text.

  Args:
    codes: (B, N), the original picture's.
    texts: (B, G, T), sampled; their end-of-text token is no part of the prompt.

  Returns:
    Rewards (B, G), where an empty text has the worst of its group, and per-token log-probabilities (B, G, N), float32.
  """
  scores = model.picture_logps(texts, codes[:, None], keys, how)
  rewards = jnp.mean(scores.logp, axis=-1)
  empty = ~jnp.any(texts.mask & (texts.ids != eos_id), axis=-1)
  worst = jnp.min(jnp.where(empty, jnp.inf, rewards), axis=-1, keepdims=True)
  rewards = jnp.where(empty & jnp.isfinite(worst), worst, rewards)
  return jax.lax.stop_gradient((rewards, scores.logp))


def with_eos(text: Text, eos_id: int) -> Text:
  """Appends the end-of-text token to left-justified content: (..., T) -> (..., T + 1)."""
  room = [(0, 0)] * (text.ids.ndim - 1) + [(0, 1)]
  ids, mask = jnp.pad(text.ids, room), jnp.pad(text.mask, room)
  end = jnp.arange(ids.shape[-1]) == jnp.sum(mask, axis=-1, keepdims=True)
  return Text(jnp.where(end, eos_id, ids), mask | end)
