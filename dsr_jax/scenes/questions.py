"""Questions about scenes with one-word answers: POPE's tracks, multiple choice and HallusionBench
pairs.
"""

from typing import NamedTuple

import numpy as np

from dsr_jax.scenes import grammar, world
from dsr_jax.scenes.grammar import Clause
from dsr_jax.scenes.world import flip, pick

P_YES = 0.5
TAILS = ('', ' in the image', ' in the picture')


class Question(NamedTuple):
  text: str
  answer: str  # 'yes', 'no', a color, a texture or a number
  kind: str  # 'exists', 'relation', 'count', 'colour', 'texture', 'number', 'choice'


def exists_text(clause: Clause, rng: np.random.Generator) -> str:
  """'is there a red disc in the image?'"""
  return f'is there {grammar.noun_phrase(rng, clause, p_one=0)}{pick(rng, TAILS)}?'


def _partial(thing: world.Thing, rng) -> Clause:
  """A description of a thing by its shape and a random part of its look."""
  u = rng.random()
  colour = thing.colour if u < 0.65 else None
  texture = thing.texture if u < 0.15 or 0.65 <= u < 0.8 else None
  return Clause(thing.shape, 1, colour, texture)


def _exists(scene, rng) -> Question:
  thing = pick(rng, scene.things)
  clause = _partial(thing, rng)
  if flip(rng, P_YES):
    return Question(exists_text(clause, rng), 'yes', 'exists')
  while True:  # half of the absent things are near misses, half follow the usual looks
    if flip(rng, 0.5):
      fields = ['shape'] + [f for f in ('colour', 'texture') if getattr(clause, f) is not None]
      field = pick(rng, fields)
      size = {
        'shape': len(world.SHAPES),
        'colour': len(world.COLOURS),
        'texture': len(world.TEXTURES),
      }[field]
      absent = clause._replace(**{field: int(rng.random() * size)})
    else:
      shape = (
        world.COMPANION[thing.shape] if flip(rng, 0.5) else int(rng.random() * len(world.SHAPES))
      )
      colour, texture = world.random_look(rng, shape, skewed=True, held_out='exclude')
      absent = _partial(world.Thing(shape, colour, texture, 8, 0, 0), rng)
    if not any(grammar.matches(absent, t) for t in scene.things):
      return Question(exists_text(absent, rng), 'no', 'exists')


def _relation(scene, rng) -> Question | None:
  single = [t for t in scene.things if sum(u.shape == t.shape for u in scene.things) == 1]
  if len(single) < 2:
    return None
  a = pick(rng, single)
  b = pick(rng, [t for t in single if t is not a])
  true = grammar.true_relations(a, b)
  if flip(rng, P_YES) and true:
    name, answer = pick(rng, true), 'yes'
  else:
    name, answer = (
      pick(rng, [n for n in ('left', 'right', 'above', 'below') if n not in true]),
      'no',
    )

  def the(t):
    return grammar.noun_phrase(rng, Clause(t.shape), definite=True)

  return Question(f'is {the(a)} {pick(rng, grammar.RELATIONS[name])} {the(b)}?', answer, 'relation')


def _number(scene, rng) -> Question:
  shape = pick(rng, scene.things).shape
  count = sum(t.shape == shape for t in scene.things)
  noun = grammar.noun_phrase(rng, Clause(shape, 2)).split(' ', 1)[1]
  return Question(f'how many {noun} are there{pick(rng, TAILS)}?', grammar.NUMBERS[count], 'number')


def _count(scene, rng) -> Question:
  shape = pick(rng, scene.things).shape
  count = sum(t.shape == shape for t in scene.things)
  asked = count if flip(rng, P_YES) else pick(rng, [n for n in range(1, 5) if n != count])
  noun = grammar.noun_phrase(rng, Clause(shape, asked))
  noun = noun if asked > 1 else 'one ' + noun.split(' ', 1)[1]
  text = f'{"are" if asked > 1 else "is"} there {noun}{pick(rng, TAILS)}?'
  return Question(text, 'yes' if asked == count else 'no', 'count')


def _look(scene, rng, choice: bool) -> Question | None:
  single = [t for t in scene.things if sum(u.shape == t.shape for u in scene.things) == 1]
  if not single:
    return None
  thing = pick(rng, single)
  noun = grammar.noun_phrase(rng, Clause(thing.shape), definite=True)
  if not choice and flip(rng, 0.35):
    return Question(f'what texture is {noun}?', world.TEXTURES[thing.texture], 'texture')
  answer = world.COLOURS[thing.colour]
  if not choice:
    return Question(f'what color is {noun}?', answer, 'colour')
  others = [c for c in world.COLOURS if c != answer]
  options = [answer] + [others.pop(int(rng.random() * len(others))) for _ in range(3)]
  rng.shuffle(options)
  return Question(choice_text(f'what color is {noun}?', options), answer, 'choice')


def choice_text(question: str, options: list[str]) -> str:
  """'what color is the disc? red, blue, green or pink?'"""
  return f'{question} {", ".join(options[:-1])} or {options[-1]}?'


def random_question(scene: world.Scene, rng: np.random.Generator) -> Question:
  """A pretraining question, mostly yes/no."""
  while True:
    u = rng.random()
    if u < 0.4:
      question = _exists(scene, rng)
    elif u < 0.7:
      question = _relation(scene, rng)
    elif u < 0.76:
      question = _count(scene, rng)
    elif u < 0.82:
      question = _number(scene, rng)
    else:
      question = _look(scene, rng, choice=u > 0.91)
    if question is not None:
      return question


