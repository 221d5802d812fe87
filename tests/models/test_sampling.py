"""Sampling against teacher forcing: two code paths, one distribution. Float32, mixed lengths, both
tasks.
"""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.models.common.logprobs import log_softmax
from dsr_jax.models.janus import model as janus
from dsr_jax.models.janus.config import JanusConfig
from dsr_jax.models.unified import Picture, Sampling, Scoring, Text, row_keys
from dsr_jax.plan import program as plan_program

TOLERANCE = dict(atol=1e-4, rtol=0)
PROMPTS = ['a red circle left of a blue square', 'no', 'two small green rings and 3 dotted stars.']
QUESTIONS = ['Is there a red disc?', 'no', 'two small green rings?']
KEYS = row_keys(jax.random.key(7), 0, 3, 2)
TOKENS = 12
GUIDED = dict(guidance=5.0, temperature=0.8)


def padded(bundle, texts, encode, length=None):
  text = bundle.processor.pad([getattr(bundle.processor, encode)(t) for t in texts], length)
  return Text(jnp.asarray(text.ids), jnp.asarray(text.mask))


@pytest.fixture(scope='module')
def prompts(bundle):
  return padded(bundle, PROMPTS, 'encode_prompt', 20)


@pytest.fixture(scope='module')
def questions(bundle):
  return padded(bundle, QUESTIONS, 'encode_question', 12)


@pytest.fixture(scope='module')
def draw(model):
  """draw(prompts, keys, **Sampling fields) -> codes (B, G, N), logp."""
  run = jax.jit(
    lambda prompt, keys, how: model.sample_pictures(prompt, keys, how), static_argnums=2
  )
  return lambda prompt, keys, **how: run(prompt, keys, Sampling(**dict(dict(segment=8), **how)))


@pytest.fixture(scope='module')
def write(model):
  """write(pixels (B, H, W, 3), questions, keys, **Sampling fields) -> Text (B, G, T), logp."""

  @functools.partial(jax.jit, static_argnums=3)
  def run(pixels, question, keys, how):
    return model.sample_texts(
      Picture(jnp.zeros((len(pixels), 16), jnp.int32), pixels), question, keys, how
    )

  return lambda pixels, question, keys, **how: run(
    pixels, question, keys, Sampling(**dict(dict(segment=6, max_tokens=TOKENS), **how))
  )


@pytest.fixture(scope='module')
def score_codes(model):
  """score_codes(prompt (B, g, T), codes (B, h, N), **Scoring fields) -> logp (B, G, N)."""
  run = jax.jit(
    lambda prompt, codes, how: model.picture_logps(prompt, codes, None, how), static_argnums=2
  )
  return lambda prompt, codes, **how: run(prompt, codes, Scoring(**how)).logp


@pytest.fixture(scope='module')
def score_texts(model):
  """score_texts(pixels (B, g, H, W, 3), questions, text (B, h, T), **Scoring fields) -> logp (B, G,
  T).
  """

  @functools.partial(jax.jit, static_argnums=3)
  def run(pixels, question, text, how):
    picture = Picture(jnp.zeros((*pixels.shape[:2], 16), jnp.int32), pixels)
    return model.text_logps(picture, question, text, None, how)

  return lambda pixels, question, text, **how: run(pixels, question, text, Scoring(**how)).logp


@pytest.fixture(scope='module')
def pixels():
  return jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (3, 16, 16, 3)), jnp.float32)


def one(tree):
  """Adds the group axis."""
  return jax.tree.map(lambda x: x[:, None], tree)


# Pictures.


@pytest.mark.parametrize('how', [dict(), GUIDED])
def test_sampled_codes_carry_their_teacher_forced_log_probability(draw, score_codes, prompts, how):
  codes, logp = draw(prompts, KEYS, **how)
  assert len({tuple(row) for row in np.asarray(codes).reshape(-1, 16).tolist()}) == 6
  replay = score_codes(one(prompts), codes, **how)
  np.testing.assert_allclose(logp, replay, **TOLERANCE)
  assert np.std(logp) > 0.5


@pytest.mark.parametrize(
  'how', [dict(cfg_interval=1), dict(cfg_interval=5, segment=4), dict(cfg_interval=11, scan=True)]
)
def test_codes_are_the_mixtures_while_guidance_lasts_and_the_plain_models_after(
  draw, score_codes, prompts, how
):
  guided, temperature = how['cfg_interval'], GUIDED['temperature']
  codes, logp = draw(prompts, KEYS, **GUIDED, **how)
  throughout, _ = draw(prompts, KEYS, **GUIDED)
  np.testing.assert_array_equal(codes[..., :guided], throughout[..., :guided])
  mixture, plain = (
    score_codes(one(prompts), codes, **GUIDED),
    score_codes(one(prompts), codes, temperature=temperature),
  )
  np.testing.assert_allclose(logp[..., :guided], mixture[..., :guided], **TOLERANCE)
  np.testing.assert_allclose(logp[..., guided:], plain[..., guided:], **TOLERANCE)
  assert np.abs(mixture - plain)[..., guided:].max() > 0.1
  for chunk in (0, 3):
    replay = score_codes(one(prompts), codes, **GUIDED, cfg_interval=guided, chunk=chunk)
    np.testing.assert_allclose(logp, replay, **TOLERANCE)


