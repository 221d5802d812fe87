"""Real processes that should be one run but differ, or lose each other: what they print, and when.

  python -m benchmarks.kills_processes [--only=NAME,NAME ...] [--results=FILE]

There are three kinds of cases. Processes that differ (in a key, in the data at the same path, in a
source, a library, a setting of JAX) run `dsr_jax.main` with configs/scenes_tiny.py: within 10 s
after the last one joins, all must refuse with an error that names the difference. If one of several
processes is killed, stopped or never started, or if others use their port, they run
tests/support/fake_run.py, which is the real loop around a step of a millisecond.

Each case has its own right answer; the table goes to stdout, and the exit status is 1 if an answer
is wrong. With --results, answers are kept in a file case by case, and a second start runs only the
cases that are not in it.
"""

from collections.abc import Callable
from concurrent import futures
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

from absl import flags
import numpy as np
from PIL import Image
from safetensors import numpy as safetensors

from dsr_jax import cli
from dsr_jax.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIG = ROOT / 'configs' / 'scenes_tiny.py'
FAKE_RUN = ROOT / 'tests' / 'support' / 'fake_run.py'
REFUSED_SECONDS = 10  # after all have joined
SILENT_SECONDS = 40  # `distributed.SILENT_SECONDS`, plus the time to notice
LIMIT = 300  # of any wait: a case that takes longer hangs
STRAY = (
  b'GET / HTTP/1.1\r\nHost: localhost\r\n\r\n',
  b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03',  # TLS
  b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n' + b'\xff' * 64,  # HTTP/2, then no frame of it
  b'SSH-2.0-OpenSSH_9.6\r\n',
  b'\x00' * 4096,
  random.Random(0).randbytes(1 << 20),
  b'',
)


# One process.


class Member:
  """A started process, and the lines of its stderr with their times."""

  def __init__(self, command, cwd=ROOT, **environ):
    inherited = {k: v for k, v in os.environ.items() if k not in ('XLA_FLAGS', 'PYTHONPATH')}
    environ = {'PYTHONPATH': f'{ROOT}', 'JAX_PLATFORMS': 'cpu', **environ}
    self.began = time.monotonic()
    self.process = subprocess.Popen(
      [sys.executable, *map(str, command)],
      cwd=cwd,
      env={**inherited, **environ},
      text=True,
      errors='replace',
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
    )
    self.lines: list[tuple[float, str]] = []
    self.ended = 0.0
    self._reader = threading.Thread(target=self._read, daemon=True)
    self._reader.start()

  def _read(self):
    for line in self.process.stderr:
      self.lines.append((time.monotonic(), line.rstrip('\n')))
    self.process.wait()
    self.ended = time.monotonic()

  def at(self, pattern: str) -> float | None:
    """The time of the first line that matches."""
    return next((at for at, line in list(self.lines) if re.search(pattern, line)), None)

  def wait_for(self, pattern: str):
    """Waits for a line that matches. InputError if the process ends without one."""
    end = time.monotonic() + LIMIT
    while self.at(pattern) is None:
      if self.ended or time.monotonic() > end:
        raise InputError(f'a process did not print {pattern!r}: {self.tail()}')
      time.sleep(0.01)

  def wait(self, limit: float = LIMIT) -> int | None:
    """The exit status; None if the process does not end in time."""
    self._reader.join(limit)
    return self.process.returncode if self.ended else None

  def errors(self) -> list[str]:
    """Its error lines."""
    return [line for _, line in self.lines if line.startswith('error: ')]

  def tail(self) -> str:
    """The end of its output."""
    return '\n'.join(line for _, line in self.lines)[-1500:]

  def kill(self):
    """Kills it if it is still running."""
    if not self.ended:
      self.process.kill()
      self.wait()


@contextlib.contextmanager
def started(members):
  """Yields a list of `Member`s, and kills those that are still running at the end."""
  members = list(members)
  try:
    yield members
  finally:
    for member in members:
      member.kill()


def free_port() -> int:
  """A free port."""
  with socket.create_server(('localhost', 0)) as server:
    return server.getsockname()[1]


def cluster(port, count, process, wait_seconds=120) -> list[str]:
  """The flags of one process of several."""
  return [
    f'--coordinator=localhost:{port}',
    f'--processes={count}',
    f'--process={process}',
    f'--wait_seconds={wait_seconds}',
  ]


def real(port, count, process, workdir, *more, wait_seconds=120, cwd=ROOT, **environ) -> Member:
  """A process of a real run."""
  command = ['-m', 'dsr_jax.main', f'--config={CONFIG}', f'--workdir={workdir}']
  command += ['--config.model=scenes', *cluster(port, count, process, wait_seconds), *more]
  return Member(command, cwd=cwd, **environ)


