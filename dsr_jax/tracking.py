"""Sends a run's metrics, images and texts to Weights & Biases (`system.track=wandb`).

Everything that is sent comes from the run's files, one row per step: after a kill, the rows that
did not arrive are sent, and no row is sent twice. `WORKDIR/wandb.json` stores the run's id, so a
resumed run is the same run there. WANDB_MODE=offline keeps everything in `WORKDIR/wandb`, for
`wandb sync`.
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
except ImportError:  # an optional package; `check` requires it
  wandb = None

ID_FILE = 'wandb.json'
PROJECT = 'dsr_jax'  # or WANDB_PROJECT
PICTURES = ('samples', 'watched')  # folders of STEP.png
TEXTS = ('input', 'text', 'reward', 'right', 'reason')  # columns of the table of descriptions


def check(track: str):
  """InputError, before any work, unless the service of `system.track` can be used."""
  if not track:
    return
  if wandb is None:
    raise InputError("system.track=wandb needs the package wandb; pip install 'dsr_jax[wandb]'")
  offline = os.environ.get('WANDB_MODE', '') in ('offline', 'disabled')
  if not offline and not wandb.login(prompt=False, verify=False):
    raise InputError(
      'system.track=wandb needs a login at Weights & Biases; run wandb login, or set '
      'WANDB_MODE=offline to keep the run on this machine'
    )


class Tracked:
  """Wraps a `metrics.Writer`; sends everything to Weights & Biases too."""

  def __init__(self, writer, config, workdir: str, resumed: bool, kept: int = 1):
    """kept: rows wait until this step, for measurements of the initial model."""
    self._writer, self._kept = writer, kept
    self._workdir = workdir
    self._rows = {}  # {step: values}, complete except for the last step
    self._newest = 0
    self._run = _start(config, workdir, resumed)
    self._sent = _steps_there(self._run, workdir)
    # Rows that an earlier process logged but may not have sent.
    for name, (steps, values) in metrics_lib.read(workdir).items():
      for step, value in zip(steps, values):
        self._rows.setdefault(step, {})[name] = value

  def write(self, step, values):
    """Writes the line of a step or an evaluation."""
    self._writer.write(step, values)
    # The initial model is measured after some steps: keep its row until then.
    if step > max(self._kept, self._newest):
      self._send(before=step)
    self._newest = max(self._newest, step)
    self._rows.setdefault(step, {}).update(values)

  def media(self, step, pictures, texts):
    """Passes images and texts on; they are sent with their step's row, from the run's files."""
    self._writer.media(step, pictures, texts)

  def close(self):
    """Sends the remaining rows."""
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
    """The images and texts of a step in the run's files."""
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
  """Opens a new run, or the one that belongs to this workdir."""
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
      f'cannot open the run at Weights & Biases ({first}); check the network, run wandb login, or '
      'set WANDB_MODE=offline'
    ) from e


# Rows that have arrived.


def _steps_there(run, workdir: str) -> set[int]:
  """The steps whose rows are on the server, or in the offline files of earlier processes."""
  if not run.offline:
    return set(range(run.step))
  found = set()
  # If two runs begin in the same second, the later folder's name ends with -1.
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
  """The records of a file that wandb wrote offline, up to where a kill may have cut it off.

  It is a log in LevelDB's format: after 7 bytes, blocks of 32 KiB with pieces of records, each
  after a header of 7 bytes (checksum, length, kind: whole, first, middle, last).
  """
  with open(path, 'rb') as f:
    data = f.read()
  found, parts, at = [], b'', 7
  while at + 7 <= len(data):
    left = 32768 - at % 32768
    if left < 7:  # no room for a header in the rest of the block
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
