"""Show-o against the original code's own numbers (tests/golden/showo/README.md)."""

import golden_showo as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.models.common.logprobs import guide
from dsr_jax.models.showo import magvit, maskgit
from dsr_jax.models.unified import Picture, Sampling, Scoring, Text, row_keys

TOLERANCE = 1e-5


def close(ours, theirs, atol=TOLERANCE):
  np.testing.assert_allclose(np.asarray(ours), theirs, atol=atol, rtol=0)


# The image tokenizer.


@pytest.fixture(scope='module')
def pixels():
  return jnp.asarray(golden.arrays('magvit_tiny')['pixels'].transpose(0, 2, 3, 1))


def test_golden_pixels_have_the_golden_codes(pixels):
  theirs = golden.arrays('magvit_tiny')
  close(golden.tokenizer().latents(pixels), theirs['latent'].transpose(0, 2, 3, 1))
  np.testing.assert_array_equal(golden.tokenizer().encode(pixels), theirs['codes'])


def test_golden_codes_have_the_golden_pixels():
  theirs = golden.arrays('magvit_tiny')
  codes = jnp.asarray(theirs['codes'], jnp.int32)
  close(golden.tokenizer().decode(codes), theirs['decoded'].transpose(0, 2, 3, 1))


def test_zero_is_no_bit_and_the_first_channel_counts_most():
  z = jnp.asarray([[0.0, -0.0, 0.1], [1.0, -1.0, -1.0]])
  np.testing.assert_array_equal(magvit.codes_of(z), [1, 4])
  np.testing.assert_array_equal(magvit.signs_of(jnp.asarray([1, 4]), 3), [[-1, -1, 1], [1, -1, -1]])


# The language model: the original's whole rows, padded on the left, against prefix and block.


def test_code_logits_of_half_masked_pictures():
  theirs, model = golden.arrays('showo_tiny'), golden.showo()
  for row, ids in enumerate(theirs['t2i_ids']):
    start = list(ids).index(golden.T2I)
    soi = list(ids).index(golden.SOI)
    content = jnp.asarray(ids[start + 2 : soi - 1], jnp.int32)[None]
    prefix = model._generation_prefix(Text(content, jnp.ones(content.shape, bool)), False)
    hidden = model._block(prefix, jnp.asarray(ids[soi + 1 : -1], jnp.int32)[None, None])
    close(model.code_logits(hidden)[0, 0], theirs['t2i_logits'][row, soi + 1 : -1, 50:66])


def test_text_probabilities_after_a_picture():
  theirs, model = golden.arrays('showo_tiny'), golden.showo()
  ids = theirs['mmu_ids'][0]
  picture = Picture(jnp.asarray(ids[2:11] - 50, jnp.int32)[None, None], None)
  text = jnp.asarray(ids[None, None, 14:], jnp.int32)
  nothing = Text(jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), bool))
  scores = model.text_logps(
    picture, nothing, Text(text, jnp.ones(text.shape, bool)), None, Scoring()
  )
  logits = theirs['mmu_logits'][0, 13:-1, :40].astype(np.float64)
  logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  close(scores.logp[0, 0], np.take_along_axis(logps, ids[14:, None], -1)[:, 0])


# The sampler, step by step with the original's own chance.


def prompts():
  rows = golden.arrays('showo_tiny')['sampler_cond']
  contents = [row[list(row).index(golden.T2I) + 2 : -12] for row in rows]
  ids = np.zeros((len(rows), max(map(len, contents))), np.int32)
  mask = np.zeros(ids.shape, bool)
  for row, content in enumerate(contents):
    ids[row, : len(content)], mask[row, : len(content)] = content, True
  return Text(jnp.asarray(ids), jnp.asarray(mask))


