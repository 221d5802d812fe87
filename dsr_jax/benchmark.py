"""Times the phases of a step on this machine, and compares them with ceilings measured in the same
run. Uses random weights and any configuration.

  python -m dsr_jax.benchmark --config=configs/scenes.py [--config.key=value] [--repeats=5]
      [--phases=draw,learn drawing]

Prints a table on stderr and JSON on stdout. Does not read or download weights: a phase takes the
same time with random ones.

Axes: B inputs, G samples, C samples that learn, N image codes, T text tokens, H W pixels.
"""

from collections.abc import Callable
import dataclasses
import statistics
import sys
import time
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax import cli, config_loading, families, sharding
from dsr_jax import state as state_lib
from dsr_jax import step as step_lib
from dsr_jax.config import ROLES
from dsr_jax.errors import InputError, first_line
from dsr_jax.models.unified import (
  Picture,
  Sampling,
  Scoring,
  Text,
  named,
  row_keys,
  score_keys,
)
from dsr_jax.plan import memory as plan_memory
from dsr_jax.plan import program as plan_program
from dsr_jax.plan import sizes as plan_sizes
from dsr_jax.runtime import cpu, workdir

WHOLE_STEP = 'whole step'
PHASES = (
  'draw',
  'codes to pictures',
  'reward of drawing',
  'pictures to codes',
  'write',
  'reward of writing',
  'learn drawing',
  'learn writing',
  WHOLE_STEP,
)


def main(argv, f=flags.FLAGS):
  """Prints the times."""
  cli.no_arguments(argv)
  cli.check_range(1, 10_000, repeats=f.repeats)
  for name in f.phases:
    if name not in PHASES:
      raise InputError(f'--phases has the unknown phase {name!r}; choose from {", ".join(PHASES)}')
  report = benchmark(config_loading.from_config_dict(f.config), f.repeats, f.phases or PHASES)
  cli.log(_table(report))
  cli.print_json(report)


def benchmark(config, repeats: int, wanted=PHASES) -> dict:
  """The wanted phases and ceilings as a dict of JSON values.

  Raises:
    InputError: if a device has no room; a table of bytes by part is printed first.
  """
  config = cpu.divide(config)
  workdir.check_accelerator()
  model = plan_program.sizes_of(config.model)
  model = dataclasses.replace(
    model, templates=model.templates or plan_program.stand_in_templates(model)
  )
  families.check(model, config)
  model = families.sizes_as_drawn(model, config.method)
  mesh = sharding.make_mesh(config.system.mesh)
  sizes = plan_sizes.Sizes(model, config.method, config.system, config.data.max_prompt_tokens)
  chunks = {f'system.{key}': sizes.chunk(key) for key in ('rollout_chunk', 'update_chunk')}
  sharding.check_fits(mesh.shape, families.family_of(model).num_heads(model), chunks)
  estimate = plan_memory.estimate(model, config, mesh.shape)
  print(estimate.table(), file=sys.stderr)
  # Counted on the host and cached before the devices' mesh is set.
  plan_sizes.vq_operations(model)
  try:
    ceilings = _ceilings(config.system.compute_dtype, repeats)
    print(
      f'ceilings     {ceilings.flops / 1e12:.2f} TFLOP/s of matrix products, '
      f'{ceilings.bandwidth / 1e9:.1f} GB/s of memory',
      file=sys.stderr,
    )
    with jax.set_mesh(mesh):
      rows = _timed_phases(config, sizes, mesh, ceilings, repeats, wanted)
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    raise InputError(
      f'a device has no room ({first_line(e)}); the table above shows the bytes that are needed: '
      f'{estimate.advice}'
    ) from e
  device = jax.devices()[0]
  return dict(
    device=f'{jax.device_count()} x {device.device_kind}',
    jax=jax.__version__,
    model=config.model,
    mesh=dict(mesh.shape),
    compute_dtype=config.system.compute_dtype,
    repeats=repeats,
    matrix_flops=ceilings.flops,
    memory_bytes_per_second=ceilings.bandwidth,
    phases=rows,
    memory=(device.memory_stats() or {}).get('peak_bytes_in_use'),
  )


# Timing.


