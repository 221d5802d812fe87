"""Asks the questions of a benchmark, reading each image once for up to `QUESTIONS` questions, and
writes the answers and VLMEvalKit's prediction file.

Answers are greedy. Most are one word, so all questions are first asked with room for a few tokens;
those whose answer did not end are asked again with more room.
"""

import importlib.util
import os
from typing import NamedTuple

import jax
import numpy as np

from dsr_jax import cli, files, sharding
from dsr_jax.evaluate import protocol
from dsr_jax.evaluate.answering import folders, manifest
from dsr_jax.evaluate.answering.limits import limited
from dsr_jax.evaluate.answering.subject import Subject, word
from dsr_jax.evaluate.overlap import one_ahead, parts_of, prepared
from dsr_jax.inference import check_numbers
from dsr_jax.models.unified import Text
from dsr_jax.runtime.distributed import Team

ANSWERS, CANDIDATES = 'answers', 'candidates'
QUESTIONS = 8  # asked together about one reading
FIRST_ROOM, MORE = 16, 16  # tokens for an answer at first; the factor for each retry
OPEN_ROOM = 256  # the same at first, if answers are sentences
OPEN = ('llavabench',)  # benchmarks of open questions, whose answers may be the best of several
LEAST_TURN = 32  # tokens; questions are padded to this length times a power of two


class Row(NamedTuple):
  """Questions about the same images, as indices into the list of questions."""

  pictures: tuple[protocol.PictureKey, ...]
  questions: tuple[int, ...]


class Chunk(NamedTuple):
  """Rows that are asked together, all padded to P images, Q questions and T tokens."""

  rows: tuple[Row, ...]
  pictures: int
  questions: int
  tokens: int

  def places(self) -> list[int]:
    return [place for row in self.rows for place in row.questions]


def questions_of(benchmark: protocol.Asking, limit: int) -> list[protocol.Question]:
  """The questions to ask."""

  def category(question):
    return question.category

  def group(question):
    return question.group

  return limited(benchmark.questions(), limit, category, group)


def ask(
  name: str,
  subject: Subject,
  benchmark: protocol.Asking,
  folder: str,
  limit: int,
  team: Team,
  table: str = '',
) -> None:
  """Asks the unanswered questions. All processes must call it together; the first one writes.

  table: md5 of the question table. Errors: InputError if the folder belongs to another model.
  """
  questions = questions_of(benchmark, limit)
  if team.lead:
    folders.claim(folder, manifest.of(name, subject, benchmark, limit, table))
  answerable, beyond = _split(questions, subject.model.spec.max_pictures)
  if beyond and team.lead:
    cli.log(
      f'note         {name}: {len(beyond)} questions have more images than this model can read'
    )
  turns = dict(zip(answerable, subject.turns([questions[i].text for i in answerable])))
  open_ended = name in OPEN
  best = subject.how.best_of if open_ended else 1
  room = min(OPEN_ROOM if open_ended else FIRST_ROOM, subject.how.max_tokens)
  left = answerable
  while left:
    left = _ask_with_room(
      name, subject, benchmark, folder, team, questions, turns, left, room, best
    )
    if room == subject.how.max_tokens:
      break
    room = min(room * MORE, subject.how.max_tokens)
  if team.lead:
    _write_predictions(name, subject, benchmark, folder)


def _split(questions, most: int):
  """Indices of the questions with at most `most` images (0: no limit), and of the others."""
  places = range(len(questions))
  fits = [not most or len(question.pictures) <= most for question in questions]
  return [i for i in places if fits[i]], [i for i in places if not fits[i]]


def _ask_with_room(name, subject, benchmark, folder, team, questions, turns, left, room, best):
  """Asks those of `left` that were not yet asked with room for `room` tokens; returns those of
  `left` whose answers did not end within it.
  """
  each = subject.rows if best == 1 else lambda count: subject.rows(count * best)
  said = _said(folder, room) if team.lead else {}
  missing = [place for place in left if questions[place].id not in said]
  missing = team.shared(missing if team.lead else None)
  rows = rows_of(questions, left, most=QUESTIONS if best == 1 else 1)
  chunks = chunks_of(turns, _parts_in(rows, set(missing)), each)
  done = len(left) - len(missing)

  def load(chunk):
    count = each(chunk.pictures * chunk.questions)
    return _arrays(subject, benchmark, questions, turns, chunk, count)

  def launch(item):
    chunk, (pixels, shown, question) = item
    words = _words(benchmark, questions, chunk, question.ids.shape[:2])
    if best == 1:
      return subject.answer(pixels, shown, question, words, room)
    only = Text(question.ids[:, 0], question.mask[:, 0])
    return subject.answer_best(pixels[:, 0], only, words[:, 0], room)

  for (chunk, _), out in one_ahead(prepared(chunks, load), launch):
    out = jax.tree.map(sharding.fetch, out)
    check_numbers(out)
    if team.lead:
      record = _record(subject, questions, chunk, out)
      files.write_json(_path(folder, room, chunk, questions), record, indent=1)
      said |= record
      done += len(record)
      cli.log(f'answered     {name}: {done} of {len(left)} questions')
  unended = [i for i in left if not said[questions[i].id]['ended']] if team.lead else None
  return team.shared(unended)


# Chunks.


