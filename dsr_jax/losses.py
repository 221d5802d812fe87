"""Objectives: arrays in, one loss per group out. The step normalizes the sum over groups once.

Sources: SimPO and GRPO arXiv 2506.07963, eq. 5 and 6-9; Dr.GRPO 2503.20783; RLOO 2402.14740; GSPO
2507.18071; CISPO 2506.13585; online DPO 2402.04792; KL estimators joschu.net/blog/kl-approx.html.

Log-probabilities come from the current policy (`logps`), the policy before the first inner update
(`old_logps`), and the initial model (`ref_logps`).
Axes: B groups, C samples of a group that learn (2 of a pair, 1, or all G), T tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

STD_EPS = 1e-4  # added to the standard deviation of a group


class LossInputs(NamedTuple):
  """The samples that learn: (B, C, T) each, but rewards (B, C).

  ref_logps is None if the objective does not need it; rewards is None for pairs, whose choice
  already reflects the rewards. credit (B, C, T): weights of the tokens with mean 1 in each sample;
  None: all weigh the same.
  """

  logps: jax.Array
  old_logps: jax.Array
  ref_logps: jax.Array | None
  mask: jax.Array
  rewards: jax.Array | None
  credit: jax.Array | None = None


class Objective(NamedTuple):
  """An entry of `OBJECTIVES`.

  Attributes:
    loss: (LossInputs, config.Method) -> the loss of each group (B,), float32.
    choose: (rewards (B, G), config.Method) -> indices (B, C) of the samples that learn, and weights
      (B,) of the groups, 0 if a group gives no gradient.
    measure: (LossInputs, config.Method) -> metrics; None for pairs.
    off_policy_ok: whether it supports several updates on the same samples.
    needs_reference: config.Method -> whether it needs the initial model's log-probabilities.
    takes_credit: whether its tokens can be weighted (`credit`).
  """

  loss: Callable
  choose: Callable
  measure: Callable | None = None
  off_policy_ok: bool = False
  needs_reference: Callable = lambda method: False
  takes_credit: bool = False


# Sequences.


def mean_logp(logps, mask):
  """log pi(y|x) / |y|: the mean over a sequence's unmasked tokens, (..., T) -> (...), float32.

  0 for an empty sequence.
  """
  return sum_logp(logps, mask) / jnp.maximum(jnp.sum(mask, axis=-1), 1)


def sum_logp(logps, mask):
  """log pi(y|x): the sum over a sequence's unmasked tokens, (..., T) -> (...), float32."""
  return jnp.sum(jnp.where(mask, logps.astype(jnp.float32), 0.0), axis=-1)


def credited(values, credit):
  """Token values (B, C, T), each multiplied by its weight in `LossInputs.credit`."""
  return values if credit is None else values * credit


# Pairs: the best and the worst sample of a group.


def best_and_worst(rewards, min_margin: float):
  """Rewards (B, G) -> indices of best and worst (B, 2), and whether the pair counts (B,) float32.

  A pair counts if its rewards differ by more than `min_margin`, so equal rewards never count.
  """
  pair = jnp.stack([jnp.argmax(rewards, axis=-1), jnp.argmin(rewards, axis=-1)], axis=-1)
  gap = jnp.max(rewards, axis=-1) - jnp.min(rewards, axis=-1)
  return pair, (gap > min_margin).astype(jnp.float32)


def simpo_losses(chosen, rejected, *, beta: float, gamma: float):
  """Eq. 5: -log sigmoid(beta (chosen - rejected) - gamma), (B,); no reference and no SFT term.

  chosen, rejected: (B,) length-normalized log-probabilities of the best and the worst sample.
  """
  return -jax.nn.log_sigmoid(beta * (chosen - rejected) - gamma)


