"""What VLMEvalKit's benchmarks have in common: a table, prompts, and prediction files."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from dsr_jax.errors import InputError
from dsr_jax.evaluate import protocol
from dsr_jax.evaluate.vlmeval import predictions, tsv

SOURCE = 'open-compass/VLMEvalKit e8e78f0'


class TableBenchmark:
  """The parts of `protocol.Asking` that follow from a table; subclasses add prompt and score.

  Attributes:
    about: its description.
    dataset: its name in VLMEvalKit.
    required: columns that it needs besides index, question and an image column.
  """

  about: ClassVar[protocol.About]
  dataset: ClassVar[str]
  required: ClassVar[tuple[str, ...]] = ()

  def __init__(self, path: str):
    """path: the table; see `tsv.locate`."""
    self.table = tsv.Table(path, self.required)
    self._by_index = {row['index']: row for row in self.table.rows}
    if not self._by_index:
      raise InputError(
        f'{path} has no question with an image, but needs at least one; download the table again'
      )

  def prompt(self, row: tsv.Row) -> str:
    """The text that follows the images."""
    raise NotImplementedError

  def group(self, row: tsv.Row) -> str:
    """Questions of one group are kept or omitted together."""
    return str(row['index'])

  def category(self, row: tsv.Row) -> str:
    """`--limit` counts within each category."""
    return row.get('category') or ''

  def questions(self) -> tuple[protocol.Question, ...]:
    """In the table's order."""
    return tuple(
      protocol.Question(
        id=row['index'],
        text=self.prompt(row),
        pictures=self.table.pictures(row),
        group=self.group(row),
        category=self.category(row),
      )
      for row in self.table.rows
    )

  def picture(self, key: protocol.PictureKey):
    return self.table.picture(key)

  def answered(self, answers: Mapping[str, str]) -> Iterator[tuple[tsv.Row, str]]:
    """The rows that have an answer, with the answer, in the table's order."""
    unknown = [index for index in answers if index not in self._by_index]
    if unknown:
      raise InputError(
        f'there is an answer to question {unknown[0]}, which is not in {self.table.path}; answer '
        'this table again'
      )
    for row in self.table.rows:
      if row['index'] in answers:
        yield row, answers[row['index']]

  def picture_of(self, row: tsv.Row) -> str:
    """A name that questions about the same image share."""
    keys = self.table.pictures(row)
    return keys[0].row if keys else str(row['index'])

  def counts(self, answers: Mapping[str, str], **more: int) -> dict[str, int]:
    return {
      'questions': len(self.table),
      'answered': len(answers),
      'not answered': len(self.table) - len(answers),
      **more,
    }

  def write_predictions(
    self, answers: Mapping[str, str], folder: str, model: str, form: str = 'xlsx'
  ) -> str:
    """VLMEvalKit's own prediction file; returns its path."""
    path = predictions.path_of(folder, model, self.dataset, form)
    return predictions.write(path, self.table.columns, self.table.rows, dict(answers))

  def score(self, answers: Mapping[str, str]) -> protocol.Scores:
    raise NotImplementedError


def item(row: tsv.Row, answer: str, **more: Any) -> dict[str, Any]:
  """A question's record: the question, the answer, and how it was scored."""
  return {'id': row['index'], 'question': row['question'], 'answer': answer, **more}
