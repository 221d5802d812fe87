"""Uploads exports to the Hugging Face Hub."""

import contextlib
import os

import huggingface_hub
from huggingface_hub import errors

from dsr_jax import cli, inputs
from dsr_jax.convert import writing
from dsr_jax.errors import InputError, first_line


def check(repository: str):
  """InputError unless the repository exists or can be created, and is writable. Called before any
  work.

  A new repository is private.
  """
  if not inputs.is_hub_id(repository):
    raise InputError(
      f'--push_to_hub={repository} is not of the form OWNER/NAME; name a repository on the Hugging '
      'Face Hub'
    )
  if not huggingface_hub.get_token():
    raise InputError(
      'there is no token for the Hugging Face Hub, and --push_to_hub needs one that may write; run '
      'hf auth login, or set HF_TOKEN'
    )
  api = huggingface_hub.HfApi()
  with _answers(f'write {repository}'):
    api.create_repo(repository, private=True, exist_ok=True)
    api.auth_check(repository, write=True)


def push(directory: str, repository: str) -> str:
  """Uploads the exported files of a directory in one commit. Returns the repository's URL.

  InputError if the upload fails; the directory stays complete.
  """
  found = [
    os.path.relpath(os.path.join(folder, name), directory)
    for folder, _, names in os.walk(directory)
    for name in names
  ]
  ours = sorted(path for path in found if writing.is_export(path))
  cli.log(f'uploading    {len(ours)} files to {repository}')
  with _answers(f'upload {directory}, which is complete, to {repository}'):
    done = huggingface_hub.HfApi().upload_folder(
      repo_id=repository,
      folder_path=directory,
      allow_patterns=ours,
      commit_message='Written by dsr_jax',
    )
  return done.commit_url


@contextlib.contextmanager
def _answers(what: str):
  """Turns errors of the Hub or the network into one sentence about the attempted action."""
  try:
    yield
  except errors.HfHubHTTPError as e:
    status = e.response.status_code
    if status in (401, 403, 404):
      raise InputError(
        f'cannot {what} on the Hugging Face Hub with this token ({status}: {first_line(e)}); '
        'it needs write access there: run hf auth login with another, or name a repository of your '
        'own'
      ) from e
    raise InputError(
      f'cannot {what}: the Hugging Face Hub did not accept it ({status}: {first_line(e)}); try '
      'again later'
    ) from e
  except (errors.OfflineModeIsEnabled, errors.HTTPError, OSError) as e:
    raise InputError(
      f'cannot {what}: the Hugging Face Hub cannot be reached ({first_line(e)}); check the network '
      'and HF_HUB_OFFLINE'
    ) from e
