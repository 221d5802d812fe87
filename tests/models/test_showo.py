"""Show-o against transformers' Phi, and what its likelihoods and its sampler must keep."""

import dataclasses
import functools

from flax import nnx
import golden_showo as golden
import jax
import jax.numpy as jnp
import micro_showo
from micro_showo import CONFIG, EOI, EOS, MMU, PAD, SOI, T2I
import numpy as np
import pytest
import torch

from benchmarks import torch_phi
from dsr_jax.models.common.decoder import Decoder
from dsr_jax.models.showo import model as showo
from dsr_jax.models.unified import (
  Picture,
  Sampling,
  Scoring,
  Text,
  as_answer,
  as_prompt,
  row_keys,
  score_keys,
)

TOLERANCE = 1e-5
FIRST_CODE, MASK = CONFIG.first_code, CONFIG.mask_id
SPEC = showo.spec_of(CONFIG)


def close(ours, theirs, atol=TOLERANCE):
  np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=atol, rtol=0)


def text(*rows, length=None):
  """Rows of ids -> Text (R, T)."""
  length = length or max(map(len, rows))
  ids = np.zeros((len(rows), length), np.int32)
  mask = np.zeros(ids.shape, bool)
  for i, row in enumerate(rows):
    ids[i, : len(row)], mask[i, : len(row)] = row, True
  return Text(jnp.asarray(ids), jnp.asarray(mask))


def each(x: Text) -> Text:
  """(B, T) -> (B, 1, T)."""
  return Text(x.ids[:, None], x.mask[:, None])


@pytest.fixture(scope='module')
def model():
  return micro_showo.model()


PLAIN = Scoring()


# What is compared with transformers has two layers; for the rest one will do.
TWO_LAYERS = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, num_hidden_layers=2))


def compiled(fn, config=CONFIG):
  """fn(model, *arrays, how), compiled once for all: the weights are an argument."""
  graphdef = showo.graphdef_of(config)
  run = jax.jit(
    lambda params, *args, how: fn(nnx.merge(graphdef, params), *args, how), static_argnames='how'
  )

  def call(*args, how=PLAIN):
    return run(micro_showo.params(config), *args, how=how)

  return call


def _score_codes(model, *args):
  return model.picture_logps(*args)


def _score_texts(model, codes, question, answer, how):
  return model.text_logps(Picture(codes, None), question, answer, None, how)


def _draw(model, *args):
  return model.sample_pictures(*args)


def _fill_blocks(model, prompt, inputs, how):
  del how
  return model.code_logits(model._block(model._generation_prefix(prompt, False), inputs))


_code_scores = compiled(_score_codes)
_text_scores = compiled(_score_texts)


_blocks = compiled(_fill_blocks)


def code_scores(prompt, codes, keys, how=PLAIN):
  return _code_scores(prompt, codes, keys, how=how)


def text_scores(codes, question, answer):
  return _text_scores(codes, question, answer)


@functools.cache
def _drawing(**changes):
  return compiled(_draw, dataclasses.replace(CONFIG, **changes))


def drawn(prompt, keys, how, **changes):
  """changes: of the configuration."""
  return _drawing(**changes)(prompt, keys, how=how)


def block_logits(prompt, inputs):
  return _blocks(prompt, inputs)


def keys_of(inputs, group=1, seed=0):
  return row_keys(jax.random.key(seed), 0, inputs, group)


PROMPTS = text([10, 11, 12], [20, 21, 22, 23, 24, 25], [30])
CODES = jnp.asarray(np.random.default_rng(0).integers(0, 16, (3, 4, 16)), jnp.int32)


# The language model against transformers.


@pytest.fixture(scope='module')
def phi():
  """Our micro model's weights in transformers' class, two layers."""
  cfg = TWO_LAYERS.text
  theirs = torch_phi.language_model(
    rows=CONFIG.rows,
    width=cfg.hidden_size,
    inner=cfg.intermediate_size,
    layers=cfg.num_hidden_layers,
    heads=cfg.num_attention_heads,
  )
  ours = {k: v for k, v in micro_showo.params(TWO_LAYERS).items() if k != 'vqmodel'}
  leaves = jax.tree.leaves(ours)
  state = {}
  for entry in golden.table.entries(ours, 'showo'):
    value = np.ascontiguousarray(entry.atoms[0].of_leaf(leaves[entry.atoms[0].leaf]))
    state[entry.name.removeprefix('showo.')] = torch.from_numpy(value)
  missing, unexpected = theirs.load_state_dict(state, strict=False)
  assert not missing and not unexpected
  return theirs


