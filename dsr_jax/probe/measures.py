"""The probe's numbers: pure functions of rewards, judgements and texts.

Everything within a group is compared within a group, for only that reaches the loss. Intervals are
95 % bootstraps over groups.
Axes: P groups (inputs), G candidates, R resamples.
"""

import itertools
import math

import numpy as np
from scipy import stats

from dsr_jax.evaluate.scores import Estimate, estimates

RESAMPLES = 500  # of what is no function of sums


def best_mean_worst(rewards, scores) -> dict[str, Estimate]:
  """Scores (P, G) of the candidate with the best and the worst reward, their mean, the best score
  there is, and best - mean ('gain').
  """
  rewards, scores = np.asarray(rewards, float), np.asarray(scores, float)
  rows = np.arange(len(rewards))
  sums = np.stack(
    [
      scores[rows, rewards.argmax(1)],
      scores.mean(1),
      scores[rows, rewards.argmin(1)],
      scores.max(1),
      np.ones(len(rows)),
    ],
    1,
  )

  def ratio(i):
    return lambda s: s[:, i] / s[:, 4]

  names = {
    'best': ratio(0),
    'mean': ratio(1),
    'worst': ratio(2),
    'best_there_is': ratio(3),
    'gain': lambda s: (s[:, 0] - s[:, 1]) / s[:, 4],
  }
  return estimates(sums, names)


def best_of_curve(rewards, scores) -> list[float]:
  """The expected score of the candidate with the best reward among n of the G, n = 1 ... G; equal
  rewards share.
  """
  rewards, scores = np.asarray(rewards, float), np.asarray(scores, float)
  group = rewards.shape[1]
  curve = np.zeros(group)
  for reward, score in zip(rewards, scores):
    level = {r: score[reward == r].mean() for r in set(reward)}
    ranked = [level[r] for r in sorted(reward, reverse=True)]
    for n in range(1, group + 1):
      # The candidate of rank i is the best of n with probability C(G - 1 - i, n - 1) / C(G, n).
      curve[n - 1] += sum(
        math.comb(group - 1 - i, n - 1) * s for i, s in enumerate(ranked)
      ) / math.comb(group, n)
  return (curve / len(rewards)).tolist()


def ties(rewards) -> dict[str, float]:
  """Share of groups whose rewards are all equal (they give no pair), and of pairs of candidates
  with equal rewards.
  """
  rewards = np.asarray(rewards)
  pairs = [
    rewards[:, i] == rewards[:, j] for i, j in itertools.combinations(range(rewards.shape[1]), 2)
  ]
  return {'groups': float(np.mean(np.ptp(rewards, axis=1) == 0)), 'pairs': float(np.mean(pairs))}


def spread(rewards) -> dict[str, float]:
  """Standard deviation within groups (mean), between groups (of means), and best - worst (mean),
  nats a token.
  """
  rewards = np.asarray(rewards, float)
  return {
    'within': float(rewards.std(1).mean()),
    'between': float(rewards.mean(1).std()),
    'range': float(np.ptp(rewards, axis=1).mean()),
  }


def pairwise_accuracy(rewards, scores) -> dict:
  """Of the pairs of a group that the scores tell apart, the share that the rewards order alike (a
  tie is half): Estimate and number.
  """
  rewards, scores = np.asarray(rewards, float), np.asarray(scores, float)
  alike, number = np.zeros(len(rewards)), np.zeros(len(rewards))
  for i, j in itertools.combinations(range(rewards.shape[1]), 2):
    order = np.sign(scores[:, i] - scores[:, j])
    agree = np.sign(rewards[:, i] - rewards[:, j]) * order
    alike += (order != 0) * (agree + 1) / 2
    number += order != 0
  if not number.any():
    return {'accuracy': None, 'pairs': 0}
  found = estimates(
    np.stack([alike, number], 1), {'accuracy': lambda s: s[:, 0] / np.maximum(s[:, 1], 1e-9)}
  )
  return {**found, 'pairs': int(number.sum())}


def share(hits) -> Estimate:
  """The share of true ones among independent cases."""
  hits = np.asarray(hits, float)
  return estimates(np.stack([hits, np.ones(len(hits))], 1), {'share': lambda s: s[:, 0] / s[:, 1]})[
    'share'
  ]


def rank_correlation(a, b) -> float | None:
  """Mean over groups of Spearman's correlation of two rewards (P, G); groups without order are left
  out; None if all are.
  """
  found = [
    np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1]
    for x, y in zip(np.asarray(a), np.asarray(b))
    if np.ptp(x) and np.ptp(y)
  ]
  return float(np.mean(found)) if found else None


def slope(rewards, x) -> dict[str, float] | None:
  """Within groups: the least-squares slope of reward on x (P, G), nats a unit of x, and their
  correlation; None without variation.
  """

  def centre(v):
    return np.asarray(v, float) - np.asarray(v, float).mean(1, keepdims=True)

  rewards, x = centre(rewards), centre(x)
  if not x.any() or not rewards.any():
    return None
  product = (rewards * x).sum()
  return {
    'slope': float(product / (x**2).sum()),
    'correlation': float(product / np.sqrt((x**2).sum() * (rewards**2).sum())),
  }


def auc(scores, labels) -> float | None:
  """The chance that a labelled case has a higher score than an unlabelled one; a tie is half; None
  without both sorts.
  """
  scores, labels = np.asarray(scores, float), np.asarray(labels, bool)
  positive, negative = labels.sum(), (~labels).sum()
  if not positive or not negative:
    return None
  rank = stats.rankdata(scores)[labels].sum()
  return float((rank - positive * (positive + 1) / 2) / (positive * negative))


