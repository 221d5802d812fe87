"""Prompts: reads a user's own file, and turns any sequence of texts into rows of token ids.

A file has one prompt per line, or one JSON object per line (.jsonl), or a table with a header
(.csv, .tsv); in the last two, the prompts are under the name `prompt`.
"""

from collections.abc import Callable, Mapping, Sequence
import csv
import hashlib
import io
import itertools
import json
import os
from typing import Any, NamedTuple

import numpy as np

from dsr_jax import inputs
from dsr_jax.data import order
from dsr_jax.errors import InputError

COLUMN = 'prompt'  # the key of a prompt in JSON lines and in tables
JSON_LINES = ('.jsonl', '.ndjson', '.json')
TABLES = {'.csv': ',', '.tsv': '\t'}  # suffix -> delimiter


class Row(NamedTuple):
  """A prompt in a file. line: its first line, from 1. further: the other fields of its object or
  row, by name; strings for a table.
  """

  line: int
  text: str
  further: Mapping[str, Any]


def read(path: str) -> list[Row]:
  """The prompts of a file, in order and with repeats; empty lines are dropped.

  The suffix determines the format; for other suffixes, it is JSON lines if the first line is a JSON
  object with a prompt. InputError names the file and the line.
  """
  name = inputs.shown(os.path.basename(path))
  suffix = os.path.splitext(path)[1].lower()
  if suffix in TABLES:
    rows = _table(_decoded(path), TABLES[suffix], name)
  else:
    lines = read_lines(path)
    if suffix in JSON_LINES or _is_object(lines[0][1]):
      rows = [_of_json(number, line, name) for number, line in lines]
    else:
      rows = [Row(number, line, {}) for number, line in lines]
  for row in rows:
    _check_visible(row, name)
  if not rows:
    raise InputError(f'{name} has no prompt; write at least one row with a prompt')
  return rows


def _is_object(line: str) -> bool:
  try:
    return isinstance(json.loads(line), dict)
  except (ValueError, RecursionError):
    return False


def _of_json(number: int, line: str, name: str) -> Row:
  try:
    found = json.loads(line)
  except (ValueError, RecursionError) as e:
    raise InputError(
      f'line {number} of {name} is not JSON ({e}); write an object such as {{"{COLUMN}": "a red '
      'disc"}'
    ) from e
  text = found.get(COLUMN) if isinstance(found, dict) else None
  if not isinstance(text, str):
    has = f'the keys {", ".join(map(repr, found))}' if isinstance(found, dict) else 'no object'
    raise InputError(
      f'line {number} of {name} has {has}; write an object with the prompt as a string under '
      f'"{COLUMN}"'
    )
  return Row(number, text.strip(), {key: x for key, x in found.items() if key != COLUMN})


def _table(content: str, delimiter: str, name: str) -> list[Row]:
  """Rows of a table with a header; a quoted field may span several lines."""
  reader = csv.reader(io.StringIO(content, newline=''), delimiter=delimiter, strict=True)
  rows: list[Row] = []
  head: list[str] | None = None
  try:
    line = 1
    for cells in reader:
      if any(cell.strip() for cell in cells):
        if head is None:
          head = _head(cells, name)
        elif len(cells) != len(head):
          raise InputError(
            f'line {line} of {name} has {len(cells)} columns, but its first line has {len(head)}; '
            'correct the line, with quotes around fields that contain a comma'
          )
        else:
          found = dict(zip(head, cells))
          rows.append(Row(line, found.pop(COLUMN).strip(), found))
      line = reader.line_num + 1
  except csv.Error as e:
    raise InputError(
      f'line {reader.line_num} of {name} is not a row of a table ({e}); write columns separated by '
      f'{delimiter!r}'
    ) from e
  return rows


def _head(cells: list[str], name: str) -> list[str]:
  head = [cell.strip() for cell in cells]
  if COLUMN not in head:
    raise InputError(
      f'{name} has the columns {", ".join(map(repr, head))}; name the column of the prompts '
      f'{COLUMN!r} in the first line'
    )
  return head


