"""Scores of the study's cells with their uncertainty over prompts or images and over seeds,
constructed so that differences are paired.

Every score has RESAMPLES draws: draw r takes the same prompts, images and seeds in every cell. So
any function of scores (a difference, a ratio, a maximum) is computed draw by draw, and its 95 %
interval comes from the percentiles of the draws. From n seeds, each draw takes n - 1 with
replacement, which makes the variance of a mean of n unbiased; a single seed is taken as it is.

Axes: R draws, N seeds, C clusters (prompts of the same words, or images), M sums, P prompts, S
samples.
"""

import functools
import json
import os
from typing import NamedTuple

import numpy as np

from dsr_jax.evaluate import scores as scores_lib
from dsr_jax.evaluate import stats
from dsr_jax.scenes import grammar, sets
from dsr_jax.study import evaluate as study_evaluate
from dsr_jax.study import variants as variants_lib

RESAMPLES = 4000
BLOCK = 500  # draws at a time
MARGIN = 0.02  # scores that differ by less count as equal in the claims


class Score(NamedTuple):
  """A number and its draws (R,). Arithmetic is draw by draw."""

  value: float
  draws: np.ndarray

  def __sub__(self, other):
    return combine(lambda a, b: a - b, self, other)

  @property
  def interval(self) -> tuple[float, float]:
    return stats.interval(self.draws)

  @property
  def p(self) -> float:
    """Two-sided p of a difference from 0, from the draws."""
    return min(1.0, 2 * min(_share(self.draws <= 0), _share(self.draws >= 0)))

  @property
  def p_outside(self) -> float:
    """p of equivalence within +- MARGIN, by two one-sided tests."""
    return max(_share(self.draws <= -MARGIN), _share(self.draws >= MARGIN))

  def json(self) -> dict:
    low, high = self.interval
    return {'value': self.value, 'low': low, 'high': high, 'p': self.p}


def combine(function, *scores: Score) -> Score:
  """A function of numbers, or of arrays of draws, applied to scores."""
  return Score(
    float(function(*(s.value for s in scores))), np.asarray(function(*(s.draws for s in scores)))
  )


def _share(hits) -> float:
  return float((1 + np.sum(hits)) / (1 + len(hits)))


# Measures: rows of an evaluation -> sums by cluster.


class Measure(NamedTuple):
  """A measure. rows: their name. sums: rows -> (sums (C, M), strata (C,) or None). statistic:
  (R, M) -> (R,). title: for tables. scale: 100 for points.
  """

  title: str
  rows: str
  sums: object
  statistic: object
  scale: float = 100.0


