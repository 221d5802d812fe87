"""CLIP as GenEval and T2I-CompBench use it: the color of a cut-out object, and the cosine of an
image and a text.

Images are prepared as in open_clip and OpenAI's own code: the short side is resized to the model's
size, bicubic, and the center is cropped, which loses the ends of long objects.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
import torch
from transformers import AutoTokenizer, CLIPModel

from dsr_jax.evaluate import geneval
from dsr_jax.evaluate.adapters import loading
from dsr_jax.evaluate.overlap import parts_of
from dsr_jax.evaluate.pictures import Object
from dsr_jax.evaluate.protocol import Label

AT_ONCE = 64  # images

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class Shape(NamedTuple):
  """Identifies one of OpenAI's CLIPs: patch size, width of the tower, width of the features."""

  patch: int
  width: int
  features: int


COLOR_SHAPE = Shape(14, 1024, 768)  # ViT-L/14
SCORE_SHAPE = Shape(32, 768, 512)  # ViT-B/32


def prepare(picture: Image.Image, size: int) -> torch.Tensor:
  """(3, size, size), normalized."""
  width, height = picture.size
  if width <= height:
    resized = size, int(size * height / width)
  else:
    resized = int(size * width / height), size
  picture = picture.convert('RGB').resize(resized, Image.Resampling.BICUBIC)
  left, top = (int(round((side - size) / 2)) for side in resized)
  cut = picture.crop((left, top, left + size, top + size))
  values = np.asarray(cut, np.float32) / 255
  values = (values - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
  return torch.from_numpy(values).permute(2, 0, 1)


def cut_out(picture: Image.Image, detection: geneval.Detection) -> Image.Image:
  """An object alone: pixels outside its mask become gray, and the image is cropped to its box."""
  picture = picture.convert('RGB')
  if detection.mask is not None:
    blank = Image.new('RGB', picture.size, color=geneval.BACKGROUND)
    picture = Image.composite(picture, blank, Image.fromarray(detection.mask))
  return picture.crop([float(x) for x in detection.box])


class Clip:
  """Features of images and texts."""

  def __init__(self, name: str, device: str | None = None):
    directory = loading.find(name, CLIPModel)
    self.about = loading.about(name, directory, {})
    self._device = device or loading.best_device()
    self._model = loading.load(CLIPModel, directory, self._device)
    self._tokenizer = AutoTokenizer.from_pretrained(directory)
    vision = self._model.config.vision_config
    self.size = vision.image_size
    self.shape = Shape(vision.patch_size, vision.hidden_size, self._model.config.projection_dim)

  def label(self, official: Shape) -> Label:
    """OFFICIAL if the model has the shape of the official scorer's model."""
    return Label.OFFICIAL if self.shape == official else Label.OTHER_MODEL

  @torch.no_grad()
  def pictures(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
    """(N, features), normalized; at least one image."""
    features = []
    for part in parts_of(pictures, AT_ONCE):
      pixels = torch.stack([prepare(picture, self.size) for picture in part]).to(self._device)
      features.append(self._model.get_image_features(pixel_values=pixels).pooler_output)
    return _normalized(torch.cat(features))

  @torch.no_grad()
  def texts(self, texts: Sequence[str]) -> torch.Tensor:
    """(N, features), normalized; texts longer than the model's context are truncated."""
    tokens = self._tokenizer(
      list(texts),
      padding=True,
      truncation=True,
      max_length=self._model.config.text_config.max_position_embeddings,
      return_tensors='pt',
    ).to(self._device)
    features = self._model.get_text_features(
      input_ids=tokens['input_ids'], attention_mask=tokens['attention_mask']
    ).pooler_output
    return _normalized(features)

  def cosines(self, pictures: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
    """T2I-CompBench's CLIPScore of N pairs: neither scaled nor clipped at 0."""
    return (self.pictures(pictures) * self.texts(texts)).sum(-1).tolist()


class ColorClassifier:
  """GenEval's colors of objects."""

  def __init__(self, clip: Clip):
    self._clip = clip
    self._classifiers = {}

  def classifier(self, name: str) -> torch.Tensor:
    """(10, features): the text feature of each color, the mean over three templates."""
    if name not in self._classifiers:
      rows = []
      for color in geneval.COLORS:
        texts = [t.format(color=color, name=name) for t in geneval.COLOR_TEMPLATES]
        rows.append(_normalized(self._clip.texts(texts).mean(0)))
      self._classifiers[name] = torch.stack(rows)
    return self._classifiers[name]

  def __call__(self, objects: Sequence[Object]) -> list[str]:
    """The color of each object."""
    if not objects:
      return []
    features = self._clip.pictures([cut_out(o.picture, o.detection) for o in objects])
    classifiers = torch.stack([self.classifier(o.name) for o in objects])
    places = torch.einsum('nf,ncf->nc', features, classifiers).argmax(-1)
    return [geneval.COLORS[place] for place in places.tolist()]


def _normalized(features):
  return features / features.norm(dim=-1, keepdim=True)
