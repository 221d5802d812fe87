"""Does the detector work at all? Three photos of known objects are looked at before any score.

On some GPUs, and with weights that do not fit the code, the official detector finds nothing in any
image, and every score is 0 (djghosh13/geneval, issues 6, 8 and 15).
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
NOTHING = 0.3  # nothing above it in any photo: the detector is broken
CERTAIN = 0.9  # what a sound one reaches

# Images -> of each {class: detections}.
Detector = Callable[[Sequence[Image.Image]], Sequence[Mapping[str, Sequence[geneval.Detection]]]]


class Found(NamedTuple):
  """The best score of a photo's object."""

  photo: str
  name: str
  score: float


def photos() -> dict[str, str]:
  """{file: the object in it}."""
  rows = files.read_json(os.path.join(DIRECTORY, 'photos.json'))['photos']
  return {row['file']: row['object'] for row in rows}


def look(detector: Detector) -> list[Found]:
  """What the detector makes of each photo."""
  shown = photos()
  found = detector([images.load_image(os.path.join(DIRECTORY, file)) for file in shown])
  return [
    Found(file, name, max((float(d.score) for d in detections.get(name, [])), default=0.0))
    for (file, name), detections in zip(shown.items(), found)
  ]


def check(found: Sequence[Found], detector: str) -> list[str]:
  """Warnings for the results, one a photo whose object is uncertain.

  Errors: InputError if no object is found in any photo.
  """
  names = ', a '.join(item.name for item in found)
  if all(item.score <= NOTHING for item in found):
    best = max(found, key=_score)
    raise InputError(
      f'found no object above {NOTHING} in the photos of the self-test with {detector} (best: '
      f'{best.name}, {best.score:.2f}); expected a {names}; check its weights, or try another '
      'device'
    )
  return [
    f'self-test: {detector} sees the {item.name} of {item.photo} at {item.score:.2f}, below '
    f'{CERTAIN}'
    for item in found
    if item.score < CERTAIN
  ]


def _score(item):
  return item.score
