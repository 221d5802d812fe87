"""The parts of a step: every sample with its log-probabilities and reward, which samples learn and
how strongly, and what each input contributed to the gradient.

Only the step itself (`step.train_step`) reproduces a run bit for bit. This module runs the step's
own functions (`step.rollout`, `step.task_gradient`, `step.group_loss`) one by one on the same
state, so that their intermediate values can be inspected; the same keys give the same samples.

Axes: B inputs of a task, G samples, C samples that learn, T tokens.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax import chunks, cli
from dsr_jax import step as step_lib
from dsr_jax.diagnostics import take
from dsr_jax.models.unified import Text
from dsr_jax.rollouts import Half
from dsr_jax.state import TrainState


class Seen(NamedTuple):
  """A task's half of a step; the arrays are on the host.

  Attributes:
    samples: codes (B, G, N), or `Text` (B, G, T).
    logps, mask: (B, G, T) under the policy being trained, as the loss uses them.
    rewards: (B, G).
    learners: (B, C), the indices of the samples that learn.
    weight: (B,), 0 if the input gives no gradient.
    push: (B, C), the negative derivative of the loss with respect to the sample's log-probability;
      above 0, the sample becomes more likely.
    share: (B,), this input's part of the step's gradient g: (g_i · g) / (g · g); all shares of a
      step add up to 1.
    norm: (B,), the norm of g_i.
  """

  samples: Any
  logps: np.ndarray
  mask: np.ndarray
  rewards: np.ndarray
  learners: np.ndarray
  weight: np.ndarray
  push: np.ndarray
  share: np.ndarray
  norm: np.ndarray


def look(ctx: step_lib.StepContext, state: TrainState, batch, answers=None):
  """Computes the parts of the first inner update of a step.

  state: before the step; it is not donated. answers: `asked_step.Answers`, for a run with external
  rewards.

  Returns: one `Seen` per task, and the share of the squared gradient norm by part of the model.
  """
  halves = jax.jit(functools.partial(step_lib.rollout, ctx))(state, batch)
  if answers is not None:
    said = answers(int(state.step) + 1, ctx, halves)
    halves = jax.jit(functools.partial(step_lib.answered, ctx))(state, halves, said)
  params, _ = state.of_role(step_lib.role_of(ctx.method, batch))

  total = jax.tree.map(jnp.zeros_like, params)
  for name, half in halves.items():
    total = _added(total, _task_gradient(ctx, name, state, params, half))
  squared = max(float(_dot(total, total)), 1e-30)

  seen = {}
  for name, half in halves.items():
    logps, mask = _all_logps(ctx, name, state, params, half)
    shares, norms, pushes = [], [], []
    for i in range(len(half.weight)):
      # One input at a time, because each gradient is as large as the trained parameters.
      gradient, push = _input_gradient(ctx, name, state, params, half, i)
      shares.append(float(_dot(gradient, total)) / squared)
      norms.append(float(_dot(gradient, gradient)) ** 0.5)
      pushes.append(push)
    seen[name] = Seen(
      samples=jax.device_get(half.rollout.samples),
      logps=jax.device_get(logps),
      mask=jax.device_get(mask),
      rewards=jax.device_get(half.rollout.rewards),
      learners=jax.device_get(half.learners),
      weight=jax.device_get(half.weight),
      push=np.concatenate(jax.device_get(pushes)),
      share=np.array(shares),
      norm=np.array(norms),
    )
  return seen, {part: float(_dot(tree, tree)) / squared for part, tree in total.items()}


def as_json(seen: Seen, processor, chosen: list[int]) -> dict:
  """A task's numbers for replay.json: the shares of all inputs, and all details of the inputs
  `chosen`.
  """
  inputs = []
  for i in chosen:
    number = seen.rewards.shape[1]
    inputs.append(
      {
        'input': i,
        'rewards': seen.rewards[i].tolist(),
        'learning': seen.learners[i].tolist(),
        'weight': float(seen.weight[i]),
        'push': seen.push[i].tolist(),
        'gradient_share': float(seen.share[i]),
        'gradient_norm': float(seen.norm[i]),
        'candidates': [_sample_json(seen, processor, i, j) for j in range(number)],
      }
    )
  return {
    'gradient_shares': seen.share.tolist(),
    'gradient_norms': seen.norm.tolist(),
    'inputs': inputs,
  }


def _sample_json(seen: Seen, processor, i: int, j: int) -> dict:
  mask = seen.mask[i, j]
  logps = cli.rounded(np.asarray(seen.logps[i, j][mask], np.float32))
  if not isinstance(seen.samples, Text):
    return {'tokens': seen.samples[i, j][mask].tolist(), 'logps': logps}
  tokens = seen.samples.ids[i, j][mask]
  return {'text': processor.decode(tokens), 'tokens': tokens.tolist(), 'logps': logps}


# The step's functions, each compiled as its own program.


@functools.partial(jax.jit, static_argnums=(0, 1))
def _all_logps(ctx, name, state, params, half: Half):
  """(B, G, T) log-probabilities and mask of all samples under the policy being trained."""
  task, policy = ctx.tasks[name], ctx.build(state, params)
  everyone = jnp.broadcast_to(jnp.arange(ctx.method.group_size), half.rollout.rewards.shape)

  def score(chunk):
    scores = task.learner_scores(policy, *chunk)
    return scores.logps, scores.mask

  return chunks.mapped(score, (half.inputs, half.rollout, everyone), ctx.rollout_chunk)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _task_gradient(ctx, name, state, params, half: Half):
  gradient, _ = step_lib.task_gradient(ctx, state, ctx.tasks[name], half, params)
  return gradient


@functools.partial(jax.jit, static_argnums=(0, 1))
def _input_gradient(ctx, name, state, params, half: Half, i):
  """Input i's part of the task's gradient, and the push (1, C) on its samples that learn."""
  weight_sum = jnp.maximum(jnp.sum(half.weight), 1.0)
  one = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1), half)

  def loss_fn(params, nudge):
    task = _Nudged(ctx.tasks[name], nudge)
    return step_lib.group_loss(ctx, state, task, one, params, weight_sum, None, None)

  nudge = jnp.zeros_like(take(one.rollout.sample_logps, one.learners))
  (gradient, by_logp), aux = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)(params, nudge)
  return gradient, jnp.sum(jnp.where(aux.mask, -by_logp, 0.0), axis=-1)


class _Nudged:
  """A task with `nudge` (B, C, T) added to its log-probabilities: the derivative of the loss with
  respect to the nudge, at 0, is the one with respect to the log-probabilities.
  """

  def __init__(self, task, nudge):
    self._task = task
    self._nudge = nudge

  def learner_scores(self, *args):
    """The task's scores, with the nudge added."""
    scores = self._task.learner_scores(*args)
    return scores._replace(logps=scores.logps + self._nudge)


@functools.partial(jax.jit, donate_argnums=0)
def _added(total, gradient):
  return jax.tree.map(jnp.add, total, gradient)


@jax.jit
def _dot(a, b):
  return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))
