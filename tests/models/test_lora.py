"""Adapters: what they compute, what they cost, and that they leave the house whole."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import micro_model
from micro_model import MICRO
import numpy as np
from peft import PeftModel
import pytest
import tiny_step
import torch
from transformers import JanusForConditionalGeneration

from dsr_jax import config as config_lib
from dsr_jax import saved_config
from dsr_jax import state as state_lib
from dsr_jax.convert import __main__ as command
from dsr_jax.convert import adapter
from dsr_jax.convert import locate as model_source
from dsr_jax.errors import InputError
from dsr_jax.models.common import lora
from dsr_jax.models.janus import model as janus
from dsr_jax.models.janus.config import JanusConfig
from dsr_jax.models.janus.family import JANUS
from dsr_jax.models.unified import Picture, Sampling, Scoring, Text

RANK = config_lib.Lora(rank=3)
METHOD = tiny_step.method(trainable='lora', lora=RANK)
TARGETS = MICRO.lora_targets
TINY = JanusConfig.tiny(vocab_size=40)


def random_adapters(params, targets=TARGETS, rank=3, seed=0):
  """Adapters whose B is not zero."""
  keys = iter(jax.random.split(jax.random.key(seed), 2 * len(targets)))
  return {
    name: dict(a=pair['a'], b=0.3 * jax.random.normal(next(keys), pair['b'].shape))
    for name, pair in lora.init(params, targets, rank, seed).items()
  }


def likelihoods(model, seed=0):
  """Of pictures and texts, (B, G, ...)."""
  rng = np.random.default_rng(seed)
  n = micro_model.NUM_CODES
  text = Text(jnp.asarray(rng.integers(9, 40, (2, 3, 5)).astype('i4')), jnp.ones((2, 3, 5), bool))
  codes = jnp.asarray(rng.integers(0, micro_model.CODES, (2, 3, n)).astype('i4'))
  picture = Picture(codes[:, :1], jnp.asarray(rng.uniform(-1, 1, (2, 1, 16, 16, 3)).astype('f4')))
  question = Text(text.ids[:, 0], text.mask[:, 0])
  return (
    model.picture_logps(Text(text.ids[:, :1], text.mask[:, :1]), codes, None, Scoring()).logp,
    model.text_logps(picture, question, text, None, Scoring()).logp,
  )


def test_a_new_adapter_changes_nothing_and_a_used_one_everything():
  graphdef, params = tiny_step.model()
  plain = likelihoods(nnx.merge(graphdef, params))
  new = lora.init(params, TARGETS, 3, 0)
  fresh = likelihoods(lora.attach(nnx.merge(graphdef, params), TARGETS, new))
  used = likelihoods(lora.attach(nnx.merge(graphdef, params), TARGETS, random_adapters(params)))
  for a, b, c in zip(plain, fresh, used):
    np.testing.assert_array_equal(a, b)
    assert np.abs(np.asarray(a) - np.asarray(c)).max() > 0.1


def test_merged_weights_compute_what_adapters_beside_them_do():
  graphdef, params = tiny_step.model()
  adapters = random_adapters(params)
  beside = likelihoods(lora.attach(nnx.merge(graphdef, params), TARGETS, adapters))
  merged = likelihoods(nnx.merge(graphdef, lora.merged(params, TARGETS, adapters)))
  for a, b in zip(beside, merged):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_sampling_reads_the_adapters():
  graphdef, params = tiny_step.model()
  prompt = Text(jnp.array([[9, 10, 11]]), jnp.ones((1, 3), bool))
  keys = jax.random.split(jax.random.key(0), 8).reshape(1, 8)

  def draw(model):
    return model.sample_pictures(prompt, keys, Sampling())

  adapted = lora.attach(nnx.merge(graphdef, params), TARGETS, random_adapters(params))
  codes, logp = draw(adapted)
  shared = Text(prompt.ids[:, None], prompt.mask[:, None])
  scored = adapted.picture_logps(shared, codes, None, Scoring()).logp
  np.testing.assert_allclose(logp, scored, atol=1e-4)
  assert not np.array_equal(codes, draw(nnx.merge(graphdef, params))[0])


def test_only_the_adapters_have_masters_moments_and_gradients():
  state = tiny_step.start(METHOD)
  adapters = sum(x.size for x in jax.tree.leaves(state.params))
  shapes = [x.shape for pair in state.params['lora'].values() for x in pair.values()]
  assert set(state.params) == {'lora'} and set(state.params['lora']) == set(TARGETS)
  assert all(3 in shape for shape in shapes)
  moments = sum(x.size for x in jax.tree.leaves(state.opt_state))
  assert 2 * adapters <= moments <= 2 * adapters + 4
  after, metrics, _, step = tiny_step.run(method=METHOD, steps=3)
  assert step._cache_size() == 1 and metrics['update_norm'] > 0
  for part, tree in tiny_step.model()[1].items():
    for a, b in zip(jax.tree.leaves(after.fixed_params[part]), jax.tree.leaves(tree)):
      np.testing.assert_array_equal(a, b)
  assert all(np.abs(pair['b']).max() > 0 for pair in after.params['lora'].values())


def test_the_first_step_of_an_adapter_sees_the_same_rewards_as_any_other():
  full, adapted = tiny_step.run()[1], tiny_step.run(method=METHOD)[1]
  for key in (
    'loss',
    'generation/reward_mean',
    'understanding/reward_best',
    'generation/sampler_gap',
  ):
    np.testing.assert_allclose(full[key], adapted[key], rtol=1e-5, atol=1e-5)


def test_the_initial_model_under_adapters_is_the_base_without_a_copy_of_it():
  method = tiny_step.method(trainable='lora', lora=RANK, objective='grpo')
  state = tiny_step.start(method)
  assert set(state.ref_params) == {'lora'}
  _, metrics, _, _ = tiny_step.run(method=method)
  np.testing.assert_allclose(metrics['generation/kl'], 0.0, atol=1e-6)


def test_policy_params_are_merged():
  state, _, _, _ = tiny_step.run(method=METHOD, steps=3)
  params = state_lib.policy_params(state, MICRO)
  assert jax.tree.structure(params) == jax.tree.structure(tiny_step.model()[1])
  expected = lora.merged(tiny_step.model()[1], TARGETS, state.params['lora'])
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected)):
    np.testing.assert_array_equal(a, b)


# Out of the house.


def janus_adapters(seed=0):
  """Of the family whose directories are written."""
  shapes = janus.abstract_params(TINY)
  return jax.device_get(random_adapters(shapes, JANUS.lora_targets, seed=seed))


def test_an_adapter_directory_comes_back_as_it_was(tmp_path):
  adapters = janus_adapters()
  adapter.save(tmp_path / 'adapter', adapters, 'some/base', JANUS)
  again = adapter.load(tmp_path / 'adapter', TINY.text.num_hidden_layers, JANUS)
  for a, b in zip(jax.tree.leaves(adapters), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(a, b)
  with pytest.raises(InputError, match='not empty.*--overwrite'):
    adapter.save(tmp_path / 'adapter', adapters, 'some/base', JANUS)


def test_peft_loads_the_adapter_and_computes_what_merged_weights_do(tmp_path, hf_directory, bundle):
  """transformers' Janus with the adapter under peft, against ours merged: text logits."""
  adapters = jax.device_get(random_adapters(bundle.params, JANUS.lora_targets, rank=4))
  adapter.save(tmp_path / 'adapter', adapters, str(hf_directory), JANUS)
  torch.set_num_threads(1)
  base = JanusForConditionalGeneration.from_pretrained(hf_directory, dtype=torch.float32).eval()
  model = PeftModel.from_pretrained(base, tmp_path / 'adapter').eval()
  loaded = {name: value for name, value in model.state_dict().items() if 'lora_' in name}
  assert len(loaded) == 2 * 7 * bundle.config.text.num_hidden_layers
  assert all('language_model' in name for name in loaded) and all(
    v.abs().max() > 0 for v in loaded.values()
  )
  ids = np.random.default_rng(0).integers(0, 256, (1, 9))
  with torch.no_grad():
    theirs = model(input_ids=torch.tensor(ids)).logits.numpy()
  graphdef, params = janus.graphdef_of(bundle.config), jax.tree.map(jnp.asarray, bundle.params)

  def logits(model):
    embeds = model.language_model.embed_tokens(jnp.asarray(ids))
    prefix = model.language_model.prefill(embeds[:, :1], jnp.ones(1, jnp.int32))
    return model.lm_head(model.language_model.extend(prefix, embeds[:, None, 1:]))[0, 0]

  merged = logits(nnx.merge(graphdef, lora.merged(params, JANUS.lora_targets, adapters)))
  beside = logits(lora.attach(nnx.merge(graphdef, params), JANUS.lora_targets, adapters))
  np.testing.assert_allclose(merged, beside, atol=1e-5)
  np.testing.assert_allclose(merged, theirs[0, 1:], atol=1e-4)
  assert np.std(theirs) > 1


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(method__trainable='adapter'), ['lora', 'all_but_vq']),
    (dict(method__lora__rank=0), ['lora.rank', 'at least 1']),
  ],
)
def test_impossible_adapters_are_refused_in_one_sentence(changes, words):
  with pytest.raises(InputError) as e:
    tiny_step.load(**changes)
  assert all(word in str(e.value) for word in words) and '\n' not in str(e.value)


