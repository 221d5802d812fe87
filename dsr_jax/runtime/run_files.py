"""Turns errors of the file system, and damage in a run's files, into one-sentence errors."""

import contextlib
import errno
import json
import os

from dsr_jax.errors import InputError


@contextlib.contextmanager
def writing(path):
  """Turns an OSError inside into an InputError about `path`: no room, no permission, too many open
  files, or gone.
  """
  try:
    yield
  except OSError as e:
    where = e.filename or path
    if e.errno in (errno.ENOENT, errno.ESTALE):
      raise InputError(
        f'{where} was removed while the run was using it; restore its folder, or start again with '
        'another --workdir'
      ) from e
    raise InputError(
      f'cannot write {where} ({e.strerror or e}); check its free space and permissions, then run '
      'the same command to resume from the last complete checkpoint'
    ) from e


@contextlib.contextmanager
def reading(path):
  """Turns an OSError inside into an InputError about an existing file of a run."""
  try:
    yield
  except OSError as e:
    raise InputError(
      f'cannot read {path} ({e.strerror or e}), which should be a file of a run; fix its '
      'permissions, or name another run'
    ) from e


def read_json(path, missing: str) -> dict:
  """The JSON object in a file that a run wrote.

  missing: the end of the error if there is no such file. InputError also if the file is damaged.
  """
  if not os.path.isfile(path):
    raise InputError(f'{path} does not exist; {missing}')
  try:
    with reading(path), open(path, 'rb') as f:
      content = json.loads(f.read())
  except (ValueError, RecursionError) as e:
    raise damaged(path, 'it is not JSON') from e
  if not isinstance(content, dict):
    raise damaged(path, f'it holds a {type(content).__name__}, not an object')
  return content


def damaged(path, what) -> InputError:
  """The error for a file of a run that does not have the content that the run wrote."""
  return InputError(
    f'cannot read {path} ({what}), which should hold what the run wrote; restore it from a copy, '
    'or name another run'
  )
