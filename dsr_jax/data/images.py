"""Pictures by index, square and as bytes, decoded by threads when they are asked for."""

from collections.abc import Callable, Sequence
import hashlib
import io
import itertools

import numpy as np

from dsr_jax import cli, images
from dsr_jax.data import folders, order
from dsr_jax.errors import InputError


class Pictures:
  """Square uint8 pictures (H, W, 3) by index, made by `draw(index)`.

  identity: a text that differs where the pictures do. earlier: what earlier versions took for it,
  where that was another one.
  """

  def __init__(
    self,
    number: int,
    draw: Callable[[int], np.ndarray],
    identity: str,
    earlier: str | None = None,
  ):
    self._number = number
    self._draw = draw
    self._identity = identity
    self._earlier = earlier
    self._pool = None

  def __len__(self) -> int:
    return self._number

  def __getitem__(self, index: int) -> np.ndarray:
    return self._draw(index)

  def take(self, indices: Sequence[int]) -> np.ndarray:
    """Pictures (B, H, W, 3) uint8; decoded by several threads, for Pillow works outside the
    interpreter's lock.
    """
    if self._pool is None:
      self._pool = folders.pool()
    return np.stack(list(self._pool.map(self._draw, indices)))

  def fingerprint(self) -> str:
    """SHA-256 of what identifies the pictures (contents, or the world's own name) and their
    number.
    """
    return self._hash(self._identity)

  def earlier_fingerprint(self) -> str | None:
    """The same as an earlier version had it, which knew a folder by its names; or None."""
    return None if self._earlier is None else self._hash(self._earlier)

  def _hash(self, identity):
    text = f'{self._number}\n{identity}'
    return hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()


def decoded(
  stored,
  indices: Sequence[int],
  size: int,
  mode: str = 'crop',
  bad_images: str = 'error',
  earlier: str | None = None,
) -> Pictures:
  """Stored pictures, resized and cropped (or padded) to `size` pixels square as the model's
  processor does.

  Args:
    stored: `folders.Folder` or `prepared.Prepared`: read(index) and identity(indices).
    indices: which of them.
    size, mode: of `images.preprocess`.
    bad_images: 'skip' takes the next one in the place of one that no longer decodes.
    earlier: see `Pictures`.
  """

  def draw(index):
    name, data = stored.read(indices[index])
    image = images.load_image(io.BytesIO(data), name)
    return images.preprocess(image, size, mode=mode)

  if bad_images == 'skip':
    draw = _or_the_next(draw, len(indices))
  return Pictures(len(indices), draw, stored.identity(indices), earlier)


def _or_the_next(draw, number):
  """`draw`, but for what it refuses the next picture that it does not, the same one each time."""
  said = set()

  def either(index):
    for offset in range(number):
      try:
        return draw((index + offset) % number)
      except InputError as e:
        if (index + offset) % number not in said:
          said.add((index + offset) % number)
          cli.log(f'left out     {e}')
    raise InputError(
      f'found none of {number} pictures that decodes any more; expected their files to stay as '
      'they are; bring them back'
    )

  return either


def chosen(pictures: Pictures, indices: Sequence[int]) -> Pictures:
  """Some of them, as pictures of their own."""
  identity = f'{pictures.fingerprint()} {",".join(map(str, indices))}'
  return Pictures(len(indices), lambda i: pictures[indices[i]], identity)


def joined(parts: Sequence[Pictures]) -> Pictures:
  """All pictures of several sets, one set after the other; a single one stays what it is."""
  if len(parts) == 1:
    return parts[0]
  ends = list(itertools.accumulate(len(part) for part in parts))

  def draw(index):
    part, place = order.place(ends, index)
    return parts[part][place]

  return Pictures(ends[-1], draw, '\n'.join(part.fingerprint() for part in parts))
