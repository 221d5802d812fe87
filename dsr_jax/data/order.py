"""The order of the data: which input stands in which row of which step, as a pure function of
(seed, step).

Inputs are numbered through the run: row r of step s is input s * B + r. Input i belongs to epoch i
// n, and each epoch is a permutation of the n items keyed by (seed, stream, epoch). Nothing is kept
between calls, so a resumed run, or another process of the same run, finds the same item in the same
place.
"""

import bisect
from collections.abc import Sequence
import functools

import numpy as np

PROMPTS, PICTURES = 0, 1  # streams: prompts and pictures are unpaired
_STEPS = 2
_CHOICES = 3


def _words(seed: int, stream: int, index: int, number: int) -> np.ndarray:
  # Philox' raw words are guaranteed stable over NumPy's versions; Generator.permutation is not.
  key = np.array([seed, (stream << 48) | index], np.uint64)
  return np.random.Philox(key=key).random_raw(number)


@functools.lru_cache(maxsize=8)
def permutation(seed: int, stream: int, epoch: int, size: int) -> np.ndarray:
  """The order (size,) of epoch `epoch`."""
  return np.argsort(_words(seed, stream, epoch, size), kind='stable')


def items(seed: int, stream: int, inputs: range, size: int) -> list[int]:
  """The items, in [0, size), that the run's inputs numbered `inputs` are."""
  return [int(permutation(seed, stream, i // size, size)[i % size]) for i in inputs]


def choice(seed: int, size: int, number: int) -> list[int]:
  """`number` different items of `size`, in order; of fewer, some of the same."""
  chosen = np.argsort(_words(seed, _CHOICES, 0, size), kind='stable')[:number]
  return [int(i) for i in np.sort(chosen)]


def place(ends: Sequence[int], index: int) -> tuple[int, int]:
  """Where item `index` of several sets lies, one set after the other: (set, its place there).

  ends: of each set, how many items it and those before it have.
  """
  part = bisect.bisect_right(ends, index)
  return part, index - (ends[part - 1] if part else 0)


def step_seed(seed: int, step: int) -> np.uint32:
  """32 random bits for all that is sampled in a step."""
  return np.uint32(_words(seed, _STEPS, step, 1)[0] >> np.uint64(32))