def linear_losses(chosen, rejected, *, beta: float, gamma: float):
  """The tangent of eq. 5 at chosen = rejected, without its constant, (B,): every pair has the same
  weight, beta sigmoid(gamma).

  Eq. 5 itself weights pairs that the policy already orders correctly less, which raises the entropy
  whatever the rewards are (docs/study/curvature.md).
  """
  return -beta * jax.nn.sigmoid(gamma) * (chosen - rejected)


def dpo_losses(chosen, rejected, *, beta: float):
  """chosen, rejected: (B,) sequence log-ratios, policy to reference -> losses (B,)."""
  return -jax.nn.log_sigmoid(beta * (chosen - rejected))


def _choose_pair(rewards, method):
  return best_and_worst(rewards, method.min_margin)


def _choose_best(rewards, method):
  pair, weight = best_and_worst(rewards, method.min_margin)
  return pair[:, :1], weight


def _simpo(x: LossInputs, method):
  mean = mean_logp(credited(x.logps, x.credit), x.mask)
  return simpo_losses(mean[:, 0], mean[:, 1], beta=method.beta, gamma=method.gamma)


def _simpo_linear(x: LossInputs, method):
  mean = mean_logp(credited(x.logps, x.credit), x.mask)
  return linear_losses(mean[:, 0], mean[:, 1], beta=method.beta, gamma=method.gamma)


def _online_dpo(x: LossInputs, method):
  assert x.ref_logps is not None
  log_ratio = sum_logp(x.logps - x.ref_logps, x.mask)
  return dpo_losses(log_ratio[:, 0], log_ratio[:, 1], beta=method.dpo.beta)


def _best_of_n(x: LossInputs, method):
  """Plain fine-tuning on the best sample: a control that shows what the worst sample adds."""
  del method
  return -mean_logp(credited(x.logps, x.credit), x.mask)[:, 0]


# Groups. Advantages (B, C) from rewards (B, C).


def normalized(rewards):
  """(R - mean) / (std + 1e-4) within the group, with the population standard deviation."""
  return centered(rewards) / (jnp.std(rewards, axis=-1, keepdims=True) + STD_EPS)


def centered(rewards):
  """R - mean within the group."""
  return rewards - jnp.mean(rewards, axis=-1, keepdims=True)


def against_others(rewards):
  """R_i minus the mean of the other rewards in the group."""
  return centered(rewards) * (rewards.shape[-1] / (rewards.shape[-1] - 1))


# Reductions of token values (B, C, T) to one number per group (B,).


def mean_over_tokens(values, mask):
  """The sum, divided by the number of tokens in the group."""
  total = jnp.sum(jnp.where(mask, values, 0.0), axis=(1, 2))
  return total / jnp.maximum(jnp.sum(mask, axis=(1, 2)), 1)


def mean_over_capacity(values, mask):
  """The sum, divided by a constant: the maximum number of tokens in a group."""
  return jnp.sum(jnp.where(mask, values, 0.0), axis=(1, 2)) / (mask.shape[1] * mask.shape[2])


def mean_of_sums(values, mask):
  """The sum over tokens, averaged over samples."""
  return jnp.mean(sum_logp(values, mask), axis=-1)


def mean_of_means(values, mask):
  """The mean over tokens, averaged over samples."""
  return jnp.mean(mean_logp(values, mask), axis=-1)


# Surrogates: log-probabilities (B, C, T), mask (B, C, T), rewards (B, C) -> losses (B,).


def clipped(ratio, advantage, low: float, high: float):
  """PPO's pessimistic surrogate: min(r A, clip(r, 1 - low, 1 + high) A)."""
  return jnp.minimum(ratio * advantage, jnp.clip(ratio, 1.0 - low, 1.0 + high) * advantage)


def grpo(logps, old_logps, mask, rewards, *, low: float, high: float, credit=None):
  """Eq. 6-8: normalized advantages, one clipped ratio per token, divided by the group's tokens."""
  ratio = _token_ratio(logps, old_logps, mask)
  advantages = credited(normalized(rewards)[..., None], credit)
  return -mean_over_tokens(clipped(ratio, advantages, low, high), mask)


