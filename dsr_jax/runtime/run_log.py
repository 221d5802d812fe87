"""Brings a run's metrics from the devices to the files and the terminal."""

import time

import jax

from dsr_jax.errors import InputError
from dsr_jax.runtime import metrics as metrics_lib
from dsr_jax.runtime import workdir as workdir_lib


def due(step, every):
  """Whether something done every `every` steps is due after this one; 0 is never."""
  return bool(every) and step % every == 0


class RunLog:
  """Fetches the metrics of several steps at once, and writes one line per step.

  writer: `metrics.Writer`. progress: `progress.Progress`. codes_per_picture: for tokens per second.
  """

  def __init__(self, config, workdir, codes_per_picture, writer, progress):
    self._workdir = workdir
    self._writer = writer
    self._progress = progress
    self._pending = []
    self._waited = {}
    self._clock = time.perf_counter()
    self._rate_key = config.method.learning_rate_key
    self._frozen_every = config.system.frozen_every
    self._probe_every = config.system.probe_every
    self._codes = codes_per_picture
    self._samples_per_task = config.method.inputs_per_task * config.method.group_size

  def add(self, step, values, waited=0.0):
    """Stores a step's metrics, still on the devices. waited: seconds that the devices then waited
    for the next batch.
    """
    self._pending.append((step, values))
    self._waited[step] = waited

  def flush(self):
    """Fetches and writes the pending metrics. Raises the errors of `write`."""
    fetched = jax.device_get(self._pending)
    seconds = (time.perf_counter() - self._clock) / max(len(fetched), 1)
    for step, values in fetched:
      self.write(step, values, seconds)
    self._pending.clear()

  def write(self, step, values, seconds):
    """Writes a step's line. values: its metrics, on the host.

    Raises:
      InputError: at the first number that is not finite.
    """
    values = {
      name: float(value) for name, value in sorted(values.items()) if self._measured(step, name)
    }
    bad = metrics_lib.first_not_finite(values)
    if bad:
      raise InputError(
        f'{bad} is {values[bad]} at step {step}, not a finite number; lower {self._rate_key}, or '
        'look at the metrics before that step; the last good checkpoint is kept'
      )
    codes = self._codes * ('generation/loss' in values)
    tokens = self._samples_per_task * (codes + values.get('understanding/text_length', 0.0))
    values['time/step_seconds'] = seconds
    values['time/data_wait'] = self._waited.pop(step, 0.0)
    values['time/tokens_per_second'] = tokens / seconds  # sampled tokens
    self._writer.write(step, values | metrics_lib.memory())
    self._progress.step(step, values)

  def _measured(self, step, name):
    """Whether this step measured `name`: the initial model and the probes run only now and then,
    and in between, the step returns NaN for them.
    """
    if '/probe_' in name:
      return due(step - 1, self._probe_every)
    return not name.endswith('/reward_frozen') or due(step - 1, self._frozen_every)

  def evaluation(self, step, scores, rows):
    """Writes one evaluation: the rows for paired comparisons, then its line, which marks it as
    complete.
    """
    if jax.process_index() == 0:
      workdir_lib.write_evaluation(self._workdir, step, rows)
    values = {f'eval/{name}': float(value) for name, value in scores.items()}
    self._writer.write(step, values)
    self._progress.evaluation(step, values)

  def media(self, step, pictures, texts):
    """Writes images {name: PNG bytes} and texts {name: Markdown} of a step."""
    self._writer.media(step, pictures, texts)

  def restart_clock(self):
    """Excludes the time of other work from the next step's time."""
    if not self._pending:
      self._clock = time.perf_counter()

  def close(self):
    """Ends the bar on the terminal."""
    self._progress.close()
