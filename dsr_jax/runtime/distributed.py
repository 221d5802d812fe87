"""Runs several processes as one run through JAX's coordination service: they join, agree, and stop
at the same step, and an error in one ends all.

`jax.distributed` finds the processes of a cluster, sends heartbeats, and ends all processes when
one dies; through its preemption point, SIGTERM on one process stops all after the same step. Small
values go through its store over the hosts' network, so they need no devices, and errors can name
the process that differs. This module adds: it checks the input before JAX, which aborts on errors;
it refuses processes with different settings; and a process with an error tells the others why.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
import traceback

import jax
from jax._src import clusters  # no public API returns the detected cluster
from jax._src import distributed as service  # nor reads and writes the store; Orbax does the same
from jax.experimental import multihost_utils

from dsr_jax import saved_config
from dsr_jax.errors import InputError, first_line
from dsr_jax.runtime import coordination_log, workdir

PORT = 8476
SILENT_SECONDS = 40
DIED = 3  # exit status of a process that stops because another one failed
_FOR_EVER = 10**9  # milliseconds, 11 days
_FAILED = 'dsr_jax/failed'  # in the store: why the run ends
# Variables of the clusters that JAX detects, which have at least two processes.
_COUNTS = ('JAX_NUM_PROCESSES', 'SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE')
_NUMBERS = (
  *('JAX_PROCESS_ID', 'JAX_COORDINATOR_PORT', 'SLURM_PROCID', 'SLURM_LOCALID', 'SLURM_JOB_ID'),
  *('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_LOCAL_RANK', 'TPU_WORKER_ID'),
)
# Other differences do not change what a run computes.
VERSIONS = (*workdir.PACKAGES, 'transformers', 'tokenizers', 'pillow')
JAX_SETTINGS = (
  *('jax_platforms', 'jax_enable_x64', 'jax_default_matmul_precision', 'jax_default_prng_impl'),
  *('jax_threefry_partitionable', 'jax_numpy_dtype_promotion', 'jax_debug_nans'),
)


class SharedError(InputError):
  """Bad input that every process detects and reports."""


# The cluster.


@dataclasses.dataclass(frozen=True)
class Cluster:
  """Where process 0 is ('HOST:PORT'), how many processes there are, which one this is, and which
  of its host's devices are its own (None: all).
  """

  coordinator: str
  processes: int
  process: int
  devices: tuple[int, ...] | None = None


def find(coordinator=None, processes=None, process=None) -> Cluster | None:
  """The given cluster (from flags, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID),
  or the one that JAX detects (Slurm, Open MPI, TPU slices).

  None if this process is alone. InputError if the settings are incomplete or out of range.
  """
  environ = os.environ
  for name in (*_COUNTS, *_NUMBERS):
    value = environ.get(name, '1')
    if not _is_number(value) or int(value) < (name in _COUNTS):
      raise InputError(
        f'{name} is {value!r} in the environment; set it to a whole number (of processes, or the '
        'index of this one), or unset it'
      )
  named = (coordinator, processes, process)
  if named == (None, None, None):
    coordinator = environ.get('JAX_COORDINATOR_ADDRESS')
    count, index = environ.get('JAX_NUM_PROCESSES'), environ.get('JAX_PROCESS_ID')
    named = (coordinator, count and int(count), index and int(index))
  if named != (None, None, None):
    return _checked(*named)
  hosts = environ.get('TPU_WORKER_HOSTNAMES', '').split(',')
  tasks = environ.get('SLURM_NTASKS', '1') if 'SLURM_STEP_NODELIST' in environ else '1'
  if max(len(hosts), int(tasks), int(environ.get('OMPI_COMM_WORLD_SIZE', '1'))) == 1:
    return None  # otherwise JAX would use only one device of a single Slurm task
  return _detected()


def _is_number(text):
  return text.isascii() and text.isdigit() and len(text) < 12


def _detected():
  """The cluster that JAX detects from the environment."""
  try:
    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    coordinator, processes, process, devices = detect(None, None, None, None, None, 5)
  except Exception as e:
    raise InputError(
      f'JAX cannot read the cluster in the environment ({type(e).__name__}: {e}); fix its '
      'variables (SLURM_*, OMPI_*, TPU_*), or set --coordinator, --processes and --process'
    ) from e
  cluster = _checked(coordinator, processes, process)
  return cluster and dataclasses.replace(cluster, devices=devices and tuple(devices))


def _checked(coordinator, processes, process):
  """The cluster; None for a single process. InputError for values that make joining impossible."""
  if not coordinator or None in (processes, process) or not 0 <= process < processes:
    raise InputError(
      f'--coordinator={coordinator}, --processes={processes} and --process={process} do not name a '
      'cluster; set all three, to HOST:PORT, the number of processes, and the index of this one, '
      'from 0'
    )
  if ':' not in coordinator:
    coordinator = f'{coordinator}:{PORT}'
  host, _, port = coordinator.rpartition(':')
  if not host or not _is_number(port) or not 0 < int(port) < 2**16:
    raise InputError(
      f'the coordinator is {coordinator!r}; set --coordinator to HOST:PORT of process 0, with a '
      'port from 1 to 65535'
    )
  if processes == 1:
    return None
  try:
    socket.getaddrinfo(host.strip('[]'), int(port))
  except (OSError, UnicodeError) as e:
    raise InputError(
      f'cannot find the host {host!r} ({e}); set --coordinator to HOST:PORT of process 0'
    ) from e
  return Cluster(coordinator, processes, process)


# Together.


@contextlib.contextmanager
def together(cluster: Cluster | None, wait_seconds: float, silent_seconds: int = SILENT_SECONDS):
  """Context manager that joins the cluster and yields a `Team`. cluster None: a team of one.

  A process with an error tells the others, which exit with status 3. If one does not start within
  `wait_seconds`, or dies, or is silent for `silent_seconds`, JAX aborts the others, and
  `coordination_log` prints why.
  """
  if not 1 <= wait_seconds <= 86400:
    raise InputError(f'--wait_seconds is {wait_seconds:g}; set it to a number from 1 to 86400')
  if cluster is None:
    yield Team()
    return
  team = _join(cluster, int(wait_seconds), silent_seconds)
  try:
    yield team
    team.gather(None)  # wait for all, so that the first to finish does not leave early
  except SharedError:  # all processes already know
    team.close()
    raise
  except BaseException as e:
    team.leave(e)
  team.close()


def _join(cluster, wait_seconds, silent_seconds):
  port = int(cluster.coordinator.rpartition(':')[2])
  if cluster.process == 0:
    _check_free(port)
  limits = (f'{wait_seconds}', f'{silent_seconds}')
  _read_log(f'{cluster.processes}', cluster.coordinator, *limits)
  print(
    f'waiting      for all {cluster.processes} processes at {cluster.coordinator} (at most '
    f'{wait_seconds} s)',
    file=sys.stderr,
    flush=True,
  )
  jax.config.update('jax_enable_preemption_service', True)
  jax.distributed.initialize(
    cluster.coordinator,
    cluster.processes,
    cluster.process,
    local_device_ids=cluster.devices,
    cluster_detection_method='deactivate',
    initialization_timeout=wait_seconds,
    heartbeat_timeout_seconds=silent_seconds,
  )
  return _Joined(cluster)


def _check_free(port):
  """InputError if process 0 cannot listen on its port, where JAX would crash with a segfault."""
  ipv6 = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if ipv6 else socket.AF_INET
  try:
    socket.create_server(('', port), family=family, dualstack_ipv6=ipv6).close()
  except OSError as e:
    raise InputError(
      f'process 0 cannot listen on port {port} ({e.strerror}); stop the program that uses it, or '
      'name a free port in --coordinator of every process'
    ) from e


def _read_log(*about):
  """Redirects C++ output on stderr through `coordination_log`; Python's output stays direct."""
  direct = os.dup(2)
  reader = subprocess.Popen(
    [sys.executable, '-I', '-S', coordination_log.__file__, *about],
    stdin=subprocess.PIPE,
    stderr=direct,
    start_new_session=True,  # so that Ctrl-C does not reach it
  )
  sys.stderr.flush()
  sys.stderr = open(direct, 'w', buffering=1, encoding='utf-8', errors='backslashreplace')
  assert reader.stdin is not None
  os.dup2(reader.stdin.fileno(), 2)
  reader.stdin.close()


