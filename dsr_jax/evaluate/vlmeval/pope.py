"""POPE: is a given object in the image? Scored by VLMEvalKit's convention, which the paper follows,
and by that of POPE's own scorer, which LLaVA's papers follow.

A question may be in several of the three tracks, and counts once in each. VLMEvalKit: an answer
that is neither Yes nor No is wrong, and counts as No in F1. POPE's own: any answer that does not
say no counts as yes. Source of the latter: RUCAIBox/POPE, commit 3df3ba1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsr_jax.evaluate import protocol
from dsr_jax.evaluate.stats import ratio
from dsr_jax.evaluate.vlmeval import extract, prompts, tsv
from dsr_jax.evaluate.vlmeval.table_benchmark import SOURCE, TableBenchmark, item

TRACKS = ('random', 'popular', 'adversarial')
OVERALL = 'Overall'
# For each split: true and false positives, false negatives, correct answers, yes answers, all.
COLUMNS = 6


def official_answer(text: str) -> str:
  """'no' if the first sentence, without commas, has the word No, not or no; else 'yes'."""
  words = text.split('.')[0].replace(',', '').split(' ')
  return 'no' if any(word in words for word in ('No', 'not', 'no')) else 'yes'


def splits_of(category: str | None) -> list[str]:
  """The tracks that a row is in. Blanks remain part of a name; a row without a category counts
  once, only in Overall.
  """
  return category.split(',') if category else []


def counts(said_yes: bool, is_yes: bool, right: bool) -> np.ndarray:
  """What one answer adds to a split, (6,)."""
  return np.array(
    [said_yes and is_yes, said_yes and not is_yes, is_yes and not said_yes, right, said_yes, 1],
    float,
  )


def precision(sums):
  """(R, 6) -> (R,), like the functions below."""
  return ratio(sums[:, 0], sums[:, 0] + sums[:, 1])


def recall(sums):
  return ratio(sums[:, 0], sums[:, 0] + sums[:, 2])


def f1(sums):
  p, r = precision(sums), recall(sums)
  return ratio(2 * p * r, p + r)


def accuracy(sums):
  return ratio(sums[:, 3], sums[:, 5])


def yes_ratio(sums):
  return ratio(sums[:, 4], sums[:, 5])


def rating(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
  """VLMEvalKit's table in percent: {split: {Overall (F1), acc, precision, recall}}.

  rows: category, answer, extracted.
  """
  sums = {OVERALL: np.zeros(COLUMNS)}
  for row in rows:
    added = counts(
      said_yes=row['extracted'] == 'Yes',
      is_yes=row['answer'] == 'Yes',
      right=row['extracted'] == row['answer'],
    )
    tracks = splits_of(row['category'])
    sums[OVERALL] += added * max(len(tracks), 1)
    for track in tracks:
      sums[track] = sums.get(track, np.zeros(COLUMNS)) + added
  names = {'Overall': f1, 'acc': accuracy, 'precision': precision, 'recall': recall}
  return {
    split: {name: 100 * float(measure(total[None])[0]) for name, measure in names.items()}
    for split, total in sums.items()
  }


class Pope(TableBenchmark):
  """The benchmark; see `protocol.Asking`."""

  about = protocol.About(
    name='pope',
    title='POPE',
    kind='understanding',
    headline='F1',
    source=SOURCE,
    license='questions MIT (RUCAIBox/POPE), pictures of COCO val2014',
  )
  dataset = 'POPE'
  required = ('answer', 'category')

  def prompt(self, row: tsv.Row) -> str:
    return prompts.pope(row)

  def score(self, answers: Mapping[str, str]) -> protocol.Scores:
    """Clusters are images; each has about six questions per track."""
    splits = (OVERALL, *TRACKS)
    rows, rated, clusters, items = [], [], [], []
    unknown = 0
    for row, text in self.answered(answers):
      said = extract.yes_or_no(text)
      own = official_answer(text)
      unknown += said == 'Unknown'
      is_yes = row['answer'] == 'Yes'
      added = np.concatenate(
        [
          counts(said_yes=said == 'Yes', is_yes=is_yes, right=said == row['answer']),
          counts(said_yes=own == 'yes', is_yes=is_yes, right=(own == 'yes') == is_yes),
        ]
      )
      tracks = splits_of(row['category'])
      value = np.zeros((len(splits), 2 * COLUMNS))
      value[0] = added * max(len(tracks), 1)
      for track in tracks:
        if track in splits:
          value[splits.index(track)] += added
      rows.append(value.ravel())
      rated.append({**row, 'extracted': said})
      clusters.append(self.picture_of(row))
      items.append(item(row, text, extracted=said, right=said == row['answer'], tracks=tracks))
    names, sums, _ = protocol.gathered(rows, clusters)
    return protocol.Scores(
      clusters=names,
      sums=sums,
      statistics=_statistics(splits),
      items=tuple(items),
      counts=self.counts(answers, unknown=unknown),
      breakdown=rating(rated),
    )


def _statistics(splits):
  """The headline comes first: VLMEvalKit's Overall F1. Its other numbers and POPE's own follow."""
  vlmeval = {'F1': f1, 'accuracy': accuracy, 'precision': precision, 'recall': recall}
  statistics = {name: _at(0, measure) for name, measure in vlmeval.items()}
  statistics |= {f'F1 {track}': _at(2 * s, f1) for s, track in enumerate(splits) if s}
  own = [_at(2 * s + 1, f1) for s in range(1, len(splits))]
  statistics["POPE's own mean F1"] = _mean_of(own)
  for s, track in enumerate(splits):
    if s:
      statistics[f"POPE's own F1 {track}"] = _at(2 * s + 1, f1)
      statistics[f"POPE's own accuracy {track}"] = _at(2 * s + 1, accuracy)
      statistics[f"POPE's own yes ratio {track}"] = _at(2 * s + 1, yes_ratio)
  return statistics


def _at(place, measure):
  """`measure` of the place-th six columns."""

  def statistic(sums):
    return measure(sums[:, place * COLUMNS : (place + 1) * COLUMNS])

  return statistic


def _mean_of(measures):
  def mean(sums):
    return np.mean([measure(sums) for measure in measures], axis=0)

  return mean
