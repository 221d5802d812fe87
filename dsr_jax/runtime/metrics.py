"""Metrics of a run: `metrics.jsonl` with one line per step, and TensorBoard events, which also have
images, texts and the run's settings.

Names are `group/name`. `time/...` and `memory/...` differ between two runs of the same command;
everything else is the same bit for bit. Evaluations have their own lines (`eval/...`), at the step
whose parameters they measured; step 0 is the model before training.

An invalid line (damaged by the disk or an editor) costs only itself: it is reported and skipped,
and steps without a line are reported too.
"""

import io
import json
import math
import os
import resource
import time
from typing import NamedTuple

import jax
from PIL import Image
from tensorboardX import event_file_writer
from tensorboardX import summary as summary_lib
from tensorboardX.proto import event_pb2, summary_pb2

from dsr_jax import cli, files
from dsr_jax.errors import InputError
from dsr_jax.runtime import run_files

FILE = 'metrics.jsonl'
UNREPEATABLE = ('time/', 'memory/')
FIXED_LIST = 'eval/watched/'


class Writer:
  """Appends to a workdir's metrics; first removes lines after `resume_step` (all lines if it is
  None).

  settings: {key: value} of the run, for TensorBoard's table of hyperparameters.
  """

  def __init__(self, workdir, resume_step=None, settings=None):
    self._path = os.path.join(workdir, FILE)
    with run_files.writing(self._path):
      cut(self._path, resume_step)
      self._file = open(self._path, 'a', encoding='utf-8')
      first_step = 0 if resume_step is None else resume_step + 1
      self._events = _events(os.path.join(workdir, 'events'), first_step)
      if settings and resume_step is None:  # a resumed run has already written them
        for summary in summary_lib.hparams(settings, {}):
          self._event(0, summary)
        self._events.flush()

  def write(self, step, values):
    """Writes one line. values: flat dict of finite floats. The line has left this process's buffers
    before the call returns.
    """
    line = json.dumps(
      {'step': step, **{name: _number(value) for name, value in values.items()}}, allow_nan=False
    )
    with run_files.writing(self._path):
      self._file.write(line + '\n')
      self._file.flush()
      self._event(step, _numbers(values))
      self._events.flush()

  def media(self, step, pictures, texts):
    """Images {name: PNG bytes} and texts {name: Markdown}, for TensorBoard alone."""
    with run_files.writing(self._path):
      for name, png in pictures.items():
        self._event(step, _picture(name, png))
      for name, text in texts.items():
        self._event(step, summary_lib.text(name, text))
      self._events.flush()

  def _event(self, step, summary):
    self._events.write_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

  def close(self):
    """Ends both files."""
    with run_files.writing(self._path):
      self._file.close()
      self._events.close()


def _events(folder, first_step):
  """A new file of TensorBoard events. TensorBoard drops events from `first_step` on that an
  earlier, killed process logged.

  tensorboardX's SummaryWriter passes events to a thread, whose queue is lost in a kill even after
  `flush`; its single-file writer has no such queue.
  """
  os.makedirs(folder, exist_ok=True)
  suffix = f'.{time.time_ns()}.{os.getpid()}'  # the name has only the second
  events = event_file_writer.EventsWriter(os.path.join(folder, 'events'), suffix)
  start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
  events.write_event(event_pb2.Event(wall_time=time.time(), step=first_step, session_log=start))
  return events


def _numbers(values):
  """All numbers of a line as one TensorBoard summary."""
  return summary_pb2.Summary(
    value=[summary_pb2.Summary.Value(tag=name, simple_value=x) for name, x in values.items()]
  )


def _picture(name, png):
  """An image as a TensorBoard summary."""
  width, height = Image.open(io.BytesIO(png)).size
  image = summary_pb2.Summary.Image(
    height=height, width=width, colorspace=3, encoded_image_string=png
  )
  return summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag=name, image=image)])


class Nowhere:
  """Like `Writer`, for processes that write nothing."""

  def write(self, step, values):
    """Nothing."""

  def media(self, step, pictures, texts):
    """Nothing."""

  def close(self):
    """Nothing."""


class _Lines(NamedTuple):
  """A metrics file. good: [(text, its JSON object)]; bad: a message for each invalid line."""

  good: list[tuple[str, dict]]
  bad: list[str]


