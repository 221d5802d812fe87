"""Two models in one program: who learns, who scores, what stays as it is."""

import dataclasses

import jax
from micro_model import MICRO
import numpy as np
import pytest
import tiny_step

from dsr_jax import config as config_lib
from dsr_jax import state as state_lib
from dsr_jax.errors import InputError

TURNS = config_lib.Separate(swap_every=1)
METHOD = tiny_step.method(strategy='separate', separate=TURNS, inputs_per_step=4)


def same(a, b):
  return all(
    np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def test_the_generator_learns_first_and_the_models_take_turns():
  method = config_lib.Method(strategy='separate', separate=config_lib.Separate(swap_every=3))
  assert [method.role_at(step) for step in range(8)] == ['generator'] * 3 + ['understander'] * 3 + [
    'generator'
  ] * 2
  assert [method.tasks_at(step) for step in (0, 3)] == [('generation',), ('understanding',)]
  assert method.inputs_per_task == method.inputs_per_step
  assert config_lib.Method().role_at(5) is None and config_lib.Method().tasks_at(5) == (
    'generation',
    'understanding',
  )


def test_one_model_learns_the_other_and_its_moments_stay_and_each_role_is_compiled_once():
  start = jax.device_get(tiny_step.start(METHOD))
  first, metrics, records, _ = tiny_step.run(method=METHOD)
  assert set(records) == {'generation'} and not any(
    key.startswith('understanding') for key in metrics
  )
  assert same(first.params['understander'], start.params['understander'])
  assert same(first.opt_state['understander'], start.opt_state['understander'])
  assert not same(first.params['generator'], start.params['generator'])
  four, metrics, records, step = tiny_step.run(method=METHOD, steps=4)
  assert step._cache_size() == 2 and set(records) == {'understanding'} and four.step == 4
  second, _, _, _ = tiny_step.run(method=METHOD, steps=2)
  assert same(second.params['generator'], first.params['generator'])
  assert not same(second.params['understander'], start.params['understander'])


def test_each_is_scored_by_the_other():
  """With one model changed by hand, the rewards of what the other samples change, and what it
  samples does not.
  """
  for role, other, steps in (
    ('generator', 'understander', (0,)),
    ('understander', 'generator', (1,)),
  ):

    def batches(_, steps=steps):
      return tiny_step.batch(METHOD.tasks_at(steps[0]))

    plain = tiny_step.run(method=METHOD, batches=batches)
    state = tiny_step.start(METHOD)
    moved = jax.tree.map(
      lambda x: x + 0.03 * np.sin(np.arange(x.size, dtype=np.float32)).reshape(x.shape),
      state.params[other],
    )
    changed = tiny_step.run(
      method=METHOD,
      batches=batches,
      state=dataclasses.replace(state, params={**state.params, other: moved}),
    )
    name = config_lib.ROLES[role]
    sampled = 'codes' if name == 'generation' else 'text_ids'
    np.testing.assert_array_equal(plain[2][name][sampled], changed[2][name][sampled])
    assert np.all(np.abs(plain[2][name]['rewards'] - changed[2][name]['rewards']) > 1e-6)


def test_the_first_turn_is_what_one_model_does_alone():
  """Both models start as one, so the generator's first step is that of a run of the generation task
  alone.
  """
  alone = tiny_step.run(method=tiny_step.method(task='generation', inputs_per_step=4))
  turn = tiny_step.run(method=METHOD)
  assert same(turn[0].params['generator'], alone[0].params)
  np.testing.assert_array_equal(turn[1]['loss'], alone[1]['loss'])


@pytest.mark.parametrize('scorer', ['frozen', 'ema'])
def test_every_scorer_serves_both_roles(scorer):
  method = dataclasses.replace(METHOD, scorer=scorer)
  _, metrics, _, step = tiny_step.run(method=method, steps=2)
  assert step._cache_size() == 2 and tiny_step.finite(metrics)


def test_idle_moments_are_accounted_for():
  state = tiny_step.start(METHOD)
  leaves = sum(x.nbytes for x in jax.tree.leaves(state.params['generator']))
  assert 2 * leaves <= state_lib.idle_bytes(state) <= 2 * leaves + 64
  assert state_lib.idle_bytes(tiny_step.start()) == 0


def test_each_role_has_parameters_of_a_whole_model():
  state, _, _, _ = tiny_step.run(method=METHOD, steps=2)
  drawing, reading = (
    state_lib.policy_params(state, MICRO, role) for role in ('generator', 'understander')
  )
  assert set(drawing) == set(reading) == set(tiny_step.model()[1])
  assert not same(drawing['word_head'], reading['word_head']) and same(
    drawing['palette'], reading['palette']
  )


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(method__strategy='both'), ['unified, separate']),
    (
      dict(method__strategy='separate', method__task='generation'),
      ['task=generation', 'strategy=separate', 'unified'],
    ),
    (
      dict(method__strategy='separate', method__separate__swap_every=0),
      ['separate.swap_every', 'at least 1'],
    ),
  ],
)
def test_impossible_strategies_are_refused_in_one_sentence(changes, words):
  with pytest.raises(InputError) as e:
    tiny_step.load(**changes)
  assert all(word in str(e.value) for word in words) and '\n' not in str(e.value)
