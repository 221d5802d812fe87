"""Every reward against a slow version or a property of its own, and the fields they declare."""

import types

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import micro_model
import numpy as np
from PIL import Image
import pytest
import tiny_step

from dsr_jax import config as config_lib
from dsr_jax.data import batches as batches_lib
from dsr_jax.data import fields, swaps
from dsr_jax.errors import InputError
from dsr_jax.models.common import splice
from dsr_jax.models.unified import Picture, Scoring, Text, row_keys
from dsr_jax.rewards import controls, dual, table, variants
from dsr_jax.rewards import scenes_judge as callback
from dsr_jax.rewards.base import RewardInputs
from dsr_jax.scenes import grammar, judge, render, sets

N = micro_model.NUM_CODES


@pytest.fixture(name='model', scope='module')
def _model():
  graphdef, params = tiny_step.model()
  return nnx.merge(graphdef, params)


def case(model, task, method=tiny_step.METHOD, seed=0, extra=None, group=3):
  """Two inputs of a task with random candidates, texts of several lengths."""
  rng = np.random.default_rng(seed)

  def ids(*shape):
    return jnp.asarray(rng.integers(9, 40, shape).astype('i4'))

  def masks(*shape):
    return jnp.asarray(np.arange(shape[-1]) < rng.integers(1, shape[-1] + 1, shape[:-1])[..., None])

  def codes(*shape):
    return jnp.asarray(rng.integers(0, micro_model.CODES, shape).astype('i4'))

  if task == 'generation':
    text, picture, question = (
      Text(ids(2, 5), masks(2, 5)),
      model.picture_from_codes(codes(2, group, N)),
      Text(ids(3), jnp.ones(3, bool)),
    )
  else:
    pixels = jnp.asarray(rng.uniform(-1, 1, (2, 16, 16, 3)).astype('f4'))
    text, picture = Text(ids(2, group, 5), masks(2, group, 5)), model.picture_from_pixels(pixels)
    question = Text(ids(2, 3), jnp.ones((2, 3), bool))
  return RewardInputs(
    task=task,
    model=model,
    text=text,
    picture=picture,
    question=question,
    sample_keys=row_keys(jax.random.key(seed), 0, 2, group),
    score_keys=None,
    extra=extra or {},
    reward_params=None,
    scoring=Scoring(),
    eos_id=2,
    method=method,
  )


def token_logps(c, i, j, text=None, picture=None):
  """Of candidate j of input i, the input's tokens given it: one pair at a time, without padding."""
  if c.task == 'generation':
    text = jax.tree.map(lambda x: x[i], c.text) if text is None else text
    n = int(text.mask.sum())
    one = Text(text.ids[None, None, :n], text.mask[None, None, :n])
    shown = (
      jax.tree.map(lambda x: x[i : i + 1, j : j + 1], c.picture) if picture is None else picture
    )
    return np.asarray(
      c.model.text_logps(
        shown, jax.tree.map(lambda x: x[None], c.question), one, None, Scoring()
      ).logp[0, 0]
    )
  n = int(c.text.mask[i, j].sum())
  one = Text(c.text.ids[i : i + 1, j : j + 1, :n], c.text.mask[i : i + 1, j : j + 1, :n])
  codes = c.picture.codes[i] if picture is None else picture
  return np.asarray(c.model.picture_logps(one, codes[None, None], None, Scoring()).logp[0, 0])


def each(c, function, group=3):
  return np.array([[function(i, j) for j in range(group)] for i in range(2)])


BOTH = pytest.mark.parametrize('task', ['generation', 'understanding'])


@BOTH
def test_dual_is_the_mean_log_probability_and_probability_the_mean_probability(model, task):
  c = case(model, task)
  np.testing.assert_allclose(
    dual.dual(c), each(c, lambda i, j: token_logps(c, i, j).mean()), atol=2e-5
  )
  np.testing.assert_allclose(
    variants.probability(c), each(c, lambda i, j: np.exp(token_logps(c, i, j)).mean()), atol=2e-5
  )


