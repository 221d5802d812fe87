"""Questions with options: MMBench, SEEDBench_IMG and MMMU, each with its own rule for correctness.

MMBench (circular): a question is asked once for each rotation of its options, and is correct only
if every rotation is. SEEDBench_IMG: each question on its own. MMMU: the same; an open question
becomes a choice between its gold answer and `Other Answers`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsr_jax.errors import InputError
from dsr_jax.evaluate import protocol
from dsr_jax.evaluate.vlmeval import extract, prompts, tsv
from dsr_jax.evaluate.vlmeval.table_benchmark import SOURCE, TableBenchmark, item

ROTATION = 1_000_000  # index = question + rotation * this, if there is no column g_index
ABBREVIATIONS = {
  'coarse_perception': 'CP',
  'finegrained_perception (instance-level)': 'FP-S',
  'finegrained_perception (cross-instance)': 'FP-C',
  'logic_reasoning': 'LR',
  'relation_reasoning': 'RR',
  'attribute_reasoning': 'AR',
}
OTHER = 'Other Answers'
NO_SPLIT = 'none'


# Rules.


def circular_group(row: Mapping[str, Any]) -> int:
  """The index of a question's main row."""
  if row.get('g_index') is not None:
    return int(row['g_index'])
  return int(row['index']) % ROTATION


def circular_hits(rows: Sequence[Mapping[str, Any]]) -> dict[int, bool]:
  """{main row's index: whether every answered rotation is correct}.

  rows: index, answer, the options and `prediction`. A question whose main row has no answer is not
  counted; one without some of its rotations is judged by the others.
  """
  groups = {}
  for row in rows:
    groups.setdefault(circular_group(row), []).append(row)
  return {
    main: all(chosen(row) == row['answer'] for row in members)
    for main, members in groups.items()
    if any(int(row['index']) == main for row in members)
  }


def chosen(row: Mapping[str, Any]) -> str | None:
  return extract.option(row['prediction'], tsv.options(row))


def as_choice(row: Mapping[str, Any]) -> dict[str, Any]:
  """MMMU: an open question as a choice of two options. A gold answer that is one capital letter
  stays the key, so such an open question can only be correct if that letter is A.
  """
  row = dict(row)
  key = str(row['answer'])
  if row.get('A') is None:
    row['A'], row['B'] = row['answer'], OTHER
  row['answer'] = key if key in tsv.OPTIONS else 'A'
  return row


