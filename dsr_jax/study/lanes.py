"""Several runs of one variant as lanes of one program, by `jax.vmap`: seeds of a cell, or learning
rates of the tuning.

A small model leaves an accelerator idle; L runs beside each other take little longer than one. A
lane is the run that `train.run` makes of its cell, within rounding, and leaves the same folder.
What differs: there is no checkpoint on the way, so what was stopped begins again; and time is a
lane's share, the program's divided by L.

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

from dsr_jax import train
from dsr_jax.errors import InputError
from dsr_jax.reporting import run_page as report
from dsr_jax.runtime import checkpoints as checkpoints_lib
from dsr_jax.runtime import compiled as programs_lib
from dsr_jax.runtime import metrics as metrics_lib
from dsr_jax.runtime import workdir as workdir_lib
from dsr_jax.runtime.progress import Progress, Silence, StopSignals, say

MOST = 8  # lanes that `auto` takes
SHARED = ('frozen', 'step')  # parts of a state that all lanes have in common


def number(asked: str) -> int:
  """The flag --lanes -> the most runs of a program. Errors: InputError."""
  devices = jax.device_count()
  if asked == 'auto':
    return MOST if devices == 1 and jax.default_backend() != 'cpu' else 1
  if not asked.isdecimal() or int(asked) < 1:
    raise InputError(f'found --lanes={asked}; expected auto, or a number from 1; change it')
  if int(asked) > 1 and devices > 1:
    raise InputError(
      f'found --lanes={asked} and {devices} devices; expected one, for lanes are not split over '
      'devices; set --lanes=1'
    )
  return int(asked)


def groups(cells, most: int) -> list[list[int]]:
  """Indices of cells, in order, by program: at most `most` neighbours that differ in seed and
  learning rate alone.

  A cell that holds a checkpoint was begun on its own, and goes on so.
  """

  def begun(cell):
    return os.path.isdir(os.path.join(cell.folder, 'checkpoints'))

  def key(i):
    return cells[i].folder if begun(cells[i]) else _program(cells[i])

  alike = [list(same) for _, same in itertools.groupby(range(len(cells)), key)]
  return [same[i : i + most] for same in alike for i in range(0, len(same), most)]


def _program(cell) -> str:
  c = cell.config
  method = dataclasses.replace(c.method, seed=0, learning_rate=1.0)
  system = dataclasses.replace(c.system, samples_every=0)
  return repr(
    (cell.base, cell.variant, cell.split, dataclasses.replace(c, method=method, system=system))
  )


# The program.


def together(step):
  """The `step.Step` of one run -> that of L, jitted: (state, batch) -> (state, metrics, records);
  the state is donated.

  state: of `stacked_state`. batch: of `stacked`. metrics: (L,) each. records: (L, ...) each.
  """

  def run(state, batch):
    axes = {name: None if name in SHARED else 0 for name in state}
    return jax.vmap(step.function, (axes, 0), (axes, 0, 0))(state, batch)

  return jax.jit(run, donate_argnums=0)


def stacked_state(states):
  """States of L runs, one at a time -> one whose arrays are (L, ...), but those of SHARED, which
  are held once.
  """
  lanes = []
  for state in states:
    lanes.append({name: part for name, part in state.items() if name not in SHARED})
    shared = {name: state[name] for name in SHARED}
  return {**jax.tree.map(lambda *x: jnp.stack(x), *lanes), **shared}


def stacked(batches):
  """Batches of L runs -> one of arrays (L, ...). Prompts that are longer in one run than in another
  are padded to the longest.
  """

  def stack(*arrays):
    room = [max(x.shape[-1] for x in arrays) - x.shape[-1] if x.ndim else 0 for x in arrays]
    return jnp.stack(
      [
        jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)]) if more else x
        for x, more in zip(arrays, room)
      ]
    )

  return jax.tree.map(stack, *batches)


def state_of(state, lane: int):
  """The state of one of the runs."""
  return {
    **_take({name: part for name, part in state.items() if name not in SHARED}, lane),
    **{name: state[name] for name in SHARED},
  }


@jax.jit
def _take(tree, lane):
  return jax.tree.map(lambda x: x[lane], tree)


# The runs.


def run(cells, parts_of):
  """Runs cells of one of `groups` to their ends. Returns the error of each, or None; nothing at all
  if a signal ended them.

  parts_of: cell -> `parts.Parts`, whose `make_step` makes the step of L runs.
  """
  config, parts = cells[0].config, parts_of(cells[0])
  last = config.method.steps
  mesh = parts.make_mesh(config.system.mesh)
  with jax.set_mesh(mesh), StopSignals() as stop, contextlib.ExitStack() as ends:
    # Model, data, state.
    model = parts.load_model(config.model)
    batches = [parts.make_batches(cell.config, model, mesh) for cell in cells]
    state = stacked_state(parts.init_state(model, cell.config, mesh) for cell in cells)
    model.params = None  # the state holds them now
    lanes = [
      _Lane(i, cell, parts_of(cell), model, batches[i].fingerprint) for i, cell in enumerate(cells)
    ]
    metrics = _Metrics(lanes, last)
    for thing in (*lanes, metrics):
      ends.callback(thing.close)

    # Compile.
    for lane in lanes:
      lane.evaluate(0, state)

    def at(step):
      return stacked([b.at(step) for b in batches])

    batch = at(0)
    programs = programs_lib.Programs(parts.make_step(model, config, mesh), None)
    programs.compile(state, batch)

    metrics.resume_clock()
    for step in range(1, last + 1):
      with jax.transfer_guard_device_to_host('disallow'):
        state, values, records = programs.run(state, batch)
      batch = at(step) if step < last else None
      metrics.add(step, values)
      if stop.requested:
        return None
      if step == last or train.due(step, config.system.eval_every):
        metrics.flush()
        for lane in lanes:
          lane.evaluate(step, state)
        metrics.resume_clock()
      elif train.due(step, config.system.log_every):
        metrics.flush(but=1)  # the devices are at work on the last one
    for lane in lanes:
      lane.end(state, records)
    return [lane.error for lane in lanes]


class _Metrics:
  """Metrics on their way from the device to the folders of the runs; the terminal shows their
  means.
  """

  def __init__(self, lanes, last):
    self._lanes, self._progress, self._pending = lanes, Progress(0, last), []
    self.close = self._progress.close
    self.resume_clock()

  def add(self, step, values):
    self._pending.append((step, values))

  def flush(self, but=0):
    """Fetches and writes what is pending, without the last `but`."""
    number = len(self._pending) - but
    if number < 1:
      return
    ready, self._pending = jax.device_get(self._pending[:number]), self._pending[number:]
    seconds = (time.perf_counter() - self._clock) / number
    self.resume_clock()
    for step, values in ready:
      for lane in self._lanes:
        lane.write(step, values, seconds / len(self._lanes))
      self._progress.step(
        step, {name: np.mean(x) for name, x in values.items()} | {'time/step_seconds': seconds}
      )

  def resume_clock(self):
    """Leaves out of the next steps' time what was not a step."""
    self._clock = time.perf_counter()


