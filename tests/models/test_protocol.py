"""The method on models that are no Janus: it asks of them what the protocol says, and no more."""

import ast
import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import micro_model
from micro_model import MICRO, Micro, MicroConfig, NoisyMicro
import numpy as np
from places import ROOT
import pytest
import tiny_step

from dsr_jax import config as config_lib
from dsr_jax import families, sharding
from dsr_jax import state as state_lib
from dsr_jax import step as step_lib
from dsr_jax.models.unified import Picture, Scoring, Text, picture_to_read, row_keys, score_keys
from dsr_jax.rewards import controls, table, variants
from dsr_jax.rewards.base import RewardInputs

TURNS = config_lib.Separate(swap_every=1)
NOISY = pytest.mark.parametrize('noisy', [False, True], ids=['micro', 'noisy'])
SAMPLER = ('sampler_gap', 'sampler_ratio_gap', 'effective_sample_size')


def given(module, method, system=tiny_step.SYSTEM):
  """(context, state) of a model of any class with Micro's parts."""
  graphdef, params = nnx.split(module(nnx.Rngs(0)))
  ctx = step_lib.StepContext(
    graphdef=graphdef, family=MICRO, spec=module.spec, method=method, system=system
  )
  mesh = sharding.make_mesh(system.mesh)
  with jax.set_mesh(mesh):
    return ctx, state_lib.init_state(nnx.to_pure_dict(params), MICRO, method, system, mesh)


def traced(module, method, system=tiny_step.SYSTEM, **batch):
  """The names of a step's metrics; the step is traced, not compiled."""
  ctx, state = given(module, method, system)
  step = functools.partial(step_lib.train_step, ctx)
  return set(jax.eval_shape(step, state, tiny_step.batch(method.tasks, **batch)).metrics)


def further_fields(seed=0):
  """What the rewards and probes read of a batch besides, for four inputs."""
  rng = np.random.default_rng(seed)

  def words(*shape):
    return rng.integers(9, 40, shape).astype('i4')

  def pixels(*shape):
    return rng.integers(0, 255, (*shape, 16, 16, 3)).astype('u1')

  return dict(
    extra=dict(
      generation=dict(
        negative_ids=words(4, 2, 5),
        negative_mask=np.ones((4, 2, 5), bool),
        other_ids=words(4, 6),
        other_mask=np.ones((4, 6), bool),
      ),
      understanding=dict(negative_pixels=pixels(4, 1), other_pixels=pixels(4)),
    ),
    shared=dict(yes_before=words(2), yes_after=words(1), answer_yes=words(1), answer_no=words(1)),
  )


# A second backbone.


@NOISY
@pytest.mark.parametrize('objective', ['simpo', 'grpo'])
def test_both_tasks_learn_in_one_program(objective, noisy):
  method = tiny_step.method(objective=objective)
  _, metrics, _, step = tiny_step.run(method=method, steps=2, noisy=noisy)
  assert step._cache_size() == 1
  assert tiny_step.finite(metrics) and metrics['update_norm'] > 0


@NOISY
@pytest.mark.parametrize('objective', ['simpo', 'grpo'])
def test_two_models_learn_in_turns_in_a_program_a_role(objective, noisy):
  method = tiny_step.method(
    objective=objective, strategy='separate', separate=TURNS, inputs_per_step=4
  )
  _, metrics, _, step = tiny_step.run(method=method, steps=4, noisy=noisy)
  assert step._cache_size() == 2
  assert tiny_step.finite(metrics) and metrics['update_norm'] > 0


@NOISY
def test_adapters_learn_beside_weights_that_stay(noisy):
  method = tiny_step.method(objective='grpo', trainable='lora', lora=config_lib.Lora(rank=2))
  state, metrics, _, step = tiny_step.run(method=method, steps=2, noisy=noisy)
  assert step._cache_size() == 1
  assert tiny_step.finite(metrics) and metrics['update_norm'] > 0
  assert set(state.params) == {'lora'} and set(state.params['lora']) == set(MICRO.lora_targets)
  for part, tree in tiny_step.model(noisy)[1].items():
    for a, b in zip(jax.tree.leaves(state.fixed_params[part]), jax.tree.leaves(tree), strict=True):
      np.testing.assert_array_equal(a, b)


