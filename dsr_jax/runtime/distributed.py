"""Several processes as one run: they wait for one another, agree when to stop, and none is left
alone.

Process 0 listens on the port after the coordinator's; every other process holds one connection to
it. Lines of JSON go over it: who has come, a value that process 0 shares, votes, and a beat every
few seconds. A process that dies closes its connection, one that hangs falls silent; either way
process 0 tells all others why and everybody stops. The devices' own traffic is JAX's affair.
"""

import contextlib
import dataclasses
import json
import os
import queue
import socket
import sys
import threading
import time

from dsr_jax.errors import InputError

PORT = 8476
BEAT_SECONDS = 3.0
SILENT_SECONDS = 40.0
DIED = 3  # exit status of a process that stops because another did


@dataclasses.dataclass(frozen=True)
class Cluster:
  """Where process 0 is ('HOST:PORT', the coordinator's), how many processes there are, and which
  one this is.
  """

  coordinator: str
  processes: int
  process: int


def find(
  coordinator: str = '', processes: int = 0, process: int = -1, environ=os.environ
) -> Cluster | None:
  """The cluster that is named (flags, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES,
  JAX_PROCESS_ID) or detected (TPU hosts, Slurm).

  None where this process is alone. Errors: InputError where it is named by halves.
  """
  if not (coordinator or processes or process >= 0):
    coordinator = environ.get('JAX_COORDINATOR_ADDRESS', '')
    processes, process = (
      int(environ.get('JAX_NUM_PROCESSES', 0)),
      int(environ.get('JAX_PROCESS_ID', -1)),
    )
  if coordinator or processes or process >= 0:
    if not (coordinator and processes > 0 and 0 <= process < processes):
      raise InputError(
        f'found --coordinator={coordinator!r}, --processes={processes} and --process={process}; '
        'expected HOST:PORT, a '
        'number of processes, and which one this is, from 0; give all three'
      )
    return _cluster(coordinator, processes, process)
  hosts = [h for h in environ.get('TPU_WORKER_HOSTNAMES', '').split(',') if h]
  if len(hosts) > 1:
    return _cluster(hosts[0], len(hosts), int(environ['TPU_WORKER_ID']))
  if int(environ.get('SLURM_NTASKS', 1)) > 1 and 'SLURM_STEP_NODELIST' in environ:
    # 'node[003-007,12],other' begins with node003
    name, _, rest = environ['SLURM_STEP_NODELIST'].split(',')[0].partition('[')
    first = name + rest.rstrip(']').split('-')[0]
    return _cluster(first, int(environ['SLURM_NTASKS']), int(environ['SLURM_PROCID']))
  return None


def _cluster(address, processes, process):
  if ':' not in address:
    address = f'{address}:{PORT}'
  if not address.rpartition(':')[2].isdigit():
    raise InputError(
      f'found the coordinator {address!r}; expected HOST:PORT, of process 0; mend --coordinator'
    )
  return Cluster(address, processes, process) if processes > 1 else None


@contextlib.contextmanager
def together(cluster: Cluster | None, wait_seconds: float):
  """Joins the cluster for as long as it is entered; yields a `Team`. None: a team of one.

  Errors: InputError if not all processes come within `wait_seconds`.
  """
  if cluster is None:
    yield Team()
    return
  team = _Joined(cluster, wait_seconds)
  import jax  # noqa: PLC0415  (one process needs no JAX to find that it is alone)

  jax.distributed.initialize(
    cluster.coordinator,
    cluster.processes,
    cluster.process,
    initialization_timeout=int(wait_seconds) + 60,
  )
  try:
    yield team
  except BaseException as e:
    team.failed(f'{e}' or type(e).__name__)
    raise
  team.any(False)  # everybody is here
  team.close()
  jax.distributed.shutdown()


class Team:
  """One process alone."""

  processes, process = 1, 0

  @property
  def lead(self) -> bool:
    """Whether this process writes files and speaks."""
    return self.process == 0

  def any(self, flag: bool) -> bool:
    """Whether any process says so. All must ask, equally often."""
    return flag

  def shared(self, value):
    """Process 0's value, a JSON value, in every process. All must ask, equally often."""
    return value