@BOTH
def test_pmi_weighs_tokens_by_what_the_candidates_say_about_them(model, task):
  c = case(model, task)
  grey = Picture(None, jnp.zeros((1, 1, 16, 16, 3)))
  for i in range(2):
    logps = np.stack([token_logps(c, i, j) for j in range(3)])
    if task == 'generation':
      alone = token_logps(c, i, 0, picture=grey)
    else:  # this model's unconditional prompt is no words at all
      nothing = Text(c.text.ids[i : i + 1, :1], jnp.zeros((1, 1, 5), bool))
      alone = np.asarray(
        c.model.picture_logps(nothing, c.picture.codes[i][None, None], None, Scoring()).logp[0, 0]
      )
    weight = np.abs(logps - alone).mean(0) + 1e-6
    np.testing.assert_allclose(
      variants.pmi(c)[i], (logps * weight).sum(1) / weight.sum(), atol=1e-4
    )


@BOTH
def test_contrastive_is_the_inputs_share_among_its_negatives(model, task):
  rng = np.random.default_rng(5)
  if task == 'generation':
    extra = dict(
      negative_ids=jnp.asarray(rng.integers(9, 40, (2, 2, 4)).astype('i4')),
      negative_mask=jnp.ones((2, 2, 4), bool),
    )

    def others(i):
      return [Text(extra['negative_ids'][i, m], extra['negative_mask'][i, m]) for m in range(2)]

    c = case(model, task, extra=extra)

    def totals(i, j):
      return [token_logps(c, i, j).sum(), *(token_logps(c, i, j, text=t).sum() for t in others(i))]
  else:
    pixels = jnp.asarray(rng.integers(0, 255, (2, 1, 16, 16, 3)).astype('u1'))
    c = case(model, task, extra=dict(negative_pixels=pixels))
    other = model.picture_from_pixels(pixels[:, 0].astype(jnp.float32) / 127.5 - 1.0).codes

    def totals(i, j):
      return [token_logps(c, i, j).sum(), token_logps(c, i, j, picture=other[i]).sum()]

  def share(t):
    return t[0] - max(t) - np.log(np.sum(np.exp(np.array(t) - max(t))))

  np.testing.assert_allclose(
    variants.contrastive(c), each(c, lambda i, j: share(totals(i, j))), atol=1e-3
  )


def test_contrastive_counts_the_end_of_text_in_all_prompts_or_in_none(model):
  """Prompts and negatives of one length that are the same text have equal shares, with their ends
  too.
  """
  for eos in (False, True):
    c = case(model, 'generation', tiny_step.method(eos_in_reward=eos))
    c = c._replace(extra=dict(negative_ids=c.text.ids[:, None], negative_mask=c.text.mask[:, None]))
    np.testing.assert_allclose(variants.contrastive(c), np.log(0.5), atol=1e-5)


@BOTH
def test_shuffled_scores_another_input(model, task):
  base = case(model, task)
  if task == 'generation':
    other = jax.tree.map(lambda x: x[::-1], base.text)
    c = base._replace(extra=dict(other_ids=other.ids, other_mask=other.mask))
    expected = dual.dual(base._replace(text=other))
  else:
    pixels = jnp.asarray(np.random.default_rng(3).integers(0, 255, (2, 16, 16, 3)).astype('u1'))
    c = base._replace(extra=dict(other_pixels=pixels))
    expected = dual.dual(
      base._replace(picture=model.picture_from_pixels(pixels.astype(jnp.float32) / 127.5 - 1.0))
    )
  np.testing.assert_allclose(controls.shuffled(c), expected, atol=1e-5)
  assert np.abs(np.asarray(controls.shuffled(c)) - np.asarray(dual.dual(base))).max() > 1e-3


def test_forward_is_the_candidates_own_likelihood(model):
  c = case(model, 'generation')
  own = c.model.picture_logps(
    Text(c.text.ids[:, None], c.text.mask[:, None]), c.picture.codes, None, Scoring()
  ).logp.mean(-1)
  np.testing.assert_allclose(controls.forward(c), own, atol=1e-5)
  c = case(model, 'understanding')
  scores = c.model.text_logps(
    jax.tree.map(lambda x: x[:, None], c.picture), c.question, c.text, None, Scoring()
  ).logp
  own = [
    [np.asarray(scores[i, j])[np.asarray(c.text.mask[i, j])].mean() for j in range(3)]
    for i in range(2)
  ]
  np.testing.assert_allclose(controls.forward(c), own, atol=1e-5)


