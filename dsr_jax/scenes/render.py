"""Scene graph -> pixels: pastes sprites on the lattice.

Every sprite consists of some of 20 silhouettes of 4 x 4 pixels, so there are few distinct patches
(20 silhouettes x 8 colors x 3 textures), and 512 codes of an image tokenizer suffice. Textures are
aligned to the lattice: stripes are two rows of the color and two of a much darker one; dots are
2 x 2 nearly black pixels in the middle of each cell.
"""

import numpy as np

from dsr_jax.scenes import world

COLOUR_RGB = np.array(
  [
    (222, 32, 36),  # red
    (250, 138, 24),  # orange
    (232, 200, 8),  # yellow
    (30, 160, 62),  # green
    (34, 92, 226),  # blue
    (140, 48, 190),  # purple
    (246, 122, 190),  # pink
    (134, 84, 46),  # brown
  ],
  np.uint8,
)
GROUND_RGB = np.array([(250, 246, 236), (234, 240, 250)], np.uint8)
PEBBLE_RGB = np.array((158, 158, 158), np.uint8)
STRIPE_SHADE = 0.3  # of the color, in the darker rows
DOT_RGB = np.array(
  (18, 18, 26), np.uint8
)  # dark: light dots would look like holes, and a dotted disc like a cross

_DIAGONAL = '...# ..## .### ####'
_ROUND = '..## .### #### ####'
_CORNER = '.... .... ...# ..##'
_TIP = '.##. #### #### ####'
_BAND = '##.. ###. .### ..##'


def _mask(rows: str) -> np.ndarray:
  return np.array([[pixel == '#' for pixel in row] for row in rows.split()])


def _silhouettes() -> dict[str, np.ndarray]:
  """Names: a, r, s are a diagonal, a round and a small corner; their solid side is away from corner
  1 (top left), 2 (top right), 3 (bottom left) or 4 (bottom right).
  """
  masks = {'.': np.zeros((4, 4), bool), 'F': np.ones((4, 4), bool)}
  for letter, rows in (('a', _DIAGONAL), ('r', _ROUND), ('s', _CORNER)):
    m = _mask(rows)
    masks.update(
      {
        letter + '1': m,
        letter + '2': m[:, ::-1],
        letter + '3': m[::-1],
        letter + '4': m[::-1, ::-1],
      }
    )
  tip = _mask(_TIP)
  masks.update(tu=tip, td=tip[::-1], tl=tip.T, tr=tip.T[:, ::-1])
  masks.update(x=_mask(_BAND), y=_mask(_BAND)[:, ::-1], v=_mask('.... #..# #### ####'))
  return masks


SILHOUETTES = _silhouettes()
LAYOUTS = {  # shape: (8 pixels, 12 pixels); | separates rows of cells
  'square': ('F F|F F', 'F F F|F F F|F F F'),
  'diamond': ('a1 a2|a3 a4', 's1 tu s2|tl F tr|s3 td s4'),
  'disc': ('r1 r2|r3 r4', 'a1 F a2|F F F|a3 F a4'),
  'ring': ('y x|x y', 'a1 F a2|F . F|a3 F a4'),
  'triangle': ('a2 .|F a2', 'a2 . .|F a2 .|F F a2'),
  'cross': ('x y|y x', 'x . y|. F .|y . x'),
  'heart': ('tu tu|a3 a4', 'tu v tu|a3 F a4|. td .'),
  'hourglass': ('a3 a4|a1 a2', 'a3 F a4|. F .|a1 F a2'),
}
PEBBLE_MASK = _mask('.##. #### #### .##.')


def shape_mask(shape: int, size: int) -> np.ndarray:
  """The silhouette, (size, size) bool."""
  layout = LAYOUTS[world.SHAPES[shape]][world.SIZES.index(size)]
  return np.block([[SILHOUETTES[cell] for cell in row.split()] for row in layout.split('|')])


def _surface(colour: int, texture: int, size: int) -> np.ndarray:
  """The texture over a whole square, (size, size, 3) uint8."""
  rgb = COLOUR_RGB[colour]
  out = np.broadcast_to(rgb, (size, size, 3)).copy()
  at = np.arange(size) % world.CELL
  if texture == 1:
    out[at >= 2] = (rgb * STRIPE_SHADE).astype(np.uint8)
  elif texture == 2:
    middle = (at == 1) | (at == 2)
    out[middle[:, None] & middle[None, :]] = DOT_RGB
  return out


def _sprites() -> dict[tuple[int, ...], np.ndarray]:
  sprites = {}
  for ground in range(len(world.GROUNDS)):
    for shape in range(len(world.SHAPES)):
      for size in world.SIZES:
        mask = shape_mask(shape, size)[..., None]
        for colour in range(len(world.COLOURS)):
          for texture in range(len(world.TEXTURES)):
            sprite = np.where(mask, _surface(colour, texture, size), GROUND_RGB[ground])
            sprites[ground, shape, colour, texture, size] = sprite
  return sprites


SPRITES = _sprites()  # (ground, shape, colour, texture, size) -> (size, size, 3) uint8
PEBBLES = np.where(
  PEBBLE_MASK[None, ..., None], PEBBLE_RGB, GROUND_RGB[:, None, None]
)  # (ground, 4, 4, 3)
_BLANKS = np.broadcast_to(
  GROUND_RGB[:, None, None], (len(GROUND_RGB), world.IMAGE_SIZE, world.IMAGE_SIZE, 3)
)


def render(scene: world.Scene) -> np.ndarray:
  """Draws a scene: (32, 32, 3) uint8."""
  picture = _BLANKS[scene.ground].copy()
  for thing in scene.things:
    top, left, bottom, right = thing.box
    picture[top:bottom, left:right] = SPRITES[
      scene.ground, thing.shape, thing.colour, thing.texture, thing.size
    ]
  for row, col in scene.pebbles:
    top, left = row * world.CELL, col * world.CELL
    picture[top : top + world.CELL, left : left + world.CELL] = PEBBLES[scene.ground]
  return picture


def patches(picture: np.ndarray) -> np.ndarray:
  """Cuts (..., 32, 32, 3) into cells: (..., 64, 48)."""
  n, p = world.GRID, world.CELL
  cut = picture.reshape(*picture.shape[:-3], n, p, n, p, 3)
  return np.moveaxis(cut, -4, -3).reshape(*picture.shape[:-3], n * n, p * p * 3)


def patch_coverage(pictures: np.ndarray, codes: int = 512) -> dict[str, float]:
  """The share of the patches without ground in (B, 32, 32, 3) that the `codes` commonest cover."""
  cells = np.ascontiguousarray(patches(pictures).reshape(-1, 48))
  blank = np.zeros(len(cells), bool)
  for rgb in GROUND_RGB:
    blank |= (cells == np.tile(rgb, 16)).all(1)
  _, counts = np.unique(
    cells[~blank].view('V48'), return_counts=True
  )  # each patch as one value: np.unique with an axis is slow
  return {
    'patches': int((~blank).sum()),
    'distinct': len(counts),
    'share': float(np.sort(counts)[::-1][:codes].sum() / counts.sum()),
  }