class _Joined(Team):
  """See the module."""

  def __init__(self, cluster, wait_seconds):
    self.processes, self.process = cluster.processes, cluster.process
    self._peers, self._inbox, self._ending = {}, queue.Queue(), False
    self._writing, self._heard = threading.Lock(), {}
    host, _, port = cluster.coordinator.rpartition(':')
    address, deadline = (host, int(port) + 1), time.monotonic() + wait_seconds
    if self.process == 0:
      self._gather(address[1], deadline, wait_seconds)
    else:
      self._knock(address, deadline, wait_seconds)
    for peer in self._peers:
      self._heard[peer] = time.monotonic()
      threading.Thread(target=self._listen, args=(peer,), daemon=True).start()
    threading.Thread(target=self._beat, daemon=True).start()

  # Coming together.

  def _gather(self, port, deadline, wait_seconds):
    """Process 0: waits for all others and tells those who are here how many are missing."""
    with socket.create_server(('', port)) as server:
      self._tell_missing(wait_seconds)
      while len(self._peers) < self.processes - 1:
        server.settimeout(max(deadline - time.monotonic(), 0.01))
        try:
          connection, _ = server.accept()
          connection.settimeout(10)
          lines = connection.makefile('rw', encoding='utf-8', newline='\n')
          hello = json.loads(lines.readline() or '{}')
        except TimeoutError:
          if time.monotonic() >= deadline:
            self._give_up(wait_seconds)
          continue
        except (OSError, ValueError):
          continue
        peer = hello.get('process')
        if (
          hello.get('of') != self.processes
          or peer in self._peers
          or not 0 < (peer or 0) < self.processes
        ):
          self._send_to(
            lines,
            {
              'stop': f'found process {peer} of {hello.get("of")} where process 0 has '
              f'{self.processes}, each once; '
              'expected the same numbers everywhere; mend --processes and --process'
            },
          )
          continue
        connection.settimeout(None)
        self._peers[peer] = lines
        self._tell_missing(wait_seconds)
    self._broadcast({'go': True})

  def _tell_missing(self, wait_seconds):
    missing = self.processes - 1 - len(self._peers)
    if missing:
      text = (
        f'waiting      for {missing} of {self.processes} processes ({wait_seconds:g} s at most)'
      )
      print(text, file=sys.stderr, flush=True)
      self._broadcast({'say': text})

  def _give_up(self, wait_seconds):
    missing = sorted(set(range(1, self.processes)) - set(self._peers))
    text = (
      f'found {len(self._peers) + 1} of {self.processes} processes after {wait_seconds:g} s; '
      'expected process '
      f'{", ".join(map(str, missing))} too; start them, or raise --wait_seconds'
    )
    self._broadcast({'stop': text})
    raise InputError(text)

  def _knock(self, address, deadline, wait_seconds):
    """Another process: finds process 0 and waits until all are there."""
    where, told = f'{address[0]}:{address[1]}', False
    while True:
      try:
        connection = socket.create_connection(address, timeout=5)
        break
      except OSError as e:
        if not told:
          print(
            f'waiting      for process 0 of {self.processes} at {where} ({wait_seconds:g} s at '
            'most)',
            file=sys.stderr,
            flush=True,
          )
          told = True
        if time.monotonic() >= deadline:
          raise InputError(
            f'found no process 0 at {where} after {wait_seconds:g} s ({e}); expected it there; '
            'start it, or mend '
            '--coordinator'
          ) from e
        time.sleep(0.3)
    connection.settimeout(max(deadline - time.monotonic(), 0) + 10)
    lines = connection.makefile('rw', encoding='utf-8', newline='\n')
    self._send_to(lines, {'process': self.process, 'of': self.processes})
    while True:
      try:
        message = json.loads(
          lines.readline()
          or '{"stop": "found process 0 gone; expected it at work; start all processes again"}'
        )
      except (OSError, ValueError):
        message = {
          'stop': f'found process 0 at {where} silent for {wait_seconds:g} s; expected it at work; '
          'start all processes again'
        }
      if 'stop' in message:
        raise InputError(message['stop'])
      if 'go' in message:
        break
      print(message['say'], file=sys.stderr, flush=True)
    connection.settimeout(None)
    self._peers[0] = lines

  # At work.

  def any(self, flag):
    if self.process:
      self._send_to(self._peers[0], {'vote': bool(flag)})
      return self._inbox.get()
    votes = [self._inbox.get() for _ in self._peers]
    verdict = bool(flag) or any(votes)
    self._broadcast({'verdict': verdict})
    return verdict

  def shared(self, value):
    if self.process:
      return self._inbox.get()
    self._broadcast({'verdict': value})
    return value

  def failed(self, reason):
    """Tells the others that this process stops, and why."""
    self._ending = True
    self._broadcast(
      {
        'dead': f'process {self.process} of {self.processes} stopped: '
        f'{reason.splitlines()[0][:300]}'
      }
    )

  def close(self):
    """The end of a whole run."""
    self._ending = True
    self._broadcast({'bye': True})

  def _listen(self, peer):
    lost = f'process {peer} of {self.processes} died'
    while True:
      try:
        line = self._peers[peer].readline()
        message = json.loads(line) if line else {'dead': lost}
      except (OSError, ValueError):
        message = {'dead': lost}
      self._heard[peer] = time.monotonic()
      if 'bye' in message:
        del self._heard[peer]
        return
      if 'dead' in message:
        return self._end(message['dead'])
      if 'vote' in message or 'verdict' in message:
        self._inbox.put(message.get('vote', message.get('verdict')))

  def _beat(self):
    while not self._ending:
      time.sleep(BEAT_SECONDS)
      self._broadcast({'beat': True})
      for peer, when in list(self._heard.items()):
        if time.monotonic() - when > SILENT_SECONDS and not self._ending:
          self._end(f'process {peer} of {self.processes} has been silent for {SILENT_SECONDS:g} s')

  def _end(self, what):
    """Another process is gone: the devices wait for it for ever, so this one ends at once."""
    if self._ending:
      return
    self._ending = True
    self._broadcast({'dead': what})
    print(
      f'error: found that {what}; expected all of them at work to the end; start all again: the '
      'run goes on from its last '
      'checkpoint',
      file=sys.stderr,
      flush=True,
    )
    os._exit(DIED)

  def _broadcast(self, message):
    for lines in list(self._peers.values()):
      self._send_to(lines, message)

  def _send_to(self, lines, message):
    with (
      self._writing,
      contextlib.suppress(OSError, ValueError),
    ):  # whoever is gone is noticed by who listens to it
      lines.write(json.dumps(message) + '\n')
      lines.flush()