def dr_grpo(logps, old_logps, mask, rewards, *, low: float, high: float, credit=None):
  """GRPO without its two biases: it divides neither by the standard deviation nor by lengths."""
  ratio = _token_ratio(logps, old_logps, mask)
  advantages = credited(centered(rewards)[..., None], credit)
  return -mean_over_capacity(clipped(ratio, advantages, low, high), mask)


def rloo(logps, old_logps, mask, rewards, *, low: float, high: float):
  """Each sample against the mean of the others, with one ratio per sequence.

  At ratio 1, this is the REINFORCE gradient.
  """
  ratio = jnp.exp(sum_logp(logps - old_logps, mask))
  return -jnp.mean(clipped(ratio, against_others(rewards), low, high), axis=-1)


def gspo(logps, old_logps, mask, rewards, *, low: float, high: float):
  """One ratio per sequence, the geometric mean of its tokens' ratios, clipped tightly."""
  ratio = jnp.exp(mean_logp(logps - old_logps, mask))
  return -jnp.mean(clipped(ratio, normalized(rewards), low, high), axis=-1)


def cispo(logps, old_logps, mask, rewards, *, ratio_max: float, credit=None):
  """The ratio, bounded above, only weights the tokens; every token keeps its gradient."""
  ratio = jnp.minimum(_token_ratio(logps, old_logps, mask), ratio_max)
  weight = jax.lax.stop_gradient(ratio)
  advantages = credited(normalized(rewards)[..., None], credit)
  return -mean_over_tokens(weight * advantages * logps, mask)


def kl_tokens(logps, ref_logps, estimator: str):
  """Per-token estimates of KL(policy || reference), with d = log reference - log policy.

  On samples from the policy: k1 is -d, k2 is d²/2, k3 is exp(d) - 1 - d. As a loss, only k2 and k3
  have gradients that pull toward the reference; the gradient of k1 is 0 in expectation.
  """
  d = ref_logps - logps
  if estimator == 'k1':
    return -d
  if estimator == 'k2':
    return 0.5 * jnp.square(d)
  return jnp.expm1(d) - d


def _token_ratio(logps, old_logps, mask):
  return jnp.exp(_token_log_ratio(logps - old_logps, mask))


def _token_log_ratio(gap, mask):
  return jnp.where(mask, gap, 0.0)


# The table.


def weighted(per_group, weight):
  """Losses (B,), weights (B,) -> the weighted sum; a group with weight 0 has no gradient."""
  return jnp.sum(jnp.where(weight > 0, per_group, 0.0) * weight)


def choose_all(rewards, method):
  """Every sample of a group learns, in its original order."""
  del method
  return jnp.broadcast_to(jnp.arange(rewards.shape[1]), rewards.shape), jnp.ones(rewards.shape[0])


def _group_objective(
  *, surrogate, reduce, log_ratio, advantages, bounds, takes_credit: bool
) -> Objective:
  """An objective on whole groups, with its KL term and its metrics.

  Args:
    surrogate: (LossInputs, method) -> losses (B,).
    reduce: reduces the per-token KL to one number per group.
    log_ratio: (logps - old_logps, mask) -> log-ratio per token (B, C, T) or per sequence (B, C).
    advantages: rewards -> advantages, whose sign determines which bound can clip.
    bounds: method -> lower and upper bound of the ratio.
    takes_credit: see `Objective`.
  """

  def loss(x: LossInputs, method):
    value = surrogate(x, method)
    if x.ref_logps is None:
      return value
    return value + method.kl * reduce(kl_tokens(x.logps, x.ref_logps, method.kl_estimator), x.mask)

  def measure(x: LossInputs, method):
    ratio = jnp.exp(log_ratio(x.logps - x.old_logps, x.mask))
    counted = x.mask if ratio.ndim == 3 else jnp.any(x.mask, axis=-1)
    sign = jnp.sign(advantages(x.rewards))
    sign = jnp.broadcast_to(sign.reshape(*sign.shape, *(1,) * (ratio.ndim - 2)), ratio.shape)
    low, high = bounds(method)
    cut = ((ratio > high) & (sign > 0)) | ((ratio < low) & (sign < 0))
    values = dict(
      ratio_gap=jnp.max(jnp.abs(ratio - 1.0)),
      clip_fraction=jnp.sum(cut & counted) / jnp.maximum(jnp.sum(counted), 1),
    )
    if x.ref_logps is not None:
      kl = jnp.sum(jnp.where(x.mask, kl_tokens(x.logps, x.ref_logps, 'k3'), 0.0))
      values['kl'] = kl / jnp.maximum(jnp.sum(x.mask), 1)
    return values

  return Objective(
    loss=loss,
    choose=choose_all,
    measure=measure,
    off_policy_ok=True,
    needs_reference=lambda method: method.kl > 0,
    takes_credit=takes_credit,
  )


