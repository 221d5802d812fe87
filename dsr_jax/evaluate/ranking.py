"""How well rewards order samples, measured against true scores: pure functions of arrays.

Samples are compared only within their group, because only those differences reach the loss.
Intervals are 95 % bootstraps over groups (see `stats`).
Axes: P groups (inputs), G samples, n samples out of G.
"""

import itertools
import math

import numpy as np
from scipy import stats as scipy_stats

from dsr_jax.evaluate.stats import Estimate, estimate, estimates, interval

AUC_RESAMPLES = 500  # an area is not a function of sums, so each resample must rank again

# Rewards against scores.


def best_mean_worst(rewards, scores) -> dict[str, Estimate]:
  """From scores (P, G): the score of the samples with the best and with the worst reward, the mean
  score, the best possible score, and best - mean ('gain').
  """
  rewards, scores = np.asarray(rewards, float), np.asarray(scores, float)
  rows = np.arange(len(rewards))
  columns = [
    scores[rows, rewards.argmax(axis=1)],
    scores.mean(axis=1),
    scores[rows, rewards.argmin(axis=1)],
    scores.max(axis=1),
    np.ones(len(rows)),
  ]
  statistics = {
    'best': lambda s: s[:, 0] / s[:, 4],
    'mean': lambda s: s[:, 1] / s[:, 4],
    'worst': lambda s: s[:, 2] / s[:, 4],
    'best_there_is': lambda s: s[:, 3] / s[:, 4],
    'gain': lambda s: (s[:, 0] - s[:, 1]) / s[:, 4],
  }
  return estimates(np.stack(columns, axis=1), statistics)


def best_of_curve(rewards, scores) -> list[float]:
  """The expected score of the sample with the best reward among n of the G, n = 1 ... G. Samples
  with equal rewards are averaged.
  """
  rewards, scores = np.asarray(rewards, float), np.asarray(scores, float)
  group = rewards.shape[1]
  curve = np.zeros(group)
  for reward, score in zip(rewards, scores):
    level = {r: score[reward == r].mean() for r in set(reward)}
    ranked = [level[r] for r in sorted(reward, reverse=True)]
    for n in range(1, group + 1):
      # The sample of rank i is the best of n with probability C(G - 1 - i, n - 1) / C(G, n).
      ways = [math.comb(group - 1 - i, n - 1) for i in range(group)]
      total = sum(way * s for way, s in zip(ways, ranked))
      curve[n - 1] += total / math.comb(group, n)
  return (curve / len(rewards)).tolist()


def pairwise_accuracy(rewards, scores) -> dict:
  """The share of pairs within a group that the rewards order as the scores do. Pairs with equal
  scores do not count; equal rewards count half.

  Returns: 'accuracy', an Estimate (None without such a pair), and the number of 'pairs'.
  """
  rewards, scores = np.asarray(rewards, float), np.asarray(scores, float)
  alike = np.zeros(len(rewards))
  number = np.zeros(len(rewards))
  for i, j in itertools.combinations(range(rewards.shape[1]), 2):
    order = np.sign(scores[:, i] - scores[:, j])
    agree = np.sign(rewards[:, i] - rewards[:, j]) * order
    alike += (order != 0) * (agree + 1) / 2
    number += order != 0
  if not number.any():
    return {'accuracy': None, 'pairs': 0}
  accuracy = estimate(
    np.stack([alike, number], axis=1), lambda s: s[:, 0] / np.maximum(s[:, 1], 1e-9)
  )
  return {'accuracy': accuracy, 'pairs': int(number.sum())}


def rank_correlation(a, b) -> float | None:
  """Mean over groups of Spearman's correlation of two rewards (P, G). Omits groups in which one of
  them is constant; None if that is true of all groups.
  """
  found = [
    np.corrcoef(scipy_stats.rankdata(x), scipy_stats.rankdata(y))[0, 1]
    for x, y in zip(np.asarray(a), np.asarray(b))
    if np.ptp(x) and np.ptp(y)
  ]
  return float(np.mean(found)) if found else None


# Rewards alone.


def ties(rewards) -> dict[str, float]:
  """The share of groups whose rewards are all equal (they give no pair), and the share of pairs of
  samples with equal rewards.
  """
  rewards = np.asarray(rewards)
  pairs = [
    rewards[:, i] == rewards[:, j] for i, j in itertools.combinations(range(rewards.shape[1]), 2)
  ]
  return {
    'groups': float(np.mean(np.ptp(rewards, axis=1) == 0)),
    'pairs': float(np.mean(pairs)),
  }


def spread(rewards) -> dict[str, float]:
  """Standard deviation within groups (mean) and between groups (of means), and best - worst
  (mean), in nats per token.
  """
  rewards = np.asarray(rewards, float)
  return {
    'within': float(rewards.std(axis=1).mean()),
    'between': float(rewards.mean(axis=1).std()),
    'range': float(np.ptp(rewards, axis=1).mean()),
  }


def slope(rewards, x) -> dict[str, float] | None:
  """Within groups: the least-squares slope of reward on x (P, G), in nats per unit of x, and their
  correlation; None without variation.
  """
  rewards, x = _centered(rewards), _centered(x)
  if not x.any() or not rewards.any():
    return None
  product = (rewards * x).sum()
  return {
    'slope': float(product / (x**2).sum()),
    'correlation': float(product / np.sqrt((x**2).sum() * (rewards**2).sum())),
  }


def _centered(values):
  values = np.asarray(values, float)
  return values - values.mean(axis=1, keepdims=True)


# Scores of cases against labels.


def auc(scores, labels) -> float | None:
  """The probability that a positive case has a higher score than a negative one; a tie counts
  half; None unless there are both.
  """
  scores, labels = np.asarray(scores, float), np.asarray(labels, bool)
  positive, negative = labels.sum(), (~labels).sum()
  if not positive or not negative:
    return None
  rank = scipy_stats.rankdata(scores)[labels].sum()
  return float((rank - positive * (positive + 1) / 2) / (positive * negative))


def auc_interval(scores, labels, clusters, seed: int = 0) -> dict:
  """`auc` with its interval over clusters (one name per case), and the numbers of cases."""
  scores, labels = np.asarray(scores, float), np.asarray(labels, bool)
  clusters = np.asarray(clusters)
  numbers = {'positive': int(labels.sum()), 'cases': len(labels)}
  value = auc(scores, labels)
  if value is None:
    return {'auc': None, **numbers}
  members = [np.flatnonzero(clusters == c) for c in np.unique(clusters)]
  rng = np.random.default_rng(seed)
  draws = []
  for _ in range(AUC_RESAMPLES):
    chosen = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
    draw = auc(scores[chosen], labels[chosen])
    if draw is not None:
      draws.append(draw)
  return {'auc': Estimate(value, *interval(draws)), **numbers}