def logits_of(phi, ids, visible):
  """ids (S,), visible (S, S) -> logits (S, rows)."""
  with torch.no_grad():
    return (
      phi(torch.tensor(ids)[None], attention_mask=torch.from_numpy(visible)[None, None])
      .logits[0]
      .numpy()
    )


def test_codes_after_a_prompt_are_those_of_phi_with_the_mask_of_drawing(phi):
  codes = np.random.default_rng(1).integers(0, 16, 16) + FIRST_CODE
  codes[::3] = MASK
  fill = compiled(_fill_blocks, TWO_LAYERS)
  for content, pads in (([10, 11, 12], 2), ([20, 21, 22, 23, 24], 0)):
    head = [PAD] * pads + [T2I, EOS, *content, EOS]
    ids = [*head, SOI, *codes, EOI]
    place = np.arange(len(ids))
    visible = (place[:, None] >= place) | (place[:, None] >= len(head))
    visible &= (place >= pads) | (place[:, None] < pads) & (place[:, None] >= place)
    theirs = logits_of(phi, ids, visible)[len(head) + 1 : -1, FIRST_CODE:MASK]
    assert theirs.std() > 0.5
    # Two blocks after one prefix, padded on the right.
    prompt = text(content, length=7)
    blocks = jnp.asarray(np.stack([codes, np.full(16, MASK)]))[None]
    close(fill(prompt, blocks)[0, 0], theirs)


def test_answers_about_a_picture_are_those_of_phi_with_the_mask_of_reading(phi):
  codes = np.random.default_rng(2).integers(0, 16, 16)
  question, answer = [14, 15, 16], [21, 22, 23, EOS]
  head = [MMU, SOI, *(codes + FIRST_CODE), EOI]
  ids = [*head, EOS, 7, 8, *question, 5, 6, *answer]
  place = np.arange(len(ids))
  visible = (place[:, None] >= place) | (place < len(head))
  theirs = logits_of(phi, ids, visible)[-len(answer) - 1 : -1, : CONFIG.text.vocab_size]
  logps = torch.log_softmax(torch.from_numpy(theirs).double(), -1).numpy()
  wanted = np.take_along_axis(logps, np.asarray(answer)[:, None], -1)[:, 0]

  # Teacher forcing, the question padded.
  asked = text(question, length=6)
  scored = compiled(_score_texts, TWO_LAYERS)
  scores = scored(jnp.asarray(codes)[None, None], asked, each(text(answer)))
  close(scores.logp[0, 0], wanted)

  # Token by token.
  def decode(model, codes, how):
    del how
    prefix = model._understanding_prefix(codes, asked)
    decoder = Decoder(model.language_model, prefix, candidates=1, tokens=4, scan=False)
    cache, out = decoder.grow(None, 4), []
    for t, token in enumerate([6, *answer[:-1]]):
      embeds = model.language_model.embed_tokens(jnp.full((1, 1), token))
      hidden, cache = decoder.step(embeds, cache, t, 4)
      out.append(model.text_logits(hidden)[0, 0])
    return jnp.stack(out)

  close(compiled(decode, TWO_LAYERS)(jnp.asarray(codes)[None]), theirs)


def test_a_greedy_text_is_what_the_likelihoods_call_most_likely():
  question = text([14, 15], [16, 17, 18])
  codes = CODES[:2, 0]
  for scan in (False, True):
    how = Sampling(temperature=0.0, max_tokens=4, segment=2, scan=scan)
    sampled, logps = compiled(
      lambda model, codes, how: model.sample_texts(
        Picture(codes, None), question, keys_of(2, 3), how
      )
    )(codes, how=how)
    scores = text_scores(codes[:, None], question, sampled)
    close(scores.logp, logps)


# Prompts: padding, candidates, words of two forms.


def test_padding_and_company_change_no_probability_of_a_code():
  together = code_scores(each(PROMPTS), CODES, None).logp
  for i, row in enumerate(([10, 11, 12], [20, 21, 22, 23, 24, 25], [30])):
    alone = code_scores(each(text(row)), CODES[i : i + 1], None).logp
    padded = code_scores(each(text(row, length=11)), CODES[i : i + 1], None).logp
    close(alone[0], together[i])
    close(padded, alone)


