"""Parameters, shapes and structure of a backbone, from its configuration.

The module's class takes (config, rngs=...) and keeps the configuration as `config`; nothing else in
it depends on `config.templates`.
"""

import dataclasses
import functools

from flax import nnx
import jax


def create(module, config, seed: int = 0):
  """A randomly initialized model as (graphdef, params): params is a nested dict of float32
  arrays.
  """
  graphdef, state = nnx.split(module(config, rngs=nnx.Rngs(seed)))
  return graphdef, nnx.to_pure_dict(state)


def abstract_params(module, config):
  """The parameters' shapes and dtypes, without allocating them."""
  return nnx.to_pure_dict(_structure(module, dataclasses.replace(config, templates=None))[1])


def graphdef_of(module, config):
  """The model's structure; `nnx.merge(graphdef, params)` gives the module."""
  model = nnx.merge(*_structure(module, dataclasses.replace(config, templates=None)))
  model.config = config
  return nnx.graphdef(model)


@functools.lru_cache(maxsize=16)
def _structure(module, config):
  """Graphdef and shapes, cached because tracing the model can take seconds."""
  graphdef, state = nnx.split(nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0))))
  # without the sharding of the first caller
  return graphdef, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
