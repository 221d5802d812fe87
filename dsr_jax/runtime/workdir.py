"""The folder of a run: permission checks, locks, and the files that describe the run."""

import contextlib
import fcntl
import glob
import importlib.metadata
import importlib.util
import json
import os
import socket
import tempfile
import threading
import time
import uuid

from etils import epath
import jax

from dsr_jax import cli, files, images, saved_config
from dsr_jax.errors import InputError
from dsr_jax.runtime import metrics as metrics_lib
from dsr_jax.runtime import run_files

ACCELERATORS = ('/dev/nvidia[0-9]*', '/dev/accel[0-9]*', '/dev/vfio/[0-9]*')
MIRRORED = (
  'config.json',
  'metrics.jsonl',
  'summary.json',
  'report.html',
  'events',
  'samples',
  'evaluations',
  'rows',
  'watched',
  'external',
  'wandb.json',
)
STORES = {'gs': 'gcsfs', 's3': 's3fs'}  # kind of bucket -> the package that accesses it
LOCK = '.lock'
BUCKET_LOCK = 'run.lock'
# A bucket's lock: its owner rewrites it every BEAT_SECONDS; a lock that was not rewritten for
# DEAD_SECONDS belongs to a dead run.
BEAT_SECONDS = 10.0
DEAD_SECONDS = 30.0
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def check_writable(workdir):
  """InputError unless files can be created in `workdir`, or in its nearest existing parent. Leaves
  no files.
  """
  if '://' in workdir:
    raise InputError(
      f'--workdir={workdir} is not a folder of this machine; name a local folder, and the bucket '
      'in system.bucket'
    )
  folder = os.path.abspath(workdir)
  while not os.path.lexists(folder):
    folder = os.path.dirname(folder)
  try:
    with tempfile.TemporaryFile(dir=folder):
      pass
  except OSError as e:
    raise InputError(
      f'cannot write to {workdir} ({e.strerror}: {folder}); choose another --workdir'
    ) from e


def check_bucket(bucket: str):
  """InputError unless `bucket` can be a folder, or is a store whose package is installed.

  Does not use the network.
  """
  scheme, is_store, _ = bucket.partition('://')
  if not is_store:
    if os.path.lexists(bucket) and not os.path.isdir(bucket):
      raise InputError(
        f'system.bucket names the file {bucket}; set it to a folder, or to gs://BUCKET/FOLDER'
      )
    return
  package = STORES.get(scheme)
  if package is None:
    raise InputError(
      f'system.bucket is {bucket}; set it to a folder, or to a bucket with {" or ".join(STORES)} '
      'before the ://'
    )
  if not any(importlib.util.find_spec(name) for name in (package, 'tensorflow')):
    raise InputError(
      f'system.bucket={bucket} needs the package {package}, which is not installed; pip install '
      f'{package}'
    )


def check_accelerator():
  """InputError if the machine has an accelerator that the installed JAX does not use, unless JAX is
  set to use the CPU.
  """
  if jax.default_backend() != 'cpu' or _told_to_use_cpu():
    return
  if found := accelerators():
    kind = 'gpu' if 'nvidia' in found[0] else 'tpu'
    raise InputError(
      f'the installed JAX does not use the accelerator of this machine ({found[0]}); pip install '
      f'-r requirements-{kind}.txt, or set JAX_PLATFORMS=cpu to train on the CPU anyway'
    )


def accelerators() -> list[str]:
  """The files of this machine's accelerators, in order, whether JAX uses them or not."""
  return sorted(path for pattern in ACCELERATORS for path in glob.glob(pattern))


def local_devices() -> str:
  """This process's own devices: '8 x NVIDIA H200'."""
  return f'{jax.local_device_count()} x {jax.local_devices()[0].device_kind}'


def _told_to_use_cpu():
  return 'cpu' in (jax.config.jax_platforms or '')  # JAX_PLATFORMS


def use_compile_cache(folder):
  """Stores compiled programs in `folder`, so that the next start does not compile again."""
  folder = os.path.expanduser(folder)
  jax.config.update('jax_compilation_cache_dir', folder)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 1.0)


class Held:
  """A workdir that this process holds; see `locked`."""

  def __init__(self, workdir, lock):
    self._workdir, self._lock = workdir, lock

  def check(self):
    """InputError if the folder was removed or replaced since the run began."""
    try:
      there = os.stat(os.path.join(self._workdir, LOCK))
    except OSError:
      there = None
    if there is None or not os.path.samestat(there, os.fstat(self._lock.fileno())):
      raise InputError(
        f'the folder {self._workdir} was removed or replaced while the run was using it; restore '
        'it from a copy if there is one, then run the same command to resume from what is there'
      )


