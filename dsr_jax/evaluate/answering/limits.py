"""Selects the part of a benchmark to ask: all of it, or the same few items of each category."""

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np

SEED = 0  # of the selection, so that every model gets the same part

Item = TypeVar('Item')


def limited(
  items: Sequence[Item],
  limit: int,
  category: Callable[[Item], Hashable],
  group: Callable[[Item], Hashable],
) -> list[Item]:
  """`limit` groups of each category, selected at random with a fixed seed, in their given order.

  Args:
    items: prompts or questions.
    limit: groups per category; 0: all.
    category: of an item.
    group: of an item; groups are kept whole, such as the rotations of one question.
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