def _timed(fn, repeats, *args, calls=1) -> float:
  """Median seconds of fn(*args) after two warm-up rounds.

  calls: per round, so that the launch does not dominate the time of short calls.
  """
  seconds = []
  for attempt in range(repeats + 2):
    began = time.perf_counter()
    jax.block_until_ready([fn(*args) for _ in range(calls)])
    if attempt > 1:
      seconds.append((time.perf_counter() - began) / calls)
  return statistics.median(seconds)


@dataclasses.dataclass(frozen=True)
class Ceilings:
  """Of one device. flops: operations per second of a large matrix product; bandwidth: bytes per
  second of a large sum.
  """

  flops: float
  bandwidth: float


def _ceilings(dtype, repeats) -> Ceilings:
  on_cpu = jax.default_backend() == 'cpu'
  side, length = (1024, 2**24) if on_cpu else (8192, 2**29)
  device = jax.local_devices()[0]
  # Random numbers: constants run faster than real data.
  a = jax.device_put(jax.random.normal(jax.random.key(0), (side, side), dtype), device)
  x = jax.device_put(jax.random.normal(jax.random.key(1), (length,)), device)
  product = _timed(jax.jit(lambda a: a @ a), repeats, a, calls=10)
  reading = _timed(jax.jit(jnp.sum), repeats, x, calls=10)
  # The devices of one CPU share its cores, and one of them alone uses all.
  sharing = jax.local_device_count() if on_cpu else 1
  return Ceilings(flops=2 * side**3 / product / sharing, bandwidth=x.nbytes / reading / sharing)


def _timed_phases(config, sizes, mesh, ceilings: Ceilings, repeats, wanted) -> list[dict]:
  """A row of the report for each wanted phase alone, and for the whole step."""
  work = Work.of(sizes, mesh)
  phases = []
  if 'generation' in config.method.tasks:
    phases += generation_phases(work)
  if 'understanding' in config.method.tasks:
    phases += understanding_phases(work)
  ctx = work.ctx
  state = plan_program.random_arrays(
    state_lib.abstract_state(
      plan_sizes.shapes(sizes.model), ctx.family, ctx.method, ctx.system, mesh
    )
  )
  rows = []
  for phase in sorted(phases, key=lambda phase: PHASES.index(phase.name)):
    if phase.name in wanted:
      seconds = _timed(jax.jit(_program(ctx, phase)), repeats, state, *phase.args)
      print(f'timed        {phase.name}: {seconds:.3f} s', file=sys.stderr)
      rows.append(_row(phase, seconds, mesh.size, ceilings))
  if WHOLE_STEP in wanted:
    rows.append(_whole_step(config, sizes.model, mesh, state, repeats))
  return rows


def _program(ctx: step_lib.StepContext, phase: 'Phase'):
  """(state, *phase.args) -> the phase's outputs, with the weights that the step uses for it; with
  `separate`, those of the first role.
  """
  role = next(iter(ROLES)) if ctx.method.strategy == 'separate' else None

  def rollout(state, *args):
    params, _ = state.of_role(role)
    return phase.fn(step_lib.rollout_policy(ctx, state, params), *args)

  def gradient(state, *args):
    params, _ = state.of_role(role)

    def loss_fn(params):
      return phase.fn(ctx.build(state, params), *args)

    return sharding.split_params(jax.grad(loss_fn)(params), ctx.family.sharding_rules)

  return gradient if phase.learns else rollout


def _row(phase: 'Phase', seconds: float, devices: int, ceilings: Ceilings) -> dict:
  row = dict(phase=phase.name, seconds=seconds)
  row |= {f'{what}_per_second': count / seconds for what, count in phase.counts.items()}
  if phase.flops:
    row['of_matrix_peak'] = phase.flops / devices / seconds / ceilings.flops
  if phase.bytes:
    row['of_memory_bandwidth'] = phase.bytes / seconds / ceilings.bandwidth
  return row