def test_sampler_masks_and_codes_of_every_step():
  theirs, model = golden.arrays('showo_tiny'), golden.showo()
  guidance = float(theirs['sampler_w']) + 1  # ours counts from the unconditional
  plan = maskgit.schedule(9, 6, 1.0)
  close(plan.noise, theirs['sampler_tau'], 1e-6)
  prefix = model._generation_prefix(prompts(), True)
  known, codes = np.zeros((3, 9), bool), np.zeros((3, 9), np.int32)
  for step in range(6):
    now = jnp.where(known, codes + 50, 66)[:, None]
    hidden = model._block(prefix, jnp.repeat(now, 2, axis=0)).reshape(3, 2, 9, -1)
    logits = guide(model.code_logits(hidden), guidance, axis=1)
    close(logits, theirs['sampler_logits'][step])
    codes = np.where(known, codes, theirs['sampler_proposals'][step])
    logps = jnp.take_along_axis(jax.nn.log_softmax(logits), codes[..., None], -1)[..., 0]
    gumbel = maskgit.gumbel_of(jnp.asarray(theirs['sampler_uniform'][step]))
    sure = maskgit.sureness(logps, jnp.asarray(known), gumbel, plan.noise[step])
    masked = np.asarray(maskgit.least_sure(sure, plan.masked[step]))
    np.testing.assert_array_equal(masked, theirs['sampler_kept_masked'][step])
    known = known | ~masked
  np.testing.assert_array_equal(codes, theirs['sampler_final'])


@pytest.mark.parametrize(
  'codes, steps, masked',
  [
    (256, 18, '255 252 247 240 232 221 209 196 181 164 146 127 108 87 66 44 22 1'),
    (256, 16, '254 251 244 236 225 212 197 181 162 142 120 97 74 49 25 1'),
    (256, 12, '253 247 236 221 203 181 155 127 97 66 33 1'),
    (64, 8, '62 59 53 45 35 24 12 1'),
    (64, 12, '63 61 59 55 50 45 38 31 24 16 8 1'),
  ],
)
def test_schedule_is_the_original_one(codes, steps, masked):
  assert maskgit.schedule(codes, steps, 1.0).masked.tolist() == list(map(int, masked.split()))


def test_schedule_of_the_large_model():
  plan = maskgit.schedule(1024, 50, 1.0).masked.tolist()
  assert plan[:15] == [
    *(1023, 1021, 1019, 1015, 1011, 1005, 999, 991, 983, 973, 963, 952, 939, 926, 912)
  ]
  assert plan[-6:] == [160, 128, 96, 64, 32, 1]


def test_a_schedule_of_more_steps_than_codes_ends_with_one():
  assert maskgit.schedule(4, 8, 1.0).masked.tolist() == [3, 2, 1, 1, 1, 1, 1, 1]


def test_sampled_codes_are_those_of_the_loop_step_by_step():
  """The compiled sampler, with its own chance, against what the golden run was held to."""
  model, keys = golden.showo(), row_keys(jax.random.key(3), 0, 3, 2)
  how = Sampling(guidance=2.75)
  codes, logps = jax.jit(lambda keys: model.sample_pictures(prompts(), keys, how))(keys)
  prefix = model._generation_prefix(prompts(), True)
  plan = maskgit.schedule(9, 6, 1.0)
  known, now = np.zeros((3, 2, 9), bool), np.zeros((3, 2, 9), np.int32)
  fixed = np.zeros((3, 2, 9), np.float32)
  for step in range(6):
    inputs = jnp.where(known, now + 50, 66)
    hidden = model._block(prefix, jnp.repeat(inputs, 2, axis=0)).reshape(3, 2, 2, 9, -1)
    proposed, logp = model._propose(hidden, keys, step, how)
    logp = np.where(known, fixed, logp)
    now = np.where(known, now, proposed)
    gumbel = maskgit.noise_of(keys, 2**30 + step, 9)
    sure = maskgit.sureness(jnp.asarray(logp), jnp.asarray(known), gumbel, plan.noise[step])
    again = np.asarray(maskgit.least_sure(sure, plan.masked[step]))
    fixed, known = logp, known | ~again
  np.testing.assert_array_equal(codes, now)
  close(logps, fixed)
