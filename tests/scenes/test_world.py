"""Scene graphs, sprites, splits and data sets: what is drawn, and that it depends on (seed, index)
alone.
"""

import collections
import subprocess
import sys

import numpy as np
import pytest

from dsr_jax.errors import InputError
from dsr_jax.scenes import grammar, questions, render, sets, world


def scenes(number, seed=0, **how):
  rng = np.random.default_rng(seed)
  return [
    world.random_scene(rng, **({'skewed': False, 'held_out': 'include'} | how))
    for _ in range(number)
  ]


def test_things_stay_in_the_picture_and_keep_a_free_cell_between_them():
  for scene in scenes(500):
    used = np.zeros((world.GRID + 2, world.GRID + 2), int)
    for t in scene.things:
      n = t.size // world.CELL
      assert 0 <= t.row <= world.GRID - n and 0 <= t.col <= world.GRID - n
      assert not used[
        t.row : t.row + n + 2, t.col : t.col + n + 2
      ].any()  # with a border of one cell
      used[t.row + 1 : t.row + n + 1, t.col + 1 : t.col + n + 1] = 1
    for row, col in scene.pebbles:
      assert not used[row : row + 3, col : col + 3].any()
    assert 1 <= len(scene.things) <= world.MAX_THINGS


def test_scenes_are_hashable_and_compare_by_value():
  a, b = scenes(1)[0], scenes(1)[0]
  assert (
    a == b and len({a, b}) == 1 and world.graph(a) == world.graph(b._replace(ground=1 - a.ground))
  )


def test_every_look_is_drawn_differently():
  for size in world.SIZES:
    for ground in range(len(world.GROUNDS)):
      drawn = {
        s.tobytes() for (g, _, _, _, n), s in render.SPRITES.items() if (g, n) == (ground, size)
      }
      assert len(drawn) == len(world.SHAPES) * len(world.COLOURS) * len(world.TEXTURES)


def test_every_silhouette_touches_all_sides_of_its_box():
  for shape in range(len(world.SHAPES)):
    for size in world.SIZES:
      mask = render.shape_mask(shape, size)
      assert mask[0].any() and mask[-1].any() and mask[:, 0].any() and mask[:, -1].any()


def test_few_patches_cover_nearly_all_pictures():
  coverage = render.patch_coverage(sets.pictures(scenes(2000, skewed=True, held_out='exclude')))
  assert coverage['share'] > 0.95 and coverage['distinct'] < 900
  assert render.patch_coverage(sets.pictures(scenes(2000)))['share'] > 0.9


def test_patches_are_cells_in_reading_order():
  picture = np.arange(32 * 32 * 3).reshape(32, 32, 3)
  np.testing.assert_array_equal(
    render.patches(picture)[8 * 2 + 5], picture[8:12, 20:24].reshape(48)
  )


def test_pretraining_never_shows_held_out_pairs_and_reinforcement_shows_half_of_them():
  colour, texture = set(world.HELD_OUT_COLOUR), set(world.HELD_OUT_TEXTURE)

  def pairs(ss):
    return (
      {(t.shape, t.colour) for s in ss for t in s.things},
      {(t.shape, t.texture) for s in ss for t in s.things},
    )

  seen = pairs(scenes(3000, skewed=True, held_out='exclude'))
  assert not seen[0] & colour and not seen[1] & texture
  assert len(seen[0]) == 64 - len(colour) and len(seen[1]) == 24 - len(texture)
  half = pairs([sets.training_scene(0, i) for i in range(1500)])
  assert half[0] & colour == set(world.HELD_OUT_COLOUR[:5]) and half[1] & texture == set(
    world.HELD_OUT_TEXTURE[:2]
  )
  everything = pairs(scenes(3000))
  assert colour <= everything[0] and texture <= everything[1]
  usual = (
    {(s, c) for s, c in enumerate(world.USUAL_COLOUR)},
    {(s, t) for s, t in enumerate(world.USUAL_TEXTURE)},
  )
  assert not usual[0] & colour and not usual[1] & texture
  assert 0.13 <= len(colour) / 64 <= 0.17 and 0.13 <= len(texture) / 24 <= 0.17


def test_skew_makes_usual_looks_companions_and_small_counts_commoner():
  skewed, even = scenes(4000, skewed=True), scenes(4000)

  def usual(ss):
    return np.mean([t.colour == world.USUAL_COLOUR[t.shape] for s in ss for t in s.things])

  assert usual(skewed) > 0.42 and usual(even) < 0.16

  def company(ss):
    return np.mean(
      [
        world.COMPANION[s.things[0].shape] == s.things[1].shape
        for s in ss
        if len(s.things) == 2 and s.things[0].shape != s.things[1].shape
      ]
    )

  assert company(skewed) > 0.45 and company(even) < 0.2
  assert np.mean([len(s.things) for s in skewed]) < np.mean([len(s.things) for s in even])