def _whole_step(config, model, mesh, state, repeats) -> dict:
  """The whole compiled step; with `separate`, the first role's. Donates the state."""
  lowered = next(iter(plan_program.lower_step(config, model, mesh).values()))
  compiled = lowered.compile()
  rng = np.random.default_rng(0)

  def fill(x):
    if x.dtype == bool:
      return np.ones(x.shape, x.dtype)
    return rng.integers(9, 30, x.shape).astype(x.dtype)

  batch = jax.device_put(
    jax.tree.map(fill, lowered.args_info[0][1]), compiled.input_shardings[0][1]
  )
  seconds = []
  for attempt in range(repeats + 1):
    began = time.perf_counter()
    state, metrics, _ = compiled(state, batch)
    jax.block_until_ready(metrics)
    if attempt:
      seconds.append(time.perf_counter() - began)
  return dict(phase=WHOLE_STEP, seconds=statistics.median(seconds))


# The phases.


@dataclasses.dataclass(frozen=True)
class Phase:
  """A part of the step that is timed by itself.

  Attributes:
    name: one of PHASES.
    fn: (model, *args) -> arrays, inside jit; if it learns, the scalar whose gradient is taken.
    args: its inputs.
    counts: {unit: number per call}, for the rates per second.
    flops: the necessary operations of all devices together; 0 if memory bandwidth is the limit.
    bytes: the bytes that a device must read, if memory bandwidth is the limit.
    learns: whether it is a gradient of the trained parameters, without the update. The second
      forward pass of remat does not count as useful work.
  """

  name: str
  fn: Callable[..., Any]
  args: tuple
  counts: dict[str, int]
  flops: float = 0.0
  bytes: float = 0.0
  learns: bool = False


@dataclasses.dataclass(frozen=True)
class Work:
  """The ingredients of the phases: the step's static context, its sizes, and random inputs.

  Attributes:
    ctx: the context of the step.
    sizes: counts of tokens and weights.
    rows: inputs of a rollout chunk.
    update_rows: inputs of an update chunk.
    rows_a_device: inputs of a rollout chunk on each device.
    tp: number of parts that the weights are split into.
    rng: the source of random inputs.
  """

  ctx: step_lib.StepContext
  sizes: plan_sizes.Sizes
  rows: int
  update_rows: int
  rows_a_device: float
  tp: int
  rng: np.random.Generator

  @classmethod
  def of(cls, sizes: plan_sizes.Sizes, mesh) -> 'Work':
    """The work of a step on a mesh."""
    family = families.family_of(sizes.model)
    rows = sizes.chunk('rollout_chunk')
    return cls(
      ctx=step_lib.StepContext(
        graphdef=family.graphdef(sizes.model),
        family=family,
        spec=family.spec(sizes.model),
        method=sizes.method,
        system=sizes.system,
      ),
      sizes=sizes,
      rows=rows,
      update_rows=sizes.chunk('update_chunk'),
      rows_a_device=rows / sharding.ways(mesh.shape),
      tp=mesh.shape['tp'],
      rng=np.random.default_rng(0),
    )

  # Sampling and scoring.

  @property
  def sampling(self) -> Sampling:
    """How the step samples."""
    return next(iter(self.ctx.tasks.values())).sampling

  @property
  def reward_scoring(self) -> Scoring:
    """How rewards are computed."""
    return Scoring(chunk=self.ctx.system.logprob_chunk)

  @property
  def policy_scoring(self) -> Scoring:
    """How the learning policy is scored, without guidance."""
    method, system = self.ctx.method, self.ctx.system
    plain = Scoring(temperature=method.temperature, chunk=system.logprob_chunk, remat=system.remat)
    method = named(self.ctx.spec, method)
    return dataclasses.replace(
      plain,
      picture_likelihood=method.picture_likelihood,
      prompt_drop=method.prompt_drop,
      prompt_drop_way=method.prompt_drop_way,
      elbo_draws=method.elbo_draws,
    )

  # Random inputs.

  def text(self, *shape) -> Text:
    """Text tokens (..., T)."""
    last = self.sizes.model.text.vocab_size - 1
    return Text(self._integers(9, last, shape), jnp.ones(shape, bool))

  def codes(self, *shape):
    """Image codes (..., N)."""
    return self._integers(0, self.ctx.spec.codebook_size, shape)

  def pixels(self, *shape):
    """Images (..., H, W, 3) in [-1, 1]."""
    side = self.ctx.spec.image_size
    return jnp.asarray(self.rng.uniform(-1, 1, (*shape, side, side, 3)), jnp.float32)

  def keys(self):
    """One key per sample, (B, G)."""
    return row_keys(jax.random.key(0), 0, self.rows, self.ctx.method.group_size)

  def likelihood_keys(self, rows):
    """One key per input, (rows,), or None for a model that needs none."""
    return score_keys(self.ctx.spec, row_keys(jax.random.key(0), 0, rows, 1))

  def _integers(self, low, high, shape):
    return jnp.asarray(self.rng.integers(low, high, shape), jnp.int32)

  # Counting.

  def flops(self, tokens, context, head=0) -> float:
    """Operations of a forward pass; see `plan.sizes.operations`."""
    return plan_sizes.operations(tokens, context, self.sizes, head)

  def decode_bytes(self, prefix, head, last, *, branches=1, first=0) -> float:
    """Bytes that a device must read: for each of the tokens `first` to `last`, the weights and the
    filled part of the cache.
    """
    s = self.sizes
    own = self.ctx.method.group_size * (first + last) / 2 * s.own_element
    cache = self.rows_a_device * branches * (own + prefix * s.element) * s.kv / self.tp
    weights = (s.body + head) * s.element / self.tp
    return (last - first) * (weights + cache)

  @property
  def passes(self) -> int:
    """Cost of a gradient in forward passes. With adapters, the other weights need no gradients."""
    return 2 if self.ctx.method.trainable == 'lora' else 3


