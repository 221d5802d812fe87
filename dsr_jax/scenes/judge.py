"""The judge of Scenes: pixels -> scene graph, texts -> atoms, and the rules that compare them.
Nothing is learned.

An image is cut into the 8 x 8 cells of the lattice. Cells that differ from the ground form
connected components. A component whose box is 2 x 2 or 3 x 3 cells is compared with every rendered
sprite of that size; it is a thing only if one sprite fits well in every cell and clearly better
than any other. Everything else on the ground is a blob, which counts as unreadable.
Axes: B images, N components of one size, K looks (shape x color x texture).
"""

from collections.abc import Sequence
import re
from typing import NamedTuple

import numpy as np
from scipy import ndimage, optimize

from dsr_jax.errors import InputError
from dsr_jax.scenes import grammar, render, world
from dsr_jax.scenes.grammar import Atoms, Clause, Relation, matches

# Root mean square differences of RGB levels (0-255). After an image tokenizer like the embedded
# model's, 99.5% of the true sprites fit within 21-26, their worst cells within 28-36, and empty
# cells are within 11-13 of the ground.
GROUND_LIMIT = 26.0  # a cell farther than this from the ground is not empty
FIT_LIMIT = 30.0  # of the whole sprite
CELL_LIMIT = 46.0  # of its worst cell
CONTRAST_LIMIT = 0.32  # of the sprite, relative to its distance from the ground (true: below 0.29)
# How much closer the best look must be than any other, on the line between the two: 1 is on the
# sprite, 0 midway. Plain distances do not work: yellow and orange stripes on a thin cross are 18
# levels apart, other looks 100.
MARGIN = 0.08
PEBBLE_LIMIT = 40.0
MIN_GROUND = 24  # cells; with less visible ground, the image is not of this world


class Reading(NamedTuple):
  """What the judge sees. `blobs` is the number of components that are neither a thing nor a pebble;
  `scene` is None if the whole image is unreadable (hardly any ground).
  """

  scene: world.Scene | None
  blobs: int = 0

  @property
  def things(self) -> tuple[world.Thing, ...]:
    return self.scene.things if self.scene else ()

  @property
  def clean(self) -> bool:
    return self.scene is not None and not self.blobs and bool(self.scene.things)


# Pixels -> scene


def _look_tables():
  """Looks (K, 3) as shape, color, texture; and by size, sprites (ground, K, cells, 48)."""
  looks = np.array(
    [
      (s, c, t)
      for s in range(len(world.SHAPES))
      for c in range(len(world.COLOURS))
      for t in range(len(world.TEXTURES))
    ]
  )
  sprites = {}
  for size in world.SIZES:
    n = size // world.CELL
    grounds = []
    for ground in range(len(world.GROUNDS)):
      stack = np.stack([render.SPRITES[ground, s, c, t, size] for s, c, t in looks]).astype(
        np.float32
      )
      cells = stack.reshape(len(looks), n, world.CELL, n, world.CELL, 3).swapaxes(2, 3)
      grounds.append(cells.reshape(len(looks), n * n, 48))
    sprites[size] = np.stack(grounds)
  return looks, sprites


def _between(sprites: np.ndarray) -> np.ndarray:
  """Squared distances between all sprites (ground, K, cells, 48): (ground, K, K), 1 on the
  diagonal.
  """
  flat = sprites.reshape(*sprites.shape[:2], -1)
  norm = (flat**2).sum(-1)
  squares = norm[:, :, None] + norm[:, None] - 2 * flat @ flat.swapaxes(1, 2)
  return np.where(np.eye(flat.shape[1], dtype=bool), 1, squares)


