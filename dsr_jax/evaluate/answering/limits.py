"""Which part of a benchmark is asked: all of it, or the same few of each category."""

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np

SEED = 0  # of the draw: the same part for every model

Item = TypeVar('Item')


def limited(
  items: Sequence[Item],
  limit: int,
  category: Callable[[Item], Hashable],
  group: Callable[[Item], Hashable],
) -> list[Item]:
  """`limit` groups of each category, drawn by seed, in the order in which they stand.

  Args:
    items: prompts or questions.
    limit: groups of a category; 0: all.
    category: of an item.
    group: what is kept whole, as the rotations of one question; where each item is a group of its
      own, so many items are drawn.
  """
  if not limit:
    return list(items)
  groups = {}
  for item in items:
    groups.setdefault(category(item), {}).setdefault(group(item), None)
  kept = set()
  for name, members in groups.items():
    order = np.random.default_rng(SEED).permutation(len(members))[:limit]
    names = list(members)
    kept |= {(name, names[i]) for i in order}
  return [item for item in items if (category(item), group(item)) in kept]
