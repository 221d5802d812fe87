"""VLMEvalKit's tables: one TSV file per benchmark, one line per question, images in base64.

Files can have hundreds of megabytes, nearly all of it images. A table keeps the texts of its rows,
but of each image only the position of its row in the file; the image is read on demand. So memory
grows only with the texts.

Cells are read as in VLMEvalKit, which uses pandas: a cell that pandas treats as missing (empty,
`NA`, `None`, `null`, ...) is missing, even if it is the text of an option.
"""

import ast
import base64
import binascii
from collections.abc import Iterator, Sequence
import csv
import dataclasses
import hashlib
import http.client
import io
import os
import shutil
import urllib.error
import urllib.request

from PIL import Image

from dsr_jax import images
from dsr_jax.errors import InputError, first_line
from dsr_jax.evaluate.protocol import PictureKey

SITE = 'https://opencompass.openxlab.space/utils'
# What `pandas.read_csv` treats as a missing value.
MISSING = frozenset(
  ['', '#N/A', '#N/A N/A', '#NA', '-1.#IND', '-1.#QNAN', '-NaN', '-nan', '1.#IND', '1.#QNAN']
  + ['<NA>', 'N/A', 'NA', 'NULL', 'NaN', 'None', 'n/a', 'nan', 'null']
)
# An image cell of at most this many characters is the index of the row that contains the image.
LONGEST_INDEX = 64
LONGEST_CELL = 2**31 - 1  # csv's own limit is 128 kB
PICTURE_COLUMNS = ('image', 'image_path')


@dataclasses.dataclass(frozen=True)
class Source:
  """A file identified by its content.

  Attributes:
    file: its name.
    folder: below `SITE`.
    md5: of the version with which the rules here were checked.
  """

  file: str
  folder: str
  md5: str

  @property
  def url(self) -> str:
    return f'{SITE}/{self.folder}/{self.file}'


SOURCES = {
  'pope': Source('POPE.tsv', 'VLMEval', 'c12f5acb142f2ef1f85a26ba2fbe41d5'),
  'hallusionbench': Source('HallusionBench.tsv', 'VLMEval', '0c23ac0dc9ef46832d7a24504f2a0c7c'),
  'mmbench': Source('MMBench_DEV_EN.tsv', 'benchmarks/MMBench', 'b6caf1133a01c6bb705cf753bb527ed8'),
  'mmbench_v11': Source(
    'MMBench_DEV_EN_V11.tsv', 'benchmarks/MMBench', '30c05be8f2f347a50be25aa067248184'
  ),
  'seedbench': Source(
    'SEEDBench_IMG.tsv', 'benchmarks/SEEDBench', '68017231464752261a2526d6ca3a10c0'
  ),
  'mmmu': Source('MMMU_DEV_VAL.tsv', 'VLMEval', '585e8ad75e73f75dcad265dfd0417d64'),
  'llavabench': Source('LLaVABench.tsv', 'VLMEval', 'd382a093f749a697820d3dadd61c8428'),
}


# Finding a file.


def locate(name: str, source: str | None, data_dir: str, *, any_version: bool = False) -> str:
  """The path of a benchmark's table, after checking its content.

  Args:
    name: a key of SOURCES.
    source: a file, a folder that contains it, or None to look in `data_dir` and, if it is not
      there, download it to that folder.
    data_dir: where downloads are kept.
    any_version: accept different content, such as the user's own table.

  Errors: InputError if the table is not available, or has another md5.
  """
  known = SOURCES[name]
  path = os.path.join(data_dir, known.file) if source is None else source
  if os.path.isdir(path):
    path = os.path.join(path, known.file)
  if source is None and not os.path.isfile(path):
    _download(known, path)
  if not os.path.isfile(path):
    raise InputError(
      f'{path}, the table {known.file}, does not exist; download {known.url} or name another path'
    )
  if not any_version:
    found = md5_of(path)
    if found != known.md5:
      raise InputError(
        f'{path} has md5 {found} instead of {known.md5}, the version of {known.file} behind the '
        'published numbers; download it again, or set --any_version'
      )
  return path