def _check_visible(row: Row, name: str):
  """InputError for a prompt that is not text: invisible characters, or UTF-16."""
  where = f'line {row.line} of {name}'
  if '\0' in row.text:
    raise InputError(f'{where} contains a NUL, so it is not UTF-8 text; save the file as UTF-8')
  if not inputs.is_visible(row.text):
    raise InputError(
      f'{where} has no visible characters ({row.text[:9]!a}); write a prompt or remove the line'
    )


def read_lines(path: str) -> list[tuple[int, str]]:
  """The lines of a UTF-8 text file as (line number from 1, stripped text), in order and with
  repeats; empty lines are dropped.

  Accepts a byte order mark and any of the three line endings. InputError names the file.
  """
  # Not splitlines(): it would split at characters that a prompt may contain (form feed, U+2028).
  lines = _decoded(path).replace('\r\n', '\n').replace('\r', '\n').split('\n')
  found = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
  if not found:
    raise InputError(f'{inputs.shown(path)} has no prompt; write at least one line with a prompt')
  return found


def _decoded(path: str) -> str:
  name = inputs.shown(path)
  with inputs.open_plain(path, 'a text file with one prompt per line') as f:
    try:
      content = f.read()
    except OSError as e:
      raise InputError(
        f'cannot read {name} ({e.strerror}), which should be a text file with one prompt per line; '
        'name another file'
      ) from e
  try:
    return content.decode('utf-8-sig')
  except UnicodeDecodeError as e:
    raise InputError(
      f'{name} is not UTF-8 text (byte {e.start}); save it as UTF-8, with one prompt per line'
    ) from e


class Prompts:
  """Texts by index, tokenized once on first use.

  `where(i)` names text i in errors, such as `line 7 of prompts.txt`.
  """

  def __init__(self, texts: Sequence[str], where: Callable[[int], str]):
    self._texts = texts
    self.where = where

  @classmethod
  def from_file(cls, path: str) -> 'Prompts':
    rows = read(path)
    name = inputs.shown(os.path.basename(path))
    return cls([row.text for row in rows], lambda i: f'line {rows[i].line} of {name}')

  def __len__(self) -> int:
    return len(self._texts)

  def __getitem__(self, index: int) -> str:
    return self._texts[index]

  def identity(self, index: int) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(self[index].encode()).hexdigest()

  def fingerprint(self) -> str:
    """SHA-256 of all texts in order, which must be the same in a resumed run."""
    digest = hashlib.sha256()
    for i in range(len(self)):
      digest.update(self[i].encode() + b'\n')
    return digest.hexdigest()


def chosen(prompts: Prompts, indices: Sequence[int]) -> Prompts:
  """A subset of the prompts."""
  return Prompts([prompts[i] for i in indices], lambda i: prompts.where(indices[i]))


def joined(parts: Sequence[Prompts]) -> Prompts:
  """Concatenates the prompts of several sets; returns a single set unchanged."""
  if len(parts) == 1:
    return parts[0]
  ends = list(itertools.accumulate(len(part) for part in parts))

  def where(index):
    part, place = order.place(ends, index)
    return parts[part].where(place)

  return Prompts([part[i] for part in parts for i in range(len(part))], where)


def encode(
  text: str, encode_one: Callable[[str], Sequence[int]], length: int, where: str
) -> list[int]:
  """Token ids of one text, at least one and at most `length`. where: names the text in the
  InputError.
  """
  try:
    ids = list(encode_one(text))
  except InputError as e:
    raise InputError(f'{where}: {e}') from e
  if not ids:
    raise InputError(f'{where} is an empty prompt; write at least one word or leave the line out')
  if len(ids) > length:
    raise InputError(
      f'{where} has {len(ids)} tokens, more than the limit of {length}; shorten it or raise '
      'data.max_prompt_tokens'
    )
  return ids


def pad(rows: Sequence[Sequence[int]], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
  """Left-justified rows: ids (B, length) int32, mask (B, length) bool, True for content."""
  ids = np.full((len(rows), length), pad_id, np.int32)
  mask = np.zeros((len(rows), length), bool)
  for i, row in enumerate(rows):
    ids[i, : len(row)] = row
    mask[i, : len(row)] = True
  return ids, mask
