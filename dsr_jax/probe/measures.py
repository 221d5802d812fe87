"""The probe's own numbers: whether the lowest word is the wrong one, and whether a run is worth it.

Numbers that other commands use too are in `evaluate.ranking`.
"""

from typing import NamedTuple

import numpy as np

from dsr_jax.evaluate import stats
from dsr_jax.evaluate.stats import Estimate, share


def lowest_is_wrong(groups) -> dict:
  """In texts with some but not all words wrong: how often the lowest word is wrong, and how often
  it would be by chance. groups: [(values, wrong)], for the words of each text.
  """
  mixed = [
    (np.asarray(values), np.asarray(wrong, bool))
    for values, wrong in groups
    if any(wrong) and not all(wrong)
  ]
  if not mixed:
    return {'hits': None, 'chance': None, 'texts': 0}
  return {
    'hits': share([wrong[values.argmin()] for values, wrong in mixed]),
    'chance': float(np.mean([wrong.mean() for _, wrong in mixed])),
    'texts': len(mixed),
  }


# Go or no-go.


GO, NO_GO, OPEN = 'go', 'no-go', 'not enough evidence'  # verdicts
CURVED = 0.05  # the largest change of a pair's weight by SimPO's curvature
FAMILIAR = 0.9  # the least share of inputs that the model must know


class Gate(NamedTuple):
  """A criterion for the verdict: the path of a number among a task's numbers, and its threshold.

  chief: it must be measured for a go. cases: the path of the number of cases that it is based on;
  with fewer than `least`, it counts as not measured.
  """

  name: str
  path: tuple[str, ...]
  relation: str
  threshold: float
  reason: str
  chief: bool = False
  cases: tuple[str, ...] = ()
  least: int = 0


RELATIONS = {
  '>=': lambda value, threshold: value >= threshold,
  '<=': lambda value, threshold: value <= threshold,
  '|<=|': lambda value, threshold: abs(value) <= threshold,
}

_GAIN = 'gain of the best over the mean, by the judge'
_NO_GAIN = 'otherwise there is nothing to learn'
_BOTH = (
  Gate(
    name='pairs ordered as the judge does',
    path=('pairwise', 'accuracy'),
    relation='>=',
    threshold=0.6,
    reason='chance is .5',
    chief=True,
    cases=('pairwise', 'pairs'),
    least=30,
  ),
  Gate('groups without any difference', ('ties', 'groups'), '<=', 0.5, 'they give no pair'),
  Gate('spread within groups, nats', ('spread', 'within'), '>=', 0.005, 'rounding hides less'),
  Gate(
    name='swapped attributes told apart',
    path=('swaps', 'mean'),
    relation='>=',
    threshold=0.6,
    reason='chance is .5',
    cases=('swaps', 'cases'),
    least=30,
  ),
)
GATES = {
  'generation': (
    Gate(
      name=_GAIN,
      path=('judged', 'right', 'gain'),
      relation='>=',
      threshold=0.03,
      reason=_NO_GAIN,
      chief=True,
      cases=('inputs',),
      least=10,
    ),
    *_BOTH,
    Gate(
      name='rank correlation over instructions',
      path=('instructions', 'mean'),
      relation='>=',
      threshold=0.5,
      reason='otherwise the wording decides',
    ),
    Gate(
      name='correlation with entropy, absolute',
      path=('slopes', 'entropy', 'correlation'),
      relation='|<=|',
      threshold=0.8,
      reason='otherwise flat images win',
    ),
  ),
  'understanding': (
    Gate(
      name=_GAIN,
      path=('judged', 'f1', 'gain'),
      relation='>=',
      threshold=0.03,
      reason=_NO_GAIN,
      chief=True,
      cases=('inputs',),
      least=10,
    ),
    *_BOTH,
    Gate(
      name='correlation with length, absolute',
      path=('slopes', 'length', 'correlation'),
      relation='|<=|',
      threshold=0.8,
      reason='otherwise long texts win',
    ),
  ),
}


def decide(task: str, numbers: dict) -> dict:
  """The gates of a task, and its verdict.

  GO requires that the chief gates are measured, that no gate fails, and that the model knows the
  inputs. Without a judge, or with too few cases, the verdict is OPEN. 'not_measured': sentences
  about what the verdict lacks. 'blind': what the reward does not see, for any verdict. 'objective':
  what the objective would do against the reward.
  """
  rows = [_gate(gate, numbers) for gate in GATES[task]]
  missing = [f'{row["gate"]}: {row["missing"]}' for row in rows if row['missing']]
  unfamiliar = numbers.get('unfamiliar')
  known = not unfamiliar or unfamiliar['share'] <= 1 - FAMILIAR
  if any(row['passed'] is False for row in rows):
    verdict = NO_GO
  elif any(row['passed'] is None and row['chief'] for row in rows) or not known:
    verdict = OPEN
  else:
    verdict = GO
  return {
    'go': verdict == GO,
    'verdict': verdict,
    'gates': rows,
    'not_measured': missing,
    'blind': _blind(numbers),
    'objective': _of_objective(numbers.get('curvature')),
  }


