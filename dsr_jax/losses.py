"""Objectives: arrays in, sums and weights out, to be divided once.

Sources: SimPO and GRPO arXiv 2506.07963, eq. 5 and 6-9; Dr.GRPO 2503.20783; RLOO 2402.14740; GSPO
  2507.18071; CISPO 2506.13585; online
DPO 2402.04792; estimators of the KL joschu.net/blog/kl-approx.html.

Log-probabilities are of the policy that learns (`logp`), of the one at the first inner update
(`old`) and of the initial model (`reference`).
Axes: B groups, C candidates of a group that learn (2 of a pair, 1, or all G), T tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

STD_FLOOR = 1e-4  # added to a group's standard deviation


class Learners(NamedTuple):
  """Candidates that learn: (B, C, T) but rewards (B, C). reference is None where the objective asks
  for none.
  """

  logp: jax.Array
  old: jax.Array
  reference: jax.Array | None
  mask: jax.Array
  rewards: jax.Array


class Objective(NamedTuple):
  """A line of the table.

  loss: (Learners, config.Method) -> the loss of each group (B,), float32.
  choose: (rewards (B, G), config.Method) -> indices (B, C) of the candidates that learn and weights
    (B,) of the groups.
  measure: (Learners, config.Method) -> numbers for the metrics; None where groups are reduced to
    pairs.
  has_ratio: whether it may take several updates on the same samples.
  needs_reference: config.Method -> whether the initial model's log-probabilities are needed.
  """

  loss: Callable
  choose: Callable
  measure: Callable | None = None
  has_ratio: bool = False
  needs_reference: Callable = lambda method: False


# Means and sums.


def mean_logp(logp, mask):
  """log pi(y|x) / |y|, (...): the mean over a sequence's own tokens of (..., T), in float32; 0 for
  an empty sequence.
  """
  return sum_logp(logp, mask) / jnp.maximum(jnp.sum(mask, axis=-1), 1)


def sum_logp(logp, mask):
  """log pi(y|x), (...): the sum over a sequence's own tokens of (..., T), in float32."""
  return jnp.sum(jnp.where(mask, logp.astype(jnp.float32), 0.0), axis=-1)


def _over_tokens(values, mask):
  """(B, C, T) -> (B,): the sum divided by the number of the group's tokens."""
  return jnp.sum(jnp.where(mask, values, 0.0), axis=(1, 2)) / jnp.maximum(
    jnp.sum(mask, axis=(1, 2)), 1
  )


def _over_room(values, mask):
  """(B, C, T) -> (B,): the sum divided by a constant, the number of tokens a group has room for."""
  return jnp.sum(jnp.where(mask, values, 0.0), axis=(1, 2)) / (mask.shape[1] * mask.shape[2])


# Pairs.


def simpo(chosen, rejected, weight, *, beta: float, gamma: float):
  """Online SimPO (arXiv 2506.07963, eq. 5), without a reference model and without an added
  likelihood term.

  Args:
    chosen, rejected: (B,) length-normalised log-probabilities of the best and the worst candidate.
    weight: (B,) 1 where the pair counts, 0 where it was dropped.
    beta, gamma: scale of the margin, and the margin asked for.

  Returns:
    The sum over pairs of -log sigmoid(beta (chosen - rejected) - gamma) and the sum of weights.
  """
  return weighted(simpo_losses(chosen, rejected, beta=beta, gamma=gamma), weight)


def simpo_losses(chosen, rejected, *, beta: float, gamma: float):
  """The loss of each pair, (B,)."""
  return -jax.nn.log_sigmoid(beta * (chosen - rejected) - gamma)


def dpo_losses(chosen, rejected, *, beta: float):
  """chosen, rejected: (B,) log-ratios of whole sequences, policy to reference -> the loss of each
  pair, (B,).
  """
  return -jax.nn.log_sigmoid(beta * (chosen - rejected))


def best_and_worst(rewards, min_margin: float):
  """Rewards (B, G) -> indices of best and worst (B, 2), and whether the pair counts (B,) float32.

  A pair counts if its rewards differ by more than `min_margin`; so equal rewards never do.
  """
  pair = jnp.stack([jnp.argmax(rewards, axis=-1), jnp.argmin(rewards, axis=-1)], axis=-1)
  gap = jnp.max(rewards, axis=-1) - jnp.min(rewards, axis=-1)
  return pair, (gap > min_margin).astype(jnp.float32)


