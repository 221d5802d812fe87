"""A small part of `python -m benchmarks.fuzz_pictures`: damaged pictures load or are refused."""

import pytest

from benchmarks import fuzz_pictures


@pytest.mark.filterwarnings('ignore')  # Pillow's, which pytest switches on again
def test_damaged_pictures_load_or_are_refused_in_one_sentence():
  files = fuzz_pictures.originals()
  assert len({name for name, _ in files}) >= 19
  rows = fuzz_pictures.run(files, seed=1, cases=range(1500))
  assert [row for row in rows if row[2] not in ('loaded', 'refused')] == []
  assert {outcome for _, _, outcome in rows} == {'loaded', 'refused'}
  assert {kind for _, kind, _ in rows} == {'metadata', *(f.__name__ for f in fuzz_pictures.DAMAGES)}
