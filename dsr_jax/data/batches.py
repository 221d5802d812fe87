"""Batches of prompts and images as a pure function of (seed, step), with fixed shapes.

Axes: B prompts, and B images, per step; Tp / Tq / Ti tokens of prompts / the question / the
instruction; H = W pixels.

    batches = make(config.data, config.method, processor, image_size=32)
    batches.at(step)   # always returns the same arrays, in any process
"""

import hashlib

import numpy as np

from dsr_jax.data import fields as fields_lib
from dsr_jax.data import held_out, mixtures, order, t2i_compbench
from dsr_jax.data import images as images_lib
from dsr_jax.data import prompts as prompts_lib
from dsr_jax.errors import InputError
from dsr_jax.models.unified import Text
from dsr_jax.rewards import table
from dsr_jax.rollouts import Batch, GenerationBatch, UnderstandingBatch
from dsr_jax.scenes import sets, world


def make(
  data,
  method,
  processor,
  image_size: int,
  fields: tuple[str, ...] = (),
  apart: held_out.Apart = held_out.NOTHING,
) -> 'Batches':
  """The batches of a run.

  Args:
    data: `config.Data`: the sources to read (`mixtures`), and max_prompt_tokens.
    method: `config.Method`: tasks, inputs_per_task (B), seed (for the order and all sampling),
      crop, question (which the sampled texts answer), instruction (precedes the prompt when its
      likelihood is scored).
    processor: `processor.Processor`; only its encode_* methods and templates are used.
    image_size: side of the model's square images in pixels.
    fields: names in `fields.FIELDS` of additional batch fields, beyond those that the reward
      declares.
    apart: the inputs held out for evaluation.
  """
  check(data, method)
  texts = pictures = None
  if 'generation' in method.tasks:
    texts = mixtures.prompts(data, method.seed, NAMED_PROMPTS, VALIDATION_PROMPTS, apart)
  if 'understanding' in method.tasks:
    pictures = mixtures.pictures(
      data, method.seed, image_size, method.crop, NAMED_PICTURES, VALIDATION_PICTURES, apart
    )
  declared = table.fields(method.reward)
  return Batches(
    processor,
    texts,
    pictures,
    method,
    data.max_prompt_tokens,
    tuple(dict.fromkeys((*declared, *fields))),
  )


# Data sets by name; to add one, write a function and add a line here.


def _scenes_prompts(seed):
  return prompts_lib.Prompts(sets.reinforcement_prompts(seed), lambda i: f'prompt {i} of scenes')


def _t2i_compbench(seed):
  del seed
  return t2i_compbench.load()


def _scenes_validation(number):
  prompts = [prompt.text for prompt in sets.mixed_prompts(number)]
  return prompts_lib.Prompts(prompts, lambda i: f'evaluation prompt {i} of scenes')


def _check_size(size):
  if size != world.IMAGE_SIZE:
    raise InputError(
      f'data.images=scenes has images of {world.IMAGE_SIZE} x {world.IMAGE_SIZE} pixels, which do '
      f'not fit a model of {size} x {size}; name a folder of images in data.images'
    )


def _scenes_pictures(seed, size):
  _check_size(size)
  return images_lib.Pictures(
    sets.REINFORCEMENT_INPUTS, lambda i: sets.training_picture(seed, i), f'scenes {seed}'
  )


def _scenes_validation_pictures(number, size):
  _check_size(size)
  shown = sets.pictures(sets.evaluation_scenes(number))
  return images_lib.Pictures(number, lambda i: shown[i], f'scenes evaluation {number}')


NAMED_PROMPTS = {'scenes': _scenes_prompts, 't2i_compbench': _t2i_compbench}  # seed -> Prompts
NAMED_PICTURES = {'scenes': _scenes_pictures}  # seed, side in pixels -> Pictures
# Their validation lists, with the requested number of items; never used for training.
VALIDATION_PROMPTS = {'scenes': _scenes_validation, 't2i_compbench': t2i_compbench.validation}
VALIDATION_PICTURES = {'scenes': _scenes_validation_pictures}


def check(data, method):
  """InputError for missing inputs, before anything is read or a model is downloaded."""
  if 'generation' in method.tasks:
    mixtures.check_prompts(data, NAMED_PROMPTS)
  if 'understanding' in method.tasks:
    mixtures.check_pictures(data, NAMED_PICTURES)


