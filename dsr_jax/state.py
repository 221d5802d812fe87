"""The state of a run: trained parameters, fixed parameters, and the optimizer state."""

import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from dsr_jax import losses, sharding
from dsr_jax.config import ROLES
from dsr_jax.models.common import lora
from dsr_jax.models.unified import Family
from dsr_jax.rewards import table


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """A pytree that each step donates.

  With the strategy `separate`, params, opt_state and ema_params are dicts of two trees, by role.

  Attributes:
    step: () int32, steps done.
    params: float32 master weights of the trainable parts (with `lora`, of the adapters).
    opt_state: AdamW's moments; a step does not change those of the idle role.
    fixed_params: the model's other parts in the compute dtype, except the image tokenizer, which
      stays in float32.
    ref_params: a compute-dtype copy of the initial trainable parts, if the initial model scores or
      is the reference; otherwise None.
    reward_params: weights of the rewards that have some, by name; otherwise None.
    ema_params: the running mean of params, float32, if it scores; otherwise None.
  """

  step: Any
  params: Any
  opt_state: Any
  fixed_params: Any
  ref_params: Any = None
  reward_params: Any = None
  ema_params: Any = None

  def of_role(self, role: str | None):
    """(params, opt_state) of a role; role is None with one model."""
    if role is None:
      return self.params, self.opt_state
    return self.params[role], self.opt_state[role]

  def after_update(self, role: str | None, params, opt_state, ema_decay: float) -> 'TrainState':
    """The state after a step: replaces the trees of the role that learned, keeps the other's."""

    def put(tree, new):
      return {**tree, role: new} if role else new

    ema_params = self.ema_params
    if ema_params is not None:
      mean = ema_params[role] if role else ema_params
      mean = jax.tree.map(lambda m, p: ema_decay * m + (1 - ema_decay) * p, mean, params)
      ema_params = put(ema_params, mean)
    return dataclasses.replace(
      self,
      step=self.step + 1,
      params=put(self.params, params),
      opt_state=put(self.opt_state, opt_state),
      ema_params=ema_params,
    )


# The optimizer.


def make_optimizer(method) -> optax.GradientTransformation:
  """Gradient clipping and AdamW; the caller multiplies the updates by -`learning_rate`."""
  parts = [
    optax.clip_by_global_norm(method.clip),
    optax.scale_by_adam(b1=method.adam_b1, b2=method.adam_b2),
  ]
  if method.weight_decay:
    parts.append(optax.add_decayed_weights(method.weight_decay))
  return optax.chain(*parts)


def learning_rate(method, step, peak=None):
  """Linear warm-up, then cosine decay to 0, at step `step` (from 0) of the run, for either role.
  peak: a scalar that replaces the method's peak rate.
  """
  # Shifted by one: a learning rate of 0 in the first or last update would waste a whole rollout.
  schedule = optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=1.0,
    warmup_steps=method.warmup_steps + 1,
    decay_steps=method.steps + 2,
    end_value=0.0,
  )
  return (method.peak_learning_rate if peak is None else peak) * schedule(step + 1)


# Making a state.


def needs_ref_params(method, system) -> bool:
  """Whether the state needs a copy of the initial model."""
  reference = losses.OBJECTIVES[method.objective].needs_reference(method)
  return bool(system.frozen_every) or method.scorer == 'frozen' or reference


def init_state(params, family: Family, method, system, mesh) -> TrainState:
  """Parameters of a loaded model -> the initial state of a run, sharded over the mesh."""
  reward_params = table.load(method)
  make = functools.partial(_make, family, method, system)
  layout = sharding.shardings(
    jax.eval_shape(make, params, reward_params), mesh, family.sharding_rules
  )
  # Place each part directly with the sharding that the state will have.
  trained = layout.params.get('generator', layout.params)
  parts = {name: layout.fixed_params.get(name) or trained[name] for name in params}
  placed = sharding.place(params, parts)
  if reward_params is not None:
    reward_params = sharding.place(reward_params, layout.reward_params)
  return jax.jit(make, out_shardings=layout)(placed, reward_params)


def initial_params(params, state: TrainState, family: Family, method, system):
  """`TrainState.ref_params` from a model that is loaded again. Empty with adapters, which begin at
  zero.

  params: the loaded model's parameters, each read only when its placement is known.
  """
  trained, _ = split_params(params, family, method.trainable)
  layout = jax.tree.map(lambda x: x.sharding, state.params.get('generator', state.params))
  if not trained:
    return {}
  return cast(sharding.place(trained, layout), system.compute_dtype)


def abstract_state(shapes, family: Family, method, system, mesh) -> TrainState:
  """Shapes, dtypes and shardings of `init_state`'s result, without the weights of rewards.

  shapes: shapes of the model's parameters.
  """
  state = jax.eval_shape(functools.partial(_make, family, method, system), shapes, None)
  layout = sharding.shardings(state, mesh, family.sharding_rules)

  def placed(x, where):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  return jax.tree.map(placed, state, layout)


def _make(family, method, system, params, reward_params) -> TrainState:
  trained, fixed = split_params(params, family, method.trainable)
  if method.trainable == 'lora':
    adapters = lora.init(params, family.lora_targets, method.lora.rank, method.seed)
    trained = {'lora': adapters}

  def masters():
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32), trained)

  separate = method.strategy == 'separate'
  optimizer = make_optimizer(method)
  if separate:
    tree = {role: masters() for role in ROLES}
    opt_state = {role: optimizer.init(tree[role]) for role in ROLES}
  else:
    tree = masters()
    opt_state = optimizer.init(tree)
  return TrainState(
    step=jnp.int32(0),
    params=tree,
    opt_state=opt_state,
    fixed_params={
      name: part if name == family.image_tokenizer else cast(part, system.compute_dtype)
      for name, part in fixed.items()
    },
    ref_params=cast(trained, system.compute_dtype) if needs_ref_params(method, system) else None,
    reward_params=reward_params,
    ema_params=jax.tree.map(jnp.copy, tree) if method.scorer == 'ema' else None,
  )


def split_params(params, family: Family, trainable: str):
  """Parameters -> (trainable, fixed), two dicts by top-level part. With `lora`, all are fixed."""
  parts = family.trainable_parts[trainable]
  trained = {name: part for name, part in params.items() if name in parts}
  return trained, {name: part for name, part in params.items() if name not in parts}


def cast(tree, dtype):
  """Casts every array of a pytree."""
  return jax.tree.map(lambda x: x.astype(dtype), tree)


# A model from a state.


def build(graphdef, family: Family, fixed, trained):
  """A module from fixed parts and trained parts (or adapters)."""
  if 'lora' in trained:
    return lora.attach(nnx.merge(graphdef, fixed), family.lora_targets, trained['lora'])
  return nnx.merge(graphdef, {**fixed, **trained})


def joined(family: Family, fixed, trained):
  """A complete model's parameters from fixed parts (or a complete model) and trained parts. Merges
  adapters.
  """
  if 'lora' in trained:
    return lora.merged(fixed, family.lora_targets, trained['lora'])
  return {**fixed, **trained}


def policy_params(state: TrainState, family: Family, role: str = 'generator'):
  """All current parameters of the model, including the float32 master weights.

  role: which of the two models, with `separate`.
  """
  return joined(family, state.fixed_params, state.params.get(role, state.params))


def idle_bytes(state: TrainState) -> int:
  """Bytes of optimizer state that a step does not use (with `separate`); 0 with one model."""
  moments = state.opt_state
  idle = moments.get(next(iter(ROLES))) if isinstance(moments, dict) else None
  return sum(x.nbytes for x in jax.tree.leaves(idle))
