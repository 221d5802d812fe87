"""The numeracy score of T2I-CompBench++: are the objects present, and as many as the prompt says?

Source: Karine-Huang/T2I-CompBench, UniDet_eval/numeracy_eval.py (MIT). Each object of the prompt
has the same weight: half for being detected, half for its number. Not among the paper's columns.
"""

from collections.abc import Sequence
import functools
import os
from typing import NamedTuple

from dsr_jax.data import prompts as prompts_lib
from dsr_jax.data import t2i_compbench
from dsr_jax.evaluate.t2i_compbench.spatial import PEOPLE, Detection
from dsr_jax.evaluate.t2i_compbench.words import Token

ONE = ('a', 'an', 'one')
NUMBERS = {'two': 2, 'three': 3, 'four': 4, 'five': 5, 'six': 6, 'seven': 7, 'eight': 8}
NUMBERS |= dict.fromkeys(ONE, 1)
# The detector's names for the benchmark's nouns.
LABELS = {'ship': 'boat', 'telivision': 'tv', 'goldfish': 'fish', 'painting': 'picture'}
LABELS |= dict.fromkeys(PEOPLE, 'person')
SAME = 0.9  # boxes with one label that overlap more, or contain each other more, are one object


class Wanted(NamedTuple):
  """An object in the singular, and how many of it."""

  noun: str
  count: int


@functools.cache
def nouns() -> dict[str, str]:
  """{plural: singular} for the benchmark's nouns."""
  path = os.path.join(t2i_compbench.DIRECTORY, 'new_objects.txt')
  pairs = [line.split(' - ') for _, line in prompts_lib.read_lines(path)]
  return {plural.strip().lower(): singular.strip().lower() for singular, plural in pairs}


def wanted(tokens: Sequence[Token]) -> list[Wanted]:
  """The counted objects of a prompt: a number word followed by a noun of one or two words.

  A noun in the singular counts once, whatever number precedes it.
  """
  texts = [token.text for token in tokens]
  plurals, singulars = nouns(), set(nouns().values())
  found = []
  for i, word in enumerate(texts):
    if word not in NUMBERS:
      continue
    for noun in (' '.join(texts[i + 1 : i + 3]), ' '.join(texts[i + 1 : i + 2])):
      if noun in singulars and (word in ONE or noun not in plurals):
        found.append(Wanted(noun, 1))
        break
      if noun in plurals:
        found.append(Wanted(plurals[noun], NUMBERS[word]))
        break
  return found


def distinct(detections: Sequence[Detection]) -> list[str]:
  """The labels of the detections, without boxes that show an object a second time."""
  kept = []
  for detection in detections:
    if not any(d.label == detection.label and _same(detection.box, d.box) for d in kept):
      kept.append(detection)
  return [detection.label for detection in kept]


def _same(a, b) -> bool:
  """Whether two boxes show one object. Last pixels count (+1)."""
  width = max(0, min(a[2], b[2]) - max(a[0], b[0]) + 1)
  height = max(0, min(a[3], b[3]) - max(a[1], b[1]) + 1)
  shared = width * height
  areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
  return any(shared / area > SAME for area in (*areas, sum(areas) - shared))


def score(things: Sequence[Wanted], labels: Sequence[str]) -> float:
  """An image's score from 0 to 1; 0 if the prompt counts nothing.

  labels: from `distinct`. A label that only contains the noun (`dining table`) counts as the noun
  if no label is the noun itself.
  """
  labels = list(labels)
  total = 0.0
  for thing in things:
    noun = LABELS.get(thing.noun, thing.noun)
    if noun not in labels:
      labels = [noun if noun in label else label for label in labels]
    found = labels.count(noun)
    total += (0.5 * (found > 0) + 0.5 * (found == thing.count and found > 0)) / len(things)
  return total
