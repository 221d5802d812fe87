"""The records that travel through a step: batch -> inputs -> rollout -> half -> loss.

Axes: B inputs of a task, G samples of an input, C samples that learn (2 of a pair, 1, or all G),
T tokens, N image codes, H W pixels.
"""

from typing import Any, NamedTuple

import jax

from dsr_jax.models.unified import Text


class GenerationBatch(NamedTuple):
  """The generation half of a batch.

  extra: fields of each input, (B, ...), that the reward declares (`data.fields`).
  """

  prompt: Text  # (B, Tp)
  instruction: Text  # (Ti,), stands before the prompt in R_G
  extra: dict[str, Any]


class UnderstandingBatch(NamedTuple):
  """The understanding half of a batch; extra: as in `GenerationBatch`."""

  pixels: jax.Array  # (B, H, W, 3) uint8
  question: Text  # (B, Tq)
  extra: dict[str, Any]


class Batch(NamedTuple):
  """A step's inputs. The half of a task that does not learn in this step is None.

  So with the strategy `separate` the batch says whose turn it is, and there is one program a role.
  """

  seed: jax.Array  # () uint32
  generation: GenerationBatch | None = None
  understanding: UnderstandingBatch | None = None
  shared: dict[str, Any] = {}  # fields of no input in particular, (any,)
  learning_rate: jax.Array | None = None  # () float32, where runs of several share the program


class GenerationInputs(NamedTuple):
  """What pictures are drawn for, a row an input: chunks are parts of it.

  place (B,): an input's global place in the step, which its random keys come from.
  """

  prompt: Text  # (B, Tp)
  place: jax.Array
  extra: dict[str, Any]


class UnderstandingInputs(NamedTuple):
  """What texts are written about; place and extra: as in `GenerationInputs`."""

  pixels: jax.Array  # (B, H, W, 3) uint8
  question: Text  # (B, Tq)
  place: jax.Array
  extra: dict[str, Any]


class Scorers(NamedTuple):
  """Who rewards. The two flags are scalars: whether this step's turn for a measurement has come."""

  scorer: Any  # the model that `method.scorer` names
  reward_params: Any  # weights of the rewards that have their own, by name
  frozen: Any  # the initial model, for the log; None if it is not kept
  frozen_due: jax.Array
  probe_due: jax.Array


class Rewards(NamedTuple):
  """What samples are worth, (B, G) each.

  live: by the scorer, learned from. frozen: by the initial model, nan where it did not score.
  terms {name: (B, G)}: of a sum of rewards, each alone and unweighted; else nothing.
  """

  live: jax.Array
  frozen: jax.Array
  terms: dict[str, jax.Array]


class Rollout(NamedTuple):
  """A task's samples of a step and what they are worth.

  samples: codes (B, G, N), or Text (B, G, T). sample_logps (B, G, N or T): under the distribution
  that sampled. rewards (B, G). frozen_rewards (B, G): by the initial model, nan where it did not
  score. score_keys (B,): what every likelihood of these samples is given, or None. target_codes
  (B, N): understanding: the codes of the original picture. diagnostics: numbers of each input (B,).
  pixels (B, G, H, W, 3) uint8: generation: where somebody outside of the step is asked; else None.
  """

  samples: Any
  sample_logps: jax.Array
  rewards: jax.Array
  frozen_rewards: jax.Array
  score_keys: jax.Array | None
  target_codes: jax.Array | None
  diagnostics: dict[str, jax.Array]
  pixels: jax.Array | None = None


class LearnerScores(NamedTuple):
  """The policy's view of the samples that learn, (B, C, T) each."""

  logps: jax.Array
  entropy: jax.Array
  mask: jax.Array
  sample_logps: jax.Array


class Half(NamedTuple):
  """One task's half of a step, between sampling and learning.

  learners (B, C): indices of the samples that are learned from. weight (B,): 0 where the group
  gives no gradient. pair (B, 2), pair_weight (B,): best and worst, and whether their rewards
  differ, for the log.
  ref_logps (B, C, T): None where the objective has no KL. All but the first two are None until
  every reward is known.
  """

  inputs: Any  # GenerationInputs or UnderstandingInputs
  rollout: Rollout
  learners: Any = None
  weight: Any = None
  pair: Any = None
  pair_weight: Any = None
  ref_logps: jax.Array | None = None


class UpdateAux(NamedTuple):
  """What one update leaves for the log: the loss and, (B, C, T) each, what it was computed from."""

  loss: jax.Array | None  # None until chunks are summed
  logps: jax.Array
  old_logps: jax.Array
  ref_logps: jax.Array | None
  mask: jax.Array
  sample_logps: jax.Array
  entropy: jax.Array
