"""What comes from outside: files that must be plain ones, and bytes that may be no text."""

import math
import numbers
import os
import re
import stat
import unicodedata

from dsr_jax.errors import InputError

MOST_SAMPLES = 4096  # of one input
_HUB_ID = re.compile(r'[\w-][\w.-]*/[\w-][\w.-]*')
_INVISIBLE = ('Cc', 'Cf', 'Zs', 'Zl', 'Zp')  # control, format, and spaces of three kinds
_KINDS = (
  (stat.S_ISDIR, 'a folder'),
  (stat.S_ISFIFO, 'a pipe'),
  (stat.S_ISSOCK, 'a socket'),
  (stat.S_ISCHR, 'a device'),
  (stat.S_ISBLK, 'a device'),
)


def open_plain(path, expected: str):
  """A plain file, open for reading bytes; links are followed.

  A pipe would be waited for without end, and a device may give bytes without end: both are refused
  at once.

  Args:
    path: str, bytes or os.PathLike.
    expected: what should be there, for the error: 'a text file with a line a prompt'.

  Raises:
    InputError: where there is no file, no leave to read it, or no plain file.
  """
  try:
    # Looked at before and after it is opened: opening some devices does something, and what the
    # name stands for may change between the two.
    _check_plain(os.stat(path), path, expected)
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
  except (OSError, ValueError) as e:  # ValueError: a NUL in the name
    reason = getattr(e, 'strerror', None) or e
    raise InputError(
      f'cannot read {shown(path)} ({reason}); expected {expected}; check the path'
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
  kind = next((name for is_kind, name in _KINDS if is_kind(status.st_mode)), 'no plain file')
  raise InputError(f'found {kind} at {shown(path)}; expected {expected}; name a file')


def expanded(path: str, name: str) -> str:
  """A path as a shell's user means it: `~`, `~user`, `$VAR` and `${VAR}` replaced.

  name: of the flag or the key, for the error. A file whose very name has a dollar in it is left as
  it is. Errors: InputError for a variable that is not set, and for a user who does not exist.
  """
  found = os.path.expanduser(os.path.expandvars(path))
  unknown = re.search(r'\$(\w+|\{[^}]*\})', found)
  if unknown and not os.path.lexists(found):
    raise InputError(
      f'found the variable {unknown[0]} in {name}={shown(path)}, which is not set; expected a '
      'path; set it, or write the path itself'
    )
  if found.startswith('~'):
    raise InputError(
      f'found {name}={shown(path)}, whose user is not known here; expected a path; write it from /'
    )
  return found


def shown(path) -> str:
  r"""A path for people and for JSON: bytes that are not UTF-8 are written as \xe9."""
  return os.fsencode(path).decode('utf-8', 'backslashreplace')


def check_text(**values):
  """InputError for the first of the named flags whose value holds bytes that are not UTF-8.

  Python hides them in a text as lone surrogates, at which every tokenizer fails.
  """
  for name, value in values.items():
    if value is not None and not is_text(value):
      raise InputError(
        f'found bytes that are not UTF-8 in --{name}={shown(value)}; expected UTF-8 text; '
        'write it again, or set the terminal to UTF-8'
      )


def is_hub_id(name: str) -> bool:
  """Whether a name has the form of a repository's on the Hub, OWNER/NAME."""
  return bool(_HUB_ID.fullmatch(name))


def is_visible(text: str) -> bool:
  """Whether a text has anything to see: a byte order mark or a zero-width space is no text."""
  return any(unicodedata.category(c) not in _INVISIBLE for c in text)


def is_text(value: str) -> bool:
  """Whether a str can be written as UTF-8."""
  try:
    value.encode('utf-8')
  except UnicodeEncodeError:
    return False
  return True


# Numbers, of flags ('--seed') and of arguments ('seed').


def check_sampling(num_samples, temperature, seed, cfg_weight=None, dashes: str = ''):
  """InputError for numbers that no model can sample with; dashes: before their names."""
  check_whole(f'{dashes}num_samples', num_samples, 1, MOST_SAMPLES)
  check_whole(f'{dashes}seed', seed, 0, 2**32 - 1)
  _check_real(f'{dashes}temperature', temperature, '0 (greedy) or more')
  if cfg_weight is not None:
    _check_real(f'{dashes}cfg_weight', cfg_weight, '0 or more (1 is without guidance)')


def check_whole(name: str, value, low: int, high: int | None = None):
  """InputError unless a value is a whole number of this range."""
  whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
  if not whole or value < low or (high is not None and value > high):
    least = f'at least {low}' if high is None else f'{low} to {high}'
    raise InputError(f'found {name}={value!r}; expected a whole number, {least}; change it')


def _check_real(name, value, expected):
  real = isinstance(value, numbers.Real) and not isinstance(value, bool)
  if not real or not 0 <= value < math.inf:
    raise InputError(f'found {name}={value!r}; expected {expected}; change it')
