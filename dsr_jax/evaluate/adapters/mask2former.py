"""GenEval's detector: Mask2Former, with GenEval's own pre- and post-processing.

The official scorer uses mmdet's weights for the same architecture; the weights for transformers
come from another training run, so scores differ a little. The processing is exact: mmdet's test
pipeline (short side 800, long side at most 1333, aspect ratio kept; padded with gray to multiples
of 32; normalized) and its instance post-processing. The checkpoint's own processor resizes to
384 x 384 and gives other masks and scores.

Axes: Q queries, K classes, N detections, H W pixels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
import torch
import torch.nn.functional as F
from transformers import Mask2FormerForUniversalSegmentation

from dsr_jax.errors import InputError
from dsr_jax.evaluate import geneval
from dsr_jax.evaluate.adapters import loading
from dsr_jax.evaluate.overlap import parts_of
from dsr_jax.evaluate.protocol import Label

LABEL = Label.OTHER_MODEL

SHORT_SIDE, LONG_SIDE, DIVISOR = 800, 1333, 32
GREY = 128
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
MOST = 100  # (query, class) pairs per image


class Ready(NamedTuple):
  """The model's input: pixels (1, 3, H, W), padded, and the image's size without padding."""

  pixels: torch.Tensor
  height: int
  width: int


def prepare(picture: Image.Image, short: int = SHORT_SIDE, long: int = LONG_SIDE) -> Ready:
  """mmdet's test pipeline. Bilinear without smoothing, rounded to steps of 1/255, as in OpenCV."""
  width, height = picture.size
  scale = min(long / max(width, height), short / min(width, height))
  size = int(height * scale + 0.5), int(width * scale + 0.5)
  values = np.array(picture.convert('RGB'), np.float32)  # (H, W, 3)
  pixels = torch.from_numpy(values).permute(2, 0, 1)[None]
  pixels = F.interpolate(pixels, size=size, mode='bilinear', align_corners=False).round()
  below, beside = -size[0] % DIVISOR, -size[1] % DIVISOR
  pixels = F.pad(pixels, (0, beside, 0, below), value=GREY)
  mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
  return Ready((pixels - mean) / std, *size)


def instances(
  class_logits: torch.Tensor,
  mask_logits: torch.Tensor,
  ready: Ready,
  size: tuple[int, int],
) -> list[tuple[int, geneval.Detection]]:
  """mmdet's instance post-processing of one image.

  Args:
    class_logits: (Q, K + 1), the last being "no object".
    mask_logits: (Q, h, w), of the padded image.
    ready: the model's input.
    size: (height, width) of the image itself.

  Returns:
    (class, detection) of up to 100 pairs; one query may give several classes. A score is the
    probability of the class times the mean probability inside the mask; a box encloses the mask,
    its far corner one pixel beyond it.
  """
  padded = tuple(ready.pixels.shape[-2:])
  masks = F.interpolate(mask_logits[None], size=padded, mode='bilinear', align_corners=False)
  masks = masks[:, :, : ready.height, : ready.width]
  masks = F.interpolate(masks, size=size, mode='bilinear', align_corners=False)[0]
  probabilities = class_logits.softmax(-1)[:, :-1]
  classes = probabilities.shape[-1]
  scores, places = probabilities.flatten().topk(min(MOST, probabilities.numel()))
  shapes = {}  # by query, because a query may give several classes
  found = []
  for score, place in zip(scores, places.tolist()):
    query, number = divmod(place, classes)
    if query not in shapes:
      shapes[query] = _shape(masks[query])
    box, certainty, mask = shapes[query]
    detection = geneval.Detection(box, np.float32((score * certainty).item()), mask)
    found.append((number, detection))
  return found


def _shape(logits: torch.Tensor) -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
  """Logits (H, W) of a query -> its box, the mean probability inside its mask, and the mask."""
  inside = logits > 0
  certainty = (logits.sigmoid() * inside).sum() / (inside.sum() + 1e-6)
  return _box(inside), certainty, inside.cpu().numpy()


def _box(mask: torch.Tensor) -> np.ndarray:
  """(4,) float32; zeros if the mask is empty."""
  rows, columns = (torch.where(mask.any(dim=axis))[0] for axis in (1, 0))
  if not len(rows):
    return np.zeros(4, np.float32)
  return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


class Mask2Former:
  """Finds objects in images."""

  def __init__(
    self,
    name: str,
    device: str | None = None,
    names: Sequence[str] | None = None,
    sides: tuple[int, int] = (SHORT_SIDE, LONG_SIDE),
  ):
    """names: of the classes, in the model's order; by default GenEval's. sides: short and long."""
    directory = loading.find(name, Mask2FormerForUniversalSegmentation)
    self.names = tuple(names or geneval.object_names())
    self.about = loading.about(name, directory, {'sides': sides, 'padding': GREY})
    self._device = device or loading.best_device()
    self._sides = sides
    self._model = loading.load(Mask2FormerForUniversalSegmentation, directory, self._device)
    if self._model.config.num_labels != len(self.names):
      raise InputError(
        f'{name} has {self._model.config.num_labels} classes instead of the {len(self.names)} of '
        'COCO; name a detector trained on COCO instances'
      )

  def __call__(self, pictures: Sequence[Image.Image]) -> list[dict[str, list[geneval.Detection]]]:
    """{class: detections} for each image, before any threshold.

    Only images of one size share a batch: padding images to a common size would change what is
    found in them.
    """
    ready = [prepare(picture, *self._sides) for picture in pictures]
    by_shape = {}
    for place, one in enumerate(ready):
      by_shape.setdefault(one.pixels.shape, []).append(place)
    found = {}
    for places in by_shape.values():
      for part in parts_of(places, loading.PICTURES):
        found |= zip(part, self._together([ready[i] for i in part], [pictures[i] for i in part]))
    return [found[place] for place in range(len(pictures))]

  @torch.no_grad()
  def _together(self, ready, pictures):
    """The detections in images whose pixels have one shape."""
    out = self._model(pixel_values=torch.cat([one.pixels for one in ready]).to(self._device))
    rows = zip(out.class_queries_logits.float(), out.masks_queries_logits.float(), ready, pictures)
    for classes, masks, one, picture in rows:
      found = {}
      for place, detection in instances(classes, masks, one, (picture.height, picture.width)):
        found.setdefault(self.names[place], []).append(detection)
      yield found