class Team:
  """A single process."""

  processes, process = 1, 0

  @property
  def lead(self) -> bool:
    """Whether this process writes files and prints."""
    return self.process == 0

  def gather(self, value) -> list:
    """The JSON value of every process, in order. All must call it the same number of times."""
    return [value]

  def any(self, flag: bool) -> bool:
    """Whether the flag is True in any process. All must call it the same number of times."""
    return any(self.gather(bool(flag)))

  def shared(self, value):
    """Process 0's JSON value, in every process. All must call it the same number of times."""
    return self.gather(value)[0]

  def stops(self, step: int, requested: bool) -> bool:
    """Whether the run stops after this step: by a request here or, with several processes, by a
    SIGTERM to any of them. All must call it after every step.
    """
    return requested

  def agree(self, **facts):
    """SharedError in every process, naming each fact that differs between them."""
    found = self.gather(saved_config.flat(facts))
    names = sorted({name for one in found for name in one})
    different = []
    for name in names:
      values = [one.get(name, '(absent)') for one in found]
      if any(value != values[0] for value in values):
        different.append(f'{name}: {_by_process(values)}')
    if not different:
      return
    raise SharedError(
      f'the processes do not agree ({"; ".join(different)}); all of them need the same command, '
      'data and versions: fix those that differ and start all of them again'
    )


