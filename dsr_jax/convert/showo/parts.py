"""Locates the three parts of a Show-o: the model, its image tokenizer, and its text tokenizer.

On the Hub, they are three repositories. On disk, they are in one directory, as this project writes
them, or side by side, as downloaded:

  DIR/                       config.json, pytorch_model.safetensors or .bin, tokenizer.json
  DIR/magvitv2/              config.json, pytorch_model.safetensors or .bin

  show-o-512x512/            config.json, pytorch_model.*
  magvitv2/                  config.json, pytorch_model.*
  phi-1_5/                   tokenizer.json
"""

import hashlib
import os
import pathlib
from typing import NamedTuple

import huggingface_hub

from dsr_jax import files
from dsr_jax.errors import InputError, first_line

MAGVIT, PHI = 'magvitv2', 'phi-1_5'
REPOSITORIES = {MAGVIT: f'showlab/{MAGVIT}', PHI: f'microsoft/{PHI}'}
_FETCHED = ('*.json', '*.txt', '*.safetensors', 'LICENSE*', 'README.md')


class Parts(NamedTuple):
  """The directories of a Show-o's parts."""

  model: pathlib.Path
  magvit: pathlib.Path
  tokenizer: pathlib.Path


def is_showo(content) -> bool:
  """Whether a config.json object belongs to a Show-o."""
  return content.get('_class_name') == 'Showo'


def settings(content) -> dict:
  """The original's settings for drawing and reading (`directory.Reader`). Its own guidance weights,
  5 at 512 pixels and 1.75 at 256, count from the conditional.
  """
  return dict(guidance=6.0 if content.get('num_vq_tokens') == 1024 else 2.75, crop='crop')


def find(directory) -> Parts:
  """The parts of the Show-o whose model is in `directory`. InputError naming missing parts."""
  directory = pathlib.Path(directory)
  beside = directory.resolve().parent
  magvit = _first(directory / MAGVIT, beside / MAGVIT, having='config.json')
  tokenizer = tokenizer_of(directory)
  lacking = []
  if magvit is None:
    lacking.append(f'the image tokenizer ({REPOSITORIES[MAGVIT]}) as {directory / MAGVIT}')
  if tokenizer is None:
    lacking.append(f"the text tokenizer's tokenizer.json ({REPOSITORIES[PHI]}) in {directory}")
  if lacking:
    raise InputError(
      f'the Show-o in {directory} lacks {" and ".join(lacking)}, or beside it; fetch what is '
      'missing, or name the model by its Hub id'
    )
  return Parts(directory, magvit, tokenizer)


def tokenizer_of(directory) -> pathlib.Path | None:
  """The path of the text tokenizer of the Show-o in `directory`; None if there is none."""
  beside = directory.resolve().parent
  return _first(directory, directory / PHI, beside / PHI, having='tokenizer.json')


def refuse_lone_magvit(directory, content):
  """InputError if a directory has only the image tokenizer."""
  if content.get('_class_name') == 'MAGVITv2':
    raise InputError(
      f'{directory} has only an image tokenizer; name the directory of a whole Show-o, which has '
      f'it as {MAGVIT}/'
    )


def fetched(hub_id: str, directory: str) -> str:
  """The snapshot of a Hub repository; for a Show-o, a directory with links to it and to the two
  other repositories that it needs.
  """
  if not is_showo(files.read_json(os.path.join(directory, 'config.json'), default={})):
    return directory
  if _first(pathlib.Path(directory) / MAGVIT, having='config.json'):
    return directory  # written by this project, so complete
  others = {name: _snapshot(repository) for name, repository in REPOSITORIES.items()}
  # Links to the three snapshots, in a directory named after them, so a newer revision gets its own.
  sources = [directory, *others.values()]
  digest = hashlib.sha256('\0'.join(map(os.path.realpath, sources)).encode()).hexdigest()[:12]
  cache = pathlib.Path(huggingface_hub.constants.HF_HUB_CACHE) / 'dsr_jax'
  whole = cache / f'{hub_id.replace("/", "--")}-{digest}'
  whole.mkdir(parents=True, exist_ok=True)
  for path in pathlib.Path(directory).iterdir():
    _link(whole / path.name, path)
  for name, snapshot in others.items():
    _link(whole / name, pathlib.Path(snapshot))
  return str(whole)


def _link(link, target):
  if not link.exists():
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.realpath(target))


def _snapshot(repository):
  weights = repository == REPOSITORIES[MAGVIT]
  try:
    directory = huggingface_hub.snapshot_download(
      repository, allow_patterns=_FETCHED if weights else ('*token*', '*.txt', 'LICENSE*')
    )
    if weights and not list(pathlib.Path(directory).glob('*.safetensors')):
      directory = huggingface_hub.snapshot_download(repository, allow_patterns=(*_FETCHED, '*.bin'))
    return directory
  except Exception as e:  # the Hub's own errors, those of two HTTP libraries, and OSError
    raise InputError(
      f'could not fetch {repository}, which a Show-o needs, from the Hub or the cache '
      f'({first_line(e)}); connect to the network once so that it is kept'
    ) from e


def _first(*directories, having):
  return next((path for path in directories if (path / having).is_file()), None)