def test_chunks_change_only_rounding_for_random_likelihoods_too():
  """Keys of likelihoods belong to inputs, so they go into the chunks with them."""
  method = tiny_step.method(objective='grpo')
  whole = tiny_step.run(method=method, noisy=True)
  parts = tiny_step.run(
    method=method, system=tiny_step.system(rollout_chunk=2, update_chunk=1), noisy=True
  )
  for task in method.tasks:
    np.testing.assert_allclose(
      whole[2][task]['rewards'], parts[2][task]['rewards'], rtol=1e-5, err_msg=task
    )
  for key in ('loss', 'generation/entropy', 'gradient_norm', 'update_norm'):
    np.testing.assert_allclose(whole[1][key], parts[1][key], rtol=1e-3, err_msg=key)


def test_a_backbone_is_found_by_its_line_in_the_table(monkeypatch):
  monkeypatch.setattr(families, 'FAMILIES', (*families.FAMILIES, MICRO))
  assert families.family_of(MicroConfig()) is MICRO
  without = tuple(family for family in families.FAMILIES if family is not MICRO)
  monkeypatch.setattr(families, 'FAMILIES', without)
  with pytest.raises(TypeError, match='MicroConfig.*families.FAMILIES'):
    families.family_of(MicroConfig())


# Keys of likelihoods.


def bits(keys):
  return np.asarray(jax.random.key_data(keys))


def test_likelihoods_get_a_key_an_input_by_its_place_and_none_where_there_is_no_chance():
  key = jax.random.key(7)
  whole = row_keys(key, 0, 6, 4)
  keys = score_keys(NoisyMicro.spec, whole)
  assert keys.shape == (6,) and len(np.unique(bits(keys), axis=0)) == 6
  np.testing.assert_array_equal(
    bits(score_keys(NoisyMicro.spec, row_keys(key, 8, 4, 4))), bits(keys)[2:]
  )
  assert score_keys(Micro.spec, whole) is None
  # Not those that a sampler draws its tokens with.
  tokens = jax.vmap(lambda t: jax.random.fold_in(whole[0, 0], t))(jnp.arange(5000))
  drawn = np.concatenate([bits(tokens), bits(whole).reshape(-1, bits(whole).shape[-1])])
  assert not np.any(np.all(drawn == bits(keys)[0], axis=-1))


SEEN = []


class Watched(NoisyMicro):
  """Notes the keys that its likelihoods are given."""

  def picture_logps(self, prompt, codes, keys, how):
    SEEN.append(('picture', keys))
    return super().picture_logps(prompt, codes, keys, how)

  def text_logps(self, picture, question, text, keys, how):
    SEEN.append(('text', keys))
    return super().text_logps(picture, question, text, keys, how)


@pytest.mark.parametrize('scorer', ['policy', 'frozen'])
@pytest.mark.parametrize(
  'task, kinds',
  [
    ('generation', ['text', 'picture', 'picture']),
    ('understanding', ['picture', 'text', 'text']),
  ],
)
def test_scorer_reference_and_policy_are_given_the_same_keys_of_an_input(task, kinds, scorer):
  """While the step is traced, what is the same variable has the same value."""
  SEEN.clear()
  traced(
    Watched,
    tiny_step.method(
      objective='grpo', scorer=scorer, inner_updates=2, task=task, inputs_per_step=4
    ),
  )
  found = [keys for _, keys in SEEN]
  assert [kind for kind, _ in SEEN] == kinds
  assert found[0].shape == (4,) and all(keys is found[0] for keys in found)
  SEEN.clear()


TWO_UPDATES = tiny_step.method(objective='grpo', kl=0.1, inner_updates=2)
# Policy and reference are scored by two programs; the square of their rounding in float32.
ROUNDING = 1e-13


def test_what_chance_adds_cancels_between_policy_old_policy_and_reference():
  """Without a learning rate, all three are one model: with one key their ratio is exactly 1."""
  still = tiny_step.batch()._replace(learning_rate=np.float32(0.0))
  _, metrics, _, _ = tiny_step.run(method=TWO_UPDATES, batches=lambda _: still, noisy=True)
  for task in TWO_UPDATES.tasks:
    assert metrics[f'{task}/ratio_gap'] == 0 and metrics[f'{task}/ratio_gap_last'] == 0
    assert metrics[f'{task}/kl'] <= ROUNDING and metrics[f'{task}/kl_last'] <= ROUNDING
  # Not so by itself: another key is another likelihood.
  model, x = scored_model(), inputs('understanding')
  one, other = (
    model.picture_logps(x.text, x.picture.codes[:, None], score_keys(model, keys), Scoring()).logp
    for keys in (x.sample_keys, row_keys(jax.random.key(1), 0, 2, 3))
  )
  assert np.abs(np.asarray(one - other)).max() > 1e-2