@contextlib.contextmanager
def locked(workdir):
  """Creates the folder and locks it for this process; yields `Held`. The lock ends with the
  process, however it ends. A block that fails before it writes anything leaves nothing behind.
  """
  made = _make_folders(workdir)
  try:
    with _lock_file(workdir) as lock:
      try:
        yield Held(workdir, lock)
      except BaseException:
        # Still locked, so no other process uses it.
        _remove_if_unused(workdir)
        raise
  finally:
    for folder in made:
      with contextlib.suppress(OSError):  # it may not be empty anymore
        os.rmdir(folder)


def _make_folders(workdir) -> list[str]:
  """Creates a folder and its parents; returns the new ones, innermost first."""
  new, folder = [], os.path.abspath(workdir)
  while not os.path.lexists(folder):
    new.append(folder)
    folder = os.path.dirname(folder)
  try:
    os.makedirs(workdir, exist_ok=True)
  except OSError as e:
    raise _not_writable(workdir, e) from e
  return new


def _lock_file(workdir):
  """The open, locked lock file of a folder. InputError if another process holds it."""
  path = os.path.join(workdir, LOCK)
  while True:
    try:
      lock = open(path, 'a')
    except OSError as e:
      raise _not_writable(workdir, e) from e
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      # Another start that was refused may have removed the file between these two lines.
      if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(lock.fileno())):
        return lock
      lock.close()
    except BlockingIOError as e:
      lock.close()
      raise InputError(
        f'another run is using {workdir}; stop it, or choose another --workdir'
      ) from e


def _remove_if_unused(workdir):
  """Removes the lock and an empty checkpoints folder if there is nothing else."""
  with contextlib.suppress(OSError):
    os.rmdir(os.path.join(workdir, 'checkpoints'))
  with contextlib.suppress(OSError):
    if os.listdir(workdir) == [LOCK]:
      os.unlink(os.path.join(workdir, LOCK))


def _not_writable(workdir, error) -> InputError:
  return InputError(f'cannot write to {workdir} ({error.strerror}); choose another --workdir')


class BucketLock:
  """Context that locks a bucket for this run: two runs would overwrite each other's checkpoints.

  Buckets have no locks that end with a process, so an object names the owner, which rewrites it
  every BEAT_SECONDS. An object that does not change for DEAD_SECONDS is from a killed run; one from
  this same workdir needs no waiting, since this process holds the workdir's own lock. Two runs that
  start within the same second may miss each other; the next beat detects it.
  """

  def __init__(self, bucket, workdir):
    self._path = epath.Path(bucket) / BUCKET_LOCK if bucket else None
    self._place = f'{socket.gethostname()}:{os.path.realpath(workdir)}'
    self._token = uuid.uuid4().hex
    self._done = threading.Event()
    self._beating = threading.Thread(target=self._beat, daemon=True)
    self._taken_by = ''

  def __enter__(self):
    if self._path is None:
      return self
    with run_files.writing(self._path):
      owner = self._read()
      if owner and owner['place'] != self._place:
        self._wait_for_sign_of_life(owner)
      self._path.parent.mkdir(parents=True, exist_ok=True)
      self._write(0)
    self._beating.start()
    return self

  def check(self):
    """InputError if another run has taken the bucket."""
    if self._taken_by:
      raise self._refusal(self._taken_by)

  def __exit__(self, *_):
    if self._path is None:
      return
    self._done.set()
    self._beating.join()  # otherwise a pending beat would write the object again after its removal
    with contextlib.suppress(OSError):
      if (self._read() or {}).get('token') == self._token:
        self._path.unlink()

  def _wait_for_sign_of_life(self, owner):
    end = time.monotonic() + DEAD_SECONDS
    cli.log(
      f'waiting      at most {DEAD_SECONDS:g} s, to see whether the run of {owner["place"]} is '
      f'still using {self._path.parent}'
    )
    while time.monotonic() < end:
      now = self._read()
      if now is None:  # the other run has ended
        return
      if now != owner:
        raise self._refusal(now['place'])
      time.sleep(BEAT_SECONDS / 10)

  def _beat(self):
    beats = 0
    while not self._done.wait(BEAT_SECONDS):
      beats += 1
      with contextlib.suppress(OSError):  # the next beat may succeed
        now = self._read()
        if now and now['token'] != self._token:
          self._taken_by = now['place']
          return
        self._write(beats)

  def _read(self) -> dict | None:
    try:
      found = json.loads(self._path.read_text())
      return {name: str(found[name]) for name in ('place', 'token', 'beats')}
    except FileNotFoundError:
      return None
    except (ValueError, TypeError, LookupError):
      return {'place': 'unknown', 'token': '', 'beats': ''}

  def _write(self, beats):
    content = {'place': self._place, 'token': self._token, 'beats': beats}
    self._path.write_text(json.dumps(content))

  def _refusal(self, place) -> InputError:
    return InputError(
      f'another run is using {self._path.parent} (of {place}); stop it, or choose another '
      'system.bucket'
    )


