"""Texts about scenes: captions for pretraining, prompts in the style of GenEval's and
T2I-CompBench's tasks, and their atoms.

A text is made in two steps. A *plan* (`Atoms`) determines which things it names, with which
attributes, counts and relations; then `realise` puts the plan into words. Plans omit much (some
adjectives, some things), and words vary (synonyms, several phrasings per relation, either order,
one to three sentences), so a text describes its image only in part. Pretraining captions are also
noisy: about 10% of them have one wrong atom.
"""

import re
from typing import NamedTuple

import numpy as np

from dsr_jax.scenes import world
from dsr_jax.scenes.world import flip, pick

QUESTION_DESCRIBE = 'Describe the image.'
QUESTIONS_DESCRIBE = (
  QUESTION_DESCRIBE,
  'Describe this image in detail.',
  'What is in the picture?',
  'What does the image show?',
)

NOUNS = (
  ('square', 'box'),
  ('diamond',),
  ('disc', 'circle'),
  ('ring', 'hoop'),
  ('triangle',),
  ('cross',),
  ('heart',),
  ('hourglass',),
)
PLURALS = {'box': 'boxes', 'cross': 'crosses', 'hourglass': 'hourglasses'}  # others add an s
COLOUR_WORDS = (
  ('red',),
  ('orange',),
  ('yellow',),
  ('green',),
  ('blue',),
  ('purple', 'violet'),
  ('pink',),
  ('brown',),
)
TEXTURE_WORDS = (('plain', 'solid'), ('striped', 'banded'), ('dotted', 'spotted'))
TEXTURE_NOUNS = {1: 'stripes', 2: 'dots'}
SIZE_WORDS = {8: ('small', 'little'), 12: ('large', 'big')}
NUMBERS = ('zero', 'one', 'two', 'three', 'four')
RELATIONS = {
  'left': ('left of', 'to the left of', 'on the left of'),
  'right': ('right of', 'to the right of', 'on the right of'),
  'above': ('above', 'over'),
  'below': ('below', 'under'),
  'next': ('next to', 'beside', 'near'),
}
INVERSE = {'left': 'right', 'right': 'left', 'above': 'below', 'below': 'above', 'next': 'next'}
OPENERS = ('a photo of', 'a picture of', 'an image of', 'the image shows', 'there is')
GENEVAL = ('single_object', 'two_object', 'counting', 'colors', 'position', 'color_attr')
T2I_COMPBENCH = ('color', 'shape', 'texture', 'spatial', 'numeracy', 'complex')
CATEGORIES = GENEVAL + T2I_COMPBENCH
COUNTED = ('counting', 'numeracy')  # tasks in which an extra thing is an error

P_FIRST_SYNONYM = 0.7
P_COLOUR, P_TEXTURE, P_PLAIN, P_SIZE = (
  0.85,
  0.65,
  0.35,
  0.3,
)  # to keep an adjective; 'plain' is rarely said
P_RELATION, P_PARTIAL, P_WRONG = 0.55, 0.15, 0.1
NEXT_GAP = 4  # pixels between the boxes of neighbours


class Clause(NamedTuple):
  """`count` things of a shape; unstated attributes are None."""

  shape: int
  count: int = 1
  colour: int | None = None
  texture: int | None = None
  size: int | None = None


class Relation(NamedTuple):
  """Clause `subject` has the relation `name` to clause `target` (indices of clauses)."""

  subject: int
  name: str
  target: int


class Atoms(NamedTuple):
  clauses: tuple[Clause, ...]
  relations: tuple[Relation, ...] = ()


class Prompt(NamedTuple):
  text: str
  atoms: Atoms
  category: str


def matches(clause: Clause, thing: world.Thing) -> bool:
  """Whether one thing fits a description."""
  return clause.shape == thing.shape and all(
    said is None or said == true
    for said, true in zip(clause[2:], (thing.colour, thing.texture, thing.size))
  )