def test_the_first_of_two_updates_starts_at_ratio_one_and_the_second_does_not():
  moving = tiny_step.batch()._replace(learning_rate=np.float32(1e-2))
  _, metrics, _, _ = tiny_step.run(method=TWO_UPDATES, batches=lambda _: moving, noisy=True)
  for task in TWO_UPDATES.tasks:
    assert metrics[f'{task}/ratio_gap'] == 0 and metrics[f'{task}/kl'] <= ROUNDING
    assert metrics[f'{task}/ratio_gap_last'] > 1e-3 and metrics[f'{task}/kl_last'] > 1e-6


def scored_model():
  return nnx.merge(*tiny_step.model(noisy=True))


def inputs(task, method=tiny_step.METHOD, same=False, **fields):
  """Two inputs of a task with three samples each for a model that reads codes; same: all alike."""
  model, rng = scored_model(), np.random.default_rng(0)

  def ids(*shape):
    return jnp.asarray(rng.integers(9, 40, shape).astype('i4'))

  def alike(x):
    return jnp.broadcast_to(x[:1, :1], x.shape) if same else x

  if task == 'generation':
    codes = alike(jnp.asarray(rng.integers(0, micro_model.CODES, (2, 3, 16)).astype('i4')))
    text, question = Text(ids(2, 5), jnp.ones((2, 5), bool)), Text(ids(3), jnp.ones(3, bool))
    picture = Picture(codes, model.picture_from_codes(codes).pixels)
  else:
    text = Text(alike(ids(2, 3, 5)), jnp.ones((2, 3, 5), bool))
    question = Text(ids(2, 3), jnp.ones((2, 3), bool))
    picture = model.picture_from_pixels(jnp.asarray(rng.uniform(-1, 1, (2, 16, 16, 3)), 'f4'))
  if same:
    text, picture = (jax.tree.map(lambda x: x.at[1:].set(x[:1]), y) for y in (text, picture))
  keys = row_keys(jax.random.key(0), 0, 2, 3)
  return RewardInputs(
    task=task,
    model=model,
    text=text,
    picture=picture,
    question=question,
    sample_keys=keys,
    score_keys=score_keys(model, keys),
    extra=fields,
    reward_params=None,
    scoring=Scoring(),
    eos_id=micro_model.EOS,
    method=method,
  )


def test_equal_samples_of_a_group_have_equal_rewards_and_equal_groups_have_not():
  """So no pair is chosen by chance alone."""
  rewards = np.asarray(table.score(inputs('understanding', same=True)).total)
  np.testing.assert_array_equal(rewards, rewards[:, :1] * np.ones(3, 'f4'))
  assert abs(rewards[0, 0] - rewards[1, 0]) > 1e-3


class Strict(Micro):
  """Deterministic, and refuses to be given keys."""

  def picture_logps(self, prompt, codes, keys, how):
    assert keys is None
    return super().picture_logps(prompt, codes, keys, how)

  def text_logps(self, picture, question, text, keys, how):
    assert keys is None
    return super().text_logps(picture, question, text, keys, how)


@pytest.mark.parametrize('reward', ['dual', 'pmi', 'contrastive', 'vqa', 'forward', 'shuffled'])
def test_deterministic_likelihoods_are_never_given_a_key(reward):
  system = tiny_step.system(frozen_every=1, probe_every=1)
  for objective in ('simpo', 'grpo'):
    method = tiny_step.method(objective=objective, reward=reward)
    assert 'generation/probe_coarse_loss' in traced(Strict, method, system, **further_fields())


# Samplers.


class Exact(NoisyMicro):
  """Reads codes, and its sampler's log-probabilities are its likelihoods."""

  spec = dataclasses.replace(Micro.spec, reads='codes')
  sample_pictures = Micro.sample_pictures
  picture_logps = Micro.picture_logps

  def text_logps(self, picture, question, text, keys, how):
    return Micro.text_logps(self, self._shown(picture), question, text, keys, how)


@pytest.mark.parametrize('objective', ['simpo', 'grpo', 'online_dpo', 'gspo'])
def test_a_sampler_is_compared_with_the_likelihoods_only_where_it_says_that_it_is_exact(objective):
  for guided in (False, True):
    method = tiny_step.method(objective=objective, policy_guidance=guided)
    names = traced(NoisyMicro, method)
    assert not any(name.endswith(SAMPLER) for name in names), names
    for module in (Micro, Exact):
      names = traced(module, method)
      assert {'generation/sampler_gap', 'understanding/sampler_gap'} <= names
      whole_groups = objective in ('grpo', 'gspo')
      assert ('understanding/sampler_ratio_gap' in names) == whole_groups
      assert ('generation/sampler_ratio_gap' in names) == (whole_groups and guided)


# What a model reads.


