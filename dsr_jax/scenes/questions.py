"""Questions about scenes with one-word answers: POPE's tracks, multiple choice and HallusionBench pairs."""

from typing import NamedTuple

import numpy as np

from dsr_jax.scenes import grammar
from dsr_jax.scenes import world
from dsr_jax.scenes.grammar import Clause
from dsr_jax.scenes.world import pick

P_YES = 0.5
TAILS = ('', ' in the image', ' in the picture')


class Question(NamedTuple):
  text: str
  answer: str  # 'yes', 'no', a colour, a texture or a number
  kind: str  # 'exists', 'relation', 'count', 'colour', 'texture', 'number', 'choice'


def matches(clause: Clause, thing: world.Thing) -> bool:
  """Whether one thing fits a description."""
  return clause.shape == thing.shape and all(
      said is None or said == true
      for said, true in zip(clause[2:], (thing.colour, thing.texture, thing.size)))


def exists_text(clause: Clause, rng: np.random.Generator) -> str:
  """'is there a red disc in the image?'"""
  return f'is there {grammar.noun_phrase(rng, clause, p_one=0)}{pick(rng, TAILS)}?'


def _partial(thing: world.Thing, rng) -> Clause:
  """A description that names one or two attributes at most."""
  u = rng.random()
  colour = thing.colour if u < 0.65 else None
  texture = thing.texture if u < 0.15 or 0.65 <= u < 0.8 else None
  return Clause(thing.shape, 1, colour, texture)


def _exists(scene, rng) -> Question:
  thing = pick(rng, scene.things)
  clause = _partial(thing, rng)
  if rng.random() < P_YES:
    return Question(exists_text(clause, rng), 'yes', 'exists')
  while True:  # half of the absent things are near misses, half are drawn by habit
    if rng.random() < 0.5:
      fields = ['shape'] + [f for f in ('colour', 'texture') if getattr(clause, f) is not None]
      field = pick(rng, fields)
      size = {'shape': len(world.SHAPES), 'colour': len(world.COLOURS), 'texture': len(world.TEXTURES)}[field]
      absent = clause._replace(**{field: int(rng.random() * size)})
    else:
      shape = world.COMPANION[thing.shape] if rng.random() < 0.5 else int(rng.random() * len(world.SHAPES))
      colour, texture = world.random_look(rng, shape, skewed=True, held_out='exclude')
      absent = _partial(world.Thing(shape, colour, texture, 8, 0, 0), rng)
    if not any(matches(absent, t) for t in scene.things):
      return Question(exists_text(absent, rng), 'no', 'exists')


def _relation(scene, rng) -> Question | None:
  single = [t for t in scene.things if sum(u.shape == t.shape for u in scene.things) == 1]
  if len(single) < 2:
    return None
  a = pick(rng, single)
  b = pick(rng, [t for t in single if t is not a])
  true = grammar.true_relations(a, b)
  if rng.random() < P_YES and true:
    name, answer = pick(rng, true), 'yes'
  else:
    name, answer = pick(rng, [n for n in ('left', 'right', 'above', 'below') if n not in true]), 'no'
  the = lambda t: grammar.noun_phrase(rng, Clause(t.shape), definite=True)
  return Question(f'is {the(a)} {pick(rng, grammar.RELATIONS[name])} {the(b)}?', answer, 'relation')


def _number(scene, rng) -> Question:
  shape = pick(rng, scene.things).shape
  count = sum(t.shape == shape for t in scene.things)
  noun = grammar.noun_phrase(rng, Clause(shape, 2)).split(' ', 1)[1]
  return Question(f'how many {noun} are there{pick(rng, TAILS)}?', grammar.NUMBERS[count], 'number')


def _count(scene, rng) -> Question:
  shape = pick(rng, scene.things).shape
  count = sum(t.shape == shape for t in scene.things)
  asked = count if rng.random() < P_YES else pick(rng, [n for n in range(1, 5) if n != count])
  noun = grammar.noun_phrase(rng, Clause(shape, asked))
  noun = noun if asked > 1 else 'one ' + noun.split(' ', 1)[1]
  return Question(f'{"are" if asked > 1 else "is"} there {noun}{pick(rng, TAILS)}?', 'yes' if asked == count else 'no', 'count')


def _look(scene, rng, choice: bool) -> Question | None:
  single = [t for t in scene.things if sum(u.shape == t.shape for u in scene.things) == 1]
  if not single:
    return None
  thing = pick(rng, single)
  noun = grammar.noun_phrase(rng, Clause(thing.shape), definite=True)
  if not choice and rng.random() < 0.35:
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
  """A question of pretraining: mostly yes/no."""
  while True:
    u = rng.random()
    if u < 0.55:
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