def test_a_prompt_loses_its_end_of_text_and_what_no_row_has_room_for():
  words = [10, 11, 12]
  close(
    code_scores(each(text([*words, EOS])), CODES[:1], None).logp,
    code_scores(each(text(words)), CODES[:1], None).logp,
  )
  long = list(range(9, 29))
  close(
    code_scores(each(text(long)), CODES[:1], None).logp,
    code_scores(each(text(long[: CONFIG.prompt_tokens])), CODES[:1], None).logp,
  )


def test_words_change_their_form_where_a_text_changes_its_role():
  spec = SPEC
  answer = text([11, 13, 15, EOS], [10, 11], [9])
  prompt = as_prompt(spec, answer)
  np.testing.assert_array_equal(prompt.ids[:, 0], [10, 10, 9])
  np.testing.assert_array_equal(prompt.ids[:, 1:], answer.ids[:, 1:])
  np.testing.assert_array_equal(as_answer(spec, prompt).ids[:, 0], [11, 11, 9])
  empty = Text(jnp.zeros((2, 0), jnp.int32), jnp.zeros((2, 0), bool))
  assert as_prompt(spec, empty) is empty


# Who sees what.


def test_no_word_depends_on_the_picture_drawn_after_it_and_no_masked_code_leaks():
  """Fully masked, all candidates of a prompt are scored against the same distributions."""
  scores = code_scores(each(PROMPTS), CODES, None)
  other = code_scores(each(PROMPTS), CODES.at[:, 1:].set((CODES[:, 1:] + 5) % 16), None)
  close(scores.logp[:, 0], other.logp[:, 0], 0)
  close(scores.entropy, other.entropy, 0)
  close(scores.entropy, np.broadcast_to(scores.entropy[:, :1], CODES.shape), 0)
  # The bound is blind to what it masks, and sees the rest.
  how = Scoring(picture_likelihood='elbo')
  keys = score_keys(SPEC, keys_of(3, seed=4))
  masked = np.asarray(code_scores(each(PROMPTS), CODES, keys, how).logp != 0)
  assert masked.any() and not masked.all()
  np.testing.assert_array_equal(masked, np.broadcast_to(masked[:, :1], masked.shape))
  a = code_scores(each(PROMPTS), CODES, keys, how).entropy
  hidden_changed = jnp.where(masked, (CODES + 3) % 16, CODES)
  shown_changed = jnp.where(masked, CODES, (CODES + 3) % 16)
  close(code_scores(each(PROMPTS), hidden_changed, keys, how).entropy, a, 0)
  partly = (~masked).any(-1)
  b = code_scores(each(PROMPTS), shown_changed, keys, how).entropy
  assert np.all(np.abs(np.asarray(a - b)).max(-1)[partly] > 1e-3)


# Guidance.


def test_weight_one_is_no_guidance_and_weight_zero_the_unconditional_row():
  plain = code_scores(each(PROMPTS), CODES, None).logp
  close(code_scores(each(PROMPTS), CODES, None, Scoring(guidance=1.0 + 1e-7)).logp, plain)
  nothing = code_scores(each(text([], [], [], length=1)), CODES, None).logp
  close(code_scores(each(PROMPTS), CODES, None, Scoring(guidance=0.0)).logp, nothing)
  assert np.abs(np.asarray(plain - nothing)).max() > 1e-2
  keys = keys_of(3, 2)
  how = Sampling(guidance=1.0)
  codes, _ = drawn(PROMPTS, keys, how)
  close(drawn(PROMPTS, keys, dataclasses.replace(how, guidance=1.0 + 1e-7))[0], codes, 0)
  unconditional, _ = drawn(text([], [], [], length=1), keys, how)
  close(drawn(PROMPTS, keys, dataclasses.replace(how, guidance=0.0))[0], unconditional, 0)
  assert np.any(np.asarray(codes) != np.asarray(unconditional))


# The sampler.


def test_a_sample_depends_on_its_own_key_alone():
  how = Sampling(guidance=2.0)
  keys = keys_of(3, 2)
  codes, logps = drawn(PROMPTS, keys, how)
  assert codes.shape == (3, 2, 16) and np.all((np.asarray(codes) >= 0) & (np.asarray(codes) < 16))
  alone = jax.tree.map(lambda x: x[1:2], PROMPTS)
  close(drawn(alone, keys[1:2, 1:], how)[0][0, 0], codes[1, 1], 0)
  for chunk in (5, 16):
    again, same = drawn(PROMPTS, keys, dataclasses.replace(how, chunk=chunk))
    close(again, codes, 0)
    close(same, logps)
  assert len(np.unique(np.asarray(codes).reshape(6, 16), axis=0)) == 6


