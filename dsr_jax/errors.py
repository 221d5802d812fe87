"""Errors a user can mend, and the border where they become one sentence on stderr."""

import sys

from absl import app


class InputError(Exception):
  """Bad input. The message says what was found, what was expected and what to do."""


def run_main(main):
  """Runs `main(argv)` under absl; an InputError becomes one line on stderr and exit status 2."""

  def guarded(argv):
    try:
      return main(argv)
    except InputError as e:
      print(f'error: {e}', file=sys.stderr)
      return 2

  app.run(lambda argv: sys.exit(guarded(argv)))