def auc_interval(scores, labels, clusters, seed: int = 0) -> dict:
  """`auc` with its interval over clusters (a name a case: its group), and the numbers of cases."""
  scores, labels, clusters = (
    np.asarray(scores, float),
    np.asarray(labels, bool),
    np.asarray(clusters),
  )
  numbers = {'positive': int(labels.sum()), 'cases': len(labels)}
  value = auc(scores, labels)
  if value is None:
    return {'auc': None, **numbers}
  members = [np.flatnonzero(clusters == c) for c in np.unique(clusters)]
  rng, found = np.random.default_rng(seed), []
  for _ in range(RESAMPLES):
    chosen = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
    found.append(auc(scores[chosen], labels[chosen]))
  low, high = np.percentile([f for f in found if f is not None], (2.5, 97.5))
  return {'auc': Estimate(value, float(low), float(high)), **numbers}


def lowest_is_wrong(groups) -> dict:
  """groups: [(values, wrong)] a text. Where some but not all of its words are wrong: how often the
  lowest one is, and by chance would be.
  """
  mixed = [(np.asarray(v), np.asarray(w, bool)) for v, w in groups if any(w) and not all(w)]
  if not mixed:
    return {'hits': None, 'chance': None, 'texts': 0}
  return {
    'hits': share([w[v.argmin()] for v, w in mixed]),
    'chance': float(np.mean([w.mean() for _, w in mixed])),
    'texts': len(mixed),
  }


# Go or no-go.

# (name, where it stands, relation, threshold, reason)
GATES = {
  'generation': (
    (
      'gain of the best over the mean, by the judge',
      ('judged', 'right', 'gain'),
      '>=',
      0.03,
      'else there is nothing to learn towards',
    ),
    ('pairs ordered as the judge does', ('pairwise', 'accuracy'), '>=', 0.6, 'a coin has .5'),
    ('groups without any difference', ('ties', 'groups'), '<=', 0.5, 'they give no pair'),
    ('spread within groups, nats', ('spread', 'within'), '>=', 0.005, 'less drowns in rounding'),
    ('swapped attributes told apart', ('swaps', 'mean'), '>=', 0.6, 'a coin has .5'),
    (
      'rank correlation over instructions',
      ('instructions', 'mean'),
      '>=',
      0.5,
      'else the wording decides',
    ),
    (
      'correlation with entropy, absolute',
      ('slopes', 'entropy', 'correlation'),
      '|<=|',
      0.8,
      'else flat pictures win',
    ),
  ),
  'understanding': (
    (
      'gain of the best over the mean, by the judge',
      ('judged', 'f1', 'gain'),
      '>=',
      0.03,
      'else there is nothing to learn towards',
    ),
    ('pairs ordered as the judge does', ('pairwise', 'accuracy'), '>=', 0.6, 'a coin has .5'),
    ('groups without any difference', ('ties', 'groups'), '<=', 0.5, 'they give no pair'),
    ('spread within groups, nats', ('spread', 'within'), '>=', 0.005, 'less drowns in rounding'),
    ('swapped attributes told apart', ('swaps', 'mean'), '>=', 0.6, 'a coin has .5'),
    (
      'correlation with length, absolute',
      ('slopes', 'length', 'correlation'),
      '|<=|',
      0.8,
      'else long texts win',
    ),
  ),
}


def decide(task: str, numbers: dict) -> dict:
  """The gates of a task: go if none of those that could be measured fails. 'blind': what the reward
  does not see, go or not.
  """
  rows = []
  for name, path, relation, threshold, reason in GATES[task]:
    value = numbers
    for key in path:
      value = value.get(key) if isinstance(value, dict) else None
    value = value.value if isinstance(value, Estimate) else value
    passed = (
      None
      if value is None
      else {'>=': value >= threshold, '<=': value <= threshold, '|<=|': abs(value) <= threshold}[
        relation
      ]
    )
    rows.append(
      {
        'gate': name,
        'value': value,
        'relation': relation.strip('|'),
        'threshold': threshold,
        'passed': passed,
        'reason': reason,
      }
    )
  return {
    'go': all(row['passed'] is not False for row in rows),
    'gates': rows,
    'blind': _blind(numbers),
  }


def _blind(numbers: dict) -> list[str]:
  """Swaps that a coin could tell apart as well, and sorts of prompts whose best by the reward is
  worse than the mean, surely.
  """
  swaps = [
    (kind, v) for kind, v in numbers['swaps'].items() if isinstance(v, dict) and v['low'] <= 0.5
  ]
  worse = [
    (name, v['gain']) for name, v in numbers.get('categories', {}).items() if v['gain'].high < 0
  ]
  return [f'swapped {kind}: {v["value"]:.2f} told apart' for kind, v in swaps] + [
    f'prompts of the sort {name}: the best by reward is {-gain.value:.2f} worse than the mean'
    for name, gain in worse
  ]


def to_json(tree):
  """Estimates as {'value', 'low', 'high'}, NumPy's numbers as Python's."""
  if isinstance(tree, Estimate):
    return {k: to_json(v) for k, v in tree._asdict().items()}
  if isinstance(tree, dict):
    return {str(k): to_json(v) for k, v in tree.items()}
  if isinstance(tree, (list, tuple)):
    return [to_json(v) for v in tree]
  return tree.item() if isinstance(tree, np.generic) else tree
