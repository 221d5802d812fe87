"""Other self-rewards: the same two likelihoods with weights or with negatives, or self-VQA.

Axes: B inputs, G samples, T text tokens, N image codes, H W pixels, M hard negatives.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dsr_jax.losses import mean_logp
from dsr_jax.models.common.splice import compacted, spliced
from dsr_jax.models.unified import (
  Picture,
  Text,
  UnifiedModel,
  as_answer,
  as_prompt,
  picture_to_read,
  without_eos,
)
from dsr_jax.rewards.base import RewardInputs, codes_of
from dsr_jax.rewards.dual import (
  code_logps,
  counted_eos,
  prompt_given_samples,
  prompt_logps,
  reversed_logps,
)

UNCONDITIONAL = 0.0  # guidance weight 0: only the unconditional branch's logits


def probability(x: RewardInputs):
  """The mean probability of the original input's tokens: one very unlikely token costs little."""
  logps, mask = reversed_logps(x)
  return mean_logp(jnp.exp(logps), mask)


def pmi(x: RewardInputs):
  """R_G and R_U with each token weighted by its mutual information with the samples.

  The weight of token t is the group's mean of |log p(x_t | y) - log p(x_t | nothing)|; the weights
  of a sequence sum to 1. "Nothing" is a gray image, or the unconditional prompt of guidance.
  """
  logps, mask = reversed_logps(x)
  if x.task == 'generation':
    alone, _ = prompt_logps(
      x.model,
      gray_picture(x.model, x.picture.pixels),
      x.text,
      x.question,
      x.scoring,
      eos_id=counted_eos(x),
      keys=x.score_keys,
    )
  else:
    one = Text(x.text.ids[:, :1], x.text.mask[:, :1])
    how = dataclasses.replace(x.scoring, guidance=UNCONDITIONAL)
    alone, _ = code_logps(x.model, x.picture.codes[:, None], one, how, keys=x.score_keys)
  gap = jnp.where(mask, jnp.abs(logps - alone), 0.0)
  weight = jnp.mean(gap, axis=1, keepdims=True) + 1e-6
  total = jnp.sum(jnp.where(mask, weight * logps, 0.0), axis=-1)
  return total / jnp.sum(jnp.where(mask, weight, 0.0), axis=-1)


def contrastive(x: RewardInputs):
  """Log-softmax of the original input against M hard negatives, with whole-sequence likelihoods
  given the sample.

  Negatives for a prompt swap or replace words of one kind (colors, counts, sides ...). Negatives
  for an image are other images.
  """
  logps, mask = reversed_logps(x)
  totals = [jnp.sum(jnp.where(mask, logps, 0.0), axis=-1)]
  if x.task == 'generation':
    for m in range(x.extra['negative_ids'].shape[1]):
      other = Text(x.extra['negative_ids'][:, m], x.extra['negative_mask'][:, m])
      logps, mask = prompt_given_samples(x, other)
      totals.append(jnp.sum(jnp.where(mask, logps, 0.0), axis=-1))
  else:
    prompt = as_prompt(x.model, x.text)
    for m in range(x.extra['negative_pixels'].shape[1]):
      codes = codes_of(x.model, x.extra['negative_pixels'][:, m])
      logps, _ = code_logps(x.model, codes[:, None], prompt, x.scoring, keys=x.score_keys)
      totals.append(jnp.sum(logps, axis=-1))
  return totals[0] - jax.nn.logsumexp(jnp.stack(totals), axis=0)


def vqa(x: RewardInputs):
  """Self-VQA: the probability of yes against no, asked whether the image shows the text."""
  inputs, group = x.sample_keys.shape
  pairs = inputs * group

  def flat(y):  # every pair of a text and an image is a row
    return jnp.broadcast_to(y, (inputs, group, *y.shape[2:])).reshape(-1, *y.shape[2:])

  if x.task == 'generation':
    # Inside the question, another word precedes the first word of the prompt.
    text = as_answer(x.model, x.text)
    picture, text = x.picture, Text(text.ids[:, None], text.mask[:, None])
  else:
    picture = Picture(*(y[:, None] for y in x.picture))
    text = without_eos(x.text, x.eos_id)
  # Close the gaps of ids that were dropped in the middle of a text.
  content = compacted(flat(text.ids), flat(text.mask))
  ids, length = spliced(x.extra['yes_before'], *content, x.extra['yes_after'], pad_id=0)
  question = Text(ids, jnp.arange(ids.shape[1]) < length[:, None])
  answers = _stacked(x.extra['answer_yes'], x.extra['answer_no'])
  answers = Text(*(jnp.broadcast_to(y, (pairs, *y.shape)) for y in answers))
  keys = None if x.score_keys is None else jnp.repeat(x.score_keys, group)
  rows = Picture(*(flat(y)[:, None] for y in picture))
  logps = x.model.text_logps(rows, question, answers, keys, x.scoring).logp
  total = jnp.sum(jnp.where(answers.mask, logps, 0.0), axis=-1).reshape(inputs, group, 2)
  return jax.nn.sigmoid(total[..., 0] - total[..., 1])


def gray_picture(model: UnifiedModel, pixels) -> Picture:
  """Pixels (B, ..., H, W, 3) -> one gray image per input, (B, 1, ...), which says nothing about a
  text.
  """
  gray = jnp.zeros((pixels.shape[0], 1, *pixels.shape[-3:]), pixels.dtype)
  return picture_to_read(model, gray)


def _stacked(*rows) -> Text:
  """Id lists of several lengths, (T,) each -> one Text with a row for each."""
  longest = max(map(len, rows))
  ids = jnp.stack([jnp.pad(row, (0, longest - len(row))) for row in rows])
  return Text(ids, jnp.stack([jnp.arange(longest) < len(row) for row in rows]))
