"""The sheet of a step: its first inputs and their samples with rewards, with the chosen and the
rejected marked.
"""

import jax

from dsr_jax import rows
from dsr_jax import state as state_lib
from dsr_jax.inference import Sampler
from dsr_jax.reporting import sheets


class StepSheet:
  """Makes a sheet of both tasks from a step's records (`tasks.Task.record`).

  model: `families.Model`; its parameters are the state's.
  """

  def __init__(self, model):
    self._family = model.family
    self._sampler = Sampler(model.graphdef, model.processor, chunk=rows.DECODED, seed=0)

  def __call__(self, state, records):
    """(state after the step, records) -> PIL image."""
    parts = []
    if 'generation' in records:
      record = _first(records['generation'])
      prompts = self._sampler.words(record['prompt_ids'], record['prompt_mask'])
      params = state_lib.policy_params(state, self._family)
      pixels = self._sampler.decode(params, record['codes'])
      parts.append(sheets.candidates(prompts, pixels, *_marks(record)))
    if 'understanding' in records:
      record = _first(records['understanding'])
      groups = zip(record['text_ids'], record['text_mask'])
      texts = [self._sampler.words(ids, mask) for ids, mask in groups]
      parts.append(sheets.captions(record['pixels'], texts, *_marks(record)))
    return sheets.stack(parts)


def _first(record):
  """The first inputs of a task's record, on the host."""
  return jax.device_get({name: values[: rows.DECODED] for name, values in record.items()})


def _marks(record):
  """Rewards, chosen, rejected."""
  found = rows.verdicts(record)
  return found['rewards'], found['chosen'], found['rejected']
