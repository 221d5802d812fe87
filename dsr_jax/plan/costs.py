"""Operations, bytes, collectives and time of a step by phase, counted from sizes alone.

Rates are the vendors' published ones; the share of them that a phase reaches is assumed (`SHARES`)
and printed with every prediction. The time of a phase is that of computing or that of reading,
whichever is longer, plus its collectives.

Axes: B inputs, G candidates, N image codes, T text tokens.
"""

import dataclasses
import functools
import re

from dsr_jax import losses
from dsr_jax.errors import InputError
from dsr_jax.plan.sizes import Sizes, operations, vq_operations


@dataclasses.dataclass(frozen=True)
class Chip:
  """memory: bytes that a program may use; operations: bfloat16 operations per second; bandwidth: of
  the memory, bytes per second; link: bytes per second in one direction between neighbors along an
  axis of the mesh; tpu: the compiler's name for it, or ''.
  """

  memory: float
  operations: float
  bandwidth: float
  link: float
  tpu: str = ''


# Sources: cloud.google.com/tpu/docs (v4 to v7), with the memory that the TPU compiler allows;
# NVIDIA's data sheets (dense rates, NVLink in one direction).
CHIPS = {
  'v4': Chip(30.75 * 2**30, 275e12, 1.23e12, 45e9, 'v4'),
  'v5e': Chip(15.75 * 2**30, 197e12, 0.82e12, 45e9, 'v5e'),
  'v5p': Chip(95.74 * 2**30, 459e12, 2.77e12, 90e9, 'v5p'),
  'v6e': Chip(31.25 * 2**30, 918e12, 1.64e12, 90e9, 'v6e'),
  'a100': Chip(0.92 * 80e9, 312e12, 2.04e12, 300e9),
  'h100': Chip(0.92 * 80e9, 989e12, 3.35e12, 450e9),
  'h200': Chip(0.92 * 141e9, 989e12, 4.8e12, 450e9),
  'b200': Chip(0.92 * 180e9, 2250e12, 8.0e12, 900e9),
}
TOPOLOGIES = {
  'v5e': ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16'),
  'v6e': ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16'),
  'v4': ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8'),
  'v5p': ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8'),
}
SHARES = {'matrix products': 0.5, 'picture convolutions': 0.25, 'memory': 0.7, 'links': 0.7}
LATENCY = 8e-6  # seconds of a small collective inside a decode step


@dataclasses.dataclass(frozen=True)
class Phase:
  """One phase of a step. operations: of all devices together; bytes: read from and written to one
  device's memory; collective_bytes: over one device's links.
  """

  name: str
  operations: float
  bytes: float
  collective_bytes: float
  collectives: str
  seconds: float


def parse(topology: str):
  """'v5e:8x8' or 'h200:8' -> (name, Chip, number of chips). InputError for an unknown topology; it
  lists some that exist.
  """
  name, _, shape = topology.partition(':')
  some = [f'{kind}:{size}' for kind, sizes in TOPOLOGIES.items() for size in sizes[-4:-2]] + [
    'h100:8',
    'h200:8',
  ]
  known = name in CHIPS and re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', shape)
  if not known or (shape not in TOPOLOGIES[name] if name in TOPOLOGIES else 'x' in shape):
    kinds = ', '.join(TOPOLOGIES.get(name, ())) if name in TOPOLOGIES else ''
    raise InputError(
      f'the topology {topology!r} is unknown; choose one such as '
      f'{", ".join(f"{name}:{k}" for k in kinds.split(", ")) if kinds else ", ".join(some)}'
    )
  count = 1
  for size in shape.split('x'):
    count *= int(size)
  return name, CHIPS[name], count


def phases(s: Sizes, mesh, chip: Chip) -> list[Phase]:
  """The phases of one step on a mesh (a dict of axis sizes) of such chips; if the tasks take turns,
  half of each task's step.
  """
  found = []
  if 'generation' in s.method.tasks:
    found += _generation(s, mesh, chip)
  if 'understanding' in s.method.tasks:
    found += _understanding(s, mesh, chip)
  if s.method.strategy == 'separate':
    found = [
      dataclasses.replace(
        p, **{k: getattr(p, k) / 2 for k in ('operations', 'bytes', 'collective_bytes', 'seconds')}
      )
      for p in found
    ]
  return [_gather(s, mesh, chip), *found, _optimizer(s, mesh, chip)]


def _generation(s: Sizes, mesh, chip):
  b, g = s.method.inputs_per_task, s.method.group_size
  rows, reading = b * g, s.reading_prefix
  yield _drawn_in_steps(s, mesh, chip) if s.steps else _drawn_by_codes(s, mesh, chip)
  yield _compute(
    'generation: codes to pictures',
    chip,
    mesh,
    rows * vq_operations(s.model)[1],
    'picture convolutions',
  )
  score = (
    rows * s.counts.eye_operations
    + operations(rows * reading, reading, s)
    + operations(rows * s.prompt, reading + s.prompt, s, s.text_head)
  )
  yield _scored('generation: reward', s, mesh, chip, score, rows * (reading + s.prompt))
  if s.method.credit in ('guidance', 'attribution'):
    yield _credited(s, mesh, chip, score)
  prefix = b * s.drawing_prefix
  tokens, ops = _pictures_learned(s)
  ops += operations(prefix, s.drawing_prefix, s)
  yield _learned('generation: learn', s, mesh, chip, ops, prefix + tokens)


