"""What answering leaves in a benchmark's folder, and whose it is.

    manifest.json     the model, how it drew or answered, the versions; written first
    ...               the official scorer's own folders and files (drawing)
    rewards/          of drawn images: {path: R_G}, a file a chunk
    candidates/       with the best of N: all candidates of a few images, as PNG
    answers/          {question: answer}, a file a chunk (asking)

A file appears complete. The files of a chunk of images are first put into one file,
`pending.zip`, and then unpacked: a process that is killed between two of them goes on without
drawing anything again, and chunks keep their composition, on which the last bits of a number may
depend.
"""

from collections.abc import Iterable
import io
import os
import re
from typing import Any
import zipfile
import zlib

from dsr_jax import files, saved_config
from dsr_jax.errors import InputError

MANIFEST = 'manifest.json'
PENDING = 'pending.zip'
# Parts of a manifest that must be the same for a folder to be gone on with.
FIXED = ('benchmark', 'model', 'settings')
NO_MATTER = ('model.name',)  # the same weights by another name


def claim(folder: str, manifest: dict[str, Any]) -> None:
  """Takes a folder for a model and its settings, or goes on with it.

  Args:
    folder: of the benchmark.
    manifest: JSON values; `benchmark`, `model` and `settings` must be those of the folder.

  Errors: InputError if it holds another model's answers, or something that is none.
  """
  check(folder, manifest)
  path = os.path.join(folder, MANIFEST)
  if not os.path.isfile(path):
    files.write_json(path, manifest, indent=1)


def check(folder: str, manifest: dict[str, Any]) -> None:
  """The InputError of `claim`, without writing."""
  found = read(folder)
  if found is None:
    strangers = [n for n in _names(folder) if not n.startswith('.') and n != f'{MANIFEST}.new']
    if strangers:
      raise InputError(
        f'found {strangers[0]} and no {MANIFEST} in {folder}; expected a new folder, or an earlier '
        'output of this command; name another --output'
      )
    return
  different = differences(found, manifest)
  if different:
    raise InputError(
      f'found answers of another model or of other settings in {folder} ({"; ".join(different)}); '
      'expected the same; name another --output, or remove that folder'
    )


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
  """What forbids to go on, as `settings.temperature: 1.0 there, 0.5 now`."""
  one, other = (
    saved_config.flat({name: manifest.get(name, {}) for name in FIXED})
    for manifest in (found, wanted)
  )
  return [
    f'{key}: {one.get(key, "none")} there, {other.get(key, "none")} now'
    for key in sorted(one.keys() | other.keys())
    if key not in NO_MATTER and one.get(key) != other.get(key)
  ]


def read(folder: str) -> dict[str, Any] | None:
  """The manifest of a folder, None if it has none."""
  return files.read_json_or_none(os.path.join(folder, MANIFEST))


def _names(folder):
  return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def short_name(model: str) -> str:
  """What a model is called in the names of folders and files: `runs/a@20` is `a@20`."""
  return re.sub(r'[^\w.@-]+', '-', os.path.basename(os.path.abspath(model))) or 'model'


def digest_of(names: Iterable[str]) -> str:
  """In the names of files that hold something of several: other members, another name."""
  return f'{zlib.crc32(chr(10).join(names).encode()):08x}'


# Several files at once.


def write_all(folder: str, contents: dict[str, bytes]) -> None:
  """Writes files below a folder: all of them, also if the process is killed in between, since
  whoever goes on calls `recover` first.
  """
  packed = io.BytesIO()
  with zipfile.ZipFile(packed, 'w') as f:
    for path, data in contents.items():
      f.writestr(zipfile.ZipInfo(path), data)
  files.write_bytes(os.path.join(folder, PENDING), packed.getvalue())
  recover(folder)


def recover(folder: str) -> None:
  """Unpacks what an earlier process did not get to unpack."""
  pending = os.path.join(folder, PENDING)
  if not os.path.isfile(pending):
    return
  with zipfile.ZipFile(pending) as f:
    for path in f.namelist():
      target = os.path.join(folder, path)
      if not os.path.isfile(target):
        files.write_bytes(target, f.read(path))
  os.unlink(pending)


def read_all(folder: str, prefix: str = '') -> dict[str, Any]:
  """The JSON objects in the files of a folder whose names begin so, as one; of two values of a key
  the later file's. Empty where there is no folder.
  """
  joined = {}
  for name in _names(folder):
    if name.startswith(prefix) and name.endswith('.json'):
      joined |= files.read_json(os.path.join(folder, name))
  return joined
