"""Errors a user can mend; `cli.run_main` is the border where they become one sentence on stderr."""


class InputError(Exception):
  """Bad input. The message says what was found, what was expected and what to do."""


def first_line(error: BaseException) -> str:
  """What an error says first, for a sentence about it; of a group, the first error."""
  while isinstance(error, BaseExceptionGroup):
    error = error.exceptions[0]
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
