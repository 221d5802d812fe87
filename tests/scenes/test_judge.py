"""The judge: reads what was drawn, refuses what was not asked for, and sees nothing where nothing
can be seen.
"""

import numpy as np
import pytest
from scipy import ndimage

from dsr_jax.errors import InputError
from dsr_jax.scenes import grammar, judge, questions, render, sets, world
from dsr_jax.scenes.grammar import Atoms, Clause, Relation
from dsr_jax.scenes.world import Thing

NUMBER = 2000


@pytest.fixture(scope='module')
def scenes():
  rng = np.random.default_rng(0)
  return [world.random_scene(rng, skewed=False, held_out='include') for _ in range(NUMBER)]


def soften(pixels, blur=0.35, noise=8.0, seed=0):
  """A mild blur and noise."""
  blurred = ndimage.gaussian_filter(pixels.astype(float), (0, blur, blur, 0))
  return np.clip(
    blurred + np.random.default_rng(seed).normal(0, noise, pixels.shape), 0, 255
  ).astype(np.uint8)


def right_by_attribute(scenes, readings):
  """Share of true things read rightly, by attribute; and of pictures with the right number of
  things.
  """
  right = {f: [] for f in Thing._fields}
  for scene, reading in zip(scenes, readings):
    at = {(t.row, t.col): t for t in reading.things}
    for t in scene.things:
      read = at.get((t.row, t.col))
      for field in Thing._fields:
        right[field].append(read is not None and getattr(read, field) == getattr(t, field))
  counts = [len(s.things) == len(r.things) and not r.blobs for s, r in zip(scenes, readings)]
  return {**{f: np.mean(v) for f, v in right.items()}, 'count': np.mean(counts)}


@pytest.mark.parametrize('soft', [False, True])
def test_true_pictures_are_read_rightly(scenes, soft):
  pixels = sets.pictures(scenes)
  readings = judge.read(soften(pixels) if soft else pixels)
  assert min(right_by_attribute(scenes, readings).values()) >= (0.99 if soft else 1.0)
  for scene, reading in zip(scenes, readings) if not soft else ():
    assert world.graph(scene) == world.graph(reading.scene) and sorted(scene.pebbles) == sorted(
      reading.scene.pebbles
    )
    assert scene.ground == reading.scene.ground


def test_one_picture_reads_as_in_a_batch(scenes):
  pixels = sets.pictures(scenes[:20])
  assert [judge.read(p)[0] for p in pixels] == judge.read(pixels)


def exact(scene):
  """What a text would mean that names every thing with its look and size."""
  return Atoms(tuple(Clause(t.shape, 1, t.colour, t.texture, t.size) for t in scene.things))


def test_a_changed_attribute_is_seen(scenes):
  rng = np.random.default_rng(1)
  pairs = []
  for scene in scenes[:400]:
    i = int(rng.integers(len(scene.things)))
    old = scene.things[i]
    for field, number in (('shape', 8), ('colour', 8), ('texture', 3)):
      new = old._replace(**{field: (getattr(old, field) + int(rng.integers(1, number))) % number})
      pairs.append(
        (scene, scene._replace(things=scene.things[:i] + (new,) + scene.things[i + 1 :]))
      )
  for (scene, changed), reading in zip(pairs, judge.read(sets.pictures([c for _, c in pairs]))):
    assert not judge.geneval(exact(scene), reading, False) and not judge.strict(
      exact(scene), reading
    )
    assert judge.graded(exact(scene), reading) < 1
    assert judge.strict(exact(changed), reading)


def test_missing_and_extra_things_are_seen(scenes):
  several = [s for s in scenes[:400] if len(s.things) > 1]
  fewer = [s._replace(things=s.things[1:]) for s in several]
  for scene, less, whole, part in zip(
    several, fewer, *map(judge.read, map(sets.pictures, (several, fewer)))
  ):
    assert not judge.geneval(exact(scene), part, False)
    assert judge.geneval(exact(less), whole, False)  # an extra thing does no harm ...
    assert not judge.strict(exact(less), whole)  # ... but under the strict rule,
    wanted = Clause(
      scene.things[0].shape, sum(t.shape == scene.things[0].shape for t in less.things)
    )
    if wanted.count:
      assert not judge.geneval(Atoms((wanted,)), whole, True)  # ... and in counting


