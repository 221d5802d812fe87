"""What lies at the paths of `config.data`: of several processes all must find the same there."""

import hashlib
import os
import pathlib
import random

from dsr_jax.data import images
from dsr_jax.errors import InputError, first_line

PICTURES_READ = 1000  # of a folder: a second or two, also over a network


def of(data) -> dict[str, str]:
  """{'contents of data.images': a digest, ...} of a `config.Data`; '' where a name is no path.

  Reads of a folder of pictures the names and sizes of all, and what is in a thousand of them.
  Raises nothing: what cannot be read is said in the digest's place, and in full by its reader.
  """
  return {
    'contents of data.images': _of_pictures(data.images),
    'contents of data.prompts': _of_file(data.prompts),
  }


def _of_pictures(folder) -> str:
  if not os.path.isdir(folder):
    return _of_file(folder)
  try:
    names = images.find(folder)
    sizes = [os.path.getsize(os.path.join(folder, name)) for name in names]
    some = random.Random(0).sample(names, min(len(names), PICTURES_READ))
    return _digest(f'{names} {sizes}', *(os.path.join(folder, name) for name in some))
  except (InputError, OSError) as e:
    return first_line(e)


def _of_file(name) -> str:
  try:
    return _digest('', name) if os.path.isfile(name) else ''
  except OSError as e:
    return first_line(e)


def _digest(about, *paths) -> str:
  digest = hashlib.sha256(about.encode('utf-8', 'surrogateescape'))
  for path in paths:
    content = pathlib.Path(path).read_bytes()
    digest.update(f'\n{len(content)}\n'.encode() + content)
  return digest.hexdigest()[:12]
