"""Scores of a run over the same items on both sides.

An evaluation before or after training uses whole lists, one during training only the first part of
each (`evaluate.evaluator`). Comparing their numbers would show how hard the items are, not what was
learned. So all comparisons here use only the items that both have, from the rows that each
evaluation writes (`WORKDIR/evaluations`), with a paired interval.

Axes: P prompts, S samples of a prompt, C clusters (images), M sums, R resamples.
"""

from collections.abc import Callable, Container
import functools
import glob
import os
from typing import NamedTuple

import numpy as np

from dsr_jax import effect
from dsr_jax.errors import InputError
from dsr_jax.evaluate import scores as scores_lib
from dsr_jax.evaluate import stats, watched
from dsr_jax.runtime import metrics as metrics_lib
from dsr_jax.runtime import run_files
from dsr_jax.scenes import grammar, sets

PICTURES = ('description', 'description_greedy', 'yesno')  # rows of images; all others: prompts
UNFAMILIAR = 'unfamiliar'  # key beside the rows of step 0: prompts that the model does not know
# Scores for which lower is better, and those that are neither good nor bad.
LOWER_IS_BETTER = ('hallucination', 'unparsable')
NEUTRAL = (
  *('words', 'text_length', 'yes_ratio', 'dark_pixels', 'edge_density', 'color_entropy'),
  *('entropy_generation', 'entropy_understanding'),
  *('similarity_generation', 'similarity_understanding'),
)


class Measure(NamedTuple):
  """A score of rows. rows: their name. statistic: of the sums (R, M). task: the only task that
  counts, or None for all. items: for the fixed list, the name of the items' hashes.
  """

  rows: str
  statistic: Callable[[np.ndarray], np.ndarray]
  task: str | None = None
  items: str = ''


def _measures() -> dict[str, Measure]:
  found = {'generation/mean': Measure('generation', scores_lib.mean_of_tasks)}
  for task in grammar.GENEVAL:
    found[f'generation/{task}'] = Measure('generation', scores_lib.mean_of_tasks, task)
  for rows in ('description', 'description_greedy'):
    for name in ('f1', 'precision', 'recall', 'hallucination', 'unparsable', 'words'):
      found[f'{rows}/{name}'] = Measure(rows, scores_lib.DESCRIPTION[name])
  for name, statistic in scores_lib.YESNO.items():
    found[f'yesno/{name}'] = Measure('yesno', statistic)
  for name, (task, rows) in watched.ROWS.items():
    found[name] = Measure(rows, watched.mean_of_rows, items=watched.ITEMS[task])
  return found


MEASURES = _measures()


class Compared(NamedTuple):
  """A score before and after, over the same items.

  Attributes:
    name: of the metric, without `eval/`.
    before, after: None if not measured.
    step: of `after`.
    low, high: the 95 % interval of the difference, or None.
    items: what both were measured on ('36 prompts'), '' if unknown.
  """

  name: str
  before: float | None
  after: float | None
  step: int
  low: float | None = None
  high: float | None = None
  items: str = ''

  @property
  def change(self) -> float | None:
    if self.before is None or self.after is None:
      return None
    return self.after - self.before

  @property
  def gain(self) -> float:
    """The change, positive if better; 0 if neither is better, or if it is unknown."""
    if self.change is None or self.name.endswith(NEUTRAL):
      return 0.0
    return -self.change if self.name.endswith(LOWER_IS_BETTER) else self.change


class Point(NamedTuple):
  """A score at one step, with its 95 % interval if requested."""

  step: int
  value: float
  low: float | None = None
  high: float | None = None


# One evaluation: {name: (P, S) or (C, M)}, and the hashes of the fixed list's items (P,).
Rows = dict[str, np.ndarray]


def evaluations(workdir: str) -> dict[int, Rows]:
  """The rows of every evaluation of a run, by step. Omits values that are not tables of numbers."""
  found = {}
  folder = os.path.join(workdir, 'evaluations')
  for name in sorted(glob.glob('*.json', root_dir=folder)):
    path, stem = os.path.join(folder, name), name[:-5]
    if not stem.isdigit():
      continue
    try:
      content = run_files.read_json(path, '')
    except InputError:
      continue  # damaged; the logged numbers still exist
    found[int(stem)] = {
      name: rows for name, x in content.items() if (rows := _rows(name, x)) is not None
    }
  return found


def unfamiliar(workdir: str) -> list[str]:
  """Prompts far outside what the initial model knows, as reported by the run."""
  path = os.path.join(workdir, 'evaluations', f'{0:06d}.json')
  try:
    found = run_files.read_json(path, '').get(UNFAMILIAR, [])
  except InputError:
    return []
  return [line for line in found if isinstance(line, str)] if isinstance(found, list) else []


def _rows(name: str, values) -> np.ndarray | None:
  if name in watched.ITEMS.values():
    return np.array(values) if all(isinstance(x, str) for x in values) else None
  try:
    rows = np.array(values, float)
  except (TypeError, ValueError):
    return None
  columns = effect.ROWS.get(name)
  good = rows.ndim == 2 and rows.size and np.isfinite(rows).all()
  return rows if good and columns in (None, rows.shape[-1]) else None


