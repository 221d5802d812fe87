"""Inputs chosen by the base: which ones, and that they are the run's own."""

import itertools

import jax
import numpy as np
import pytest

from benchmarks import chosen_inputs, levers
from dsr_jax import sharding, train
from dsr_jax.data.sharded import ShardedBatches
from dsr_jax.scenes import grammar, judge

CONFIG = levers.config_of('plain', seed=0, steps=6, prompts_per_task=1)


@pytest.fixture(scope='module')
def parts():
  mesh = sharding.make_mesh(CONFIG.system.mesh)
  with jax.set_mesh(mesh):
    yield CONFIG, train.load_model(CONFIG.model), mesh


def test_the_groups_that_differ_most_are_chosen_in_their_order():
  rewards = np.array([[0, 1], [5, 5], [0, 9], [-2, 2], [7, 7.5]])
  assert chosen_inputs.widest(rewards, 2).tolist() == [2, 3]


def test_partners_differ_and_no_other_choice_has_a_larger_sum():
  likelihoods = np.random.default_rng(0).normal(size=(3, 5))
  found = chosen_inputs.partners(likelihoods)
  every = itertools.permutations(range(5), 3)
  assert len(set(found)) == 3
  assert likelihoods[range(3), found].sum() == max(likelihoods[range(3), x].sum() for x in every)


def test_prompts_of_high_spread_are_half_of_two_steps_prompts_and_images_stay(parts):
  plain, chosen = ShardedBatches(*parts), chosen_inputs.HighSpread(*parts)
  offered = [
    ids.tolist() for step in (2, 3) for ids in np.asarray(plain.at(step).generation.prompt.ids)
  ]
  batch, usual = chosen.at(1), plain.at(1)
  taken = [ids.tolist() for ids in np.asarray(batch.generation.prompt.ids)]
  places = [offered.index(ids) for ids in taken]
  assert len(taken) == 16 and places == sorted(places)
  np.testing.assert_array_equal(batch.understanding.pixels, usual.understanding.pixels)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == jax.tree.map(
    lambda x: (x.shape, x.dtype), usual
  )


def test_paired_images_show_more_of_what_their_prompts_say(parts):
  """By the judge, which knows nothing of likelihoods."""
  config, model, mesh = parts
  plain, chosen = ShardedBatches(*parts).at(0), chosen_inputs.Paired(*parts).at(0)
  np.testing.assert_array_equal(chosen.generation.prompt.ids, plain.generation.prompt.ids)
  prompts = [
    judge.parse(model.processor.decode(np.asarray(ids)[np.asarray(mask)]))
    for ids, mask in zip(*plain.generation.prompt)
  ]

  def shared(batch):
    """The mean number of shapes that a prompt and its image have in common."""
    readings = judge.read(np.asarray(batch.understanding.pixels))
    return np.mean([common(*pair) for pair in zip(prompts, readings)])

  assert shared(chosen) > 1.5 * shared(plain)


def common(atoms: grammar.Atoms, reading) -> int:
  asked = {clause.shape for clause in atoms.clauses}
  return len(asked & {thing.shape for thing in reading.scene.things})