def test_a_cfg_interval_as_long_as_a_picture_is_guidance_throughout(draw, prompts):
  codes, logp = draw(prompts, KEYS, **GUIDED)
  for interval in (16, 100):
    jax.tree.map(
      np.testing.assert_array_equal,
      draw(prompts, KEYS, **GUIDED, cfg_interval=interval),
      (codes, logp),
    )


@pytest.mark.parametrize('scan', [False, True])
def test_with_a_cache_of_8_bits_log_probabilities_are_nearly_those_of_teacher_forcing(
  draw, write, score_codes, score_texts, prompts, pixels, questions, scan
):
  how = dict(scan=scan, cache_dtype='int8')
  codes, logp = draw(prompts, KEYS, **GUIDED, **how)
  gap = np.abs(logp - score_codes(one(prompts), codes, **GUIDED))
  assert 0 < gap.max() < 0.1 and gap.mean() < 0.01
  text, logp = write(pixels, questions, KEYS, **how)
  gap = np.abs(logp - score_texts(pixels[:, None], questions, text))
  assert 0 < gap.max() < 0.015


def test_each_sample_depends_on_its_own_key_and_prompt_alone(draw, prompts):
  codes, logp = draw(prompts, KEYS)
  alone, alone_logp = draw(jax.tree.map(lambda x: x[1:2], prompts), KEYS[1:2, 1:])
  np.testing.assert_array_equal(alone[0, 0], codes[1, 1])
  np.testing.assert_allclose(alone_logp[0, 0], logp[1, 1], **TOLERANCE)


def test_segments_change_nothing(draw, prompts):
  codes, logp = draw(prompts, KEYS)
  for segment in (5, 64):
    again, again_logp = draw(prompts, KEYS, segment=segment)
    np.testing.assert_array_equal(again, codes)
    np.testing.assert_allclose(again_logp, logp, **TOLERANCE)


def test_scanned_layers_sample_what_unrolled_ones_do(draw, write, prompts, pixels, questions):
  for sample, given in ((draw, (prompts,)), (write, (pixels, questions))):
    for segment in (5, 64):
      plain, scanned = (sample(*given, KEYS, segment=segment, scan=scan) for scan in (False, True))
      jax.tree.map(np.testing.assert_array_equal, plain[0], scanned[0])
      np.testing.assert_allclose(plain[1], scanned[1], **TOLERANCE)


@pytest.mark.parametrize(
  'how',
  [
    dict(segment=16),
    dict(segment=64),
    dict(segment=16, scan=True),
    dict(segment=16, cfg_interval=32),
    dict(segment=16, scan=True, cfg_interval=32),
  ],
)
def test_decoding_holds_the_cache_little_more_than_once(how):
  config = JanusConfig.scenes()
  text = dataclasses.replace(config.text, num_hidden_layers=8)  # fewer are unrolled
  config = dataclasses.replace(config, text=text, templates=plan_program.stand_in_templates(config))
  rows, group = 16, 32
  keys = jax.eval_shape(lambda: row_keys(jax.random.key(0), 0, rows, group))
  prompt = Text(jax.ShapeDtypeStruct((rows, 24), jnp.int32), jax.ShapeDtypeStruct((rows, 24), bool))

  def draw(params, prompt, keys):
    return nnx.merge(janus.graphdef_of(config), params).sample_pictures(
      prompt, keys, Sampling(guidance=5.0, **how)
    )

  used = (
    jax.jit(draw)
    .lower(janus.abstract_params(config), prompt, keys)
    .compile()
    .memory_analysis()
    .temp_size_in_bytes
  )
  cache = (
    2 * text.num_hidden_layers * (2 * rows) * group * config.num_codes * text.hidden_size * 4
  )  # keys and values, both branches
  least = (
    cache / 2 if 'cfg_interval' in how else cache
  )  # after half of the picture, one branch is left
  assert least < used < 1.3 * cache


def test_padding_of_prompts_changes_no_log_probability(bundle, draw, score_codes, prompts):
  codes, logp = draw(prompts, KEYS, **GUIDED)
  longer = padded(bundle, PROMPTS, 'encode_prompt', 33)
  again, again_logp = draw(longer, KEYS, **GUIDED)
  np.testing.assert_array_equal(again, codes)
  np.testing.assert_allclose(again_logp, logp, **TOLERANCE)
  garbage = Text(jnp.where(longer.mask, longer.ids, 3), longer.mask)
  np.testing.assert_allclose(score_codes(one(garbage), codes, **GUIDED), logp, **TOLERANCE)


