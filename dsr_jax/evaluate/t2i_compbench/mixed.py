"""CLIPScore's texts, and the 3-in-1 score of complex prompts, which mixes all three evaluators.

Source: Karine-Huang/T2I-CompBench, commit 1b70949.
"""

from collections.abc import Sequence

import numpy as np

from dsr_jax.errors import InputError
from dsr_jax.evaluate.t2i_compbench.words import Token

SAMPLES = 10  # images per prompt; the original assumes exactly this number


def clip_text(tokens: Sequence[Token]) -> str:
  """A complex prompt without its adjectives; tokens joined by blanks, even before punctuation."""
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
  """Scores of all images, (P * samples,), in the order of the prompts.

  Args:
    prompts: P lines of complex_val.txt.
    spatial_prompts: lines of complex_val_spatial.txt, scored by the mean of binding and spatial.
    action_prompts: lines of complex_val_action.txt, scored by the mean of binding and clip. All
      others are scored by the mean of all three.
    binding: (P * samples,), like the next two, in the same order.
    spatial: scores in complex mode.
    clip: scores of texts without adjectives.
    samples: images per prompt.

  Lines are compared up to their first period, in lower case; a leading or trailing blank prevents a
  match.
  """
  parts = [np.asarray(values, float) for values in (binding, spatial, clip)]
  wanted = (len(prompts) * samples,)
  for values in parts:
    if values.shape != wanted:
      raise InputError(
        f'got scores for {values.shape[0]} images of {len(prompts)} complex prompts, but each '
        f'prompt has {samples}; evaluate all {wanted[0]} images'
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