def test_one_step_fixes_all_codes_by_the_likelihood_of_the_estimate():
  """Then the sampler's log-probabilities are the one-step ones, guided or not."""
  for guidance in (1.0, 2.5):
    codes, logps = drawn(PROMPTS, keys_of(3, 2), Sampling(guidance=guidance), sampling_steps=1)
    close(code_scores(each(PROMPTS), codes, None, Scoring(guidance=guidance)).logp, logps)


def test_greedy_drawing_uses_no_chance():
  how = Sampling(temperature=0.0, guidance=2.0)
  codes, _ = drawn(PROMPTS, keys_of(3, 2), how)
  close(codes[:, 0], codes[:, 1], 0)
  close(drawn(PROMPTS, keys_of(3, 2, seed=9), how)[0], codes, 0)


def test_steps_and_noise_are_those_of_the_configuration():
  keys = keys_of(3, 2)
  codes, _ = drawn(PROMPTS, keys, Sampling())
  for change in ({'sampling_steps': 7}, {'sampling_noise': 20.0}):
    assert np.any(drawn(PROMPTS, keys, Sampling(), **change)[0] != codes)


def test_codes_of_a_sharp_model_are_drawn_by_their_probabilities():
  """First step of many samples: shares of codes are the guided softmax."""
  prompt = jax.tree.map(lambda x: x[:1], PROMPTS)
  codes, _ = drawn(prompt, keys_of(1, 4000), Sampling(guidance=1.5), sampling_steps=1)
  one_of_each = jnp.broadcast_to(jnp.arange(16)[:, None], (1, 16, 16))
  logps = code_scores(each(prompt), one_of_each, None, Scoring(guidance=1.5)).logp[0]
  shares = np.mean(np.asarray(codes[0])[None] == np.arange(16)[:, None, None], axis=1)
  close(shares, np.exp(logps), 0.035)


# Chance in the likelihoods.


DROP = Scoring(prompt_drop=0.5)


@pytest.mark.parametrize('way', ['delete', 'hide', 'mask'])
def test_equal_keys_drop_the_same_words_and_others_do_not(way):
  how = dataclasses.replace(DROP, prompt_drop_way=way)
  keys = score_keys(SPEC, keys_of(3))
  scores = code_scores(each(PROMPTS), CODES, keys, how).logp
  close(code_scores(each(PROMPTS), CODES[:, :1], keys, how).logp, scores[:, :1], 1e-6)
  others = [
    code_scores(each(PROMPTS), CODES, score_keys(SPEC, keys_of(3, seed=s)), how).logp
    for s in range(1, 5)
  ]
  assert any(np.abs(np.asarray(scores - x))[:2].max() > 1e-2 for x in others)
  # The last prompt has one word, which stays.
  plain = code_scores(each(PROMPTS), CODES, None).logp
  for x in (scores, *others):
    close(x[2], plain[2])


def test_what_is_dropped_does_not_depend_on_padding():
  keys = score_keys(SPEC, keys_of(3))
  wider = Text(*(jnp.pad(x, ((0, 0), (0, 5))) for x in PROMPTS))
  for way in ('delete', 'hide', 'mask'):
    how = dataclasses.replace(DROP, prompt_drop_way=way)
    close(
      code_scores(each(PROMPTS), CODES, keys, how).logp,
      code_scores(each(wider), CODES, keys, how).logp,
    )


def kept(row, seed=0):
  """Which words of a prompt stay."""
  keys = showo._folded(score_keys(SPEC, keys_of(1, seed=seed)), showo.WORDS)
  return np.asarray(showo.kept_words(keys, jnp.ones((1, len(row)), bool), DROP.prompt_drop))[0]


def test_deleted_words_leave_a_shorter_prompt_and_masked_ones_the_mask_token():
  row = [20, 21, 22, 23, 24, 25]
  keep = kept(row)
  assert 0 < keep.sum() < len(row)
  keys = score_keys(SPEC, keys_of(1))
  deleted = [word for word, stays in zip(row, keep) if stays]
  close(
    code_scores(each(text(row)), CODES[:1], keys, DROP).logp,
    code_scores(each(text(deleted)), CODES[:1], None).logp,
  )
  masked = [word if stays else MASK for word, stays in zip(row, keep)]
  close(
    code_scores(
      each(text(row)), CODES[:1], keys, dataclasses.replace(DROP, prompt_drop_way='mask')
    ).logp,
    code_scores(each(text(masked)), CODES[:1], None).logp,
  )


