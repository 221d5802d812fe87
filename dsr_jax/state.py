"""The state of a run: what is trained, what is not, and the optimizer's memory of it.

params: float32 masters of the trainable leaves (adapters, with `lora`). With the strategy
  `separate`, two such trees by role.
frozen: the other parts in the compute dtype, but the VQ model, a float32 island; `initial`, a
  compute-dtype copy of the trainable leaves as they were, where the initial model is to score or to
  be the reference; `reward`, the weights of a reward that has its own.
opt_state: AdamW's moments, of each role its own: the idle one's stay as they are.
ema: where it scores, the running mean of params, float32.
step: int32.
"""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from dsr_jax import losses, sharding
from dsr_jax.config import ROLES
from dsr_jax.models.common import lora
from dsr_jax.rewards import base as rewards_lib

_PARTS = {
  'language_model+gen_head': ('language_model', 'lm_head', 'generation_head'),
  'language_model': ('language_model', 'lm_head'),
  'lora': (),
}
_NO_PARTS = (
  'initial',
  'reward',
)  # of state['frozen']: copies and strangers, not parts of the model


def split_params(params, trainable: str):
  """Parameters -> (trainable, frozen), two dicts by top-level part. Of `lora` all are frozen."""
  parts = _PARTS[trainable] if trainable in _PARTS else tuple(k for k in params if k != 'vqmodel')
  return {k: v for k, v in params.items() if k in parts}, {
    k: v for k, v in params.items() if k not in parts
  }


def make_optimizer(method) -> optax.GradientTransformation:
  """Clip and AdamW, to be multiplied by -`learning_rate`."""
  decay = [optax.add_decayed_weights(method.weight_decay)] if method.weight_decay else []
  return optax.chain(
    optax.clip_by_global_norm(method.clip),
    optax.scale_by_adam(b1=method.adam_b1, b2=method.adam_b2),
    *decay,
  )


def learning_rate(method, step, peak=None):
  """Linear warm-up and cosine to 0, at step `step` (from 0) of the run, whoever learns in it. peak:
  a scalar, if not the method's.
  """
  # Shifted by one: neither the first update nor the last has learning rate 0, which would waste a
  # whole rollout.
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, 1.0, method.warmup_steps + 1, method.steps + 2, 0.0
  )
  return (method.learning_rate if peak is None else peak) * schedule(step + 1)


def needs_initial(method, system) -> bool:
  """Whether the state carries a copy of the initial model."""
  reference = losses.OBJECTIVES[method.objective].needs_reference(method)
  return bool(system.frozen_every) or method.scorer == 'frozen' or reference


def init_state(params, method, system, mesh):
  """Parameters of a loaded model -> the state of a run, laid out on the mesh."""
  load = rewards_lib.REWARDS[method.reward].load
  weights = {'reward': load(method)} if load else {}
  make = functools.partial(_make, method, system)
  layout = sharding.shardings(jax.eval_shape(make, params, weights), mesh)
  trained = layout['params'].get(
    'generator', layout['params']
  )  # where each part lies already on its way in
  placed = sharding.place(params, {k: layout['frozen'].get(k) or trained[k] for k in params})
  weights = sharding.place(weights, {k: layout['frozen'][k] for k in weights})
  return jax.jit(make, out_shardings=layout)(placed, weights)


def abstract_state(params, method, system, mesh):
  """Shapes, types and layouts of the state that `init_state` makes; params: shapes. Without the
  weights of a reward of its own.
  """
  shapes = jax.eval_shape(functools.partial(_make, method, system), params, {})
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    shapes,
    sharding.shardings(shapes, mesh),
  )


def _make(method, system, params, weights):
  trained, fixed = split_params(params, method.trainable)
  if method.trainable == 'lora':
    trained = {'lora': lora.init(params, method.lora_rank, method.seed)}
  frozen = {k: v if k == 'vqmodel' else cast(v, system.compute_dtype) for k, v in fixed.items()}
  if needs_initial(method, system):
    frozen['initial'] = cast(trained, system.compute_dtype)

  def masters():
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32), trained)

  separate = method.strategy == 'separate'
  tree = {role: masters() for role in ROLES} if separate else masters()
  moments = make_optimizer(method).init
  state = dict(
    params=tree,
    frozen={**frozen, **weights},
    step=jnp.int32(0),
    opt_state={role: moments(tree[role]) for role in ROLES} if separate else moments(tree),
  )
  if method.scorer == 'ema':
    state['ema'] = jax.tree.map(jnp.copy, tree)
  return state


def cast(tree, dtype):
  """Every array of a pytree in another type."""
  return jax.tree.map(lambda x: x.astype(dtype), tree)


def fixed_parts(state):
  """The parts of the model that nobody trains."""
  return {k: v for k, v in state['frozen'].items() if k not in _NO_PARTS}


def build(graphdef, fixed, trained):
  """A module from frozen parts and trained leaves."""
  if 'lora' in trained:
    return lora.attach(nnx.merge(graphdef, fixed), trained['lora'])
  return nnx.merge(graphdef, {**fixed, **trained})


def joined(fixed, trained):
  """A whole model's parameters from frozen parts (or a whole model) and trained leaves; adapters
  are merged.
  """
  return lora.merged(fixed, trained['lora']) if 'lora' in trained else {**fixed, **trained}


def policy_params(state, role: str = 'generator'):
  """All parameters of the model as it is now, float32 masters included; with `separate`, of the
  model in that role.
  """
  return joined(fixed_parts(state), state['params'].get(role, state['params']))


def idle_bytes(state) -> int:
  """With `separate`: bytes of the moments that lie idle in a step, which is one role's; 0 with one
  model.
  """
  moments = state['opt_state']
  if not isinstance(moments, dict):
    return 0
  return sum(x.nbytes for x in jax.tree.leaves(moments[next(iter(ROLES))]))