def fake(port, process, workdir, steps=100_000) -> Member:
  """One of two processes with the real loop around a small step: twenty steps per second."""
  return Member(
    [FAKE_RUN, workdir, steps, 0.05, f'--port={port}', f'--process={process}'],
    PYTHONPATH=os.pathsep.join((f'{ROOT}', f'{FAKE_RUN.parent}')),
  )


# The result of a case.


@dataclasses.dataclass
class Answer:
  """One row: seconds since `since`; exit statuses and errors of the processes in question."""

  since: str
  seconds: float
  statuses: list[int | None]
  said: list[str]
  right: bool

  def row(self, name: str) -> str:
    """The row in Markdown. Equal errors appear once."""
    sentences = '<br>'.join(dict.fromkeys(_shown(said) for said in self.said)) or '(nothing)'
    statuses = ', '.join(f'{status}' for status in self.statuses)
    wrong = '' if self.right else ' **wrong**'
    return f'| {name} | {self.seconds:.1f} {self.since} | {statuses} | {sentences}{wrong} |'


def _shown(said: str) -> str:
  """An error as shown in the table; a long one is truncated."""
  said = said.removeprefix('error: ').replace('|', '\\|')
  said = re.sub(r'/tmp/\w+', 'DIR', said)
  return said if len(said) < 260 else f'{said[:250]} ...'


def ended(
  members,
  since: str,
  moment: float,
  right: Callable[[Member, int | None], bool],
  limit: float = LIMIT,
) -> Answer:
  """Waits for the end of all; each must print one error, without a traceback."""
  statuses = [member.wait(limit) for member in members]
  seconds = max((member.ended or time.monotonic()) for member in members) - moment
  whole = [
    len(member.errors()) == 1 and 'Traceback' not in member.tail() and right(member, status)
    for member, status in zip(members, statuses)
  ]
  said = [
    line for member in members for line in member.errors() or [f'(no sentence) {member.tail()}']
  ]
  return Answer(since, seconds, statuses, said, all(whole))


# Processes that differ.


@dataclasses.dataclass(frozen=True)
class Difference:
  """How the last process differs, and what every error must contain."""

  named: str
  flags: tuple[str, ...] = ()
  environ: dict[str, str] = dataclasses.field(default_factory=dict)
  processes: int = 2
  # Fills the folder of each process: (folder, whether it is the last process).
  lies: Callable[[pathlib.Path, bool], None] | None = None
  all_flags: tuple[str, ...] = ()


def _key(key: str, value, **more) -> Difference:
  return Difference(f'config.{key}: ', (f'--config.{key}={value}',), **more)


def _pictures(folder: pathlib.Path, last: bool):
  """A folder of images with the same names and sizes; the last process has one different pixel."""
  rng = np.random.default_rng(0)
  (folder / 'pictures').mkdir()
  for i in range(8):
    pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)
    if last and i == 5:
      pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(folder / 'pictures' / f'{i}.bmp')


def _prompts(folder: pathlib.Path, last: bool):
  texts = ['a red circle', 'a blue square', 'two green stars' if last else 'three green stars']
  (folder / 'prompts.txt').write_text('\n'.join(texts) + '\n')


def _model(folder: pathlib.Path, last: bool):
  """The embedded model; the last process has one different weight."""
  shutil.copytree(ROOT / 'dsr_jax' / 'assets' / 'scenes_base', folder / 'model')
  if last:
    path = min((folder / 'model').glob('*.safetensors'))
    weights = safetensors.load_file(path)
    name = min(weights)
    weights[name] = weights[name].copy()
    weights[name].flat[0] += 1
    safetensors.save_file(weights, path, {'format': 'pt'})


def _source(folder: pathlib.Path, last: bool):
  """A copy of the package; the last process has one more comment."""
  shutil.copytree(ROOT / 'dsr_jax', folder / 'dsr_jax')
  if last:
    with open(folder / 'dsr_jax' / 'losses.py', 'a', encoding='utf-8') as f:
      f.write('# Changed.\n')


def _shipped(folder: pathlib.Path, last: bool):
  """A copy of the package; the last process has a different list of prompts."""
  shutil.copytree(ROOT / 'dsr_jax', folder / 'dsr_jax')
  if last:
    path = min((folder / 'dsr_jax' / 'data' / 't2i_compbench_prompts').glob('*_train.txt'))
    path.write_text(path.read_text() + 'one more prompt\n')