def cut(path, last_step):
  """Removes lines after `last_step` (all lines if it is None), and a line that a kill left
  incomplete. Reports unreadable lines, and earlier steps without a line.
  """
  if not os.path.exists(path):
    if last_step:
      cli.log(f'note         {path} does not exist: the metrics of steps 1 to {last_step} are lost')
    return
  if last_step is None:
    files.write_text(path, '')
    return
  lines = _read(path)
  _say_bad(path, lines)
  kept = [(text, line) for text, line in lines.good if line['step'] <= last_step]
  missing = set(range(1, last_step + 1)) - {line['step'] for _, line in kept if not _is_eval(line)}
  if missing:
    cli.log(f'note         {path} has no lines for {_spans(missing)}; they are not computed again')
  files.write_text(path, ''.join(text + '\n' for text, _ in kept))


def read(workdir):
  """A run's metrics as {name: (steps, values)}, two lists sorted by step; repeated measurements at
  a step keep the order of the file.
  """
  curves = {}
  path = os.path.join(workdir, FILE)
  if not os.path.exists(path):
    raise InputError(f'{path} does not exist; name the workdir of a run')
  for line in sorted(_good_lines(path), key=_step_of):
    for name, value in line.items():
      if name != 'step':
        steps, values = curves.setdefault(name, ([], []))
        steps.append(line['step'])
        values.append(value)
  return curves


def has_evaluation(workdir, step, fixed_list=False):
  """Whether the parameters of `step` have been evaluated. fixed_list: on the fixed list, which has
  its own line.
  """
  path = os.path.join(workdir, FILE)
  if not os.path.exists(path):
    return False
  lines = [line for _, line in _read(path).good if line['step'] == step]
  names = [name for line in lines for name in line if name.startswith('eval/')]
  return any(name.startswith(FIXED_LIST) == fixed_list for name in names)


def memory():
  """{'memory/...': bytes}: the device's peak if its runtime reports it, else this process's."""
  stats = jax.local_devices()[0].memory_stats()
  if stats and 'peak_bytes_in_use' in stats:
    return {'memory/device_peak_bytes': stats['peak_bytes_in_use']}
  return {'memory/process_peak_bytes': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def repeatable(workdir):
  """The lines of a run without time and memory, sorted by step: a list of dicts that is equal for
  two runs of the same command. Unsorted, they may differ: when the initial model is evaluated
  depends on where a run was stopped.
  """
  return [
    {name: value for name, value in line.items() if not name.startswith(UNREPEATABLE)}
    for line in sorted(_good_lines(os.path.join(workdir, FILE)), key=_step_of)
  ]


def first_not_finite(values):
  """The name of the first value that is NaN or infinite, or None."""
  return next((name for name, value in values.items() if not math.isfinite(value)), None)


def _good_lines(path) -> list[dict]:
  lines = _read(path)
  _say_bad(path, lines)
  return [line for _, line in lines.good]


def _read(path) -> _Lines:
  """All lines of a metrics file, except a last line that a kill left incomplete."""
  with run_files.reading(path), open(path, 'rb') as f:
    whole, _, _ = f.read().rpartition(b'\n')
  good, bad = [], []
  for number, data in enumerate(whole.split(b'\n') if whole else [], start=1):
    try:
      text = data.decode('utf-8')
      good.append((text, _checked(json.loads(text))))
    except (ValueError, RecursionError):
      bad.append(f'line {number} ({data[:40]!r})')
  return _Lines(good, bad)


def _checked(line) -> dict:
  """A line's object; ValueError if it does not have the format of `Writer`."""
  if not isinstance(line, dict) or type(line.get('step')) is not int or line['step'] < 0:
    raise ValueError
  for value in line.values():
    if type(value) not in (int, float) or not math.isfinite(value):
      raise ValueError
  return line


def _say_bad(path, lines: _Lines):
  if lines.bad:
    shown = ', '.join(lines.bad[:5]) + (', ...' if len(lines.bad) > 5 else '')
    cli.log(
      f'note         {path}: skipped {len(lines.bad)} of {len(lines.bad) + len(lines.good)} lines, '
      f'which are not metrics: {shown}'
    )


def _is_eval(line) -> bool:
  return any(name.startswith('eval/') for name in line)


def _step_of(line) -> int:
  return line['step']


def _spans(steps) -> str:
  """{1, 2, 3, 7} -> 'steps 1 to 3, 7'."""
  spans = []
  for step in sorted(steps):
    if spans and spans[-1][1] == step - 1:
      spans[-1][1] = step
    else:
      spans.append([step, step])
  shown = [f'{a} to {b}' if b > a else str(a) for a, b in spans]
  return 'steps ' + ', '.join(shown[:8]) + (', ...' if len(shown) > 8 else '')


def _number(value):
  # float32 values are written with the digits of float64, so equal text means equal bits
  return value if isinstance(value, int) else float(value)