def relation_holds(name: str, a: world.Thing, b: world.Thing) -> bool:
  """GenEval's rule for the boxes of two things; 'next' allows at most one free cell between the
  boxes.
  """
  top_a, left_a, bottom_a, right_a = a.box
  top_b, left_b, bottom_b, right_b = b.box
  if name == 'next':
    return (
      max(left_a, left_b) - min(right_a, right_b) <= NEXT_GAP
      and max(top_a, top_b) - min(bottom_a, bottom_b) <= NEXT_GAP
    )
  dx, dy = (left_a + right_a - left_b - right_b) / 2, (top_a + bottom_a - top_b - bottom_b) / 2
  slack = 0.1 * (a.size + b.size)
  x, y = np.copysign(max(abs(dx) - slack, 0), dx), np.copysign(max(abs(dy) - slack, 0), dy)
  if abs(x) < 1e-3 and abs(y) < 1e-3:
    return False
  norm = (dx * dx + dy * dy) ** 0.5
  return {
    'left': x < -0.5 * norm,
    'right': x > 0.5 * norm,
    'above': y < -0.5 * norm,
    'below': y > 0.5 * norm,
  }[name]


def true_relations(a: world.Thing, b: world.Thing) -> list[str]:
  return [name for name in RELATIONS if relation_holds(name, a, b)]


def tokens(text: str) -> list[str]:
  """Words and punctuation marks."""
  return re.findall(r'[a-z]+|[.,?]', text.lower())


# Plans


def describe(rng, things: list[world.Thing]) -> Clause:
  """A clause for things of one shape, with some of the attributes that they share."""
  t = things[0]

  def shared(field):
    return all(getattr(x, field) == getattr(t, field) for x in things)

  colour = t.colour if shared('colour') and flip(rng, P_COLOUR) else None
  p = P_TEXTURE if t.texture else P_PLAIN
  texture = t.texture if shared('texture') and flip(rng, p) else None
  size = t.size if len(things) == 1 and flip(rng, P_SIZE) else None
  return Clause(t.shape, len(things), colour, texture, size)


def _groups(scene: world.Scene) -> list[list[world.Thing]]:
  """Groups things of one shape if they share a color or are at least three; others stay single."""
  by_shape = {}
  for thing in scene.things:
    by_shape.setdefault(thing.shape, []).append(thing)
  groups = []
  for things in by_shape.values():
    alike = all(t.colour == things[0].colour for t in things)
    groups.extend([things] if alike or len(things) > 2 else [[t] for t in things])
  return groups


def relate(rng, groups) -> tuple[Relation, ...]:
  """One true relation between two single things, or none."""
  single = [i for i, g in enumerate(groups) if len(g) == 1]
  if len(single) < 2 or not flip(rng, P_RELATION):
    return ()
  a = pick(rng, single)
  b = pick(rng, [i for i in single if i != a])
  names = true_relations(groups[a][0], groups[b][0])
  return (Relation(a, pick(rng, names), b),) if names else ()


def told_groups(scene: world.Scene, rng: np.random.Generator) -> list[list[world.Thing]]:
  """The groups of things that a text names, in its order."""
  groups = _groups(scene)
  if flip(rng, 0.5):
    groups = groups[::-1]
  if len(groups) > 1 and flip(rng, P_PARTIAL):
    groups.remove(pick(rng, groups))
  return groups


def plan_caption(scene: world.Scene, rng: np.random.Generator) -> Atoms:
  """A true, partial description of a scene."""
  groups = told_groups(scene, rng)
  return Atoms(tuple(describe(rng, g) for g in groups), relate(rng, groups))


def corrupt(atoms: Atoms, rng: np.random.Generator) -> Atoms:
  """Makes one atom wrong: half of the time the shape's usual look if it differs, else at random."""
  i = pick(rng, range(len(atoms.clauses)))
  clause = atoms.clauses[i]
  options = ['shape'] + [f for f in ('colour', 'texture', 'size') if getattr(clause, f) is not None]
  if clause.count > 1:
    options.append('count')
  if atoms.relations:
    options.append('relation')
  field = pick(rng, options)
  if field == 'relation':
    r = atoms.relations[0]
    wrong = pick(rng, [n for n in ('left', 'right', 'above', 'below') if n != r.name])
    return atoms._replace(relations=(r._replace(name=wrong),))
  usual = {
    'colour': world.USUAL_COLOUR[clause.shape],
    'texture': world.USUAL_TEXTURE[clause.shape],
  }.get(field)
  values = {
    'shape': range(len(world.SHAPES)),
    'colour': range(len(world.COLOURS)),
    'size': world.SIZES,
    'texture': range(len(world.TEXTURES)),
    'count': range(2, world.MAX_THINGS + 1),
  }[field]
  now = getattr(clause, field)
  if usual is not None and usual != now and flip(rng, 0.5):
    wrong = usual
  else:
    wrong = pick(rng, [v for v in values if v != now])
  clauses = atoms.clauses[:i] + (clause._replace(**{field: wrong}),) + atoms.clauses[i + 1 :]
  return atoms._replace(clauses=clauses)


