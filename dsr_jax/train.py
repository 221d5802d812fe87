"""The loop: data, step, metrics, pictures, evaluation, checkpoints, in that order and nothing
hidden.

A run is a function of (model, method, data): whatever happens to the process, the same command goes
on from the last complete checkpoint and ends with the same metrics (all but time and memory) and
the same parameters. For that, everything due at step s is on disk before the checkpoint of step s
begins, or is made up for when the run goes on. Of several processes all run this same loop; the
first writes files and speaks, and all write the checkpoints.
"""

import contextlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsr_jax import parts as parts_lib
from dsr_jax import sharding
from dsr_jax.errors import InputError
from dsr_jax.reporting import run_page as report
from dsr_jax.runtime import checkpoints as checkpoints_lib
from dsr_jax.runtime import compiled as programs_lib
from dsr_jax.runtime import distributed as processes
from dsr_jax.runtime import metrics as metrics_lib
from dsr_jax.runtime import workdir as workdir_lib
from dsr_jax.runtime.progress import Progress, StopSignals, describe_run, say


def run(config, workdir, parts=None, team=None):
  """Trains to the end, or until SIGTERM, which finishes the step and saves. Returns the path of the
  summary.

  parts: `parts.Parts`, the real ones if None. team: `processes.Team`, this process alone if None.
    Errors: InputError
  for everything a user can mend; the workdir then holds its last good checkpoint.
  """
  workdir_lib.check_writable(workdir)
  workdir_lib.check_accelerator()
  parts, team = parts or parts_lib.real(), team or processes.Team()
  system, last = config.system, config.method.steps
  if system.compile_cache:
    workdir_lib.use_compile_cache(system.compile_cache)

  # Model, data, state.
  mesh = parts.make_mesh(system.mesh)
  held = workdir_lib.locked(workdir) if team.lead else contextlib.nullcontext()
  with jax.set_mesh(mesh), held, StopSignals() as stop:
    model = parts.load_model(config.model)
    step_fn = parts.make_step(model, config, mesh)
    kept = programs_lib.kept_in(system.compile_cache, step_fn)
    batches = parts.make_batches(config, model, mesh)
    state = parts.init_state(model, config, mesh)
    about = workdir_lib.about(config, model.source, batches.fingerprint)
    describe_run(config, mesh, model, state)
    model.params = None  # the state holds them now

    # Resume.
    mirror = workdir_lib.Mirror(workdir, system.bucket if team.lead else '')
    mirror.fetch()
    checkpoints = checkpoints_lib.Checkpoints(
      system.bucket or workdir, about, system.keep_last, system.keep_every
    )
    try:
      start = checkpoints.latest()
      if team.any(start != team.shared(start)):
        raise InputError(
          'found that not all processes see the same checkpoints; expected one folder for all of '
          'them; set '
          'system.bucket to a bucket or a shared folder'
        )
      if start is not None:
        state = checkpoints.restore(state)
        say(f'going on     from the checkpoint of step {start}')
      else:
        checkpoints.check_room(state)
      if team.lead:
        workdir_lib.write_config(workdir, config, about)
      writer = metrics_lib.Writer(workdir, start) if team.lead else metrics_lib.Nowhere()
      programs = programs_lib.Programs(step_fn, parts.estimate(model, config, mesh), kept)
      run_ = _Run(
        config,
        workdir,
        parts,
        team,
        mesh,
        model,
        batches,
        programs,
        checkpoints,
        writer,
        mirror,
        stop,
      )
      try:
        state, step = _loop(run_, state, start or 0)
      finally:
        writer.close()
    finally:
      checkpoints.close()

    # The end: everything below is made from what is on disk.
    parameters = checkpoints_lib.fingerprint(state['params'])
    if not team.lead:
      return ''
    summary = workdir_lib.write_summary(workdir, step, last, parameters)
    report.write(workdir)
    mirror.push()
    if step < last:
      say(f'stopped      after step {step} of {last}; the same command goes on')
    else:
      say(workdir_lib.table(workdir))
    return summary


class _Run(NamedTuple):
  """What a run is made of."""

  config: Any
  workdir: str
  parts: Any
  team: Any
  mesh: Any
  model: Any
  batches: Any
  programs: Any
  checkpoints: Any
  writer: Any
  mirror: Any
  stop: Any