def _library(folder: pathlib.Path, last: bool):
  """Metadata of another optax version, for the last process."""
  if last:
    about = folder / 'optax-0.0.1.dist-info' / 'METADATA'
    about.parent.mkdir()
    about.write_text('Metadata-Version: 2.1\nName: optax\nVersion: 0.0.1\n')


DIFFERENCES = {
  'method.learning_rate': _key('method.learning_rate', 2e-6),
  'method.objective': _key('method.objective', 'online_dpo'),
  'method.seed, of three processes': _key('method.seed', 7, processes=3),
  'method.grpo.ratio_high': _key('method.grpo.ratio_high', 0.3),
  'data.prompts': _key('data.prompts', 't2i_compbench'),
  'data.max_prompt_tokens': _key('data.max_prompt_tokens', 32),
  'eval.benchmark': _key('eval.benchmark', 'none'),
  'eval.seed': _key('eval.seed', 5),
  'system.mesh': _key('system.mesh.data', 2),
  'system.rollout_chunk': _key('system.rollout_chunk', 2),
  'system.save_every': _key('system.save_every', 2),
  'model': _key('model', 'other-model'),
  '--workdir': Difference('checkpoints in: ', ('--workdir=/tmp/another-folder',)),
  '--processes': Difference('--processes=', ('--processes=3',)),
  'a picture, under the same path': Difference(
    'data: ', lies=_pictures, all_flags=('--config.data.images=pictures',)
  ),
  'a line of the prompts, under the same path': Difference(
    'data: ', lies=_prompts, all_flags=('--config.data.prompts=prompts.txt',)
  ),
  'a weight of the model, under the same path': Difference(
    'model: ', lies=_model, all_flags=('--config.model=model',)
  ),
  'the source of dsr_jax': Difference('source of dsr_jax (sha256): ', lies=_source),
  'a list that dsr_jax brings': Difference('source of dsr_jax (sha256): ', lies=_shipped),
  'the version of a library': Difference('version.optax: ', lies=_library),
  'the precision of products': Difference(
    'jax_default_matmul_precision: ', environ={'JAX_DEFAULT_MATMUL_PRECISION': 'bfloat16'}
  ),
  '64-bit numbers': Difference('jax_enable_x64: ', environ={'JAX_ENABLE_X64': '1'}),
  'the number of devices': Difference('devices: ', environ={'JAX_NUM_CPU_DEVICES': '2'}),
}


def differ(difference: Difference, folder: pathlib.Path) -> Answer:
  """Starts processes; the last one differs."""
  port = free_port()

  def start(process):
    last = process == difference.processes - 1
    place = folder / f'{process}'
    place.mkdir()
    if difference.lies:
      difference.lies(place, last)
    more = (*difference.all_flags, *(difference.flags if last else ()))
    environ = difference.environ if last else {}
    path = os.pathsep.join((f'{place}', f'{ROOT}'))
    return real(
      port,
      difference.processes,
      process,
      folder / 'run',
      *more,
      cwd=place,
      **{'PYTHONPATH': path, **environ},
    )

  with started(map(start, range(difference.processes))) as members:
    for member in members:
      member.wait_for('^waiting ')
    joined = max(member.at('^waiting ') for member in members)
    answer = ended(
      members,
      's from the last one\'s "waiting"',
      joined,
      lambda member, status: status == 2 and difference.named in member.errors()[0],
      limit=3 * REFUSED_SECONDS,
    )
  answer.right &= answer.seconds <= REFUSED_SECONDS
  return answer


# One is missing.


def never_started(present: tuple[int, ...], count: int, folder: pathlib.Path) -> Answer:
  """Starts only some of `count` processes."""
  port = free_port()
  with started(real(port, count, i, folder / 'run') for i in present) as members:
    for member in members:
      member.wait_for('^waiting ')
    began = time.monotonic()
    answer = ended(
      members,
      's of 120 s',
      began,
      lambda member, status: bool(status) and f'not all of {count} processes' in member.errors()[0],
    )
  answer.right &= answer.seconds <= 120 + REFUSED_SECONDS
  return answer


def same_number(folder: pathlib.Path) -> Answer:
  """Starts process 1 of three twice, and no process 2."""
  port = free_port()
  numbers = (0, 1, 1)
  with started(real(port, 3, i, folder / 'run', wait_seconds=20) for i in numbers) as members:
    for member in members:
      member.wait()
    joined = max(member.at('^waiting ') or member.began for member in members)
    answer = ended(members, 's', joined, lambda member, status: bool(status))
  answer.right &= any('same number' in said for said in answer.said)
  return answer