# Words


def _word(rng, words) -> str:
  if not isinstance(rng, np.random.Generator):  # `entropy` skips words that are not in its text
    return rng.word(words, (P_FIRST_SYNONYM, 1 - P_FIRST_SYNONYM))
  return words[0] if len(words) == 1 or flip(rng, P_FIRST_SYNONYM) else pick(rng, words[1:])


def _plural(noun: str) -> str:
  return PLURALS.get(noun, noun + 's')


def _adjectives(rng, clause: Clause, texture: bool = True) -> list[str]:
  words = [_word(rng, SIZE_WORDS[clause.size])] if clause.size is not None else []
  if texture and clause.texture is not None:
    words.append(_word(rng, TEXTURE_WORDS[clause.texture]))
  if clause.colour is not None:
    words.append(_word(rng, COLOUR_WORDS[clause.colour]))
  return words


def article(words: str) -> str:
  return ('an ' if words[0] in 'aeio' or words.startswith('hour') else 'a ') + words


def noun_phrase(rng, clause: Clause, definite: bool = False, p_one: float = 0.08) -> str:
  """'a small striped red disc', 'two red discs with dots', 'the disc'."""
  after = clause.texture in TEXTURE_NOUNS and flip(rng, 0.2)
  noun = _word(rng, NOUNS[clause.shape])
  words = ' '.join(
    _adjectives(rng, clause, not after) + [noun if clause.count == 1 else _plural(noun)]
  )
  if definite:
    words = 'the ' + words
  elif clause.count > 1:
    words = f'{NUMBERS[clause.count]} {words}'
  else:
    words = 'one ' + words if flip(rng, p_one) else article(words)
  return f'{words} with {TEXTURE_NOUNS[clause.texture]}' if after else words


def _open(rng, text: str, plural: bool, p_bare: float = 0.5) -> str:
  if flip(rng, p_bare):
    return text
  opener = pick(rng, OPENERS)
  return f'{"there are" if plural and opener == "there is" else opener} {text}'


def _list(phrases: list[str]) -> str:
  return phrases[0] if len(phrases) == 1 else ', '.join(phrases[:-1]) + ' and ' + phrases[-1]


def _bare(clause: Clause) -> Clause:
  return Clause(clause.shape, clause.count)


def _attribute_sentence(rng, clause: Clause, pronoun: bool) -> str:
  """'it is small and red': the attributes that the first sentence omitted."""
  words = _adjectives(rng, clause)
  subject = (
    ('it' if clause.count == 1 else 'they')
    if pronoun
    else noun_phrase(rng, _bare(clause), definite=True)
  )
  return f'{subject} {"is" if clause.count == 1 else "are"} {_list(words)}'


def _sentences(rng, atoms: Atoms) -> list[str]:
  clauses = atoms.clauses
  distinct = len({c.shape for c in clauses}) == len(clauses)
  if atoms.relations:
    r = atoms.relations[0]
    a, b, name = clauses[r.subject], clauses[r.target], r.name
    if flip(rng, 0.3):
      a, b, name = b, a, INVERSE[name]
    rest = [c for i, c in enumerate(clauses) if i not in (r.subject, r.target)]
    rel = pick(rng, RELATIONS[name])
    if distinct and flip(rng, 0.3):
      first = _open(rng, _list([noun_phrase(rng, c) for c in clauses]), clauses[0].count > 1)
      the_a, the_b = (
        noun_phrase(rng, _bare(a), definite=True),
        noun_phrase(rng, _bare(b), definite=True),
      )
      return [first, f'{the_a} is {rel} {the_b}']
    verb = ' is' if flip(rng, 0.4) else ''
    text = f'{noun_phrase(rng, a)}{verb} {rel} {noun_phrase(rng, b)}'
    text = text if verb else _open(rng, text, False)
    if not rest:
      return [text]
    return [
      text,
      ('there are ' if rest[0].count > 1 else 'there is ')
      + _list([noun_phrase(rng, c) for c in rest]),
    ]
  spoken = [c for c in clauses if c[2:] != (None, None, None)]
  if distinct and spoken and flip(rng, 0.15):
    later = pick(rng, spoken)
    first = _list([noun_phrase(rng, _bare(c) if c is later else c) for c in clauses])
    return [
      _open(rng, first, clauses[0].count > 1),
      _attribute_sentence(rng, later, len(clauses) == 1),
    ]
  return [_open(rng, _list([noun_phrase(rng, c) for c in clauses]), clauses[0].count > 1)]


