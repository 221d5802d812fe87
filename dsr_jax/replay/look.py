"""A step taken apart: every candidate with its log-probabilities and reward, who learns and how
hard, and whose gradient it was.

The step itself (`step.make_step`) is what reproduces a run bit for bit. What is here runs its parts
(`tasks`, `losses`) once more on the same state, so that their inner numbers can be looked at;
sampling is the same by the same keys.

Axes: B inputs of a task, G candidates, C candidates that learn, T tokens.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax import chunks as chunks_lib
from dsr_jax import losses
from dsr_jax import state as state_lib
from dsr_jax import step as step_lib
from dsr_jax.tasks import TASKS


class Seen(NamedTuple):
  """A task's half of a step; arrays lie on the host.

  candidates: codes (B, G, N), or `Text` (B, G, T). logps, mask: (B, G, T) under the policy that
    learns, as the loss sees them. rewards
  (B, G). index (B, C): who learns; weight (B,): 0 where the input gives no gradient. push (B, C):
  minus the derivative of the loss by the candidate's log-probability; above 0 it is made likelier.
  share (B,): of the step's whole gradient g the part g_i · g / g · g that is this input's; all
  shares of a step add up to 1. norm (B,): of g_i.
  """

  candidates: Any
  logps: np.ndarray
  mask: np.ndarray
  rewards: np.ndarray
  index: np.ndarray
  weight: np.ndarray
  push: np.ndarray
  share: np.ndarray
  norm: np.ndarray


def look(model, config, state, batch) -> tuple[dict[str, Seen], dict[str, float]]:
  """Takes the first inner update of a step apart.

  model: `parts.Model`. state: before the step; it stays the caller's.

  Returns: a `Seen` a task, and the share of the squared gradient norm by part of the model.
  """
  m = config.method
  tasks = {name: TASKS[name](m, config.system, model.config.templates.eos_id) for name in m.tasks}
  made = jax.jit(functools.partial(_phase_a, model.graphdef, m, config.system, tasks))(state, batch)
  role = step_lib.role_of(m, batch)
  params = state['params'][role] if role else state['params']
  fixed = state_lib.fixed_parts(state)
  gradients = {
    name: jax.jit(functools.partial(_gradient, model.graphdef, m, config.system, tasks[name]))
    for name in made
  }

  def of_input(name, i):
    return gradients[name](params, fixed, made[name]['work'], i)

  total = jax.tree.map(jnp.zeros_like, params)
  add = jax.jit(lambda total, grad: jax.tree.map(jnp.add, total, grad), donate_argnums=0)
  for name, part in made.items():
    for i in range(len(part['rewards'])):
      total = add(total, of_input(name, i)[0])
  whole = max(float(_dot(total, total)), 1e-30)

  seen = {}
  for name, part in made.items():
    share, norm, push = [], [], []
    for i in range(len(part['rewards'])):
      grad, pushed = of_input(name, i)
      share.append(float(_dot(grad, total)) / whole)
      norm.append(float(_dot(grad, grad)) ** 0.5)
      push.append(pushed)
    host = jax.device_get({k: v for k, v in part.items() if k != 'work'})
    seen[name] = Seen(
      **host, push=np.concatenate(jax.device_get(push)), share=np.array(share), norm=np.array(norm)
    )
  return seen, {part: float(_dot(tree, tree)) / whole for part, tree in total.items()}


def _phase_a(graphdef, method, system, tasks, state, batch):
  """As the step does it: sampled, rewarded, chosen; and what the loss needs of each input
  ('work').
  """
  role = step_lib.role_of(method, batch)
  objective = losses.OBJECTIVES[method.objective]
  rollout_chunk, _ = step_lib.chunks(method, system).values()
  fixed = state_lib.fixed_parts(state)
  own = state['params'][role] if role else state['params']

  def build(trained):
    return state_lib.build(graphdef, fixed, state_lib.cast(trained, system.compute_dtype))

  live = build(own)
  judges = step_lib.judges_of(method, system, state, role, live, build)
  key = jax.random.fold_in(jax.random.key(batch['seed']), state['step'])
  out = {}
  for place, (name, task) in enumerate(tasks.items()):
    if step_lib.FIELD[name] not in batch:
      continue
    inputs = task.inputs(batch)
    roll = functools.partial(
      task.rollout, live, judges, task.shared(batch), jax.random.fold_in(key, place)
    )
    rolled = chunks_lib.mapped(roll, inputs, rollout_chunk)
    index, weight = objective.choose(rolled.rewards, method)
    everyone = jnp.broadcast_to(jnp.arange(method.group_size), rolled.rewards.shape)

    def score(chunk, model, task=task):
      scores, mask, _ = task.pair_scores(model, *chunk)
      return scores.logp, mask

    logps, mask = chunks_lib.mapped(
      functools.partial(score, model=live), (inputs, rolled, everyone), rollout_chunk
    )
    reference = None
    if objective.needs_reference(method):
      initial = build(state['frozen']['initial'])
      reference = chunks_lib.mapped(
        lambda chunk: score(chunk, initial)[0], (inputs, rolled, index), rollout_chunk
      )
    work = (inputs, rolled, index, weight, reference)
    out[name] = dict(
      candidates=rolled.candidates,
      logps=logps,
      mask=mask,
      rewards=rolled.rewards,
      index=index,
      weight=weight,
      work=work,
    )
  return out


def _gradient(graphdef, method, system, task, params, fixed, work, i):
  """Input i's part of the task's gradient, and the push on each of its candidates that learn (1,
  C).
  """
  total = jnp.maximum(jnp.sum(work[3]), 1.0)
  inputs, rolled, index, weight, reference = jax.tree.map(
    lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1), work
  )
  objective = losses.OBJECTIVES[method.objective]
  rewards = rolled.rewards if index.shape[1] == rolled.rewards.shape[1] else None

  def of_logp(logp, mask):
    fixed_logp = jax.lax.stop_gradient(logp)
    return (
      losses.weighted(
        objective.loss(losses.Learners(logp, fixed_logp, reference, mask, rewards), method), weight
      )[0]
      / total
    )

  def loss(params):
    model = state_lib.build(graphdef, fixed, state_lib.cast(params, system.compute_dtype))
    scores, mask, _ = task.pair_scores(model, inputs, rolled, index)
    return of_logp(scores.logp, mask), (scores.logp, mask)

  grad, (logp, mask) = jax.grad(loss, has_aux=True)(params)
  push = -jax.grad(of_logp)(logp, mask)
  return grad, jnp.sum(jnp.where(mask, push, 0.0), axis=-1)


@jax.jit
def _dot(a, b):
  return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))
