"""The step: one compiled function that samples, scores, chooses and updates.

Phase A, without gradients and in chunks of inputs: sample G candidates of every input and reward
each. Phase B, in chunks of its own: recompute the log-probabilities of those that learn with
gradients, and update; `method.inner_updates` times. The step knows the model only through
`models.unified.UnifiedModel`; nothing goes to the host inside it.

Axes: B inputs of a task, G candidates, C candidates that learn, T tokens.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from dsr_jax import chunks as chunks_lib
from dsr_jax import losses, sharding
from dsr_jax import state as state_lib
from dsr_jax.config import ROLES
from dsr_jax.state import init_state, policy_params, split_params  # noqa: F401  (what a run needs, in one place)
from dsr_jax.tasks import SHOWN, TASKS, Judges, Learned, Rollouts  # noqa: F401

FIELD = {'generation': 'prompt_ids', 'understanding': 'pixels'}  # of a batch that holds the task


def make_step(graphdef, method, system, mesh, templates):
  """The jitted step (state, batch) -> (state, metrics, records); `state` is donated.

  Args:
    graphdef: the model's structure.
    method, system: `config.Method`, `config.System`.
    mesh: the devices.
    templates: of the model; only its eos_id is used.

  batch: prompt_ids, prompt_mask (B, Tp); instruction_ids, instruction_mask (Ti,); pixels (B, H, W,
    3) uint8; question_ids, question_mask (B, Tq);
  seed, a uint32 scalar; what the reward asks for besides (`data.fields`); learning_rate, a float32
  scalar, where runs of several share the program. The half of a task that does not learn in this
  step is absent: so in the strategy `separate` the batch says whose turn it is, and there is one
  program a role.
  metrics: a flat dict of float32 scalars. records: per task, candidates, rewards and the pair of
    the first inputs.
  """
  optimizer = state_lib.make_optimizer(method)
  objective = losses.OBJECTIVES[method.objective]
  tasks = {name: TASKS[name](method, system, templates.eos_id) for name in method.tasks}
  rollout_chunk, update_chunk = chunks(method, system).values()

  def step(state, batch):
    role = role_of(method, batch)
    key = jax.random.fold_in(jax.random.key(batch['seed']), state['step'])
    learning = {
      name: (index, task)
      for index, (name, task) in enumerate(tasks.items())
      if FIELD[name] in batch
    }

    def own(tree):
      return tree[role] if role else tree

    fixed = state_lib.fixed_parts(state)

    def build(trained):
      return state_lib.build(graphdef, fixed, state_lib.cast(trained, system.compute_dtype))

    # Phase A. The compute-dtype weights are gathered once, before any decode loop.
    live = _rollout_model(
      graphdef, fixed, state_lib.cast(own(state['params']), system.compute_dtype)
    )
    judges = judges_of(method, system, state, role, live, build)
    inputs, rollouts, pairs, chosen = {}, {}, {}, {}
    for name, (index, task) in learning.items():
      with jax.named_scope(f'{name}/rollout'):
        inputs[name] = jax.tree.map(sharding.split_rows, task.inputs(batch))
        roll = functools.partial(
          task.rollout, live, judges, task.shared(batch), jax.random.fold_in(key, index)
        )
        rollouts[name] = chunks_lib.mapped(roll, inputs[name], rollout_chunk)
        pairs[name] = losses.best_and_worst(rollouts[name].rewards, method.min_margin)
        chosen[name] = objective.choose(rollouts[name].rewards, method)
    reference = {}
    if objective.needs_reference(method):
      initial = build(state['frozen']['initial'])
      for name, (_, task) in learning.items():
        with jax.named_scope(f'{name}/reference'):

          def score(chunk, task=task):
            return task.pair_scores(initial, *chunk)[0].logp

          reference[name] = chunks_lib.mapped(
            score, (inputs[name], rollouts[name], chosen[name][0]), rollout_chunk
          )

    # Phase B. Sums over chunks; the weights are known from phase A, so chunks and accumulation
    # change nothing but rounding.
    def update(params, moments, old, first):
      """One inner update. old: log-probabilities of the first one, used unless this is it (`first`,
      a flag or True).
      """
      grads, learned = jax.tree.map(jnp.zeros_like, params), {}
      for name, (_, task) in learning.items():
        with jax.named_scope(f'{name}/update'):
          index, weight = chosen[name]
          chunk = (inputs[name], rollouts[name], index, weight, old.get(name), reference.get(name))
          differentiate = functools.partial(
            _differentiate,
            method,
            objective,
            task,
            build,
            params,
            jnp.maximum(jnp.sum(weight), 1.0),
            first,
          )
          (grad, loss), kept = chunks_lib.summed(differentiate, chunk, update_chunk)
          grads = jax.tree.map(jnp.add, grads, grad)
          learned[name] = Learned(loss, *kept)
      with jax.named_scope('optimizer'):
        updates, moments = optimizer.update(grads, moments, params)
        updates = jax.tree.map(lambda u: -rate * u, updates)
        params = optax.apply_updates(params, updates)
      return (
        params,
        moments,
        learned,
        dict(gradient_norm=optax.tree.norm(grads), update_norm=optax.tree.norm(updates)),
      )

    rate = state_lib.learning_rate(method, state['step'], batch.get('learning_rate'))
    params, moments, learned, metrics = _inner_updates(
      update,
      method.inner_updates,
      own(state['params']),
      own(state['opt_state']),
      {name: rollouts[name].sampled_logp for name in learning},
    )

    records = {}
    for name, (_, task) in learning.items():
      pair, weight = pairs[name]
      values = task.metrics(
        inputs[name], rollouts[name], pair, weight, [of_update[name] for of_update in learned]
      )
      metrics |= {f'{name}/{k}': v for k, v in values.items()}
      records[name] = task.record(inputs[name], rollouts[name], pair)
    metrics |= dict(loss=sum(metrics[f'{name}/loss'] for name in learning), learning_rate=rate)
    state = _next_state(method, state, role, params, moments)
    return state, {k: v.astype(jnp.float32) for k, v in metrics.items()}, records

  return Step(step, mesh, repr((graphdef, method, system, templates, mesh.shape)))


class Step:
  """The jitted step. The state's layout, known at the first call, is the output's too, so it
  compiles once for each role.

  function: the step as it was before jit. identity: all that it was made from, in words. devices:
    the mesh's, in its order.
  """

  def __init__(self, step, mesh, identity):
    self.function, self.identity, self.devices, self._mesh, self._jitted = (
      step,
      identity,
      list(mesh.devices.flat),
      mesh,
      None,
    )

  def _with_layout(self, state):
    if self._jitted is None:
      layout = sharding.shardings(jax.eval_shape(lambda s: s, state), self._mesh)
      whole = sharding.whole(self._mesh)
      self._jitted = jax.jit(self.function, donate_argnums=0, out_shardings=(layout, whole, whole))
    return self._jitted

  def __call__(self, state, batch):
    return self._with_layout(state)(state, batch)

  def lower(self, state, batch):
    return self._with_layout(state).lower(state, batch)

  def _cache_size(self):
    return self._jitted._cache_size()


def chunks(method, system) -> dict[str, int]:
  """Inputs of a task done at once in each phase, by the key that bounds them."""
  wanted = {
    'system.rollout_chunk': system.rollout_chunk,
    'system.update_chunk': system.update_chunk,
  }
  return {key: chunks_lib.size(rows, method) for key, rows in wanted.items()}


def role_of(method, batch):
  """Whose turn it is in `separate`, by what the batch holds; None where there is one model."""
  if method.strategy != 'separate':
    return None
  present = [role for role, task in ROLES.items() if FIELD[task] in batch]
  assert len(present) == 1, present
  return present[0]


def _rollout_model(graphdef, fixed, trained):
  """The policy in the layout of decoding; beside adapters the weights that decode are among the
  frozen ones.
  """
  if 'lora' in trained:
    fixed = sharding.gather_for_rollout(fixed)
  return state_lib.build(graphdef, fixed, sharding.gather_for_rollout(trained))


def judges_of(method, system, state, role, live, build) -> Judges:
  """The scorer that the configuration names, and the frozen model for the log."""
  partner = next((r for r in ROLES if r != role), None) if role else None
  initial = (
    build(state['frozen']['initial']) if system.frozen_every or method.scorer == 'frozen' else None
  )
  if method.scorer == 'frozen':
    scorer = initial
  elif method.scorer == 'ema':
    scorer = build(state['ema'][partner] if role else state['ema'])
  else:  # the live model; of two, a likelihood is the other one's to tell
    scorer = build(state['params'][partner]) if role else live

  def due(every):
    return (state['step'] % max(every, 1)) == 0

  return Judges(
    scorer,
    state['frozen'].get('reward'),
    initial if system.frozen_every else None,
    due(system.frozen_every),
    due(system.probe_every),
  )


def _differentiate(method, objective, task, build, params, weight_sum, first, chunk):
  """Gradient and loss of a chunk, to be summed, and what is kept of each input: logp, old,
  reference, mask, sampled, entropy.
  """
  inputs, rolled, index, weight, old, reference = chunk

  def loss_fn(params):
    scores, mask, sampled = task.pair_scores(build(params), inputs, rolled, index)
    fixed = jax.lax.stop_gradient(scores.logp)
    # The policy that sampled is the one before the first update, and its own forward pass then
    # gives its log-probabilities.
    before = fixed if first is True else jnp.where(first, fixed, old)
    rewards = rolled.rewards if index.shape[1] == rolled.rewards.shape[1] else None
    per_group = objective.loss(
      losses.Learners(scores.logp, before, reference, mask, rewards), method
    )
    total, _ = losses.weighted(per_group, weight)
    return total / weight_sum, jax.lax.stop_gradient(
      (scores.logp, before, reference, mask, sampled, scores.entropy)
    )

  (loss, kept), grad = jax.value_and_grad(loss_fn, has_aux=True)(params)
  return (sharding.split_params(grad), loss), kept


def _inner_updates(update, number: int, params, moments, like):
  """Runs `update` `number` times on the same samples; like: arrays of the shape of each task's
  log-probabilities.

  Returns parameters, moments, what each update left (a list), and the means of the norms.
  """
  if number == 1:
    params, moments, learned, norms = update(params, moments, {}, True)
    return params, moments, [learned], norms

  def body(carry, index):
    params, moments, old = carry
    params, moments, learned, norms = update(params, moments, old, index == 0)
    return (params, moments, {name: x.old for name, x in learned.items()}), (learned, norms)

  old = jax.tree.map(jnp.zeros_like, like)
  (params, moments, _), (learned, norms) = jax.lax.scan(
    body, (params, moments, old), jnp.arange(number)
  )
  each = [jax.tree.map(lambda x, i=i: x[i], learned) for i in range(number)]
  return params, moments, each, jax.tree.map(jnp.mean, norms)


def _next_state(method, state, role, params, moments):
  """The state after the step: the learner's trees replaced, the other role's untouched."""

  def put(tree, new):
    return {**tree, role: new} if role else new

  following = dict(
    state,
    params=put(state['params'], params),
    opt_state=put(state['opt_state'], moments),
    step=state['step'] + 1,
  )
  if 'ema' in state:
    mean = state['ema'][role] if role else state['ema']
    following['ema'] = put(
      state['ema'],
      jax.tree.map(lambda m, p: method.ema_decay * m + (1 - method.ema_decay) * p, mean, params),
    )
  return following
