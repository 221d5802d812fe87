"""Estimates with 95 % intervals: percentile bootstraps that resample clusters.

A cluster is a set of items that were drawn together: all images for prompts with the same text, or
all questions and texts about one image. A statistic is a function of sums over clusters, so a
resample is one sum of rows. The resampling is seeded and therefore the same for all models on one
list, so differences are paired.

Axes: C clusters, M sums, R resamples.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dsr_jax.errors import InputError

FAR = 3.0  # nats per token below the usual reward: text or images outside the model's domain
RESAMPLES = 2000
BLOCK = 100_000  # clusters drawn at a time, so that a long list needs little memory


class Estimate(NamedTuple):
  """A number and its 95 % interval."""

  value: float
  low: float
  high: float


Statistic = Callable[[np.ndarray], np.ndarray]  # (R, M) sums -> (R,)


def interval(draws) -> tuple[float, float]:
  """The 95 % percentile interval of draws (R,)."""
  low, high = np.percentile(draws, (2.5, 97.5))
  return float(low), float(high)


def estimates(
  sums: np.ndarray,
  statistics: dict[str, Statistic],
  strata: np.ndarray | None = None,
  seed: int = 0,
) -> dict[str, Estimate]:
  """Each statistic over all clusters, and its interval from resampling clusters within strata.

  sums: (C, M), the contribution of each cluster. strata: (C,) ints, one stratum by default.
  """
  sums = np.asarray(sums, float)
  resampled = _resampled(sums, strata, seed)
  total = sums.sum(axis=0)[None]
  out = {}
  for name, statistic in statistics.items():
    low, high = interval(statistic(resampled))
    out[name] = Estimate(float(statistic(total)[0]), low, high)
  return out


def estimate(
  sums: np.ndarray, statistic: Statistic, strata: np.ndarray | None = None, seed: int = 0
) -> Estimate:
  """`estimates` for one statistic."""
  return estimates(sums, {'value': statistic}, strata, seed)['value']


def difference(
  after: np.ndarray, before: np.ndarray, statistic: Statistic, strata: np.ndarray | None = None
) -> Estimate:
  """The paired difference of a statistic. Both are (C, M), for the same clusters of one list."""
  if np.shape(after) != np.shape(before):
    raise InputError(
      f'scores of shapes {np.shape(after)} and {np.shape(before)} cannot be paired; evaluate both '
      'models on the same list'
    )
  return estimate(np.concatenate([after, before], axis=1), paired(statistic), strata)


def paired(statistic: Statistic) -> Statistic:
  """A function of sums (R, 2 M), after beside before: the difference of their statistics."""

  def minus(sums):
    after, before = np.split(sums, 2, axis=1)
    return statistic(after) - statistic(before)

  return minus


def share(hits) -> Estimate:
  """The share of true values among independent cases (C,)."""
  hits = np.asarray(hits, float)
  return estimate(np.stack([hits, np.ones(len(hits))], axis=1), lambda s: s[:, 0] / s[:, 1])


def unfamiliar(rewards) -> tuple[np.ndarray, float]:
  """Inputs whose best candidate is FAR below the upper quartile of all inputs' best candidates:
  text or images outside the model's domain.

  rewards (P, G), nats per token. Returns which inputs (P,) bool, and that quartile.
  """
  best = np.asarray(rewards, float).max(axis=1)
  usual = float(np.quantile(best, 0.75))
  return best < usual - FAR, usual


def ratio(a, b):
  """a / b, and 0 where b is 0."""
  return np.where(b > 0, a / np.maximum(b, 1e-9), 0.0)


def _resampled(sums, strata, seed) -> np.ndarray:
  """(R, M): sums of as many clusters of each stratum as it has, drawn with replacement."""
  strata = np.zeros(len(sums), int) if strata is None else np.asarray(strata)
  rng = np.random.default_rng(seed)
  resampled = np.zeros((RESAMPLES, sums.shape[1]))
  for stratum in np.unique(strata):
    members = sums[strata == stratum]
    size = len(members)
    rows = max(BLOCK // size, 1)
    for start in range(0, RESAMPLES, rows):
      part = resampled[start : start + rows]
      chosen = rng.integers(size, size=(len(part), size))
      # how often each cluster was drawn, by resample
      cells = chosen + size * np.arange(len(part))[:, None]
      counts = np.bincount(cells.ravel(), minlength=cells.size).reshape(cells.shape)
      part += counts @ members
  return resampled
