"""The training loop: data, step, metrics, images, evaluation, checkpoints, explicitly and in that
order.

A run is a function of (model, method, data). If the process stops for any reason, the same command
resumes from the last complete checkpoint and ends with the same metrics (except time and memory)
and the same parameters. To guarantee this, everything due at step s is on disk before the
checkpoint of step s begins, or the resumed run makes up for it. With several processes, all run
this loop; the first writes files and prints, and all write the checkpoints.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import importlib
import os
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp

from dsr_jax import asked_step, convert, families, saved_config, sharding, tracking
from dsr_jax import config as config_lib
from dsr_jax import rows as rows_lib
from dsr_jax import state as state_lib
from dsr_jax import step as step_lib
from dsr_jax.convert import locate
from dsr_jax.data import batches as batches_lib
from dsr_jax.data.ahead import Ahead
from dsr_jax.data.sharded import ShardedBatches
from dsr_jax.errors import InputError
from dsr_jax.evaluate import watched as watched_lib
from dsr_jax.evaluate.evaluator import Evaluator
from dsr_jax.plan import memory as plan_memory
from dsr_jax.report import before_after, same_items
from dsr_jax.report import page as run_page
from dsr_jax.report import summary as summary_lib
from dsr_jax.reporting import step_sheet
from dsr_jax.rewards import table as rewards
from dsr_jax.runtime import checkpoints as checkpoints_lib
from dsr_jax.runtime import distributed, room, run_files
from dsr_jax.runtime import metrics as metrics_lib
from dsr_jax.runtime import workdir as workdir_lib
from dsr_jax.runtime.compiled import CompiledStep
from dsr_jax.runtime.host_time import HostTime
from dsr_jax.runtime.progress import (
  Progress,
  Stopped,
  StopSignals,
  describe_run,
  say,
  say_unfamiliar,
)
from dsr_jax.runtime.run_log import RunLog, due

# The fixed list is also evaluated after this step, to show an early trend: long before the first
# evaluation, and before the initial model's whole lists.
EARLY = 10
LISTS, FIXED_LIST = 'lists', 'fixed list'  # the parts of an evaluation; each logs its own line

# The parts of a run.


def load_model(name: str) -> families.Model:
  """The model that `config.model` names. Each array is read only when its placement is known."""
  bundle = convert.load(locate.directory_of(name), lambda leaf: leaf)
  return families.model_of(bundle, name)


def framed(model, config):
  """(model, config) with the configured template and sampler, resolved in both. InputError for
  values that the model's family does not support.
  """
  model = families.with_template(model, config.method.template)
  method = dataclasses.replace(config.method, template=model.template)
  return families.settled(model, dataclasses.replace(config, method=method))


def check_room(model, config):
  """InputError for texts that do not fit the model's sequences, before anything is compiled."""
  if model.family.room is None:
    return
  room = model.family.room(model.config)
  method, data = config.method, config.data
  # key -> (the question, the key that limits its answer, that limit in tokens)
  asked: dict[str, tuple[str, str, int]] = {}
  if 'understanding' in method.tasks:
    asked['question'] = method.question, 'method.max_text_tokens', method.max_text_tokens
  if 'generation' in method.tasks:
    asked['instruction'] = method.instruction, 'data.max_prompt_tokens', data.max_prompt_tokens
  for key, (text, limit, most) in asked.items():
    tokens = len(model.processor.encode_question(text))
    if tokens + most > room:
      raise InputError(
        f'method.{key} has {tokens} tokens and {limit} is {most}, but {config.model} has room for '
        f'only {room} together beside an image; shorten the former or lower the latter'
      )


def init_state(model, config, mesh) -> state_lib.TrainState:
  """The initial state of a run, sharded over the mesh."""
  ctx = step_context(model, config)
  sharding.check_fits(
    mesh.shape,
    model.family.num_heads(model.config),
    {'system.rollout_chunk': ctx.rollout_chunk, 'system.update_chunk': ctx.update_chunk},
  )
  return state_lib.init_state(model.params, model.family, config.method, config.system, mesh)


def step_context(model, config) -> step_lib.StepContext:
  """The static inputs of the run's step."""
  return step_lib.StepContext(
    graphdef=model.graphdef,
    family=model.family,
    spec=model.spec,
    method=config.method,
    system=config.system,
  )


