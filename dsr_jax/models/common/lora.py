"""Low-rank adapters on the language model's seven projections: y = x W + (x A) B (arXiv
2106.09685).

A starts as peft has it (uniform, bound 1 / sqrt(in)), B at zero, alpha is the rank, so the scale is
1. While they learn and in rollouts they stay beside the weights, which are then never copied;
`merged` folds them in for evaluation and export.

Axes: L layers, r rank.
"""

from flax import nnx
import jax
import jax.numpy as jnp

PROJECTIONS = {
  name: part
  for part, names in (
    ('self_attn', ('q_proj', 'k_proj', 'v_proj', 'o_proj')),
    ('mlp', ('gate_proj', 'up_proj', 'down_proj')),
  )
  for name in names
}


def init(params, rank: int, seed: int):
  """Adapters {projection: {'a': (L, in, r), 'b': (L, r, out)}}, float32, for a model's parameters
  (arrays or shapes).
  """
  keys = jax.random.split(jax.random.key(seed), len(PROJECTIONS))
  adapters = {}
  for key, (name, part) in zip(keys, PROJECTIONS.items()):
    layers, width_in, width = params['language_model']['layers'][part][name]['kernel'].shape
    bound = width_in**-0.5
    adapters[name] = dict(
      a=jax.random.uniform(key, (layers, width_in, rank), minval=-bound, maxval=bound),
      b=jnp.zeros((layers, rank, width)),
    )
  return adapters


def attach(model, adapters):
  """Puts adapters beside the weights of a module just made by `nnx.merge`, in place; returns it."""
  for name, part in PROJECTIONS.items():
    linear = getattr(getattr(model.language_model.layers, part), name)
    linear.lora_a, linear.lora_b = (nnx.Param(adapters[name][x]) for x in 'ab')
  return model


def merged(params, adapters):
  """Parameters of a model with the adapters folded into the kernels; the product is made in
  float32.
  """
  layers = params['language_model']['layers']
  folded = {part: dict(layers[part]) for part in set(PROJECTIONS.values())}
  for name, part in PROJECTIONS.items():
    kernel = layers[part][name]['kernel']
    change = jnp.matmul(adapters[name]['a'], adapters[name]['b'], precision='highest')
    folded[part][name] = {**layers[part][name], 'kernel': (kernel + change).astype(kernel.dtype)}
  return {**params, 'language_model': {**params['language_model'], 'layers': {**layers, **folded}}}
