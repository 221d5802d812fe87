"""How an image's reward is divided among its codes, and what the objectives make of it."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_step

from dsr_jax import config as config_lib
from dsr_jax import credit, losses
from dsr_jax.errors import InputError
from dsr_jax.models.unified import Picture, Scoring, Text
from dsr_jax.rewards import dual

CREDITED = [name for name, objective in losses.OBJECTIVES.items() if objective.takes_credit]
SIDE = 4  # codes


class Told:
  """A model whose codes have given log-probabilities with and without a prompt."""

  def __init__(self, with_prompt, without):
    self._logps = {1.0: with_prompt, 0.0: without}

  def picture_logps(self, prompt, codes, keys, how: Scoring):
    scores = jnp.broadcast_to(self._logps[how.guidance], codes.shape)
    return type('Scores', (), {'logp': scores})


def drawn(codes, *, policy=None, pixels=None, reward=None) -> credit.Drawn:
  prompt = Text(jnp.zeros((len(codes), 3), jnp.int32), jnp.ones((len(codes), 3), bool))
  return credit.Drawn(policy, prompt, jnp.asarray(codes), pixels, reward, Scoring(), None)


def some_codes(groups=2, samples=3):
  return np.random.default_rng(0).integers(0, 5, (groups, samples, SIDE**2))


def test_guidance_weighs_a_code_by_how_much_the_prompt_changes_it_either_way():
  with_prompt = jnp.arange(16.0) * -0.1
  without = with_prompt.at[3].add(-2.0).at[7].add(1.0)
  weights = credit.divided('guidance', drawn(some_codes(), policy=Told(with_prompt, without)))
  expected = np.zeros(16)
  expected[3], expected[7] = 32 / 3, 16 / 3
  np.testing.assert_allclose(weights, np.broadcast_to(expected, (2, 3, 16)), rtol=1e-5, atol=1e-5)


def test_rarity_weighs_a_code_by_the_samples_that_have_another():
  codes = np.zeros((1, 4, 16), int)
  codes[0, 1, 5] = codes[0, 2, 5] = 1  # two against two
  codes[0, 3, 9] = 2  # one against three
  raw = np.asarray(credit.rarity(drawn(codes)))
  np.testing.assert_allclose(raw[0, :, 5], 0.5)
  np.testing.assert_allclose(raw[0, :, 9], [0.25, 0.25, 0.25, 0.75])
  assert not np.delete(raw, [5, 9], axis=-1).any()


def test_early_codes_weigh_most_and_the_last_not_nothing():
  weights = np.asarray(credit.divided('early', drawn(some_codes())))
  assert (np.diff(weights, axis=-1) < 0).all() and (weights > 0).all()


def test_attribution_finds_the_patch_on_which_the_reward_depends():
  rng = np.random.default_rng(1)
  pixels = jnp.asarray(rng.uniform(-1, 1, (2, 3, 16, 16, 3)), jnp.float32)

  def reward(pixels):
    return jnp.mean(jnp.square(pixels[..., 4:8, 8:12, :]), axis=(-3, -2, -1))  # row 1, column 2

  weights = credit.divided('attribution', drawn(some_codes(), pixels=pixels, reward=reward))
  expected = np.zeros(16)
  expected[1 * SIDE + 2] = 16
  np.testing.assert_allclose(weights, np.broadcast_to(expected, (2, 3, 16)), atol=1e-4)


def test_where_nothing_distinguishes_the_codes_all_weigh_the_same():
  codes = np.ones((2, 3, 16), int)
  np.testing.assert_array_equal(credit.divided('rarity', drawn(codes)), 1.0)
  alike = Told(jnp.zeros(16), jnp.zeros(16))
  np.testing.assert_array_equal(credit.divided('guidance', drawn(codes, policy=alike)), 1.0)


def test_the_share_is_one_for_equal_weights_and_one_code_for_one():
  weights = np.ones((1, 2, 16))
  weights[0, 1] = 0
  weights[0, 1, 3] = 16
  np.testing.assert_allclose(credit.share(weights), [[1, 1 / 16]])


def test_attribution_of_a_model_is_the_slope_of_its_own_reward():
  """Against finite differences of R_G, along the line from an image's mean color to the image."""
  graphdef, params = tiny_step.model()
  model = nnx.merge(graphdef, params)
  batch = tiny_step.batch().generation
  rng = np.random.default_rng(3)
  codes = jnp.asarray(rng.integers(0, model.spec.codebook_size, (4, 2, model.spec.num_codes)))
  pixels = model.picture_from_codes(codes).pixels

  def reward(pixels):
    return dual.of_prompts(
      model,
      Picture(codes, pixels),
      batch.prompt,
      batch.instruction,
      Scoring(),
      eos_id=None,
      keys=None,
    )

  given = credit.Drawn(model, batch.prompt, codes, pixels, reward, Scoring(), None)
  found = np.asarray(credit.attribution(given))
  expected, _ = dual.generation(
    model, Picture(codes, pixels), batch.prompt, batch.instruction, Scoring()
  )
  np.testing.assert_allclose(reward(pixels), expected, rtol=1e-6)

  side = round(model.spec.num_codes**0.5)
  cell = pixels.shape[-2] // side
  mean = jnp.mean(pixels, axis=(-3, -2), keepdims=True)
  for place in (0, side + 1):
    row, column = (cell * x for x in divmod(place, side))
    here = jnp.zeros(pixels.shape).at[:, :, row : row + cell, column : column + cell].set(1.0)
    step = 1e-2 * here * (pixels - mean)
    slope = np.asarray(reward(pixels + step) - reward(pixels - step)) / 2e-2
    np.testing.assert_allclose(found[:, :, place], np.abs(slope), rtol=0.02, atol=2e-5)


