"""Metrics of a run: `metrics.jsonl`, a line a step, and TensorBoard events.

Names are `group/name`. `time/...` and `memory/...` differ between two runs of the same command;
everything else is the same bit for bit. Evaluations have lines of their own (`eval/...`), at the
step whose parameters they measured; step 0 is the model before training.
"""

import json
import math
import os
import resource

import jax

from dsr_jax import files
from dsr_jax.errors import InputError
from dsr_jax.runtime import events

FILE = 'metrics.jsonl'
UNREPEATABLE = ('time/', 'memory/')


class Writer:
  """Appends to a workdir's metrics; lines after `resume_step` are cut first (all lines, where it is
  None).
  """

  def __init__(self, workdir, resume_step=None):
    self._path = os.path.join(workdir, FILE)
    cut(self._path, resume_step)
    self._file = open(self._path, 'a', encoding='utf-8')
    self._events = events.EventWriter(
      os.path.join(workdir, 'events'), 0 if resume_step is None else resume_step + 1
    )

  def write(self, step, values):
    """One line. `values`: flat dict of finite floats. It is out of this process before the call
    returns.
    """
    line = json.dumps(
      {'step': step, **{name: _number(value) for name, value in values.items()}}, allow_nan=False
    )
    self._file.write(line + '\n')
    self._file.flush()
    self._events.scalars(step, values)

  def close(self):
    """Ends both files."""
    self._file.close()
    self._events.close()


class Nowhere:
  """As `Writer`, for processes that write nothing."""

  def write(self, step, values):
    """Nothing."""

  def close(self):
    """Nothing."""


def cut(path, last_step):
  """Drops lines after `last_step`, and a line that a kill left half-written; all of them if it is
  None.
  """
  if not os.path.exists(path):
    return
  kept = [] if last_step is None else [line for line, step in _lines(path) if step <= last_step]
  files.write_text(path, ''.join(line + '\n' for line in kept))


def read(workdir):
  """A run's metrics as {name: (steps, values)}, both lists, in the order of the file."""
  curves = {}
  path = os.path.join(workdir, FILE)
  if not os.path.exists(path):
    raise InputError(f'found no {path}; expected the workdir of a run; name another')
  for line, step in _lines(path):
    for name, value in json.loads(line).items():
      if name != 'step':
        steps, values = curves.setdefault(name, ([], []))
        steps.append(step)
        values.append(value)
  return curves


def has_evaluation(workdir, step):
  """Whether the parameters of `step` have been evaluated."""
  path = os.path.join(workdir, FILE)
  return os.path.exists(path) and any(
    at == step and any(name.startswith('eval/') for name in json.loads(line))
    for line, at in _lines(path)
  )


def memory():
  """{'memory/...': bytes}: the device's peak where its runtime counts, else this process's."""
  stats = jax.local_devices()[0].memory_stats()
  if stats and 'peak_bytes_in_use' in stats:
    return {'memory/device_peak_bytes': stats['peak_bytes_in_use']}
  return {'memory/process_peak_bytes': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def repeatable(workdir):
  """The lines of a run without time and memory: a list of dicts, equal for two runs of the same
  command.
  """
  lines = [json.loads(line) for line, _ in _lines(os.path.join(workdir, FILE))]
  return [
    {name: value for name, value in line.items() if not name.startswith(UNREPEATABLE)}
    for line in lines
  ]


def first_not_finite(values):
  """The name of the first value that is NaN or infinite, or None."""
  return next((name for name, value in values.items() if not math.isfinite(value)), None)


def _lines(path):
  """Whole lines of a metrics file with their steps."""
  with open(path, encoding='utf-8', errors='replace') as f:
    for line in f:
      try:
        yield line.rstrip('\n'), json.loads(line)['step']
      except ValueError:  # the last line of a killed run
        return


def _number(value):
  # float32 values are written with the digits of float64, so that equal text means equal bits
  return value if isinstance(value, int) else float(value)