@BOTH
def test_vqa_is_yes_against_no_after_the_spliced_question(model, task):
  extra = dict(
    yes_before=jnp.array([9, 10]),
    yes_after=jnp.array([11]),
    answer_yes=jnp.array([12]),
    answer_no=jnp.array([13, 14]),
  )
  c = case(model, task, extra=extra)

  def one(i, j):
    text = jax.tree.map(lambda x: x[i] if task == 'generation' else x[i, j], c.text)
    asked = [9, 10, *np.asarray(text.ids)[np.asarray(text.mask) & (np.asarray(text.ids) != 2)], 11]
    shown = jax.tree.map(
      lambda x: x[i : i + 1, j : j + 1] if task == 'generation' else x[i : i + 1, None], c.picture
    )
    question = Text(jnp.array([asked], jnp.int32), jnp.ones((1, len(asked)), bool))

    def total(ids):
      return float(
        model.text_logps(
          shown,
          question,
          Text(jnp.array([[ids]]), jnp.ones((1, 1, len(ids)), bool)),
          None,
          Scoring(),
        ).logp.sum()
      )

    return 1 / (1 + np.exp(total([13, 14]) - total([12])))

  np.testing.assert_allclose(variants.vqa(c), each(c, one), atol=1e-4)


def test_splicing_leaves_no_hole_and_keeps_the_order():
  content = splice.compacted(
    jnp.array([[5, 6, 7], [5, 2, 7]]), jnp.array([[1, 1, 0], [1, 0, 1]], bool)
  )
  for before, after in (((1,), (8, 9)), (jnp.array([1]), jnp.array([8, 9]))):
    ids, length = splice.spliced(before, *content, after, pad_id=0)
    np.testing.assert_array_equal(ids, [[1, 5, 6, 8, 9, 0], [1, 5, 7, 8, 9, 0]])
    np.testing.assert_array_equal(length, [5, 5])


def test_random_is_uniform_by_the_candidates_key_and_not_the_samplers_bits(model):
  c = case(model, 'generation')._replace(sample_keys=row_keys(jax.random.key(1), 0, 200, 8))
  drawn = np.asarray(controls.random(c))
  assert drawn.shape == (200, 8) and 0.47 < drawn.mean() < 0.53 and len(np.unique(drawn)) > 1500
  np.testing.assert_array_equal(drawn, controls.random(c))


@BOTH
def test_an_empty_text_gets_the_worst_of_its_group_under_every_reward(model, task):
  if task == 'understanding':
    c = case(model, task, tiny_step.method(reward='random'))
    c = c._replace(
      text=Text(c.text.ids.at[0, 1, 0].set(2), c.text.mask.at[0, 1].set(jnp.arange(5) < 1))
    )
    assert table.score(c).total[0, 1] == table.score(c).total[0].min()


# The judge.


class Words:
  """A processor of whole words."""

  def __init__(self, texts):
    self.words = [
      '<s>',
      '</s>',
      '<pad>',
      *dict.fromkeys(w for t in texts for w in t.replace('.', ' .').split()),
    ]
    self.tokenizer = self
    self.all_special_ids = [0, 1, 2]
    self.templates = types.SimpleNamespace(pad_id=2, eos_id=1)

  def __len__(self):
    return len(self.words)

  def decode(self, ids, clean_up_tokenization_spaces=False):
    return ' ' + self.words[ids[0]]

  def encode_prompt(self, text):
    return [self.words.index(w) for w in text.replace('.', ' .').split()]

  encode_question = encode_prompt

  def encode_answer(self, text):
    return [*self.encode_prompt(text), 1]


def test_the_judges_verdicts_are_the_judges_own():
  prompts = sets.evaluation_prompts(2, 'validation')
  scenes = sets.evaluation_scenes(12, 'validation')
  pixels = sets.pictures(scenes).reshape(4, 3, 32, 32, 3)
  texts = [p.text for p in prompts[:4]]
  captions = [grammar.caption(s, np.random.default_rng(i)) for i, s in enumerate(scenes)]
  words = Words(texts + captions)
  vocabulary = fields.FIELDS['vocabulary'].whole(words, None)
  ids, mask = batches_lib.prompts_lib.pad([words.encode_prompt(t) for t in texts], 40, 2)
  found = callback.verdicts_on_pictures(pixels, ids, mask, **vocabulary)
  expected = [
    [judge.graded(p.atoms, r) for r in judge.read(row)] for p, row in zip(prompts, pixels)
  ]
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  # A caption of each scene under every picture: true ones state only right atoms.
  ids, mask = batches_lib.prompts_lib.pad([words.encode_prompt(t) for t in captions], 60, 2)
  told = callback.verdicts_on_texts(
    pixels[:, 0], ids.reshape(4, 3, -1), mask.reshape(4, 3, -1), **vocabulary
  )
  for i in range(4):
    for j in range(3):
      counts = judge.count_atoms(captions[3 * i + j], scenes[3 * i])
      p, r = counts.right / counts.stated, counts.recalled / counts.total
      np.testing.assert_allclose(told[i, j], 2 * p * r / (p + r) if p + r else 0.0, rtol=1e-6)
  assert np.all(told[:, 0] >= told[:, 1:].max(1)) and told[:, 0].min() > 0.4