def test_splits_share_no_scene_graph():
  """Drawn lists, not only the rule that made them."""

  def prompt_scene(purpose, index, *how):
    return sets._prompt_scene(sets._rng(purpose, 0, index), *how)

  evaluation = 6 + sets.SPLITS.index('evaluation')
  drawn = {
    'pretraining': [
      sets._draw(np.random.default_rng(i), 'pretraining', skewed=True) for i in range(2000)
    ],
    'training_prompts': [
      prompt_scene(4, i, 'training_prompts', grammar.CATEGORIES[i % 12], 'half')
      for i in range(2000)
    ],
    'training_pictures': [sets.training_scene(0, i) for i in range(2000)],
    'evaluation': sets.evaluation_scenes(1000)
    + [
      prompt_scene(evaluation, task * 100_000 + i, 'evaluation', c, 'include')
      for task, c in enumerate(grammar.GENEVAL)
      for i in range(50)
    ],
    'validation': sets.evaluation_scenes(1000, 'validation'),
  }
  owners = collections.defaultdict(set)
  for name, split in drawn.items():
    for scene in split:
      owners[world.graph(scene)].add(name)
  assert all(len(names) == 1 for names in owners.values())
  assert len(owners) > 6000


def test_examples_depend_on_seed_and_index_alone():
  assert sets.pretraining_example(3, 5)[1] == sets.pretraining_example(3, 5)[1]
  assert sets.training_prompt(1, 7) == sets.training_prompt(1, 7)
  np.testing.assert_array_equal(sets.training_picture(1, 7), sets.training_picture(1, 7))
  assert any(
    (sets.training_picture(1, 7) != sets.training_picture(s, i)).any() for s, i in ((2, 7), (1, 8))
  )
  assert sets.evaluation_prompts(3) == [
    p for i, p in enumerate(sets.evaluation_prompts(5)) if i % 5 < 3
  ]
  code = (
    'from dsr_jax.scenes import sets; print(sets.pretraining_example(3, 5)[1], '
    'sets.training_prompt(1, 7).text, '
    'sets.training_picture(1, 7).sum(), sets.evaluation_prompts(2)[7].text)'
  )
  ours = ' '.join(
    map(
      str,
      (
        sets.pretraining_example(3, 5)[1],
        sets.training_prompt(1, 7).text,
        sets.training_picture(1, 7).sum(),
        sets.evaluation_prompts(2)[7].text,
      ),
    )
  )
  other = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  ).stdout.strip()
  assert other == ours


def test_evaluation_lists_have_the_asked_size_and_refuse_nonsense():
  prompts = sets.evaluation_prompts(7)
  assert collections.Counter(p.category for p in prompts) == {c: 7 for c in grammar.GENEVAL}
  assert all(p.text.startswith('a photo of ') for p in prompts)
  with pytest.raises(
    InputError, match="the list is 'training_prompts'; use validation or evaluation"
  ):
    sets.evaluation_prompts(7, 'training_prompts')
  with pytest.raises(InputError, match='the list has 0 entries; use at least 1'):
    sets.evaluation_scenes(0)


def test_novelty_follows_the_held_out_tables():
  def atoms(pair):
    return grammar.Atoms((grammar.Clause(pair[0], colour=pair[1]),))

  assert sets.novelty(atoms((0, 0))) == 'seen'
  assert sets.novelty(atoms(world.HELD_OUT_COLOUR[0])) == 'reinforced'
  assert sets.novelty(atoms(world.HELD_OUT_COLOUR[-1])) == 'new'


def test_pretraining_questions_are_answered_rightly():
  """Checked against the scene by rules of this test's own, for the questions whose words say
  all.
  """
  rng = np.random.default_rng(0)
  answers = collections.Counter()
  for scene in scenes(2000, skewed=True):
    q = questions.random_question(scene, rng)
    answers[q.answer] += 1
    words = grammar.tokens(q.text)
    shape = next(
      i
      for i, names in enumerate(grammar.NOUNS)
      for n in names
      if n in words or grammar._plural(n) in words
    )
    named = [t for t in scene.things if t.shape == shape]
    if q.kind == 'number':
      assert grammar.NUMBERS[len(named)] == q.answer
    elif q.kind in ('colour', 'choice'):
      assert [world.COLOURS[t.colour] for t in named] == [q.answer]
    elif q.kind == 'exists':
      colours = [i for i, names in enumerate(grammar.COLOUR_WORDS) for n in names if n in words]
      textures = [
        i
        for i, names in enumerate(grammar.TEXTURE_WORDS)
        for n in names + (grammar.TEXTURE_NOUNS.get(i),)
        if n in words
      ]
      there = any(
        (not colours or t.colour == colours[0]) and (not textures or t.texture == textures[0])
        for t in named
      )
      assert q.answer == ('yes' if there else 'no'), (scene, q)
  assert abs(answers['yes'] - answers['no']) < 150