def md5_of(path: str) -> str:
  """The hexadecimal md5 of a file."""
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'md5').hexdigest()


def _download(known, path):
  os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
  aside = f'{path}.new'
  try:
    with urllib.request.urlopen(known.url, timeout=60) as response, open(aside, 'wb') as f:
      shutil.copyfileobj(response, f)
  except (urllib.error.URLError, http.client.HTTPException, OSError) as e:
    raise InputError(
      f'cannot download {known.url} ({e}), which needs a network; download {known.file} elsewhere '
      'and name its path'
    ) from e
  found = md5_of(aside)
  if found != known.md5:  # truncated, or another version: delete it, or a later start would use it
    os.unlink(aside)
    raise InputError(
      f'the download from {known.url} has md5 {found} instead of {known.md5}; try again, or '
      f'download {known.file} elsewhere and name its path'
    )
  os.replace(aside, path)


# Reading it.


Row = dict[str, str | None]


class Table:
  """A TSV file of questions.

  Attributes:
    path: the file.
    rows: its rows in order, {column: text or None}, without the image cells; rows without any image
      are omitted, as in VLMEvalKit, if there is a column `image`.
    columns: all columns of the file, lower case except for the options.
  """

  def __init__(self, path: str, required: Sequence[str] = ()):
    """Reads everything but the images.

    Args:
      path: the file.
      required: columns that the benchmark needs besides index, question and an image column.

    Errors: InputError that names what is missing or broken, and the line.
    """
    self.path = path
    self.columns = self._header()
    wanted = ('index', 'question', *required)
    missing = [column for column in wanted if column not in self.columns]
    if missing or not set(PICTURE_COLUMNS) & set(self.columns):
      lacks = ', '.join(missing) or 'image or image_path'
      raise InputError(
        f'{path} has no column {lacks}, but needs {", ".join(wanted)} and image or image_path; '
        'name a table of VLMEvalKit'
      )
    self.rows: list[Row] = []
    self._places = {}  # {index of a row: (offset of its line in the file, number of the line)}
    self._points_to = {}  # {index of a row: index of the row that contains its image}
    self._read_rows()
    self._check_pointers()

  def __len__(self) -> int:
    return len(self.rows)

  def pictures(self, row: Row) -> tuple[PictureKey, ...]:
    """The keys of a row's images; rows that share an image have equal keys."""
    index = str(row['index'])
    owner = self._points_to.get(index, index)
    return tuple(PictureKey(owner, place) for place in range(self._counts[owner]))

  def picture(self, key: PictureKey) -> Image.Image:
    """An image, in RGB.

    Errors: InputError if its base64 is broken, its file is missing, or it cannot be decoded.
    """
    offset, line = self._places[key.row]
    record = self._record_at(offset)
    cells = dict(zip(self.columns, record))
    place = f'row {key.row} (line {line}) of {self.path}'
    data = _missing_to_none(cells.get('image'))
    if data is not None:
      return _decoded(_bytes_of(as_list(data)[key.place], place), place)
    path = as_list(cells['image_path'])[key.place]
    folder = os.path.dirname(os.path.realpath(self.path))
    path = os.path.join(folder, path)
    if os.path.commonpath([folder, os.path.realpath(path)]) != folder:
      raise InputError(
        f'the image {path} of {place} is outside {folder}, the folder of the table; download the '
        'file again'
      )
    try:
      with open(path, 'rb') as f:
        return _decoded(f.read(), place)
    except OSError as e:
      raise InputError(
        f'cannot read the image {path} of {place} ({e.strerror}); download the images too'
      ) from e

  def _header(self):
    for _, _, record in self._records():
      return tuple(name if name in OPTIONS else name.lower() for name in record)
    raise InputError(f'{self.path} is empty, but should be a table; download it again')

  def _read_rows(self):
    self._counts = {}
    for offset, line, record in self._records():
      if line == 1:
        continue
      if len(record) != len(self.columns):
        raise InputError(
          f'line {line} of {self.path} has {len(record)} cells instead of {len(self.columns)}; '
          'download the file again'
        )
      cells = {name: _missing_to_none(cell) for name, cell in zip(self.columns, record)}
      index = cells['index']
      if index is None or index in self._places:
        what = 'no index' if index is None else f'the index {index} of an earlier row'
        raise InputError(
          f'line {line} of {self.path} has {what}; give each row an index of its own'
        )
      picture = cells.pop('image', None)
      if 'image' in self.columns:
        if picture is None:
          continue
        if len(picture) <= LONGEST_INDEX:
          self._points_to[index] = picture
        self._counts[index] = len(as_list(picture))
      else:
        self._counts[index] = len(as_list(cells['image_path'] or ''))
      self._places[index] = offset, line
      self.rows.append(cells)

  def _check_pointers(self):
    """A row may only point to a row that contains an image."""
    for index, owner in self._points_to.items():
      if owner not in self._places or owner in self._points_to:
        _, line = self._places[index]
        raise InputError(
          f'row {index} (line {line}) of {self.path} takes its image from row {owner}, which has '
          'none; it needs the index of a row with an image, or base64: download the file again'
        )

  def _records(self) -> Iterator[tuple[int, int, list[str]]]:
    """(offset in the file, number from 1 of its first line, cells) for every record."""
    try:
      with open(self.path, 'rb') as f:
        lines = _Lines(f)
        reader = _reader(lines)
        while True:
          offset, line = lines.offset, lines.number + 1
          try:
            record = next(reader)
          except StopIteration:
            return
          if record:
            yield offset, line, record
    except (OSError, UnicodeDecodeError, csv.Error) as e:
      raise InputError(
        f'cannot read {self.path} ({e}), which should be a TSV file in UTF-8; download it again'
      ) from e

  def _record_at(self, offset):
    with open(self.path, 'rb') as f:
      f.seek(offset)
      return next(_reader(_Lines(f)))


