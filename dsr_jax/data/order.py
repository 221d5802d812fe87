"""The order of the data: the input in each row of each step, as a pure function of (seed, step).

Inputs are numbered over the run: row r of step s is input s * B + r. Input i belongs to epoch
i // n, and each epoch is a permutation of the n items keyed by (seed, stream, epoch). There is no
state between calls, so a resumed run, or another process of the same run, gets the same item in
the same row.
"""

import bisect
from collections.abc import Sequence
import functools

import numpy as np

PROMPTS, PICTURES = 0, 1  # streams: prompts and images are unpaired
_STEPS = 2
_CHOICES = 3


def _words(seed: int, stream: int, index: int, number: int) -> np.ndarray:
  # NumPy guarantees stable raw words of Philox across versions, but not Generator.permutation.
  key = np.array([seed, (stream << 48) | index], np.uint64)
  return np.random.Philox(key=key).random_raw(number)


@functools.lru_cache(maxsize=8)
def permutation(seed: int, stream: int, epoch: int, size: int) -> np.ndarray:
  """The order (size,) of epoch `epoch`."""
  return np.argsort(_words(seed, stream, epoch, size), kind='stable')


def items(seed: int, stream: int, inputs: range, size: int) -> list[int]:
  """The items, in [0, size), of the run's inputs with the numbers `inputs`."""
  return [int(permutation(seed, stream, i // size, size)[i % size]) for i in inputs]


def choice(seed: int, size: int, number: int) -> list[int]:
  """`number` distinct items out of `size`, sorted; a smaller number gives a subset of them."""
  chosen = np.argsort(_words(seed, _CHOICES, 0, size), kind='stable')[:number]
  return [int(i) for i in np.sort(chosen)]


def place(ends: Sequence[int], index: int) -> tuple[int, int]:
  """Locates item `index` in the concatenation of several sets: (set, index within the set).

  ends: cumulative numbers of items of the sets.
  """
  part = bisect.bisect_right(ends, index)
  return part, index - (ends[part - 1] if part else 0)


def step_seed(seed: int, step: int) -> np.uint32:
  """32 random bits that seed all sampling in a step."""
  return np.uint32(_words(seed, _STEPS, step, 1)[0] >> np.uint64(32))
