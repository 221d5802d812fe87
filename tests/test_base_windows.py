"""The ranges that a base should be in."""

import pytest

from benchmarks import base_windows
from dsr_jax.errors import InputError


def test_settings_are_pairs_and_others_are_refused_in_a_sentence():
  assert base_windows.settings_of(['1:2', '.5:1.5']) == [(1.0, 2.0), (0.5, 1.5)]
  for words in (['1'], ['1:2:3'], ['a:b'], [], ['nan:2'], ['1:2', '1:-3']):
    with pytest.raises(InputError, match='TEMPERATURE:GUIDANCE'):
      base_windows.settings_of(words)


def test_each_range_is_said_to_hold_the_number_or_not():
  middle = {name: (low + high) / 2 for name, (low, high) in base_windows.RANGES.items()}
  assert all(row.endswith('| yes |') for row in base_windows.verdicts(middle))
  numbers = {**middle, 'yes/no, F1': 0.93, 'drawing, worst task': 0.24}
  said = [row.split(' | ')[-1] for row in base_windows.verdicts(numbers)]
  assert said == ['above |', 'yes |', 'yes |', 'below |', 'yes |', 'yes |']