def test_hidden_words_are_seen_by_nobody_but_keep_their_places(phi):
  row = [20, 21, 22, 23, 24, 25]
  keep = kept(row)
  head = [T2I, EOS, *row, EOS]
  ids = [*head, SOI, *[MASK] * 16, EOI]
  place = np.arange(len(ids))
  seen = np.ones(len(ids), bool)
  seen[2 : 2 + len(row)] = keep
  visible = ((place[:, None] >= place) | (place[:, None] >= len(head))) & seen
  visible |= np.eye(len(ids), dtype=bool)
  theirs = torch.from_numpy(logits_of(phi, ids, visible)[len(head) + 1 : -1, FIRST_CODE:MASK])
  wanted = np.take_along_axis(torch.log_softmax(theirs, -1).numpy(), np.asarray(CODES[0]).T, -1).T
  how = dataclasses.replace(DROP, prompt_drop_way='hide')
  keys = score_keys(showo.spec_of(TWO_LAYERS), keys_of(1))
  scores = compiled(_score_codes, TWO_LAYERS)(each(text(row)), CODES[:1], keys, how=how)
  close(scores.logp[0], wanted)


def test_what_follows_a_prefix_in_two_parts_does_not_see_its_hidden_words(model):
  """The second part in two ways, behind a first one that is padded and has a hidden word."""
  lm = model.language_model
  first, second = jnp.asarray([[T2I, 20, 21, PAD]]), jnp.asarray([[[22, 23], [30, 31]]])
  shown = jnp.asarray([[True, False, True, True]])
  prefix = lm.prefill(lm.embed_tokens(first), jnp.asarray([3]), shown=shown)
  joined = lm.prefill_on(prefix, lm.embed_tokens(second), jnp.asarray([[2, 2]]))
  token = lm.embed_tokens(jnp.full((2, 1, 1), 25))
  for way in range(2):
    ids = jnp.concatenate([first[:, :3], second[:, way]], axis=1)
    whole = lm.prefill(
      lm.embed_tokens(ids), jnp.asarray([5]), shown=jnp.asarray([[True, False, True, True, True]])
    )
    close(lm.extend(joined, token)[way], lm.extend(whole, token[:1])[0])


def test_a_word_is_dropped_as_often_as_asked_and_never_all_of_them():
  keys = jax.random.split(jax.random.key(0), 4000)
  mask = jnp.arange(8) < jnp.where(jnp.arange(4000) % 2, 8, 1)[:, None]
  keep = np.asarray(showo.kept_words(keys, mask, 0.15))
  assert abs(keep[1::2].mean() - 0.85) < 0.01
  assert keep[::2, 0].all()
  assert np.asarray(showo.kept_words(keys, mask, 0.999) & mask).any(-1).all()


def test_without_dropping_the_keys_of_one_step_are_irrelevant():
  plain = code_scores(each(PROMPTS), CODES, None).logp
  close(code_scores(each(PROMPTS), CODES, score_keys(SPEC, keys_of(3))).logp, plain, 0)


def test_the_bound_of_one_code_of_each_number_is_the_mean_over_orders():
  """Its draws average to -log of an order's likelihood; here against many draws by hand."""
  prompt = jax.tree.map(lambda x: x[:1], PROMPTS)
  how = Scoring(picture_likelihood='elbo', elbo_draws=64)
  keys = score_keys(SPEC, keys_of(1))
  ours = code_scores(each(prompt), CODES[:1, :1], keys, how)
  total = []
  for d in range(64):
    key = jax.random.fold_in(keys[0], showo.DRAWS + d)
    masked, count = showo.masked_places(key, total=16)
    assert int(masked.sum()) == int(count)
    inputs = jnp.where(masked, MASK, CODES[:1, :1] + FIRST_CODE)
    logits = block_logits(prompt, inputs)
    logps = jax.nn.log_softmax(logits[0, 0])[jnp.arange(16), CODES[0, 0]]
    total.append(16 / int(count) * np.where(masked, logps, 0.0))
  close(ours.logp[0, 0], np.mean(total, axis=0), 2e-5)


