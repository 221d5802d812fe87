"""Errors that a user can fix; `cli.run_main` prints them as one line on stderr."""

import textwrap

MOST = 400  # characters quoted from another program's message


class InputError(Exception):
  """Bad input. The message says what was found, what was expected and what to do, in one line."""


def first_line(error: BaseException) -> str:
  """The first line of an error's message; for a group, of its first error."""
  while isinstance(error, BaseExceptionGroup):
    error = error.exceptions[0]
  line = (str(error).strip().splitlines() or [type(error).__name__])[0]
  # Shorten at a word boundary. A single word of that length becomes ' ...'.
  return line if len(line) <= MOST else textwrap.shorten(line, MOST, placeholder=' ...')