def test_an_extra_thing_costs_the_strict_judges_verdict_alone():
  prompt = sets.evaluation_prompts(1, 'validation')[0]  # of one thing
  scenes = sets.evaluation_scenes(300, 'validation')
  pixels = sets.pictures(scenes)[None]
  words = Words([prompt.text])
  vocabulary = fields.FIELDS['vocabulary'].whole(words, None)
  ids = np.array([words.encode_prompt(prompt.text)])
  given = (pixels, ids, np.ones(ids.shape, bool))
  graded = callback.verdicts_on_pictures(*given, **vocabulary)[0]
  strict = callback.verdicts_on_pictures(*given, **vocabulary, rule=judge.strict)[0]
  things = np.array([len(scene.things) for scene in scenes])
  asked = len(judge.expand(prompt.atoms))
  np.testing.assert_array_equal(strict, (graded == 1) & (things == asked))
  assert strict.any() and ((graded == 1) & (strict == 0)).any()


def test_a_degraded_judge_is_right_as_often_as_it_says(model, monkeypatch):
  pixels = np.stack([render.render(s) for s in sets.evaluation_scenes(1, 'validation')])
  prompt = 'a photo of a red disc'
  words = Words([prompt])
  vocabulary = jax.tree.map(jnp.asarray, fields.FIELDS['vocabulary'].whole(words, None))
  ids = jnp.asarray([words.encode_prompt(prompt)] * 20)
  shown = jnp.broadcast_to(jnp.asarray(pixels[0], jnp.float32) / 127.5 - 1.0, (20, 8, 32, 32, 3))
  verdicts = []
  for accuracy in (1.0, 0.7):
    c = case(
      model, 'generation', tiny_step.method(reward='judge', judge_accuracy=accuracy)
    )._replace(
      text=Text(ids, jnp.ones(ids.shape, bool)),
      picture=Picture(None, shown),
      sample_keys=row_keys(jax.random.key(0), 0, 20, 8),
      extra=vocabulary,
    )
    verdicts.append(np.asarray(jax.jit(lambda c=c: controls.judge(c))()))
  exact, degraded = verdicts
  assert len(np.unique(exact)) == 1
  kept = np.isclose(degraded, exact)
  assert np.all(kept | np.isclose(degraded, 1 - exact)) and 0.6 < kept.mean() < 0.8


def test_the_judge_refuses_pictures_that_are_none_of_scenes(model):
  with pytest.raises(InputError, match='32 x 32 pixels, but the model has 16 x 16'):
    controls.judge(case(model, 'generation', tiny_step.method(reward='judge')))


# Fields.


def test_swaps_change_what_is_said_and_keep_the_words_around_it():
  assert (
    swaps.swapped('a red disc left of a blue square', 'colour')
    == 'a blue disc left of a red square'
  )
  assert (
    swaps.swapped('a red disc left of a blue square', 'side') == 'a red disc right of a blue square'
  )
  assert swaps.swapped('a red disc and a red ring', 'colour') == 'a orange disc and a orange ring'
  assert swaps.swapped('two discs and three rings', 'count') == 'three discs and two rings'
  assert swaps.swapped('a small striped heart', 'size') == 'a large striped heart'
  assert swaps.swapped('a cat', 'colour') is None


def test_negatives_are_as_many_as_asked_and_never_the_prompt():
  for prompt in sets.evaluation_prompts(20, 'validation'):
    found = swaps.negatives(prompt.text, 3, 'something else')
    assert len(found) == 3 and prompt.text not in found
    assert all(
      judge.parse(text) != judge.parse(prompt.text) for text in found if judge.parse(prompt.text)
    )
  assert swaps.negatives('a cat', 2, 'a dog') == ['a dog', 'a dog']


