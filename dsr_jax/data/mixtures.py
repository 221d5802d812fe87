"""What `data.prompts` and `data.images` name: a set, a file or a folder, or several of them with so
many of each.

    t2i_compbench          coco:2800+journeydb:2800          coco/2017:500+~/photos+scenes:100

Which ones of a set is up to `data.seed`. A path that holds '+' or ':' is taken for the path it is.

Sets that are made by a function, such as scenes, come as a table: named, {name: function}.
"""

import os
import re
from typing import NamedTuple

from dsr_jax import inputs
from dsr_jax.data import folders, known, order, prepared
from dsr_jax.data import images as images_lib
from dsr_jax.data import prompts as prompts_lib
from dsr_jax.errors import InputError

_NUMBER = re.compile(r'(.+):(\d+)', re.DOTALL)


class Part(NamedTuple):
  """name: of a set, a file or a folder. number: how many of it, None is all."""

  name: str
  number: int | None


# What is written.


def parts(text: str, key: str) -> list[Part]:
  """'a:3+b' -> [('a', 3), ('b', None)]; key: what errors say it stands in."""
  pieces, found = text.split('+'), []
  while pieces:
    # The longest beginning that is a path, else up to the first '+'.
    for end in range(len(pieces), 0, -1):
      part = _part('+'.join(pieces[:end]), key)
      if end == 1 or os.path.lexists(part.name):
        break
    if not part.name.strip() or part.number == 0:
      raise InputError(
        f'found {key}={inputs.shown(text)}; expected a name, or several as '
        'coco:2800+journeydb:2800, each with at least 1; mend it'
      )
    found.append(part)
    pieces = pieces[end:]
  return found


def _part(text, key):
  path = inputs.expanded(text, key)
  numbered = _NUMBER.fullmatch(text)
  if os.path.lexists(path) or not numbered:
    return Part(path, None)
  return Part(inputs.expanded(numbered[1], key), int(numbered[2]))


# Prompts.


def prompts(data, seed: int, named) -> prompts_lib.Prompts:
  """The prompts that `data.prompts` names; seed: the run's, of sets that are drawn."""
  check_prompts(data, named)
  found = []
  for name, number in parts(data.prompts, 'data.prompts'):
    if name in named:
      part = named[name](seed)
    else:
      part = prompts_lib.Prompts.from_file(name)
    if number is not None:
      part = prompts_lib.chosen(part, _choice(data, 'prompts', name, number, len(part)))
    found.append(part)
  return prompts_lib.joined(found)


def check_prompts(data, named):
  """InputError for what is not there; nothing is read."""
  for name, _ in parts(data.prompts, 'data.prompts'):
    if name not in named and not os.path.lexists(name):
      raise InputError(
        f'found no prompts {inputs.shown(name)}; expected one of {", ".join(named)}, '
        'or a text file with a line a prompt; change data.prompts'
      )


# Pictures.


def pictures(data, seed: int, size: int, crop: str, named) -> images_lib.Pictures:
  """The pictures that `data.images` names, square, of `size` pixels.

  seed: the run's, of sets that are drawn. Raises InputError for what is not there, and for pictures
  that do not decode, all together.
  """
  check_pictures(data, named)
  found = []
  for name, number in parts(data.images, 'data.images'):
    if name not in named:
      part = _stored(data, name, number, size, crop)
    else:
      part = named[name](seed, size)
      if number is not None:
        part = images_lib.chosen(part, _choice(data, 'images', name, number, len(part)))
    found.append(part)
  return images_lib.joined(found)


def _stored(data, name, number, size, crop):
  def choose(of):
    if number is None:
      return list(range(of))
    return _choice(data, 'images', name, number, of)

  found = _find_set(name, data)
  if found is not None:
    stored = prepared.Prepared(found, name)
    indices = stored.open(choose(len(stored)), data.bad_images, data.seed)
    return images_lib.decoded(stored, indices, size, crop, data.bad_images)

  folder = folders.Folder(name, data.bad_images, data.seed)
  indices = choose(len(folder))
  earlier = '\n'.join(folder.names) if number is None else None
  return images_lib.decoded(folder, indices, size, crop, data.bad_images, earlier)


def _choice(data, what, name, number, of):
  if number > of:
    raise InputError(
      f'found {of} {what} in {inputs.shown(name)}; expected at least {number}; lower the number in '
      f'data.{what}'
    )
  return order.choice(data.seed, of, number)


def _find_set(name, data) -> str | None:
  """The folder of the prepared set that is called so, or that is this very folder."""
  if os.path.isfile(os.path.join(name, prepared.INFO)) or prepared.is_remote(name):
    return name
  if name not in known.KNOWN and os.path.isdir(name):
    return None
  return prepared.locate(name, _data_dir(data))


def _data_dir(data):
  found = inputs.expanded(data.data_dir, 'data.data_dir')
  prepared.check_reachable(found, 'data.data_dir')
  return found


def check_pictures(data, named):
  """InputError for what is not there, with the command for each set that is not prepared."""
  missing = []
  for name, _ in parts(data.images, 'data.images'):
    if name in named or _find_set(name, data) is not None:
      continue
    if name in known.KNOWN or (not os.path.isdir(name) and prepared.begun(name, _data_dir(data))):
      missing.append(name)
    elif not os.path.isdir(name):
      raise InputError(
        f'found no pictures {inputs.shown(name)}; expected one of '
        f'{", ".join((*named, "coco", "journeydb"))}, or a folder of images; change '
        'data.images'
      )
  if missing:
    raise _not_prepared(missing, _data_dir(data))


def _not_prepared(names, data_dir) -> InputError:
  names = list(dict.fromkeys(names))
  commands, hints = [], []
  for name in names:
    record = prepared.begun(name, data_dir)
    commands.append(known.command(name, data_dir, record['source'] if record else ''))
    if record:
      hints.append(f'of {name} a beginning is there, and the command goes on')
    if os.path.isdir(name):
      hints.append(f'./{name} names the folder')
  return InputError(
    f'found no {" and no ".join(names)} in {data_dir}; expected '
    f'{"it" if len(names) == 1 else "them"} prepared; run {" and ".join(commands)}'
    f'{"".join(f" ({hint})" for hint in hints)}, or name other pictures in data.images'
  )