# Groups. Each takes log-probabilities (B, C, T), mask (B, C, T), rewards (B, C) and gives the loss
# of each group, (B,).


def normalised(rewards):
  """(R - mean) / (std + 1e-4) within the group; the standard deviation is the population's."""
  return centred(rewards) / (jnp.std(rewards, axis=-1, keepdims=True) + STD_FLOOR)


def centred(rewards):
  """R - mean within the group."""
  return rewards - jnp.mean(rewards, axis=-1, keepdims=True)


def against_others(rewards):
  """R_i - the mean of the others of the group."""
  return centred(rewards) * (rewards.shape[-1] / (rewards.shape[-1] - 1))


def clipped(ratio, advantage, low: float, high: float):
  """PPO's pessimistic surrogate: min(r A, clip(r, 1 - low, 1 + high) A)."""
  return jnp.minimum(ratio * advantage, jnp.clip(ratio, 1.0 - low, 1.0 + high) * advantage)


def grpo(logp, old, mask, rewards, *, low: float, high: float):
  """The paper's (eq. 6-8): normalised advantages, a ratio a token, clipped, divided by the group's
  number of tokens.
  """
  return -_over_tokens(
    clipped(_ratio(logp, old, mask), normalised(rewards)[..., None], low, high), mask
  )


def dr_grpo(logp, old, mask, rewards, *, low: float, high: float):
  """GRPO without its two biases: advantages are not divided by the spread, sums not by the
  lengths.
  """
  return -_over_room(clipped(_ratio(logp, old, mask), centred(rewards)[..., None], low, high), mask)


def rloo(logp, old, mask, rewards, *, low: float, high: float):
  """Each candidate against the mean of the others, with one ratio a sequence: at ratio 1 the
  gradient is that of REINFORCE.
  """
  ratio = jnp.exp(sum_logp(logp - old, mask))
  return -jnp.mean(clipped(ratio, against_others(rewards), low, high), axis=-1)


def gspo(logp, old, mask, rewards, *, low: float, high: float):
  """One ratio a sequence, the geometric mean of its tokens' ratios, clipped tightly."""
  ratio = jnp.exp(mean_logp(logp - old, mask))
  return -jnp.mean(clipped(ratio, normalised(rewards), low, high), axis=-1)


def cispo(logp, old, mask, rewards, *, most: float):
  """The ratio, bounded above, only weighs the tokens; no token loses its gradient."""
  weight = jax.lax.stop_gradient(jnp.minimum(_ratio(logp, old, mask), most))
  return -_over_tokens(weight * normalised(rewards)[..., None] * logp, mask)


def kl_tokens(logp, reference, estimator: str):
  """Estimates of KL(policy || reference) a token from the policy's samples, with d = log reference
  - log policy.

  k1 is -d, k2 d²/2, k3 exp(d) - 1 - d. As a loss only the gradients of k2 and k3 pull towards the
  reference; k1's is 0 in the mean.
  """
  d = reference - logp
  return {'k1': lambda: -d, 'k2': lambda: 0.5 * jnp.square(d), 'k3': lambda: jnp.expm1(d) - d}[
    estimator
  ]()


def _ratio(logp, old, mask):
  return jnp.exp(jnp.where(mask, logp - old, 0.0))


# The table.


def weighted(per_group, weight):
  """Losses (B,), weights (B,) -> their sum over groups that count, and the sum of weights; a
  dropped group has no gradient.
  """
  return jnp.sum(jnp.where(weight > 0, per_group, 0.0) * weight), jnp.sum(weight)


def _pair(rewards, method):
  return best_and_worst(rewards, method.min_margin)


def _best(rewards, method):
  pair, weight = best_and_worst(rewards, method.min_margin)
  return pair[:, :1], weight


def _everyone(rewards, method):
  del method
  return jnp.broadcast_to(jnp.arange(rewards.shape[1]), rewards.shape), jnp.ones(rewards.shape[0])