def compare(workdir: str, steps: int, names: Container[str] | None = None) -> list[Compared]:
  """Every score of a run's last evaluation, compared with its first.

  steps: of the whole run, whose first and last evaluations have the whole lists. names: the wanted
  scores, or None for all.
  """
  curves = metrics_lib.read(workdir)
  curves = {key[5:]: curve for key, curve in curves.items() if key.startswith('eval/')}
  rows = evaluations(workdir)
  return [
    _compared(name, curve, rows, steps)
    for name, curve in curves.items()
    if not name.endswith(('_low', '_high')) and (names is None or name in names)
  ]


def _compared(name: str, curve, rows: dict[int, Rows], steps: int) -> Compared:
  at, values = curve
  step, after = at[-1], values[-1]
  if not step:  # only the initial model so far
    return Compared(name, after, None, 0)
  measure = MEASURES.get(name)
  if at[0] == 0 and measure and _have(measure, rows, 0, step):
    first, last = common([rows[0], rows[step]], measure)
    if len(first) and first.shape == last.shape:
      found = difference(measure, last, first)
      return Compared(
        name,
        value(measure, first),
        value(measure, last),
        step,
        found.low,
        found.high,
        _counted(measure, first),
      )
  # Without rows: the numbers themselves, if both are for the same list.
  same = step == steps or name.startswith('watched/')
  if measure and measure.items and at[0] == 0:
    lists = [rows.get(s, {}).get(measure.items) for s in (0, step)]
    same = any(one is None for one in lists) or np.array_equal(*lists)
  return Compared(name, values[0] if at[0] == 0 and same else None, after, step)


def curve(rows: dict[int, Rows], name: str, intervals: bool = True) -> tuple[list[Point], str]:
  """A score at every evaluated step, over the items that all steps have, and a description of these
  items. Empty if rows are missing.

  rows: from `evaluations`. intervals: whether each point has one, which takes 2,000 resamples.
  """
  measure = MEASURES[name]
  steps = [step for step, found in sorted(rows.items()) if measure.rows in found]
  if len(steps) < 2:
    return [], ''
  lists = common([rows[step] for step in steps], measure)
  if not len(lists[0]) or len({one.shape for one in lists}) > 1:
    return [], ''
  how = estimate if intervals else lambda measure, one: (value(measure, one),)
  points = [Point(step, *how(measure, one)) for step, one in zip(steps, lists)]
  return points, _counted(measure, lists[0])


def common(evaluations: list[Rows], measure: Measure) -> list[np.ndarray]:
  """The rows of the items that all evaluations have.

  Items of the fixed list are matched by their hashes, in the order of the first evaluation. In the
  other lists, a shorter list is the first part of a longer one, for generation task by task.
  """
  lists = [found[measure.rows] for found in evaluations]
  if measure.items and all(measure.items in found for found in evaluations):
    places = [_places(found[measure.items]) for found in evaluations]
    shared = [item for item in places[0] if all(item in one for one in places)]
    return [rows[[one[item] for item in shared]] for rows, one in zip(lists, places)]
  tasks = len(grammar.GENEVAL) if measure.rows == 'generation' else 1
  number = min(len(rows) // tasks for rows in lists)
  return [
    np.concatenate([part[:number] for part in np.split(rows, tasks)])
    if len(rows) % tasks == 0
    else rows
    for rows in lists
  ]


def _places(hashes) -> dict[tuple[str, int], int]:
  """{(hash, number of equal ones before): its row}."""
  found: dict[tuple[str, int], int] = {}
  seen: dict[str, int] = {}
  for place, item in enumerate(hashes):
    found[item, seen.setdefault(item, 0)] = place
    seen[item] += 1
  return found


def value(measure: Measure, rows: np.ndarray) -> float:
  """The score of rows."""
  sums, _ = _sums(measure, rows)
  return float(measure.statistic(sums.sum(axis=0)[None])[0])


def estimate(measure: Measure, rows: np.ndarray) -> stats.Estimate:
  """The score of rows with its interval."""
  sums, strata = _sums(measure, rows)
  return stats.estimate(sums, measure.statistic, strata)


def difference(measure: Measure, after: np.ndarray, before: np.ndarray) -> stats.Estimate:
  """The paired difference of the score between rows for the same items."""
  sums_after, strata = _sums(measure, after)
  sums_before, _ = _sums(measure, before)
  return stats.difference(sums_after, sums_before, measure.statistic, strata)


def _have(measure: Measure, rows: dict[int, Rows], *steps: int) -> bool:
  return all(measure.rows in rows.get(step, {}) for step in steps)


def _sums(measure: Measure, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
  if measure.items:
    return watched.row_sums(rows), None
  if measure.rows != 'generation':
    return rows, None
  prompts = _prompts(len(rows) // len(grammar.GENEVAL))
  chosen = [i for i, p in enumerate(prompts) if measure.task in (None, p.category)]
  return scores_lib.generation_sums([prompts[i] for i in chosen], rows[chosen])


@functools.lru_cache(maxsize=8)
def _prompts(per_task: int) -> tuple[grammar.Prompt, ...]:
  return tuple(sets.evaluation_prompts(per_task))


def _counted(measure: Measure, rows: np.ndarray) -> str:
  number = len(rows) // len(grammar.GENEVAL) if measure.task else len(rows)
  pictures = measure.rows in PICTURES or measure.items == watched.ITEMS['understanding']
  return f'{number} {"image" if pictures else "prompt"}{"s" if number != 1 else ""}'