def _by_process(values):
  """[40, 50, 40] -> '40 in process 0, 2; 50 in process 1'."""
  groups: dict[str, list[str]] = {}
  for process, value in enumerate(values):
    groups.setdefault(f'{value!r}'[:200], []).append(f'{process}')
  return ', '.join(f'{value} in process {" ".join(who)}' for value, who in groups.items())


class _Joined(Team):
  """One process of several."""

  def __init__(self, cluster):
    self.processes, self.process = cluster.processes, cluster.process
    self._ending, self._rounds = False, 0
    self._store = service.global_state.client
    self._listener = threading.Thread(target=self._listen, daemon=True)
    self._listener.start()

  def gather(self, value):
    self._rounds += 1
    name = f'dsr_jax/{self._rounds}'
    self._store.key_value_set(f'{name}/{self.process}', json.dumps([self.processes, value]))
    values = []
    for other in range(self.processes):
      count, said = json.loads(self._store.blocking_key_value_get(f'{name}/{other}', _FOR_EVER))
      if count != self.processes:
        raise SharedError(
          f'--processes={self.processes} in process {self.process} and --processes={count} in '
          f'process {other} differ; set the same number in all of them'
        )
      values.append(said)
    return values

  def stops(self, step, requested):
    stop = multihost_utils.reached_preemption_sync_point(step)
    if stop:
      _say(f'stopping     on SIGTERM of one of {self.processes} processes, after this step')
    return stop

  def close(self):
    """Leaves the cluster when all are done."""
    self._ending = True
    service.shutdown()
    self._listener.join(10)

  # If one process fails, all end.

  def _listen(self):
    """Ends this process when another one reports an error.

    The main thread may be waiting for devices that will never answer, and only the end of the
    process ends that wait, so this thread ends it, as JAX does.
    """
    try:
      why = self._store.blocking_key_value_get(_FAILED, _FOR_EVER)
    except Exception:
      return  # the run has ended, or JAX ends it
    if self._ending:
      return
    self._ending = True
    _say(
      f'error: {why}; all processes must run to the end: start all of them again to resume from '
      'the last checkpoint'
    )
    self._all_know()
    os._exit(DIED)

  def leave(self, error):
    """Prints this process's error, tells the others, and ends the process; a normal exit would wait
    for them.
    """
    if broken := _broken_connection(error):
      time.sleep(1)  # the process with the error, or JAX, can say more
      error = InputError(
        f'a connection to another process broke ({first_line(broken)}); all processes must run to '
        'the end: start all of them again to resume from the last checkpoint'
      )
      status = DIED
    else:
      status = 2 if isinstance(error, InputError) else 1
    if self._ending:
      time.sleep(10)  # the listener will end this process
    self._ending = True
    with contextlib.suppress(Exception):
      why = f'process {self.process} of {self.processes} stopped: {first_line(error)}'
      self._store.key_value_set(_FAILED, why)
    if isinstance(error, InputError):
      _say(f'error: {error}')
    else:
      _say(''.join(traceback.format_exception(error)).rstrip())
    self._all_know(1 if broken else 5)  # if broken, one of them is already gone
    os._exit(status)

  def _all_know(self, seconds=5):
    """Waits at most `seconds` until all know of the end; the store ends with process 0."""
    with contextlib.suppress(Exception):
      self._store.wait_at_barrier('dsr_jax/told', 1000 * seconds)
    if self.lead:
      time.sleep(0.5)


def _broken_connection(error: BaseException | None) -> BaseException | None:
  """The connection error to another process in an error or its causes: other code may have wrapped
  it in a sentence about a file.
  """
  while error is not None:
    if ('Gloo' in f'{error}' or 'NCCL' in f'{error}') and not isinstance(error, InputError):
      return error
    error = error.__cause__ or error.__context__
  return None


def _say(text):
  print(text, file=sys.stderr, flush=True)


# Facts that must agree.


def facts(config, folder) -> dict:
  """Facts that must be the same in all processes before any work: every key, the location of
  checkpoints, library versions, JAX's settings, and the package's files.

  Uses no device: if processes see different devices, JAX would wait forever.
  """
  return {
    'config': saved_config.to_json(config),
    'checkpoints in': config.system.bucket or os.path.abspath(folder),
    'version': {name: importlib.metadata.version(name) for name in VERSIONS},
    'JAX': {name: jax.config.values[name] for name in JAX_SETTINGS},
    'has an accelerator': bool(workdir.accelerators()),
    'source of dsr_jax (sha256)': _source(),
  }


def _source() -> str:
  """A digest of every file of the package, including prompt lists and the embedded model."""
  root = pathlib.Path(saved_config.__file__).parent
  digest = hashlib.sha256()
  for path in sorted(root.rglob('*')):
    if path.is_file() and '__pycache__' not in path.parts:
      digest.update(f'{path.relative_to(root)}\n'.encode() + path.read_bytes())
  return digest.hexdigest()[:12]
