"""The step on a tiny Janus: one compilation, both tasks, and what must not matter does not."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax import config as config_lib
from dsr_jax import sharding
from dsr_jax import state as state_lib
from dsr_jax import step as step_lib
from dsr_jax.errors import InputError
from dsr_jax.models.janus import model as janus
from dsr_jax.models.janus.config import JanusConfig, Templates
from dsr_jax.models.janus.family import JANUS
from dsr_jax.models.unified import Scoring, Text, row_keys
from dsr_jax.rewards import dual
from dsr_jax.rollouts import Batch, GenerationBatch, UnderstandingBatch

TEMPLATES = Templates(
  bos_id=1,
  eos_id=2,
  pad_id=0,
  boi_id=3,
  eoi_id=4,
  image_id=5,
  generation_prefix=(1, 6, 7),
  generation_suffix=(8, 6, 3),
  understanding_prefix=(1, 6, 7, 3),
  understanding_infix=(4, 8),
  understanding_suffix=(8, 6, 7),
  forbidden_text_ids=(0, 1, 3, 4, 5),
)
CONFIG = dataclasses.replace(JanusConfig.tiny(vocab_size=40), templates=TEMPLATES)
METHOD = config_lib.Method(
  group_size=4,
  inputs_per_step=8,
  steps=10,
  max_text_tokens=10,
  guidance=2.0,
  learning_rate=1e-2,
  warmup_steps=0,
)
SYSTEM = config_lib.System(compute_dtype='float32', logprob_chunk=0, remat=False, frozen_every=1)


@pytest.fixture(name='model', scope='module')
def _model():
  return janus.create(CONFIG, 0)


def make_batch(seed=0, tasks=('generation', 'understanding')):
  rng = np.random.default_rng(seed)
  mask = np.arange(6) < np.array([[3], [6], [1], [4]])
  generation = GenerationBatch(
    prompt=Text(rng.integers(9, 40, (4, 6)).astype('i4') * mask, mask),
    instruction=Text(np.array([9, 10, 11], 'i4'), np.ones(3, bool)),
    extra={},
  )
  understanding = UnderstandingBatch(
    pixels=rng.integers(0, 255, (4, 16, 16, 3)).astype('u1'),
    question=Text(rng.integers(9, 40, (4, 3)).astype('i4'), np.ones((4, 3), bool)),
    extra={},
  )
  return Batch(
    seed=np.uint32(seed),
    generation=generation if 'generation' in tasks else None,
    understanding=understanding if 'understanding' in tasks else None,
  )


def first_rows(batch, rows):
  generation, understanding = batch.generation, batch.understanding
  return batch._replace(
    generation=generation._replace(prompt=Text(*(x[:rows] for x in generation.prompt))),
    understanding=understanding._replace(
      pixels=understanding.pixels[:rows],
      question=Text(*(x[:rows] for x in understanding.question)),
    ),
  )


@functools.cache
def program(method, system):
  """Each configuration is compiled once for all tests."""
  ctx = step_lib.StepContext(
    graphdef=JANUS.graphdef(CONFIG),
    family=JANUS,
    spec=JANUS.spec(CONFIG),
    method=method,
    system=system,
  )
  mesh = sharding.make_mesh(system.mesh)
  with jax.set_mesh(mesh):
    state = state_lib.abstract_state(JANUS.shapes(CONFIG), JANUS, method, system, mesh)
    return jax.jit(
      functools.partial(step_lib.train_step, ctx),
      donate_argnums=0,
      out_shardings=step_lib.output_shardings(ctx, state, mesh),
    )


def run(model, method=METHOD, system=SYSTEM, steps=1, batch=None):
  _, params = model
  mesh = sharding.make_mesh(system.mesh)
  if batch is None:
    batch = make_batch(tasks=method.tasks)
  with jax.set_mesh(mesh):
    state = state_lib.init_state(params, JANUS, method, system, mesh)
    step = program(method, system)
    for _ in range(steps):
      state, metrics, records = step(state, batch)
  return jax.device_get(state), jax.device_get(metrics), jax.device_get(records), step


def largest(a, b):
  return max(
    float(np.max(np.abs(x - y)))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def test_three_steps_compile_once_and_train_only_what_is_trainable(model):
  state, metrics, records, step = run(model, steps=3)
  assert step._cache_size() == 1
  assert all(np.isfinite(v) for v in metrics.values()), metrics
  assert set(state.params) == {'language_model', 'lm_head', 'generation_head'}
  assert state.step == 3
  trained, fixed = state_lib.split_params(model[1], JANUS, METHOD.trainable)
  assert largest(state.fixed_params, fixed) == 0
  assert largest(state.params, trained) > 0
  assert records['generation']['codes'].shape == (4, 4, 16)
  assert records['understanding']['text_ids'].shape == (4, 4, 10)


def test_chunks_and_accumulation_and_rematerialisation_change_only_rounding(model):
  whole = run(model)
  parts = run(
    model,
    dataclasses.replace(METHOD, accumulate=2),
    dataclasses.replace(SYSTEM, rollout_chunk=1, remat=True, logprob_chunk=3),
  )
  np.testing.assert_array_equal(whole[2]['generation']['codes'], parts[2]['generation']['codes'])
  np.testing.assert_array_equal(
    whole[2]['understanding']['text_ids'], parts[2]['understanding']['text_ids']
  )
  for key in ('loss', 'generation/reward_mean', 'understanding/reward_mean', 'gradient_norm'):
    np.testing.assert_allclose(whole[1][key], parts[1][key], rtol=1e-4, err_msg=key)


@pytest.mark.parametrize('task', ['generation', 'understanding'])
def test_one_task_alone_learns_as_its_half_of_both(model, task):
  both = run(model)
  alone = run(model, dataclasses.replace(METHOD, task=task, inputs_per_step=4))
  if task == 'generation':  # the first task has the same place in the step, hence the same keys
    np.testing.assert_allclose(alone[1]['generation/loss'], both[1]['generation/loss'], rtol=1e-5)
  assert not any(
    key.startswith({'generation': 'understanding', 'understanding': 'generation'}[task])
    for key in alone[1]
  )


def test_live_and_frozen_rewards_agree_before_the_first_update_and_part_after(model):
  _, first, _, _ = run(model)
  for task in ('generation', 'understanding'):
    np.testing.assert_allclose(
      first[f'{task}/reward_frozen'], first[f'{task}/reward_mean'], atol=1e-5
    )
  _, later, _, _ = run(model, steps=3)
  assert abs(later['generation/reward_frozen'] - later['generation/reward_mean']) > 1e-5


def test_frozen_rewards_are_absent_where_they_are_not_due(model):
  _, metrics, _, _ = run(model, system=dataclasses.replace(SYSTEM, frozen_every=2), steps=2)
  assert np.isnan(metrics['generation/reward_frozen'])
  state, metrics, _, _ = run(model, system=dataclasses.replace(SYSTEM, frozen_every=0))
  assert state.ref_params is None and np.isnan(metrics['generation/reward_frozen'])


def test_sampler_and_scorer_agree(model):
  _, metrics, _, _ = run(model)
  assert metrics['generation/sampler_gap'] < 1e-4
  assert metrics['understanding/sampler_gap'] < 1e-4


def test_the_step_pushes_the_pair_apart(model):
  """One update on a batch makes the chosen likelier than the rejected of that same batch."""
  graphdef, params = model
  state, _, records, _ = run(model)
  given = make_batch().generation.prompt
  record = records['generation']
  pair = np.stack([record['chosen'], record['rejected']], axis=1)
  codes = jnp.asarray(np.take_along_axis(record['codes'], pair[..., None], axis=1))
  prompt = Text(*(jnp.asarray(x[:, None]) for x in given))

  def margin(params):
    mean = nnx.merge(graphdef, params).picture_logps(prompt, codes, None, Scoring()).logp.mean(-1)
    return float(jnp.mean(mean[:, 0] - mean[:, 1]))

  assert margin(state_lib.policy_params(state, JANUS)) > margin(params)


def test_rollouts_do_not_depend_on_the_scale_of_the_batch(model):
  """Candidates are keyed by their global index: the first prompts of a longer batch get the same
  pictures.
  """
  short = first_rows(make_batch(), 2)
  half = run(model, dataclasses.replace(METHOD, inputs_per_step=4), batch=short)
  whole = run(model)
  np.testing.assert_array_equal(half[2]['generation']['codes'], whole[2]['generation']['codes'][:2])


def test_bfloat16_compute_keeps_float32_masters_and_rewards_off_the_coarse_grid(model):
  state, metrics, records, _ = run(
    model, system=dataclasses.replace(SYSTEM, compute_dtype='bfloat16')
  )
  assert all(x.dtype == np.float32 for x in jax.tree.leaves(state.params))
  rewards = records['generation']['rewards']
  assert rewards.dtype == np.float32
  assert np.any(np.asarray(jnp.asarray(rewards).astype(jnp.bfloat16), 'f4') != rewards)
  assert np.isfinite(metrics['loss'])


def test_reward_of_a_picture_is_the_plain_mean_over_the_prompts_tokens(model):
  graphdef, params = model
  m = nnx.merge(graphdef, params)
  prompt, instruction, _ = jax.tree.map(jnp.asarray, make_batch().generation)
  codes = jax.random.randint(jax.random.key(0), (4, 2, 16), 0, 32)
  reward, _ = dual.generation(m, m.picture_from_codes(codes), prompt, instruction, Scoring())
  for i in (0, 2):
    n = int(prompt.mask[i].sum())
    one = Text(prompt.ids[i : i + 1, None, :n], prompt.mask[i : i + 1, None, :n])
    picture = jax.tree.map(lambda x, i=i: x[i : i + 1, 1:2], m.picture_from_codes(codes))
    asked = jax.tree.map(lambda x: x[None], instruction)
    logp = m.text_logps(picture, asked, one, None, Scoring()).logp
    np.testing.assert_allclose(reward[i, 1], logp.mean(), atol=1e-5)


def test_the_prompts_end_is_counted_only_where_asked(model):
  graphdef, params = model
  m = nnx.merge(graphdef, params)
  prompt, instruction, _ = jax.tree.map(jnp.asarray, make_batch().generation)
  extended = dual.with_eos(prompt, TEMPLATES.eos_id)
  np.testing.assert_array_equal(extended.mask.sum(-1), prompt.mask.sum(-1) + 1)
  assert all(
    int(extended.ids[i, n]) == TEMPLATES.eos_id
    for i, n in enumerate(np.asarray(prompt.mask.sum(-1)))
  )
  pictures = m.picture_from_codes(jax.random.randint(jax.random.key(0), (4, 1, 16), 0, 32))
  plain, _ = dual.generation(m, pictures, prompt, instruction, Scoring())
  ended, _ = dual.generation(m, pictures, prompt, instruction, Scoring(), eos_id=TEMPLATES.eos_id)
  assert np.all(np.abs(plain - ended) > 1e-4)


def test_an_empty_text_has_the_worst_reward_of_its_group_and_the_end_is_no_part_of_the_prompt(
  model,
):
  graphdef, params = model
  m = nnx.merge(graphdef, params)
  codes = jax.random.randint(jax.random.key(0), (1, 16), 0, 32)
  ids = jnp.array([[[12, 13, 2], [2, 0, 0], [12, 13, 0], [20, 21, 22]]])
  mask = jnp.array([[[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]], bool)
  reward, _ = dual.understanding(m, codes, Text(ids, mask), Scoring(), eos_id=2)
  assert reward[0, 1] == reward[0].min() and reward[0, 0] == reward[0, 2]


def test_keys_are_by_global_candidate():
  key = jax.random.key(3)
  whole = jax.random.key_data(row_keys(key, 0, 4, 2))
  late = jax.random.key_data(row_keys(key, 4, 2, 2))
  np.testing.assert_array_equal(whole[2:], late)


def test_a_mesh_that_does_not_match_the_devices_is_refused():
  with pytest.raises(InputError, match='device'):
    sharding.make_mesh(config_lib.Mesh(data=3, fsdp=1, tp=1))