def make_train_step(model, config, mesh, state, answers: asked_step.Answers | None = None):
  """The jitted step: (state, batch) -> `StepOutput`; the state is donated.

  answers: required if `method.reward` has an external term.
  """
  ctx = step_context(model, config)
  if answers is not None:
    return asked_step.make(ctx, state, mesh, answers)
  return jax.jit(
    functools.partial(step_lib.train_step, ctx),
    donate_argnums=0,
    out_shardings=step_lib.output_shardings(ctx, state, mesh),
  )


def answers_of(config, model, workdir: str, **how) -> dict[str, asked_step.Answers]:
  """Extra keyword arguments of `make_train_step`: `asked_step.Answers` with an external reward,
  otherwise empty. how: keyword arguments of `Answers`.
  """
  if not rewards.is_asked(config.method):
    return {}
  return {'answers': asked_step.Answers(config, workdir, model.processor, **how)}


def make_evaluator(config, model):
  """A function (state, step) -> (flat dict of scores, rows for paired comparisons), or None."""
  if config.eval.benchmark != 'scenes':
    return None
  evaluator = Evaluator(config, model.processor, model.graphdef)

  def evaluate(state, step):
    reader = None
    if config.method.strategy == 'separate':
      reader = state_lib.policy_params(state, model.family, 'understander')
    return evaluator.run(state_lib.policy_params(state, model.family), step, reader)

  return evaluate


def make_watcher(config, model, batches, load_model):
  """A function (state, step) -> `watched.Watched`, or None."""
  fingerprint = model.source['fingerprint']

  def load():
    again = load_model(config.model)
    if again.source['fingerprint'] != fingerprint:
      raise InputError(
        f'the weights in {config.model} are not those that this run began with, and the initial '
        'model must score; restore them'
      )
    return again.params

  return watched_lib.of_run(config, model, batches, load)


def estimate_memory(model, config, mesh):
  """`plan.memory.Estimate` of the bytes per device."""
  return plan_memory.estimate(model.config, config, mesh.shape)


@dataclasses.dataclass(frozen=True)
class Builders:
  """The functions that build a run. The study and the tests replace some of them."""

  load_model: Callable[..., Any] = load_model
  make_mesh: Callable[..., Any] = sharding.make_mesh
  # (config, model, mesh, kept): at(step), fingerprint
  make_batches: Callable[..., Any] = ShardedBatches
  init_state: Callable[..., Any] = init_state
  make_train_step: Callable[..., Any] = make_train_step
  make_evaluator: Callable[..., Any] = make_evaluator
  make_watcher: Callable[..., Any] = make_watcher  # (config, model, batches, load_model)
  # (config, model): (state, records) -> [Candidates]
  make_rows: Callable[..., Any] = rows_lib.StepRows
  estimate_memory: Callable[..., Any] = estimate_memory


# The run.


@dataclasses.dataclass(frozen=True)
class _Run:
  """The parts of a run that its loop uses."""

  config: Any
  workdir: str
  team: distributed.Team
  batches: Any
  train_step: CompiledStep
  evaluate: Any  # functions (state, step), or None
  watch: Any
  rows: Callable[..., Any]
  checkpoints: checkpoints_lib.Checkpoints
  log: RunLog
  mirror: workdir_lib.Mirror
  stop: StopSignals
  check_ours: Callable[[], None]  # InputError if this process no longer owns the run's folders
  spent: HostTime  # host time for monitoring


