"""The loop: data, step, metrics, pictures, evaluation, checkpoints, in that order and nothing hidden.

A run is a function of (model, method, data): whatever happens to the process, the same command goes on from the last
complete checkpoint and ends with the same metrics (all but time and memory) and the same parameters. For that,
everything due at step s is on disk before the checkpoint of step s begins, or is made up for when the run goes on.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax import checkpoints as checkpoints_lib
from dsr_jax import metrics as metrics_lib
from dsr_jax import parts as parts_lib
from dsr_jax import report
from dsr_jax import workdir as workdir_lib
from dsr_jax.errors import InputError
from dsr_jax.progress import Progress, StopSignals, describe_run, say


def run(config, workdir, parts=None):
  """Trains to the end, or until SIGTERM, which finishes the step and saves. Returns the path of the summary.

  parts: `parts.Parts`, the real ones if None. Errors: InputError for everything a user can mend; the workdir then holds
  its last good checkpoint.
  """
  workdir_lib.check_writable(workdir)
  workdir_lib.check_accelerator()
  parts = parts or parts_lib.real()
  system, last = config.system, config.method.steps
  if system.compile_cache:
    workdir_lib.use_compile_cache(system.compile_cache)

  # Model, data, state.
  mesh = parts.make_mesh(system.mesh)
  with jax.set_mesh(mesh), workdir_lib.locked(workdir), StopSignals() as stop:
    model = parts.load_model(config.model)
    batches = parts.make_batches(config, model, mesh)
    state = parts.init_state(model, config, mesh)
    about = workdir_lib.about(config, model.source, batches.fingerprint)
    describe_run(config, mesh, model, state)
    model.params = None  # the state holds them now

    # Resume.
    checkpoints = checkpoints_lib.Checkpoints(workdir, about, system.keep_last, system.keep_every)
    try:
      start = checkpoints.latest()
      if start is not None:
        state = checkpoints.restore(state)
        say(f'going on     from the checkpoint of step {start}')
      else:
        checkpoints.check_room(state)
      workdir_lib.write_config(workdir, config, about)
      writer = metrics_lib.Writer(workdir, start)
      try:
        state, step = _loop(config, workdir, parts, mesh, model, batches, state, start or 0, checkpoints, writer, stop)
      finally:
        writer.close()
    finally:
      checkpoints.close()

    # The end: everything below is made from what is on disk.
    summary = workdir_lib.write_summary(workdir, step, last, checkpoints_lib.fingerprint(state['params']))
    report.write(workdir)
    if step < last:
      say(f'stopped      after step {step} of {last}; the same command goes on')
    else:
      say(workdir_lib.table(workdir))
    return summary


def _loop(config, workdir, parts, mesh, model, batches, state, start, checkpoints, writer, stop):
  """Steps start + 1 to the last; returns (state, the last step done)."""
  system, last = config.system, config.method.steps
  log = _Log(config, workdir, model, writer, start)
  evaluate = parts.make_evaluator(config, model)
  sheet = parts.make_sheets(config, model)
  evaluate_due = lambda step: evaluate is not None and (step in (0, last) or _due(step, system.eval_every))

  # Before the first step: what a stop before this one left to do. The evaluation of the initial model waits, where the
  # state keeps a copy of it, until the first step is done: so a start shows within a minute or two whether it works.
  initial = lambda state: {**state, 'params': state['frozen'].get('initial', state['params'])}
  initial_due = evaluate_due(0) and not metrics_lib.has_evaluation(workdir, 0)
  if initial_due and (start or 'initial' not in state['frozen']):
    log.evaluation(0, *evaluate(initial(state), 0))
    initial_due = False
  if start and evaluate_due(start) and not metrics_lib.has_evaluation(workdir, start):
    log.evaluation(start, *evaluate(state, start))
  if start == last or stop.requested:
    return state, start

  # Compile.
  step_fn = parts.make_step(model, config, mesh)
  batch = batches.at(start)
  began = time.perf_counter()
  compiled = step_fn.lower(state, batch).compile()
  say(f'compiled     the step in {time.perf_counter() - began:.1f} s{_temporaries(compiled)}')

  for step in range(start + 1, last + 1):
    # Step; the next batch is made while the devices work.
    log.begin(step)
    with jax.transfer_guard_device_to_host('disallow'):
      state, values, records = compiled(state, batch)
    batch = batches.at(step) if step < last else None
    log.add(step, values)

    # Metrics. Whatever is due below needs them on disk first.
    stopping = stop.requested
    saving = _due(step, system.save_every) or step == last or stopping
    drawing = _due(step, system.samples_every) and not stopping
    evaluating = evaluate_due(step) and not stopping
    if _due(step, system.log_every) or saving or drawing or evaluating or initial_due:
      log.flush()

    # Pictures and evaluation.
    if initial_due and not stopping:
      log.evaluation(0, *evaluate(initial(state), 0))
      initial_due = False
    if drawing:
      workdir_lib.write_samples(workdir, step, sheet(state, records))
    if evaluating:
      log.evaluation(step, *evaluate(state, step))
    if (drawing or evaluating) and step < last:
      report.write(workdir)

    # Checkpoint.
    if saving:
      _check_finite(state, step, workdir)
      checkpoints.save(step, state)
    log.resume_clock()
    if stopping:
      break
  log.close()
  return state, step


class _Log:
  """Metrics on their way from the devices to the files and the terminal: fetched together, a line a step."""

  def __init__(self, config, workdir, model, writer, start):
    self._workdir = workdir
    self._writer, self._pending, self._clock = writer, [], time.perf_counter()
    self._frozen_every = config.system.frozen_every
    self._codes = model.codes_per_picture if 'generation' in config.method.tasks else 0
    self._candidates_per_task = config.method.inputs_per_task * config.method.group_size
    self._progress = Progress(start, config.method.steps)

  def begin(self, step):
    if not self._pending:
      self._clock = time.perf_counter()

  def add(self, step, values):
    self._pending.append((step, values))

  def flush(self):
    """Fetches and writes what is pending. Errors: InputError at the first number that is not finite."""
    fetched = jax.device_get(self._pending)
    seconds = (time.perf_counter() - self._clock) / max(len(fetched), 1)
    for step, values in fetched:
      values = {name: float(value) for name, value in sorted(values.items()) if self._measured(step, name)}
      bad = metrics_lib.first_not_finite(values)
      if bad:
        raise InputError(f'found {bad} = {values[bad]} at step {step}; expected a finite number; lower '
                         'method.learning_rate, or look at the metrics before that step; the last good checkpoint is '
                         'kept')
      tokens = self._candidates_per_task * (self._codes + values.get('understanding/text_length', 0.0))
      values |= {'time/step_seconds': seconds, 'time/tokens_per_second': tokens / seconds}  # sampled ones
      self._writer.write(step, values | metrics_lib.memory())
      self._progress.step(step, values)
    self._pending.clear()

  def _measured(self, step, name):
    """The frozen model scores now and then; between, its rewards leave the step as NaN."""
    return not name.endswith('/reward_frozen') or _due(step - 1, self._frozen_every)

  def evaluation(self, step, scores, rows):
    """Writes one evaluation: the rows for paired comparisons, then its line, which says that it is complete."""
    workdir_lib.write_evaluation(self._workdir, step, rows)
    values = {f'eval/{name}': float(value) for name, value in scores.items()}
    self._writer.write(step, values)
    self._progress.evaluation(step, values)

  def resume_clock(self):
    """Leaves out of the next step's time what was not the step."""
    if not self._pending:
      self._clock = time.perf_counter()

  def close(self):
    self._progress.close()


def _due(step, every):
  return bool(every) and step % every == 0


@jax.jit
def _all_finite(tree):
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def _check_finite(state, step, workdir):
  """A step's metrics are of the parameters before it: look at those after it before they replace a good checkpoint."""
  if not np.asarray(_all_finite(state['params'])):
    raise InputError(f'found parameters that are not finite after step {step}; expected finite numbers; lower '
                     f'method.learning_rate: the last good checkpoint is kept in {workdir}')


def _temporaries(compiled):
  analysis = compiled.memory_analysis()
  return f'; {analysis.temp_size_in_bytes / 2**20:,.0f} MiB of temporaries a device' if analysis else ''