def test_pixels_become_codes_only_for_a_model_that_reads_codes():
  pixels = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)), jnp.float32)
  noisy, plain = scored_model(), nnx.merge(*tiny_step.model())
  np.testing.assert_array_equal(
    picture_to_read(noisy, pixels).codes, noisy.picture_from_pixels(pixels).codes
  )
  assert picture_to_read(plain, pixels).codes is None
  np.testing.assert_array_equal(picture_to_read(plain, pixels).pixels, pixels)
  gray = variants.gray_picture(noisy, pixels)
  assert gray.codes.shape == (2, 1, micro_model.NUM_CODES) and len(np.unique(gray.codes)) == 1


class Blind(NoisyMicro):
  """Is shown no pixels at all where it reads."""

  def text_logps(self, picture, question, text, keys, how):
    assert picture.codes is not None
    return super().text_logps(Picture(picture.codes, None), question, text, keys, how)

  def sample_texts(self, picture, question, keys, how):
    assert picture.codes is not None
    return super().sample_texts(Picture(picture.codes, None), question, keys, how)


@pytest.mark.parametrize(
  'reward', ['dual', 'probability', 'pmi', 'contrastive', 'vqa', 'forward', 'shuffled']
)
def test_a_model_that_reads_codes_is_given_codes_under_every_reward_and_probe(reward):
  system = tiny_step.system(frozen_every=1, probe_every=1, rollout_chunk=2)
  for objective in ('simpo', 'grpo'):
    method = tiny_step.method(objective=objective, reward=reward)
    assert 'generation/probe_coarse_loss' in traced(Blind, method, system, **further_fields())


def test_rewards_and_probes_of_a_model_that_reads_codes_are_numbers():
  fields = further_fields()
  _, metrics, _, step = tiny_step.run(
    method=tiny_step.method(reward='pmi'),
    system=tiny_step.system(probe_every=1),
    batches=lambda _: tiny_step.batch(**fields),
    noisy=True,
  )
  assert step._cache_size() == 1 and tiny_step.finite(metrics)
  for task in ('generation', 'understanding'):
    assert metrics[f'{task}/reward_spread'] > 0
  assert metrics['generation/probe_swapped_gain'] != 0


def test_shuffled_of_a_model_that_reads_codes_scores_the_codes_of_the_other_picture():
  other = np.random.default_rng(3).integers(0, 255, (2, 16, 16, 3)).astype('u1')
  x = inputs('understanding', other_pixels=jnp.asarray(other))
  codes = x.model.picture_from_pixels(jnp.asarray(other, jnp.float32) / 127.5 - 1.0).codes
  logps = x.model.picture_logps(x.text, codes[:, None], x.score_keys, x.scoring).logp
  np.testing.assert_allclose(controls.shuffled(x), logps.mean(-1), rtol=1e-4)


def test_pmi_of_a_model_that_reads_codes_compares_with_the_codes_of_gray():
  x = inputs('generation')
  logps = token_logps(x, x.picture)
  gray = x.model.picture_from_pixels(jnp.zeros((2, 1, 16, 16, 3)))
  weight = np.abs(logps - token_logps(x, gray)).mean(1, keepdims=True) + 1e-6
  expected = (weight * logps).sum(-1) / weight.sum(-1)
  np.testing.assert_allclose(variants.pmi(x), expected, rtol=1e-4)


def token_logps(x, picture):
  """Of each prompt's tokens, read off pictures (B, g, ...)."""
  text = Text(x.text.ids[:, None], x.text.mask[:, None])
  question = Text(*(jnp.broadcast_to(y, (2, *y.shape)) for y in x.question))
  scores = x.model.text_logps(picture, question, text, x.score_keys, x.scoring)
  return np.asarray(scores.logp)


# Names.

METHOD_FILES = sorted(
  [
    *(ROOT / 'dsr_jax' / f'{name}.py' for name in ('step', 'losses', 'tasks', 'diagnostics')),
    *(ROOT / 'dsr_jax' / f'{name}.py' for name in ('rollouts', 'state', 'chunks')),
    ROOT / 'dsr_jax' / 'models' / 'unified.py',
    *(ROOT / 'dsr_jax' / 'rewards').glob('*.py'),
  ]
)


@pytest.mark.parametrize('path', METHOD_FILES, ids=lambda path: path.stem)
def test_the_method_names_no_model(path):
  text = path.read_text()
  for word in ('janus', 'language_model', 'vqmodel', 'siglip', 'gen_head', 'generation_head'):
    assert word not in text.lower(), word
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.Import | ast.ImportFrom):
      names = [getattr(node, 'module', None) or '', *(alias.name for alias in node.names)]
      assert not any('janus' in name.lower() for name in names), names