def run(
  config, workdir, builders: Builders | None = None, team=None, accept_changed_data: bool = False
) -> str:
  """Trains to the end, or until SIGTERM or Ctrl-C; then it finishes the step and saves.

  Args:
    config: `config.Config`.
    workdir: the run's folder; the run resumes if it holds checkpoints.
    builders: see `Builders`; None for the real ones.
    team: `distributed.Team`; None for a single process.
    accept_changed_data: resume even if prompts or images have changed.

  Returns:
    The path of the summary.

  Raises:
    InputError: for every error that a user can fix; the workdir then holds its last good
      checkpoint.
  """
  team = team or distributed.Team()
  if team.processes > 1:
    team.agree(**distributed.facts(config, workdir))
  workdir_lib.check_writable(workdir)
  workdir_lib.check_bucket(config.system.bucket)
  workdir_lib.check_accelerator()
  team.agree(devices=workdir_lib.local_devices())
  config = _with_rate_it_began_with(config, workdir)
  tracking.check(config.system.track)
  builders = builders or Builders()
  system = config.system
  last = config.method.steps
  if system.compile_cache:
    workdir_lib.use_compile_cache(system.compile_cache)

  mesh = builders.make_mesh(system.mesh)
  with (
    jax.set_mesh(mesh),
    StopSignals(team.processes) as stop,
    contextlib.ExitStack() as holding,
    contextlib.ExitStack() as closing,
  ):
    check_ours = _hold_folders(workdir, system.bucket, holding) if team.lead else _nothing_to_check
    # Model, data, state.
    batches_lib.check(config.data, config.method)  # a model is large
    model, config = framed(builders.load_model(config.model), config)
    check_room(model, config)
    kept = checkpoints_lib.newest_held_out(system.bucket or workdir)
    batches = builders.make_batches(config, model, mesh, kept)
    team.agree(data=batches.fingerprint, model=model.source['fingerprint'])
    asking = answers_of(config, model, workdir, team=team)
    for answers in asking.values():
      answers.check()
    estimate = builders.estimate_memory(model, config, mesh)
    room.check_step(estimate)
    state = builders.init_state(model, config, mesh)
    train_step = builders.make_train_step(model, config, mesh, state, **asking)
    facts = getattr(batches, 'facts', None)
    about = workdir_lib.about(config, model.source, batches.fingerprint, facts)
    describe_run(config, mesh, model, state, state_lib.idle_bytes(state))
    _say_rewards(config.method)
    model.params = None  # the state holds them now

    # Resume.
    mirror = workdir_lib.Mirror(workdir, system.bucket if team.lead else '')
    mirror.fetch()
    checkpoints = checkpoints_lib.Checkpoints(
      system.bucket or workdir, about, system.keep_last, system.keep_every
    )
    closing.enter_context(_closed_at_the_end(checkpoints))
    start = checkpoints.latest()
    if team.any(start != team.shared(start)):
      raise InputError(
        'the processes do not see the same checkpoints; set system.bucket to a bucket or a folder '
        'that all of them share'
      )
    if start is None:
      checkpoints.check_room(state)
    else:
      checkpoints.verify(start, accept_changed_data)
    if team.lead:
      workdir_lib.write_config(workdir, config, about)
    writer = _make_writer(config, workdir, start) if team.lead else metrics_lib.Nowhere()
    closing.enter_context(_closed_at_the_end(writer))

    # Train.
    progress = Progress(start or 0, last)
    this = _Run(
      config=config,
      workdir=workdir,
      team=team,
      batches=batches,
      train_step=CompiledStep(train_step, estimate),
      evaluate=builders.make_evaluator(config, model),
      watch=builders.make_watcher(config, model, batches, builders.load_model),
      rows=builders.make_rows(config, model),
      checkpoints=checkpoints,
      log=RunLog(config, workdir, model.spec.num_codes, writer, progress),
      mirror=mirror,
      stop=stop,
      check_ours=check_ours,
      spent=HostTime(),
    )
    if start is not None:
      # The state holds the initial model until the checkpoint is restored: evaluate it now.
      for part in _missing(this, 0):
        _evaluate(this, _initial(state), 0, part)
      state = checkpoints.restore(state, start, verified=True)
      say(f'resuming     from the checkpoint of step {start}')
    ahead = closing.enter_context(contextlib.closing(Ahead(batches)))
    state, step = _loop(this, state, start or 0, ahead)
    closing.close()

    # The end: everything below is made from the files on disk.
    parameters = checkpoints_lib.fingerprint(state.params)
    if not team.lead:
      return ''
    check_ours()
    _write_page(this)
    summary = summary_lib.write(workdir, step, last, parameters, this.spent.seconds)
    mirror.push()
    if step < last:
      say(f'stopped      after step {step} of {last}; run the same command to resume')
    else:
      say(summary_lib.table(workdir))
    return summary


def _with_rate_it_began_with(config, workdir: str):
  """The configuration. If a run with adapters began before `method.lora.learning_rate` existed, it
  keeps the rate it began with.
  """
  method = config.method
  if method.trainable != 'lora':
    return config
  saved = checkpoints_lib.newest_method(config.system.bucket or workdir)
  if saved is None or saved['trainable'] != 'lora':
    return config
  rate = saved['learning_rate']
  if saved['lora']['learning_rate'] != rate:
    return config
  # No code reads this key now, but the checkpoints store it.
  changes: dict[str, Any] = {'learning_rate': rate}
  if method.lora.learning_rate == config_lib.Lora().learning_rate:
    changes['lora'] = dataclasses.replace(method.lora, learning_rate=rate)
  return dataclasses.replace(config, method=dataclasses.replace(method, **changes))


