"""Scores against slow formulas of their own, intervals against theory, references against what they
must get.
"""

import collections
import itertools

import numpy as np
import pytest

from dsr_jax.errors import InputError
from dsr_jax.evaluate import scores as scores_lib
from dsr_jax.evaluate import stats
from dsr_jax.scenes import grammar, questions, render, sets, world


def description_scores(scenes, texts):
  return stats.estimates(scores_lib.description_sums(scenes, texts), scores_lib.DESCRIPTION)


def yesno_scores(answers, truths):
  return stats.estimates(scores_lib.yesno_sums(answers, truths), scores_lib.YESNO)


def choice_scores(rows, answers):
  return stats.estimates(scores_lib.choice_sums(rows, answers), scores_lib.CHOICE)


def hallusion_scores(rows, answers):
  return stats.estimates(scores_lib.hallusion_sums(rows, answers), scores_lib.HALLUSION)


@pytest.fixture(scope='module')
def generated():
  """Prompts, and pictures of which about half are right: (P, 2, 32, 32, 3)."""
  rng = np.random.default_rng(0)
  prompts, pixels, truth = [], [], []
  for i in range(90):
    category = grammar.GENEVAL[i % 6]
    scene = grammar.prompt_scene(rng, category)
    prompts.append(grammar.prompt_of(scene, category, rng))
    right = rng.random(2) < 0.5
    # A picture of one pebble alone is wrong for every prompt.
    pixels.append([render.render(scene if ok else world.Scene((), 0, ((3, 3),))) for ok in right])
    truth.append(right)
  return prompts, np.array(pixels), np.array(truth)


def test_generation_score_is_the_plain_mean_of_tasks(generated):
  prompts, pixels, truth = generated
  scores = scores_lib.generation_scores(prompts, pixels)
  np.testing.assert_array_equal(scores['correct'], truth)
  by_task = {c: truth[[p.category == c for p in prompts]] for c in grammar.GENEVAL}
  assert {c: e.value for c, e in scores['tasks'].items()} == pytest.approx(
    {c: t.mean() for c, t in by_task.items()}
  )
  assert scores['mean'].value == pytest.approx(np.mean([t.mean() for t in by_task.values()]))
  assert scores['any'].value == pytest.approx(np.mean([t.any(1).mean() for t in by_task.values()]))
  assert scores['strict'].value == scores['mean'].value
  assert scores['mean'].low < scores['mean'].value < scores['mean'].high


def test_paired_difference_of_a_list_with_itself_is_exactly_nothing(generated):
  prompts, _, truth = generated
  assert scores_lib.generation_difference(prompts, truth, truth) == (0, 0, 0)
  better = scores_lib.generation_difference(prompts, np.ones_like(truth), truth)
  by_task = [truth[[p.category == c for p in prompts]].mean() for c in grammar.GENEVAL]
  assert better.value == pytest.approx(1 - np.mean(by_task)) and better.low > 0


def test_intervals_agree_with_theory_and_grow_with_clusters():
  rng = np.random.default_rng(1)
  hits = (rng.random(600) < 0.3).astype(float)

  def ratio(s):
    return s[:, 0] / s[:, 1]

  single = stats.estimate(np.stack([hits, np.ones(600)], 1), ratio)
  half = 1.96 * np.sqrt(hits.mean() * (1 - hits.mean()) / 600)
  assert (single.high - single.low) / 2 == pytest.approx(half, rel=0.08)
  clustered = np.repeat(hits[:60], 10)  # ten equal answers a picture are worth one
  sums, _ = scores_lib.gathered(
    np.stack([clustered, np.ones(600)], 1), np.repeat(np.arange(60), 10)
  )
  wide = stats.estimate(sums, ratio)
  assert wide.high - wide.low > 2.5 * (single.high - single.low)


def test_resamples_draw_clusters_within_strata():
  sums = np.array([[1, 1, 0, 0]] * 3 + [[0, 0, 0, 1]] * 40, float)

  def both(s):
    return (s[:, 0] / s[:, 1] + s[:, 2] / s[:, 3]) / 2  # divides by zero if a stratum were left out

  assert stats.estimate(sums, both, np.repeat([0, 1], [3, 40])) == (0.5, 0.5, 0.5)


def test_description_scores_of_true_noisy_and_foreign_texts():
  rng = np.random.default_rng(2)
  scenes = sets.evaluation_scenes(200)
  true = description_scores(scenes, [grammar.caption(s, rng) for s in scenes])
  noisy = description_scores(scenes, [grammar.pretraining_caption(s, rng) for s in scenes])
  foreign = description_scores(scenes, [grammar.caption(s, rng) for s in scenes[1:] + scenes[:1]])
  assert (
    true['precision'].value == 1
    and true['hallucination'] == (0, 0, 0)
    and true['hallucinated_texts'].value == 0
  )
  assert foreign['precision'].value < 0.3 and 0.9 < noisy['precision'].value < 1
  assert noisy['hallucination'].value == pytest.approx(1 - noisy['precision'].value)
  p, r = true['precision'].value, true['recall'].value
  assert true['f1'].value == pytest.approx(2 * p * r / (p + r))
  nonsense = description_scores(scenes, ['a dog'] * 200)
  assert (
    nonsense['f1'].value == 0 and nonsense['unparsable'].value == 1 and nonsense['words'].value == 2
  )


