"""Additional batch fields, for rewards that need more than prompts and images. To add one, write
a function and add a line to `FIELDS`.

The fields are in `extra` of a task's half of a batch, (B, ...) each, or in `Batch.shared`, with one
axis.
Axes: B inputs, M hard negatives, T tokens, H W pixels, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dsr_jax.convert import clip
from dsr_jax.data import prompts as prompts_lib
from dsr_jax.data import swaps

NEGATIVES = 3  # per prompt


class Rows(NamedTuple):
  """The inputs of one task in a step.

  data: the texts of the prompts, or the images, of the whole data set. items: indices of these
  inputs.
  following: indices of the input after each one, in the order of the run. prompt_length: tokens of
  the longest prompt.
  """

  data: Any
  items: list[int]
  following: list[int]
  processor: Any
  method: Any
  prompt_length: int


class Field(NamedTuple):
  """A field's arrays for prompts and for images (functions Rows -> {name: (B, ...)}), and for
  every batch (a function of (processor, method)).

  identity: method -> a text that changes if the field's own files change; it must be the same in a
  resumed run.
  """

  prompts: Callable | None = None
  pictures: Callable | None = None
  whole: Callable | None = None
  identity: Callable | None = None


def _negative_prompts(rows: Rows):
  # Words of a kind usually have the same number of tokens, but not in every tokenizer: leave some
  # room, and truncate longer texts, only in negatives.
  room = rows.prompt_length + 8

  def encode(text):
    return list(rows.processor.encode_prompt(text))[:room]

  encoded = [
    encode(text)
    for item, after in zip(rows.items, rows.following)
    for text in swaps.negatives(rows.data[item], NEGATIVES, rows.data[after])
  ]
  ids, mask = prompts_lib.pad(encoded, room, rows.processor.templates.pad_id)
  return {
    'negative_ids': ids.reshape(-1, NEGATIVES, room),
    'negative_mask': mask.reshape(-1, NEGATIVES, room),
  }


def _negative_pictures(rows: Rows):
  return {'negative_pixels': rows.data.take(rows.following)[:, None]}


def _other_prompts(rows: Rows):
  ids, mask = prompts_lib.pad(
    [list(rows.processor.encode_prompt(rows.data[i])) for i in rows.following],
    rows.prompt_length,
    rows.processor.templates.pad_id,
  )
  return {'other_ids': ids, 'other_mask': mask}


def _other_pictures(rows: Rows):
  return {'other_pixels': rows.data.take(rows.following)}


def _clip_prompts(rows: Rows):
  texts = [rows.data[i] for i in rows.items]
  return {'clip_ids': clip.encode(rows.method.clip_reward.model, texts)}


def _clip_identity(method):
  return clip.digest(method.clip_reward.model)


def _yes_question(processor, method):
  before, after = method.yes_question.split('{}')

  def ids(text):
    return np.array(processor.encode_question(text), np.int32)

  def word(text):
    return np.array(processor.encode_answer(text)[:-1], np.int32)  # without EOS

  return {
    'yes_before': ids(before),
    'yes_after': ids(after),
    'answer_yes': word('yes'),
    'answer_no': word('no'),
  }


def _vocabulary(processor, method):
  """The text of every token, for host code that reads samples: concatenated bytes, and the end of
  each token.
  """
  del method
  tokenizer = processor.tokenizer
  special = set(tokenizer.all_special_ids)
  words = [
    b'' if i in special else tokenizer.decode([i], clean_up_tokenization_spaces=False).encode()
    for i in range(len(tokenizer))
  ]
  return {
    'token_bytes': np.frombuffer(b''.join(words), np.uint8),
    'token_ends': np.cumsum([len(w) for w in words]).astype(np.int32),
  }


FIELDS = {
  'negatives': Field(prompts=_negative_prompts, pictures=_negative_pictures),
  'others': Field(prompts=_other_prompts, pictures=_other_pictures),
  'swapped_prompts': Field(prompts=_negative_prompts),
  'clip': Field(prompts=_clip_prompts, identity=_clip_identity),
  'yes_question': Field(whole=_yes_question),
  'vocabulary': Field(whole=_vocabulary),
}
