"""Diagnostics: diversity, lengths, entropy, and signs of reward hacking.

They never affect training. Axes: B inputs, G samples, C samples that learn, T tokens, N image
codes, H W pixels.
"""

import jax
import jax.numpy as jnp

from dsr_jax import losses
from dsr_jax.models.unified import (
  Picture,
  Scoring,
  Text,
  UnifiedModel,
  picture_to_read,
  without_eos,
)
from dsr_jax.rewards import dual
from dsr_jax.rollouts import Rollout, Scorers, UpdateAux

# During sampling: values for each input, (B,).


def of_codes(codes, rewards) -> dict:
  """Sampled images (B, G, N): similarity, entropy, and slope of reward on entropy."""
  alike = jnp.mean(codes[:, :, None] == codes[:, None, :], axis=-1, dtype=jnp.float32)
  entropy = code_entropy(codes)
  return dict(
    similarity=_among_others(jnp.mean(alike, axis=(1, 2)), codes.shape[1]),
    code_entropy=jnp.mean(entropy, axis=1),
    reward_entropy_slope=slope(rewards, entropy),
  )


def of_texts(texts: Text, rewards, eos_id: int) -> dict:
  """Sampled texts (B, G, T): lengths, truncated and empty shares, slope of reward on length."""
  length = jnp.sum(without_eos(texts, eos_id).mask, axis=-1)
  ended = jnp.any(texts.mask & (texts.ids == eos_id), axis=-1)
  ids = jnp.where(texts.mask, texts.ids, -1)
  same = jnp.all(ids[:, :, None] == ids[:, None], axis=-1)
  return dict(
    text_length=jnp.mean(length, axis=1, dtype=jnp.float32),
    truncated=jnp.mean(~ended, axis=1, dtype=jnp.float32),
    empty=jnp.mean(length == 0, axis=1, dtype=jnp.float32),
    reward_length_slope=slope(rewards, length.astype(jnp.float32)),
    similarity=_among_others(jnp.mean(same, axis=(1, 2), dtype=jnp.float32), length.shape[1]),
  )


def of_terms(terms: dict) -> dict:
  """Terms (B, G) of a sum of rewards: the mean of each, and its spread within groups."""
  values = {}
  for name, rewards in terms.items():
    values[f'reward/{name}'] = jnp.mean(rewards, axis=1)
    values[f'reward/{name}_spread'] = jnp.std(rewards, axis=1)
  return values


def sampler_gap(model: UnifiedModel, prompt: Text, codes, sample_logps, how: Scoring, *, keys):
  """The largest |log p when sampled - log p when scored| of one sample in the chunk, (B,).

  Runs one teacher-forced pass with the same distribution, including guidance. Only for a model
  whose sampler is exact. keys: (B,), or None for a model whose likelihoods need none.
  """
  first = Text(prompt.ids[:1, None], prompt.mask[:1, None])
  first_key = None if keys is None else keys[:1]
  scored = model.picture_logps(first, codes[:1, :1], first_key, how).logp
  gap = jnp.max(jnp.abs(scored - sample_logps[:1, :1]))
  return jnp.broadcast_to(gap, codes.shape[:1])


def hack_probes(
  scorers: Scorers,
  prompt: Text,
  pictures: Picture,
  instruction: Text,
  extra: dict,
  how: Scoring,
  keys,
) -> dict:
  """Probes for hacking of R_G, (B,) each; nan if the probes are not due.

  probe_swapped_gain: R_G minus R_G of the prompt with swapped attributes; probe_swapped_right: the
  share of samples where this is above 0; probe_coarse_loss: the drop of R_G when images are
  coarsened, which removes details that only a model can see.
  """
  scorer = scorers.scorer

  def score(text, shown):
    return dual.generation(scorer, shown, text, instruction, how, keys=keys)[0]

  def probe():
    swapped = Text(extra['negative_ids'][:, 0], extra['negative_mask'][:, 0])
    plain = score(prompt, pictures)
    gain = plain - score(swapped, pictures)
    coarse = plain - score(prompt, picture_to_read(scorer, coarsened(pictures.pixels)))
    return dict(
      probe_swapped_gain=jnp.mean(gain, axis=1),
      probe_swapped_right=jnp.mean(gain > 0, axis=1, dtype=jnp.float32),
      probe_coarse_loss=jnp.mean(coarse, axis=1),
    )

  def unknown():
    return {k: jnp.full(v.shape, jnp.nan) for k, v in jax.eval_shape(probe).items()}

  # A branch, so that it costs nothing when it is not due.
  return jax.lax.cond(scorers.probe_due, probe, unknown)