def _alone(method):
  """What goes wrong with one run ends that run, and the others need not suffer from it."""

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
  """One of the runs: what is in its folder, and what went wrong with it."""

  def __init__(self, index, cell, parts, model, data_fingerprint):
    config, self._index, self._cell, self.error = cell.config, index, cell, None
    self._about = workdir_lib.about(config, model.source, data_fingerprint)
    workdir_lib.write_config(cell.folder, config, self._about)
    self._writer = metrics_lib.Writer(cell.folder)
    self._log = train.Log(config, cell.folder, model, self._writer, Silence())
    self._evaluator, self._sheet = (
      parts.make_evaluator(config, model),
      parts.make_sheets(config, model),
    )

  @_alone
  def write(self, step, values, seconds):
    """values: {name: (L,)}, on the host."""
    self._log.write(step, {name: x[self._index] for name, x in values.items()}, seconds)

  @_alone
  def evaluate(self, step, state):
    self._log.evaluation(step, *self._evaluator(state_of(state, self._index), step))

  @_alone
  def end(self, state, records):
    """Pictures, the checkpoint of a run that keeps one, summary, page."""
    cell, state = self._cell, state_of(state, self._index)
    folder, system, last = cell.folder, cell.config.system, cell.config.method.steps
    if train.due(last, system.samples_every):
      workdir_lib.write_samples(folder, last, self._sheet(state, _take(records, self._index)))
    train.check_finite(state, last, folder)
    if cell.keeps_checkpoint:
      checkpoints = checkpoints_lib.Checkpoints(
        folder, self._about, system.keep_last, system.keep_every
      )
      try:
        checkpoints.save(last, state)
      finally:
        checkpoints.close()
    workdir_lib.write_summary(folder, last, last, checkpoints_lib.fingerprint(state['params']))
    report.write(folder)

  def close(self):
    self._writer.close()
