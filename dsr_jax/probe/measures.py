"""The probe's own numbers: whether the lowest word is the wrong one, and whether a run should go.

What it shares with others is in `evaluate.ranking`.
"""

from typing import NamedTuple

import numpy as np

from dsr_jax.evaluate.stats import Estimate, share


def lowest_is_wrong(groups) -> dict:
  """groups: [(values, wrong)] of each text's words. Of texts with some but not all words wrong: how
  often the lowest one is, and would be by chance.
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


class Gate(NamedTuple):
  """A number that decides: where it stands among a task's numbers, and what it must be."""

  name: str
  path: tuple[str, ...]
  relation: str
  threshold: float
  reason: str


RELATIONS = {
  '>=': lambda value, threshold: value >= threshold,
  '<=': lambda value, threshold: value <= threshold,
  '|<=|': lambda value, threshold: abs(value) <= threshold,
}

_GAIN = 'gain of the best over the mean, by the judge'
_NO_GAIN = 'else there is nothing to learn towards'
_BOTH = (
  Gate('pairs ordered as the judge does', ('pairwise', 'accuracy'), '>=', 0.6, 'a coin has .5'),
  Gate('groups without any difference', ('ties', 'groups'), '<=', 0.5, 'they give no pair'),
  Gate('spread within groups, nats', ('spread', 'within'), '>=', 0.005, 'less drowns in rounding'),
  Gate('swapped attributes told apart', ('swaps', 'mean'), '>=', 0.6, 'a coin has .5'),
)
GATES = {
  'generation': (
    Gate(_GAIN, ('judged', 'right', 'gain'), '>=', 0.03, _NO_GAIN),
    *_BOTH,
    Gate(
      name='rank correlation over instructions',
      path=('instructions', 'mean'),
      relation='>=',
      threshold=0.5,
      reason='else the wording decides',
    ),
    Gate(
      name='correlation with entropy, absolute',
      path=('slopes', 'entropy', 'correlation'),
      relation='|<=|',
      threshold=0.8,
      reason='else flat pictures win',
    ),
  ),
  'understanding': (
    Gate(_GAIN, ('judged', 'f1', 'gain'), '>=', 0.03, _NO_GAIN),
    *_BOTH,
    Gate(
      name='correlation with length, absolute',
      path=('slopes', 'length', 'correlation'),
      relation='|<=|',
      threshold=0.8,
      reason='else long texts win',
    ),
  ),
}


def decide(task: str, numbers: dict) -> dict:
  """The gates of a task: go if none of those that could be measured fails. 'blind': what the reward
  does not see, go or not.
  """
  rows = [_gate(gate, numbers) for gate in GATES[task]]
  return {
    'go': all(row['passed'] is not False for row in rows),
    'gates': rows,
    'blind': _blind(numbers),
  }


def _gate(gate: Gate, numbers: dict) -> dict:
  value = numbers
  for key in gate.path:
    value = value.get(key) if isinstance(value, dict) else None
  if isinstance(value, Estimate):
    value = value.value
  return {
    'gate': gate.name,
    'value': value,
    'relation': gate.relation.strip('|'),
    'threshold': gate.threshold,
    'passed': None if value is None else bool(RELATIONS[gate.relation](value, gate.threshold)),
    'reason': gate.reason,
  }


def _blind(numbers: dict) -> list[str]:
  """Swaps that a coin could tell apart as well, and sorts of prompts whose best by the reward is
  worse than the mean, surely.
  """
  lines = []
  for kind, v in numbers['swaps'].items():
    if isinstance(v, dict) and v['low'] <= 0.5:
      lines.append(f'swapped {kind}: {v["value"]:.2f} told apart')
  for name, v in numbers.get('categories', {}).items():
    if v['gain'].high < 0:
      worse = -v['gain'].value
      lines.append(
        f'prompts of the sort {name}: the best by reward is {worse:.2f} worse than the mean'
      )
  return lines


def to_json(tree):
  """Estimates as {'value', 'low', 'high'}, NumPy's numbers as Python's."""
  if isinstance(tree, Estimate):
    return {key: to_json(value) for key, value in tree._asdict().items()}
  if isinstance(tree, dict):
    return {str(key): to_json(value) for key, value in tree.items()}
  if isinstance(tree, (list, tuple)):
    return [to_json(value) for value in tree]
  return tree.item() if isinstance(tree, np.generic) else tree
