"""Errors a user can mend; `cli.run_main` is the border where they become one sentence on stderr."""

import textwrap

MOST = 400  # characters of another program's words in a sentence of ours


class InputError(Exception):
  """Bad input. The message says what was found, what was expected and what to do."""


def first_line(error: BaseException) -> str:
  """What an error says first, for a sentence about it; of a group, the first error."""
  while isinstance(error, BaseExceptionGroup):
    error = error.exceptions[0]
  line = (str(error).strip().splitlines() or [type(error).__name__])[0]
  # What is longer ends after a whole word; a single word of that length is no reason.
  return line if len(line) <= MOST else textwrap.shorten(line, MOST, placeholder=' ...')