def test_yesno_scores_against_a_plain_count():
  rng = np.random.default_rng(3)
  answers = rng.choice(['Yes.', 'no', 'yes, it is', 'No!', 'maybe', 'yes and no'], 400).tolist()
  truths = rng.choice(['yes', 'no'], 400).tolist()
  meant = {
    'Yes.': 'yes',
    'no': 'no',
    'yes, it is': 'yes',
    'No!': 'no',
    'maybe': '?',
    'yes and no': '?',
  }
  said = [meant[a] for a in answers]
  pairs = collections.Counter(zip(said, truths))
  precision = pairs['yes', 'yes'] / (pairs['yes', 'yes'] + pairs['yes', 'no'])
  recall = pairs['yes', 'yes'] / truths.count('yes')
  scores = yesno_scores(answers, truths)
  assert scores['f1'].value == pytest.approx(2 * precision * recall / (precision + recall))
  assert scores['accuracy'].value == pytest.approx(np.mean([a == b for a, b in zip(said, truths)]))
  assert scores['yes_ratio'].value == pytest.approx(said.count('yes') / 400)


def test_pope_asks_of_what_is_there_and_what_is_not():
  scenes, rows = sets.evaluation_pope(150)
  assert collections.Counter(t for r in rows for t in r.tracks) == {
    t: 300 for t in questions.TRACKS
  }
  for row in rows:
    words = grammar.tokens(row.text)
    shape = next(i for i, names in enumerate(grammar.NOUNS) if set(names) & set(words))
    colour = next(i for i, names in enumerate(grammar.COLOUR_WORDS) if set(names) & set(words))
    there = any((t.shape, t.colour) == (shape, colour) for t in scenes[row.picture].things)
    assert row.answer == ('yes' if there else 'no')
    if row.tracks == ('popular',):
      assert colour == world.USUAL_COLOUR[shape]
  perfect = scores_lib.pope_scores(rows, [r.answer for r in rows])
  assert all(part['f1'].value == 1 for part in perfect.values())
  always = scores_lib.pope_scores(rows, scores_lib.reference_answers(rows)['always_yes'])
  assert (
    always['overall']['f1'].value == pytest.approx(2 / 3)
    and always['overall']['yes_ratio'].value == 1
  )
  blind = scores_lib.pope_scores(rows, scores_lib.reference_answers(rows)['blind'])
  assert (
    blind['adversarial']['accuracy'].value < blind['random']['accuracy'].value
  )  # habit is what the track catches


def test_circular_choice_is_right_only_if_every_rotation_is():
  _, rows = sets.evaluation_choice(60)
  for _, group in itertools.groupby(rows, key=lambda r: r.group):
    group = list(group)
    assert len(group) == 4 and len({r.answer for r in group}) == 1
    assert {r.options.index(r.answer) for r in group} == {0, 1, 2, 3}
    assert all(r.text.endswith(f'{", ".join(r.options[:3])} or {r.options[3]}?') for r in group)
  first = choice_scores(rows, [r.options[0] for r in rows])  # who always takes the first option
  assert first['accuracy'].value == pytest.approx(0.25) and first['circular'].value == 0
  perfect = choice_scores(rows, [f'it is {r.answer}.' for r in rows])
  assert perfect['circular'].value == 1


def test_hallusion_scores_of_the_reference_players():
  scenes, rows = sets.evaluation_hallusion(40)
  assert len(scenes) == 80 and len(rows) == 160
  for k in range(40):
    before, after = scenes[2 * k : 2 * k + 2]
    changed = [(a, b) for a, b in zip(before.things, after.things) if a != b]
    assert len(changed) == 1 and sum(x != y for x, y in zip(*changed[0])) == 1
  perfect = hallusion_scores(rows, [r.answer for r in rows])
  assert all(e.value == 1 for e in perfect.values())
  always = hallusion_scores(rows, ['yes'] * len(rows))
  assert [always[k].value for k in ('aAcc', 'fAcc', 'qAcc')] == [0.5, 0, 0]
  # One wrong answer spoils one of 160 answers, one of 80 figures, one of 80 questions.
  spoiled = [r.answer for r in rows]
  spoiled[0] = 'no'
  one = hallusion_scores(rows, spoiled)
  assert [one[k].value for k in ('aAcc', 'fAcc', 'qAcc')] == pytest.approx(
    [159 / 160, 79 / 80, 79 / 80]
  )


@pytest.mark.parametrize(
  'text, answer',
  [
    ('Yes', 'yes'),
    ('no.', 'no'),
    ('yes, there is', 'yes'),
    ('', 'unknown'),
    ('yes or no', 'unknown'),
    ('yesterday', 'unknown'),
    ('there is (no) disc', 'no'),
  ],
)
def test_yes_and_no_are_extracted_as_words(text, answer):
  assert scores_lib.extract_yesno(text) == answer


def test_lists_of_different_length_are_refused():
  with pytest.raises(InputError, match='got 2 answers for 1 inputs'):
    yesno_scores(['yes', 'no'], ['yes'])
  with pytest.raises(InputError, match='got 1 prompts, but images for 2'):
    scores_lib.generation_scores(
      sets.evaluation_prompts(1)[:1], np.zeros((2, 1, 32, 32, 3), np.uint8)
    )
