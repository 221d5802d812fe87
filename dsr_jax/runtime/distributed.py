"""Several processes as one run, by JAX's coordination service: they join, agree, stop at the same
step, and none is left alone.

`jax.distributed` finds the processes of a cluster, beats for each and ends all when one is gone;
its preemption point makes SIGTERM on one a stop of all after the same step. Small values go through
its store, on the hosts' network, so they need no devices and can name who differs. What we add: the
input is checked before JAX, which answers it by an abort, gets to see it; processes that would not
do the same are refused; and one that meets an error tells the others why.
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
from jax._src import clusters  # no public name says what was detected
from jax._src import distributed as service  # nor reads and writes the store; Orbax does the same
from jax.experimental import multihost_utils

from dsr_jax import saved_config
from dsr_jax.errors import InputError, first_line
from dsr_jax.runtime import coordination_log, workdir

PORT = 8476
SILENT_SECONDS = 40
DIED = 3  # exit status of a process that stops because another did
_FOR_EVER = 10**9  # milliseconds, 11 days
_FAILED = 'dsr_jax/failed'  # in the store: why the run ends
# Variables of the clusters that JAX detects; of two or more processes, that is.
_COUNTS = ('JAX_NUM_PROCESSES', 'SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE')
_NUMBERS = (
  *('JAX_PROCESS_ID', 'JAX_COORDINATOR_PORT', 'SLURM_PROCID', 'SLURM_LOCALID', 'SLURM_JOB_ID'),
  *('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_LOCAL_RANK', 'TPU_WORKER_ID'),
)
# Beyond these a run computes alike.
VERSIONS = (*workdir.PACKAGES, 'transformers', 'tokenizers', 'pillow')
JAX_SETTINGS = (
  *('jax_platforms', 'jax_enable_x64', 'jax_default_matmul_precision', 'jax_default_prng_impl'),
  *('jax_threefry_partitionable', 'jax_numpy_dtype_promotion', 'jax_debug_nans'),
)


class SharedError(InputError):
  """Bad input that every process finds and says."""


# Who takes part.


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
  """The cluster that is named (flags, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES,
  JAX_PROCESS_ID), or that JAX detects (Slurm, Open MPI, TPU slices).

  None where this process is alone. Errors: InputError where it is named by halves or out of range.
  """
  environ = os.environ
  for name in (*_COUNTS, *_NUMBERS):
    value = environ.get(name, '1')
    if not _is_number(value) or int(value) < (name in _COUNTS):
      raise InputError(
        f'found {name}={value!r} in the environment; expected a number of processes, or which one '
        'this is; unset or mend it'
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
    return None  # else JAX would take one device only of a Slurm task that is alone
  return _detected()


def _is_number(text):
  return text.isascii() and text.isdigit() and len(text) < 12


def _detected():
  """The cluster that JAX finds in the environment."""
  try:
    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    coordinator, processes, process, devices = detect(None, None, None, None, None, 5)
  except Exception as e:
    raise InputError(
      f'found a cluster in the environment that JAX cannot read ({type(e).__name__}: {e}); '
      'expected the variables of one (SLURM_*, OMPI_*, TPU_*); mend them, or name it by '
      '--coordinator, --processes and --process'
    ) from e
  cluster = _checked(coordinator, processes, process)
  return cluster and dataclasses.replace(cluster, devices=devices and tuple(devices))


def _checked(coordinator, processes, process):
  """The cluster; None where it is one process. Errors: InputError where no one could join it."""
  if not coordinator or None in (processes, process) or not 0 <= process < processes:
    raise InputError(
      f'found --coordinator={coordinator}, --processes={processes} and --process={process}; '
      'expected HOST:PORT, a number of processes, and which one this is, from 0; give all three'
    )
  if ':' not in coordinator:
    coordinator = f'{coordinator}:{PORT}'
  host, _, port = coordinator.rpartition(':')
  if not host or not _is_number(port) or not 0 < int(port) < 2**16:
    raise InputError(
      f'found the coordinator {coordinator!r}; expected HOST:PORT of process 0, a port from 1 to '
      '65535; mend --coordinator'
    )
  if processes == 1:
    return None
  try:
    socket.getaddrinfo(host.strip('[]'), int(port))
  except (OSError, UnicodeError) as e:
    raise InputError(
      f'found no host {host!r} ({e}); expected HOST:PORT of process 0; mend --coordinator'
    ) from e
  return Cluster(coordinator, processes, process)


# Together.


@contextlib.contextmanager
def together(cluster: Cluster | None, wait_seconds: float, silent_seconds: int = SILENT_SECONDS):
  """Joins the cluster for as long as it is entered; yields a `Team`. None: a team of one.

  One that meets an error tells the others, who end with status 3. Where JAX finds that one never
  comes, within `wait_seconds`, or is gone or silent for `silent_seconds`, it aborts the others;
  `coordination_log` says why.
  """
  if not 1 <= wait_seconds <= 86400:
    raise InputError(
      f'found --wait_seconds={wait_seconds:g}; expected 1 to 86400 seconds; change it'
    )
  if cluster is None:
    yield Team()
    return
  team = _join(cluster, int(wait_seconds), silent_seconds)
  try:
    yield team
    team.gather(None)  # everybody is here: who comes to the end first leaves no one behind
  except SharedError:  # nobody has to be told
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
    f'waiting      for all {cluster.processes} processes at {cluster.coordinator} ({wait_seconds} '
    's at most)',
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
  """InputError if process 0 cannot listen on its port: JAX would end by a segmentation fault."""
  ipv6 = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if ipv6 else socket.AF_INET
  try:
    socket.create_server(('', port), family=family, dualstack_ipv6=ipv6).close()
  except OSError as e:
    raise InputError(
      f'found that process 0 cannot listen on port {port} ({e.strerror}); expected a free port; '
      'stop what is at work there, or name another port in --coordinator of every process'
    ) from e


def _read_log(*about):
  """From here on what C++ writes to stderr goes through `coordination_log`; Python's is direct."""
  direct = os.dup(2)
  reader = subprocess.Popen(
    [sys.executable, '-I', '-S', coordination_log.__file__, *about],
    stdin=subprocess.PIPE,
    stderr=direct,
    start_new_session=True,  # Ctrl-C is not for it
  )
  sys.stderr.flush()
  sys.stderr = open(direct, 'w', buffering=1, encoding='utf-8', errors='backslashreplace')
  assert reader.stdin is not None
  os.dup2(reader.stdin.fileno(), 2)
  reader.stdin.close()