def _loop(this: _Run, state, start: int, ahead: Ahead):
  """Runs steps start + 1 to the last. Returns (state, the last step done)."""
  system, last, log, team = this.config.system, this.config.method.steps, this.log, this.team

  # Before the first step: evaluations that an earlier stop left undone. If the state has a copy of
  # the initial model, its evaluation comes later, so that a failing start fails early. A resumed
  # run has evaluated the initial model before it restored its parameters.
  initial = [] if start else _missing(this, 0)
  if state.ref_params is None:
    while initial:
      _evaluate(this, state, 0, initial.pop(0))
  for part in _missing(this, start) if start else ():
    _evaluate(this, state, start, part)
  if team.stops(start, this.stop.requested) or start >= last:
    return state, start

  # Compile.
  # Batches count steps from 0, so this is the batch of step start + 1.
  batch = this.batches.at(start)
  with this.stop.compiling():
    this.train_step.compile(state, batch)
  can_fail = getattr(this.batches, 'can_fail', False)
  log.restart_clock()

  for step in range(start + 1, last + 1):
    # Step. The next batch is made while the devices compute.
    if step < last:
      ahead.begin(step)
    try:
      with jax.transfer_guard_device_to_host('disallow'):
        state, metrics, records = this.train_step(state, batch)
    except asked_step.RewardsFailed:
      if step - 1 > start:  # do not lose the finished steps
        log.flush()
        _save(this, state, step - 1)
      raise
    batch = ahead.finish(metrics)
    log.add(step, metrics, ahead.waited)

    # Metrics. Everything due below needs them on disk first. A failed batch, in any process, ends
    # the run, but only after this step is saved.
    failed = ahead.error is not None
    if can_fail:
      failed = team.any(failed)
    stopping = team.stops(step, this.stop.requested) or failed
    saving = due(step, system.save_every) or step == last or stopping
    drawing = due(step, system.samples_every) and not stopping
    evaluating = [] if stopping else _parts_due(this, step)
    # The initial model: the fixed list now, the whole lists after the early evaluation.
    measuring = []
    if initial and not stopping:
      measuring = initial if step >= _early(this.config) else [x for x in initial if x != LISTS]
    if due(step, system.log_every) or saving or drawing or evaluating or measuring:
      this.check_ours()
      log.flush()

    # Images and evaluation.
    if FIXED_LIST in measuring and _evaluate(this, _initial(state), 0, FIXED_LIST):
      _write_page(this)
      say(
        f'report       {os.path.join(this.workdir, "report.html")} has its first images; reload it '
        f'after step {_early(this.config)} to see the next ones beside them'
      )
    if drawing:
      _draw(this, state, records, step)
    if FIXED_LIST in evaluating:
      _evaluate(this, state, step, FIXED_LIST)
      if LISTS in measuring or (LISTS in evaluating and step == last):
        _write_page(this)  # the whole lists, which are evaluated next, take longer
    if LISTS in measuring:
      _evaluate(this, _initial(state), 0, LISTS)
    if LISTS in evaluating:
      _evaluate(this, state, step, LISTS)
    initial = [part for part in initial if part not in measuring]
    if team.processes == 1 and this.stop.requested:  # an evaluation was interrupted
      stopping = saving = True
    if (drawing or evaluating or measuring) and step < last:
      _write_page(this)

    # Checkpoint.
    if saving:
      _save(this, state, step)
    log.restart_clock()
    if failed:
      this.checkpoints.wait()
      raise ahead.error or InputError(
        f'another process could not read its inputs after step {step}; its own error says which: '
        'fix them, then run the same command to resume from this step'
      )
    if stopping:
      break
  log.close()
  return state, step


def _save(this: _Run, state, step: int):
  check_finite(state, step, this.workdir, this.config.method.learning_rate_key)
  this.check_ours()
  this.mirror.push()
  this.checkpoints.save(step, state)


def _say_rewards(method):
  """Prints which term rewards which task, if there is more than one term."""
  for term in rewards.terms(method.reward):
    able = rewards.tasks_of(term, method)
    left_out = [task for task in method.tasks if task not in able]
    if left_out:
      say(f'reward       {term.name} does not apply to {left_out[0]} and is left out there')


def _early(config) -> int:
  """The step of the early evaluation, or of the first regular one if that is sooner."""
  return min(x for x in (EARLY, config.system.eval_every, config.method.steps) if x)


def _parts_due(this: _Run, step: int) -> list[str]:
  """The parts of the evaluation that are due after this step; step 0 is the initial model."""
  always = step in (0, this.config.method.steps) or due(step, this.config.system.eval_every)
  parts = []
  if this.watch is not None and (always or step == _early(this.config)):
    parts.append(FIXED_LIST)
  if this.evaluate is not None and always:
    parts.append(LISTS)
  return parts


