"""Pretraining's data."""

import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
from places import ROOT

from dsr_jax import pretrain, pretrain_parts
from dsr_jax.models.janus import processor as processor_lib
from dsr_jax.scenes import grammar, sets


def settings(**lm):
  spec = importlib.util.spec_from_file_location(
    'scenes_pretrain', os.path.join(ROOT, 'configs', 'scenes_pretrain.py')
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  for key, value in lm.items():
    config.lm[key] = value
  return config


def test_batches_are_functions_of_seed_and_place_and_hold_what_they_say():
  processor = processor_lib.Processor.from_directory(
    os.path.join(ROOT, 'dsr_jax', 'assets', 'scenes_base')
  )
  config = settings(batch=8)
  a, b = (pretrain_parts.language_batches(config, processor, 200)[3] for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert a['asked'].sum() == 2  # a quarter of 8
  described = [processor.encode_question(q) for q in grammar.QUESTIONS_DESCRIBE]
  ids, mask = a['question']
  for row in range(8):
    assert (list(ids[row][mask[row]]) in described) != a['asked'][row]
  texts, told = a['answer']
  assert all(told[row].sum() <= 3 for row in np.flatnonzero(a['asked']))  # one word and the end
  drawn = [sets.pretraining_example(config.seed, 200 * 64 + i, 0.0)[0] for i in range(64)]
  assert all(any(np.array_equal(x, y) for y in drawn) for x in a['drawn'])


def test_a_curriculum_starts_with_one_thing_and_ends_with_the_whole_world():
  def words(p):
    return np.mean(
      [len(grammar.tokens(sets.pretraining_example(0, i, p_single=p)[1])) for i in range(200)]
    )

  assert words(1.0) < 0.8 * words(0.0)
  assert sets.pretraining_example(0, 7, p_single=0.0)[1] == sets.pretraining_example(0, 7)[1]


def test_a_codebook_is_spread_over_what_there_is():
  """Eight clusters of latents, eight codes: each cluster has one of its own."""
  rng = np.random.default_rng(0)
  clusters = np.eye(8)[np.arange(64) % 8] + 0.05 * rng.normal(size=(64, 8))
  z = jnp.asarray(clusters / np.linalg.norm(clusters, axis=-1, keepdims=True), jnp.float32)
  codebook = pretrain.spread_codebook(jax.random.key(0), z, 8, rounds=3)
  codes = np.asarray(jnp.argmax(z @ codebook.T, axis=-1))
  assert len(set(codes[:8])) == 8
  assert np.array_equal(codes, np.tile(codes[:8], 8))
