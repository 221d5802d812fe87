"""The sources in `data.prompts` and `data.images`: a set, a file or a folder, or a mixture of them
with optional counts.

    t2i_compbench          coco:2800+journeydb:2800          coco/2017:500+~/photos+scenes:100

`data.seed` selects the items if there is a count. An existing path may contain '+' or ':'.

Sets made by a function, such as scenes, come in a table, named: {name: function}. So do their
validation lists, which are never used for training. A user's own files and folders have no such
lists, so some of their items are held out (`held_out`).
"""

from collections.abc import Callable, Mapping
import os
import re
from typing import Any, NamedTuple

from dsr_jax import inputs
from dsr_jax.data import folders, held_out, known, order, prepared
from dsr_jax.data import images as images_lib
from dsr_jax.data import prompts as prompts_lib
from dsr_jax.errors import InputError

_NUMBER = re.compile(r'(.+):(\d+)', re.DOTALL)


class Part(NamedTuple):
  """name: a set, a file or a folder. number: how many of its items; None for all."""

  name: str
  number: int | None


class Parted(NamedTuple):
  """A run's prompts or images, split into training and evaluation.

  Attributes:
    everything: all items that the key names; they identify the data of the run.
    learned: the items for training.
    measured: the items for evaluation, never used for training; None if there are none.
    held_out: hashes of the held-out items among the user's own.
  """

  everything: Any
  learned: Any
  measured: Any
  held_out: list[str]


# Parsing.