def code_entropy(codes):
  """codes (..., N) -> entropy in nats of the code frequencies within an image, (...); low for a
  flat image.
  """
  # The frequency of each position's code in its image.
  share = jnp.mean(codes[..., :, None] == codes[..., None, :], axis=-1, dtype=jnp.float32)
  return -jnp.mean(jnp.log(share), axis=-1)


def slope(y, x):
  """y, x (B, G) -> least-squares slope of y on x within each group, (B,); 0 if x is constant."""
  x, y = losses.centered(x), losses.centered(y)
  spread = jnp.sum(x * x, axis=-1)
  safe = jnp.where(spread > 0, spread, 1.0)
  return jnp.where(spread > 0, jnp.sum(x * y, axis=-1) / safe, 0.0)


def coarsened(pixels):
  """Pixels (..., H, W, 3) with every 2 x 2 block replaced by its mean."""
  *lead, height, width, channels = pixels.shape
  blocks = pixels.reshape(-1, height // 2, 2, width // 2, 2, channels)
  mean = jnp.mean(blocks, axis=(2, 4))
  return jnp.repeat(jnp.repeat(mean, 2, axis=1), 2, axis=2).reshape(*lead, height, width, channels)


def _among_others(share, group: int):
  """The share of equal pairs (B,), without each sample's pair with itself."""
  return (share * group - 1) / (group - 1)


# After the update: the task's metrics, as scalars.


def of_rollout(rollout: Rollout, pair, weight) -> dict:
  """Means over the step of the rewards and of the diagnostics from sampling."""
  best_and_worst = take(rollout.rewards, pair)
  return dict(
    reward_mean=jnp.mean(rollout.rewards),
    reward_best=jnp.mean(best_and_worst[:, 0]),
    reward_worst=jnp.mean(best_and_worst[:, 1]),
    reward_spread=jnp.mean(jnp.std(rollout.rewards, axis=1)),
    reward_frozen=jnp.mean(rollout.frozen_rewards),
    dropped_pairs=1.0 - jnp.mean(weight),
    **{name: jnp.mean(value) for name, value in rollout.diagnostics.items()},
  )


def of_update(aux: UpdateAux) -> dict:
  """Loss, and the entropy of the tokens that learned."""
  return dict(loss=aux.loss, entropy=masked_mean(aux.entropy, aux.mask))


def of_pairs(aux: UpdateAux, weight) -> dict:
  """Means over the pairs that count; if only the best sample learns, its log-probability. With
  `method.credit`, of the weighted log-probabilities, as in the loss.
  """
  mean = losses.mean_logp(losses.credited(aux.logps, aux.credit), aux.mask)
  pairs = jnp.maximum(jnp.sum(weight), 1.0)
  values = dict(chosen_logp=jnp.sum(mean[:, 0] * weight) / pairs)
  if mean.shape[1] == 2:
    margin = mean[:, 0] - mean[:, 1]
    values['margin'] = jnp.sum(margin * weight) / pairs
    values['margin_size'] = jnp.sum(jnp.abs(margin) * weight) / pairs
    values['preferred'] = jnp.sum((margin > 0) * weight) / pairs
  return values


def against_sampler(aux: UpdateAux, scores_its_sampler: bool) -> dict:
  """For whole groups, the distance between the policy that learns and the sampling distribution.

  The largest |ratio - 1|, or, if another distribution sampled, the effective sample size.
  """
  gap = aux.logps - aux.sample_logps
  if scores_its_sampler:
    ratio_gap = jnp.where(aux.mask, jnp.abs(jnp.expm1(gap)), 0.0)
    return dict(sampler_ratio_gap=jnp.max(ratio_gap))
  # Importance weights of whole samples within their group, (B, G).
  weight = jax.nn.softmax(losses.sum_logp(gap, aux.mask), axis=-1)
  return dict(effective_sample_size=jnp.mean(1.0 / jnp.sum(jnp.square(weight), axis=-1)))


def masked_mean(values, mask):
  """The mean of values where mask is True; 0 if it is never True."""
  return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def take(x, index):
  """x (B, G, ...), index (B, C) -> (B, C, ...)."""
  return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)