def _missing(this: _Run, step: int) -> list[str]:
  """The parts of the evaluation that are due after this step and not done yet."""

  def is_there(part):
    found = metrics_lib.has_evaluation(this.workdir, step, fixed_list=part == FIXED_LIST)
    return this.team.shared(found)

  return [part for part in _parts_due(this, step) if not is_there(part)]


def _evaluate(this: _Run, state, step: int, part: str) -> bool:
  """Evaluates a state's parameters on the whole lists or the fixed list, and writes the results.
  On a stop signal, leaves the evaluation to the resumed run. Returns whether it finished.
  """
  found = None
  try:
    with this.stop.leaving():
      if part == LISTS:
        scores, rows = this.evaluate(state, step)
      else:
        found = this.watch(state, step)
        scores, rows = found.scores, found.rows
  except Stopped:
    return False
  if found is not None and this.team.lead:
    with this.spent.on('fixed list'):
      rows_lib.write(this.workdir, step, found.table, rows_lib.WATCHED)
      image = before_after.sheet(this.workdir, step)
      png = workdir_lib.write_samples(this.workdir, step, image, rows_lib.WATCHED)
      texts = {'watched/texts': before_after.texts(this.workdir, step)}
      this.log.media(step, {'watched/pictures': png}, texts)
      if found.unfamiliar:
        rows[same_items.UNFAMILIAR] = found.unfamiliar
        say_unfamiliar(found.unfamiliar)
  # Write its line last: the line marks the evaluation as complete.
  this.log.evaluation(step, scores, rows)
  return True


def _draw(this: _Run, state, records, step: int):
  """Writes the step's candidates: the first as an image, all of them as rows."""
  with this.spent.on('candidates'):
    found = this.rows(state, records)
    if this.team.lead:
      png = workdir_lib.write_samples(this.workdir, step, step_sheet.sheet(found))
      rows_lib.write(this.workdir, step, rows_lib.table(step, found))
      this.log.media(step, {'candidates': png}, {})


def _hold_folders(workdir: str, bucket: str, holding: contextlib.ExitStack) -> Callable[[], None]:
  """Locks the run's folders for this process until `holding` closes. Returns a function that raises
  InputError if this process no longer owns them.
  """
  folder = holding.enter_context(workdir_lib.locked(workdir))
  remote = holding.enter_context(workdir_lib.BucketLock(bucket, workdir))

  def check():
    folder.check()
    remote.check()

  return check


@contextlib.contextmanager
def _closed_at_the_end(opened):
  """Closes `opened` at exit; if both the body and the closing fail, raises the first error."""
  try:
    yield
  except BaseException:
    with contextlib.suppress(InputError):
      opened.close()
    raise
  opened.close()


def _nothing_to_check():
  """With several processes, only the first checks."""


def _make_writer(config, workdir: str, start: int | None):
  """The writer of the run's metrics. Removes lines after the step from which the run resumes."""
  rows_lib.cut(workdir, start)
  workdir_lib.cut_evaluations(workdir, start)
  settings = saved_config.flat(saved_config.to_json(config))
  writer = metrics_lib.Writer(workdir, start, settings)
  if not config.system.track:
    return writer
  resumed = start is not None
  return tracking.Tracked(writer, config, workdir, resumed, kept=1 if resumed else _early(config))


def _write_page(this: _Run):
  if this.team.lead:
    with this.spent.on('page'), run_files.writing(this.workdir):
      run_page.write(this.workdir)


def _initial(state):
  """The state with the initial model's parameters, if the state has a copy of them."""
  if state.ref_params is None:
    return state
  return dataclasses.replace(state, params=state.ref_params)


@jax.jit
def _all_finite(tree):
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def check_finite(state, step, workdir, key='method.learning_rate'):
  """InputError if the parameters are not finite.

  A step's metrics describe the parameters before it, so the parameters after it must be checked
  before they replace a good checkpoint. key: the key of the learning rate.
  """
  if not sharding.fetch(_all_finite(state.params)):
    raise InputError(
      f'the parameters are not finite after step {step}; lower {key}: the last good checkpoint is '
      f'kept in {workdir}'
    )


# `dsr_jax.train` is this module for internal code, and callable as `dsr.train(config, workdir)`.


class _CalledAsFunction(types.ModuleType):
  """A module that calls `api.train` when it is called."""

  def __call__(self, config, workdir, overrides=None):
    """See `dsr_jax.api.train`."""
    return importlib.import_module('dsr_jax.api').train(config, workdir, overrides)


sys.modules[__name__].__class__ = _CalledAsFunction