class Team:
  """One process alone."""

  processes, process = 1, 0

  @property
  def lead(self) -> bool:
    """Whether this process writes files and speaks."""
    return self.process == 0

  def gather(self, value) -> list:
    """The value of every process, JSON values, in order. All must ask, equally often."""
    return [value]

  def any(self, flag: bool) -> bool:
    """Whether any process says so. All must ask, equally often."""
    return any(self.gather(bool(flag)))

  def shared(self, value):
    """Process 0's value, a JSON value, in every process. All must ask, equally often."""
    return self.gather(value)[0]

  def stops(self, step: int, requested: bool) -> bool:
    """Whether the run stops after this step: it was requested here or, of several processes, one
    got SIGTERM. All must ask after every step.
    """
    return requested

  def agree(self, **facts):
    """SharedError, in every process, that names each fact which is not the same in all of them."""
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
      f'found processes that do not agree ({"; ".join(different)}); expected the same command, '
      'data and versions in all; mend those that differ, and start all again'
    )


def _by_process(values):
  """[40, 50, 40] -> '40 in process 0, 2; 50 in process 1'."""
  groups: dict[str, list[str]] = {}
  for process, value in enumerate(values):
    groups.setdefault(f'{value!r}'[:200], []).append(f'{process}')
  return ', '.join(f'{value} in process {" ".join(who)}' for value, who in groups.items())


class _Joined(Team):
  """One of several."""

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
          f'found --processes={self.processes} in process {self.process} and --processes={count} '
          f'in process {other}; expected the same number in all; mend --processes'
        )
      values.append(said)
    return values

  def stops(self, step, requested):
    stop = multihost_utils.reached_preemption_sync_point(step)
    if stop:
      _say(f'stopping     on SIGTERM of one of {self.processes} processes, after this step')
    return stop

  def close(self):
    """Leaves when all are done."""
    self._ending = True
    service.shutdown()
    self._listener.join(10)

  # The end of one is the end of all.

  def _listen(self):
    """Ends this process when another says that it met an error.

    Only the end of the process ends the wait for devices that will never answer, and Python's main
    thread is in it: so this ends it from a thread, as JAX does.
    """
    try:
      why = self._store.blocking_key_value_get(_FAILED, _FOR_EVER)
    except Exception:
      return  # the run has ended, or JAX ends it
    if self._ending:
      return
    self._ending = True
    _say(
      f'error: found that {why}; expected all of them at work to the end; start all again: the run '
      'goes on from its last checkpoint'
    )
    self._all_know()
    os._exit(DIED)

  def leave(self, error):
    """Says what this process met, tells the others, and ends it: the usual end would wait for
    them.
    """
    if broken := _broken_connection(error):
      time.sleep(1)  # the one that met the error, or JAX, can say more
      error = InputError(
        f'found that a connection to another process broke ({first_line(broken)}); expected all of '
        'them at work to the end; start all again: the run goes on from its last checkpoint'
      )
      status = DIED
    else:
      status = 2 if isinstance(error, InputError) else 1
    if self._ending:
      time.sleep(10)  # the listener is about to end this process
    self._ending = True
    with contextlib.suppress(Exception):
      why = f'process {self.process} of {self.processes} stopped: {first_line(error)}'
      self._store.key_value_set(_FAILED, why)
    if isinstance(error, InputError):
      _say(f'error: {error}')
    else:
      _say(''.join(traceback.format_exception(error)).rstrip())
    self._all_know(1 if broken else 5)  # one of them has gone
    os._exit(status)

  def _all_know(self, seconds=5):
    """Waits until all have heard of the end, so long at most; the store goes with process 0."""
    with contextlib.suppress(Exception):
      self._store.wait_at_barrier('dsr_jax/told', 1000 * seconds)
    if self.lead:
      time.sleep(0.5)


def _broken_connection(error: BaseException | None) -> BaseException | None:
  """The error of a connection to another process in an error or behind it: who met it may have made
  a sentence of it about a file.
  """
  while error is not None:
    if ('Gloo' in f'{error}' or 'NCCL' in f'{error}') and not isinstance(error, InputError):
      return error
    error = error.__cause__ or error.__context__
  return None


def _say(text):
  print(text, file=sys.stderr, flush=True)


# What all must have in common.


def facts(config, folder) -> dict:
  """What must be the same in all processes before any work: every key, where checkpoints go, the
  versions of the libraries, JAX's settings, and the files of the package.

  Needs no device: of processes that see other devices, JAX waits for what never comes.
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
  """A digest of every file of the package, lists of prompts and the embedded model among them."""
  root = pathlib.Path(saved_config.__file__).parent
  digest = hashlib.sha256()
  for path in sorted(root.rglob('*')):
    if path.is_file() and '__pycache__' not in path.parts:
      digest.update(f'{path.relative_to(root)}\n'.encode() + path.read_bytes())
  return digest.hexdigest()[:12]
