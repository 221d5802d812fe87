"""Questions about pictures: a prefix in two parts gives what one part gives, and padding changes
nothing.
"""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.models.unified import Picture, Sampling, Text

TOKENS = 4
HOW = Sampling(temperature=0.0, max_tokens=TOKENS, segment=4)
TURNS = ('\nIs there a red disc?', '\ntwo rings\nno', 'a large striped diamond left of a square')


@pytest.fixture(scope='module')
def functions(model):
  """`read`, `answer` and `sample_texts` of the tiny Janus, compiled."""
  graphdef, params = nnx.split(model)

  @jax.jit
  def read(pixels, mask):
    return nnx.merge(graphdef, params).read(Picture(None, pixels), mask)

  def answer(reading, question, keys, how=HOW):
    return nnx.merge(graphdef, params).answer(reading, question, keys, how)

  def describe(pixels, question, keys, how=HOW):
    return nnx.merge(graphdef, params).sample_texts(Picture(None, pixels), question, keys, how)

  return read, jax.jit(answer, static_argnums=3), jax.jit(describe, static_argnums=3)


def pixels_of(*shape):
  return np.random.default_rng(0).uniform(-1, 1, (*shape, 16, 16, 3)).astype(np.float32)


def keys_of(*shape):
  return jax.random.split(jax.random.key(0), shape)


def asked(bundle, texts, length=None):
  """Texts -> Text (1, Q, T)."""
  processor = bundle.processor
  ids, mask = processor.pad([processor.encode_turn(text) for text in texts], length)
  return Text(jnp.asarray(ids)[None], jnp.asarray(mask)[None])


def assert_same(a, b):
  """Equal texts; log-probabilities up to rounding."""
  (text, logps), (other, other_logps) = a, b
  np.testing.assert_array_equal(text.mask, other.mask)
  np.testing.assert_array_equal(np.where(text.mask, text.ids, 0), np.where(text.mask, other.ids, 0))
  np.testing.assert_allclose(logps, other_logps, atol=1e-5)


def row(out, *index):
  text, logp = out
  return Text(text.ids[index], text.mask[index]), logp[index]


def test_a_prefix_in_two_parts_writes_what_one_part_writes(functions, bundle):
  """The question behind a line break, as in training; the same keys, at a temperature."""
  read, answer, describe = functions
  how = Sampling(temperature=1.0, max_tokens=TOKENS, segment=4)
  pixels, keys = pixels_of(2), keys_of(2, 2)
  turns = [turn for turn in TURNS if turn.startswith('\n')]
  question = asked(bundle, turns)
  question = Text(*(jnp.repeat(x, 2, axis=0) for x in question))
  whole = answer(read(pixels[:, None], np.ones((2, 1), bool)), question, keys, how)
  for i, turn in enumerate(turns):
    processor = bundle.processor
    alone = Text(*map(jnp.asarray, processor.pad([processor.encode_question(turn)] * 2)))
    one = describe(pixels, alone, keys[:, i : i + 1], how)
    assert_same(row(whole, slice(None), slice(i, i + 1)), one)


def test_questions_that_share_pictures_are_answered_as_if_asked_alone(functions, bundle):
  read, answer, _ = functions
  pixels, keys = pixels_of(2, 2), keys_of(2, len(TURNS))
  mask = np.array([[True, True], [True, False]])
  question = Text(*(jnp.repeat(x, 2, axis=0) for x in asked(bundle, TURNS)))
  together = answer(read(pixels, mask), question, keys)
  assert len({tuple(ids) for ids in np.asarray(together[0].ids).reshape(6, -1)}) > 2
  length = question.ids.shape[-1]
  for b in range(2):
    count = mask[b].sum()
    reading = read(pixels[b : b + 1, :count], mask[b : b + 1, :count])
    for q, turn in enumerate(TURNS):
      alone = answer(reading, asked(bundle, [turn], length), keys[b : b + 1, q : q + 1])
      assert_same(row(together, b, q), row(alone, 0, 0))


def test_padding_of_questions_and_pictures_changes_nothing(functions, bundle):
  read, answer, _ = functions
  pixels, keys = pixels_of(1, 3), keys_of(1, len(TURNS))
  length = asked(bundle, TURNS).ids.shape[-1]
  plain = answer(read(pixels[:, :2], np.ones((1, 2), bool)), asked(bundle, TURNS), keys)
  mask = np.array([[True, True, False]])
  padded = answer(read(pixels, mask), asked(bundle, TURNS, length + 9), keys)
  assert_same(plain, padded)
  changed = pixels.copy()
  changed[:, 2] = -changed[:, 2]
  assert_same(padded, answer(read(changed, mask), asked(bundle, TURNS, length + 9), keys))


def test_every_picture_and_their_order_matter(functions, bundle):
  read, answer, _ = functions
  pixels, keys, mask = pixels_of(1, 2), keys_of(1, len(TURNS)), np.ones((1, 2), bool)
  _, logps = answer(read(pixels, mask), asked(bundle, TURNS), keys)
  _, turned = answer(read(pixels[:, ::-1], mask), asked(bundle, TURNS), keys)
  _, one = answer(read(pixels[:, :1], mask[:, :1]), asked(bundle, TURNS), keys)
  assert np.abs(logps - turned)[..., 0].max() > 1e-3
  assert np.abs(logps - one)[..., 0].max() > 1e-3


def test_a_turn_keeps_its_first_line_break_and_loses_blanks_at_its_end(bundle):
  processor = bundle.processor
  ids = processor.encode_turn('\nyes \n')
  assert processor.tokenizer.decode(ids) == '\nyes'
