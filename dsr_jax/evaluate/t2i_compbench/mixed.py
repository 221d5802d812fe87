"""CLIPScore's texts, and the 3-in-1 score of complex prompts, which mixes all three evaluators.

Source: Karine-Huang/T2I-CompBench, commit 1b70949.
"""

from collections.abc import Sequence

import numpy as np

from dsr_jax.errors import InputError
from dsr_jax.evaluate.t2i_compbench.words import Token

SAMPLES = 10  # the original takes exactly so many pictures of each prompt for granted


def clip_text(tokens: Sequence[Token]) -> str:
  """A complex prompt without its adjectives; tokens joined by blanks, also before marks."""
  return ' '.join(token.text for token in tokens if token.pos != 'ADJ')


def three_in_one(
  prompts: Sequence[str],
  spatial_prompts: Sequence[str],
  action_prompts: Sequence[str],
  *,
  binding: Sequence[float],
  spatial: Sequence[float],
  clip: Sequence[float],
  samples: int = SAMPLES,
) -> np.ndarray:
  """Scores of all pictures, (P * samples,), in the order of the prompts.

  Args:
    prompts: P lines of complex_val.txt.
    spatial_prompts: lines of complex_val_spatial.txt; these are the mean of binding and spatial.
    action_prompts: lines of complex_val_action.txt; the mean of binding and clip. Others are the
      mean of all three.
    binding: (P * samples,), as all three, in the same order.
    spatial: of complex mode.
    clip: of texts without adjectives.
    samples: pictures of a prompt.

  Lines are compared up to their first period, in lower case; a blank that is left over at an end
  prevents a match.
  """
  parts = [np.asarray(values, float) for values in (binding, spatial, clip)]
  wanted = (len(prompts) * samples,)
  for values in parts:
    if values.shape != wanted:
      raise InputError(
        f'found scores of {values.shape[0]} pictures of {len(prompts)} complex prompts; expected '
        f'{samples} of each, {wanted[0]}; evaluate all of them'
      )
  binding, spatial, clip = parts
  is_spatial = np.repeat(_among(prompts, spatial_prompts), samples)
  is_action = np.repeat(_among(prompts, action_prompts), samples)
  return np.select(
    [is_spatial, is_action],
    [(spatial + binding) * 0.5, (clip + binding) * 0.5],
    default=(binding + spatial + clip) / 3,
  )


def _among(prompts, others):
  known = {_key(line) for line in others}
  return np.array([_key(line) in known for line in prompts], bool)


def _key(line):
  return line.strip('\n').split('.')[0].lower()
