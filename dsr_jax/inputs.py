"""Checks input from outside: files, paths, texts and numbers."""

import math
import numbers
import os
import re
import stat
import unicodedata

from dsr_jax.errors import InputError

MOST_SAMPLES = 4096  # of one input
_HUB_ID = re.compile(r'[\w-][\w.-]*/[\w-][\w.-]*')
_INVISIBLE = ('Cc', 'Cf', 'Zs', 'Zl', 'Zp')  # control, format, and three kinds of spaces
_KINDS = (
  (stat.S_ISDIR, 'a folder'),
  (stat.S_ISFIFO, 'a pipe'),
  (stat.S_ISSOCK, 'a socket'),
  (stat.S_ISCHR, 'a device'),
  (stat.S_ISBLK, 'a device'),
)


def open_plain(path, expected: str):
  """Opens a regular file for reading bytes; follows links.

  Refuses pipes, which could block forever, and devices, which may never end.

  Args:
    path: str, bytes or os.PathLike.
    expected: for the error, what should be there: 'a text file with one prompt per line'.

  Raises:
    InputError: the file does not exist, may not be read, or is not a regular file.
  """
  try:
    # Check before and after opening: opening some devices has side effects, and the name may come
    # to mean another file in between.
    _check_plain(os.stat(path), path, expected)
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
  except (OSError, ValueError) as e:  # ValueError: a NUL in the name
    reason = getattr(e, 'strerror', None) or e
    raise InputError(
      f'cannot read {shown(path)} ({reason}), which should be {expected}; check the path'
    ) from e
  try:
    _check_plain(os.fstat(file), path, expected)
    return open(file, 'rb')
  except BaseException:
    os.close(file)
    raise


def _check_plain(status, path, expected):
  if stat.S_ISREG(status.st_mode):
    return
  kind = next((name for is_kind, name in _KINDS if is_kind(status.st_mode)), 'not a regular file')
  raise InputError(
    f'cannot read {shown(path)}: it is {kind}, but should be {expected}; name a file'
  )


def expanded(path: str, name: str) -> str:
  """Expands a path like a shell: replaces `~`, `~user`, `$VAR` and `${VAR}`.

  name: the flag or key, for the error. A path that exists and contains a dollar sign is kept.
  Errors: InputError for a variable that is not set, and for a user that does not exist.
  """
  found = os.path.expanduser(os.path.expandvars(path))
  unknown = re.search(r'\$(\w+|\{[^}]*\})', found)
  if unknown and not os.path.lexists(found):
    raise InputError(
      f'{name}={shown(path)} contains the variable {unknown[0]}, which is not set; set it, or '
      'write the path itself'
    )
  if found.startswith('~'):
    raise InputError(
      f'{name}={shown(path)} names a user that does not exist here; write the full path, from /'
    )
  return found


def shown(path) -> str:
  r"""A path as text for people and JSON: bytes that are not UTF-8 appear as \xe9."""
  return os.fsencode(path).decode('utf-8', 'backslashreplace')


def check_text(**values):
  """InputError for the first of the named flags whose value contains bytes that are not UTF-8.

  Python represents them as lone surrogates, on which every tokenizer fails.
  """
  for name, value in values.items():
    if value is not None and not is_text(value):
      raise InputError(
        f'--{name}={shown(value)} contains bytes that are not UTF-8; type it again, or set the '
        'terminal to UTF-8'
      )


def is_hub_id(name: str) -> bool:
  """Whether a name has the form of a Hub repository, OWNER/NAME."""
  return bool(_HUB_ID.fullmatch(name))


def is_visible(text: str) -> bool:
  """Whether a text has visible characters; a byte order mark or a zero-width space is not one."""
  return any(unicodedata.category(c) not in _INVISIBLE for c in text)


def is_text(value: str) -> bool:
  """Whether a str can be written as UTF-8."""
  try:
    value.encode('utf-8')
  except UnicodeEncodeError:
    return False
  return True


# Numbers in flags ('--seed') and arguments ('seed').


def check_sampling(num_samples, temperature, seed, cfg_weight=None, dashes: str = ''):
  """InputError for numbers that no model can sample with. dashes: prefix of their names."""
  check_whole(f'{dashes}num_samples', num_samples, 1, MOST_SAMPLES)
  check_whole(f'{dashes}seed', seed, 0, 2**32 - 1)
  _check_real(f'{dashes}temperature', temperature, '0 (greedy) or more')
  if cfg_weight is not None:
    _check_real(f'{dashes}cfg_weight', cfg_weight, '0 or more (1 turns guidance off)')


def check_whole(name: str, value, low: int, high: int | None = None):
  """InputError unless a value is a whole number in this range."""
  whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
  if not whole or value < low or (high is not None and value > high):
    least = f'of at least {low}' if high is None else f'from {low} to {high}'
    raise InputError(f'{name} is {value!r}; set it to a whole number {least}')


def _check_real(name, value, expected):
  real = isinstance(value, numbers.Real) and not isinstance(value, bool)
  if not real or not 0 <= value < math.inf:
    raise InputError(f'{name} is {value!r}; set it to {expected}')
