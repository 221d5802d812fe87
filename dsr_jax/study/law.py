"""How good the scorers are, from stored rows: how often they order two candidates as the exact
judge does, and what else affects them.

Axes: P inputs, G candidates.
"""

import itertools

import numpy as np

from dsr_jax import files
from dsr_jax.evaluate import ranking, stats
from dsr_jax.study import variants as variants_lib
from dsr_jax.study.scores import SCORER_ROWS, Results

TASKS = {
  'generation': 'generation',
  'understanding': 'description/f1',
}  # {task: the measure of its gain}
SCORERS = ('live', 'frozen', 'partner')


def slope_at_equal_truth(rewards, length, truth) -> dict | None:
  """The reward's least-squares slope on length, in nats per token, over pairs within a group that
  the judge finds equally good; None without any.

  rewards, length, truth (P, G). The interval is a bootstrap over groups.
  """
  rewards, length, truth = (np.asarray(x, float) for x in (rewards, length, truth))
  product, square = np.zeros(len(rewards)), np.zeros(len(rewards))
  for i, j in itertools.combinations(range(rewards.shape[1]), 2):
    equal = truth[:, i] == truth[:, j]
    further = length[:, i] - length[:, j]
    product += equal * (rewards[:, i] - rewards[:, j]) * further
    square += equal * further**2
  if not square.any():
    return None
  found = stats.estimate(
    np.stack([product, square], 1), lambda s: s[:, 0] / np.maximum(s[:, 1], 1e-9)
  )
  return {**found._asdict(), 'pairs': int((square > 0).sum())}


def scorers_over_training(results: Results, base: str, variant: str) -> dict:
  """{task: {scorer: [{'step', 'accuracy', 'low', 'high'}]}}, and 'length': the slope of R_U on
  length at equal correctness, by step.
  """
  out = {}
  for step in results.steps(base, variant):
    each = [results.rows(base, variant, seed, step) for seed in results.seeds(base, variant)]
    for task in TASKS:
      truth = _stacked(each, task, 'truth')
      if not truth:
        continue
      for scorer in SCORERS:
        rewards = _stacked(each, task, scorer)
        if len(rewards) != len(truth):
          continue
        found = _accuracy(np.concatenate(rewards), np.concatenate(truth))
        if found:
          out.setdefault(task, {}).setdefault(scorer, []).append({'step': step, **found})
      if task == 'understanding':
        slope = slope_at_equal_truth(
          np.concatenate(_stacked(each, task, 'live')),
          np.concatenate(_stacked(each, task, 'length')),
          np.concatenate(truth),
        )
        if slope:
          out.setdefault('length', []).append({'step': step, **slope})
  return out


def _stacked(each, task: str, name: str) -> list:
  """A task's rows (P, G), from the runs that have them."""
  key = f'{SCORER_ROWS}{task}_{name}'
  return [rows[key] for rows in each if key in rows]


def _accuracy(rewards, truth) -> dict | None:
  found = ranking.pairwise_accuracy(rewards, truth)
  if not found['pairs']:
    return None
  estimate = found['accuracy']
  return {
    'accuracy': estimate.value,
    'low': estimate.low,
    'high': estimate.high,
    'pairs': found['pairs'],
  }


def law(study, results: Results) -> list[dict]:
  """Points of gain against the pairwise accuracy of the training reward, one for each base, variant
  and trained task.

  Each has base, variant, task, accuracy (with low, high), skill of the base, and gain (with low,
  high), all as shares.
  """
  points = []
  for base in results.bases:
    for variant in results.variants(base):
      if variants_lib.VARIANTS[variant].kind != variants_lib.TRAINED or not results.seeds(
        base, variant
      ):
        continue
      cell = results.cell(base, variant, results.seeds(base, variant)[0])
      rewards = files.read_json_or_none(study.reward_path(cell)) or {}
      for task in cell.config.method.tasks:
        gain = results.difference(base, variant, 'base', TASKS[task])
        truth = rewards.get(f'{SCORER_ROWS}{task}_truth')
        found = truth and _accuracy(rewards[f'{SCORER_ROWS}{task}_reward'], truth)
        if gain is None or not found:
          continue
        skill, (low, high) = results.score(base, 'base', TASKS[task]).value, gain.interval
        points.append(
          {
            'base': base,
            'variant': variant,
            'task': task,
            'accuracy': found,
            'skill': skill,
            'gain': {'value': gain.value, 'low': low, 'high': high},
          }
        )
  return points


def is_degraded_judge(point: dict) -> bool:
  """Whether the reward of a point is the exact judge, degraded or not: these points differ only in
  accuracy.
  """
  return variants_lib.VARIANTS[point['variant']].changes.get('method.reward') == 'judge'


def line(points: list[dict], task: str) -> dict | None:
  """The least-squares line of gain against accuracy through a task's degraded judges on all bases,
  and the accuracy at which it crosses 0; None with fewer than three points.
  """
  judges = [p for p in points if p['task'] == task and is_degraded_judge(p)]
  x = np.array([p['accuracy']['accuracy'] for p in judges])
  if len(judges) < 3 or not np.ptp(x):
    return None
  slope, intercept = np.polyfit(x, [p['gain']['value'] for p in judges], 1)
  found = {'slope': float(slope), 'intercept': float(intercept), 'points': len(judges)}
  return found | {'no_gain_at': float(-intercept / slope)} if slope else found
