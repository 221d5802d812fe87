"""How far bfloat16 changes log-probabilities, with logits in bfloat16 and in float32.

  python -m benchmarks.head_error

For the embedded model, and for a random one of width 1024 whose logits have a standard deviation of
about 3. Everything before the heads is the same bfloat16 on both sides; the reference is the same
model in float32. Prints a JSON object; docs/robustness_numbers.md has the result.
"""

import dataclasses
import json

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax import families
from dsr_jax.convert import locate
from dsr_jax.models.common import layers
from dsr_jax.models.common.logprobs import guide, log_softmax
from dsr_jax.models.janus import model as janus
from dsr_jax.models.janus.config import JanusConfig, TextConfig, VisionConfig, VQConfig

ROWS, TOKENS, GUIDANCE = 4, 32, 5.0


def embedded():
  """The embedded model: (graphdef, params, config)."""
  model = families.model_of(locate.resolve('scenes').bundle, 'scenes')
  return model.graphdef, model.params, model.config


def wide():
  """A random model of width 1024: (graphdef, params, config)."""
  config = JanusConfig(
    text=TextConfig(8192, 1024, 2816, 4, 8, 128),
    vision=VisionConfig(64, 128, 2, 4, image_size=32, patch_size=4),
    vq=VQConfig(4096, 8, 32, 32, (1, 1, 2, 2), 1),
  )
  config = dataclasses.replace(config, templates=embedded()[2].templates)
  _, params = janus.create(config)
  for head in (params['lm_head'], params['generation_head']['vision_head']):
    head['kernel'] = 3 * head['kernel']
  return janus.graphdef_of(config), params, config


def rounded_linear(head, x):
  """The heads as they were before: the product is returned in x's dtype."""
  return layers.Linear.__call__(head, x)


def measure(graphdef, params, config):
  """{head: {variant: root mean square and largest error of log-probabilities, in nats}}."""
  rng = np.random.default_rng(0)
  ids = jnp.asarray(rng.integers(0, config.text.vocab_size, (ROWS, TOKENS)))
  codes = jnp.asarray(rng.integers(0, config.vq.num_embeddings, (ROWS, TOKENS)))

  @jax.jit
  def logits(params):
    model = nnx.merge(graphdef, params)
    language = model.language_model
    prefix = language.prefill(language.embed_tokens(ids[:, :8]), jnp.full(ROWS, 8))
    text = language.extend(prefix, language.embed_tokens(ids)[:, None])[:, 0]
    image = language.extend(prefix, model.code_embeddings(codes)[:, None])[:, 0]
    head = model.generation_head
    before = layers.gelu(head.proj_out(image))
    return {
      'text': (model.lm_head(text), rounded_linear(model.lm_head, text)),
      'picture': (head.vision_head(before), rounded_linear(head.vision_head, before)),
    }

  whole = logits(params)
  half = logits(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
  found = {}
  for name, (truth, _) in whole.items():
    rows = {}
    for kind, mine in zip(('float32 logits', 'bfloat16 logits'), half[name]):
      rows[kind] = _errors(log_softmax(mine) - log_softmax(truth))
    # The head alone: the same states, with and without rounding.
    fine, coarse = half[name]
    rows['rounding alone'] = _errors(log_softmax(coarse) - log_softmax(fine))
    pairs = [jnp.stack([x[:2], x[2:]]) for x in (fine, coarse)]
    mixed = [guide(x, GUIDANCE, axis=0) for x in pairs]
    rows['rounding alone, guided logits'] = _errors(mixed[1] - mixed[0])
    rows['largest logit'] = float(jnp.max(jnp.abs(truth)))
    found[name] = rows
  return found


def _errors(difference):
  return {
    'rms': float(jnp.sqrt(jnp.mean(jnp.square(difference)))),
    'largest': float(jnp.max(jnp.abs(difference))),
  }


if __name__ == '__main__':
  print(json.dumps({'scenes': measure(*embedded()), 'width 1024': measure(*wide())}, indent=1))
