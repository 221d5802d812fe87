"""Several runs of one variant as lanes of one program, with `jax.vmap`: seeds of a cell, or
learning rates for tuning.

A small model leaves an accelerator mostly idle, so L runs side by side take little longer than one.
Up to rounding, a lane equals the run that `train.run` makes of its cell, with the same folder.
There are two differences: lanes save no intermediate checkpoints, so a stopped lane starts over,
and a lane's time is the program's time divided by L.

Axes: L lanes.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax import rows as rows_lib
from dsr_jax import train
from dsr_jax.errors import InputError
from dsr_jax.report import page as run_page
from dsr_jax.report import summary as summary_lib
from dsr_jax.reporting import step_sheet
from dsr_jax.runtime import checkpoints as checkpoints_lib
from dsr_jax.runtime import metrics as metrics_lib
from dsr_jax.runtime import workdir as workdir_lib
from dsr_jax.runtime.compiled import CompiledStep
from dsr_jax.runtime.progress import Progress, Silence, StopSignals, say
from dsr_jax.runtime.run_log import RunLog, due
from dsr_jax.state import TrainState
from dsr_jax.step import StepOutput

MOST = 8  # lanes with `auto`
# The fields of a state that each lane has for itself. Lanes share all others, such as the step.
OWN = ('params', 'opt_state', 'ema_params')
STATE_AXES = TrainState(
  **{field.name: 0 if field.name in OWN else None for field in dataclasses.fields(TrainState)}
)

# Which runs share a program.


def number(asked: str) -> int:
  """The flag --lanes -> the most runs per program. Raises InputError for an impossible value."""
  devices = jax.device_count()
  if asked == 'auto':
    return MOST if devices == 1 and jax.default_backend() != 'cpu' else 1
  if not asked.isdecimal() or int(asked) < 1:
    raise InputError(f'--lanes is {asked}; set it to auto, or a number from 1')
  if int(asked) > 1 and devices > 1:
    raise InputError(
      f'--lanes is {asked}, but lanes need a single device and there are {devices}; set --lanes=1'
    )
  return int(asked)


def groups(cells, most: int) -> list[list[int]]:
  """Indices of cells, in order, grouped by program: at most `most` neighbors that differ only in
  seed and learning rate.

  A cell with a checkpoint was started on its own, and resumes on its own.
  """

  def begun(cell):
    return os.path.isdir(os.path.join(cell.folder, 'checkpoints'))

  def key(i):
    return cells[i].folder if begun(cells[i]) else _program(cells[i])

  alike = [list(same) for _, same in itertools.groupby(range(len(cells)), key)]
  return [same[i : i + most] for same in alike for i in range(0, len(same), most)]


def _program(cell) -> str:
  """A key that is equal for cells that can share a program."""
  config = cell.config
  method = dataclasses.replace(config.method, seed=0, learning_rate=1.0)
  system = dataclasses.replace(config.system, samples_every=0)
  config = dataclasses.replace(config, method=method, system=system)
  return repr((cell.base, cell.variant, cell.split, config))


# The program.


def together(train_step):
  """The jitted step of one run -> that of L runs: (state, batch) -> `StepOutput`. Donates state.

  state: from `stacked_state`. batch: from `stacked`. metrics: (L,) each. records: (L, ...) each.
  """
  # Without the layouts of one run's results, because all lanes are on one device.
  one_lane = train_step.__wrapped__
  out_axes = StepOutput(state=STATE_AXES, metrics=0, records=0)
  return jax.jit(jax.vmap(one_lane, (STATE_AXES, 0), out_axes), donate_argnums=0)


def stacked_state(states) -> TrainState:
  """States of L runs, one at a time -> one state whose OWN fields are (L, ...)."""
  own = []
  for state in states:
    own.append({name: getattr(state, name) for name in OWN})
  stacked_parts = jax.tree.map(lambda *x: jnp.stack(x), *own)
  return dataclasses.replace(state, **stacked_parts)


def stacked(batches):
  """Batches of L runs -> one batch of arrays (L, ...). Prompts are padded to the longest run's."""

  def stack(*arrays):
    longest = max(x.shape[-1] if x.ndim else 0 for x in arrays)
    return jnp.stack([_padded(x, longest) for x in arrays])

  return jax.tree.map(stack, *batches)


def _padded(x, length: int):
  """x (..., T) -> (..., length); a scalar stays."""
  if not x.ndim or x.shape[-1] == length:
    return x
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])])


def state_of(state: TrainState, lane: int) -> TrainState:
  """The state of one run."""
  own = {name: getattr(state, name) for name in OWN}
  return dataclasses.replace(state, **_take(own, lane))


@jax.jit
def _take(tree, lane):
  return jax.tree.map(lambda x: x[lane], tree)


# The runs.


