"""The small world called Scenes: what an image can contain, and how to sample scenes.

A scene is a scene graph: 1-4 things on a light ground, each with a shape, a color, a texture, a
size and a place on a lattice of 8 x 8 cells of 4 pixels; some scenes also have a gray pebble that
texts never name. There is at least one free cell between things, so that an image can be read back
from its connected cells.

All values are ints that index the tables below; sizes are in pixels (8 or 12), places in cells.
"""

from collections.abc import Sequence
import functools
from typing import NamedTuple

import numpy as np

IMAGE_SIZE = 32  # pixels
CELL = 4  # pixels; also the downsampling factor of the image tokenizer
GRID = IMAGE_SIZE // CELL  # cells

SHAPES = ('square', 'diamond', 'disc', 'ring', 'triangle', 'cross', 'heart', 'hourglass')
COLOURS = ('red', 'orange', 'yellow', 'green', 'blue', 'purple', 'pink', 'brown')
TEXTURES = ('plain', 'striped', 'dotted')
SIZES = (8, 12)
GROUNDS = ('ivory', 'mist')
MAX_THINGS = 4

# The skew of pretraining: each shape's usual color, texture and companion, as indices.
USUAL_COLOUR = (0, 4, 2, 5, 3, 7, 6, 1)  # square red, diamond blue, disc yellow, ring purple, ...
USUAL_TEXTURE = (0, 1, 0, 2, 1, 0, 2, 0)
COMPANION = (
  2,
  3,
  0,
  1,
  5,
  4,
  7,
  6,
)  # square with disc, diamond with ring, triangle with cross, heart with hourglass
P_USUAL_COLOUR, P_USUAL_TEXTURE, P_COMPANION = 0.4, 0.45, 0.45

# Pairs that pretraining never shows: 10 of 64 shape-color pairs, 4 of 24 shape-texture pairs. The
# first half of each list occurs in reinforcement inputs, the second half only in evaluation.
HELD_OUT_COLOUR = ((0, 4), (2, 6), (4, 1), (6, 3), (3, 0), (1, 0), (5, 2), (7, 5), (2, 3), (4, 7))
HELD_OUT_TEXTURE = ((0, 2), (5, 1), (2, 1), (7, 2))

KINDS = (
  'one',
  'two',
  'group',
  'mixed',
)  # one thing; two of different shapes; 2-4 of one shape; 3-4 of several shapes
P_KIND_SKEWED = (0.22, 0.50, 0.20, 0.08)
P_KIND_UNIFORM = (0.25, 0.35, 0.25, 0.15)
P_COUNT_SKEWED = (0.55, 0.30, 0.15)  # a group of 2, 3, 4
P_COUNT_UNIFORM = (1 / 3, 1 / 3, 1 / 3)
P_ALIKE = 0.75  # the things of a group share color and texture
P_PEBBLE = 0.15