def generation_phases(work: Work) -> list[Phase]:
  """Text to image."""
  s, spec = work.sizes, work.ctx.spec
  rows, group, n = work.rows, work.ctx.method.group_size, spec.num_codes
  pictures = rows * group
  prompt, codes = work.text(rows, s.prompt), work.codes(rows, group, n)

  def draw(model, prompt, keys):
    return model.sample_pictures(prompt, keys, work.sampling)[0]

  def decode(model, codes):
    return model.picture_from_codes(codes).pixels

  def read_prompt(model, codes, question, prompt):
    picture = model.picture_from_codes(codes)
    text = Text(prompt.ids[:, None], prompt.mask[:, None])
    return model.text_logps(picture, question, text, None, work.reward_scoring)

  def learn(model, prompt, codes):
    keys = work.likelihood_keys(codes.shape[0])
    return model.picture_logps(prompt, codes, keys, work.policy_scoring).logp.mean()

  prefix, head = s.drawing_prefix, s.image_head
  guided_bytes = work.decode_bytes(prefix, head, s.guided, branches=2)
  plain_bytes = work.decode_bytes(prefix, head, n, first=s.guided)
  learners, block = s.picture_rows * work.update_rows, s.picture_block
  return [
    Phase(
      'draw',
      draw,
      args=(prompt, work.keys()),
      counts=dict(tokens=pictures * n, images=pictures),
      bytes=0.0 if s.steps else guided_bytes + plain_bytes,
      flops=_steps_flops(work) if s.steps else 0.0,
    ),
    Phase(
      'codes to pictures',
      decode,
      args=(codes,),
      counts=dict(images=pictures),
      flops=pictures * plan_sizes.vq_operations(s.model)[1],
    ),
    Phase(
      'reward of drawing',
      read_prompt,
      args=(codes, work.text(rows, plan_sizes.QUESTION), prompt),
      counts=dict(tokens=pictures * (s.reading_prefix + s.prompt)),
      flops=work.flops(pictures * s.reading_prefix, s.reading_prefix)
      + work.flops(pictures * s.prompt, s.reading_prefix + s.prompt, s.text_head),
    ),
    Phase(
      'learn drawing',
      learn,
      args=(work.text(work.update_rows, 1, s.prompt), work.codes(work.update_rows, s.learners, n)),
      counts=dict(tokens=learners * block + work.update_rows * prefix),
      flops=work.passes
      * (
        work.flops(work.update_rows * prefix, prefix)
        + work.flops(learners * block, prefix + block, head)
      ),
      learns=True,
    ),
  ]


def _steps_flops(work: Work) -> float:
  """Operations of drawing in steps: the whole block at each step, after one pass of the prefix."""
  s, rows = work.sizes, work.rows * work.sizes.branches
  prefix, block = s.drawing_prefix, s.counts.block
  tokens = s.steps * rows * work.ctx.method.group_size * block
  return work.flops(rows * prefix, prefix) + work.flops(tokens, prefix + block, s.image_head)