def accuracies(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
  """VLMEvalKit's table, as shares: {split: {Overall, l2-categories, categories}}; None if a split
  has no such row.

  rows: hit, and split, l2-category, category if the table has them.
  """
  splits = list(dict.fromkeys(row.get('split') or NO_SPLIT for row in rows))
  names = ['Overall']
  members = {split: {} for split in splits}
  for row in rows:
    of_row = ['Overall']
    if row.get('l2-category') is not None:
      of_row.append(ABBREVIATIONS.get(row['l2-category'], row['l2-category']))
    if row.get('category') is not None:
      of_row.append(row['category'])
    for name in of_row:
      if name not in names:
        names.append(name)
      hits = members[row.get('split') or NO_SPLIT].setdefault(name, [])
      hits.append(bool(row['hit']))
  return {
    split: {name: float(np.mean(found[name])) if name in found else None for name in names}
    for split, found in members.items()
  }


# Benchmarks.


class ChoiceBenchmark(TableBenchmark):
  """What the three have in common; see `protocol.Asking`.

  reported_split: the split that papers report, if the table has several; the others become
    separate statistics.
  """

  required = ('answer', 'A', 'B')
  reported_split: str | None = None

  def prompt(self, row: tsv.Row) -> str:
    return prompts.multiple_choice(row)

  def judged(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answered rows (with `prediction`) -> what is counted: rows with `hit` and `cluster`."""
    raise NotImplementedError

  def score(self, answers: Mapping[str, str]) -> protocol.Scores:
    rows = [{**row, 'prediction': text} for row, text in self.answered(answers)]
    judged = self.judged(rows)
    splits = list(dict.fromkeys(row.get('split') or NO_SPLIT for row in judged))
    reported = [s for s in splits if self.reported_split in (None, s)] or splits
    others = [split for split in splits if split not in reported]
    values, clusters = [], []
    for row in judged:
      split = row.get('split') or NO_SPLIT
      value = np.zeros(2 + 2 * len(others))
      place = 0 if split in reported else 2 + 2 * others.index(split)
      value[place : place + 2] = row['hit'], 1
      values.append(value)
      clusters.append(row['cluster'])
    names, sums, _ = protocol.gathered(values, clusters)
    statistics = {'accuracy': protocol.share_of(0, 1)}
    for i, split in enumerate(others):
      statistics[f'accuracy {split}'] = protocol.share_of(2 + 2 * i, 3 + 2 * i)
    extracted = [self.extracted(row) for row in rows]
    return protocol.Scores(
      clusters=names,
      sums=sums,
      statistics=statistics,
      items=tuple(
        item(row, row['prediction'], extracted=option, right=option == self.key(row))
        for row, option in zip(rows, extracted)
      ),
      counts=self.counts(answers, counted=len(judged), unknown=extracted.count(None)),
      breakdown=accuracies(judged),
    )

  def extracted(self, row: Mapping[str, Any]) -> str | None:
    """The letter that an answered row chooses, None if it is not understood."""
    return chosen(row)

  def key(self, row: Mapping[str, Any]) -> str | None:
    """The letter that is right."""
    return row['answer']


class MMBench(ChoiceBenchmark):
  """MMBench's development split; the test split's answers are not public."""

  about = protocol.About(
    name='mmbench',
    title='MMBench',
    kind='understanding',
    headline='accuracy',
    source=SOURCE,
    license='not shipped',
  )
  dataset = 'MMBench_DEV_EN'
  reported_split = 'dev'

  def __init__(self, path: str):
    super().__init__(path)
    for row in self.table.rows:
      for column in ('index', 'g_index'):
        if row.get(column) is not None and not tsv.is_int(row[column]):
          raise InputError(
            f'{path} has the {column} {row[column]}, which must be a number to identify the '
            'rotations of a question; name the table of MMBench'
          )

  def group(self, row: tsv.Row) -> str:
    return str(circular_group(row))

  def judged(self, rows):
    """Clusters are questions with all their rotations."""
    hits = circular_hits(rows)
    return [
      {**row, 'hit': hits[int(row['index'])], 'cluster': str(row['index'])}
      for row in rows
      if int(row['index']) in hits
    ]


class SEEDBench(ChoiceBenchmark):
  """SEEDBench_IMG."""

  about = protocol.About(
    name='seedbench',
    title='SEED-Bench (image)',
    kind='understanding',
    headline='accuracy',
    source=SOURCE,
    license='not shipped',
  )
  dataset = 'SEEDBench_IMG'

  def judged(self, rows):
    """Clusters are images."""
    return [
      {**row, 'hit': chosen(row) == row['answer'], 'cluster': self.picture_of(row)} for row in rows
    ]


class MMMU(ChoiceBenchmark):
  """MMMU_DEV_VAL; papers report its validation split, 900 questions."""

  about = protocol.About(
    name='mmmu',
    title='MMMU',
    kind='understanding',
    headline='accuracy',
    source=SOURCE,
    license='not shipped',
  )
  dataset = 'MMMU_DEV_VAL'
  reported_split = 'validation'

  def judged(self, rows):
    """Clusters are questions."""
    judged = []
    for row in rows:
      as_asked = as_choice(row)
      hit = chosen(as_asked) == as_asked['answer']
      judged.append({**as_asked, 'hit': hit, 'cluster': str(row['index'])})
    return judged

  def extracted(self, row):
    return chosen(as_choice(row))

  def key(self, row):
    return as_choice(row)['answer']