class Batches:
  """See `make`. Every step has the same shapes.

  fingerprint: hex; identifies the data of a run. earlier_fingerprint: the fingerprint in earlier
  versions if it differed, else None. held_out: {'prompts': hashes, 'pictures': hashes} of the
  inputs held out from training. prompts, pictures: `mixtures.Parted`; None for a task that is not
  trained.
  """

  def __init__(self, processor, prompts, pictures, method, max_prompt_tokens, fields=()):
    self.prompts, self.pictures, self._seed = prompts, pictures, method.seed
    self._prompts = None if prompts is None else prompts.learned
    self._pictures = None if pictures is None else pictures.learned
    self._method, self._processor = method, processor
    self._fields = [fields_lib.FIELDS[name] for name in fields]
    self._inputs = method.inputs_per_task
    self._pad_id = processor.templates.pad_id
    if prompts is not None:

      def encoded(part):
        return [
          prompts_lib.encode(part[i], processor.encode_prompt, max_prompt_tokens, part.where(i))
          for i in range(len(part))
        ]

      self._rows = encoded(prompts.learned)
      if prompts.measured is not None:
        encoded(prompts.measured)  # raises the error for too long prompts now
      # The length of the longest prompt: constant over the run, without padding that no prompt
      # needs.
      self._prompt_length = max(map(len, self._rows))
      self._instruction = list(processor.encode_question(method.instruction))
    if pictures is not None:
      self._question = _one_row(method.question, processor.encode_question, 'question')
    further = [field.identity(method) for field in self._fields if field.identity]
    texts = [] if prompts is None else [prompts.everything.fingerprint()]
    shown = [] if pictures is None else [pictures.everything.fingerprint()]
    self.fingerprint = _hash(*texts, *shown, *further)
    earlier = None if pictures is None else pictures.everything.earlier_fingerprint()
    self.earlier_fingerprint = earlier and _hash(*texts, earlier, *further)
    self.held_out = {
      name: part.held_out
      for name, part in (('prompts', prompts), ('pictures', pictures))
      if part is not None and part.held_out
    }

  def sizes(self) -> dict[str, int]:
    """The numbers of different prompts and images, {'prompts': n, 'pictures': m}, without those
    of untrained tasks.
    """
    parts = (('prompts', self.prompts), ('pictures', self.pictures))
    return {name: len(part.everything) for name, part in parts if part is not None}

  def at(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
    """The batch of step `step` (from 0), or only its rows start to stop, of prompts and of
    images.

    Arrays are NumPy arrays. The half of a task that does not learn in this step is None; `seed` is
    a uint32 derived from (seed, step).
    """
    stop = self._inputs if stop is None else stop
    learning = self._method.tasks_at(step)
    shared = {}
    for field in self._fields:
      if field.whole:
        shared |= field.whole(self._processor, self._method)
    return Batch(
      seed=order.step_seed(self._seed, step),
      generation=self.prompts_at(step, start, stop) if 'generation' in learning else None,
      understanding=self.pictures_at(step, start, stop) if 'understanding' in learning else None,
      shared=shared,
    )

  def prompts_at(self, step: int, start: int, stop: int) -> GenerationBatch:
    """Rows start to stop of the step's prompts."""
    rows = self._rows_at(self._prompts, order.PROMPTS, step, start, stop, self._prompt_length)
    prompts = [self._rows[i] for i in rows.items]
    instruction = self._pad([self._instruction], len(self._instruction))
    return GenerationBatch(
      prompt=self._pad(prompts, self._prompt_length),
      instruction=Text(instruction.ids[0], instruction.mask[0]),
      extra=self._further('prompts', rows),
    )

  def pictures_at(self, step: int, start: int, stop: int) -> UnderstandingBatch:
    """Rows start to stop of the step's images."""
    rows = self._rows_at(self._pictures, order.PICTURES, step, start, stop, 0)
    return UnderstandingBatch(
      pixels=self._pictures.take(rows.items),
      question=self._pad([self._question] * len(rows.items), len(self._question)),
      extra=self._further('pictures', rows),
    )

  def _pad(self, rows, length) -> Text:
    return Text(*prompts_lib.pad(rows, length, self._pad_id))

  def _rows_at(self, data, stream, step, start, stop, prompt_length):
    first = step * self._inputs
    items = order.items(self._seed, stream, range(first + start, first + stop + 1), len(data))
    return fields_lib.Rows(
      data, items[:-1], items[1:], self._processor, self._method, prompt_length
    )

  def _further(self, of: str, rows) -> dict[str, np.ndarray]:
    """The declared fields for `rows`. of: 'prompts' or 'pictures'."""
    further = {}
    for field in self._fields:
      make = getattr(field, of)
      if make:
        further |= make(rows)
    return further

  def texts_at(self, step: int) -> list[str]:
    """The step's prompts (P) as strings, for reports."""
    first = step * self._inputs
    chosen = order.items(
      self._seed, order.PROMPTS, range(first, first + self._inputs), len(self._prompts)
    )
    return [self._prompts[i] for i in chosen]


def _hash(*parts):
  return hashlib.sha256('\n'.join(parts).encode()).hexdigest()


def _one_row(text, encode, what):
  ids = list(encode(text))
  if not ids:
    raise InputError(f'method.{what} is an empty {what}; write at least one word')
  return ids