@contextlib.contextmanager
def at_work(folder: pathlib.Path, port: int | None = None, steps=100_000):
  """Yields two processes that have reached the sixth step."""
  port = port or free_port()
  with started(fake(port, i, folder / 'run', steps) for i in range(2)) as members:
    members[0].wait_for('^step 6/')
    yield members


def killed(victim: int, folder: pathlib.Path) -> Answer:
  """Kills one of two processes during the run."""
  with at_work(folder) as members:
    moment = time.monotonic()
    members[victim].process.kill()
    answer = ended(
      [members[1 - victim]],
      's from the kill',
      moment,
      lambda member, status: bool(status) and _says_who(member.errors()[0], victim),
    )
  answer.right &= answer.seconds <= SILENT_SECONDS + 10
  return answer


def _says_who(said: str, victim: int) -> bool:
  return f'process {victim} of 2 died' in said or 'a connection to another process broke' in said


def killed_and_again(folder: pathlib.Path) -> Answer:
  """Starts both again after a kill; they must finish."""
  port = free_port()
  with at_work(folder, port, steps=60) as members:
    members[0].wait_for('^step 20/')  # by now there is a checkpoint
    moment = time.monotonic()
    members[1].process.kill()
    members[0].wait()
  with started(fake(port, i, folder / 'run', 60) for i in range(2)) as members:
    statuses = [member.wait() for member in members]
    went_on = [line for _, line in members[0].lines if line.startswith('resuming')]
  summary = json.loads((folder / 'run' / 'summary.json').read_text())
  right = statuses == [0, 0] and bool(went_on) and summary['finished']
  return Answer('s from the kill to the end', time.monotonic() - moment, statuses, went_on, right)


def stopped(victim: int, folder: pathlib.Path) -> Answer:
  """Sends SIGSTOP to one of two, and SIGCONT once the other has ended; then it must end too."""
  with at_work(folder) as members:
    moment = time.monotonic()
    os.kill(members[victim].process.pid, signal.SIGSTOP)
    answer = ended(
      [members[1 - victim]],
      's from SIGSTOP',
      moment,
      lambda member, status: bool(status) and f'process {victim} of 2 died' in member.errors()[0],
    )
    moment = time.monotonic()
    os.kill(members[victim].process.pid, signal.SIGCONT)
    woken = ended([members[victim]], '', moment, lambda member, status: bool(status))
  answer.since += f'; the other one {woken.seconds:.1f} s from SIGCONT'
  answer.statuses += woken.statuses
  answer.said += woken.said
  answer.right &= woken.right and answer.seconds <= SILENT_SECONDS + 10 and woken.seconds <= 50
  return answer


def stopped_for_a_while(folder: pathlib.Path) -> Answer:
  """SIGSTOP, and SIGCONT after 20 s: the run must continue to its end."""
  with at_work(folder, steps=60) as members:
    moment = time.monotonic()
    os.kill(members[1].process.pid, signal.SIGSTOP)
    time.sleep(20)
    os.kill(members[1].process.pid, signal.SIGCONT)
    return _to_the_end(members, folder, 's from SIGSTOP to the end of the run', moment)


def _to_the_end(members, folder, since, moment) -> Answer:
  statuses = [member.wait() for member in members]
  said = [line for member in members for line in member.errors()]
  path = folder / 'run' / 'summary.json'
  finished = path.is_file() and json.loads(path.read_text())['finished']
  right = not any(statuses) and not said and finished
  said = said or ['the run ended as it should' if finished else members[0].tail()]
  return Answer(since, time.monotonic() - moment, statuses, said, right)


# The port.


def port_taken(folder: pathlib.Path) -> Answer:
  """Another program listens on the port of process 0, and answers nothing."""
  with socket.create_server(('', 0)) as server:
    port = server.getsockname()[1]
    with started(real(port, 2, i, folder / 'run', wait_seconds=20) for i in range(2)) as members:
      answer = ended(
        members,
        's from the start; process 1 waits its 20 s',
        max(member.began for member in members),
        lambda member, status: bool(status) and f'{port}' in member.errors()[0],
      )
  answer.right &= answer.statuses[0] == 2 and f'cannot listen on port {port}' in answer.said[0]
  return answer


def port_of_another_run(folder: pathlib.Path) -> Answer:
  """Two processes of another run use the port of a running one.

  JAX takes the second process 1 for the first one, started again, and ends the running run. The
  other run finds the port taken, or runs to its end if its process 0 comes after that.
  """
  port = free_port()
  with at_work(folder, port) as members:
    moment = time.monotonic()
    with started(real(port, 2, i, folder / 'other', wait_seconds=20) for i in range(2)) as others:
      answer = ended(
        [*members, *others],
        's from the start; the other process 1 waits its 20 s',
        moment,
        lambda member, status: bool(status) or member in others,
      )
  answer.right &= all('another process 1 connected' in said for said in answer.said[:2])
  return answer


