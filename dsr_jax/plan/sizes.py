"""The amount of work: token counts and parameter counts of a step, from a model's sizes and a
configuration.

Axes: B inputs of a task, G candidates, C candidates that learn, N image codes, T text tokens, L
layers, D width.
"""

import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from dsr_jax import chunks as chunks_lib
from dsr_jax import families, losses
from dsr_jax import state as state_lib
from dsr_jax.models.unified import Counts, guided_codes

TEMPLATE = 8  # tokens around a prompt, a question or an answer; a few more or less change no plan
QUESTION = 8
BYTES = {'float32': 4, 'bfloat16': 2}


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Counts of one step; of the whole step unless the name says otherwise."""

  model: Any  # a family's configuration
  method: object
  system: object
  prompt: int  # tokens of the longest prompt

  # The model.

  @functools.cached_property
  def counts(self) -> Counts:
    return families.family_of(self.model).counts(self.model)

  @property
  def inner(self):
    """Width of all heads together."""
    return self.model.text.num_attention_heads * self.model.text.head_dim

  @property
  def layer(self):
    """Weights of a layer's matrices."""
    return self.counts.layer

  @property
  def body(self):
    """Weights of all layers' matrices."""
    return self.model.text.num_hidden_layers * self.layer

  @property
  def image_head(self):
    """Weights of the head that draws."""
    return self.counts.image_head

  @property
  def text_head(self):
    """Weights of the head that writes."""
    return self.counts.text_head

  @property
  def trained(self):
    """Parameters that learn: adapters, or the language model with what `method.trainable` adds."""
    if self.method.trainable == 'lora':
      return self.model.text.num_hidden_layers * self.method.lora.rank * self.counts.adapted
    trainable, _ = state_lib.split_params(
      shapes(self.model), families.family_of(self.model), self.method.trainable
    )
    return sum(x.size for x in jax.tree.leaves(trainable))

  @property
  def kv(self):
    """Numbers that one token adds to the cache."""
    return 2 * self.model.text.num_hidden_layers * self.inner

  @property
  def element(self):
    """Bytes of a number in the compute type."""
    return BYTES[self.system.compute_dtype]

  @property
  def own_element(self):
    """Bytes of a number in a candidate's cache; a vector of 8 bits has a float32 scale."""
    return 1 + 4 / self.model.text.head_dim if self.system.cache_dtype else self.element

  # The step.

  @property
  def steps(self):
    """Passes over a whole image to draw it; 0: it is drawn code by code."""
    return self.counts.steps

  @property
  def branches(self):
    """Rows per candidate at an image's first code: two with guidance."""
    return 2 if self.guided else 1

  @property
  def guided(self):
    """The number of an image's codes, from the first, that are drawn with guidance."""
    return guided_codes(self.method, self.model.num_codes)

  @property
  def learners(self):
    """C."""
    choose = losses.OBJECTIVES[self.method.objective].choose
    rewards = jax.ShapeDtypeStruct((1, self.method.group_size), jnp.float32)
    return jax.eval_shape(lambda r: choose(r, self.method), rewards)[0].shape[1]

  @property
  def picture_rows(self):
    """Rows per input when images learn. If all codes are masked, one row serves all candidates; the
    bound needs a row for every candidate and draw.
    """
    if not self.steps:
      return self.learners
    bound = self.method.picture_likelihood == 'elbo'
    return self.learners * self.method.elbo_draws if bound else 1

  @property
  def picture_block(self):
    """Positions in such a row."""
    return self.counts.block if self.steps else self.model.num_codes

  @property
  def drawing_prefix(self):
    """Tokens before an image's first code when a prompt is drawn."""
    return self.prompt + TEMPLATE

  @property
  def reading_prefix(self):
    """Tokens before an answer about an image."""
    return self.counts.reading_tokens + QUESTION + TEMPLATE

  @property
  def text_prefix(self):
    """Tokens before an image's first code when a sampled text is the prompt."""
    return self.method.max_text_tokens + TEMPLATE

  def chunk(self, key):
    """Inputs processed at once; key: 'rollout_chunk' or 'update_chunk'."""
    return chunks_lib.size(getattr(self.system, key), self.method)


def operations(tokens, context, s: Sizes, head=0):
  """Multiplications and additions of `tokens` tokens in all layers, each attending to `context`
  others; head: weights of the head after them.
  """
  return (
    2 * tokens * (s.body + head) + 4 * s.model.text.num_hidden_layers * s.inner * tokens * context
  )


@functools.cache
def vq_operations(model):
  """Operations to (encode, decode) an image, as counted by XLA; neither has a loop."""
  family = families.family_of(model)
  whole = nnx.merge(family.graphdef(model), shapes(model))
  graphdef, params = nnx.split(getattr(whole, family.image_tokenizer))

  def count(fn, x):
    return (
      jax.jit(lambda params, x: fn(nnx.merge(graphdef, params), x))
      .lower(params, x)
      .cost_analysis()['flops']
    )

  side = model.image_size
  with jax.default_device(
    jax.local_devices(backend='cpu')[0]
  ):  # the GPU compiler counts only compiled programs
    return (
      count(lambda vq, x: vq.encode(x), jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)),
      count(lambda vq, x: vq.decode(x), jax.ShapeDtypeStruct((1, model.num_codes), jnp.int32)),
    )


@functools.cache
def shapes(model):
  """Shapes of all parameters, nested by part."""
  return families.family_of(model).shapes(model)