@pytest.mark.parametrize(
  'reward, names',
  [
    ('dual', []),
    (
      'contrastive',
      ['generation/negative_ids', 'generation/negative_mask', 'understanding/negative_pixels'],
    ),
    ('shuffled', ['generation/other_ids', 'generation/other_mask', 'understanding/other_pixels']),
    ('vqa', ['shared/answer_no', 'shared/answer_yes', 'shared/yes_after', 'shared/yes_before']),
    ('judge', ['shared/token_bytes', 'shared/token_ends']),
  ],
)
def test_batches_hold_what_the_reward_declares_and_nothing_else(tmp_path, reward, names):
  texts = [
    'a red disc left of a blue square',
    'two green rings',
    'a small heart',
    'a striped cross above a ring',
  ]
  (tmp_path / 'prompts.txt').write_text('\n'.join(texts))
  folder = tmp_path / 'images'
  folder.mkdir()
  for i in range(4):
    Image.new('RGB', (20, 20), (60 * i, 100, 200)).save(folder / f'{i}.png')
  data = config_lib.Data(prompts=str(tmp_path / 'prompts.txt'), images=str(folder))
  more = ' '.join(t for text in texts for t in swaps.negatives(text, 3, ''))
  words = Words([*texts, more, 'q', 'i', 'Does this image show', '? Answer yes or no .'])
  method = config_lib.Method(
    reward=reward,
    inputs_per_step=4,
    question='q',
    instruction='i',
    yes_question='Does this image show {} ? Answer yes or no',
  )
  made = batches_lib.make(data, method, words, 16)
  batch = made.at(3)
  extra = {
    'generation': batch.generation.extra,
    'understanding': batch.understanding.extra,
    'shared': batch.shared,
  }
  assert sorted(f'{where}/{name}' for where, found in extra.items() for name in found) == names
  if reward == 'shuffled':  # the next input of the run stands in for each
    again = batches_lib.make(data, method, words, 16).at(3, 0, 1)
    other_ids = again.generation.extra['other_ids']
    assert other_ids.tolist() == batch.generation.prompt.ids[1:2].tolist()
    other_pixels = again.understanding.extra['other_pixels']
    np.testing.assert_array_equal(other_pixels, batch.understanding.pixels[1:2])


@pytest.mark.parametrize('reward', ['pmi', 'contrastive', 'vqa', 'forward', 'random', 'shuffled'])
def test_the_step_runs_under_the_reward(reward):
  rng = np.random.default_rng(0)
  extra = {
    'contrastive': dict(
      generation=dict(
        negative_ids=rng.integers(9, 40, (4, 2, 5)).astype('i4'),
        negative_mask=np.ones((4, 2, 5), bool),
      ),
      understanding=dict(
        negative_pixels=rng.integers(0, 255, (4, 1, 16, 16, 3)).astype('u1'),
      ),
    ),
    'shuffled': dict(
      generation=dict(
        other_ids=rng.integers(9, 40, (4, 6)).astype('i4'),
        other_mask=np.ones((4, 6), bool),
      ),
      understanding=dict(other_pixels=rng.integers(0, 255, (4, 16, 16, 3)).astype('u1')),
    ),
  }.get(reward)
  shared = {
    'vqa': dict(
      yes_before=np.array([9, 10], 'i4'),
      yes_after=np.array([11], 'i4'),
      answer_yes=np.array([12], 'i4'),
      answer_no=np.array([13], 'i4'),
    ),
  }.get(reward)
  system = tiny_step.system(rollout_chunk=2)
  _, metrics, records, step = tiny_step.run(
    method=tiny_step.method(reward=reward),
    system=system,
    batches=lambda _: tiny_step.batch(extra=extra, shared=shared),
  )
  assert step._cache_size() == 1 and tiny_step.finite(metrics)
  assert metrics['generation/reward_spread'] > 0


# Bad input.


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(method__reward='likes'), ['likes', 'dual', 'pmi', 'clip', 'judge', 'random']),
    *(
      (
        dict(method__reward=judge, data__prompts='t2i_compbench'),
        [judge, 't2i_compbench', 'scenes'],
      )
      for judge in ('judge', 'judge_strict')
    ),
    (
      dict(method__reward='clip', method__clip_reward__model='x'),
      ['clip', 'understanding', 'generation'],
    ),
    (dict(method__reward='clip', method__task='generation'), ['clip_reward.model', 'directory']),
    (dict(method__judge_accuracy=1.5), ['judge_accuracy', 'at most 1']),
    (dict(method__yes_question='Is it?'), ['yes_question', '{}']),
  ],
)
def test_impossible_rewards_are_refused_in_one_sentence(changes, words):
  with pytest.raises(InputError) as e:
    tiny_step.load(**changes)
  assert all(word in str(e.value) for word in words) and '\n' not in str(e.value)
