"""The step with a Show-o: what masked diffusion needs of it, and what it must not change."""

import dataclasses

import jax
from mesh_processes import assert_same_step, finish, load, start
import micro_showo
import numpy as np
import pytest
import tiny_step

from dsr_jax import config as config_lib
from dsr_jax import families
from dsr_jax.errors import InputError
from dsr_jax.models.janus.config import JanusConfig
from dsr_jax.models.janus.family import JANUS
from dsr_jax.models.showo.family import SHOWO

NO_GRADIENT = 'k_layernorm/bias'
SAMPLER = ('sampler_gap', 'sampler_ratio_gap', 'effective_sample_size')


def method(**changes):
  return tiny_step.method(**{'inputs_per_step': 4, 'max_text_tokens': 5, **changes})


def batches(which, **changes):
  def at(step):
    batch = tiny_step.batch(which.tasks_at(step), seed=step, rows=which.inputs_per_task)
    return batch._replace(**changes)

  return at


@pytest.mark.parametrize(
  'objective, strategy', [('simpo', 'unified'), ('grpo', 'unified'), ('simpo', 'separate')]
)
def test_both_tasks_learn_and_the_step_compiles_once(objective, strategy):
  which = method(objective=objective, strategy=strategy, separate=config_lib.Separate(swap_every=1))
  state, metrics, records, step = micro_showo.run(
    which, tiny_step.SYSTEM, batches(which), steps=2 if strategy == 'unified' else 4
  )
  assert step._cache_size() == (1 if strategy == 'unified' else 2)  # a program a role
  assert tiny_step.finite(metrics)
  for task in which.tasks_at(3):
    assert metrics[f'{task}/reward_spread'] > 0
  if strategy == 'separate':
    return
  # Of pictures the sampler's probabilities are no likelihoods; texts are exact.
  assert not any(f'generation/{name}' in metrics for name in SAMPLER)
  assert metrics['understanding/sampler_gap'] < 1e-4
  assert records['generation']['codes'].shape == (2, 4, 16)
  moved = jax.tree.map(
    lambda a, b: np.abs(a - b).max(),
    state.params,
    {k: micro_showo.params()[k] for k in state.params},
  )
  assert all(x > 0 for x in jax.tree.leaves(moved['language_model']['layers']))


@pytest.mark.parametrize('likelihood', ['one_step', 'elbo'])
def test_policy_old_policy_and_reference_are_scored_under_one_mask(likelihood):
  """Half of the words are dropped, and yet at first the ratio is exactly 1 and the KL 0."""
  which = method(
    objective='grpo',
    task='generation',
    kl=0.1,
    inner_updates=2,
    prompt_drop=0.5,
    picture_likelihood=likelihood,
  )
  still = batches(which, learning_rate=np.float32(0.0))
  _, metrics, _, _ = micro_showo.run(which, tiny_step.SYSTEM, still)
  assert metrics['generation/ratio_gap'] == 0 and metrics['generation/ratio_gap_last'] == 0
  assert metrics['generation/kl'] <= 1e-12 and metrics['generation/kl_last'] <= 1e-12


def test_rewards_drop_no_words_and_are_one_step_whatever_the_loss_is():
  plain = method(task='understanding', prompt_drop=0.0)
  other = method(task='understanding', prompt_drop=0.9, picture_likelihood='elbo', elbo_draws=2)
  rewards = [
    micro_showo.run(which, tiny_step.SYSTEM, batches(which))[2]['understanding']['rewards']
    for which in (plain, other)
  ]
  np.testing.assert_array_equal(*rewards)


@pytest.mark.slow
def test_a_step_on_eight_devices_is_the_step_on_one(tmp_path):
  finish(start(tmp_path, '1x1x1', '2x2x2', '--model=showo'))
  # A bias of the keys' norm that is not rotated adds the same to every score of a query: its
  # gradient is 0 but for rounding, which Adam's first step makes as large as any other.
  one, eight = (
    {k: v for k, v in load(tmp_path, name).items() if not k.endswith(NO_GRADIENT)}
    for name in ('1x1x1@1', '2x2x2@1')
  )
  assert_same_step(one, eight)


# What a run may ask of it.


def model_of(family, config):
  return families.Model(
    graphdef=None,
    params=None,
    config=config,
    processor=None,
    source={'name': 'mine', 'fingerprint': 'f'},
    family=family,
    spec=family.spec(config),
  )


def asked(part='method', **changes):
  config = config_lib.Config(model='mine')
  return dataclasses.replace(
    config, **{part: dataclasses.replace(getattr(config, part), **changes)}
  )


def test_what_a_run_leaves_to_its_model_is_named():
  config = asked('data', max_prompt_tokens=8)
  model, config = families.settled(model_of(SHOWO, micro_showo.CONFIG), config)
  assert (config.method.prompt_drop, config.method.sampling_steps) == (0.15, 4)
  assert config.method.sampling_noise == 1.0
  # A model of other settings draws by them whoever asks it.
  asks = dataclasses.replace(config.method, sampling_steps=7, sampling_noise=0.5, prompt_drop=0.0)
  again, config = families.settled(model, dataclasses.replace(config, method=asks))
  assert (again.config.sampling_steps, again.config.sampling_noise) == (7, 0.5)
  assert config.method.prompt_drop == 0.0
  # Of a Janus nothing is left open.
  config = asked()
  assert families.settled(model_of(JANUS, JanusConfig.tiny()), config)[1] == config


@pytest.mark.parametrize(
  'family, sizes, part, changes, message',
  [
    (SHOWO, micro_showo.CONFIG, 'method', {'cfg_interval': 3}, 'method.cfg_interval=3'),
    (SHOWO, micro_showo.CONFIG, 'method', {'policy_guidance': True}, 'method.policy_guidance'),
    (SHOWO, micro_showo.CONFIG, 'system', {'cache_dtype': 'int8'}, 'system.cache_dtype=int8'),
    (SHOWO, micro_showo.CONFIG, 'data', {'max_prompt_tokens': 13}, 'at most 12'),
    (
      JANUS,
      JanusConfig.tiny(),
      'method',
      {'picture_likelihood': 'elbo'},
      'picture_likelihood=elbo',
    ),
    (JANUS, JanusConfig.tiny(), 'method', {'prompt_drop': 0.15}, 'method.prompt_drop=0.15'),
    (JANUS, JanusConfig.tiny(), 'method', {'sampling_steps': 18}, 'method.sampling_steps=18'),
  ],
)
def test_what_makes_no_sense_for_a_family_is_refused_in_one_sentence(
  family, sizes, part, changes, message
):
  config = asked(part, **changes)
  if part != 'data':
    config = dataclasses.replace(config, data=config_lib.Data(max_prompt_tokens=8))
  with pytest.raises(InputError, match=message) as e:
    families.settled(model_of(family, sizes), config)
  assert family.name in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize(
  'key, value',
  [
    ('prompt_drop', 1.0),
    ('prompt_drop', -0.5),
    ('prompt_drop_way', 'blur'),
    ('picture_likelihood', 'exact'),
    ('elbo_draws', 0),
    ('elbo_draws', 3),
    ('sampling_steps', 0),
    ('sampling_noise', -2.0),
  ],
)
def test_impossible_values_are_refused_before_any_model_is_read(key, value):
  with pytest.raises(InputError, match=f'method.{key}(=| is ){value!r}'.replace('.', '[.]')):
    tiny_step.load(**{f'method__{key}': value})