# Evaluation lists

TRACKS = ('random', 'popular', 'adversarial')


class Row(NamedTuple):
  """One question of a fixed list.

  picture: index of the list's scenes. tracks: the tracks of POPE that the row belongs to. group:
  rows that must all be right to count (rotations of a multiple-choice question, a HallusionBench
  set). question: number within the set.
  """

  picture: int
  text: str
  answer: str
  tracks: tuple[str, ...] = ()
  group: int = 0
  question: int = 0
  options: tuple[str, ...] = ()


def _frequency(shape: int, colour: int) -> float:
  """How often pretraining shows this look, relative to others of its shape."""
  return (world.P_USUAL_COLOUR if world.USUAL_COLOUR[shape] == colour else 0.0) + 1 / len(
    world.COLOURS
  )


def _company(shape: int, colour: int, things) -> float:
  """How often pretraining shows such a thing beside these."""
  return _frequency(shape, colour) * sum(
    (world.P_COMPANION if world.COMPANION[t.shape] == shape else 0.0) + 1 / len(world.SHAPES)
    for t in things
  )


def pope(scenes, rng: np.random.Generator) -> list[Row]:
  """POPE: per image, one present look (color and shape) and one absent look for each track: random,
  one of the eight most common in pretraining, or the one that most often accompanies the things in
  the image.
  """
  rows = []
  every = [(s, c) for s in range(len(world.SHAPES)) for c in range(len(world.COLOURS))]
  for i, scene in enumerate(scenes):
    thing = pick(rng, scene.things)
    rows.append(Row(i, exists_text(Clause(thing.shape, 1, thing.colour), rng), 'yes', TRACKS))
    present = {(t.shape, t.colour) for t in scene.things}
    absent = [every[j] for j in rng.permutation(len(every)) if every[j] not in present]
    popular = sorted(absent, key=lambda x: -_frequency(*x))[
      : 8 - sum(_frequency(*p) > 0.2 for p in present)
    ]
    chosen = (absent[0], popular[0], max(absent, key=lambda x: _company(*x, scene.things)))
    for track, (shape, colour) in zip(TRACKS, chosen):
      rows.append(Row(i, exists_text(Clause(shape, 1, colour), rng), 'no', (track,)))
  return rows


def multiple_choice(scenes, rng: np.random.Generator) -> list[Row]:
  """Asks for the color of a thing whose shape occurs once, with four options in all four rotations.
  Skips images without such a thing.
  """
  rows = []
  for i, scene in enumerate(scenes):
    if not _lone(scene):
      continue
    thing = scene.things[pick(rng, _lone(scene))]
    answer = world.COLOURS[thing.colour]
    others = [c for c in world.COLOURS if c != answer]
    options = [answer] + [others[j] for j in rng.permutation(len(others))[:3]]
    options = [options[j] for j in rng.permutation(4)]
    noun = grammar.noun_phrase(rng, Clause(thing.shape), definite=True)
    for turn in range(4):
      turned = options[turn:] + options[:turn]
      rows.append(
        Row(
          i, choice_text(f'what color is {noun}?', turned), answer, group=i, options=tuple(turned)
        )
      )
  return rows


def _lone(scene: world.Scene) -> list[int]:
  """Indices of things whose shape occurs once, so that editing one changes what is there."""
  return [
    i for i, t in enumerate(scene.things) if sum(u.shape == t.shape for u in scene.things) == 1
  ]


def can_edit(scene: world.Scene) -> bool:
  return bool(_lone(scene))


def edit(scene: world.Scene, rng: np.random.Generator) -> tuple[world.Scene, Clause, Clause]:
  """Changes one attribute of one thing: returns the new scene, a description that fits only the old
  thing, and one that fits only the new one.
  """
  while True:
    i = pick(rng, _lone(scene))
    old = scene.things[i]
    field = pick(rng, ('shape', 'colour', 'texture'))
    number = {
      'shape': len(world.SHAPES),
      'colour': len(world.COLOURS),
      'texture': len(world.TEXTURES),
    }[field]
    new = old._replace(
      **{field: (getattr(old, field) + 1 + int(rng.random() * (number - 1))) % number}
    )
    said = ('colour',) if field == 'shape' else (field,)
    before, after = (Clause(t.shape, 1, **{f: getattr(t, f) for f in said}) for t in (old, new))
    if not any(grammar.matches(after, t) for t in scene.things):
      return scene._replace(things=scene.things[:i] + (new,) + scene.things[i + 1 :]), before, after


def hallusion_pairs(scenes, rng: np.random.Generator) -> tuple[list[world.Scene], list[Row]]:
  """HallusionBench: each image and a version with one attribute changed (indices 2k and 2k + 1),
  and two questions about both.
  """
  pictures, rows = [], []
  for k, scene in enumerate(scenes):
    edited, before, after = edit(scene, rng)
    pictures += [scene, edited]
    for q, clause in enumerate((before, after)):
      text = exists_text(clause, rng)
      rows += [
        Row(2 * k + figure, text, 'yes' if figure == q else 'no', group=k, question=q)
        for figure in (0, 1)
      ]
  return pictures, rows
