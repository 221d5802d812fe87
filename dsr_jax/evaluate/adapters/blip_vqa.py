"""BLIP-VQA as T2I-CompBench uses it: the probability of yes as the first word of the answer.

This differs from the processor of transformers in two ways: the question begins with [ENC], not
[CLS], and the official scorer reads images of 480 x 480. The checkpoint for transformers was
converted to 384, so 384 needs no interpolation, and 480 is close to the original but not equal to
it. The results record the size.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image
import torch
from transformers import AutoTokenizer, BlipForQuestionAnswering

from dsr_jax.errors import InputError
from dsr_jax.evaluate.adapters import loading
from dsr_jax.evaluate.adapters.clip import MEAN, STD
from dsr_jax.evaluate.overlap import parts_of
from dsr_jax.evaluate.protocol import Label
from dsr_jax.evaluate.t2i_compbench import binding

LABEL = Label.OTHER_MODEL
QUESTIONS = 64  # asked at a time


def prepare(picture: Image.Image, size: int) -> torch.Tensor:
  """(3, size, size), resized without keeping the aspect ratio, bicubic, normalized."""
  resized = picture.convert('RGB').resize((size, size), Image.Resampling.BICUBIC)
  values = np.asarray(resized, np.float32) / 255
  values = (values - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
  return torch.from_numpy(values).permute(2, 0, 1)


class BlipVqa:
  """Asks whether objects are in images."""

  def __init__(self, name: str, device: str | None = None, size: int | None = None):
    """size: of the images; by default the checkpoint's own, 384. 480 needs interpolation."""
    directory = loading.find(name, BlipForQuestionAnswering)
    self._device = device or loading.best_device()
    self._model = loading.load(BlipForQuestionAnswering, directory, self._device)
    self._tokenizer = AutoTokenizer.from_pretrained(directory)
    own = self._model.config.vision_config.image_size
    self.size = size or own
    self._interpolate = self.size != own
    settings = {'size': self.size, 'interpolated': self._interpolate}
    self.about = loading.about(name, directory, settings)
    if self._model.config.text_config.vocab_size <= binding.ENCODER_START:
      raise InputError(
        f'{name} has a vocabulary of {self._model.config.text_config.vocab_size}, too small for '
        "BLIP's [DEC] and [ENC]; name a BLIP that answers questions"
      )

  def tokens(self, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of questions as in the original's encoder."""
    rows = self._tokenizer(list(texts), truncation=True, max_length=binding.MOST_TOKENS)
    return [[binding.ENCODER_START, *ids[1:]] for ids in rows['input_ids']]

  def __call__(
    self, pictures: Sequence[Image.Image], questions: Sequence[Sequence[str]]
  ) -> list[list[str]]:
    """The answers to each image's `binding.questions`, four decimals each."""
    return [
      [binding.answer(yes, no) for yes, no in chances]
      for chances in self.chances(pictures, questions)
    ]

  @torch.no_grad()
  def chances(
    self, pictures: Sequence[Image.Image], questions: Sequence[Sequence[str]]
  ) -> list[list[tuple[float, float]]]:
    """The probabilities of yes and of no, one pair per question of each image.

    Questions with the same number of tokens are asked together, so that none is padded: BLIP's
    cross-attention in transformers 5.23 drops its mask and would attend to padding.
    """
    asked = [place for place, texts in enumerate(questions) if texts]
    if not asked:
      return [[] for _ in questions]
    pixels = torch.stack([prepare(pictures[place], self.size) for place in asked])
    seen = self._model.vision_model(
      pixel_values=pixels.to(self._device), interpolate_pos_encoding=self._interpolate
    ).last_hidden_state
    shown = dict(zip(asked, seen))
    found = [[(0.0, 0.0)] * len(texts) for texts in questions]
    by_length = {}
    for place in asked:
      ids = self.tokens([binding.model_text(question) for question in questions[place]])
      for number, row in enumerate(ids):
        by_length.setdefault(len(row), []).append((place, number, row))
    for members in by_length.values():
      for part in parts_of(members, QUESTIONS):
        chances = self._first_words(
          torch.tensor([ids for _, _, ids in part], device=self._device),
          torch.stack([shown[place] for place, _, _ in part]),
        )
        for (place, number, _), pair in zip(part, chances):
          found[place][number] = pair
    return found

  def _first_words(self, ids: torch.Tensor, seen: torch.Tensor) -> list[tuple[float, float]]:
    """Questions (N, T) without padding about images (N, P, D): the probabilities of yes and of
    no as the first word of each answer.
    """
    asked = self._model.text_encoder(input_ids=ids, encoder_hidden_states=seen)[0]
    start = torch.full((len(ids), 1), binding.DECODER_START, device=self._device)
    logits = self._model.text_decoder(input_ids=start, encoder_hidden_states=asked).logits[:, 0]
    return [tuple(row) for row in logits.float().softmax(-1)[:, [binding.YES, binding.NO]].tolist()]