def spoiled(pixels):
  """Pictures in which nothing should be read."""
  rng = np.random.default_rng(2)
  blurred = ndimage.gaussian_filter(pixels.astype(float), (0, 2.5, 2.5, 0)).astype(np.uint8)
  yield 'blurred', blurred
  yield 'very noisy', np.clip(pixels + rng.normal(0, 60, pixels.shape), 0, 255).astype(np.uint8)
  yield 'nothing but noise', rng.integers(0, 256, pixels.shape).astype(np.uint8)
  yield 'black', np.zeros_like(pixels)
  yield 'white', np.full_like(pixels, 255)
  yield 'moved by two pixels', np.roll(pixels, 2, 1)
  yield 'negative', 255 - pixels


def test_blank_noisy_and_blurred_pictures_are_rejected(scenes):
  pixels = sets.pictures(scenes[:300])
  for name, bad in spoiled(pixels):
    readings = judge.read(bad)
    accepted = np.mean(
      [
        judge.geneval(Atoms((Clause(s.things[0].shape),)), r, False)
        for s, r in zip(scenes, readings)
      ]
    )
    assert accepted <= 0.02, (name, accepted)
    assert not any(judge.strict(exact(s), r) for s, r in zip(scenes, readings)), name


def test_a_thing_with_halves_of_two_shapes_is_unreadable(scenes):
  """Half-drawn things are what a weak generator makes."""
  rng = np.random.default_rng(3)
  chimeras = []
  for scene in scenes[:400]:
    t = scene.things[0]
    other = t._replace(shape=(t.shape + int(rng.integers(1, 8))) % 8)
    mixed, foreign = (
      render.render(scene),
      render.render(scene._replace(things=(other,) + scene.things[1:])),
    )
    top, left, bottom, _ = t.box
    mixed[top:bottom, left : left + t.size // 2] = foreign[top:bottom, left : left + t.size // 2]
    # Not if the two look alike there: less than a cell's worth of pixels differ.
    if all((mixed != whole).any(-1).sum() >= 12 for whole in (render.render(scene), foreign)):
      chimeras.append((t, mixed))
  readings = judge.read(np.stack([mixed for _, mixed in chimeras]))
  accepted = [
    any((x.row, x.col) == (t.row, t.col) for x in r.things) for (t, _), r in zip(chimeras, readings)
  ]
  assert len(accepted) > 150 and np.mean(accepted) < 0.05


def reading(*things, blobs=0):
  return judge.Reading(world.Scene(tuple(things)), blobs)


RED_DISC, BLUE_SQUARE = Thing(2, 0, 0, 8, 3, 0), Thing(0, 4, 1, 8, 3, 5)


def test_rules_on_hand_made_readings():
  red_disc, blue_square = Clause(2, 1, 0), Clause(0, 1, 4)
  both = reading(RED_DISC, BLUE_SQUARE)
  left = Atoms((red_disc, blue_square), (Relation(0, 'left', 1),))
  right = Atoms((red_disc, blue_square), (Relation(0, 'right', 1),))
  assert judge.geneval(left, both, False) and not judge.geneval(right, both, False)
  assert judge.graded(right, both) == pytest.approx(4 / 5)
  assert not judge.geneval(Atoms((Clause(2, 2),)), both, True) and judge.geneval(
    Atoms((Clause(2),)), both, True
  )
  assert judge.geneval(Atoms((red_disc,)), reading(RED_DISC, blobs=1), False)
  assert not judge.geneval(Atoms((red_disc,)), reading(RED_DISC, blobs=1), True)
  assert not judge.strict(Atoms((red_disc,)), reading(RED_DISC, blobs=1))
  # Swapped attributes: everything named is there, nothing belongs together.
  assert not judge.geneval(Atoms((Clause(2, 1, 4), Clause(0, 1, 0))), both, False)
  assert judge.graded(Atoms((Clause(2, 1, 4), Clause(0, 1, 0))), both) == pytest.approx(1 / 2)
  # One thing cannot serve two mentions.
  assert not judge.geneval(Atoms((Clause(2), red_disc)), reading(RED_DISC, BLUE_SQUARE), False)


def test_an_unreadable_picture_is_wrong_under_every_rule():
  nothing = judge.Reading(None, 1)
  for category in grammar.CATEGORIES:
    prompt = grammar.prompt(np.random.default_rng(4), category)
    assert judge.verdict(prompt, nothing) == {'geneval': False, 'strict': False, 'graded': 0.0}


def test_true_scenes_answer_their_own_questions_and_not_those_of_their_edit(scenes):
  editable = [s for s in scenes if questions.can_edit(s)][:200]
  pictures, rows = questions.hallusion_pairs(editable, np.random.default_rng(5))
  readings = judge.read(sets.pictures(pictures))
  for row in rows:
    atoms = judge.parse(
      row.text.replace('is there', 'there is')
      .replace(' in the image', '')
      .replace(' in the picture', '')
      .rstrip('?')
    )
    assert judge.geneval(atoms, readings[row.picture], False) == (row.answer == 'yes')


@pytest.mark.parametrize(
  'text, counts',
  [
    ('a red disc', (2, 2, 2)),
    ('a large red disc left of a blue square', (6, 5, 4)),  # the size is wrong
    ('two red discs', (5, 2, 2)),
    ('a blue disc and a heart', (3, 1, 1)),
    ('a striped square. the square is right of a disc.', (4, 4, 3)),
    ('a dog', (1, 0, 0)),
    ('', (1, 0, 0)),
  ],
)
def test_atoms_of_a_text_are_counted(text, counts):
  """Stated, right and recalled, counted by hand for a small plain red disc left of a small striped
  blue square.
  """
  found = judge.count_atoms(text, world.Scene((RED_DISC, BLUE_SQUARE)))
  assert (found.stated, found.right, found.recalled) == counts and found.total == 6


@pytest.mark.parametrize(
  'pixels',
  [np.zeros((2, 16, 16, 3), np.uint8), np.zeros((32, 32, 3), np.float32), np.zeros((32, 32))],
)
def test_pictures_of_another_format_are_refused(pixels):
  with pytest.raises(
    InputError, match='got images of shape .*; resize them to 32 x 32 RGB, .B, 32, 32, 3. uint8'
  ):
    judge.read(pixels)


def test_a_verdict_has_a_reason_exactly_where_it_is_wrong():
  """Prompts against pictures of their own scenes, of others, and of others' with changed things."""
  rng = np.random.default_rng(3)
  wrong = 0
  for i in range(600):
    category = grammar.CATEGORIES[i % len(grammar.CATEGORIES)]
    scene = grammar.prompt_scene(rng, category)
    prompt = grammar.prompt_of(scene, category, rng)
    other = scene if i % 3 else grammar.prompt_scene(rng, category)
    if i % 3 == 1:
      thing = other.things[0]
      looks = (
        thing._replace(colour=(thing.colour + 1) % 8),
        thing._replace(shape=(thing.shape + 1) % 8),
      )
      other = other._replace(things=(looks[i % 2], *other.things[1:]))
    reading = judge.Reading(other, blobs=int(i % 7 == 0))
    right = judge.verdict(prompt, reading)['geneval']
    reasons = judge.reasons(prompt, reading)
    assert bool(reasons) != right and all(reasons)
    wrong += not right
  assert 100 < wrong < 500


REASONS = {
  'two discs': (
    Atoms((Clause(2, 2),)),
    'counting',
    [Thing(2, 0, 0, 8, 0, 0)],
    'disc: 2 requested, 1 drawn',
  ),
  'three discs too many': (
    Atoms((Clause(2, 2),)),
    'counting',
    [Thing(2, 0, 0, 8, 0, col) for col in (0, 3, 6)],
    'disc: 2 requested, 3 drawn',
  ),
  'a red ring': (
    Atoms((Clause(3, 1, 0),)),
    'colors',
    [Thing(3, 4, 0, 8, 0, 0)],
    'no red ring: it is blue',
  ),
  'a heart': (Atoms((Clause(6),)), 'single_object', [Thing(3, 4, 0, 8, 0, 0)], 'no heart'),
  'a triangle above a diamond': (
    Atoms((Clause(4), Clause(1)), (Relation(0, 'above', 1),)),
    'position',
    [Thing(4, 0, 0, 8, 2, 0), Thing(1, 0, 0, 8, 4, 5)],
    'the triangle is not above the diamond: it is 20 pixels left and 8 pixels above; the rule '
    'requires that the offset in that direction, minus 1.6 pixels, exceeds half of the distance',
  ),
  'a ring next to a disc': (
    Atoms((Clause(3), Clause(2)), (Relation(0, 'next', 1),)),
    'spatial',
    [Thing(3, 0, 0, 8, 0, 0), Thing(2, 0, 0, 8, 0, 5)],
    'the ring is not next to the disc: 12 pixels apart, but at most 4 count as next to',
  ),
}


@pytest.mark.parametrize('text', REASONS)
def test_the_rule_that_failed_is_said(text):
  atoms, category, things, reason = REASONS[text]
  prompt = grammar.Prompt(text, atoms, category)
  assert judge.reasons(prompt, judge.Reading(world.Scene(tuple(things)))) == (reason,)


def test_a_picture_that_cannot_be_read_says_so():
  prompt = grammar.Prompt('a disc', Atoms((Clause(2),)), 'single_object')
  (reading,) = judge.read(np.zeros((32, 32, 3), np.uint8))
  assert judge.reasons(prompt, reading) == ('hardly any ground: not an image of Scenes',)
