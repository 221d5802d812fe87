"""Pretraining of the small Show-o: what is masked, and what is learned."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import micro_showo
import numpy as np
import pytest

from dsr_jax import config_loading, pretrain, pretrain_parts, pretrain_showo
from dsr_jax.errors import InputError
from dsr_jax.models.showo import magvit
from dsr_jax.models.showo import model as showo
from dsr_jax.models.unified import Scoring, Text
from dsr_jax.scenes import render


def test_masked_shares_follow_the_cosine_and_are_never_nothing():
  masked = np.asarray(pretrain_showo.masked_share(jax.random.key(0), 4000, 16))
  share = masked.mean(-1)
  assert masked.any(-1).all()
  # cos(pi u / 2) of a uniform u has mean 2 / pi, and is below 1 / 2 a third of the time.
  assert abs(share.mean() - 2 / np.pi) < 0.02
  assert abs((share < 0.5).mean() - 1 / 3) < 0.05
  assert np.ptp(masked.mean(0)) < 0.05


def test_what_is_shown_counts_nothing_and_blank_prompts_are_all_alike():
  config = micro_showo.CONFIG
  rng = np.random.default_rng(0)
  codes = jnp.asarray(rng.integers(0, 16, (2, 16)), jnp.int32)
  masked = jnp.asarray(rng.random((2, 16)) < 0.5)
  prompts = [
    Text(jnp.asarray(rng.integers(9, 40, (2, 5)), jnp.int32), jnp.ones((2, 5), bool))
    for _ in range(2)
  ]

  @jax.jit
  def scores(params, ids, blank):
    model = nnx.merge(showo.graphdef_of(config), params)
    prompt = Text(ids, jnp.ones(ids.shape, bool))
    return model.masked_logps(prompt, codes, masked, Scoring(), blank=blank).logp

  blank = jnp.asarray([True, False])
  one, other = (np.asarray(scores(micro_showo.params(), p.ids, blank)) for p in prompts)
  assert not one[~np.asarray(masked)].any() and (one[np.asarray(masked)] < 0).all()
  np.testing.assert_allclose(one[0], other[0], atol=1e-6)
  assert np.abs(one[1] - other[1]).max() > 1e-3


def some_patches(count: int = 40):
  return np.random.default_rng(2).integers(0, 256, (count, 12)).astype(np.uint8)


def test_every_kind_of_patch_has_one_code_and_no_code_is_wasted():
  patches = some_patches()
  kinds, codes = pretrain_showo.teach_codes(np.concatenate([patches, patches]), bits=4, seed=0)
  np.testing.assert_array_equal(kinds, np.unique(patches, axis=0))
  assert set(codes) == set(range(16))


def test_with_few_kinds_of_patches_each_has_a_code_of_its_own():
  kinds, codes = pretrain_showo.teach_codes(some_patches(11), bits=4, seed=0)
  assert len(kinds) == len(set(codes)) == 11 and max(codes) < 16


def test_bits_are_nearer_to_linear_in_the_pixels_than_codes_given_at_random():
  patches = pretrain_showo.Lesson(0, 5).kinds.astype(float)
  _, codes = pretrain_showo.teach_codes(patches.astype(np.uint8), bits=5, seed=0)

  def explained(codes):
    bits = np.asarray(magvit.signs_of(codes, 5))
    inputs = np.concatenate([bits, np.ones((len(bits), 1))], axis=1)
    fit = inputs @ np.linalg.lstsq(inputs, patches, rcond=None)[0]
    return 1 - np.var(patches - fit) / np.var(patches - patches.mean(axis=0))

  shuffled = np.random.default_rng(0).permutation(32)[codes]
  assert explained(codes) > 1.5 * explained(shuffled)


def test_images_have_the_codes_of_their_patches_and_an_unknown_patch_that_of_the_nearest():
  lesson = pretrain_showo.Lesson(0, 5)
  pixels = pretrain_parts.tokenizer_batch(1, 7, 2)
  known = render.patches(pixels)
  codes = lesson(pixels)
  where = [(lesson.kinds == patch).all(axis=1).argmax() for patch in known[1]]
  np.testing.assert_array_equal(codes[1], lesson.codes[where])
  changed = pixels.copy()
  changed[1, 0, 0, 0] ^= 1  # no rendered patch has this value
  np.testing.assert_array_equal(lesson(changed), codes)


def test_encoder_and_decoder_both_learn_from_the_taught_codes():
  graphdef = showo.graphdef_of(micro_showo.CONFIG)
  rng = np.random.default_rng(1)
  pixels = jnp.asarray(rng.uniform(-1, 1, (1, 16, 16, 3)), jnp.float32)
  codes = jnp.asarray(rng.integers(0, 16, (1, 16)), jnp.int32)

  def loss(vq):
    params = {**micro_showo.params(), 'vqmodel': vq}
    return pretrain_showo.image_loss(nnx.merge(graphdef, params).vqmodel, pixels, codes)[0]

  grads = jax.jit(jax.grad(loss))(micro_showo.params()['vqmodel'])
  for part in (grads['encoder']['quant_conv'], grads['decoder']['conv_out']):
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(part))


def test_codes_that_share_bits_begin_alike_and_words_as_they_were():
  config, before = micro_showo.CONFIG, jax.tree.map(jnp.asarray, micro_showo.params())
  after = pretrain_showo.informed_start(before, config, 0)
  for path, axis in (
    (('language_model', 'embed_tokens', 'embedding'), 0),
    (('lm_head', 'kernel'), 1),
  ):
    old, new = (functools.reduce(dict.__getitem__, path, tree) for tree in (before, after))
    old, new = (np.moveaxis(np.asarray(x), axis, 0) for x in (old, new))
    codes = new[config.first_code : config.mask_id]
    rest = np.delete(new - old, np.s_[config.first_code : config.mask_id], axis=0)
    assert not rest.any()
    far = np.linalg.norm(codes[:, None] - codes, axis=-1)
    bits = np.array([[(i ^ j).bit_count() for j in range(16)] for i in range(16)])
    assert all(far[bits == n].mean() < far[bits == n + 1].mean() for n in range(4))
    np.testing.assert_allclose(
      codes.std(), old[config.first_code : config.mask_id].std(), rtol=1e-4
    )


def test_another_family_is_refused():
  config = config_loading.read('scenes_showo_pretrain').unlock()
  config.family = 'emu'
  with pytest.raises(InputError, match='config.family is emu; set it to janus or showo'):
    pretrain.check(config)


def test_a_stage_that_is_killed_goes_on_where_it_was(tmp_path):
  """Its state is a dict; what is done to it is counted."""
  config = config_loading.read('scenes_showo_pretrain').unlock()
  config.save_every = 2
  seen = []

  def one(state, step):
    seen.append(step)
    if len(seen) == 4:
      raise KeyboardInterrupt
    return {**state, 'sums': state['sums'] + step, 'step': state['step'] + 1}, ('%d', (step,))

  def run():
    start = dict(params={'a': jnp.ones(2)}, sums=jnp.zeros(()), step=jnp.int32(0))
    return pretrain_parts.run_loop('stage', config, ('vq',), 5, start, one, str(tmp_path / 'stage'))

  with pytest.raises(KeyboardInterrupt):
    run()
  state = run()
  assert seen == [0, 1, 2, 3, 2, 3, 4] and float(state['sums']) == 10 and int(state['step']) == 5
