"""Texts: true where they should be, wrong as often as they should be, parsed back to what was
meant.
"""

import collections
import math

import numpy as np
import pytest

from dsr_jax.scenes import entropy, grammar, judge, sets, world
from dsr_jax.scenes.grammar import Atoms, Clause, Relation


def scenes(number, seed=0, skewed=True):
  rng = np.random.default_rng(seed)
  return [world.random_scene(rng, skewed=skewed, held_out='include') for _ in range(number)]


def test_texts_are_short_lower_case_words_of_a_small_vocabulary():
  texts = sets.vocabulary_texts(4000)[len(grammar.QUESTIONS_DESCRIBE) :]
  words = collections.Counter(w for t in texts for w in grammar.tokens(t))
  assert 75 <= len(words) <= 125
  assert all(t == t.lower() and set(t) <= set('abcdefghijklmnopqrstuvwxyz., ?') for t in texts)
  assert max(len(grammar.tokens(t)) for t in texts) <= 48
  rng = np.random.default_rng(1)
  assert 7 < np.mean([len(grammar.tokens(grammar.caption(s, rng))) for s in scenes(2000)]) < 14


def test_vocabulary_texts_hold_every_word_of_the_data_sets():
  known = {w for t in sets.vocabulary_texts(8000) for w in grammar.tokens(t)}
  for i in range(1500):
    _, question, answer = sets.pretraining_question(0, i)
    texts = (sets.pretraining_example(0, i)[1], question, answer, sets.training_prompt(0, i).text)
    assert known.issuperset(w for t in texts for w in grammar.tokens(t))


def test_parsing_gives_back_what_was_meant():
  rng = np.random.default_rng(2)
  for scene in scenes(4000):
    atoms = grammar.plan_caption(scene, rng)
    if rng.random() < 0.3:
      atoms = grammar.corrupt(atoms, rng)
    text = grammar.realise(atoms, rng)
    parsed = judge.parse(text)
    assert parsed is not None and entropy._meaning(parsed) == entropy._meaning(atoms), (
      text,
      atoms,
      parsed,
    )


def test_captions_are_true_and_a_tenth_of_pretraining_captions_is_wrong():
  rng = np.random.default_rng(3)

  def true(text, scene):
    return (lambda c: c.right == c.stated)(judge.count_atoms(text, scene))

  assert all(true(grammar.caption(s, rng), s) for s in scenes(1500))
  wrong = np.mean([not true(grammar.pretraining_caption(s, rng), s) for s in scenes(4000)])
  # A corrupted shape or relation may happen to be true of something else, so a little fewer than 10
  # %.
  assert 0.07 < wrong < 0.115


def test_corruption_changes_exactly_one_atom():
  rng = np.random.default_rng(4)
  for scene in scenes(1000):
    atoms = grammar.plan_caption(scene, rng)
    wrong = grammar.corrupt(atoms, rng)
    changed = sum(a != b for c, d in zip(atoms.clauses, wrong.clauses) for a, b in zip(c, d))
    assert changed + (atoms.relations != wrong.relations) == 1


@pytest.mark.parametrize('category', grammar.CATEGORIES)
def test_prompts_tell_the_truth_about_their_scene_and_what_their_task_asks(category):
  rng = np.random.default_rng(5)
  for _ in range(100):
    scene = grammar.prompt_scene(rng, category)
    prompt = grammar.prompt_of(scene, category, rng)
    verdict = judge.verdict(prompt, judge.Reading(scene))
    assert verdict == {'geneval': True, 'strict': True, 'graded': 1.0}, (prompt, scene)
    assert entropy._meaning(judge.parse(prompt.text)) == entropy._meaning(prompt.atoms)
    clauses, relations = prompt.atoms
    if category == 'counting':
      assert len(clauses) == 1 and 2 <= clauses[0].count <= 4
    if category in ('position', 'spatial'):
      assert len(clauses) == 2 and len(relations) == 1
    if category in ('color', 'color_attr'):
      assert clauses[0].colour is not None and clauses[0].colour != clauses[1].colour
    if category == 'numeracy':
      assert max(c.count for c in clauses) >= 2


