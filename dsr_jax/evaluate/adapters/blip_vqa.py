"""BLIP-VQA as T2I-CompBench uses it: the probability of yes at the first word of the answer.

Two things that the processor of transformers does otherwise: the question begins with [ENC], not
[CLS]; and the official scorer reads pictures of 480 x 480. The checkpoint of transformers was
converted to 384, so 384 is the size without interpolation, and 480 is near the original, not equal
to it. The size stands in the results.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image
import torch
from transformers import AutoTokenizer, BlipForQuestionAnswering

from dsr_jax.errors import InputError
from dsr_jax.evaluate.adapters import loading
from dsr_jax.evaluate.adapters.clip import MEAN, STD
from dsr_jax.evaluate.protocol import Label
from dsr_jax.evaluate.t2i_compbench import binding

ARCHITECTURES = ('BlipForQuestionAnswering',)
DEFAULT = 'Salesforce/blip-vqa-capfilt-large'
LABEL = Label.OTHER_MODEL


def prepare(picture: Image.Image, size: int) -> torch.Tensor:
  """(3, size, size), squashed, bicubic, normalized."""
  resized = picture.convert('RGB').resize((size, size), Image.Resampling.BICUBIC)
  values = np.asarray(resized, np.float32) / 255
  values = (values - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
  return torch.from_numpy(values).permute(2, 0, 1)


class BlipVqa:
  """Asks whether things are in pictures."""

  def __init__(self, name: str = DEFAULT, device: str | None = None, size: int | None = None):
    """size: of the pictures; by default the checkpoint's own, 384. 480 is interpolated."""
    directory = loading.find(name, ARCHITECTURES)
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
        f'found a vocabulary of {self._model.config.text_config.vocab_size} in {name}; expected '
        "BLIP's, with [DEC] and [ENC]; name a BLIP that answers questions"
      )

  def tokens(self, texts: Sequence[str]):
    """Ids (N, T) and mask (N, T) of questions as the original gives them to its encoder."""
    tokens = self._tokenizer(
      list(texts),
      padding='longest',
      truncation=True,
      max_length=binding.MOST_TOKENS,
      return_tensors='pt',
    )
    tokens['input_ids'][:, 0] = binding.ENCODER_START
    return tokens['input_ids'].to(self._device), tokens['attention_mask'].to(self._device)

  def __call__(self, picture: Image.Image, questions: Sequence[str]) -> list[str]:
    """The answers to `binding.questions` of one picture, four decimals each."""
    return [binding.answer(yes, no) for yes, no in self.chances(picture, questions)]

  @torch.no_grad()
  def chances(self, picture: Image.Image, questions: Sequence[str]) -> list[tuple[float, float]]:
    """The probabilities of yes and of no, a pair a question."""
    if not questions:
      return []
    ids, mask = self.tokens([binding.model_text(question) for question in questions])
    pixels = prepare(picture, self.size)[None].to(self._device)
    seen = self._model.vision_model(
      pixel_values=pixels, interpolate_pos_encoding=self._interpolate
    ).last_hidden_state
    seen = seen.expand(len(questions), -1, -1)
    asked = self._model.text_encoder(
      input_ids=ids,
      attention_mask=mask,
      encoder_hidden_states=seen,
      encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=self._device),
    )[0]
    return [
      self._first_word(states[None, :length])
      for states, length in zip(asked, mask.sum(-1).tolist())
    ]

  def _first_word(self, states: torch.Tensor) -> tuple[float, float]:
    """states (1, T, D) of a question -> the probabilities of yes and of no.

    One question at a time, without padding: the cross-attention of BLIP in transformers 5.23 drops
    its mask, so that padding would be attended.
    """
    start = torch.full((1, 1), binding.DECODER_START, device=self._device)
    logits = self._model.text_decoder(input_ids=start, encoder_hidden_states=states).logits[0, 0]
    yes, no = logits.float().softmax(-1)[[binding.YES, binding.NO]].tolist()
    return yes, no