_LOOKS, _SPRITES = _look_tables()
_BARE = np.tile(render.GROUND_RGB, 16)[:, None, None].astype(np.float32)
_CONTRAST = {
  size: np.sqrt(((sprites - _BARE) ** 2).mean((2, 3))) for size, sprites in _SPRITES.items()
}  # (ground, K)
_BETWEEN = {size: _between(sprites) for size, sprites in _SPRITES.items()}
_PEBBLES = render.PEBBLES.reshape(len(world.GROUNDS), 48).astype(np.float32)
_IN_PLANE = np.zeros((3, 3, 3), bool)
_IN_PLANE[1] = True  # cells touch only their eight neighbors in the same image


def _rms(squares: np.ndarray, count: int) -> np.ndarray:
  return np.sqrt(np.maximum(squares, 0) / count)


def _find_ground(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """cells (B, 64, 48) -> the index of the ground (B,) and which cells are empty (B, 64)."""
  grounds = np.tile(render.GROUND_RGB, 16).astype(np.float32)  # (grounds, 48)
  distance = np.stack(
    [_rms(((cells - g) ** 2).sum(-1), 48) for g in grounds], 1
  )  # (B, grounds, 64)
  near = np.where(distance < 2 * GROUND_LIMIT, distance, 2 * GROUND_LIMIT)
  ground = near.sum(-1).argmin(-1)
  return ground, np.take_along_axis(distance, ground[:, None, None], 1)[:, 0] < GROUND_LIMIT


def _match(cells: np.ndarray, grounds: np.ndarray, size: int) -> list[np.ndarray | None]:
  """The look of each component, or None. cells: (N, cells of a sprite, 48)."""
  looks = [None] * len(cells)
  for ground in range(len(world.GROUNDS)):
    of_ground = np.flatnonzero(grounds == ground)
    if not len(of_ground):
      continue
    x, sprites = cells[of_ground], _SPRITES[size][ground]
    dot = np.einsum('ncp,kcp->nkc', x, sprites, optimize=True)
    squares = (x**2).sum(-1)[:, None] - 2 * dot + (sprites**2).sum(-1)[None]  # (N, K, cells)
    total = squares.sum(-1)
    best = total.argmin(1)
    at_best = np.arange(len(x)), best
    lead = (total - total[at_best][:, None]) / _BETWEEN[size][ground][best]
    lead[at_best] = np.inf
    fit = _rms(total[at_best], 48 * x.shape[1])
    worst_cell = _rms(squares[at_best].max(-1), 48)
    limit = np.minimum(FIT_LIMIT, CONTRAST_LIMIT * _CONTRAST[size][ground][best])
    sure = (fit < limit) & (worst_cell < CELL_LIMIT) & (lead.min(1) > MARGIN)
    for i, look, good in zip(of_ground, best, sure):
      looks[i] = _LOOKS[look] if good else None
  return looks


def read(pixels: np.ndarray) -> list[Reading]:
  """Reads images.

  Args:
    pixels: (B, 32, 32, 3) uint8, or one image without B.

  Returns: a list of B Readings, with things in the order of their upper left cells.
  """
  pixels = np.asarray(pixels)
  if pixels.ndim == 3:
    pixels = pixels[None]
  if pixels.shape[1:] != (world.IMAGE_SIZE, world.IMAGE_SIZE, 3) or pixels.dtype != np.uint8:
    raise InputError(
      f'the judge of Scenes got images of shape {pixels.shape} and type {pixels.dtype}; resize '
      'them to 32 x 32 RGB, (B, 32, 32, 3) uint8'
    )
  cells = render.patches(pixels).astype(np.float32)
  ground, empty = _find_ground(cells)
  full = ~empty.reshape(-1, world.GRID, world.GRID)
  full[empty.sum(-1) < MIN_GROUND] = False
  labels, _ = ndimage.label(full, _IN_PLANE)
  boxes = ndimage.find_objects(labels)  # sorted by image, then by row
  grid = cells.reshape(-1, world.GRID, world.GRID, 48)
  things = [[] for _ in pixels]
  pebbles = [[] for _ in pixels]
  blobs = np.zeros(len(pixels), int)
  by_size = {size: [] for size in world.SIZES}
  for picture, rows, cols in boxes:
    b, row, col = picture.start, rows.start, cols.start
    height, width = rows.stop - row, cols.stop - col
    size = height * world.CELL
    if height == width and size in by_size:
      by_size[size].append((b, row, col, grid[b, rows, cols].reshape(-1, 48)))
    elif (
      height == width == 1
      and _rms(((grid[b, row, col] - _PEBBLES[ground[b]]) ** 2).sum(), 48) < PEBBLE_LIMIT
    ):
      pebbles[b].append((row, col))
    else:
      blobs[b] += 1
  for size, found in by_size.items():
    if not found:
      continue
    at = [f[0] for f in found]
    for (b, row, col, _), look in zip(
      found, _match(np.stack([f[3] for f in found]), ground[at], size)
    ):
      if look is None:
        blobs[b] += 1
      else:
        things[b].append(world.Thing(*map(int, look), size, row, col))
  readable = empty.sum(-1) >= MIN_GROUND
  return [
    Reading(world.Scene(tuple(sorted(t, key=lambda x: (x.row, x.col))), int(g), tuple(p)), int(n))
    if ok
    else Reading(None, 1)
    for t, g, p, n, ok in zip(things, ground, pebbles, blobs, readable)
  ]


# Rules: compare a reading with the atoms of a prompt


def _relation_found(relation: Relation, clauses, things, loose: bool = False) -> bool:
  """Whether two things that fit the clauses have the relation. loose: compares only shapes, so that
  a wrong color counts only once.
  """
  if loose:
    clauses = [Clause(c.shape) for c in clauses]
  return any(
    grammar.relation_holds(relation.name, a, b)
    for a in things
    if matches(clauses[relation.subject], a)
    for b in things
    if b is not a and matches(clauses[relation.target], b)
  )


def geneval(atoms: Atoms, reading: Reading, counted: bool) -> bool:
  """GenEval's rule: every clause is there and every relation holds; extra things, including blobs,
  matter only in counting tasks.

  Detections have no scores here, so GenEval's best detections of a class become any things that
  fit.
  """
  things, mentions = reading.things, expand(atoms)
  if len(things) < len(mentions):
    return False
  fits = np.array([[matches(m, t) for t in things] for m in mentions])
  if fits[optimize.linear_sum_assignment(~fits)].sum() < len(
    mentions
  ):  # no thing may serve two mentions
    return False
  if counted and (
    reading.blobs
    or any(
      sum(t.shape == c.shape for t in things) != _wanted(atoms, c.shape) for c in atoms.clauses
    )
  ):
    return False
  return all(_relation_found(r, atoms.clauses, things) for r in atoms.relations)


def _wanted(atoms: Atoms, shape: int) -> int:
  return sum(c.count for c in atoms.clauses if c.shape == shape)


def strict(atoms: Atoms, reading: Reading) -> bool:
  """Whether everything that was asked for is there, and nothing else, not even a blob."""
  things, mentions = reading.things, expand(atoms)
  if not reading.clean or len(things) != len(mentions) or not geneval(atoms, reading, True):
    return False
  right, _ = assign(mentions, things)
  return right == sum(map(stated, mentions))


def graded(atoms: Atoms, reading: Reading) -> float:
  """Share of the atoms (shape and each attribute of every mention, each relation) that the image
  shows.
  """
  mentions = expand(atoms)
  right, _ = assign(mentions, reading.things)
  total = sum(map(stated, mentions)) + len(atoms.relations)
  return (
    right + sum(_relation_found(r, atoms.clauses, reading.things, True) for r in atoms.relations)
  ) / total


def verdict(prompt: grammar.Prompt, reading: Reading) -> dict[str, float | bool]:
  """All three rules for a prompt: {'geneval': bool, 'strict': bool, 'graded': float}."""
  return {
    'geneval': geneval(prompt.atoms, reading, prompt.category in grammar.COUNTED),
    'strict': strict(prompt.atoms, reading),
    'graded': graded(prompt.atoms, reading),
  }


def reasons(prompt: grammar.Prompt, reading: Reading) -> tuple[str, ...]:
  """Which of GenEval's rules an image fails, one clause each; none if `geneval` holds."""
  atoms, things = prompt.atoms, reading.things
  counted = prompt.category in grammar.COUNTED
  if geneval(atoms, reading, counted):
    return ()
  if reading.scene is None:
    return ('hardly any ground: not an image of Scenes',)
  found = [words for clause in atoms.clauses if (words := _missing(clause, things))]
  if counted:
    found += [words for clause in atoms.clauses if (words := _surplus(atoms, clause, things))]
    if reading.blobs:
      found.append(f'unreadable objects count as extra ones ({reading.blobs})')
  # A relation cannot hold without its things, which are already reported.
  if not found:
    found += [
      _relation_missed(r, atoms.clauses, things)
      for r in atoms.relations
      if not _relation_found(r, atoms.clauses, things)
    ]
  return tuple(found) or ('one object would have to count as two of the requested ones',)


def _missing(clause: Clause, things) -> str:
  """The reason if fewer things fit a clause than it asks for; else ''."""
  if sum(matches(clause, t) for t in things) >= clause.count:
    return ''
  same = [t for t in things if t.shape == clause.shape]
  noun = world.SHAPES[clause.shape]
  if not same:
    return f'no {noun}'
  if len(same) < clause.count:
    return f'{noun}: {clause.count} requested, {len(same)} drawn'
  asked = ' '.join(_said_of(clause))
  return f'no {asked} {noun}: it is {" and ".join(_as_said(clause, t) for t in same)}'


def _surplus(atoms: Atoms, clause: Clause, things) -> str:
  """The reason if there are more things of a shape than a counting prompt asks for; else ''."""
  number, wanted = sum(t.shape == clause.shape for t in things), _wanted(atoms, clause.shape)
  if number <= wanted:
    return ''
  return f'{world.SHAPES[clause.shape]}: {wanted} requested, {number} drawn'


def _said_of(clause: Clause) -> list[str]:
  """The adjectives of a clause."""
  words = [grammar.SIZE_WORDS[clause.size][0]] if clause.size is not None else []
  words += [world.TEXTURES[clause.texture]] if clause.texture is not None else []
  return words + ([world.COLOURS[clause.colour]] if clause.colour is not None else [])


def _as_said(clause: Clause, thing: world.Thing) -> str:
  """A thing in terms of the attributes that a clause states."""
  return ' '.join(
    _said_of(
      Clause(
        thing.shape,
        colour=None if clause.colour is None else thing.colour,
        texture=None if clause.texture is None else thing.texture,
        size=None if clause.size is None else thing.size,
      )
    )
  )


def _relation_missed(relation: Relation, clauses, things) -> str:
  """How the first two things that fit the clauses are placed, and what the rule asks for."""
  subject, target = clauses[relation.subject], clauses[relation.target]
  a = next(t for t in things if matches(subject, t))
  b = next((t for t in things if matches(target, t) and t is not a), None)
  phrase = grammar.RELATIONS[relation.name][0]
  names = world.SHAPES[subject.shape], world.SHAPES[target.shape]
  if b is None:
    return f'one {names[0]} cannot be {phrase} itself'
  (top_a, left_a, bottom_a, right_a), (top_b, left_b, bottom_b, right_b) = a.box, b.box
  said = f'the {names[0]} is not {phrase} the {names[1]}'
  if relation.name == 'next':
    gap = max(
      max(left_a, left_b) - min(right_a, right_b), max(top_a, top_b) - min(bottom_a, bottom_b)
    )
    return f'{said}: {gap} pixels apart, but at most {grammar.NEXT_GAP} count as next to'
  across, down = (
    (left_a + right_a - left_b - right_b) / 2,
    (top_a + bottom_a - top_b - bottom_b) / 2,
  )
  where = [
    f'{abs(size):g} pixels {words[size > 0]}'
    for size, words in ((across, ('left', 'right')), (down, ('above', 'below')))
    if size
  ]
  slack = 0.1 * (a.size + b.size)
  return (
    f'{said}: it is {" and ".join(where) or "in the same place"}; the rule requires that the '
    f'offset in that direction, minus {slack:g} pixels, exceeds half of the distance'
  )


def expand(atoms: Atoms) -> list[Clause]:
  """One clause of count 1 for every thing that is mentioned."""
  return [c._replace(count=1) for c in atoms.clauses for _ in range(c.count)]


def stated(clause: Clause) -> int:
  """Number of attributes that a mention states, including its shape."""
  return 1 + sum(v is not None for v in clause[2:])


def assign(
  mentions: Sequence[Clause], things: Sequence[world.Thing]
) -> tuple[int, list[tuple[int, int]]]:
  """Pairs mentions with things of their shape so that the most attributes are right; returns that
  number and the pairs.
  """
  if not mentions or not things:
    return 0, []
  score = np.array([[_agreement(m, t) for t in things] for m in mentions])
  rows, cols = optimize.linear_sum_assignment(-score)
  return int(score[rows, cols].sum()), [(int(i), int(j)) for i, j in zip(rows, cols) if score[i, j]]


def _agreement(mention: Clause, thing: world.Thing) -> int:
  if mention.shape != thing.shape:
    return 0
  return 1 + sum(
    said == true for said, true in zip(mention[2:], (thing.colour, thing.texture, thing.size))
  )


# Texts -> atoms


def _vocabulary():
  nouns, adjectives = {}, {}
  for i, words in enumerate(grammar.NOUNS):
    for w in words:
      nouns[w] = nouns[grammar.PLURALS.get(w, w + 's')] = i
  for field, table in (
    ('colour', enumerate(grammar.COLOUR_WORDS)),
    ('texture', enumerate(grammar.TEXTURE_WORDS)),
    ('size', grammar.SIZE_WORDS.items()),
  ):
    adjectives.update({w: (field, value) for value, words in table for w in words})
  return nouns, adjectives


_NOUNS, _ADJECTIVES = _vocabulary()
_TEXTURE_NOUNS = {v: k for k, v in grammar.TEXTURE_NOUNS.items()}
_NUMBERS = {'a': 1, 'an': 1, **{w: n for n, w in enumerate(grammar.NUMBERS) if n}}
_OPENERS = tuple(tuple(o.split()) for o in grammar.OPENERS) + (('there', 'are'),)
_PHRASES = sorted(
  ((tuple(p.split()), name) for name, ps in grammar.RELATIONS.items() for p in ps),
  key=lambda phrase: -len(phrase[0]),
)


class _Unparsable(Exception):
  pass


class _Parser:
  """A recursive descent parser for the words of one text; collects `clauses` and `relations`."""

  def __init__(self, words: list[str]):
    self.words, self.at = words, 0
    self.clauses, self.relations = [], []

  def take(self, *options: str) -> str | None:
    if self.at < len(self.words) and self.words[self.at] in options:
      self.at += 1
      return self.words[self.at - 1]
    return None

  def take_phrase(self, phrase: tuple[str, ...]) -> bool:
    if tuple(self.words[self.at : self.at + len(phrase)]) == phrase:
      self.at += len(phrase)
      return True
    return False

  def adjective(self, said: dict) -> bool:
    if self.at >= len(self.words) or self.words[self.at] not in _ADJECTIVES:
      return False
    field, value = _ADJECTIVES[self.words[self.at]]
    if said.setdefault(field, value) != value:
      raise _Unparsable  # such as two colors for one thing
    self.at += 1
    return True

  def noun_phrase(self) -> int:
    """Reads a noun phrase and returns the index of its clause; 'the disc' may refer to an earlier
    one.
    """
    definite = self.take('the')
    number = self.take(*_NUMBERS)
    if not definite and not number:
      raise _Unparsable
    said = {}
    while self.adjective(said):
      pass
    noun = self.take(*_NOUNS)
    if noun is None:
      raise _Unparsable
    if self.take('with'):
      texture = self.take(*_TEXTURE_NOUNS)
      if (
        texture is None
        or said.setdefault('texture', _TEXTURE_NOUNS[texture]) != _TEXTURE_NOUNS[texture]
      ):
        raise _Unparsable
    clause = Clause(_NOUNS[noun], _NUMBERS[number] if number else 1, **said)
    if definite:
      for i, old in enumerate(self.clauses):
        if old.shape == clause.shape and all(
          n is None or n == o for n, o in zip(clause[2:], old[2:])
        ):
          return i
    self.clauses.append(clause)
    return len(self.clauses) - 1

  def attributes(self, subject: int):
    said = {
      k: v
      for k, v in self.clauses[subject]._asdict().items()
      if k in ('colour', 'texture', 'size') and v is not None
    }
    if not self.adjective(said):
      raise _Unparsable
    while self.take(',', 'and'):
      if not self.adjective(said):
        raise _Unparsable
    self.clauses[subject] = self.clauses[subject]._replace(**said)

  def relation(self, subject: int) -> bool:
    for phrase, name in _PHRASES:
      if self.take_phrase(phrase):
        target = self.noun_phrase()
        if target == subject:
          raise _Unparsable
        self.relations.append(Relation(subject, name, target))
        return True
    return False

  def sentence(self):
    if self.take('it', 'they'):
      if not self.clauses or not self.take('is', 'are'):
        raise _Unparsable
      self.attributes(len(self.clauses) - 1)
      return
    any(self.take_phrase(opener) for opener in _OPENERS)
    subject = self.noun_phrase()
    while self.at < len(self.words) and self.words[self.at] != '.':
      if self.take('is', 'are'):
        if not self.relation(subject):
          self.attributes(subject)
      elif not self.relation(subject):
        if not self.take(',', 'and'):
          raise _Unparsable
        self.take('and')
        subject = self.noun_phrase()

  def text(self) -> Atoms:
    while self.at < len(self.words):
      self.sentence()
      if self.at < len(self.words) and not self.take('.'):
        raise _Unparsable
    if not self.clauses or sum(c.count for c in self.clauses) > 12:
      raise _Unparsable
    return Atoms(tuple(self.clauses), tuple(self.relations))


def parse(text: str) -> Atoms | None:
  """The atoms that a text states; None if it is not a text of this world."""
  if re.search(r'[^a-z., \n]', text.lower()):
    return None
  try:
    return _Parser(re.findall(r'[a-z]+|[.,]', text.lower())).text()
  except _Unparsable:
    return None


class TextCounts(NamedTuple):
  """Counts of a text's atoms, compared with the true scene."""

  stated: int
  right: int
  recalled: int  # shapes, colors and textures of the scene's things that the text states correctly
  total: int  # shapes, colors and textures in the scene
  words: int
  parsed: bool


def count_atoms(text: str, scene: world.Scene) -> TextCounts:
  """Compares a text with a scene. An unparsable text counts as one wrong atom."""
  total, words = 3 * len(scene.things), len(text.split())
  atoms = parse(text)
  if atoms is None:
    return TextCounts(1, 0, 0, total, words, False)
  mentions = expand(atoms)
  right, pairs = assign(mentions, scene.things)
  sizes = sum(mentions[i].size == scene.things[j].size for i, j in pairs)
  groups = [c for c in atoms.clauses if c.count > 1]
  counts_right = sum(
    sum(t.shape == c.shape for t in scene.things) == _wanted(atoms, c.shape) for c in groups
  )
  relations_right = sum(
    _relation_found(r, atoms.clauses, scene.things, True) for r in atoms.relations
  )
  return TextCounts(
    stated=sum(map(stated, mentions)) + len(groups) + len(atoms.relations),
    right=right + counts_right + relations_right,
    recalled=right - sizes,
    total=total,
    words=words,
    parsed=True,
  )
