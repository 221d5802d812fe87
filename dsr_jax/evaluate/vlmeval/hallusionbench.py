"""HallusionBench: images and their edits, with the same yes/no questions but different answers.

aAcc: correct answers; fAcc: figures with all their questions correct; qAcc: questions correct on
all their figures. The reported number is the mean of the three.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dsr_jax.errors import InputError
from dsr_jax.evaluate import protocol
from dsr_jax.evaluate.vlmeval import extract, prompts, tsv
from dsr_jax.evaluate.vlmeval.table_benchmark import SOURCE, TableBenchmark, item


class Place(NamedTuple):
  """The position of a question: subcategory, set of figures, figure, question."""

  subcategory: str
  set: str
  figure: str
  question: str

  @classmethod
  def of(cls, row: Mapping[str, Any]) -> 'Place':
    """index = category_subcategory_visual_set_figure_question; the subcategory comes from the
    column `l2-category`.
    """
    parts = str(row['index']).split('_')
    if len(parts) < 6:
      raise InputError(
        f'the index {row["index"]} in HallusionBench does not have six parts joined by `_`; name '
        'the table of HallusionBench'
      )
    return cls(str(row['l2-category']), parts[3], parts[4], parts[5])


def sums_of(places: Sequence[Place], right: Sequence[bool]) -> np.ndarray:
  """(6,): number correct and total number, of questions, figures, and questions on all figures."""
  figures, questions = {}, {}
  for place, hit in zip(places, right):
    figures.setdefault((place.subcategory, place.set, place.figure), []).append(hit)
    questions.setdefault((place.subcategory, place.set, place.question), []).append(hit)
  pairs = []
  for hits in (right, [all(x) for x in figures.values()], [all(x) for x in questions.values()]):
    pairs += [sum(hits), len(hits)]
  return np.array(pairs, float)


def _mean(sums):
  return np.mean([statistic(sums) for statistic in ACCURACIES.values()], axis=0)


ACCURACIES = {
  'aAcc': protocol.share_of(0, 1),
  'fAcc': protocol.share_of(2, 3),
  'qAcc': protocol.share_of(4, 5),
}


def rating(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
  """VLMEvalKit's table in percent: {split: {aAcc, fAcc, qAcc}}, the splits being Overall and each
  category and subcategory.

  rows: index, category, l2-category, score (whether the answer is correct).
  """
  parts = {'Overall': list(rows)}
  for column in ('category', 'l2-category'):
    for row in rows:
      if row.get(column) is not None:
        parts.setdefault(row[column], []).append(row)
  table = {}
  for name, members in parts.items():
    sums = sums_of([Place.of(row) for row in members], [bool(row['score']) for row in members])
    table[name] = {
      key: 100 * float(statistic(sums[None])[0]) for key, statistic in ACCURACIES.items()
    }
  return table


class HallusionBench(TableBenchmark):
  """The benchmark; see `protocol.Asking`. Its 178 questions without an image are not asked."""

  about = protocol.About(
    name='hallusionbench',
    title='HallusionBench',
    kind='understanding',
    headline='mean',
    source=SOURCE,
    license='questions BSD-3-Clause (tianyi-lab/HallusionBench)',
  )
  dataset = 'HallusionBench'
  required = ('answer', 'category', 'l2-category')

  def prompt(self, row: tsv.Row) -> str:
    return prompts.yes_no(row)

  def group(self, row: tsv.Row) -> str:
    place = Place.of(row)
    return f'{place.subcategory} {place.set}'

  def score(self, answers: Mapping[str, str]) -> protocol.Scores:
    """Clusters are sets: a figure, its edits, and the questions about them."""
    members, rated, items = {}, [], []
    for row, text in self.answered(answers):
      said = extract.yes_or_no(text)
      right = said == row['answer']
      members.setdefault(self.group(row), []).append((Place.of(row), right))
      rated.append({**row, 'score': right})
      items.append(item(row, text, extracted=said, right=right))
    rows = [
      sums_of([place for place, _ in pairs], [right for _, right in pairs])
      for pairs in members.values()
    ]
    names, sums, _ = protocol.gathered(rows, list(members))
    return protocol.Scores(
      clusters=names,
      sums=sums,
      statistics={'mean': _mean, **ACCURACIES},
      items=tuple(items),
      counts=self.counts(answers, unknown=sum(i['extracted'] == 'Unknown' for i in items)),
      breakdown=rating(rated),
    )