def _credited(s: Sizes, mesh, chip, score) -> Phase:
  """The extra work of `method.credit`: three passes over all images, or R_G again and its gradient.
  score: operations of R_G.
  """
  if s.method.credit == 'guidance':
    tokens = s.method.inputs_per_task * s.method.group_size * s.picture_block
    one = operations(tokens, s.drawing_prefix + s.picture_block, s, s.image_head)
    passes = 3  # conditional, and both branches for the unconditional one
  else:
    one, passes = score, 3 + s.system.remat
  return _compute('generation: credit', chip, mesh, passes * one, 'matrix products')


def _drawn_by_codes(s: Sizes, mesh, chip) -> Phase:
  b, g, n = s.method.inputs_per_task, s.method.group_size, s.model.num_codes
  rows = b * g
  prefill = operations(b * s.branches * s.drawing_prefix, s.drawing_prefix, s)
  draw = functools.partial(
    _decode, 'generation: draw', s, mesh, chip, prefix=s.drawing_prefix, head=s.image_head
  )
  guided = draw(prefill if s.guided else 0.0, 2 * rows, 2 * b * s.drawing_prefix, last=s.guided)
  plain = draw(0.0 if s.guided else prefill, rows, b * s.drawing_prefix, first=s.guided, last=n)
  return dataclasses.replace(
    plain,
    **{
      k: getattr(guided, k) + getattr(plain, k)
      for k in ('operations', 'bytes', 'collective_bytes', 'seconds')
    },
  )


def _drawn_in_steps(s: Sizes, mesh, chip) -> Phase:
  """The whole block of an image at every step, in both branches; its prefix is run once."""
  rows = s.method.inputs_per_task * s.branches
  prefix, block = s.drawing_prefix, s.counts.block
  tokens = s.steps * rows * s.method.group_size * block
  ops = operations(rows * prefix, prefix, s) + operations(tokens, prefix + block, s, s.image_head)
  phase = _compute('generation: draw', chip, mesh, ops, 'matrix products')
  moved, seconds = _layers(s, mesh, chip, rows * prefix + tokens, 1)
  return dataclasses.replace(
    phase,
    collective_bytes=moved,
    collectives='all-reduce over tp' * (mesh['tp'] > 1),
    seconds=phase.seconds + seconds,
  )


def _pictures_learned(s: Sizes):
  """(tokens, operations) of a forward pass over the images that learn, after their prefix."""
  tokens = s.method.inputs_per_task * s.picture_rows * s.picture_block
  return tokens, operations(tokens, s.drawing_prefix + s.picture_block, s, s.image_head)


def _understanding(s: Sizes, mesh, chip):
  b, g, n, t = (
    s.method.inputs_per_task,
    s.method.group_size,
    s.model.num_codes,
    s.method.max_text_tokens,
  )
  rows, reading = b * g, s.reading_prefix
  yield _compute(
    'understanding: pictures to codes',
    chip,
    mesh,
    b * vq_operations(s.model)[0],
    'picture convolutions',
  )
  prefill = b * s.counts.eye_operations + operations(b * reading, reading, s)
  yield _decode(
    'understanding: write',
    s,
    mesh,
    chip,
    prefill,
    rows,
    b * reading,
    prefix=reading,
    head=s.text_head,
    last=t,
  )
  score = operations(rows * s.text_prefix, s.text_prefix, s) + operations(
    rows * n, s.text_prefix + n, s, s.image_head
  )
  yield _scored('understanding: reward', s, mesh, chip, score, rows * (s.text_prefix + n))
  pairs = (
    b * s.counts.eye_operations
    + operations(b * reading, reading, s)
    + operations(b * s.learners * t, reading + t, s, s.text_head)
  )
  yield _learned('understanding: learn', s, mesh, chip, pairs, b * reading + b * s.learners * t)


def _devices(mesh):
  return mesh['data'] * mesh['fsdp'] * mesh['tp']


def _ring(size, ways, chip):
  """Bytes over a device's link, and seconds, to gather `size` bytes that `ways` devices share (a
  sum takes twice that).
  """
  moved = size * (ways - 1) / ways
  return moved, moved / (chip.link * SHARES['links'])


def _compute(name, chip, mesh, ops, share):
  return Phase(name, ops, 0.0, 0.0, '', ops / _devices(mesh) / (chip.operations * SHARES[share]))