def test_guidance_of_weight_one_is_the_plain_conditional(score_codes, prompts):
  codes = jnp.asarray(np.random.default_rng(1).integers(0, 40, (3, 2, 16)))
  plain = score_codes(one(prompts), codes)
  nearly_one = float(np.nextafter(np.float32(1), np.float32(2)))  # takes the guided path
  np.testing.assert_allclose(
    score_codes(one(prompts), codes, guidance=nearly_one), plain, **TOLERANCE
  )
  assert np.abs(score_codes(one(prompts), codes, **GUIDED) - plain).max() > 1


def test_own_samples_are_likely_where_they_were_drawn_and_not_one_place_later(model, draw, prompts):
  codes, logp = draw(prompts, KEYS, temperature=0.3, segment=16)

  @jax.jit
  def unshifted(codes):  # the state that has read a code, asked for that same code
    prefix = model._generation_prefix(prompts, False)
    start = model.language_model.embed_tokens(jnp.asarray(model.config.templates.boi_id))
    embeds = model.code_embeddings(codes)
    embeds = jnp.concatenate([jnp.broadcast_to(start, (3, 2, 1, 48)), embeds], axis=2)
    logits = model.generation_head(model.language_model.extend(prefix, embeds)[:, :, 1:])
    return jnp.take_along_axis(log_softmax(logits, 0.3), codes[..., None], axis=-1)

  assert logp.mean() > unshifted(codes).mean() + 2


def test_sampled_frequencies_follow_the_distribution(draw, score_codes, prompts):
  count = 1500
  prompt = jax.tree.map(lambda x: x[:1], prompts)
  codes, _ = draw(prompt, row_keys(jax.random.key(0), 0, 1, count), segment=16, **GUIDED)
  first = np.bincount(np.asarray(codes)[0, :, 0], minlength=40) / count
  every = jnp.zeros((1, 40, 16), jnp.int32).at[0, :, 0].set(jnp.arange(40))
  probs = np.exp(score_codes(one(prompt), every, **GUIDED)[0, :, 0])
  np.testing.assert_allclose(probs.sum(), 1, atol=1e-4)
  # Expected total variation of 1500 draws over 40 codes is about sqrt(40 / 1500) / 2.5 = 0.065.
  assert np.abs(first - probs).sum() / 2 < 0.1


def test_a_group_of_prompts_scores_one_picture_as_each_prompt_does(score_codes, prompts):
  """Reversed scoring: g prompts, one picture."""
  codes = jnp.asarray(np.random.default_rng(1).integers(0, 40, (1, 1, 16)))
  together = score_codes(jax.tree.map(lambda x: x[None], prompts), codes, guidance=2.0)
  apart = score_codes(one(prompts), jnp.repeat(codes, 3, axis=0), guidance=2.0)
  assert together.shape == (1, 3, 16)
  np.testing.assert_allclose(together[0], apart[:, 0], **TOLERANCE)


# Texts.


@pytest.mark.parametrize('how', [dict(), dict(temperature=0.6)])
def test_sampled_texts_carry_their_teacher_forced_log_probability(
  write, score_texts, pixels, questions, how
):
  text, logp = write(pixels, questions, KEYS, **how)
  replay = score_texts(pixels[:, None], questions, text, **how)
  np.testing.assert_allclose(logp, replay, **TOLERANCE)
  assert np.asarray(logp)[np.asarray(text.mask)].std() > 0.5


def often_ending(model, bundle):
  """The same model with a text head that likes the end of sentence."""
  graphdef, params = nnx.split(model)
  params = jax.tree.map(lambda x: x, nnx.to_pure_dict(params))
  kernel = params['lm_head']['kernel'] * 0.2
  params['lm_head']['kernel'] = kernel.at[:, bundle.config.templates.eos_id].multiply(12.0)
  return nnx.merge(graphdef, params)


def test_texts_end_at_their_end_of_sentence(model, bundle, pixels, questions):
  ending = often_ending(model, bundle)
  keys = row_keys(jax.random.key(3), 0, 3, 8)
  picture = Picture(jnp.zeros((3, 16), jnp.int32), pixels)
  text, logp = jax.jit(
    lambda: ending.sample_texts(picture, questions, keys, Sampling(max_tokens=9, segment=2))
  )()
  replay = jax.jit(lambda text: ending.text_logps(one(picture), questions, text, None, Scoring()))(
    text
  )
  np.testing.assert_allclose(logp, replay.logp, **TOLERANCE)
  ids, mask = (np.asarray(x).reshape(-1, 9) for x in text)
  lengths = mask.sum(-1)
  assert lengths.min() < 4 and len(set(lengths.tolist())) > 3
  t = bundle.config.templates
  for row, length in enumerate(lengths):
    assert mask[row, :length].all()
    assert t.eos_id not in ids[row, : length - 1]
    assert length == 9 or ids[row, length - 1] == t.eos_id
    assert (ids[row, length:] == t.pad_id).all()
  assert not np.asarray(logp).reshape(-1, 9)[~mask].any()