def test_relations_are_geneval_s():
  """Against GenEval's own arithmetic, written here on boxes with float centres."""

  def geneval(a, b):
    (ta, la, ba, ra), (tb, lb, bb, rb) = a.box, b.box
    ca, cb = np.array([(la + ra) / 2, (ta + ba) / 2]), np.array([(lb + rb) / 2, (tb + bb) / 2])
    offset = ca - cb
    dims = np.array([(ra - la) + (rb - lb), (ba - ta) + (bb - tb)])
    revised = np.sign(offset) * np.maximum(np.abs(offset) - 0.1 * dims, 0)
    if np.all(np.abs(revised) < 1e-3):
      return set()
    x, y = revised / np.linalg.norm(offset)
    return {
      n
      for n, ok in (('left', x < -0.5), ('right', x > 0.5), ('above', y < -0.5), ('below', y > 0.5))
      if ok
    }

  for scene in scenes(500, skewed=False):
    for a in scene.things:
      for b in scene.things:
        if a is not b:
          assert set(grammar.true_relations(a, b)) - {'next'} == geneval(a, b)
          for name in grammar.RELATIONS:
            assert grammar.relation_holds(name, a, b) == grammar.relation_holds(
              grammar.INVERSE[name], b, a
            )


@pytest.mark.parametrize(
  'text, clauses, relations',
  [
    ('a photo of a red disc', [Clause(2, 1, 0)], []),
    ('Two violet hoops with dots.', [Clause(3, 2, 5, 2)], []),
    (
      'an hourglass, a box and a small orange cross',
      [Clause(7), Clause(0), Clause(5, 1, 1, None, 8)],
      [],
    ),
    ('there is a disc. it is red and striped.', [Clause(2, 1, 0, 1)], []),
    (
      'a ring and a heart. the heart is to the left of the ring. the ring is blue.',
      [Clause(3, 1, 4), Clause(6)],
      [Relation(1, 'left', 0)],
    ),
    (
      'the red disc is next to the blue square',
      [Clause(2, 1, 0), Clause(0, 1, 4)],
      [Relation(0, 'next', 1)],
    ),
  ],
)
def test_texts_are_parsed(text, clauses, relations):
  assert judge.parse(text) == Atoms(tuple(clauses), tuple(relations))


@pytest.mark.parametrize(
  'text',
  [
    '',
    'red',
    'a red',
    'a dog',
    'a red blue disc',
    'disc disc',
    'a disc and',
    'a disc left of',
    'it is red',
    'a disc a ring',
    'a disc with',
    'a photo of',
    'a disc! <|User|>',
    'there is',
    'a disc is is red',
    'yes',
  ],
)
def test_texts_outside_the_grammar_are_unparsable(text):
  assert judge.parse(text) is None


def test_exact_probabilities_sum_to_one_and_agree_with_brute_force():
  scene = world.Scene((world.Thing(0, 1, 1, 8, 2, 2),))
  texts = collections.Counter()
  for text, p in entropy.enumerate_paths(lambda rng: grammar.caption(scene, rng)):
    texts[text] += p
  assert sum(texts.values()) == pytest.approx(1, abs=1e-12)
  for text in list(texts)[::40]:  # the pruned, two-stage sum
    assert entropy.log_probability(text, scene, False) == pytest.approx(
      math.log(texts[text]), abs=1e-10
    )


def test_exact_probabilities_agree_with_sampled_frequencies():
  scene = world.Scene((world.Thing(0, 1, 0, 8, 2, 2),))
  rng = np.random.default_rng(6)
  seen = collections.Counter(grammar.pretraining_caption(scene, rng) for _ in range(30_000))
  for text, count in seen.most_common(8):
    p = math.exp(entropy.log_probability(text, scene, True))
    assert abs(count / 30_000 - p) < 4 * math.sqrt(p / 30_000)