def test_counts_of_the_bound_are_all_as_likely():
  masked, count = jax.vmap(functools.partial(showo.masked_places, total=8))(
    jax.random.split(jax.random.key(1), 4000)
  )
  np.testing.assert_array_equal(np.asarray(masked).sum(-1), count)
  shares = np.bincount(np.asarray(count), minlength=9)[1:] / 4000
  close(shares, np.full(8, 1 / 8), 0.02)
  close(np.asarray(masked).mean(0), np.full(8, 4.5 / 8), 0.03)


def test_chunks_of_places_and_recomputed_layers_change_nothing():
  keys = score_keys(SPEC, keys_of(3))
  for kind in ('one_step', 'elbo'):
    how = Scoring(picture_likelihood=kind, prompt_drop=0.3, guidance=1.5, elbo_draws=2)
    plain = code_scores(each(PROMPTS), CODES, keys, how)
    other = code_scores(each(PROMPTS), CODES, keys, dataclasses.replace(how, chunk=5, remat=True))
    close(other.logp, plain.logp)
    close(other.entropy, plain.entropy)


def test_many_prompts_of_one_picture_are_as_many_rows():
  """R_U: a group of texts, one picture."""
  several = Text(*(jnp.stack([x[:2], x[1:]], axis=1) for x in PROMPTS))  # (2, 2, T)
  logps = code_scores(several, CODES[:2, :1], None).logp
  for b in range(2):
    for g in range(2):
      prompt = Text(several.ids[b : b + 1, g : g + 1], several.mask[b : b + 1, g : g + 1])
      close(logps[b, g], code_scores(prompt, CODES[b : b + 1, :1], None).logp[0, 0])


# Pixels.


def test_pictures_are_read_as_the_codes_of_their_pixels(model):
  pixels = jnp.asarray(np.random.default_rng(5).uniform(-1, 1, (2, 16, 16, 3)), jnp.float32)
  codes = model.picture_from_pixels(pixels).codes
  assert codes.shape == (2, 16) and len(np.unique(codes)) > 3
  question, answer = text([14], [15]), each(text([21, EOS], [23, 24]))
  by_pixels = model.text_logps(
    Picture(None, pixels[:, None]), question, answer, None, Scoring()
  ).logp
  close(text_scores(codes[:, None], question, answer).logp, by_pixels)
  shown = model.picture_from_codes(codes)
  assert shown.pixels.shape == (2, 16, 16, 3) and np.abs(shown.pixels).max() <= 1


def test_codes_do_not_depend_on_the_compute_type(model):
  pixels = jnp.asarray(np.random.default_rng(6).uniform(-1, 1, (2, 16, 16, 3)), jnp.float32)
  half = nnx.merge(
    showo.graphdef_of(CONFIG),
    {
      k: v if k == 'vqmodel' else jax.tree.map(lambda x: x.astype(jnp.bfloat16), v)
      for k, v in micro_showo.params().items()
    },
  )
  close(half.picture_from_pixels(pixels).codes, model.picture_from_pixels(pixels).codes, 0)


# Sizes.


def test_parameters_of_the_published_models():
  def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))

  shapes = showo.abstract_params(showo.ShowoConfig.showo_512())
  assert count({k: v for k, v in shapes.items() if k != 'vqmodel'}) == 1_448_176_770
  assert count(shapes['vqmodel']['encoder']) == 55_439_171
  assert count(shapes['vqmodel']['decoder']) == 39_947_833
  assert count(showo.abstract_params(showo.ShowoConfig.showo_256())) == count(shapes)


def test_questions_after_one_reading_are_answered_as_alone():
  question = text([14, 15], [16, 17, 18, 19], [20], length=6)
  codes = CODES[:2, :1]
  how = Sampling(temperature=0.0, max_tokens=5, segment=3)

  def ask(model, codes, question, how):
    reading = model.read(Picture(codes, None), jnp.ones((2, 1), bool))
    asked = Text(*(jnp.stack([x, x[::-1]]) for x in question))
    return model.answer(reading, asked, keys_of(2, 3), how)

  answers, logps = compiled(ask)(codes, question, how=how)
  assert answers.ids.shape == (2, 3, 5)
  for b in range(2):
    for q in range(3):
      asked = jax.tree.map(lambda x, b=b, q=q: x[2 - q if b else q][None], question)
      written = Text(answers.ids[b, q][None, None], answers.mask[b, q][None, None])
      close(text_scores(codes[b : b + 1], asked, written).logp[0, 0], logps[b, q])
