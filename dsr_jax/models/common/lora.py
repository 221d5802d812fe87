"""Low-rank adapters beside a language model's projections: y = x W + (x A) B (arXiv 2106.09685).

A starts as in peft (uniform, bound 1 / sqrt(in)), B at zero; alpha is the rank, so the scale is 1.
In training and rollouts, adapters stay beside the weights, which are therefore never copied;
`merged` folds them in for evaluation and export.

targets: {name of an adapter: path of the stacked linear layer in the parameters}
  (`Family.lora_targets`).
Axes: L layers, r rank.
"""

from flax import nnx
import jax
import jax.numpy as jnp


def init(params, targets, rank: int, seed: int):
  """Adapters {name: {'a': (L, in, r), 'b': (L, r, out)}}, float32, for parameters or their
  shapes.
  """
  keys = jax.random.split(jax.random.key(seed), len(targets))
  adapters = {}
  for key, (name, path) in zip(keys, targets.items()):
    layers, width_in, width_out = _at(params, path)['kernel'].shape
    bound = width_in**-0.5
    adapters[name] = dict(
      a=jax.random.uniform(key, (layers, width_in, rank), minval=-bound, maxval=bound),
      b=jnp.zeros((layers, rank, width_out)),
    )
  return adapters


def attach(model, targets, adapters):
  """Attaches adapters in place to a module just made by `nnx.merge`; returns the module."""
  for name, path in targets.items():
    linear = model
    for part in path:
      linear = getattr(linear, part)
    linear.lora_a = nnx.Param(adapters[name]['a'])
    linear.lora_b = nnx.Param(adapters[name]['b'])
  return model


def merged(params, targets, adapters):
  """Parameters with the adapters folded into the kernels; the product is computed in float32."""
  for name, path in targets.items():
    linear = _at(params, path)
    change = jnp.matmul(adapters[name]['a'], adapters[name]['b'], precision='highest')
    kernel = (linear['kernel'] + change).astype(linear['kernel'].dtype)
    params = _replaced(params, path, {**linear, 'kernel': kernel})
  return params


def _at(tree, path):
  for part in path:
    tree = tree[part]
  return tree


def _replaced(tree, path, value):
  """A copy of nested dicts with another value at `path`."""
  if not path:
    return value
  return {**tree, path[0]: _replaced(tree[path[0]], path[1:], value)}
