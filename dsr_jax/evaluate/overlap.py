"""Work in pieces, one piece ahead: the host prepares the next while the devices run the last."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import TypeVar

Work = TypeVar('Work')
Started = TypeVar('Started')


def parts_of(work: Sequence[Work], size: int) -> list[list[Work]]:
  """The pieces of work, `size` at a time."""
  return [list(work[first : first + size]) for first in range(0, len(work), size)]


def one_ahead(
  work: Iterable[Work], launch: Callable[[Work], Started]
) -> Iterator[tuple[Work, Started]]:
  """(piece, launch(piece)) for each piece; the next one is launched before the last is yielded."""
  last = None
  for piece in work:
    started = piece, launch(piece)
    if last is not None:
      yield last
    last = started
  if last is not None:
    yield last


def prepared(
  work: Iterable[Work], prepare: Callable[[Work], Started]
) -> Iterator[tuple[Work, Started]]:
  """(piece, prepare(piece)) for each piece; a thread prepares the next one in the meantime."""
  with futures.ThreadPoolExecutor(1) as pool:
    yield from (
      (piece, future.result())
      for piece, future in one_ahead(work, lambda piece: pool.submit(prepare, piece))
    )
