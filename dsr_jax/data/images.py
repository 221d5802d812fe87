"""Pictures: a folder of anyone's own, decoded when they are asked for."""

from collections.abc import Callable, Sequence
import concurrent.futures
import hashlib
import os

import numpy as np

from dsr_jax import images
from dsr_jax.errors import InputError

SUFFIXES = ('.bmp', '.gif', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp')


def find(directory: str) -> list[str]:
  """Paths of the images in `directory` and below, relative to it, sorted; hidden files are left
  out.
  """
  if not os.path.isdir(directory):
    raise InputError(f'found no folder {directory}; expected a folder of images; name another')
  found = []
  for folder, subfolders, names in os.walk(directory):
    subfolders[:] = [name for name in subfolders if not name.startswith('.')]
    found += [
      os.path.relpath(os.path.join(folder, name), directory)
      for name in names
      if name.lower().endswith(SUFFIXES) and not name.startswith('.')
    ]
  if not found:
    raise InputError(
      f'found no image in {directory}; expected files ending in {", ".join(SUFFIXES)}; '
      'name another folder'
    )
  return sorted(path.replace(os.sep, '/') for path in found)


class Pictures:
  """Square uint8 pictures (H, W, 3) by index, made by `draw(index)`."""

  def __init__(self, number: int, draw: Callable[[int], np.ndarray], identity: str):
    self._number = number
    self._draw = draw
    self._identity = identity
    self._pool = None

  @classmethod
  def from_folder(
    cls, directory: str, size: int, mode: str = 'crop', rounding: str = 'int'
  ) -> 'Pictures':
    """The folder's images, resized and cropped (or padded) to `size` pixels square as the model's
    processor does.
    """
    names = find(directory)

    def draw(index):
      image = images.load_image(os.path.join(directory, names[index]))
      return images.preprocess(image, size, mode=mode, rounding=rounding)

    return cls(len(names), draw, '\n'.join(names))

  def __len__(self) -> int:
    return self._number

  def __getitem__(self, index: int) -> np.ndarray:
    return self._draw(index)

  def take(self, indices: Sequence[int]) -> np.ndarray:
    """Pictures (B, H, W, 3) uint8; decoded by several threads, for Pillow works outside the
    interpreter's lock.
    """
    if self._pool is None:
      self._pool = concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1), 'pictures')
    return np.stack(list(self._pool.map(self._draw, indices)))

  def fingerprint(self) -> str:
    """SHA-256 of what identifies the pictures (names, or the world's own name) and their number."""
    identity = f'{self._number}\n{self._identity}'
    return hashlib.sha256(identity.encode('utf-8', 'surrogateescape')).hexdigest()