def _loop(run_, state, start):
  """Steps start + 1 to the last; returns (state, the last step done)."""
  (
    config,
    workdir,
    parts,
    team,
    mesh,
    model,
    batches,
    programs,
    checkpoints,
    writer,
    mirror,
    stop,
  ) = run_
  system, last = config.system, config.method.steps
  log = Log(config, workdir, model, writer, Progress(start, last))
  evaluate = parts.make_evaluator(config, model)
  sheet = parts.make_sheets(config, model)

  def evaluate_due(step):
    return evaluate is not None and (step in (0, last) or due(step, system.eval_every))

  # Before the first step: what a stop before this one left to do. The evaluation of the initial
  # model waits, where the
  # state keeps a copy of it, until the first step is done: so a start shows within a minute or two
  # whether it works.
  def initial(state):
    return {**state, 'params': state['frozen'].get('initial', state['params'])}

  def measured(step):
    return team.shared(metrics_lib.has_evaluation(workdir, step))

  initial_due = evaluate_due(0) and not measured(0)
  if initial_due and (start or 'initial' not in state['frozen']):
    log.evaluation(0, *evaluate(initial(state), 0))
    initial_due = False
  if start and evaluate_due(start) and not measured(start):
    log.evaluation(start, *evaluate(state, start))
  if start == last or team.any(stop.requested):
    return state, start

  # Compile.
  batch = batches.at(start)
  programs.compile(state, batch)

  for step in range(start + 1, last + 1):
    # Step; the next batch is made while the devices work.
    log.begin(step)
    with jax.transfer_guard_device_to_host('disallow'):
      state, values, records = programs.run(state, batch)
    batch = batches.at(step) if step < last else None
    log.add(step, values)

    # Metrics. Whatever is due below needs them on disk first.
    stopping = team.any(stop.requested)
    saving = due(step, system.save_every) or step == last or stopping
    drawing = due(step, system.samples_every) and not stopping
    evaluating = evaluate_due(step) and not stopping
    if due(step, system.log_every) or saving or drawing or evaluating or initial_due:
      log.flush()

    # Pictures and evaluation.
    if initial_due and not stopping:
      log.evaluation(0, *evaluate(initial(state), 0))
      initial_due = False
    if drawing:
      image = sheet(state, records)
      if team.lead:
        workdir_lib.write_samples(workdir, step, image)
    if evaluating:
      log.evaluation(step, *evaluate(state, step))
    if (drawing or evaluating) and step < last and team.lead:
      report.write(workdir)

    # Checkpoint.
    if saving:
      check_finite(state, step, workdir)
      mirror.push()
      checkpoints.save(step, state)
    log.resume_clock()
    if stopping:
      break
  log.close()
  return state, step


class Log:
  """Metrics on their way from the devices to the files and the terminal: fetched together, a line a
  step.

  writer: `metrics.Writer`. progress: `progress.Progress`.
  """

  def __init__(self, config, workdir, model, writer, progress):
    self._workdir = workdir
    self._writer, self._pending, self._clock = writer, [], time.perf_counter()
    self._frozen_every, self._probe_every = config.system.frozen_every, config.system.probe_every
    self._codes = model.codes_per_picture
    self._candidates_per_task = config.method.inputs_per_task * config.method.group_size
    self._progress = progress

  def begin(self, step):
    if not self._pending:
      self._clock = time.perf_counter()

  def add(self, step, values):
    self._pending.append((step, values))

  def flush(self):
    """Fetches and writes what is pending. Errors: as `write`."""
    fetched = jax.device_get(self._pending)
    seconds = (time.perf_counter() - self._clock) / max(len(fetched), 1)
    for step, values in fetched:
      self.write(step, values, seconds)
    self._pending.clear()

  def write(self, step, values, seconds):
    """A step's line; values: its metrics, on the host. Errors: InputError at the first number that
    is not finite.
    """
    values = {
      name: float(value) for name, value in sorted(values.items()) if self._measured(step, name)
    }
    bad = metrics_lib.first_not_finite(values)
    if bad:
      raise InputError(
        f'found {bad} = {values[bad]} at step {step}; expected a finite number; lower '
        'method.learning_rate, or look at the metrics before that step; the last good checkpoint '
        'is '
        'kept'
      )
    codes = self._codes * ('generation/loss' in values)
    tokens = self._candidates_per_task * (codes + values.get('understanding/text_length', 0.0))
    values |= {
      'time/step_seconds': seconds,
      'time/tokens_per_second': tokens / seconds,
    }  # sampled ones
    self._writer.write(step, values | metrics_lib.memory())
    self._progress.step(step, values)

  def _measured(self, step, name):
    """The frozen model scores now and then, and so the probes; between, their numbers leave the
    step as NaN.
    """
    if '/probe_' in name:
      return due(step - 1, self._probe_every)
    return not name.endswith('/reward_frozen') or due(step - 1, self._frozen_every)

  def evaluation(self, step, scores, rows):
    """Writes one evaluation: the rows for paired comparisons, then its line, which says that it is
    complete.
    """
    if jax.process_index() == 0:
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


def due(step, every):
  """Whether what is done every so many steps is done after this one; 0 is never."""
  return bool(every) and step % every == 0


@jax.jit
def _all_finite(tree):
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def check_finite(state, step, workdir):
  """A step's metrics are of the parameters before it: look at those after it before they replace a
  good checkpoint.
  """
  if not sharding.fetch(_all_finite(state['params'])):
    raise InputError(
      f'found parameters that are not finite after step {step}; expected finite numbers; lower '
      f'method.learning_rate: the last good checkpoint is kept in {workdir}'
    )
