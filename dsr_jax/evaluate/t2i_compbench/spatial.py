"""The 2D spatial score: are two objects present, and are they placed as the prompt says? (spatial;
a part of complex)

Source: Karine-Huang/T2I-CompBench, commit 1b70949, UniDet_eval/2D_spatial_eval.py. Boxes are
[x1, y1, x2, y2], y down, in pixels of the image that the detector saw. Its short side is 479
(`RESIZED`), and the 150 pixels (`NEAR`) refer to that size, whatever size was drawn.
"""

from collections.abc import Sequence
from typing import NamedTuple

from dsr_jax.evaluate.t2i_compbench.words import Token, span

RESIZED = 479
NEAR = 150
MOST_OVERLAP = 0.1
LEAST_SCORE = 0.5  # lower scores become 0

# Searched for in the prompt in this order, anywhere: `nearby` contains `near`. The last one has no
# rule, so a prompt with `on top of` scores 0 whatever is drawn (except at confidence 1).
RELATIONS = (
  'on side of',
  'next to',
  'near',
  'on the left of',
  'on the right of',
  'on the bottom of',
  'on the top of',
  'on top of',
)
NEARBY = ('next to', 'on side of', 'near')
# In complex prompts, nouns come from both sides of these.
PREPOSITIONS = (
  'on top of',
  'on bottom of',
  'on the left',
  'on the right',
  'next to',
  'on side of',
  'near',
)
PEOPLE = ('girl', 'boy', 'man', 'woman')


class Detection(NamedTuple):
  """A labeled box and its score, above the detector's threshold, in the detector's order."""

  label: str
  box: tuple[float, float, float, float]
  score: float


class Pair(NamedTuple):
  """The labels of the two objects that a prompt relates; None if it does not relate two."""

  first: str | None
  second: str | None


def relation_in(prompt: str) -> str | None:
  """The first of `RELATIONS` that occurs in the prompt."""
  return next((relation for relation in RELATIONS if relation in prompt), None)


def simple_pair(tokens: Sequence[Token]) -> Pair:
  """The first and the last noun, which are the same if there is only one.

  Without a noun there is no pair; the original raises an error in this case.
  """
  nouns = [token.text for token in tokens if token.pos == 'NOUN']
  return _labels(nouns[0], nouns[-1]) if nouns else Pair(None, None)


def complex_pair(tokens: Sequence[Token]) -> Pair:
  """The nouns around the prepositions of a complex prompt, if there are two in all."""
  found = []
  for start in range(len(tokens)):
    length = next((n for n in (3, 2, 1) if span(tokens, start, n) in PREPOSITIONS), None)
    if length:
      found += _noun_before(tokens, start) + _noun_after(tokens, start + length)
  return _labels(*found) if len(found) == 2 else Pair(None, None)


def _noun_before(tokens, start):
  for token in reversed(tokens[:start]):
    if token.pos in ('NOUN', 'PROPN'):
      return [token.text]
  return []


def _noun_after(tokens, start):
  """The first noun; without one, the first proper noun followed by a token that is not one."""
  for token in tokens[start:]:
    if token.pos == 'NOUN':
      return [token.text]
  for token, following in zip(tokens[start:], tokens[start + 1 :]):
    if token.pos == 'PROPN' and following.pos != 'PROPN':
      return [token.text]
  return []


def _labels(first, second):
  return Pair(*('person' if noun in PEOPLE else noun for noun in (first, second)))


def position_score(relation: str | None, box1: Sequence[float], box2: Sequence[float]) -> float:
  """How well the position of box1 relative to box2 satisfies the relation, from 0 to 1."""
  # Centers first, then their difference: in another order, equal boxes would get a distance of
  # 1e-14 and thereby a relation.
  dx = (box2[0] + box2[2]) / 2 - (box1[0] + box1[2]) / 2
  dy = (box2[1] + box2[3]) / 2 - (box1[1] + box1[3]) / 2
  if relation in NEARBY:
    far = abs(dx) >= NEAR and abs(dy) >= NEAR
    return NEAR / max(abs(dx), abs(dy)) if far else 1.0
  holds = {
    'on the left of': dx > 0 and abs(dx) > abs(dy),
    'on the right of': dx < 0 and abs(dx) > abs(dy),
    'on the top of': dy > 0 and abs(dy) > abs(dx),
    'on the bottom of': dy < 0 and abs(dy) > abs(dx),
  }.get(relation, False)
  if not holds:
    return 0.0
  overlap = iou(box1, box2)
  return 1.0 if overlap < MOST_OVERLAP else MOST_OVERLAP / overlap


def iou(a: Sequence[float], b: Sequence[float]) -> float:
  """Intersection over union of two boxes; 0 if neither has an area."""
  width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
  height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
  shared = width * height
  union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
  return shared / union if union else 0.0


def score(prompt: str, pair: Pair, detections: Sequence[Detection]) -> float:
  """An image's score: a quarter for the confidence in each object, half for the relation.

  Labels must be equal; of several boxes with a label, the first counts. One object alone reaches a
  quarter and therefore scores 0.
  """
  by_label = {}
  for detection in detections:
    by_label.setdefault(detection.label, detection)
  first, second = by_label.get(pair.first), by_label.get(pair.second)
  total = sum(0.25 * found.score for found in (first, second) if found)
  if first and second:
    total += position_score(relation_in(prompt), first.box, second.box) / 2
  return total if total >= LEAST_SCORE else 0.0