def _gather(s: Sizes, mesh, chip):
  """Moves the weights to the layout of decoding, once per step."""
  weights = (s.body + s.counts.tables) * s.element / mesh['tp']
  moved, seconds = _ring(weights, mesh['fsdp'], chip)
  reading = 3 * weights / (chip.bandwidth * SHARES['memory'])
  return Phase(
    'gather weights for decoding',
    0.0,
    3 * weights,
    moved,
    'all-gather over fsdp' * (mesh['fsdp'] > 1),
    seconds + reading,
  )


def _decode(name, s: Sizes, mesh, chip, prefill, rows, shared, *, prefix, head, last, first=0):
  """Tokens `first` to `last`: each reads the weights and the filled part of the cache. rows: the
  number decoded; shared: prefix tokens of all groups.
  """
  tp, ways = mesh['tp'], mesh['data'] * mesh['fsdp']
  layers = s.model.text.num_hidden_layers
  # models/decode_kernel.py reads only the filled part, plain products to the end of the segment
  by_kernel = not (chip.tpu or s.system.decode_scan or s.system.cache_dtype) and s.element == 2
  length = last - first
  filled = (
    first + last + (0 if by_kernel else min(s.system.decode_segment, length))
  ) / 2  # on average
  ops = prefill + operations(rows * length, prefix + filled, s, head)
  weights = (s.body + head) * s.element / tp
  chunks = s.method.inputs_per_task / s.chunk('rollout_chunk')
  cache = (rows * filled * s.own_element + shared * s.element) * s.kv / tp / ways
  bytes_ = length * (weights * chunks + cache)
  moved, seconds = 0.0, 0.0
  if tp > 1:  # two sums of the states per layer, and one before the head
    moved, seconds = _ring(
      2 * rows / ways * s.model.text.hidden_size * s.element * length * (2 * layers + 1), tp, chip
    )
    seconds += length * chunks * (2 * layers + 3) * LATENCY
  busy = max(
    ops / _devices(mesh) / (chip.operations * SHARES['matrix products']),
    bytes_ / (chip.bandwidth * SHARES['memory']),
  )
  return Phase(name, ops, bytes_, moved, 'all-reduce over tp' * (tp > 1), busy + seconds)


def _layers(s: Sizes, mesh, chip, tokens, passes):
  """Sums over tp of the states of each layer: two per pass, in each direction."""
  if mesh['tp'] == 1:
    return 0.0, 0.0
  size = (
    2
    * tokens
    / (mesh['data'] * mesh['fsdp'])
    * s.model.text.hidden_size
    * s.element
    * 2
    * s.model.text.num_hidden_layers
    * passes
  )
  return _ring(size, mesh['tp'], chip)


def _scored(name, s: Sizes, mesh, chip, ops, tokens):
  """A forward pass, plus the same by the frozen model now and then, or by the reference always."""
  times = 1 + (1 / s.system.frozen_every if s.system.frozen_every else 0)
  phase = _compute(name, chip, mesh, ops * times, 'matrix products')
  moved, seconds = _layers(s, mesh, chip, tokens, times)
  return dataclasses.replace(
    phase,
    collective_bytes=moved,
    collectives='all-reduce over tp' * (mesh['tp'] > 1),
    seconds=phase.seconds + seconds,
  )


def _learned(name, s: Sizes, mesh, chip, ops, tokens):
  """One forward pass, a backward pass of twice its cost, and another forward pass with remat;
  weights are gathered for each pass and gradients are scattered.
  """
  reference = 1 if losses.OBJECTIVES[s.method.objective].needs_reference(s.method) else 0
  forward, updates = 1 + s.system.remat, s.method.inner_updates
  passes = updates * (forward + 2) + reference
  phase = _compute(name, chip, mesh, ops * passes, 'matrix products')
  moved, seconds = _layers(s, mesh, chip, tokens, updates * (forward + 1) + reference)
  kinds = ['all-reduce over tp'] * (mesh['tp'] > 1)
  if mesh['fsdp'] > 1:
    chunks = s.method.inputs_per_task / s.chunk('update_chunk')
    weights, time = _ring(
      (s.body + s.text_head + s.image_head) * s.element / mesh['tp'], mesh['fsdp'], chip
    )
    times = chunks * (
      updates * (forward + 2) + reference
    )  # forward, backward, and scattering the gradients
    moved, seconds = moved + weights * times, seconds + time * times
    kinds += ['all-gather and reduce-scatter over fsdp']
  return dataclasses.replace(
    phase, collective_bytes=moved, collectives=', '.join(kinds), seconds=phase.seconds + seconds
  )


def _optimizer(s: Sizes, mesh, chip):
  """Reads parameters, moments and gradients; writes all but the gradients."""
  trained = s.trained
  bytes_ = (
    28 * trained / (1 if s.method.trainable == 'lora' else mesh['fsdp'] * mesh['tp'])
  )  # every device holds whole adapters
  return Phase(
    'optimizer', 12 * trained, bytes_, 0.0, '', bytes_ / (chip.bandwidth * SHARES['memory'])
  )
