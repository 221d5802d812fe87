"""Times the phases of a step on this machine, against ceilings measured in the same run. Random
weights, any configuration.

  python -m dsr_jax.benchmark --config=configs/scenes.py [--config.key=value] [--repeats=5]
  [--phases=draw,learn drawing]

A table on stderr, JSON on stdout. No weights are read or downloaded: a phase takes as long with
random ones.
"""

import dataclasses
import json
import statistics
import sys
import time

from absl import flags
from ml_collections import config_flags

from dsr_jax import config as config_lib
from dsr_jax import errors
from dsr_jax.errors import InputError

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'The run: a file of configs/, its keys set by --config.key=value.'
)
_REPEATS = flags.DEFINE_integer(
  'repeats', 5, 'How often each phase is timed after warming up; the median is given.'
)
_PHASES = flags.DEFINE_list(
  'phases', [], 'Some of the phases, for large models take minutes to compile; all by default.'
)

PHASES = (
  'draw',
  'codes to pictures',
  'reward of drawing',
  'pictures to codes',
  'write',
  'reward of writing',
  'learn drawing',
  'learn writing',
  'whole step',
)


def main(argv):
  """Prints the times."""
  if len(argv) > 1:
    raise InputError(
      f'found the stray argument {argv[1]!r}; expected flags only; write --name=value'
    )
  if _REPEATS.value < 1:
    raise InputError(f'found --repeats={_REPEATS.value}; expected at least 1; raise it')
  for name in _PHASES.value:
    if name not in PHASES:
      raise InputError(
        f'found the phase {name!r}; expected some of {", ".join(PHASES)}; name those in --phases'
      )
  report = benchmark(
    config_lib.from_config_dict(_CONFIG.value), _REPEATS.value, _PHASES.value or PHASES
  )
  print(_table(report), file=sys.stderr)
  print(json.dumps(report, indent=2))


def benchmark(config, repeats: int, wanted=PHASES):
  """The wanted phases and ceilings as a dict of JSON values. Errors: InputError, after a table of
  bytes by part, where there is no room.
  """
  import jax

  from dsr_jax import sharding
  from dsr_jax import step as step_lib
  from dsr_jax.plan import memory as plan_memory
  from dsr_jax.plan import program as plan_program
  from dsr_jax.plan import sizes as plan_sizes
  from dsr_jax.runtime import workdir

  workdir.check_accelerator()
  model = plan_program.sizes_of(config.model)
  model = dataclasses.replace(
    model, templates=model.templates or plan_program.stand_in_templates(model)
  )
  mesh = sharding.make_mesh(config.system.mesh)
  sharding.check_fits(
    mesh.shape, model.text.num_attention_heads, step_lib.chunks(config.method, config.system)
  )
  estimate = plan_memory.estimate(model, config, mesh.shape)
  print(estimate.table(), file=sys.stderr)
  sizes = plan_sizes.Sizes(model, config.method, config.system, config.data.max_prompt_tokens)
  plan_sizes.vq_operations(
    model
  )  # counted on the host, and kept, before the devices' mesh is in force
  try:
    with jax.set_mesh(mesh):
      peak, bandwidth = _ceilings(config.system.compute_dtype, repeats)
      print(
        f'ceilings     {peak / 1e12:.2f} TFLOP/s of matrix products, {bandwidth / 1e9:.1f} GB/s of '
        'memory',
        file=sys.stderr,
      )
      phases = _phases(config, model, mesh, sizes, peak, bandwidth, repeats, wanted)
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    raise InputError(
      f'found no room on a device ({str(e).splitlines()[0][:200]}); expected the bytes of the '
      'table above; '
      f'{estimate.advice()}'
    ) from e
  device = jax.devices()[0]
  return dict(
    device=f'{jax.device_count()} x {device.device_kind}',
    jax=jax.__version__,
    model=config.model,
    mesh=dict(mesh.shape),
    compute_dtype=config.system.compute_dtype,
    repeats=repeats,
    matrix_flops=peak,
    memory_bytes_per_second=bandwidth,
    phases=phases,
    memory=(device.memory_stats() or {}).get('peak_bytes_in_use'),
  )


def _timed(fn, repeats, *args, calls=1):
  """Median seconds of fn(*args) after two rounds that warm up; calls: in a round, so that what is
  short is not timed with its launch.
  """
  import jax

  seconds = []
  for attempt in range(repeats + 2):
    began = time.perf_counter()
    jax.block_until_ready([fn(*args) for _ in range(calls)])
    if attempt > 1:
      seconds.append((time.perf_counter() - began) / calls)
  return statistics.median(seconds)