# In the loss.


def inputs_of(name, weights, seed=0):
  rng = np.random.default_rng(seed)
  samples = {True: 2, False: 1}[name != 'best_of_n'] if name not in GROUPED else 4
  shape = (3, samples, 5)
  logps = rng.normal(-2, 0.5, shape)
  mask = np.arange(5) < rng.integers(1, 6, shape[:2])[..., None]
  to = [jnp.asarray(x, jnp.float32) for x in (logps, logps + rng.normal(0, 0.05, shape))]
  rewards = jnp.asarray(rng.normal(-3, 0.5, shape[:2]), jnp.float32) if name in GROUPED else None
  given = None if weights is None else jnp.asarray(weights(rng, shape), jnp.float32)
  return losses.LossInputs(*to, None, jnp.asarray(mask), rewards, given)


GROUPED = [name for name in CREDITED if losses.OBJECTIVES[name].off_policy_ok]
METHOD = config_lib.Method(kl=0.0)


@pytest.mark.parametrize('name', CREDITED)
def test_equal_weights_change_nothing(name):
  loss = losses.OBJECTIVES[name].loss
  plain = loss(inputs_of(name, None), METHOD)
  ones = loss(inputs_of(name, lambda rng, shape: np.ones(shape)), METHOD)
  np.testing.assert_array_equal(plain, ones)


@pytest.mark.parametrize('name', CREDITED)
def test_a_tokens_gradient_is_multiplied_by_its_weight(name):
  """At ratio 1; for SimPO up to the weight of the pair, one number for all its tokens."""
  x = inputs_of(name, lambda rng, shape: rng.uniform(0.2, 2, shape))
  x = x._replace(old_logps=x.logps)

  def grad(x):
    def total(logps):
      return jnp.sum(losses.OBJECTIVES[name].loss(x._replace(logps=logps), METHOD))

    return np.asarray(jax.grad(total)(x.logps))

  weighted, plain = grad(x), grad(x._replace(credit=None))
  factor = weighted / np.where(x.mask, plain * np.asarray(x.credit), 1.0)
  for group, mask in zip(factor, np.asarray(x.mask)):
    np.testing.assert_allclose(group[mask], group[mask][0], rtol=1e-4)
    if name != 'simpo':
      np.testing.assert_allclose(group[mask], 1.0, rtol=1e-4)


# In the step.


@pytest.mark.parametrize('way', credit.WAYS)
def test_a_step_learns_with_every_way_and_only_images_are_weighted(way):
  equal = tiny_step.run(tiny_step.method(objective='grpo', kl=0.0))
  method = tiny_step.method(objective='grpo', kl=0.0, credit=way)
  state, metrics, records, _ = tiny_step.run(method)
  assert tiny_step.finite(metrics)
  np.testing.assert_array_equal(
    records['generation']['codes'], equal[2]['generation']['codes']
  )  # what is sampled does not change
  assert 0 < metrics['generation/credit_share'] < 1
  assert 'understanding/credit_share' not in metrics
  assert metrics['understanding/loss'] == pytest.approx(equal[1]['understanding/loss'], abs=1e-6)
  moved = jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), state, equal[0]))
  assert max(map(float, moved)) > 0


def test_chunks_do_not_change_the_weights():
  method = tiny_step.method(objective='grpo', kl=0.0, credit='rarity')
  whole = tiny_step.run(method)[1]
  parts = tiny_step.run(
    method, dataclasses.replace(tiny_step.SYSTEM, rollout_chunk=2, update_chunk=1)
  )[1]
  for name, value in whole.items():
    np.testing.assert_allclose(parts[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(method__credit='late'), ['late', 'equal, guidance, rarity, early, attribution']),
    (dict(method__credit='early', method__objective='rloo'), ['objective=rloo', 'simpo, ']),
    (dict(method__credit='early', method__task='understanding'), ['draws nothing']),
  ],
)
def test_credit_that_means_nothing_is_refused_in_one_sentence(changes, words):
  with pytest.raises(InputError) as e:
    tiny_step.load(**changes)
  assert all(word in str(e.value) for word in words) and '\n' not in str(e.value)


def test_the_keys_values_are_the_ways():
  assert set(config_lib.CREDITS) == {'equal', *credit.WAYS}