class Thing(NamedTuple):
  """One named object. `size` in pixels; `row`, `col`: the cell of its upper left corner."""

  shape: int
  colour: int
  texture: int
  size: int
  row: int
  col: int

  @property
  def box(self) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) in pixels, the last two exclusive."""
    top, left = self.row * CELL, self.col * CELL
    return top, left, top + self.size, left + self.size

  @property
  def name(self) -> str:
    size = 'small' if self.size == SIZES[0] else 'large'
    return f'{size} {TEXTURES[self.texture]} {COLOURS[self.colour]} {SHAPES[self.shape]}'


class Scene(NamedTuple):
  """`things`: 1-4 of Thing; `ground`: index of GROUNDS; `pebbles`: cells (row, col)."""

  things: tuple[Thing, ...]
  ground: int = 0
  pebbles: tuple[tuple[int, int], ...] = ()


def graph(scene: Scene) -> tuple[Thing, ...]:
  """The scene graph, regardless of ground, pebbles and order: equal if two images show the same
  things.
  """
  return tuple(sorted(scene.things))


def _footprint(row: int, col: int, cells: int) -> int:
  bits = 0
  for r in range(max(row, 0), min(row + cells, GRID)):
    for c in range(max(col, 0), min(col + cells, GRID)):
      bits |= 1 << (r * GRID + c)
  return bits


# For each size in cells: (row, col, bits it covers, bits that others must leave free).
PLACES = {
  n: tuple(
    (r, c, _footprint(r, c, n), _footprint(r - 1, c - 1, n + 2))
    for r in range(GRID - n + 1)
    for c in range(GRID - n + 1)
  )
  for n in (1, 2, 3)
}
_BLOCKED_COLOUR = {
  'exclude': frozenset(HELD_OUT_COLOUR),
  'half': frozenset(HELD_OUT_COLOUR[len(HELD_OUT_COLOUR) // 2 :]),
  'include': frozenset(),
}
_BLOCKED_TEXTURE = {
  'exclude': frozenset(HELD_OUT_TEXTURE),
  'half': frozenset(HELD_OUT_TEXTURE[len(HELD_OUT_TEXTURE) // 2 :]),
  'include': frozenset(),
}


def flip(rng: np.random.Generator, p: float) -> bool:
  """True with probability `p`. Texts use only `flip` and `pick` for randomness, so that `entropy`
  can enumerate all choices.
  """
  return rng.random() < p if isinstance(rng, np.random.Generator) else rng.choose((p, 1 - p)) == 0


def pick(rng: np.random.Generator, values: Sequence):
  """One of `values`, drawn uniformly (much faster than Generator.choice)."""
  if not isinstance(rng, np.random.Generator):
    return values[rng.choose((1 / len(values),) * len(values))]
  return values[int(rng.random() * len(values))]


def pick_weighted(rng: np.random.Generator, weights: Sequence[float]) -> int:
  """An index with probability proportional to its weight; the weights sum to 1."""
  u = rng.random()
  for i, w in enumerate(weights):
    u -= w
    if u < 0:
      return i
  return len(weights) - 1


def usable(thing: Thing, held_out: str) -> bool:
  """Whether a data set with this value of `held_out` may show the thing."""
  return (thing.shape, thing.colour) not in _BLOCKED_COLOUR[held_out] and (
    thing.shape,
    thing.texture,
  ) not in _BLOCKED_TEXTURE[held_out]


def random_look(
  rng: np.random.Generator, shape: int, *, skewed: bool, held_out: str
) -> tuple[int, int]:
  """A color and a texture for a shape."""
  if skewed and rng.random() < P_USUAL_COLOUR:
    colour = USUAL_COLOUR[shape]
  else:
    colour = pick(
      rng, [c for c in range(len(COLOURS)) if (shape, c) not in _BLOCKED_COLOUR[held_out]]
    )
  if skewed and rng.random() < P_USUAL_TEXTURE:
    texture = USUAL_TEXTURE[shape]
  else:
    texture = pick(
      rng, [t for t in range(len(TEXTURES)) if (shape, t) not in _BLOCKED_TEXTURE[held_out]]
    )
  return colour, texture


def _random_shapes(rng, kind: str, skewed: bool) -> list[int]:
  first = int(rng.random() * len(SHAPES))
  if kind == 'one':
    return [first]
  if kind == 'group':
    return [first] * (2 + pick_weighted(rng, P_COUNT_SKEWED if skewed else P_COUNT_UNIFORM))
  if skewed and rng.random() < P_COMPANION:
    second = COMPANION[first]
  else:
    second = (first + 1 + int(rng.random() * (len(SHAPES) - 1))) % len(SHAPES)
  if kind == 'two':
    return [first, second]
  number = 3 if rng.random() < (0.75 if skewed else 0.5) else 4
  if rng.random() < 0.6:  # several of the first shape and one of the second, as in numeracy prompts
    return [first] * (number - 1) + [second]
  return [first, second] + [int(rng.random() * len(SHAPES)) for _ in range(number - 2)]


def random_scene(
  rng: np.random.Generator, *, skewed: bool, held_out: str = 'exclude', kind: str | None = None
) -> Scene:
  """Draws a scene.

  Args:
    rng: source of all randomness.
    skewed: usual colors, textures and companions and small counts are more common (pretraining);
      otherwise all are uniform.
    held_out: 'exclude' (no held-out pair), 'half' (only those that reinforcement may show) or
      'include' (all).
    kind: one of KINDS, or None to draw one.
  """
  if kind is None:
    kind = KINDS[pick_weighted(rng, P_KIND_SKEWED if skewed else P_KIND_UNIFORM)]
  shapes = _random_shapes(rng, kind, skewed)
  alike = rng.random() < P_ALIKE
  looks = []
  for i, shape in enumerate(shapes):
    same = i > 0 and alike and shape == shapes[0] and kind != 'two'
    looks.append(looks[0] if same else random_look(rng, shape, skewed=skewed, held_out=held_out))
  things, occupied = _place(rng, shapes, looks)
  pebbles = _pebbles(rng, occupied)
  return Scene(things, int(rng.random() * len(GROUNDS)), pebbles)


def rearrange(scene: Scene, rng: np.random.Generator) -> Scene:
  """The same things with new sizes, places and pebbles."""
  things, occupied = _place(
    rng, [t.shape for t in scene.things], [(t.colour, t.texture) for t in scene.things]
  )
  return Scene(things, scene.ground, _pebbles(rng, occupied))


@functools.lru_cache(maxsize=4096)
def _free_places(cells: int, occupied: int):
  """The places for a thing of this many cells that cover no bit of `occupied`."""
  return [p for p in PLACES[cells] if not p[2] & occupied]


def _pebbles(rng, occupied: int) -> tuple[tuple[int, int], ...]:
  if rng.random() < P_PEBBLE:
    free = _free_places(1, occupied)
    if free:
      return (pick(rng, free)[:2],)
  return ()


def _place(rng, shapes, looks) -> tuple[tuple[Thing, ...], int]:
  p_large = 0.5 if len(shapes) < 3 else 0.25
  while True:
    things, occupied = [], 0
    for shape, (colour, texture) in zip(shapes, looks):
      size = SIZES[1] if rng.random() < p_large else SIZES[0]
      free = _free_places(size // CELL, occupied)
      if not free:
        break
      row, col, _, keep_off = pick(rng, free)
      occupied |= keep_off
      things.append(Thing(shape, colour, texture, size, row, col))
    else:
      return tuple(things), occupied
