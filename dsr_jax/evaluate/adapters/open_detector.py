"""An open-vocabulary detector in place of UniDet, for T2I-CompBench's spatial and numeracy scores.

UniDet is not in transformers, and its wrapper's license forbids porting it. Another detector finds
other boxes with other confidences, so these numbers are not comparable with published ones, only
with each other: before and after, with the same detector.
"""

from collections.abc import Sequence

from PIL import Image
import torch
from transformers import AutoProcessor, Owlv2ForObjectDetection

from dsr_jax.evaluate.adapters import loading
from dsr_jax.evaluate.overlap import parts_of
from dsr_jax.evaluate.protocol import Label
from dsr_jax.evaluate.t2i_compbench import spatial

LABEL = Label.NOT_COMPARABLE
# Open-vocabulary confidences are lower: few would exceed UniDet's .5.
THRESHOLD = 0.3
LONGEST = 480  # side of the image in whose pixels the rules measure


class OpenDetector:
  """Finds named objects in images."""

  def __init__(self, name: str, device: str | None = None, threshold: float = THRESHOLD):
    directory = loading.find(name, Owlv2ForObjectDetection)
    self.about = loading.about(name, directory, {'threshold': threshold})
    self._device = device or loading.best_device()
    self._threshold = threshold
    self._model = loading.load(Owlv2ForObjectDetection, directory, self._device)
    self._processor = AutoProcessor.from_pretrained(directory)

  def __call__(
    self, pictures: Sequence[Image.Image], labels: Sequence[Sequence[str]]
  ) -> list[list[spatial.Detection]]:
    """The boxes for each image's labels, the most confident first, in pixels of the rules' size."""
    distinct = [list(dict.fromkeys(texts)) for texts in labels]
    asked = [place for place, texts in enumerate(distinct) if texts]
    found = {}
    for part in parts_of(asked, loading.PICTURES):
      found |= zip(part, self._together([pictures[i] for i in part], [distinct[i] for i in part]))
    return [found.get(place, []) for place in range(len(pictures))]

  @torch.no_grad()
  def _together(self, pictures, labels):
    """The boxes for each image's labels; each image has at least one label."""
    inputs = self._processor(
      text=[[f'a photo of a {label}' for label in texts] for texts in labels],
      truncation=True,
      images=[picture.convert('RGB') for picture in pictures],
      return_tensors='pt',
    ).to(self._device)
    out = self._model(**inputs)
    for logits, boxes, texts, picture in zip(out.logits, out.pred_boxes, labels, pictures):
      # An image with fewer labels than another was padded with blank labels at the end.
      logits = logits[:, : len(texts)]
      yield detections(logits, boxes, texts, rules_size(picture.size), self._threshold)


def rules_size(size: tuple[int, int]) -> tuple[int, int]:
  """(width, height) with a short side of 479, but no side above 480."""
  scale = min(spatial.RESIZED / min(size), LONGEST / max(size))
  return int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)


def detections(logits, boxes, labels, size, threshold) -> list[spatial.Detection]:
  """Each box with its most likely label, the most confident first.

  Args:
    logits: (N, labels).
    boxes: (N, 4), center and sides, as shares of a square with the image's longer side.
    labels: texts.
    size: (width, height) of the image in whose pixels boxes are returned.
    threshold: a confidence must exceed it.
  """
  scores, places = logits.float().sigmoid().max(-1)
  side = max(size)
  found = []
  for row in scores.argsort(descending=True).tolist():
    if scores[row] <= threshold:
      break
    x, y, width, height = (side * value for value in boxes[row].tolist())
    box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    found.append(spatial.Detection(labels[int(places[row])], box, float(scores[row])))
  return found
