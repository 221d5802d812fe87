"""The sheet of a step: its first inputs and their candidates with rewards, with the chosen and the
rejected marked.
"""

from dsr_jax.reporting import sheets
from dsr_jax.rows import Candidates

SHOWN = 3  # inputs of each task


def sheet(found: list[Candidates]):
  """The candidates of a step's tasks (`rows.StepRows`) -> PIL image."""
  parts = []
  for one in found:
    first = slice(SHOWN)
    marks = one.rewards[first], one.chosen[first], one.rejected[first]
    if one.texts is None:
      parts.append(sheets.candidates(one.prompts[first], one.pixels[first], *marks))
    else:
      parts.append(sheets.captions(one.pixels[first], one.texts[first], *marks))
  return sheets.stack(parts)
