"""Which of a user's own prompts and pictures are kept out of training, so that a run is measured on
what it never learned from.

Hashes decide: of a text, or of a file's bytes. So it does not matter where an item stands or what
it is called, two equal ones are on the same side, and a run that goes on with a changed list keeps
the items that it began with.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

LEAST, MOST = 4, 64  # items that are held out of a list, whatever the share is
KINDS = ('prompts', 'pictures')


class Apart(NamedTuple):
  """What is measured on and not learned from.

  Attributes:
    share: of a user's own files and folders, that is held out.
    listed: items of the validation lists of named sets, which are learned from whole.
    kept: {'prompts': hashes, 'pictures': hashes} of what a run that goes on holds out; None for one
      that begins.
  """

  share: float = 0.0
  listed: int = 0
  kept: Mapping[str, Collection[str]] | None = None

  def choose(self, kind: str, hashes: Iterable[str]) -> list[str]:
    """The hashes of what is held out, of a user's own items; kind: one of `KINDS`."""
    if self.kept is not None:
      return sorted(self.kept.get(kind, ()))
    distinct = sorted(set(hashes))
    return distinct[: number(self.share, len(distinct))]


NOTHING = Apart()  # all is learned from


def number(share: float, items: int) -> int:
  """How many of different items are held out: a share of them, LEAST at least and MOST at most, and
  never more than half.
  """
  if not share:
    return 0
  return min(max(round(share * items), LEAST), MOST, items // 2)
