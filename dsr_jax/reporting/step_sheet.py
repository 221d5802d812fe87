"""The picture of a step: its first inputs, their samples with rewards, chosen and rejected
marked.
"""

from flax import nnx
import jax
import numpy as np

from dsr_jax import images, sharding
from dsr_jax import state as state_lib
from dsr_jax.reporting import sheets

SHOWN = 3  # inputs of each task


class StepSheet:
  """Makes a sheet of both tasks from a step's records (`tasks.Task.record`).

  model: `families.Model`; its parameters are the state's.
  """

  def __init__(self, model):
    self._processor = model.processor
    self._family = model.family

    def decode(params, codes):
      return nnx.merge(model.graphdef, params).picture_from_codes(codes).pixels

    self._decode = jax.jit(decode)

  def __call__(self, state, records):
    """(state after the step, records) -> PIL image."""
    parts = []
    if 'generation' in records:
      record = _first(records['generation'])
      prompts = self._texts(record['prompt_ids'], record['prompt_mask'])
      pixels = self._decode(state_lib.policy_params(state, self._family), record['codes'])
      pixels = images.to_uint8(sharding.fetch(pixels))
      parts.append(sheets.candidates(prompts, pixels, *_verdicts(record)))
    if 'understanding' in records:
      record = _first(records['understanding'])
      groups = zip(record['text_ids'], record['text_mask'])
      texts = [self._texts(ids, mask) for ids, mask in groups]
      parts.append(sheets.captions(record['pixels'], texts, *_verdicts(record)))
    return sheets.stack(parts)

  def _texts(self, ids, mask):
    """Rows of token ids -> words."""
    return [self._processor.decode([int(i) for i in row[keep]]) for row, keep in zip(ids, mask)]


def _first(record):
  """The first inputs of a task's record, on the host."""
  return jax.device_get({name: values[:SHOWN] for name, values in record.items()})


def _verdicts(record):
  """Rewards, chosen, rejected; a group of equal rewards has neither (-1)."""
  tied = record['chosen'] == record['rejected']
  chosen = np.where(tied, -1, record['chosen'])
  rejected = np.where(tied, -1, record['rejected'])
  return record['rewards'], chosen, rejected
