"""What a reward is given and what it declares. A new reward is a function of `RewardInputs` and a
line of `table.REWARDS`.

Rewards run on the device and are never differentiated.
Axes: B inputs, G samples, T text tokens, N image codes, H W pixels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from dsr_jax import images
from dsr_jax.models.unified import Picture, Scoring, Text, UnifiedModel


class RewardInputs(NamedTuple):
  """The samples of a chunk of inputs, and whatever may score them.

  Attributes:
    task: 'generation' or 'understanding'.
    model: the scorer.
    text: generation: the prompts (B, Tp); understanding: the sampled texts (B, G, T), with their
      end-of-text token.
    picture: generation: the drawn pictures (B, G, ...); understanding: the original ones (B, ...).
    question: what a text answers. generation: the instruction before the prompt in R_G (Ti,);
      understanding: the questions (B, Tq).
    sample_keys: (B, G), the samples' own keys.
    score_keys: (B,), what likelihoods are given; None for a model that needs none.
    extra: the batch's fields that the reward declares, (B, ...) or of no input in particular.
    reward_params: what the reward's `load` returned; to `table.score`, by name for all terms.
    scoring: `Scoring` of plain likelihoods.
    eos_id: ends a text.
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
  """A line of the table.

  Attributes:
    function: RewardInputs -> rewards (B, G) float32, the higher the better. None: who gives them
      is no part of the step (`rewards.external`).
    fields: names in `data.fields.FIELDS`: what it needs of each batch beyond prompts and pictures.
    tasks: those that it can reward.
    load: config.Method -> weights of its own, a pytree of arrays; None: it has none.
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
