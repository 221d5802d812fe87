"""The records that pass through a step: batch -> inputs -> rollout -> half -> loss.

Axes: B inputs of a task, G samples per input, C samples that learn (2 of a pair, 1, or all G),
T tokens, N image codes, H W pixels.
"""

from typing import Any, NamedTuple

import jax

from dsr_jax.models.unified import Text


class GenerationBatch(NamedTuple):
  """The generation half of a batch.

  extra: per-input fields, (B, ...), that the reward declares (`data.fields`).
  """

  prompt: Text  # (B, Tp)
  instruction: Text  # (Ti,), precedes the prompt in R_G
  extra: dict[str, Any]


class UnderstandingBatch(NamedTuple):
  """The understanding half of a batch. extra: see `GenerationBatch`."""

  pixels: jax.Array  # (B, H, W, 3) uint8
  question: Text  # (B, Tq)
  extra: dict[str, Any]


class Batch(NamedTuple):
  """A step's inputs. The half of a task that does not learn in this step is None.

  With the strategy `separate`, the batch therefore determines which role learns, and each role has
  its own compiled program.
  """

  seed: jax.Array  # () uint32
  generation: GenerationBatch | None = None
  understanding: UnderstandingBatch | None = None
  shared: dict[str, Any] = {}  # fields that are not per input, (any,)
  learning_rate: jax.Array | None = None  # () float32, if runs with several rates share a program


class GenerationInputs(NamedTuple):
  """The inputs of generation, one row per input; chunks are slices of it.

  place (B,): each input's global index in the step, from which its PRNG keys are derived.
  """

  prompt: Text  # (B, Tp)
  place: jax.Array
  extra: dict[str, Any]


class UnderstandingInputs(NamedTuple):
  """The inputs of understanding. place and extra: see `GenerationInputs`."""

  pixels: jax.Array  # (B, H, W, 3) uint8
  question: Text  # (B, Tq)
  place: jax.Array
  extra: dict[str, Any]


class Scorers(NamedTuple):
  """The models that compute rewards. The two flags are scalars: whether this step runs the
  measurement.
  """

  scorer: Any  # the model that `method.scorer` names
  reward_params: Any  # weights of the rewards that have some, by name
  frozen: Any  # the initial model, for the log; None if it is not kept
  frozen_due: jax.Array
  probe_due: jax.Array


class Rewards(NamedTuple):
  """The samples' rewards, (B, G) each.

  live: from the scorer; the loss uses these. frozen: from the initial model; nan if it did not
  score. terms {name: (B, G)}: for a sum of rewards, each unweighted term; otherwise empty.
  """

  live: jax.Array
  frozen: jax.Array
  terms: dict[str, jax.Array]


class Rollout(NamedTuple):
  """A task's samples in a step and their rewards.

  samples: codes (B, G, N), or Text (B, G, T). sample_logps (B, G, N or T): under the distribution
  that sampled. rewards (B, G). frozen_rewards (B, G): from the initial model; nan if it did not
  score. score_keys (B,): the PRNG keys of every likelihood of these samples, or None. target_codes
  (B, N): understanding: the codes of the original image. diagnostics: per-input numbers (B,).
  pixels (B, G, H, W, 3) uint8: generation with an external reward; otherwise None. credit
  (B, G, N): weights of the codes in the loss; None: all weigh the same.
  """

  samples: Any
  sample_logps: jax.Array
  rewards: jax.Array
  frozen_rewards: jax.Array
  score_keys: jax.Array | None
  target_codes: jax.Array | None
  diagnostics: dict[str, jax.Array]
  pixels: jax.Array | None = None
  credit: jax.Array | None = None


class LearnerScores(NamedTuple):
  """The policy's scores of the samples that learn, (B, C, T) each. credit: see `Rollout`."""

  logps: jax.Array
  entropy: jax.Array
  mask: jax.Array
  sample_logps: jax.Array
  credit: jax.Array | None = None


class Half(NamedTuple):
  """One task's half of a step, between sampling and learning.

  learners (B, C): indices of the samples that learn. weight (B,): 0 if the group gives no
  gradient. pair (B, 2), pair_weight (B,): indices of the best and the worst sample, and whether
  their rewards differ, for the log.
  ref_logps (B, C, T): None if the objective has no KL. All fields but the first two are None until
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
  """One update's values for the log: the loss and its inputs, (B, C, T) each. credit: see
  `Rollout`.
  """

  loss: jax.Array | None  # None until chunks are summed
  logps: jax.Array
  old_logps: jax.Array
  ref_logps: jax.Array | None
  mask: jax.Array
  sample_logps: jax.Array
  entropy: jax.Array
  credit: jax.Array | None = None