def test_the_convert_command_writes_a_runs_adapter_and_says_where_there_is_none(
  tmp_path, monkeypatch, hf_directory
):
  def found(trained):
    about = {
      'model': {'name': 'some/base', 'fingerprint': 'f' * 64},
      'method': saved_config.to_json(config_lib.Config())['method'],
      'data': {'prompts': 'mine.txt'},
    }
    return model_source.Located('runs/a', str(hf_directory), 'runs/a', 3, trained, about)

  for seed, overwrite in ((0, False), (1, True)):
    adapters = janus_adapters(seed)
    monkeypatch.setattr(
      model_source, 'locate', lambda name, *_, adapters=adapters: found({'lora': adapters})
    )
    assert (
      command.convert('runs/a', str(tmp_path / 'out'), 'peft', overwrite=overwrite)['format']
      == 'peft'
    )
    np.testing.assert_array_equal(
      adapter.load(tmp_path / 'out', TINY.text.num_hidden_layers, JANUS)['q_proj']['b'],
      adapters['q_proj']['b'],
    )
  monkeypatch.setattr(model_source, 'locate', lambda name, *_: found({'lm_head': {}}))
  with pytest.raises(InputError, match='runs/a has no adapters.*trainable=lora'):
    command.convert('runs/a', str(tmp_path / 'none'), 'peft')
  assert [path.name for path in tmp_path.iterdir()] == ['out']
