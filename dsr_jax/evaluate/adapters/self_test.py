"""Tests whether the detector works at all, on three photos of known objects, before any scoring.

On some GPUs, and with weights that do not match the code, the official detector finds nothing in
any image, and every score is 0 (djghosh13/geneval, issues 6, 8 and 15).
"""

from collections.abc import Callable, Mapping, Sequence
import os
from typing import NamedTuple

from PIL import Image

from dsr_jax import files, images
from dsr_jax.errors import InputError
from dsr_jax.evaluate import geneval

DIRECTORY = os.path.join(
  os.path.dirname(os.path.dirname(os.path.dirname(__file__))), 'data', 'detector_photos'
)
NOTHING = 0.3  # if no photo's object scores higher, the detector is broken
CERTAIN = 0.9  # a working detector reaches this

# Images -> {class: detections} for each.
Detector = Callable[[Sequence[Image.Image]], Sequence[Mapping[str, Sequence[geneval.Detection]]]]


class Found(NamedTuple):
  """The best score for a photo's object."""

  photo: str
  name: str
  score: float


def photos() -> dict[str, str]:
  """{file: the object in the photo}."""
  rows = files.read_json(os.path.join(DIRECTORY, 'photos.json'))['photos']
  return {row['file']: row['object'] for row in rows}


def look(detector: Detector) -> list[Found]:
  """The detector's result for each photo."""
  shown = photos()
  found = detector([images.load_image(os.path.join(DIRECTORY, file)) for file in shown])
  return [
    Found(file, name, max((float(d.score) for d in detections.get(name, [])), default=0.0))
    for (file, name), detections in zip(shown.items(), found)
  ]


def check(found: Sequence[Found], detector: str) -> list[str]:
  """Warnings for the results, one per photo whose object has a low score.

  Errors: InputError if no object is found in any photo.
  """
  names = ', a '.join(item.name for item in found)
  if all(item.score <= NOTHING for item in found):
    best = max(found, key=_score)
    raise InputError(
      f'the detector {detector} found no object above {NOTHING} in the photos of its self-test '
      f'(best: {best.name}, {best.score:.2f}), which show a {names}; check its weights, or try '
      'another device'
    )
  return [
    f'self-test: {detector} detects the {item.name} in {item.photo} at {item.score:.2f}, below '
    f'{CERTAIN}'
    for item in found
    if item.score < CERTAIN
  ]


def _score(item):
  return item.score