OPTIONS = tuple('ABCDEFGHIJKLMNOPQRSTUVWXYZ')


class _Lines:
  """The lines of a binary file as text, and how far it has been read."""

  def __init__(self, file: io.BufferedReader):
    self._file = file
    self.offset = 0
    self.number = 0

  def __iter__(self):
    return self

  def __next__(self) -> str:
    line = self._file.readline()
    if not line:
      raise StopIteration
    encoding = 'utf-8-sig' if not self.offset else 'utf-8'
    self.offset += len(line)
    self.number += 1
    return line.decode(encoding)


def _reader(lines):
  csv.field_size_limit(LONGEST_CELL)
  return csv.reader(lines, delimiter='\t')


def _missing_to_none(cell):
  return None if cell is None or cell in MISSING else cell


def as_list(cell: str) -> list[str]:
  """A cell as a list. The cell is one text, or the text of a Python list."""
  if cell.startswith('[') and cell.endswith(']'):
    try:
      values = ast.literal_eval(cell)
    except (ValueError, SyntaxError):
      return [cell]
    return [str(value) for value in values]
  return [cell]


def options(row: Row) -> dict[str, str]:
  """{letter: text} of the options that a row has."""
  return {letter: row[letter] for letter in OPTIONS if row.get(letter) is not None}


def _bytes_of(text, place):
  try:
    return base64.b64decode(text, validate=True)
  except (binascii.Error, ValueError) as e:
    raise InputError(
      f'the image in {place} has broken base64 ({e}); download the file again'
    ) from e


def _decoded(data, place):
  try:
    # As in VLMEvalKit: transparent images are not composited over white.
    return Image.open(io.BytesIO(data), formats=images.FORMATS).convert('RGB')
  # Pillow's readers raise many kinds of exceptions for a damaged image.
  except Exception as e:
    raise InputError(
      f'cannot decode the image of {place} ({first_line(e)}), which should be JPEG or PNG; '
      'download the file again'
    ) from e


def is_int(text):
  try:
    int(text)
  except ValueError:
    return False
  return True
