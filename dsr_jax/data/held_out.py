"""Selects the user's own prompts and images that are held out from training, so that a run is
evaluated on inputs that it never learned from.

The hash of a text, or of a file's bytes, decides. Names and order therefore do not matter, two
equal items are on the same side, and a run that resumes with a changed list keeps its held-out
items.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

LEAST, MOST = 4, 64  # limits on the held-out items of a list, for any share
KINDS = ('prompts', 'pictures')


class Apart(NamedTuple):
  """The inputs for evaluation, separate from training.

  Attributes:
    share: the share of a user's own files and folders to hold out.
    listed: items to take from the validation lists of named sets, which train on all their items.
    kept: {'prompts': hashes, 'pictures': hashes} that a resumed run holds out; None for a new run.
  """

  share: float = 0.0
  listed: int = 0
  kept: Mapping[str, Collection[str]] | None = None

  def choose(self, kind: str, hashes: Iterable[str]) -> list[str]:
    """The hashes of the held-out items among a user's own. kind: one of `KINDS`."""
    if self.kept is not None:
      return sorted(self.kept.get(kind, ()))
    distinct = sorted(set(hashes))
    return distinct[: number(self.share, len(distinct))]


NOTHING = Apart()  # train on everything


def number(share: float, items: int) -> int:
  """The number of distinct items to hold out: a share of them, at least LEAST and at most MOST, and
  never more than half.
  """
  if not share:
    return 0
  return min(max(round(share * items), LEAST), MOST, items // 2)
