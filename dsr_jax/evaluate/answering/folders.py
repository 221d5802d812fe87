"""The files that answering writes into a benchmark's folder, and which model they belong to.

    manifest.json     the model, how it drew or answered, the versions; written first
    ...               the official scorer's own folders and files (drawing)
    rewards/          of drawn images: {path: R_G}, one file per chunk
    candidates/       with the best of N: all candidates for a few images, as PNG
    answers/          {question: answer}, one file per chunk (asking)

Files are written atomically. The files of a chunk of images are first put into one file,
`pending.zip`, and then unpacked: if the process is killed while unpacking, the next one resumes
without drawing anything again, and chunks keep their composition, on which the last bits of a
number may depend.
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
# Parts of a manifest that must be the same to resume in a folder.
FIXED = ('benchmark', 'model', 'settings')
NO_MATTER = ('model.name',)  # the same weights may have another name


def claim(folder: str, manifest: dict[str, Any]) -> None:
  """Claims a folder for a model and its settings, or resumes in it.

  Args:
    folder: of the benchmark.
    manifest: JSON values; `benchmark`, `model` and `settings` must be those of the folder.

  Errors: InputError if the folder has another model's answers, or unrelated files.
  """
  check(folder, manifest)
  path = os.path.join(folder, MANIFEST)
  if not os.path.isfile(path):
    files.write_json(path, manifest, indent=1)


def check(folder: str, manifest: dict[str, Any]) -> None:
  """Raises the InputError of `claim`, but writes nothing."""
  found = read(folder)
  if found is None:
    strangers = [n for n in _names(folder) if not n.startswith('.') and n != f'{MANIFEST}.new']
    if strangers:
      raise InputError(
        f'{folder} contains {strangers[0]} but no {MANIFEST}, so it is not an earlier output of '
        'this command; name another --output'
      )
    return
  different = differences(found, manifest)
  if different:
    raise InputError(
      f'{folder} has answers of another model or with other settings ({"; ".join(different)}); '
      'name another --output, or remove that folder'
    )


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
  """What prevents resuming, such as `settings.temperature: 1.0 there, 0.5 now`."""
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
  """A model's name in the names of folders and files: `runs/a@20` is `a@20`."""
  return re.sub(r'[^\w.@-]+', '-', os.path.basename(os.path.abspath(model))) or 'model'


def digest_of(names: Iterable[str]) -> str:
  """Part of a file name that identifies the file's members: other members give another name."""
  return f'{zlib.crc32(chr(10).join(names).encode()):08x}'


# Several files at once.


def write_all(folder: str, contents: dict[str, bytes]) -> None:
  """Writes files below a folder. If the process is killed in between, the rest is written when the
  next one calls `recover`, before it resumes.
  """
  packed = io.BytesIO()
  with zipfile.ZipFile(packed, 'w') as f:
    for path, data in contents.items():
      f.writestr(zipfile.ZipInfo(path), data)
  files.write_bytes(os.path.join(folder, PENDING), packed.getvalue())
  recover(folder)


def recover(folder: str) -> None:
  """Unpacks files that an earlier process did not unpack."""
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
  """The JSON objects in a folder's files whose names begin with `prefix`, merged into one; later
  files take precedence. Empty if there is no folder.
  """
  joined = {}
  for name in _names(folder):
    if name.startswith(prefix) and name.endswith('.json'):
      joined |= files.read_json(os.path.join(folder, name))
  return joined