def _ceilings(dtype, repeats):
  """Operations a second of a large matrix product, and bytes a second of a large sum, on one
  device.
  """
  import jax
  import jax.numpy as jnp

  size = 1024 if jax.default_backend() == 'cpu' else 8192
  device = jax.local_devices()[0]
  a = jax.device_put(
    jax.random.normal(jax.random.key(0), (size, size), dtype), device
  )  # constants run faster than what is real
  product = _timed(jax.jit(lambda a: a @ a), repeats, a, calls=10)
  x = jax.device_put(
    jax.random.normal(jax.random.key(1), (2**24 if size == 1024 else 2**29,)), device
  )
  reading = _timed(jax.jit(jnp.sum), repeats, x, calls=10)
  return 2 * size**3 / product, x.nbytes / reading


def _phases(config, model, mesh, s, peak, bandwidth, repeats, wanted):
  """Each wanted phase alone, and the whole step."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from dsr_jax import sharding
  from dsr_jax import state as state_lib
  from dsr_jax.models.janus import model as janus
  from dsr_jax.models.unified import Picture, Sampling, Scoring, Text, row_keys
  from dsr_jax.plan import program as plan_program
  from dsr_jax.plan import sizes as plan_sizes

  method, system, devices = config.method, config.system, mesh.size
  graphdef = janus.graphdef_of(model)
  state = plan_program.random_arrays(
    state_lib.abstract_state(plan_sizes.shapes(model), method, system, mesh)
  )

  def own(params):
    return params.get('generator', params)  # of `separate` one role's

  rows, group, n, t = (
    s.chunk('rollout_chunk'),
    method.group_size,
    model.num_codes,
    method.max_text_tokens,
  )
  rng = np.random.default_rng(0)

  def ids(*shape):
    return jnp.asarray(rng.integers(9, model.text.vocab_size - 1, shape), jnp.int32)

  def text(*shape):
    return Text(ids(*shape), jnp.ones(shape, bool))

  pixels = jnp.asarray(
    rng.uniform(-1, 1, (rows, model.image_size, model.image_size, 3)), jnp.float32
  )
  codes = jnp.asarray(rng.integers(0, model.vq.num_embeddings, (rows, group, n)), jnp.int32)
  prompt, question, written = (
    text(rows, s.prompt),
    text(rows, plan_sizes.QUESTION),
    text(rows, group, t),
  )
  keys = row_keys(jax.random.key(0), 0, rows, group)
  sampling = Sampling(
    method.temperature,
    method.guidance,
    t,
    system.decode_segment,
    system.decode_scan,
    method.cfg_interval,
    system.cache_dtype,
  )
  scoring = Scoring(chunk=system.logprob_chunk)
  found = []

  def add(name, fn, *args, operations=0, bytes_=0, **counts):
    if name not in wanted:
      return

    def rollout(tree):
      return state_lib.build(
        graphdef,
        sharding.gather_for_rollout(state_lib.fixed_parts(tree)),
        sharding.gather_for_rollout(state_lib.cast(own(tree['params']), system.compute_dtype)),
      )

    seconds = _timed(jax.jit(lambda tree, *args: fn(rollout(tree), *args)), repeats, state, *args)
    row = dict(
      phase=name, seconds=seconds, **{f'{k}_per_second': v / seconds for k, v in counts.items()}
    )
    if operations:
      row['of_matrix_peak'] = operations / devices / seconds / peak
    if bytes_:
      row['of_memory_bandwidth'] = bytes_ / seconds / bandwidth
    print(f'timed        {name}: {seconds:.3f} s', file=sys.stderr)
    found.append(row)

  rows_a_device = rows / sharding.ways(mesh.shape)
  tp = mesh.shape['tp']

  def decode_bytes(prefix, head, last, branches=1, first=0):
    """Bytes that a device must read: for each of tokens `first` to `last` the weights and what is
    filled of the cache, nothing more.
    """
    cache = (
      rows_a_device
      * branches
      * (group * (first + last) / 2 * s.own_element + prefix * s.element)
      * s.kv
      / tp
    )
    return (last - first) * ((s.body + head) * s.element / tp + cache)

  if 'generation' in method.tasks:
    add(
      'draw',
      lambda m, p, k: m.sample_pictures(p, k, sampling)[0],
      prompt,
      keys,
      tokens=rows * group * n,
      images=rows * group,
      bytes_=decode_bytes(s.drawing_prefix, s.image_head, s.guided, 2)
      + decode_bytes(s.drawing_prefix, s.image_head, n, first=s.guided),
    )
    add(
      'codes to pictures',
      lambda m, c: m.picture_from_codes(c).pixels,
      codes,
      images=rows * group,
      operations=rows * group * plan_sizes.vq_operations(model)[1],
    )
    read = rows * group * (s.reading_prefix + s.prompt)
    add(
      'reward of drawing',
      lambda m, c, q, p: m.text_logps(
        m.picture_from_codes(c), q, Text(p.ids[:, None], p.mask[:, None]), None, scoring
      ),
      codes,
      question,
      prompt,
      tokens=read,
      operations=plan_sizes.operations(rows * group * s.reading_prefix, s.reading_prefix, s)
      + plan_sizes.operations(rows * group * s.prompt, s.reading_prefix + s.prompt, s, s.text_head),
    )
  if 'understanding' in method.tasks:
    add(
      'pictures to codes',
      lambda m, x: m.picture_from_pixels(x).codes,
      pixels,
      images=rows,
      operations=rows * plan_sizes.vq_operations(model)[0],
    )
    add(
      'write',
      lambda m, x, q, k: m.sample_texts(Picture(None, x), q, k, sampling)[0],
      pixels,
      question,
      keys,
      tokens=rows * group * t,
      bytes_=decode_bytes(s.reading_prefix, s.text_head, t),
    )
    add(
      'reward of writing',
      lambda m, w, c: m.picture_logps(w, c[:, :1], None, scoring),
      written,
      codes,
      tokens=rows * group * (s.text_prefix + n),
      operations=plan_sizes.operations(rows * group * s.text_prefix, s.text_prefix, s)
      + plan_sizes.operations(rows * group * n, s.text_prefix + n, s, s.image_head),
    )

  # Learning: gradients of the pairs, or of all candidates, without the update; the second forward
  # pass of remat is no useful work.
  update_rows, learners = s.chunk('update_chunk'), s.learners

  passes = (
    2 if method.trainable == 'lora' else 3
  )  # adapters: no gradients of the weights beside them

  def learn(name, score, tokens, operations, *args):
    if name not in wanted:
      return

    def cast(params):
      return state_lib.cast(params, system.compute_dtype)

    def loss(params, tree, *args):
      return score(state_lib.build(graphdef, state_lib.fixed_parts(tree), cast(params)), *args)

    grad = jax.jit(
      lambda tree, *args: sharding.split_params(jax.grad(loss)(tree['params'], tree, *args))
    )
    seconds = _timed(grad, repeats, {**state, 'params': own(state['params'])}, *args)
    print(f'timed        {name}: {seconds:.3f} s', file=sys.stderr)
    found.append(
      dict(
        phase=name,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        of_matrix_peak=passes * operations / devices / seconds / peak,
      )
    )

  how = Scoring(temperature=method.temperature, chunk=system.logprob_chunk, remat=system.remat)
  if 'generation' in method.tasks:
    p, c = text(update_rows, 1, s.prompt), ids(update_rows, learners, n) % model.vq.num_embeddings
    learn(
      'learn drawing',
      lambda m, p, c: m.picture_logps(p, c, None, how).logp.mean(),
      update_rows * (learners * n + s.drawing_prefix),
      plan_sizes.operations(update_rows * s.drawing_prefix, s.drawing_prefix, s)
      + plan_sizes.operations(update_rows * learners * n, s.drawing_prefix + n, s, s.image_head),
      p,
      c,
    )
  if 'understanding' in method.tasks:
    x, w = pixels[:1].repeat(update_rows, 0)[:, None], text(update_rows, learners, t)
    q = text(update_rows, plan_sizes.QUESTION)
    learn(
      'learn writing',
      lambda m, x, q, w: m.text_logps(Picture(None, x), q, w, None, how).logp.mean(),
      update_rows * (learners * t + s.reading_prefix),
      update_rows * plan_sizes.vision_operations(s) / 3
      + plan_sizes.operations(update_rows * s.reading_prefix, s.reading_prefix, s)
      + plan_sizes.operations(update_rows * learners * t, s.reading_prefix + t, s, s.text_head),
      x,
      q,
      w,
    )
  return found + ([_step(config, model, mesh, state, repeats)] if 'whole step' in wanted else [])


def _step(config, model, mesh, state, repeats):
  """The whole compiled step; of `separate` the first role's."""
  import jax
  import numpy as np

  from dsr_jax.plan import program as plan_program

  lowered = next(iter(plan_program.lower_step(config, model, mesh).values()))
  compiled, rng = lowered.compile(), np.random.default_rng(0)

  def fill(x):
    return (
      np.ones(x.shape, x.dtype) if x.dtype == bool else rng.integers(9, 30, x.shape).astype(x.dtype)
    )

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
  return dict(phase='whole step', seconds=statistics.median(seconds))


def _table(report):
  """For people."""
  lines = [
    '',
    f'{report["model"]} on {report["device"]}, {report["compute_dtype"]}, JAX {report["jax"]}; '
    'ceilings measured: '
    f'{report["matrix_flops"] / 1e12:.2f} TFLOP/s, {report["memory_bytes_per_second"] / 1e9:.1f} '
    'GB/s',
    '',
    f'{"phase":<22}{"seconds":>10}{"tokens/s":>12}{"images/s":>11}{"of peak":>9}{"of bandwidth":>14}',
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


if __name__ == '__main__':
  errors.run_main(main, config_lib.check_flags)