def run(cells, builders_of):
  """Runs the cells of one group (`groups`) to their ends.

  builders_of: cell -> `train.Builders`, whose `make_train_step` makes the step of L runs.

  Returns: each cell's error or None; None instead of the list if a signal ended them.
  """
  config = cells[0].config
  builders = builders_of(cells[0])
  last = config.method.steps
  mesh = builders.make_mesh(config.system.mesh)
  with jax.set_mesh(mesh), StopSignals() as stop, contextlib.ExitStack() as ends:
    # Model, data, state.
    model, config = train.framed(builders.load_model(config.model), config)
    batches = [builders.make_batches(cell.config, model, mesh) for cell in cells]
    state = stacked_state(builders.init_state(model, cell.config, mesh) for cell in cells)
    model.params = None  # the state holds them now
    lanes = [
      _Lane(index, cell, builders_of(cell), model, batches[index].fingerprint)
      for index, cell in enumerate(cells)
    ]
    metrics = _Metrics(lanes, last)
    for thing in (*lanes, metrics):
      ends.callback(thing.close)

    # The initial model, and the program.
    with stop.leaving():
      for lane in lanes:
        lane.evaluate(0, state)

    def batch_at(step):
      return stacked([b.at(step) for b in batches])

    batch = batch_at(0)
    one_lane = jax.eval_shape(lambda state: state_of(state, 0), state)
    train_step = CompiledStep(builders.make_train_step(model, config, mesh, one_lane))
    with stop.compiling():
      train_step.compile(state, batch)

    # Train.
    metrics.restart_clock()
    for step in range(1, last + 1):
      with jax.transfer_guard_device_to_host('disallow'):
        state, values, records = train_step(state, batch)
      batch = batch_at(step) if step < last else None
      metrics.add(step, values)
      if stop.requested:
        return None
      if step == last or due(step, config.system.eval_every):
        metrics.flush()
        with stop.leaving():
          for lane in lanes:
            lane.evaluate(step, state)
        metrics.restart_clock()
      elif due(step, config.system.log_every):
        metrics.flush(but=1)  # the devices are still computing the last one
    for lane in lanes:
      lane.end(state, records)
    return [lane.error for lane in lanes]


class _Metrics:
  """Moves metrics from the device to the folders of the runs; the terminal shows their means."""

  def __init__(self, lanes, last: int):
    self._lanes = lanes
    self._progress = Progress(0, last)
    self._pending = []
    self.restart_clock()

  def add(self, step, values):
    """values: (L,) each, on the device."""
    self._pending.append((step, values))

  def flush(self, but: int = 0):
    """Fetches and writes what is pending, without the last `but`."""
    number = len(self._pending) - but
    if number < 1:
      return
    ready = jax.device_get(self._pending[:number])
    self._pending = self._pending[number:]
    seconds = (time.perf_counter() - self._clock) / number
    self.restart_clock()
    for step, values in ready:
      for lane in self._lanes:
        lane.write(step, values, seconds / len(self._lanes))
      means = {name: np.mean(x) for name, x in values.items()}
      self._progress.step(step, means | {'time/step_seconds': seconds})

  def restart_clock(self):
    """Excludes time that was not spent on steps."""
    self._clock = time.perf_counter()

  def close(self):
    """Ends the bar on the terminal."""
    self._progress.close()


def _alone(method):
  """An error in one run ends only that run."""

  @functools.wraps(method)
  def guarded(self, *args):
    if self.error is None:
      try:
        method(self, *args)
      except Exception as e:
        say(traceback.format_exc())
        self.error = e

  return guarded


class _Lane:
  """One of the runs: it writes the run's folder, and keeps the run's error."""

  def __init__(self, index: int, cell, builders: train.Builders, model, data_fingerprint: str):
    model, config = train.framed(model, cell.config)
    self.error = None
    self._index = index
    self._cell = cell
    self._about = workdir_lib.about(config, model.source, data_fingerprint)
    workdir_lib.write_config(cell.folder, config, self._about)
    self._writer = metrics_lib.Writer(cell.folder)
    self._log = RunLog(config, cell.folder, model.spec.num_codes, self._writer, Silence())
    self._evaluate = builders.make_evaluator(config, model)
    self._rows = builders.make_rows(config, model)

  @_alone
  def write(self, step, values, seconds):
    """values: {name: (L,)}, on the host."""
    self._log.write(step, {name: x[self._index] for name, x in values.items()}, seconds)

  @_alone
  def evaluate(self, step, state):
    """state: of all lanes."""
    self._log.evaluation(step, *self._evaluate(state_of(state, self._index), step))

  @_alone
  def end(self, state, records):
    """Writes sheet and rows, the checkpoint if the run keeps one, summary and page."""
    cell = self._cell
    folder, system, last = cell.folder, cell.config.system, cell.config.method.steps
    state = state_of(state, self._index)
    if due(last, system.samples_every):
      found = self._rows(state, _take(records, self._index))
      workdir_lib.write_samples(folder, last, step_sheet.sheet(found))
      rows_lib.write(folder, last, rows_lib.table(last, found))
    train.check_finite(state, last, folder, cell.config.method.learning_rate_key)
    if cell.keeps_checkpoint:
      self._save(state, last)
    summary_lib.write(folder, last, last, checkpoints_lib.fingerprint(state.params))
    run_page.write(folder)

  def _save(self, state, step):
    system = self._cell.config.system
    checkpoints = checkpoints_lib.Checkpoints(
      self._cell.folder, self._about, system.keep_last, system.keep_every
    )
    try:
      checkpoints.save(step, state)
    finally:
      checkpoints.close()

  def close(self):
    """Closes the run's metrics."""
    self._writer.close()
