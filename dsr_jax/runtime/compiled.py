"""The compiled step: one program, or one per kind of batch if the tasks take turns."""

import contextlib
import gc
import time

import jax

from dsr_jax.errors import InputError, first_line
from dsr_jax.runtime.progress import say


class CompiledStep:
  """A jitted `train_step`, compiled ahead of time for each kind of batch.

  train_step: has `lower(state, batch)`, and donates its state. estimate: `plan.memory.Estimate` of
  the bytes per device, or None.
  """

  def __init__(self, train_step, estimate=None):
    self._train_step = train_step
    self._estimate = estimate
    self._programs = {}
    if estimate:
      say(estimate.line())

  def compile(self, state, batch):
    """Compiles for this kind of batch.

    Raises:
      InputError: the devices have no room; first prints a table of bytes by part.
    """
    began = time.perf_counter()
    with self._out_of_memory():
      with _collector_paused():
        lowered = self._train_step.lower(state, batch)
      program = lowered.compile()
    self._programs[jax.tree.structure(batch)] = program
    seconds = time.perf_counter() - began
    say(f'compiled     the step in {seconds:.1f} s{_temporaries(program)}')

  def __call__(self, state, batch):
    """(state, batch) -> `StepOutput`."""
    kind = jax.tree.structure(batch)
    if kind not in self._programs:
      self.compile(state, batch)
    with self._out_of_memory():
      return self._programs[kind](state, batch)

  @contextlib.contextmanager
  def _out_of_memory(self):
    try:
      yield
    except jax.errors.JaxRuntimeError as e:
      if 'RESOURCE_EXHAUSTED' not in str(e) or not self._estimate:
        raise
      say(self._estimate.table())
      raise InputError(
        f'the step does not fit in the memory of a device ({first_line(e)}); '
        f'{self._estimate.advice}'
      ) from e


@contextlib.contextmanager
def _collector_paused():
  """Pauses the garbage collector during tracing, which creates millions of objects that nearly all
  stay: scanning them repeatedly takes a fifth of the time.
  """
  enabled = gc.isenabled()
  gc.disable()
  try:
    yield
  finally:
    if enabled:
      gc.enable()


def _temporaries(program):
  analysis = program.memory_analysis()
  if not analysis:
    return ''
  return f'; {analysis.temp_size_in_bytes / 2**20:,.0f} MiB of temporaries per device'
