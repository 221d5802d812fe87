"""Square uint8 images by index, which threads decode on demand."""

from collections.abc import Callable, Sequence
import hashlib
import io
import itertools

import numpy as np

from dsr_jax import cli, images
from dsr_jax.data import folders, order
from dsr_jax.errors import InputError


class Pictures:
  """Square uint8 images (H, W, 3) by index, made by `draw(index)`.

  identity: a text that changes if the images change. earlier: the identity in earlier versions,
  if it differed.
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
    """Pictures (B, H, W, 3) uint8; several threads decode them, as Pillow releases the GIL."""
    if self._pool is None:
      self._pool = folders.pool()
    return np.stack(list(self._pool.map(self._draw, indices)))

  def fingerprint(self) -> str:
    """SHA-256 of the identity of the images (their contents, or the name of a generated set) and
    their number.
    """
    return self._hash(self._identity)

  def earlier_fingerprint(self) -> str | None:
    """The fingerprint in an earlier version, which identified folders by file names; or None."""
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
  """Stored images, resized and cropped (or padded) to `size` pixels square as the model's
  processor does.

  Args:
    stored: `folders.Folder` or `prepared.Prepared`: has read(index) and identity(indices).
    indices: the images to use.
    size, mode: see `images.preprocess`.
    bad_images: 'skip' replaces an image that no longer decodes by the next one.
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
  """`draw`, but replaces an image that it refuses by the next one that works, always the same."""
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
      f'none of {number} images decodes any more, so their files have changed; restore them'
    )

  return either


def chosen(pictures: Pictures, indices: Sequence[int]) -> Pictures:
  """A subset of the images."""
  identity = f'{pictures.fingerprint()} {",".join(map(str, indices))}'
  return Pictures(len(indices), lambda i: pictures[indices[i]], identity)


def joined(parts: Sequence[Pictures]) -> Pictures:
  """Concatenates the images of several sets; returns a single set unchanged."""
  if len(parts) == 1:
    return parts[0]
  ends = list(itertools.accumulate(len(part) for part in parts))

  def draw(index):
    part, place = order.place(ends, index)
    return parts[part][place]

  return Pictures(ends[-1], draw, '\n'.join(part.fingerprint() for part in parts))
