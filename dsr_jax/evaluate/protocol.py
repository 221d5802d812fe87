"""What a benchmark is to the rest of the program: things to ask, and scores of what came back.

Two kinds. A `Drawing` benchmark has prompts, of each so many samples, and says at which path below
its folder a picture lies; evaluators look at the pictures and give a record of each; `score` reads
the records. An `Asking` benchmark has questions about pictures; `score` reads the answers. Neither
knows the model under test, nor torch, nor JAX: answering and evaluating are other people's work.

    benchmark = registry.open_asking('pope', data_dir, 'POPE.tsv')
    for question in benchmark.questions():
      answers[question.id] = model(benchmark.picture(question.pictures[0]), question.text)
    scores = benchmark.score(answers)
    comparison.estimates(scores)             # numbers with 95 % intervals
    benchmark.write_predictions(answers, folder, model='mine')

Scores are sums by cluster, of which each statistic is a function (see `stats`): so intervals, and
paired differences of two models, come from one bootstrap whatever the statistic is.

Axes: C clusters, M sums, R resamples.
"""

import dataclasses
import enum
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from dsr_jax.errors import InputError
from dsr_jax.evaluate.stats import Statistic


class Label(enum.StrEnum):
  """How near a number is to the paper's. Only the first two may stand in a column beside it."""

  OFFICIAL = 'official rules, official model'
  OTHER_MODEL = 'official rules, other model'
  NOT_COMPARABLE = 'not comparable'

  def comparable(self) -> bool:
    return self is not Label.NOT_COMPARABLE


# From best to worst: a number that several evaluators made has the worst of their labels.
_ORDER = (Label.OFFICIAL, Label.OTHER_MODEL, Label.NOT_COMPARABLE)


def worst(*labels: Label) -> Label:
  """The label of a number that several evaluators made."""
  return max(labels, key=_ORDER.index)


class Prompt(NamedTuple):
  """Something to draw.

  Attributes:
    id: unique within the benchmark, and the same in every version of this program.
    text: what the model is told.
    group: the task or category.
    number: from 0 within the benchmark (GenEval) or the category (T2I-CompBench): file names.
  """

  id: str
  text: str
  group: str
  number: int


class PictureKey(NamedTuple):
  """One picture of a table: the row that holds it, and which of the row's pictures it is."""

  row: str
  place: int = 0


class Question(NamedTuple):
  """Something to ask.

  Attributes:
    id: the row's index, as text.
    text: what follows the pictures in the user's turn, exactly.
    pictures: in the order in which they are shown; questions with equal keys share a picture.
    group: what is kept whole when questions are left out: a circular group, a figure's questions.
    category: what `--limit` counts by.
  """

  id: str
  text: str
  pictures: tuple[PictureKey, ...]
  group: str
  category: str


class Scores(NamedTuple):
  """What a benchmark gives.

  Attributes:
    clusters: C names; what was drawn together is resampled together.
    sums: (C, M) float64.
    statistics: {name: function of (R, M) sums to (R,)}; the first is the one that papers report.
    strata: (C,) int, resampled apart, or None for one stratum.
    labels: {statistic: Label}; a statistic that is not named is OFFICIAL.
    scale: what values are multiplied by in tables: 100 for shares in percent, 1 as they are.
    items: a record of each picture or question, JSON values, for files and pages.
    counts: how many were asked, not understood, failed and so on.
    notes: sentences that belong under a table.
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
  """What the documents and tables say of a benchmark.

  Attributes:
    name: as in `--benchmarks`.
    title: as in tables.
    kind: 'generation' or 'understanding'.
    headline: the statistic that the paper reports.
    source: repository and commit of the rules.
    license: of what is shipped here.
  """

  name: str
  title: str
  kind: str
  headline: str
  source: str
  license: str


@runtime_checkable
class Drawable(Protocol):
  """Prompts to draw. Paths are relative to a folder of their own."""

  about: About
  samples: int  # of each prompt

  def prompts(self) -> tuple[Prompt, ...]: ...

  def picture_path(self, prompt: Prompt, sample: int) -> str:
    """Where the official scorer expects sample 0, 1, ... of a prompt."""
    ...

  def side_files(self) -> dict[str, str]:
    """{path: text} of what the official scorer reads beside the pictures."""
    ...


@runtime_checkable
class Drawing(Drawable, Protocol):
  """A benchmark of pictures."""

  def score(self, records: dict[str, dict[str, Any]]) -> Scores:
    """records: {picture's path: what the evaluators said of it}."""
    ...


@runtime_checkable
class Asking(Protocol):
  """A benchmark of questions about pictures."""

  about: About

  def questions(self) -> tuple[Question, ...]: ...

  def picture(self, key: PictureKey):
    """The picture, an RGB `PIL.Image`."""
    ...

  def score(self, answers: dict[str, str]) -> Scores:
    """answers: {question's id: what the model wrote}; a question without one is left out, and
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
      'found nothing to score; expected at least one picture or answer; answer the benchmark first'
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
  """The statistic sums[hit] / sums[number]; 0 where nothing was counted."""

  def share(sums):
    return np.where(sums[:, number] > 0, sums[:, hit] / np.maximum(sums[:, number], 1e-9), 0.0)

  return share
