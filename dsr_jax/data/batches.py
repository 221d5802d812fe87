"""Batches of prompts and pictures as a pure function of (seed, step), in fixed shapes.

Axes: B prompts, and as many pictures, a step; Tp / Tq / Ti tokens of prompts / the question / the instruction; H = W
pixels.

    batches = make(config.data, config.method, processor, image_size=32)
    batches.at(step)   # the same arrays whenever and wherever it is asked
"""

import hashlib
import os

import numpy as np

from dsr_jax.data import images as images_lib
from dsr_jax.data import order
from dsr_jax.data import prompts as prompts_lib
from dsr_jax.errors import InputError
from dsr_jax.scenes import sets
from dsr_jax.scenes import world

NAMED_PROMPTS = ('scenes', 't2i_compbench')
NAMED_PICTURES = ('scenes',)


def make(data, method, processor, image_size: int) -> 'Batches':
  """Batches of a run.

  Args:
    data: `config.Data`: prompts ('scenes', 't2i_compbench' or a file with a line a prompt), images ('scenes' or a
      folder), max_prompt_tokens.
    method: `config.Method`: tasks, inputs_per_task (B), seed (of the order and of all sampling), crop, question
      (asked for the sampled texts), instruction (stands before the prompt when its likelihood is scored).
    processor: `processor.Processor`; only its encode_* methods and templates are used.
    image_size: side of the model's square pictures in pixels.
  """
  texts = _prompts(data.prompts, method.seed) if 'generation' in method.tasks else None
  pictures = _pictures(data.images, method.seed, image_size, method.crop) if 'understanding' in method.tasks else None
  return Batches(processor, texts, pictures, method.inputs_per_task, method.seed, method.instruction, method.question,
                 data.max_prompt_tokens)


def _prompts(name, seed):
  if name == 'scenes':
    return prompts_lib.Prompts(sets.reinforcement_prompts(seed), lambda i: f'prompt {i} of scenes')
  if name == 't2i_compbench':
    from dsr_jax.data import t2i_compbench  # TFDS takes seconds to import, so only who needs it pays
    return t2i_compbench.load()
  if not os.path.isfile(name):
    raise InputError(f'found no prompts {name}; expected one of {", ".join(NAMED_PROMPTS)}, or a text file with a line '
                     'a prompt; change data.prompts')
  return prompts_lib.Prompts.from_file(name)


def _pictures(name, seed, size, crop):
  if name == 'scenes':
    if size != world.IMAGE_SIZE:
      raise InputError(f'found a model of {size} x {size} pixels and data.images=scenes, whose pictures have '
                       f'{world.IMAGE_SIZE} x {world.IMAGE_SIZE}; expected pictures of its own size; name a folder in data.images')
    return images_lib.Pictures(sets.REINFORCEMENT_INPUTS, lambda i: sets.training_picture(seed, i), f'scenes {seed}')
  if not os.path.isdir(name):
    raise InputError(f'found no pictures {name}; expected one of {", ".join(NAMED_PICTURES)}, or a folder of images; '
                     'change data.images')
  return images_lib.Pictures.from_folder(name, size, crop)


class Batches:
  """See `make`. Every step has the same shapes; `fingerprint` (hex) tells the data of one run from another's."""

  def __init__(self, processor, prompts, pictures, inputs_per_task, seed, instruction, question, max_prompt_tokens):
    self._prompts, self._pictures, self._seed = prompts, pictures, seed
    self._inputs = inputs_per_task
    self._pad_id = processor.templates.pad_id
    if prompts is not None:
      self._rows = [prompts_lib.encode(prompts[i], processor.encode_prompt, max_prompt_tokens, prompts.where(i))
                    for i in range(len(prompts))]
      # The longest prompt there is: fixed over the run, and no step pays for tokens that no prompt has.
      self._prompt_length = max(map(len, self._rows))
      self._instruction = _one_row(instruction, processor.encode_question, 'instruction')
    if pictures is not None:
      self._question = _one_row(question, processor.encode_question, 'question')
    self.fingerprint = hashlib.sha256(
        '\n'.join(part.fingerprint() for part in (prompts, pictures) if part is not None).encode()).hexdigest()

  def sizes(self) -> dict[str, int]:
    """How many different prompts and pictures there are: {'prompts': n, 'pictures': m}, untrained tasks left out."""
    return {name: len(part) for name, part in (('prompts', self._prompts), ('pictures', self._pictures))
            if part is not None}

  def at(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, np.ndarray]:
    """The batch of step `step` (from 0), or its rows start to stop, of prompts and of pictures.

    Returns: prompt_ids (B, Tp) int32, prompt_mask (B, Tp) bool, instruction_ids (Ti,), instruction_mask (Ti,) for
      generation; pixels (B, H, W, 3) uint8, question_ids (B, Tq), question_mask (B, Tq) for understanding; the keys of
      an untrained task are absent; always seed, a uint32 of (seed, step).
    """
    stop = self._inputs if stop is None else stop
    batch = {'seed': order.step_seed(self._seed, step)}
    if self._prompts is not None:
      batch |= self.prompts_at(step, start, stop)
      batch['instruction_ids'], batch['instruction_mask'] = (
          row[0] for row in prompts_lib.pad([self._instruction], len(self._instruction), self._pad_id))
    if self._pictures is not None:
      batch |= self.pictures_at(step, start, stop)
    return batch

  def prompts_at(self, step: int, start: int, stop: int) -> dict[str, np.ndarray]:
    """Rows start to stop of the step's prompts: prompt_ids, prompt_mask (stop - start, Tp)."""
    first = step * self._inputs
    chosen = order.items(self._seed, order.PROMPTS, range(first + start, first + stop), len(self._prompts))
    ids, mask = prompts_lib.pad([self._rows[i] for i in chosen], self._prompt_length, self._pad_id)
    return {'prompt_ids': ids, 'prompt_mask': mask}

  def pictures_at(self, step: int, start: int, stop: int) -> dict[str, np.ndarray]:
    """Rows start to stop of the step's pictures: pixels (stop - start, H, W, 3), question_ids, question_mask."""
    first = step * self._inputs
    chosen = order.items(self._seed, order.PICTURES, range(first + start, first + stop), len(self._pictures))
    ids, mask = prompts_lib.pad([self._question] * len(chosen), len(self._question), self._pad_id)
    return {'pixels': self._pictures.take(chosen), 'question_ids': ids, 'question_mask': mask}

  def texts_at(self, step: int) -> list[str]:
    """The step's prompts (P) in words, for reports."""
    first = step * self._inputs
    chosen = order.items(self._seed, order.PROMPTS, range(first, first + self._inputs), len(self._prompts))
    return [self._prompts[i] for i in chosen]


def _one_row(text, encode, what):
  ids = list(encode(text))
  if not ids:
    raise InputError(f'found an empty {what}; expected at least one word; write one in method.{what}')
  return ids