def _clipped_by(surrogate, knobs: str, by_token: bool):
  """A surrogate with the ratio bounds of the config group `method.KNOBS`. by_token: whether it has
  one ratio per token, and so can weight tokens.
  """

  def of(x: LossInputs, method):
    group = getattr(method, knobs)
    weights = dict(credit=x.credit) if by_token else {}
    return surrogate(
      x.logps, x.old_logps, x.mask, x.rewards, low=group.ratio_low, high=group.ratio_high, **weights
    )

  return of


def _cispo(x: LossInputs, method):
  ratio_max = method.cispo.ratio_max
  return cispo(x.logps, x.old_logps, x.mask, x.rewards, ratio_max=ratio_max, credit=x.credit)


def _grpo_bounds(method):
  return 1.0 - method.grpo.ratio_low, 1.0 + method.grpo.ratio_high


def _gspo_bounds(method):
  return 1.0 - method.gspo.ratio_low, 1.0 + method.gspo.ratio_high


def _cispo_bounds(method):
  return 0.0, method.cispo.ratio_max


OBJECTIVES = {
  'simpo': Objective(loss=_simpo, choose=_choose_pair, takes_credit=True),
  'simpo_linear': Objective(loss=_simpo_linear, choose=_choose_pair, takes_credit=True),
  'grpo': _group_objective(
    surrogate=_clipped_by(grpo, 'grpo', by_token=True),
    reduce=mean_over_tokens,
    log_ratio=_token_log_ratio,
    advantages=normalized,
    bounds=_grpo_bounds,
    takes_credit=True,
  ),
  'dr_grpo': _group_objective(
    surrogate=_clipped_by(dr_grpo, 'grpo', by_token=True),
    reduce=mean_over_capacity,
    log_ratio=_token_log_ratio,
    advantages=centered,
    bounds=_grpo_bounds,
    takes_credit=True,
  ),
  'rloo': _group_objective(
    surrogate=_clipped_by(rloo, 'grpo', by_token=False),
    reduce=mean_of_sums,
    log_ratio=sum_logp,
    advantages=against_others,
    bounds=_grpo_bounds,
    takes_credit=False,
  ),
  'gspo': _group_objective(
    surrogate=_clipped_by(gspo, 'gspo', by_token=False),
    reduce=mean_of_means,
    log_ratio=mean_logp,
    advantages=normalized,
    bounds=_gspo_bounds,
    takes_credit=False,
  ),
  'cispo': _group_objective(
    surrogate=_cispo,
    reduce=mean_over_tokens,
    log_ratio=_token_log_ratio,
    advantages=jnp.ones_like,  # the upper bound can clip for either sign
    bounds=_cispo_bounds,
    takes_credit=True,
  ),
  'online_dpo': Objective(
    loss=_online_dpo, choose=_choose_pair, needs_reference=lambda method: True
  ),
  'best_of_n': Objective(loss=_best_of_n, choose=_choose_best, takes_credit=True),
}
