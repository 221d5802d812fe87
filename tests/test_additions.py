"""The documents' additions, run as they stand there: a reward, an objective, a data source, a field
of the batch.
"""

import re

import flax.nnx as nnx
import jax.numpy as jnp
import micro_parts
import numpy as np
from places import ROOT
import pytest
import tiny_step

from dsr_jax import config as config_lib
from dsr_jax import losses
from dsr_jax.data import batches, fields
from dsr_jax.errors import InputError
from dsr_jax.rewards import table

DOCUMENTS = (ROOT / 'README.md').read_text() + (ROOT / 'docs' / 'extending.md').read_text()
MODULES = {
  'table.REWARDS': table,
  'losses.OBJECTIVES': losses,
  'batches.NAMED_PROMPTS': batches,
  'fields.FIELDS': fields,
}


@pytest.fixture
def add(monkeypatch):
  """Runs the documents' block that writes into a table, in that table's module, and takes it back
  at the end.
  """

  def run(where):
    module, name = MODULES[where], where.partition('.')[2]
    (block,) = (
      b for b in re.findall(r'```python\n(.*?)```', DOCUMENTS, re.DOTALL) if f'\n{name}[' in b
    )
    assert len(block.splitlines()) <= 10
    key = re.search(rf"{name}\['(\w+)'\]", block)[1]
    monkeypatch.setitem(getattr(module, name), key, None)  # so that it is gone at the end
    exec(block, {**vars(module)})  # its names are those of the module, which stays as it is
    return key

  return run


def test_a_new_reward(add):
  reward = add('table.REWARDS')
  assert tiny_step.load(method__reward=reward, method__task='generation').method.reward == reward
  with pytest.raises(InputError, match=f'{reward} does not fit the task understanding'):
    tiny_step.load(method__reward=reward)
  _, metrics, records, step = tiny_step.run(
    method=tiny_step.method(reward=reward, task='generation', inputs_per_step=4)
  )
  pixels = (
    nnx.merge(*tiny_step.model())
    .picture_from_codes(jnp.asarray(records['generation']['codes']))
    .pixels
  )
  np.testing.assert_allclose(records['generation']['rewards'], pixels.mean((-3, -2, -1)), atol=1e-5)
  assert step._cache_size() == 1 and metrics['update_norm'] > 0


def test_a_new_objective(add):
  name = add('losses.OBJECTIVES')
  assert tiny_step.load(method__objective=name).method.objective == name
  x = losses.LossInputs(
    jnp.array([[[-1.0, -2.0], [-2.0, -9.0]]]), None, None, jnp.array([[[1, 1], [1, 0]]], bool), None
  )
  np.testing.assert_allclose(
    losses.OBJECTIVES[name].loss(x, config_lib.Method(gamma=0.75)), [0.25]
  )  # 0.75 - (-1.5 - -2)
  _, metrics, _, step = tiny_step.run(method=tiny_step.method(objective=name))
  assert step._cache_size() == 1 and tiny_step.finite(metrics) and metrics['update_norm'] > 0


def test_a_new_data_source_and_a_new_field(add):
  prompts, field = add('batches.NAMED_PROMPTS'), add('fields.FIELDS')
  method = config_lib.Method(task='generation', inputs_per_step=3, instruction='what is it')
  made = batches.make(config_lib.Data(prompts=prompts), method, micro_parts.Words(), 16, (field,))
  batch, texts = made.at(0), made.texts_at(0)
  assert sorted(texts) == ['a blue disc', 'a green disc', 'a red disc'] and made.sizes() == {
    'prompts': 3
  }
  assert batch.generation.extra['length'].tolist() == [len(text) for text in texts]
