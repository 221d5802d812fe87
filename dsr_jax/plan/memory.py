"""Bytes per device by part, counted before anything is compiled.

The state is exact. The memory of each phase is an estimate from the largest arrays that are live at
once; the compiler's number is the one that counts.
"""

import dataclasses
import math

import jax
from jax.sharding import AbstractMesh, AxisType

from dsr_jax import families
from dsr_jax import state as state_lib
from dsr_jax.plan import sizes as plan_sizes
from dsr_jax.plan.sizes import Sizes

GIB = 2**30
# What to do if a step does not fit.
ADVICE = (
  'lower system.rollout_chunk or system.update_chunk, set system.remat=True, '
  'system.cache_dtype=int8 or system.frozen_every=0, raise system.mesh.tp, or take more devices'
)


@dataclasses.dataclass(frozen=True)
class Estimate:
  """parts: (name, bytes per device, when they are live: 'always', 'rollout', 'update', or
  'evaluation', which samples as a rollout does); advice: what to do if they do not fit.
  """

  parts: tuple
  advice: str = ADVICE

  def of(self, phase):
    """Bytes in one phase."""
    return sum(size for _, size, when in self.parts if when == phase)

  @property
  def sampling(self):
    """Bytes beside the state while sampling, at most: in an evaluation."""
    return self.of('rollout') + self.of('evaluation')

  @property
  def total(self):
    """Bytes at the peak."""
    return self.of('always') + max(self.sampling, self.of('update'))

  def line(self):
    """One line for the log of a run."""
    return (
      f'estimate     {_size(self.total)} per device: state {_size(self.of("always"))}, plus '
      f'{_size(self.sampling)} while sampling or {_size(self.of("update"))} while learning'
    )

  def table(self):
    """The bytes by part, as text."""
    rows = [f'{name:<32} {_size(size):>12}  {when}' for name, size, when in self.parts]
    return '\n'.join(
      [
        'bytes per device, estimated',
        *rows,
        f'{"total, at the peak":<32} {_size(self.total):>12}',
      ]
    )


def estimate(model, config, mesh, prompt=None) -> Estimate:
  """The estimate for a model's configuration, a `Config` and the sizes of the mesh's axes (a
  dict).
  """
  s = Sizes(model, config.method, config.system, prompt or config.data.max_prompt_tokens)
  parts = _state(s, mesh, config.eval) + _rollout(s, mesh) + _update(s, mesh)
  return Estimate(tuple(parts))


