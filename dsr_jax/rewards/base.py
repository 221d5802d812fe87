"""The inputs and the declaration of a reward. A new reward is a function of `RewardInputs` and an
entry in `table.REWARDS`.

Rewards run on the device and are never differentiated.
Axes: B inputs, G samples, T text tokens, N image codes, H W pixels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from dsr_jax import images
from dsr_jax.models.unified import Picture, Scoring, Text, UnifiedModel


class RewardInputs(NamedTuple):
  """The samples for a chunk of inputs, and everything that a reward may use to score them.

  Attributes:
    task: 'generation' or 'understanding'.
    model: the scorer.
    text: generation: the prompts (B, Tp); understanding: the sampled texts (B, G, T), with their
      end-of-text token.
    picture: generation: the drawn images (B, G, ...); understanding: the original ones (B, ...).
    question: the user's turn before the text. generation: the instruction before the prompt in R_G
      (Ti,); understanding: the questions (B, Tq).
    sample_keys: (B, G), the PRNG keys of the samples.
    score_keys: (B,), the PRNG keys for likelihoods; None for a model that needs none.
    extra: the batch fields that the reward declares, (B, ...) or not per input.
    reward_params: the result of the reward's `load`; for `table.score`, a dict of all terms.
    scoring: `Scoring` of plain likelihoods.
    eos_id: the token that ends a text.
    method: `config.Method`.
  """

  task: str
  model: UnifiedModel
  text: Text
  picture: Picture
  question: Text
  sample_keys: Any
  score_keys: Any
  extra: dict[str, Any]
  reward_params: Any
  scoring: Scoring
  eos_id: int
  method: Any


class Reward(NamedTuple):
  """An entry in `table.REWARDS`.

  Attributes:
    function: RewardInputs -> rewards (B, G) float32, higher is better. None: the reward is computed
      outside the step (`rewards.external`).
    fields: names in `data.fields.FIELDS`: the batch fields that it needs beyond prompts and
      images.
    tasks: the tasks that it can reward.
    load: config.Method -> the reward's weights, a pytree of arrays; None: it has no weights.
    self_reward: whether it depends on the scorer, so that live and frozen scorers may differ.
  """

  function: Callable[[RewardInputs], Any] | None
  fields: tuple[str, ...] = ()
  tasks: tuple[str, ...] = ('generation', 'understanding')
  load: Callable[[Any], Any] | None = None
  self_reward: bool = True


def codes_of(model: UnifiedModel, pixels):
  """uint8 pixels (B, H, W, 3) -> their codes (B, N)."""
  return model.picture_from_pixels(images.to_float(pixels)).codes
