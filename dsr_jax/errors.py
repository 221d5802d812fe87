"""Errors a user can mend, and the border where they become one sentence on stderr."""

import sys
import textwrap

from absl import app, logging

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


def run_main(main, check_flags=None):
  """Runs `main(argv)` under absl; an InputError becomes one line on stderr and exit status 2.

  check_flags(arguments) runs before absl reads the flags: what absl would answer with a traceback
  is found there.
  """

  def guarded(argv, body=main):
    # Orbax tells a dozen lines a checkpoint, and warns of folders that are only to be read.
    logging.set_verbosity(logging.ERROR)
    try:
      return body(argv)
    except InputError as e:
      print(f'error: {e}', file=sys.stderr)
      return 2

  if check_flags and guarded(sys.argv[1:], check_flags):
    sys.exit(2)
  app.run(lambda argv: sys.exit(guarded(argv)))