def rows_of(questions, places, most: int = QUESTIONS) -> list[Row]:
  """Groups questions about the same images, up to `most` together.

  Args:
    questions: all of them.
    places: indices of the questions to ask.
    most: questions per row.
  """
  by_pictures = {}
  for place in places:
    by_pictures.setdefault(questions[place].pictures, []).append(place)
  return [
    Row(pictures, tuple(part))
    for pictures, members in by_pictures.items()
    for part in parts_of(members, most)
  ]


def _parts_in(rows, missing) -> list[Row]:
  """The parts of the rows that are in `missing`, a set of indices of questions."""
  parts = [row._replace(questions=tuple(q for q in row.questions if q in missing)) for row in rows]
  return [row for row in parts if row.questions]


def chunks_of(turns, rows, size_of) -> list[Chunk]:
  """Groups rows of one shape into chunks.

  If the rows of whole chunks are omitted, all other chunks stay the same.

  Args:
    turns: {index of a question: ids of its turn}.
    rows: the rows to ask.
    size_of: number of questions per row -> number of rows per chunk.
  """
  by_shape = {}
  for row in rows:
    longest = max(len(turns[place]) for place in row.questions)
    shape = (
      _power(len(row.pictures)),
      _power(len(row.questions)),
      _power(-(-longest // LEAST_TURN)) * LEAST_TURN,
    )
    by_shape.setdefault(shape, []).append(row)
  return [
    Chunk(tuple(part), pictures, asked, tokens)
    for (pictures, asked, tokens), members in sorted(by_shape.items())
    for part in parts_of(members, size_of(pictures * asked))
  ]


def _power(count: int) -> int:
  """The next power of two, so that there are few shapes and few programs."""
  return 1 << (count - 1).bit_length()


def _arrays(subject, benchmark, questions, turns, chunk, rows):
  """pixels (B, P, H, W, 3) uint8, shown (B, P) bool, Text (B, Q, T), padded with the first row."""
  shape = len(chunk.rows), chunk.pictures
  side = subject.model.spec.image_size
  pixels = np.zeros((*shape, side, side, 3), np.uint8)
  shown = np.zeros(shape, bool)
  ids, mask = [], []
  for b, row in enumerate(chunk.rows):
    for p, key in enumerate(row.pictures):
      pixels[b, p] = subject.square(benchmark.picture(key))
      shown[b, p] = True
    asked = [turns[place] for place in row.questions]
    padded = subject.model.processor.pad(
      asked + [asked[0]] * (chunk.questions - len(asked)), chunk.tokens
    )
    ids.append(padded.ids)
    mask.append(padded.mask)
  filled = np.where(np.arange(rows) < len(chunk.rows), np.arange(rows), 0)
  return pixels[filled], shown[filled], Text(np.stack(ids)[filled], np.stack(mask)[filled])


def _words(benchmark, questions, chunk, shape) -> np.ndarray:
  """(B, Q) uint32; padding has 0."""
  words = np.zeros(shape, np.uint32)
  for b, row in enumerate(chunk.rows):
    for q, place in enumerate(row.questions):
      words[b, q] = word(benchmark.about.name, questions[place].id)
  return words


# Files.


def _path(folder, room, chunk, questions) -> str:
  """The path of a chunk's answers; chunks with other members have other names."""
  places = chunk.places()
  digest = folders.digest_of(questions[place].id for place in places)
  return os.path.join(folder, ANSWERS, f'{_prefix(room)}{min(places):06d}-{digest}.json')


def _prefix(room) -> str:
  """Names of answer files begin with the room they had, so that the last answer is read last."""
  return f'{room:05d}-'


def _said(folder, room) -> dict[str, dict]:
  """The records of all questions asked with this room, in any chunks."""
  return folders.read_all(os.path.join(folder, ANSWERS), _prefix(room))


def _record(subject, questions, chunk, out):
  """{question: {'answer', 'ended'}}, plus 'candidates' and 'rewards' if there are several.

  out: a `Written`; with rewards, each row has only one question.
  """
  record = {}
  eos = subject.model.spec.eos_id
  for b, row in enumerate(chunk.rows):
    for q, place in enumerate(row.questions):
      said = {}
      chosen, candidates = q, [q]
      if out.rewards is not None:
        rewards = out.rewards[b]
        candidates = range(len(rewards))
        chosen = int(np.argmax(rewards))
        texts = [subject.words_of(i, m) for i, m in zip(out.ids[b], out.mask[b])]
        said = {'candidates': texts, 'rewards': cli.rounded(rewards)}
      answer = subject.words_of(out.ids[b, chosen], out.mask[b, chosen])
      # The best candidate is known only after all have ended.
      ended = all(np.any(out.ids[b, k][out.mask[b, k]] == eos) for k in candidates)
      record[questions[place].id] = {'answer': answer, 'ended': ended, **said}
  return record


def records_of(folder: str) -> dict[str, dict]:
  """{question: {'answer', ...}}; the last answer if a question was asked again."""
  return folders.read_all(os.path.join(folder, ANSWERS))


def answers_of(folder: str) -> dict[str, str]:
  """{question: answer} for all answered questions."""
  return {identity: record['answer'] for identity, record in records_of(folder).items()}


def _write_predictions(name, subject, benchmark, folder):
  form = 'xlsx' if importlib.util.find_spec('openpyxl') else 'tsv'
  model = folders.short_name(subject.name)
  path = benchmark.write_predictions(answers_of(folder), folder, model, form)
  cli.log(f"written      {path}, in VLMEvalKit's format")
