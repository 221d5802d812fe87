"""The training step: sample, score, choose, update. It is one compiled function without host
transfers.

  rollout  without gradients, in chunks of inputs: sample G outputs per input, and reward each with
           the model's own likelihood of the input given the output.
  update   in its own chunks: recompute the log-probabilities of the samples that learn, with
           gradients, and update; `method.inner_updates` times on the same samples.

`train` jits `train_step`. `replay` calls the same functions one by one; so does `asked_step`, which
requests external rewards in between. The step knows the model only through
`models.unified.UnifiedModel`.

Axes: B inputs of a task, G samples, C samples that learn, T tokens.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsr_jax import chunks, losses, sharding
from dsr_jax import state as state_lib
from dsr_jax.config import ROLES, Method, System
from dsr_jax.errors import InputError
from dsr_jax.models.unified import Family, Spec
from dsr_jax.rollouts import Batch, Half, Rollout, Scorers, UpdateAux
from dsr_jax.state import TrainState
from dsr_jax.tasks import TASKS, Task


@dataclasses.dataclass(frozen=True)
class StepContext:
  """Static inputs of a step.

  Attributes:
    graphdef: the model's structure.
    family, spec: static facts about the model.
    method, system: those groups of the configuration.
  """

  graphdef: Any
  family: Family
  spec: Spec
  method: Method
  system: System

  @functools.cached_property
  def tasks(self) -> dict[str, Task]:
    """The run's tasks by name. A task's index in this order is folded into its PRNG keys."""
    return {name: TASKS[name](self.method, self.system, self.spec) for name in self.method.tasks}

  @functools.cached_property
  def objective(self) -> losses.Objective:
    return losses.OBJECTIVES[self.method.objective]

  @functools.cached_property
  def optimizer(self) -> optax.GradientTransformation:
    return state_lib.make_optimizer(self.method)

  @property
  def rollout_chunk(self) -> int:
    """Inputs per task that are sampled and scored at once."""
    return chunks.size(self.system.rollout_chunk, self.method)

  @property
  def update_chunk(self) -> int:
    """Inputs per task that are differentiated at once."""
    return chunks.size(self.system.update_chunk, self.method)

  def build(self, state: TrainState, trained):
    """The model with the given trained parameters, in the compute dtype."""
    trained = state_lib.cast(trained, self.system.compute_dtype)
    return state_lib.build(self.graphdef, self.family, state.fixed_params, trained)


class StepOutput(NamedTuple):
  """state: the state after the step. metrics: a flat dict of float32 scalars. records: per task,
  the samples, rewards and pairs of all inputs.
  """

  state: Any  # TrainState
  metrics: Any  # {name: ()}
  records: Any  # {task: {name: (B, ...)}}


def output_shardings(ctx: StepContext, state: TrainState, mesh) -> StepOutput:
  """Shardings of `train_step`'s outputs. The state keeps its input sharding, so the step compiles
  once; the rest is replicated.
  """
  layout = sharding.shardings(state, mesh, ctx.family.sharding_rules)
  return StepOutput(state=layout, metrics=sharding.whole(mesh), records=sharding.whole(mesh))


def train_step(ctx: StepContext, state: TrainState, batch: Batch) -> StepOutput:
  """Samples G outputs per input, scores them with the model's own reversed likelihoods, and
  updates the model.

  Jit it with the state donated. Raises InputError for an external reward, which needs
  `asked_step`.
  """
  if any(task.asked for task in ctx.tasks.values()):
    raise InputError(
      f'method.reward={ctx.method.reward} has an external reward, which train_step does not '
      'compute; use asked_step, or another reward'
    )
  halves = rollout(ctx, state, batch)
  return update(ctx, state, batch, halves)


# Rollout: sample, score, choose.


def rollout(ctx: StepContext, state: TrainState, batch: Batch) -> dict[str, Half]:
  """The halves of the step by task: samples, rewards, and the samples that learn.

  With an external reward, the half is incomplete until `answered`.
  """
  role = role_of(ctx.method, batch)
  params, _ = state.of_role(role)
  policy = rollout_policy(ctx, state, params)
  scorers = make_scorers(ctx, state, role, policy)
  step_key = jax.random.fold_in(jax.random.key(batch.seed), state.step)

  halves = {}
  for place, (name, task) in enumerate(ctx.tasks.items()):
    if getattr(batch, name) is None:  # with `separate`, it is the other role's turn
      continue
    task_key = jax.random.fold_in(step_key, place)
    with jax.named_scope(f'{name}/rollout'):
      inputs = jax.tree.map(sharding.split_rows, task.inputs(batch))
      sample_and_score = functools.partial(task.rollout, policy, scorers, batch, task_key)
      half = Half(inputs, chunks.mapped(sample_and_score, inputs, ctx.rollout_chunk))
    halves[name] = half if task.asked else choose(ctx, state, task, half)
  return halves


def choose(ctx: StepContext, state: TrainState, task: Task, half: Half) -> Half:
  """Chooses the samples of a half that learn. All rewards must be known."""
  inputs, samples = half.inputs, half.rollout
  with jax.named_scope(f'{task.name}/rollout'):
    pair, pair_weight = losses.best_and_worst(samples.rewards, ctx.method.min_margin)
    learners, weight = ctx.objective.choose(samples.rewards, ctx.method)
  ref_logps = None
  if ctx.objective.needs_reference(ctx.method):
    with jax.named_scope(f'{task.name}/reference'):
      ref_logps = reference_logps(ctx, state, task, inputs, samples, learners)
  return Half(
    inputs=inputs,
    rollout=samples,
    learners=learners,
    weight=weight,
    pair=pair,
    pair_weight=pair_weight,
    ref_logps=ref_logps,
  )


def answered(ctx: StepContext, state: TrainState, halves: dict[str, Half], answers):
  """Completes the halves of `rollout` with the external rewards.

  answers: {task: rewards (B, G)} of the tasks with an external reward.
  """
  done = {}
  for name, half in halves.items():
    task = ctx.tasks[name]
    if task.asked:
      half = half._replace(rollout=task.with_answer(half.rollout, answers[name]))
      half = choose(ctx, state, task, half)
    done[name] = half
  return done


def rollout_policy(ctx: StepContext, state: TrainState, params):
  """The policy in the decoding layout: compute-dtype weights, gathered over fsdp once."""
  rules = ctx.family.sharding_rules
  fixed = state.fixed_params
  if 'lora' in params:  # with adapters, the fixed parameters hold the weights that decode
    fixed = sharding.gather_for_rollout(fixed, rules)
  trained = state_lib.cast(params, ctx.system.compute_dtype)
  trained = sharding.gather_for_rollout(trained, rules)
  return state_lib.build(ctx.graphdef, ctx.family, fixed, trained)


def make_scorers(ctx: StepContext, state: TrainState, role: str | None, policy) -> Scorers:
  """The configured scorer, and the initial model for the log."""
  method, system = ctx.method, ctx.system
  partner = None
  if role is not None:
    partner = next(other for other in ROLES if other != role)
  initial = None
  if system.frozen_every or method.scorer == 'frozen':
    initial = ctx.build(state, state.ref_params)

  if method.scorer == 'frozen':
    scorer = initial
  elif method.scorer == 'ema':
    scorer = ctx.build(state, state.ema_params[partner] if partner else state.ema_params)
  elif partner is not None:  # with two models, the other one scores
    scorer = ctx.build(state, state.params[partner])
  else:
    scorer = policy

  def due(every):
    return (state.step % max(every, 1)) == 0

  return Scorers(
    scorer=scorer,
    reward_params=state.reward_params,
    frozen=initial if system.frozen_every else None,
    frozen_due=due(system.frozen_every),
    probe_due=due(system.probe_every),
  )


def reference_logps(
  ctx: StepContext, state: TrainState, task: Task, inputs, samples: Rollout, learners
):
  """Log-probabilities (B, C, T) of the samples that learn, under the initial model."""
  initial = ctx.build(state, state.ref_params)

  def score(chunk):
    inputs, samples, learners = chunk
    return task.learner_scores(initial, inputs, samples, learners).logps

  return chunks.mapped(score, (inputs, samples, learners), ctx.rollout_chunk)


# Update: learn.


def update(
  ctx: StepContext, state: TrainState, batch: Batch, halves: dict[str, Half]
) -> StepOutput:
  """Updates the model on the halves of `rollout`, and collects metrics and records."""
  method = ctx.method
  role = role_of(method, batch)
  params, opt_state = state.of_role(role)
  rate = state_lib.learning_rate(method, state.step, batch.learning_rate)

  if method.inner_updates == 1:
    params, opt_state, aux, norms = inner_update(ctx, state, halves, rate, params, opt_state)
    all_aux = [aux]
  else:
    params, opt_state, all_aux, norms = inner_updates(ctx, state, halves, rate, params, opt_state)

  metrics = dict(norms)
  for name, half in halves.items():
    of_task = ctx.tasks[name].metrics(half, [aux[name] for aux in all_aux])
    metrics |= {f'{name}/{key}': value for key, value in of_task.items()}
  metrics['loss'] = sum(metrics[f'{name}/loss'] for name in halves)
  metrics['learning_rate'] = rate
  return StepOutput(
    state=state.after_update(role, params, opt_state, method.ema_decay),
    metrics={name: value.astype(jnp.float32) for name, value in metrics.items()},
    records={name: ctx.tasks[name].record(half) for name, half in halves.items()},
  )


def inner_update(ctx, state, halves, rate, params, opt_state, old_logps=None, is_first=None):
  """One update. Returns (params, opt_state, {task: UpdateAux}, norms).

  old_logps {task: (B, C, T)}: under the policy that sampled; None in the first update, where the
  forward pass of this policy gives them. is_first: a scalar flag: ignore the given old_logps.
  """
  grads = jax.tree.map(jnp.zeros_like, params)
  aux = {}
  for name, half in halves.items():
    with jax.named_scope(f'{name}/update'):
      old = None if old_logps is None else old_logps[name]
      grad, aux[name] = task_gradient(ctx, state, ctx.tasks[name], half, params, old, is_first)
      grads = jax.tree.map(jnp.add, grads, grad)
  with jax.named_scope('optimizer'):
    updates, opt_state = ctx.optimizer.update(grads, opt_state, params)
    updates = jax.tree.map(lambda u: -rate * u, updates)
    params = optax.apply_updates(params, updates)
  norms = dict(gradient_norm=optax.tree.norm(grads), update_norm=optax.tree.norm(updates))
  return params, opt_state, aux, norms


def inner_updates(ctx, state, halves, rate, params, opt_state):
  """`method.inner_updates` updates on the same samples. Returns the same as `inner_update`, but a
  list with the `UpdateAux` dict of each update, and the mean norms.
  """

  def body(carry, index):
    params, opt_state, old_logps = carry
    params, opt_state, aux, norms = inner_update(
      ctx, state, halves, rate, params, opt_state, old_logps, is_first=index == 0
    )
    old_logps = {name: x.old_logps for name, x in aux.items()}
    return (params, opt_state, old_logps), (aux, norms)

  number = ctx.method.inner_updates
  # Only objectives on whole groups support several updates, so C = G here.
  nothing_yet = {name: jnp.zeros_like(half.rollout.sample_logps) for name, half in halves.items()}
  carry = (params, opt_state, nothing_yet)
  (params, opt_state, _), (aux, norms) = jax.lax.scan(body, carry, jnp.arange(number))
  all_aux = [jax.tree.map(lambda x, i=i: x[i], aux) for i in range(number)]
  return params, opt_state, all_aux, jax.tree.map(jnp.mean, norms)


def task_gradient(ctx, state, task: Task, half: Half, params, old_logps=None, is_first=None):
  """A task's gradient and `UpdateAux`, summed over chunks.

  The rollout determines the number of groups that count, so every chunk divides by it; chunking
  and accumulation then change only the rounding.
  """
  weight_sum = jnp.maximum(jnp.sum(half.weight), 1.0)

  def chunk_gradient(chunk):
    half, old_logps = chunk

    def loss_fn(params):
      return group_loss(ctx, state, task, half, params, weight_sum, old_logps, is_first)

    (loss, aux), grad = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return (sharding.split_params(grad, ctx.family.sharding_rules), loss), aux

  learned_from = half._replace(pair=None, pair_weight=None)  # only the log needs these two
  (grad, loss), aux = chunks.summed(chunk_gradient, (learned_from, old_logps), ctx.update_chunk)
  return grad, aux._replace(loss=loss)


def group_loss(ctx, state, task: Task, half: Half, params, weight_sum, old_logps, is_first):
  """A chunk's share of the task's loss, and `UpdateAux` (the caller fills in its loss)."""
  model = ctx.build(state, params)
  scores = task.learner_scores(model, half.inputs, half.rollout, half.learners)
  # In the first update, the policy is still the one that sampled, so this forward pass gives the
  # old log-probabilities too: the ratio is exactly 1, at no extra cost.
  own = jax.lax.stop_gradient(scores.logps)
  if old_logps is None:
    old_logps = own
  else:
    old_logps = jnp.where(is_first, own, old_logps)
  # Rewards (B, G) align with log-probabilities (B, C, T) only if all G samples learn, in order.
  whole_groups = ctx.objective.choose is losses.choose_all
  per_group = ctx.objective.loss(
    losses.LossInputs(
      logps=scores.logps,
      old_logps=old_logps,
      ref_logps=half.ref_logps,
      mask=scores.mask,
      rewards=half.rollout.rewards if whole_groups else None,
      credit=scores.credit,
    ),
    ctx.method,
  )
  aux = UpdateAux(
    loss=None,
    logps=scores.logps,
    old_logps=old_logps,
    ref_logps=half.ref_logps,
    mask=scores.mask,
    sample_logps=scores.sample_logps,
    entropy=scores.entropy,
    credit=scores.credit,
  )
  return losses.weighted(per_group, half.weight) / weight_sum, jax.lax.stop_gradient(aux)


def role_of(method, batch: Batch) -> str | None:
  """The role that learns (with `separate`), which follows from the batch; None with one model."""
  if method.strategy != 'separate':
    return None
  present = [role for role, task in ROLES.items() if getattr(batch, task) is not None]
  assert len(present) == 1, present
  return present[0]