def test_after_the_last_text_has_ended_segments_are_padding(model, bundle, pixels, questions):
  graphdef, params = nnx.split(model)
  params = nnx.to_pure_dict(params)
  t = bundle.config.templates
  everything_but_eos = [i for i in range(360) if i != t.eos_id]
  mute = nnx.merge(graphdef, params)
  mute.config = bundle.config.__class__(
    **{
      **vars(bundle.config),
      'templates': t.__class__(**{**vars(t), 'forbidden_text_ids': tuple(everything_but_eos)}),
    }
  )
  picture = Picture(jnp.zeros((3, 16), jnp.int32), pixels)
  text, logp = jax.jit(
    lambda: mute.sample_texts(picture, questions, KEYS, Sampling(max_tokens=8, segment=3))
  )()
  assert (text.ids[..., 0] == t.eos_id).all() and (text.ids[..., 1:] == t.pad_id).all()
  assert text.mask[..., 0].all() and not text.mask[..., 1:].any()
  np.testing.assert_allclose(logp, 0, atol=1e-6)


def test_special_tokens_are_never_written(write, bundle, pixels, questions):
  text, _ = write(pixels, questions, row_keys(jax.random.key(1), 0, 3, 64), segment=TOKENS)
  assert not np.isin(
    np.asarray(text.ids)[np.asarray(text.mask)], bundle.config.templates.forbidden_text_ids
  ).any()


def test_padding_of_questions_and_texts_changes_no_log_probability(
  bundle, write, score_texts, pixels, questions
):
  text, logp = write(pixels, questions, KEYS)
  longer = padded(bundle, QUESTIONS, 'encode_question', 21)
  again, again_logp = write(pixels, longer, KEYS)
  np.testing.assert_array_equal(again.ids, text.ids)
  np.testing.assert_allclose(again_logp, logp, **TOLERANCE)
  six_more = ((0, 0), (0, 0), (0, 6))
  wider = Text(jnp.pad(text.ids, six_more, constant_values=9), jnp.pad(text.mask, six_more))
  replay = score_texts(pixels[:, None], longer, wider)
  np.testing.assert_allclose(replay[..., :TOKENS], logp, **TOLERANCE)
  assert not np.asarray(replay[..., TOKENS:]).any()


def test_a_group_of_pictures_scores_one_text_as_each_picture_does(
  score_texts, bundle, pixels, questions
):
  """Reversed scoring: g pictures, one text."""
  question = jax.tree.map(lambda x: x[:1], questions)
  text = one(padded(bundle, ['a large striped diamond'], 'encode_answer', 12))
  together = score_texts(pixels[None], question, text)

  def repeat(tree):
    return jax.tree.map(lambda x: jnp.repeat(x, 3, axis=0), tree)

  apart = score_texts(pixels[:, None], repeat(question), repeat(text))
  assert together.shape == (1, 3, 12)
  np.testing.assert_allclose(together[0], apart[:, 0], **TOLERANCE)
  assert np.abs(together[0, 0] - together[0, 1]).max() > 0.1


def test_chunks_and_rematerialisation_change_nothing(
  write, score_texts, score_codes, pixels, questions, prompts
):
  how = dict(chunk=5, remat=True)
  text, logp = write(pixels, questions, KEYS)
  np.testing.assert_allclose(
    score_texts(pixels[:, None], questions, text, **how), logp, **TOLERANCE
  )
  codes = jnp.asarray(np.random.default_rng(1).integers(0, 40, (3, 2, 16)))
  np.testing.assert_allclose(
    score_codes(one(prompts), codes, **GUIDED, **how),
    score_codes(one(prompts), codes, **GUIDED),
    **TOLERANCE,
  )


# From one task to the other.


def test_a_sampled_text_is_a_prompt_without_its_end(bundle, score_codes):
  """A text's end of sentence, or what stands behind it, plays no part when the text becomes a
  drawing prompt.
  """
  codes = jnp.asarray(np.random.default_rng(1).integers(0, 40, (1, 1, 16)))
  sampled = one(padded(bundle, ['a large striped diamond'], 'encode_answer', 16))
  prompt = one(padded(bundle, ['a large striped diamond'], 'encode_prompt'))
  np.testing.assert_allclose(score_codes(sampled, codes), score_codes(prompt, codes), **TOLERANCE)