def overall(verdicts) -> str:
  """The verdict for a run: the worst of its tasks' verdicts."""
  return next(verdict for verdict in (NO_GO, OPEN, GO) if verdict in verdicts)


def unfamiliar(rewards) -> dict:
  """`stats.unfamiliar` as numbers; rewards (P, G), nats per token."""
  far, usual = stats.unfamiliar(rewards)
  return {
    'inputs': int(far.sum()),
    'share': float(far.mean()),
    'usual': usual,
    'lowest': float(np.asarray(rewards, float).max(axis=1).min()),
  }


def curvature(rewards, logps, method) -> dict | None:
  """How far SimPO's pairs are from its linear range; None for another objective.

  rewards, logps: (P, G), the rewards and the length-normalized log-probabilities. 'margin_size':
  the mean |difference of log-probabilities| of best and worst, nats. 'weight_change': by which
  share such a difference changes a pair's weight, beta sigmoid(-gamma) margin_size. This part of
  the gradient raises the entropy whatever the rewards are (docs/study/curvature.md).
  """
  if method.objective != 'simpo':
    return None
  rows = np.arange(len(rewards))
  best, worst = np.argmax(rewards, axis=1), np.argmin(rewards, axis=1)
  size = float(np.mean(np.abs(logps[rows, best] - logps[rows, worst])))
  slope = method.beta / (1.0 + np.exp(method.gamma))
  return {'margin_size': size, 'weight_change': float(slope * size)}


def _of_objective(curved: dict | None) -> list[str]:
  """A sentence about SimPO's curvature if it is large."""
  if not curved or curved['weight_change'] <= CURVED:
    return []
  return [
    f'SimPO would change the weight of a pair by {100 * curved["weight_change"]:.0f} % depending '
    'on which sample the model prefers already; this raises the entropy whatever the rewards are: '
    'lower method.beta, or use objective=simpo_linear'
  ]


def _at(path: tuple[str, ...], numbers: dict):
  value = numbers
  for key in path:
    value = value.get(key) if isinstance(value, dict) else None
  return value.value if isinstance(value, Estimate) else value


def _gate(gate: Gate, numbers: dict) -> dict:
  value = _at(gate.path, numbers)
  cases = _at(gate.cases, numbers) if gate.cases else None
  missing = ''
  if value is None:
    missing = 'not measured'
  elif cases is not None and cases < gate.least:
    missing = f'only {cases} cases, needs at least {gate.least}'
  passed = None if missing else bool(RELATIONS[gate.relation](value, gate.threshold))
  return {
    'gate': gate.name,
    'value': value,
    'cases': cases,
    'relation': gate.relation.strip('|'),
    'threshold': gate.threshold,
    'passed': passed,
    'chief': gate.chief,
    'missing': missing,
    'reason': gate.reason,
  }


def _blind(numbers: dict) -> list[str]:
  """Sentences about inputs that the model does not know, swaps that it tells apart no better than
  chance, and kinds of prompts whose best by reward is significantly worse than the mean.
  """
  lines = []
  far = numbers.get('unfamiliar')
  if far and far['inputs']:
    lines.append(
      f'{far["inputs"]} of {numbers["inputs"]} inputs are far outside what the model knows: their '
      f'best candidates have rewards down to {far["lowest"]:.1f}, while the best quarter is above '
      f'{far["usual"]:.1f}'
    )
  for kind, v in numbers['swaps'].items():
    if isinstance(v, dict) and v['low'] <= 0.5:
      lines.append(f'swapped {kind}: {v["value"]:.2f} told apart')
  for name, v in numbers.get('categories', {}).items():
    if v['gain'].high < 0:
      worse = -v['gain'].value
      lines.append(
        f'prompts of the kind {name}: the best by reward is {worse:.2f} worse than the mean'
      )
  return lines


def to_json(tree):
  """JSON values: estimates as {'value', 'low', 'high'}, NumPy numbers as Python numbers."""
  if isinstance(tree, Estimate):
    return {key: to_json(value) for key, value in tree._asdict().items()}
  if isinstance(tree, dict):
    return {str(key): to_json(value) for key, value in tree.items()}
  if isinstance(tree, (list, tuple)):
    return [to_json(value) for value in tree]
  return tree.item() if isinstance(tree, np.generic) else tree