def realise(atoms: Atoms, rng: np.random.Generator) -> str:
  """Puts a plan into words."""
  sentences = _sentences(rng, atoms)
  if len(sentences) == 1 and flip(rng, 0.6):
    return sentences[0]
  return ' '.join(s + '.' for s in sentences)


def caption(scene: world.Scene, rng: np.random.Generator) -> str:
  """A caption without errors."""
  return realise(plan_caption(scene, rng), rng)


def pretraining_caption(scene: world.Scene, rng: np.random.Generator) -> str:
  """A caption like those that people write: partial, and with one wrong atom in about 10%."""
  atoms = plan_caption(scene, rng)
  if flip(rng, P_WRONG):
    atoms = corrupt(atoms, rng)
  return realise(atoms, rng)


# Prompts of the benchmarks' tasks

_KIND = {
  'single_object': 'one',
  'colors': 'one',
  'counting': 'group',
  'numeracy': 'mixed',
  'complex': None,
}


def prompt_scene(
  rng: np.random.Generator, category: str, *, held_out: str = 'include'
) -> world.Scene:
  """A uniformly drawn scene that a prompt of this category can describe."""
  kind = _KIND.get(category, 'two')
  if category == 'complex':
    kind = 'two' if flip(rng, 0.7) else 'mixed'
  while True:
    scene = world.random_scene(rng, skewed=False, held_out=held_out, kind=kind)
    if suits(scene, category):
      return scene


def suits(scene: world.Scene, category: str) -> bool:
  """Whether a prompt of this category can describe the scene."""
  things = scene.things
  if category == 'counting':
    return len({t[1:3] for t in things}) == 1
  if category == 'numeracy':
    return len({t.shape for t in things}) < len(things)
  if category in ('single_object', 'colors', 'complex') and len(things) != 2:
    return True
  field = {'color': 'colour', 'color_attr': 'colour', 'texture': 'texture', 'shape': 'size'}.get(
    category
  )
  if field and getattr(things[0], field) == getattr(things[1], field):
    return False
  names = true_relations(*things)
  return any(n != 'next' for n in names) if category == 'position' else bool(names)


def _prompt_clauses(scene: world.Scene, fields: tuple[str, ...]) -> tuple[Clause, ...]:
  groups = {}
  for t in scene.things:
    groups.setdefault(t.shape, []).append(t)
  clauses = []
  for things in groups.values():
    said = {f: getattr(things[0], f) for f in fields if len({getattr(t, f) for t in things}) == 1}
    clauses.append(Clause(things[0].shape, len(things), **said))
  return tuple(clauses)


_FIELDS = {
  'colors': ('colour',),
  'color_attr': ('colour',),
  'color': ('colour',),
  'shape': ('size',),
  'texture': ('texture',),
}


def prompt_of(scene: world.Scene, category: str, rng: np.random.Generator) -> Prompt:
  """A prompt for a scene in the style of a category; GenEval's begin with 'a photo of'."""
  if category == 'complex':
    fields = ('colour', 'texture', 'size') if flip(rng, 0.3) else ('colour', 'texture')
  else:
    fields = _FIELDS.get(category, ())
  clauses = _prompt_clauses(scene, fields)
  relations = ()
  single = [i for i, c in enumerate(clauses) if c.count == 1]
  if category in ('position', 'spatial') or (category == 'complex' and len(single) >= 2):
    by_shape = {t.shape: t for t in scene.things}
    a, b = by_shape[clauses[single[0]].shape], by_shape[clauses[single[1]].shape]
    names = [n for n in true_relations(a, b) if category != 'position' or n != 'next']
    if names:
      relations = (Relation(single[0], pick(rng, names), single[1]),)
  atoms = Atoms(clauses, relations)
  if category in GENEVAL:
    phrases = [noun_phrase(rng, c, p_one=0) for c in clauses]
    link = f' {pick(rng, RELATIONS[relations[0].name])} ' if relations else ' and '
    return Prompt('a photo of ' + link.join(phrases), atoms, category)
  return Prompt(realise(atoms, rng), atoms, category)


def prompt(rng: np.random.Generator, category: str, *, held_out: str = 'include') -> Prompt:
  """A prompt of a category, for a new uniformly drawn scene."""
  return prompt_of(prompt_scene(rng, category, held_out=held_out), category, rng)
