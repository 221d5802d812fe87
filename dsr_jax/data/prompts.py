"""Prompts: anyone's own file, a line a prompt, and any sequence of texts as rows of token ids."""

from collections.abc import Callable, Sequence
import hashlib
import itertools
import os

import numpy as np

from dsr_jax import inputs
from dsr_jax.data import order
from dsr_jax.errors import InputError


def read_lines(path: str) -> list[tuple[int, str]]:
  """The prompts of a UTF-8 text file as (line number from 1, prompt); empty lines are dropped,
  repeats and order kept.

  A byte order mark and any of the three line ends are understood. Errors: InputError names the
  file.
  """
  name = inputs.shown(path)
  with inputs.open_plain(path, 'a text file with a line a prompt') as f:
    try:
      content = f.read()
    except OSError as e:
      raise InputError(
        f'cannot read {name} ({e.strerror}); expected a text file with a line a prompt; '
        'name another file'
      ) from e
  try:
    text = content.decode('utf-8-sig')
  except UnicodeDecodeError as e:
    raise InputError(
      f'{name} is not UTF-8 text (byte {e.start}); expected a line a prompt; save it as UTF-8'
    ) from e
  # Not splitlines(): it would cut at characters that may stand inside a prompt (form feed, U+2028).
  lines = text.replace('\r\n', '\n').replace('\r', '\n').split('\n')
  found = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
  if not found:
    raise InputError(f'found no prompt in {name}; expected a line a prompt; write at least one')
  return found


class Prompts:
  """Texts by index, tokenized once when first asked for.

  `where(i)` names the place of text i in errors: `line 7 of prompts.txt`.
  """

  def __init__(self, texts: Sequence[str], where: Callable[[int], str]):
    self._texts = texts
    self.where = where

  @classmethod
  def from_file(cls, path: str) -> 'Prompts':
    numbered = read_lines(path)
    name = inputs.shown(os.path.basename(path))
    return cls([text for _, text in numbered], lambda i: f'line {numbered[i][0]} of {name}')

  def __len__(self) -> int:
    return len(self._texts)

  def __getitem__(self, index: int) -> str:
    return self._texts[index]

  def fingerprint(self) -> str:
    """SHA-256 of all texts in order: a resumed run must read the same ones."""
    digest = hashlib.sha256()
    for i in range(len(self)):
      digest.update(self[i].encode() + b'\n')
    return digest.hexdigest()


def chosen(prompts: Prompts, indices: Sequence[int]) -> Prompts:
  """Some of them, as prompts of their own."""
  return Prompts([prompts[i] for i in indices], lambda i: prompts.where(indices[i]))


def joined(parts: Sequence[Prompts]) -> Prompts:
  """All prompts of several sets, one set after the other; a single one stays what it is."""
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
  """Token ids of one text, at least one and at most `length`; InputError says `where` the text
  stands.
  """
  try:
    ids = list(encode_one(text))
  except InputError as e:
    raise InputError(f'{where}: {e}') from e
  if not ids:
    raise InputError(
      f'{where} is an empty prompt; expected at least one word; write one or leave the line out'
    )
  if len(ids) > length:
    raise InputError(
      f'{where} has {len(ids)} tokens; expected at most {length}; shorten it or raise '
      'data.max_prompt_tokens'
    )
  return ids


def pad(rows: Sequence[Sequence[int]], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
  """Left-justified rows: ids (B, length) int32, mask (B, length) bool, True on content."""
  ids = np.full((len(rows), length), pad_id, np.int32)
  mask = np.zeros((len(rows), length), bool)
  for i, row in enumerate(rows):
    ids[i, : len(row)] = row
    mask[i, : len(row)] = True
  return ids, mask