def understanding_phases(work: Work) -> list[Phase]:
  """Image to text."""
  s, spec = work.sizes, work.ctx.spec
  rows, group, n = work.rows, work.ctx.method.group_size, spec.num_codes
  length, update_rows = work.ctx.method.max_text_tokens, work.update_rows
  texts = rows * group
  pixels, codes = work.pixels(rows), work.codes(rows, 1, n)

  def encode(model, pixels):
    return model.picture_from_pixels(pixels).codes

  def write(model, pixels, question, keys):
    return model.sample_texts(Picture(None, pixels), question, keys, work.sampling)[0]

  def draw_text(model, text, codes):
    return model.picture_logps(text, codes, None, work.reward_scoring)

  def learn(model, pixels, question, text):
    picture = Picture(None, pixels)
    return model.text_logps(picture, question, text, None, work.policy_scoring).logp.mean()

  prefix = s.reading_prefix
  learners = update_rows * s.learners
  forward = (
    update_rows * s.counts.eye_operations / 3  # its weights are not trained: no backward
    + work.flops(update_rows * prefix, prefix)
    + work.flops(learners * length, prefix + length, s.text_head)
  )
  return [
    Phase(
      'pictures to codes',
      encode,
      args=(pixels,),
      counts=dict(images=rows),
      flops=rows * plan_sizes.vq_operations(s.model)[0],
    ),
    Phase(
      'write',
      write,
      args=(pixels, work.text(rows, plan_sizes.QUESTION), work.keys()),
      counts=dict(tokens=texts * length),
      bytes=work.decode_bytes(prefix, s.text_head, length),
    ),
    Phase(
      'reward of writing',
      draw_text,
      args=(work.text(rows, group, length), codes),
      counts=dict(tokens=texts * (s.text_prefix + n)),
      flops=work.flops(texts * s.text_prefix, s.text_prefix)
      + work.flops(texts * n, s.text_prefix + n, s.image_head),
    ),
    Phase(
      'learn writing',
      learn,
      args=(
        pixels[:1].repeat(update_rows, 0)[:, None],
        work.text(update_rows, plan_sizes.QUESTION),
        work.text(update_rows, s.learners, length),
      ),
      counts=dict(tokens=learners * length + update_rows * prefix),
      flops=work.passes * forward,
      learns=True,
    ),
  ]


# The table.


def _table(report) -> str:
  lines = [
    '',
    f'{report["model"]} on {report["device"]}, {report["compute_dtype"]}, JAX {report["jax"]}; '
    f'ceilings measured: {report["matrix_flops"] / 1e12:.2f} TFLOP/s, '
    f'{report["memory_bytes_per_second"] / 1e9:.1f} GB/s',
    '',
    f'{"phase":<22}{"seconds":>10}{"tokens/s":>12}{"images/s":>11}{"of peak":>9}'
    f'{"of bandwidth":>14}',
  ]

  def cell(row, key, form, width):
    return format(row[key], form).rjust(width) if key in row else ' ' * width

  for row in report['phases']:
    lines.append(
      f'{row["phase"]:<22}{row["seconds"]:10.3f}'
      + cell(row, 'tokens_per_second', ',.0f', 12)
      + cell(row, 'images_per_second', ',.2f', 11)
      + cell(row, 'of_matrix_peak', '.0%', 9)
      + cell(row, 'of_memory_bandwidth', '.0%', 14)
    )
  return '\n'.join(lines + [''])


def define_flags(f=flags.FLAGS):
  config_loading.define_config_flag(
    'config', 'Config file of the run, from configs/; set its keys with --config.key=value.', f
  )
  flags.DEFINE_integer(
    'repeats',
    5,
    'Number of timed repeats of each phase after a warm-up; the result is their median.',
    flag_values=f,
  )
  flags.DEFINE_list(
    'phases',
    [],
    'Phases to time (default: all). For large models, each takes minutes to compile.',
    flag_values=f,
  )


if __name__ == '__main__':
  cli.run_main(main, define_flags)
