"""The interface of a benchmark: what to draw or ask, and how to score the result.

There are two kinds. A `Drawing` benchmark has prompts, a number of samples for each, and a path for
each image below its folder; evaluators write a record of each image, and `score` reads the records.
An `Asking` benchmark has questions about images, and `score` reads the answers. Neither depends on
the model under test, on torch or on JAX: answering and evaluating happen elsewhere.

    benchmark = registry.open_asking('pope', data_dir, 'POPE.tsv')
    for question in benchmark.questions():
      answers[question.id] = model(benchmark.picture(question.pictures[0]), question.text)
    scores = benchmark.score(answers)
    comparison.estimates(scores)             # numbers with 95 % intervals
    benchmark.write_predictions(answers, folder, model='mine')

Scores are sums by cluster, and each statistic is a function of these sums (see `stats`), so that
one bootstrap gives the intervals and paired differences of any statistic.

Axes: C clusters, M sums, R resamples.
"""

import dataclasses
import enum
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from dsr_jax.errors import InputError
from dsr_jax.evaluate.stats import Statistic


class Label(enum.StrEnum):
  """How comparable a number is to the paper's. Only the first two may appear beside it."""

  OFFICIAL = 'official rules, official model'
  OTHER_MODEL = 'official rules, other model'
  NOT_COMPARABLE = 'not comparable'

  def comparable(self) -> bool:
    return self is not Label.NOT_COMPARABLE


# From best to worst. A number from several evaluators has the worst of their labels.
_ORDER = (Label.OFFICIAL, Label.OTHER_MODEL, Label.NOT_COMPARABLE)


def worst(*labels: Label) -> Label:
  """The label of a number from several evaluators."""
  return max(labels, key=_ORDER.index)


class Prompt(NamedTuple):
  """Something to draw.

  Attributes:
    id: unique within the benchmark, and the same in every version of this program.
    text: the prompt that the model gets.
    group: the task or category.
    number: from 0 within the benchmark (GenEval) or category (T2I-CompBench), for file names.
  """

  id: str
  text: str
  group: str
  number: int


class PictureKey(NamedTuple):
  """One image of a table: the row that contains it, and its index among the row's images."""

  row: str
  place: int = 0


class Question(NamedTuple):
  """Something to ask.

  Attributes:
    id: the row's index, as text.
    text: exactly what follows the images in the user's turn.
    pictures: in the order in which they are shown; questions with equal keys share an image.
    group: questions that are kept or omitted together: a circular group, a figure's questions.
    category: `--limit` counts within each category.
  """

  id: str
  text: str
  pictures: tuple[PictureKey, ...]
  group: str
  category: str


class Scores(NamedTuple):
  """The scores of a benchmark.

  Attributes:
    clusters: C names; items that were drawn together are resampled together.
    sums: (C, M) float64.
    statistics: {name: function of (R, M) sums to (R,)}; the first is the one that papers report.
    strata: (C,) int, resampled separately, or None for one stratum.
    labels: {statistic: Label}; OFFICIAL for a statistic that is not listed.
    scale: factor for values in tables: 100 for shares in percent, 1 for no change.
    items: a record of each image or question, JSON values, for files and pages.
    counts: how many were asked, not understood, failed and so on.
    notes: sentences to print under the table.
    breakdown: the original scorer's own table, {part: {number: value}}, without intervals.
  """

  clusters: tuple[str, ...]
  sums: np.ndarray
  statistics: dict[str, Statistic]
  strata: np.ndarray | None = None
  labels: dict[str, Label] = {}
  scale: float = 100.0
  items: tuple[dict[str, Any], ...] = ()
  counts: dict[str, int] = {}
  notes: tuple[str, ...] = ()
  breakdown: dict[str, dict[str, float | None]] = {}

  def label(self, statistic: str) -> Label:
    return self.labels.get(statistic, Label.OFFICIAL)


@dataclasses.dataclass(frozen=True)
class About:
  """A description of a benchmark, for documents and tables.

  Attributes:
    name: as in `--benchmarks`.
    title: as in tables.
    kind: 'generation' or 'understanding'.
    headline: the statistic that the paper reports.
    source: repository and commit of the rules.
    license: of the parts included in this package.
  """

  name: str
  title: str
  kind: str
  headline: str
  source: str
  license: str


@runtime_checkable
class Drawable(Protocol):
  """Prompts to draw. Paths are relative to the benchmark's folder."""

  about: About
  samples: int  # of each prompt

  def prompts(self) -> tuple[Prompt, ...]: ...

  def picture_path(self, prompt: Prompt, sample: int) -> str:
    """Where the official scorer expects sample 0, 1, ... of a prompt."""
    ...

  def side_files(self) -> dict[str, str]:
    """{path: text} of the other files that the official scorer reads."""
    ...


@runtime_checkable
class Drawing(Drawable, Protocol):
  """A benchmark of images."""

  def score(self, records: dict[str, dict[str, Any]]) -> Scores:
    """records: {image's path: what the evaluators found in it}."""
    ...


@runtime_checkable
class Asking(Protocol):
  """A benchmark of questions about images."""

  about: About

  def questions(self) -> tuple[Question, ...]: ...

  def picture(self, key: PictureKey):
    """The image, an RGB `PIL.Image`."""
    ...

  def score(self, answers: dict[str, str]) -> Scores:
    """answers: {question's id: what the model wrote}; unanswered questions are not scored, only
    counted."""
    ...

  def write_predictions(
    self, answers: dict[str, str], folder: str, model: str, form: str = 'xlsx'
  ) -> str:
    """VLMEvalKit's own prediction file, xlsx or tsv; returns its path."""
    ...


def gathered(rows, clusters, strata=None) -> tuple[tuple[str, ...], np.ndarray, np.ndarray | None]:
  """Sums of rows (N, M) by cluster.

  Args:
    rows: N rows of M numbers.
    clusters: N names.
    strata: N ints, equal within a cluster, or None.

  Returns:
    C names in order of appearance, sums (C, M), strata (C,) or None.
  """
  values = np.asarray(rows, float)
  if not len(values):
    raise InputError(
      'there is nothing to score; draw or answer at least one item of the benchmark first'
    )
  place = {}
  index = np.array([place.setdefault(name, len(place)) for name in clusters])
  sums = np.zeros((len(place), values.shape[1]))
  np.add.at(sums, index, values)
  if strata is None:
    return tuple(place), sums, None
  of_cluster = np.zeros(len(place), int)
  of_cluster[index] = strata
  return tuple(place), sums, of_cluster


def share_of(hit: int, number: int) -> Statistic:
  """The statistic sums[hit] / sums[number]; 0 if nothing was counted."""

  def share(sums):
    return np.where(sums[:, number] > 0, sums[:, hit] / np.maximum(sums[:, number], 1e-9), 0.0)

  return share