def _by_task(select=None, reduce=None):
  def sums(rows):
    values = np.asarray(rows, float)
    values = values if reduce is None else reduce(values)
    prompts = study_evaluate.prompts_of(len(values) // len(grammar.GENEVAL))
    chosen = [i for i, p in enumerate(prompts) if select is None or select(p)]
    return scores_lib.generation_sums([prompts[i] for i in chosen], values[chosen])

  return sums


def _pooled(select):
  """All samples of the selected prompts, regardless of task."""

  def sums(rows):
    found, strata = _by_task(select)(rows)
    return np.stack([found[:, ::2].sum(1), found[:, 1::2].sum(1)], 1), np.zeros_like(strata)

  return sums


_mean = scores_lib.mean_of_tasks
_of_all = scores_lib.share_of_all


def _texts(rows):
  return (np.asarray(rows, float), None)


def _novel(level):
  return _pooled(lambda p: sets.novelty(p.atoms) == level)


MEASURES = {
  'generation': Measure('generation, mean of six tasks', 'generation', _by_task(), _mean),
  **{
    f'generation/{task}': Measure(
      f'generation, {task}', 'generation', _by_task(lambda p, task=task: p.category == task), _mean
    )
    for task in grammar.GENEVAL
  },
  'generation_any': Measure(
    'generation, one of several samples right',
    'generation_many',
    _by_task(reduce=lambda v: v.any(1, keepdims=True)),
    _mean,
  ),
  'generation_one': Measure(
    'generation, one sample, same prompts as of several', 'generation_many', _by_task(), _mean
  ),
  'generation_strict': Measure('generation, strict rule', 'strict', _by_task(), _mean),
  'generation_graded': Measure('generation, share of atoms', 'graded', _by_task(), _mean),
  **{
    f'novelty/{level}': Measure(f'generation, {name}', 'generation', _novel(level), _of_all)
    for level, name in sets.NOVELTY.items()
  },
  **{
    f'failure/{name}': Measure(
      f'failed, {name}', 'failure', _by_task(reduce=lambda v, code=code: v == code), _mean
    )
    for code, name in enumerate(study_evaluate.FAILURES)
    if code
  },
  'extras': Measure('unrequested objects per image', 'extras', _by_task(), _mean, 1.0),
  'pebbles': Measure('pebbles per image', 'pebbles', _by_task(), _mean, 1.0),
  **{
    f'{rows}/{name}': Measure(
      f'{title}: {name}',
      rows,
      _texts,
      scores_lib.DESCRIPTION[name],
      1.0 if name == 'words' else 100.0,
    )
    for rows, title in (
      ('description', 'description'),
      ('description_greedy', 'description, greedy'),
    )
    for name in ('f1', 'precision', 'recall', 'hallucination', 'words')
  },
  'yesno/f1': Measure('yes/no: F1', 'yesno', _texts, scores_lib.YESNO['f1']),
  'yesno/accuracy': Measure('yes/no: accuracy', 'yesno', _texts, scores_lib.YESNO['accuracy']),
}
SCORER_ROWS = 'scorer_'


# Draws.


@functools.lru_cache(maxsize=32)
def _cluster_counts(strata: tuple[int, ...]) -> np.ndarray:
  """(R, C): how often each draw takes each cluster, within strata; the same for equal lists."""
  strata = np.array(strata)
  counts = np.zeros((RESAMPLES, len(strata)), np.float32)
  for s in np.unique(strata):
    members = np.flatnonzero(strata == s)
    rng = np.random.default_rng((7, int(s), len(members)))
    counts[:, members] = rng.multinomial(
      len(members), np.full(len(members), 1 / len(members)), size=RESAMPLES
    )
  return counts


@functools.lru_cache(maxsize=32)
def seed_weights(seeds: int) -> np.ndarray:
  """(R, N): each seed's share of a draw; rows sum to 1."""
  if seeds == 1:
    return np.ones((RESAMPLES, 1))
  rng = np.random.default_rng((8, seeds))
  return rng.multinomial(seeds - 1, np.full(seeds, 1 / seeds), size=RESAMPLES) / (seeds - 1)


def score(sums, statistic, strata=None) -> Score:
  """Sums (N, C, M) of the same list for N seeds -> the statistic of their mean."""
  sums = np.asarray(sums, np.float32)
  n, clusters, m = sums.shape
  strata = np.zeros(clusters, int) if strata is None else strata
  counts, weights = _cluster_counts(tuple(int(s) for s in strata)), seed_weights(n)
  flat = np.swapaxes(sums, 0, 1).reshape(clusters, n * m)
  taken = np.concatenate(
    [counts[i : i + BLOCK] @ flat for i in range(0, RESAMPLES, BLOCK)]
  ).reshape(RESAMPLES, n, m)
  drawn = np.einsum('rn,rnm->rm', weights, taken)
  whole = sums.astype(float).sum(1).mean(0)[None]
  return Score(float(statistic(whole)[0]), np.asarray(statistic(drawn)))


# Existing cells.


class Results:
  """Scores over finished cells. cells: the finished ones of `Study.finished`."""

  def __init__(self, cells):
    self._cells, self._kept = {}, {}
    for cell in cells:
      self._cells.setdefault((cell.base, cell.variant), {})[cell.seed] = cell
    self.bases = list(dict.fromkeys(base for base, _ in self._cells))
    self._rows = functools.lru_cache(maxsize=64)(_read_rows)

  def variants(self, base: str) -> list[str]:
    return [v for b, v in self._cells if b == base]

  def seeds(self, base: str, variant: str) -> list[int]:
    return sorted(self._cells.get((base, variant), {}))

  def cell(self, base: str, variant: str, seed: int):
    return self._cells[base, variant][seed]

  def steps(self, base: str, variant: str) -> list[int]:
    """Steps that were evaluated in all seeds of a variant."""
    found = []
    for cell in self._cells.get((base, variant), {}).values():
      folder = os.path.join(cell.folder, 'evaluations')
      found.append({int(name[:-5]) for name in os.listdir(folder) if name.endswith('.json')})
    return sorted(set.intersection(*found)) if found else []

  def rows(self, base: str, variant: str, seed: int, step: int | None = None) -> dict:
    cell = self.cell(base, variant, seed)
    return self._rows(
      os.path.join(
        cell.folder, 'evaluations', f'{cell.last_step if step is None else step:06d}.json'
      )
    )

  def score(
    self,
    base: str,
    variant: str,
    measure: str,
    seeds=None,
    step: int | None = None,
    prefix: int | None = None,
  ) -> Score | None:
    """A measure's score, or None if it was not measured.

    seeds: the seeds to include, by default all; a variant that trains nothing counts for any seed.
    prefix: use only the first part of the lists, which quick evaluations have: `prefix` prompts per
    task, or images.
    """
    there = self.seeds(base, variant)
    fixed = there and variants_lib.VARIANTS[variant].kind != variants_lib.TRAINED
    seeds = tuple(there if seeds is None else seeds)
    if not there or not seeds or (not fixed and not set(seeds) <= set(there)):
      return None
    key = base, variant, measure, seeds, step, prefix
    if key not in self._kept:
      m = MEASURES[measure]
      each = [
        self.rows(base, variant, there[0] if fixed else seed, step).get(m.rows) for seed in seeds
      ]
      if any(e is None for e in each):
        return None
      found = [m.sums(e if prefix is None else _beginning(m.rows, e, prefix)) for e in each]
      if not len(found[0][0]):
        return None
      self._kept[key] = score(np.stack([s for s, _ in found]), m.statistic, found[0][1])
    return self._kept[key]

  def value(self, base: str, variant: str, measure: str, seed: int) -> float:
    """A measure for one seed, which must have been measured."""
    m = MEASURES[measure]
    return float(
      m.statistic(
        np.asarray(m.sums(self.rows(base, variant, seed)[m.rows])[0], float).sum(0)[None]
      )[0]
    )

  def difference(self, base: str, a: str, b: str, measure: str) -> Score | None:
    """a - b, over the seeds that both have."""
    seeds = self.common(base, a, b)
    first, second = (self.score(base, v, measure, seeds) for v in (a, b))
    return None if first is None or second is None else first - second

  def common(self, base: str, *variants: str) -> tuple[int, ...]:
    """The seeds that all variants have; a variant that trains nothing has any seed."""
    trained = [v for v in variants if variants_lib.VARIANTS[v].kind == variants_lib.TRAINED]
    if any(not self.seeds(base, v) for v in variants):
      return ()
    return (
      tuple(sorted(set.intersection(*(set(self.seeds(base, v)) for v in trained))))
      if trained
      else (0,)
    )


def validation_scores(path: str) -> dict[str, float]:
  """{'generation': mean of tasks, 'understanding': F1 of descriptions} of an evaluation whose tasks
  have lists of equal length.
  """
  rows = _read_rows(path)
  f1 = MEASURES['description/f1'].statistic(np.sum(rows['description'], axis=0, dtype=float)[None])
  return {'generation': float(np.mean(rows['generation'])), 'understanding': float(f1[0])}


def _read_rows(path: str) -> dict:
  with open(path, encoding='utf-8') as f:
    return json.load(f)


def _beginning(name, rows, prefix):
  """The first `prefix` rows of each task in a list of prompts, or of a list of images."""
  if name.startswith(('description', 'yesno')):
    return rows[:prefix]
  tasks = len(grammar.GENEVAL)
  each = len(rows) // tasks
  return [row for t in range(tasks) for row in rows[t * each : t * each + min(prefix, each)]]