def about(config, source, data_fingerprint, data_facts=None):
  """A checkpoint's description of its run; see `checkpoints.Checkpoints`.

  data_facts: additional facts about the data, as in `ShardedBatches.facts`.
  """
  settings = saved_config.to_json(config)
  data = {**settings['data'], **(data_facts or {}), 'fingerprint': data_fingerprint}
  return {'method': settings['method'], 'data': data, 'model': dict(source)}


def write_config(workdir, config, about):
  """Writes config.json: every resolved key, the folder that its paths are relative to, the
  fingerprints of model and data, and the library versions.
  """
  versions = {name: importlib.metadata.version(name) for name in PACKAGES}
  content = {
    'config': saved_config.to_json(config),
    'folder': os.getcwd(),  # base of its relative paths
    'about': about,
    'versions': versions,
    'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
  }
  path = os.path.join(workdir, 'config.json')
  with run_files.writing(path):
    files.write_json(path, content, indent=2, sort_keys=True)


def write_samples(workdir, step, image, folder='samples') -> bytes:
  """Writes FOLDER/STEP.png; returns its bytes."""
  path = os.path.join(workdir, folder, f'{step:06d}.png')
  png = images.png(image)
  with run_files.writing(path):
    files.write_bytes(path, png)
  return png


def write_evaluation(workdir, step, details):
  """Writes evaluations/STEP.json: {name: rows of sums, one per prompt or image}, for
  `dsr_jax.effect`. Keeps what the step's other evaluation wrote there.
  """
  path = os.path.join(workdir, 'evaluations', f'{step:06d}.json')
  with run_files.writing(path):
    files.write_json(path, (files.read_json_or_none(path) or {}) | details)


def cut_evaluations(workdir, last_step: int | None):
  """Removes the rows of evaluations after `last_step` (all if it is None); the run will make them
  again.
  """
  folder = os.path.join(workdir, 'evaluations')
  for name in glob.glob('*.json', root_dir=folder):
    stem = name.removesuffix('.json')
    if stem.isdigit() and (last_step is None or int(stem) > last_step):
      path = os.path.join(folder, name)
      with run_files.writing(path):
        os.unlink(path)


class Mirror:
  """Copies the workdir's files to a bucket, so that a new machine finds them there. Without a
  bucket, does nothing.
  """

  def __init__(self, workdir, bucket):
    self._local = epath.Path(workdir)
    self._bucket = epath.Path(bucket) if bucket else None
    self._pushed = {}  # path: the file's status when it was pushed

  def fetch(self):
    """Downloads the files of an earlier start, unless this folder has its own."""
    if self._bucket is None or (self._local / metrics_lib.FILE).exists():
      return
    with run_files.writing(self._local):
      for path in _mirrored(self._bucket):
        target = self._local / path
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = (self._bucket / path).copy(f'{target}.new', overwrite=True)
        aside.replace(target)

  def push(self):
    """Copies files that are new or have changed since the last time."""
    if self._bucket is None:
      return
    with run_files.writing(self._bucket):
      for path in _mirrored(self._local):
        status = os.stat(self._local / path)
        now = status.st_size, status.st_mtime_ns
        if self._pushed.get(path) != now:
          (self._bucket / path).parent.mkdir(parents=True, exist_ok=True)
          (self._local / path).copy(self._bucket / path, overwrite=True)
          self._pushed[path] = now


def _mirrored(folder) -> list[str]:
  """The files of a workdir, or of its bucket, to copy: relative paths."""
  found = []
  for name in MIRRORED:
    inner = sorted((folder / name).glob('*')) if (folder / name).is_dir() else []
    found += [f'{name}/{path.name}' for path in inner if not path.name.endswith('.new')]
    if (folder / name).is_file():
      found.append(name)
  return found