def bytes_a_device(tree):
  """Bytes per device of arrays, or of shapes with layouts."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


def _state(s: Sizes, mesh, evaluation):
  abstract = AbstractMesh(
    tuple(mesh.values()), tuple(mesh), axis_types=(AxisType.Auto,) * len(mesh)
  )
  family = families.family_of(s.model)
  state = state_lib.abstract_state(plan_sizes.shapes(s.model), family, s.method, s.system, abstract)
  parts = [
    ('trained parameters, float32', state.params),
    ("optimizer's moments", state.opt_state),
    ('running mean', state.ema_params),
    ('frozen parameters', state.fixed_params),
    ('copy of the initial model', state.ref_params),
  ]
  found = [(name, bytes_a_device(part), 'always') for name, part in parts if part is not None]
  # A run on the user's own data loads the initial model for each evaluation if the state has none.
  # Adapters need no second copy.
  loads = evaluation.benchmark == 'own' and s.method.trainable != 'lora'
  if loads and state.ref_params is None:
    one = state.params.get('generator', state.params)  # of two models only one
    size = bytes_a_device(one) * s.element // 4  # from float32 to the element of the step
    found.append(('initial model, to score with', size, 'evaluation'))
  return found


def _rows(s: Sizes, mesh, key):
  """Inputs of a chunk that a device holds."""
  return -(-s.chunk(key) // (mesh['data'] * mesh['fsdp']))


def _rollout(s: Sizes, mesh):
  tp, rows, group = mesh['tp'], _rows(s, mesh, 'rollout_chunk'), s.method.group_size
  v, element = s.model, s.element
  copies = (
    1 if s.system.decode_scan else 2
  )  # unrolled layers are copied out of the stack, which prefixes and likelihoods still use
  parts = [
    (
      'weights for decoding',
      (copies * s.body + s.counts.tables) * element / tp,
      'rollout',
    )
  ]
  cache, scoring = [], []
  if 'generation' in s.method.tasks and s.steps:
    drawn = rows * group * s.branches
    cache.append(
      rows * s.branches * s.drawing_prefix * s.kv * element / tp
      + _inside(s, mesh, drawn, s.counts.block, s.drawing_prefix + s.counts.block)
      + _logits(s, mesh, drawn, v.num_codes, v.vq.num_embeddings)
    )
  elif 'generation' in s.method.tasks:
    held = 2 * s.guided + (
      v.num_codes if s.guided < v.num_codes else 0
    )  # both caches exist where guidance ends
    cache.append(
      rows * (group * held * s.own_element + s.branches * s.drawing_prefix * element) * s.kv / tp
    )
  if 'generation' in s.method.tasks:
    scoring.append(
      _scoring(s, mesh, rows * group, s.reading_prefix, s.prompt, v.text.vocab_size)
      + rows * group * v.image_size**2 * 12
    )
  if s.method.credit == 'attribution' and 'generation' in s.method.tasks:
    # R_G is differentiated by the pixels
    scoring.append(
      _kept(s, mesh, rows * group, s.reading_prefix + s.prompt, s.prompt, v.text.vocab_size)
    )
  if 'understanding' in s.method.tasks:
    cache.append(
      rows
      * (group * s.method.max_text_tokens * s.own_element + s.reading_prefix * element)
      * s.kv
      / tp
    )
    scoring.append(_scoring(s, mesh, rows * group, s.text_prefix, v.num_codes, v.vq.num_embeddings))
  # Scoring follows sampling; the cache has been freed when it begins.
  parts.append(('cache, or activations of scoring', max(1.2 * max(cache), max(scoring)), 'rollout'))
  return parts


def _scoring(s: Sizes, mesh, rows, prefix, length, vocabulary):
  """Bytes of a forward pass of rows with a prefix each: keys and values of the prefix, and the
  activations inside one layer.
  """
  longest = max(prefix, length)
  kept = rows * prefix * s.kv * s.element / mesh['tp']
  return (
    kept
    + _inside(s, mesh, rows, longest, prefix + length if length >= prefix else longest)
    + _logits(s, mesh, rows, length, vocabulary)
  )


def _inside(s: Sizes, mesh, rows, tokens, context):
  """Bytes inside one layer: several copies of the states, attention scores in float32 twice, the
  MLP's two widths.
  """
  t, tp = s.model.text, mesh['tp']
  states = (
    rows * tokens * (4 * t.hidden_size + (4 * s.inner + 2 * t.intermediate_size) / tp) * s.element
  )
  return states + 2 * rows * t.num_attention_heads / tp * tokens * context * 4


def _logits(s: Sizes, mesh, rows, length, vocabulary):
  at_once = min(s.system.logprob_chunk or length, length)
  return 3 * rows * at_once * vocabulary / mesh['tp'] * 4


def _update(s: Sizes, mesh):
  inputs, t = _rows(s, mesh, 'update_chunk'), s.model.text
  split = mesh['fsdp'] * mesh['tp']
  trained = s.trained / (
    1 if s.method.trainable == 'lora' else split
  )  # every device holds whole adapters
  tasks = []  # (rows of an input, tokens of its prefix, of a row, vocabulary)
  if 'generation' in s.method.tasks:
    own = s.picture_rows, s.drawing_prefix, s.picture_block
    tasks.append((*own, s.model.vq.num_embeddings))
  if 'understanding' in s.method.tasks:
    tasks.append((s.learners, s.reading_prefix, s.method.max_text_tokens, t.vocab_size))
  activations = []
  for copies, prefix, length, vocabulary in tasks:
    tokens = prefix / copies + length  # a group's prefix is run once
    activations.append(
      _kept(s, mesh, inputs * copies, tokens, length, vocabulary, context=prefix + length)
    )
  weights = (
    s.body + s.text_head + s.image_head
  ) * s.element / split + 3 * s.layer * s.element / mesh['tp']
  return [
    ('gradients, float32, and their sum', 2 * trained * 4, 'update'),
    ('compute-type weights', weights, 'update'),
    ('activations of learning', max(activations), 'update'),
  ]


def _kept(s: Sizes, mesh, rows, tokens, length, vocabulary, context=0):
  """Bytes that a backward pass needs of its forward pass. tokens: of a row; context: what they
  attend to, by default themselves; length: the tokens with logits.
  """
  t = s.model.text
  kept = rows * tokens * t.num_hidden_layers * t.hidden_size * s.element
  inside = 2 * _inside(s, mesh, rows, tokens, context or tokens)  # forward again, and backward
  if not s.system.remat:
    inside *= t.num_hidden_layers
  return kept + inside + 2 * _logits(s, mesh, rows, length, vocabulary)


def _size(n):
  return f'{n / GIB:,.2f} GiB' if n >= GIB / 10 else f'{n / 2**20:,.1f} MiB'