def send(port: int):
  """Sends every kind of stray bytes three times."""
  for data in STRAY * 3:
    with (
      socket.create_connection(('localhost', port), timeout=5) as s,
      contextlib.suppress(OSError),
    ):
      s.sendall(data)


def stray_at_work(folder: pathlib.Path) -> Answer:
  """Stray bytes at process 0's port during the run, and a silent open connection."""
  port = free_port()
  with at_work(folder, port, steps=100) as members:
    moment = time.monotonic()
    with socket.create_connection(('localhost', port)):
      send(port)
      return _to_the_end(members, folder, 's to the end of the run', moment)


def stray_while_joining(folder: pathlib.Path) -> Answer:
  """Stray bytes at process 0's port before process 1 joins."""
  port = free_port()
  with started([fake(port, 0, folder / 'run', 30)]) as members:
    members[0].wait_for('^waiting ')
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
      with contextlib.suppress(ConnectionRefusedError):
        send(port)
        break
      time.sleep(0.1)
    moment = time.monotonic()
    with started([fake(port, 1, folder / 'run', 30)]) as late:
      return _to_the_end(members + late, folder, 's to the end of the run', moment)


def _case(function, *arguments):
  return lambda folder: function(*arguments, folder)


# By group, with the number of cases to run at once: groups that mostly wait run several.
GROUPS: dict[str, tuple[int, dict[str, Callable[[pathlib.Path], Answer]]]] = {
  'differ in': (1, {name: _case(differ, how) for name, how in DIFFERENCES.items()}),
  'never started:': (
    4,
    {
      'process 1 of 2': _case(never_started, (0,), 2),
      'process 0 of 2': _case(never_started, (1,), 2),
      'process 2 of 3': _case(never_started, (0, 1), 3),
      'but process 1 of 3 twice': same_number,
    },
  ),
  'killed:': (
    1,
    {
      'process 0 of 2': _case(killed, 0),
      'process 1 of 2': _case(killed, 1),
      'process 1 of 2, both started again': killed_and_again,
    },
  ),
  'stopped:': (
    3,
    {
      'process 0 of 2': _case(stopped, 0),
      'process 1 of 2': _case(stopped, 1),
      'process 1 of 2, for 20 s': stopped_for_a_while,
    },
  ),
  'port:': (
    4,
    {
      'taken': port_taken,
      'of another run': port_of_another_run,
      'stray bytes at work': stray_at_work,
      'stray bytes while joining': stray_while_joining,
    },
  ),
}


def answer_of(name: str, case) -> Answer:
  """Runs a case in its own folder."""
  with tempfile.TemporaryDirectory() as folder:
    try:
      answer = case(pathlib.Path(folder))
    except InputError as e:
      answer = Answer('s', 0.0, [], [f'{e}'], right=False)
  cli.log(answer.row(name))
  return answer


def main(argv, f=flags.FLAGS):
  """Prints the table as Markdown."""
  cli.no_arguments(argv)
  kept = pathlib.Path(f.results) if f.results else None
  answers: dict[str, Answer] = {}
  if kept and kept.is_file():
    answers = {name: Answer(**row) for name, row in json.loads(kept.read_text()).items()}
  began = time.monotonic()
  for group, (together, cases) in GROUPS.items():
    named = {f'{group} {name}': case for name, case in cases.items()}
    chosen = {
      name: case
      for name, case in named.items()
      if name not in answers and (not f.only or any(part in name for part in f.only))
    }
    with futures.ThreadPoolExecutor(together) as pool:
      for name, answer in zip(chosen, pool.map(answer_of, chosen, chosen.values())):
        answers[name] = answer
        if kept:
          rows = {name: dataclasses.asdict(answer) for name, answer in answers.items()}
          kept.write_text(json.dumps(rows, indent=2))
  print('| case | seconds | exit status | said |')
  print('|---|---|---|---|')
  for name, answer in answers.items():
    print(answer.row(name))
  wrong = [name for name, answer in answers.items() if not answer.right]
  print(f'\n{len(answers)} cases, {len(wrong)} wrong, {time.monotonic() - began:.0f} s.')
  return int(bool(wrong))


def define_flags(f=flags.FLAGS):
  flags.DEFINE_list(
    'only', [], 'Run only the cases whose name contains one of these.', flag_values=f
  )
  flags.DEFINE_string('results', '', 'A file to keep the answers in.', flag_values=f)


if __name__ == '__main__':
  cli.run_main(main, define_flags)
