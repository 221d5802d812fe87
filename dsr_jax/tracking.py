"""A run's numbers, pictures and texts at Weights & Biases, beside its own files
(`system.track=wandb`).

What is sent is made from the run's files alone, a row a step: after a kill the rows that did not
arrive are sent, and those that did are not sent again. The run's id is kept in
`WORKDIR/wandb.json`, so that a run that goes on is the same run there. WANDB_MODE=offline keeps
everything in `WORKDIR/wandb`, for `wandb sync`.
"""

import glob
import os
import struct
import uuid

from dsr_jax import files, saved_config
from dsr_jax import rows as rows_lib
from dsr_jax.errors import InputError
from dsr_jax.runtime import metrics as metrics_lib
from dsr_jax.runtime import run_files

try:
  import wandb
  from wandb.proto import wandb_internal_pb2
except ImportError:  # an extra: asked for by `check`
  wandb = None

ID_FILE = 'wandb.json'
PROJECT = 'dsr_jax'  # WANDB_PROJECT names another
PICTURES = ('samples', 'watched')  # folders of STEP.png
TEXTS = ('input', 'text', 'reward', 'right', 'reason')  # columns of the table of descriptions


def check(track: str):
  """InputError unless what `system.track` asks for can be had: before any work."""
  if not track:
    return
  if wandb is None:
    raise InputError(
      "found no wandb; expected it for system.track=wandb; pip install 'dsr_jax[wandb]'"
    )
  offline = os.environ.get('WANDB_MODE', '') in ('offline', 'disabled')
  if not offline and not wandb.login(prompt=False, verify=False):
    raise InputError(
      'found no login at Weights & Biases; expected one for system.track=wandb; run wandb login, '
      'or set WANDB_MODE=offline to keep the run on this machine'
    )


class Tracked:
  """As the `metrics.Writer` that it wraps; everything also goes to Weights & Biases."""

  def __init__(self, writer, config, workdir: str, resumed: bool, kept: int = 1):
    """kept: the step up to which rows wait, for what is measured of the initial model."""
    self._writer, self._kept = writer, kept
    self._workdir = workdir
    self._rows = {}  # {step: values}, complete but for what may still come to the last step
    self._newest = 0
    self._run = _start(config, workdir, resumed)
    self._sent = _steps_there(self._run, workdir)
    # What an earlier process logged and could not send.
    for name, (steps, values) in metrics_lib.read(workdir).items():
      for step, value in zip(steps, values):
        self._rows.setdefault(step, {})[name] = value

  def write(self, step, values):
    """A line, of a step or of an evaluation."""
    self._writer.write(step, values)
    # The initial model is measured after some steps: rows are kept until then.
    if step > max(self._kept, self._newest):
      self._send(before=step)
    self._newest = max(self._newest, step)
    self._rows.setdefault(step, {}).update(values)

  def media(self, step, pictures, texts):
    """Pictures and texts: sent with their step's row, from the run's files."""
    self._writer.media(step, pictures, texts)

  def close(self):
    """Sends what is left."""
    self._writer.close()
    self._send(before=None)
    self._run.finish()

  def _send(self, before: int | None):
    """Sends the rows of all steps before `before`."""
    for step in sorted(self._rows):
      if before is None or step < before:
        values = self._rows.pop(step)
        if step not in self._sent:
          self._run.log(values | self._shown(step), step=step)
          self._sent.add(step)

  def _shown(self, step: int) -> dict:
    """The pictures and texts that the run has of a step."""
    found = {}
    for folder in PICTURES:
      path = os.path.join(self._workdir, folder, f'{step:06d}.png')
      if os.path.isfile(path):
        found[f'pictures/{folder}'] = wandb.Image(path)
    told = rows_lib.read(self._workdir, step, rows_lib.WATCHED)
    told = [[row[name] for name in TEXTS] for row in told if row['text'] is not None]
    if told:
      found['texts/watched'] = wandb.Table(columns=list(TEXTS), data=told)
    return found


def _start(config, workdir: str, resumed: bool):
  """The open run: a new one, or the one that this workdir's run has been."""
  path = os.path.join(workdir, ID_FILE)
  known = files.read_json_or_none(path) if resumed else None
  identity = (known or {}).get('id') or uuid.uuid4().hex[:12]
  with run_files.writing(path):
    files.write_json(path, {'id': identity})
  try:
    return wandb.init(
      project=os.environ.get('WANDB_PROJECT', PROJECT),
      name=os.path.basename(os.path.abspath(workdir)),
      id=identity,
      resume='allow',
      dir=workdir,
      config=saved_config.flat(saved_config.to_json(config)),
      settings=wandb.Settings(silent=True, console='off', disable_git=True, save_code=False),
    )
  except wandb.Error as e:
    first = str(e).strip().splitlines()[0]
    raise InputError(
      f'cannot open the run at Weights & Biases ({first}); expected a login and a way there; run '
      'wandb login, or set WANDB_MODE=offline'
    ) from e


# What is there already.


def _steps_there(run, workdir: str) -> set[int]:
  """The steps whose rows have arrived: at the server, or in the files of earlier processes."""
  if not run.offline:
    return set(range(run.step))
  found = set()
  # Of two that began in the same second the later folder's name ends with -1.
  pattern = os.path.join(
    glob.escape(workdir), 'wandb', f'offline-run-*-{run.id}*', f'run-{run.id}.wandb'
  )
  for path in sorted(glob.glob(pattern)):
    found |= {
      record.history.step.num
      for record in records_in(path)
      if record.WhichOneof('record_type') == 'history'
    }
  return found


def records_in(path: str) -> list:
  """The records of a file that wandb wrote offline, up to where a kill cut it off.

  It is a log as LevelDB writes it: after 7 bytes, blocks of 32 KiB with records in pieces, each
  after a header of 7 bytes (checksum, length, kind: whole, first, middle, last).
  """
  with open(path, 'rb') as f:
    data = f.read()
  found, parts, at = [], b'', 7
  while at + 7 <= len(data):
    left = 32768 - at % 32768
    if left < 7:  # the rest of a block has no room for a header
      at += left
      continue
    _, length, kind = struct.unpack_from('<IHB', data, at)
    piece = data[at + 7 : at + 7 + length]
    if kind not in (1, 2, 3, 4) or len(piece) < length:
      break
    parts = piece if kind in (1, 2) else parts + piece
    at += 7 + length
    if kind in (1, 4):
      record = wandb_internal_pb2.Record()
      record.ParseFromString(parts)
      found.append(record)
  return found