def _simpo(x: Learners, method):
  mean = mean_logp(x.logp, x.mask)
  return simpo_losses(mean[:, 0], mean[:, 1], beta=method.beta, gamma=method.gamma)


def _online_dpo(x: Learners, method):
  ratio = sum_logp(x.logp - x.reference, x.mask)
  return dpo_losses(ratio[:, 0], ratio[:, 1], beta=method.dpo_beta)


def _best_of_n(x: Learners, method):
  """Plain fine-tuning on the best candidate: a control, for what the worst one adds."""
  del method
  return -mean_logp(x.logp, x.mask)[:, 0]


def _group(function, over, log_ratio, advantage, bounds, **keys):
  """An objective of whole groups with its KL.

  over: (values, mask) -> (B,), how tokens are averaged. log_ratio: (logp - old, mask) -> that of a
    token or of a sequence. keys: names
  of the settings that `function` takes. For the metrics: bounds: method -> those of the ratio;
  advantage: of rewards, whose sign says which bound can cut (of cispo the upper one, whatever the
  advantage).
  """

  def loss(x: Learners, method):
    value = function(
      x.logp, x.old, x.mask, x.rewards, **{name: getattr(method, key) for name, key in keys.items()}
    )
    if x.reference is None:
      return value
    return value + method.kl * over(kl_tokens(x.logp, x.reference, method.kl_estimator), x.mask)

  def measure(x: Learners, method):
    ratio = jnp.exp(log_ratio(x.logp - x.old, x.mask))
    counted = x.mask if ratio.ndim == 3 else jnp.any(x.mask, axis=-1)
    sign = jnp.broadcast_to(
      jnp.sign(advantage(x.rewards)).reshape(*x.rewards.shape, *(1,) * (ratio.ndim - 2)),
      ratio.shape,
    )
    low, high = bounds(method)
    cut = ((ratio > high) & (sign > 0)) | ((ratio < low) & (sign < 0))
    values = dict(
      ratio_gap=jnp.max(jnp.abs(ratio - 1.0)),
      clip_fraction=jnp.sum(cut & counted) / jnp.maximum(jnp.sum(counted), 1),
    )
    if x.reference is not None:
      kl = jnp.sum(jnp.where(x.mask, kl_tokens(x.logp, x.reference, 'k3'), 0.0))
      values['kl'] = kl / jnp.maximum(jnp.sum(x.mask), 1)
    return values

  return Objective(
    loss, _everyone, measure, has_ratio=True, needs_reference=lambda method: method.kl > 0
  )


def _TOKEN_BOUNDS(method):
  return (1.0 - method.ratio_low, 1.0 + method.ratio_high)


def _SEQUENCE_BOUNDS(method):
  return (1.0 - method.sequence_low, 1.0 + method.sequence_high)


_TOKEN_KEYS = dict(low='ratio_low', high='ratio_high')


def _of_tokens(gap, mask):
  return jnp.where(mask, gap, 0.0)


def _mean_of_sums(values, mask):
  return jnp.mean(sum_logp(values, mask), axis=-1)


def _mean_of_means(values, mask):
  return jnp.mean(mean_logp(values, mask), axis=-1)


OBJECTIVES = {
  'simpo': Objective(_simpo, _pair),
  'grpo': _group(grpo, _over_tokens, _of_tokens, normalised, _TOKEN_BOUNDS, **_TOKEN_KEYS),
  'dr_grpo': _group(dr_grpo, _over_room, _of_tokens, centred, _TOKEN_BOUNDS, **_TOKEN_KEYS),
  'rloo': _group(rloo, _mean_of_sums, sum_logp, against_others, _TOKEN_BOUNDS, **_TOKEN_KEYS),
  'gspo': _group(
    gspo,
    _mean_of_means,
    mean_logp,
    normalised,
    _SEQUENCE_BOUNDS,
    low='sequence_low',
    high='sequence_high',
  ),
  'cispo': _group(
    cispo,
    _over_tokens,
    _of_tokens,
    jnp.ones_like,
    lambda method: (0.0, method.cispo_max),
    most='cispo_max',
  ),
  'online_dpo': Objective(_online_dpo, _pair, needs_reference=lambda method: True),
  'best_of_n': Objective(_best_of_n, _best),
}