def parts(text: str, key: str) -> list[Part]:
  """'a:3+b' -> [('a', 3), ('b', None)]. key: the config key, for errors."""
  pieces, found = text.split('+'), []
  while pieces:
    # The longest prefix that is a path; otherwise up to the first '+'.
    for end in range(len(pieces), 0, -1):
      part = _part('+'.join(pieces[:end]), key)
      if end == 1 or os.path.lexists(part.name):
        break
    if not part.name.strip() or part.number == 0:
      raise InputError(
        f'{key} is {inputs.shown(text)}; write a name, or several as in coco:2800+journeydb:2800, '
        'each with a count of at least 1'
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


def prompts(
  data,
  seed: int,
  named: Mapping[str, Callable],
  validation: Mapping[str, Callable] | None = None,
  apart: held_out.Apart = held_out.NOTHING,
) -> Parted:
  """The prompts that `data.prompts` names. seed: the run's seed, for generated sets."""
  check_prompts(data, named)
  found = parts(data.prompts, 'data.prompts')
  each = _each([name for name, _ in found if name in named], apart)
  everything, own = [], []
  measured = []
  for name, number in found:
    if name in named:
      part = named[name](seed)
    else:
      part = prompts_lib.Prompts.from_file(name)
    if number is not None:
      part = prompts_lib.chosen(part, _choice(data, 'prompts', name, number, len(part)))
    everything.append(part)
    own.append(name not in named)
    if each and name in (validation or {}):
      measured.append(validation[name](each))
  hashes = [
    [part.identity(i) for i in range(len(part))] if is_own else []
    for part, is_own in zip(everything, own)
  ]
  held = apart.choose('prompts', (x for part in hashes for x in part))
  learned = []
  for part, identities in zip(everything, hashes):
    inside, outside = _divided(identities, held)
    measured += [prompts_lib.chosen(part, outside)] if outside else []
    learned.append(prompts_lib.chosen(part, inside) if outside else part)
  return _parted(prompts_lib.joined, everything, learned, measured, held, 'data.prompts')


def _each(named, apart) -> int:
  """The number of items to take from each named set's validation list."""
  return -(-apart.listed // max(len(named), 1))


def _divided(identities, held) -> tuple[list[int], list[int]]:
  """Indices of the training items and of the held-out items; each held-out item appears once."""
  held = set(held)
  inside = [i for i, identity in enumerate(identities) if identity not in held]
  first = {}
  for i, identity in enumerate(identities):
    if identity in held:
      first.setdefault(identity, i)
  return inside, sorted(first.values())


def _parted(joined, everything, learned, measured, held, key) -> Parted:
  if not sum(map(len, learned)):
    raise InputError(
      f'{key} has nothing but the {len(held)} items that this run holds out for evaluation, and '
      'none to train on; restore the data that it started with'
    )
  learned = [part for part in learned if len(part)]
  return Parted(joined(everything), joined(learned), joined(measured) if measured else None, held)


def check_prompts(data, named):
  """InputError for missing sources; reads nothing."""
  for name, _ in parts(data.prompts, 'data.prompts'):
    if name not in named and not os.path.lexists(name):
      raise InputError(
        f'there are no prompts {inputs.shown(name)}; set data.prompts to one of '
        f'{", ".join(named)}, or to a text file with one prompt per line'
      )


# Images.


def pictures(
  data,
  seed: int,
  size: int,
  crop: str,
  named: Mapping[str, Callable],
  validation: Mapping[str, Callable] | None = None,
  apart: held_out.Apart = held_out.NOTHING,
) -> Parted:
  """The images that `data.images` names, as squares of `size` pixels.

  seed: the run's seed, for generated sets. Raises InputError for missing sources, and one for all
  images that do not decode.
  """
  check_pictures(data, named)
  found = parts(data.images, 'data.images')
  is_set = [name in named or _find_set(name, data) is not None for name, _ in found]
  each = _each([name for (name, _), listed in zip(found, is_set) if listed], apart)
  everything, learned, measured = [], [], []
  own = []  # (index among the parts, folder, indices)
  for (name, number), listed in zip(found, is_set):
    if name in named:
      part = named[name](seed, size)
      if number is not None:
        part = images_lib.chosen(part, _choice(data, 'images', name, number, len(part)))
      if each and name in (validation or {}):
        measured.append(validation[name](each, size))
    elif listed:
      part, others = _prepared(data, name, number, each, size, crop)
      measured += [others] if others else []
    else:
      folder = folders.Folder(name, data.bad_images, data.seed)
      indices = _indices(data, name, number, len(folder))
      earlier = '\n'.join(folder.names) if number is None else None
      part = images_lib.decoded(folder, indices, size, crop, data.bad_images, earlier)
      own.append((len(everything), folder, indices))
    everything.append(part)
    learned.append(part)
  hashes = [folder.hashes(indices) for _, folder, indices in own]
  held = apart.choose('pictures', (x for part in hashes for x in part))
  for (place, folder, indices), identities in zip(own, hashes):
    inside, outside = _divided(identities, held)
    if outside:
      # Each side separately: an image that goes bad is replaced by one from its own side.
      learned[place], others = (
        images_lib.decoded(folder, [indices[i] for i in side], size, crop, data.bad_images)
        for side in (inside, outside)
      )
      measured.append(others)
  return _parted(images_lib.joined, everything, learned, measured, held, 'data.images')


def _indices(data, name, number, of) -> list[int]:
  return list(range(of)) if number is None else _choice(data, 'images', name, number, of)


def _prepared(data, name, number, each, size, crop):
  """The chosen images of a prepared set, and `each` of the others, or None if there are none."""
  stored = prepared.Prepared(_find_set(name, data), name)
  chosen = _indices(data, name, number, len(stored))
  others = []
  if each and number is not None:
    more = order.choice(data.seed, len(stored), min(number + each, len(stored)))
    others = sorted(set(more) - set(chosen))
  found = []
  for indices in (chosen, others):
    if indices:
      # Open them separately, so that the evaluation items do not affect the training items.
      opened = stored.open(indices, data.bad_images, data.seed)
      found.append(images_lib.decoded(stored, opened, size, crop, data.bad_images))
    else:
      found.append(None)
  return found


def _choice(data, what, name, number, of):
  if number > of:
    raise InputError(
      f'{inputs.shown(name)} has {of} {what}, fewer than the {number} asked for; lower the number '
      f'in data.{what}'
    )
  return order.choice(data.seed, of, number)


def _find_set(name, data) -> str | None:
  """The folder of the prepared set with this name, or the folder itself if `name` is its path."""
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
  """InputError for missing sources, with the command to prepare each missing set."""
  missing = []
  for name, _ in parts(data.images, 'data.images'):
    if name in named or _find_set(name, data) is not None:
      continue
    if name in known.KNOWN or (not os.path.isdir(name) and prepared.begun(name, _data_dir(data))):
      missing.append(name)
    elif not os.path.isdir(name):
      raise InputError(
        f'there are no images {inputs.shown(name)}; set data.images to one of '
        f'{", ".join((*named, "coco", "journeydb"))}, or to a folder of images'
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
      hints.append(f'{name} is partly prepared, and the command resumes')
    if os.path.isdir(name):
      hints.append(f'./{name} names the folder')
  return InputError(
    f'there is no {" and no ".join(names)} in {data_dir}; prepare '
    f'{"it" if len(names) == 1 else "them"} with {" and ".join(commands)}'
    f'{"".join(f" ({hint})" for hint in hints)}, or name other images in data.images'
  )
