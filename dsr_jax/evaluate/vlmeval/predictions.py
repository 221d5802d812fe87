"""VLMEvalKit's own prediction files, so that its evaluator can score the answers from here.

MODEL_DATASET.xlsx, or .tsv (its PRED_FORMAT=tsv): the table without its images, plus a column
`prediction`. The same answers give the same bytes.
"""

from collections.abc import Sequence
import csv
import io
import os
import re
import zipfile

from dsr_jax import files
from dsr_jax.errors import InputError
from dsr_jax.evaluate.vlmeval import tsv

FORMATS = ('xlsx', 'tsv')
LONGEST_CELL = 32_767  # the limit of spreadsheets
# What XML 1.0 cannot hold.
CONTROL = re.compile('[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]')
DATE = re.compile(rb'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ')
NO_DATE = b'2000-01-01T00:00:00Z'


def path_of(folder: str, model: str, dataset: str, form: str = 'xlsx') -> str:
  """Where VLMEvalKit looks for the predictions of a model on one of its datasets."""
  if form not in FORMATS:
    raise InputError(f'unknown format {form!r}; use one of {", ".join(FORMATS)}')
  return os.path.join(folder, f'{model}_{dataset}.{form}')


def write(path: str, columns: Sequence[str], rows: Sequence[tsv.Row], answers: dict) -> str:
  """Writes the predictions of a table's rows.

  Args:
    path: ends in .xlsx or .tsv.
    columns: of the table; the one with image contents is omitted.
    rows: the rows to write, in the table's order.
    answers: {index: what the model wrote}; rows without an answer are omitted, because VLMEvalKit
      accepts part of a table.
  """
  kept = [column for column in columns if column not in ('image', 'prediction')]
  answered = [row for row in rows if row['index'] in answers]
  numbers = all(tsv.is_int(row['index']) for row in answered)
  lines = [[*kept, 'prediction']]
  for row in answered:
    cells = [row[column] for column in kept]
    cells[kept.index('index')] = int(row['index']) if numbers else row['index']
    lines.append([*cells, answers[row['index']]])
  data = _tsv(lines) if path.endswith('.tsv') else _xlsx(lines)
  return files.write_bytes(path, data)


def _tsv(lines) -> bytes:
  out = io.StringIO()
  csv.writer(out, delimiter='\t', quoting=csv.QUOTE_ALL, lineterminator='\n').writerows(lines)
  return out.getvalue().encode('utf-8')


def _xlsx(lines) -> bytes:
  # An optional dependency: answering a benchmark needs no spreadsheets.
  from openpyxl import Workbook  # noqa: PLC0415
  from openpyxl.cell import WriteOnlyCell  # noqa: PLC0415

  workbook = Workbook(write_only=True)
  sheet = workbook.create_sheet('Sheet1')

  def cell(value):
    if not isinstance(value, str):
      return value
    made = WriteOnlyCell(sheet, CONTROL.sub('', value)[:LONGEST_CELL])
    made.data_type = 's'  # an answer that begins with `=` is not a formula
    return made

  for line in lines:
    sheet.append([cell(value) for value in line])
  out = io.BytesIO()
  workbook.save(out)
  return _without_dates(out.getvalue())


def _without_dates(data: bytes) -> bytes:
  """The same workbook, as if created at a fixed time."""
  out = io.BytesIO()
  with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, 'w') as new:
    for name in old.namelist():
      content = old.read(name)
      if name == 'docProps/core.xml':
        content = DATE.sub(NO_DATE, content)
      about = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
      about.compress_type = zipfile.ZIP_DEFLATED
      new.writestr(about, content)
  return out.getvalue()
