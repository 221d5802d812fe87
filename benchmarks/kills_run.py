"""Kills a real run of configs/scenes_tiny.py and compares it with an uninterrupted one: metrics
line by line (except time and memory), parameters by hash.

  python -m benchmarks.kills_run [--compiling=15 --steps_at=5 --saving=5 --evaluating=10 --seed=0]

Each kill is a SIGKILL; then the same command runs again on what is left: checkpoints and the cache
of compiled programs. The moment of a kill is chosen by the run's output and the files in its
folders, and is checked again once the process is dead. One of three kills while compiling starts
with an empty cache and happens when an entry appears there. Prints one JSON object; exits with 1 if
the runs differ.
"""

import collections
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time

from absl import flags

from dsr_jax import cli
from dsr_jax.runtime import metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent
PHASES = ('compiling', 'steps_at', 'saving', 'evaluating')


class Run:
  """One process of the run, and what is visible of it from outside."""

  def __init__(self, workdir, cache, steps):
    self.workdir, self.cache = workdir, cache
    settings = {
      'method.steps': steps,
      'system.save_every': 2,
      'system.eval_every': 2,
      'system.samples_every': 5,
      'system.compile_cache': cache,
    }
    command = [sys.executable, '-m', 'dsr_jax.main', '--config=configs/scenes_tiny.py']
    command += [f'--workdir={workdir}', '--config.model=scenes']
    command += [f'--config.{key}={value}' for key, value in settings.items()]
    self.said_at = f'{workdir}.log'
    with open(self.said_at, 'w', encoding='utf-8') as log:
      self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

  def said(self) -> str:
    """All output of this process."""
    return pathlib.Path(self.said_at).read_text(encoding='utf-8', errors='replace')

  def phase(self) -> str:
    """What it is doing: one of PHASES, 'starting' or 'ended'."""
    said = self.said()
    if self._being_written():
      return 'saving'
    if 'compiled     the step' not in said:
      return 'compiling' if 'method       ' in said else 'starting'
    last = re.findall(r'^(step|evaluation|report|stopped) +(?:step )?(\d*)', said, re.MULTILINE)
    if last and last[-1][0] in ('report', 'stopped'):
      return 'ended'
    if last and last[-1][0] == 'step' and not int(last[-1][1]) % 2:
      return 'evaluating'
    return 'steps_at'

  def entries(self) -> set[str]:
    """The programs in the cache."""
    return set(os.listdir(self.cache)) if os.path.isdir(self.cache) else set()

  def wait_for(self, condition, limit=600.0):
    """Waits until the condition holds or the process has ended."""
    end = time.time() + limit
    while self.process.poll() is None and not condition() and time.time() < end:
      time.sleep(0.002)

  def _being_written(self):
    folder = os.path.join(self.workdir, 'checkpoints')
    return os.path.isdir(folder) and any(not name.isdigit() for name in os.listdir(folder))


def aim(run: Run, target: str, number: int, rng):
  """Waits for the moment of a kill; the process may have ended on its own by then."""
  if target == 'compiling' and number % 3 == 0:
    for name in run.entries():
      os.unlink(os.path.join(run.cache, name))
    run.wait_for(lambda: run.phase() == 'compiling')
    had = run.entries()
    run.wait_for(lambda: run.entries() - had or run.phase() not in ('starting', 'compiling'))
    return
  longest = {'compiling': 4.0, 'steps_at': 1.0, 'saving': 0.02, 'evaluating': 0.15}[target]
  lead = rng.uniform(0.0, longest)
  while run.process.poll() is None and not is_reached(run, target, lead):
    lead /= 2


def is_reached(run: Run, target: str, lead: float) -> bool:
  """Waits for a phase, and `lead` seconds more; whether the phase lasts that long."""
  run.wait_for(lambda: run.phase() == target)
  end = time.time() + lead
  run.wait_for(lambda: time.time() > end or run.phase() != target)
  return run.phase() == target


def broken_run(workdir, cache, steps, targets, rng) -> list[dict]:
  """Runs to the end with all kills; returns their moments."""
  moments, counts = [], collections.Counter()
  while True:
    run = Run(workdir, cache, steps)
    begun = time.time()
    if targets:
      target = targets.pop()
      aim(run, target, counts[target], rng)
      counts[target] += 1
      if run.process.poll() is None:
        run.process.kill()
        run.process.wait()
        moment = {'aim': target, 'fell': run.phase(), 'after_s': round(time.time() - begun, 1)}
        moments.append(moment)
        cli.log(f'kill {len(moments)}: {moment}')
    if run.process.wait() == 0:
      return moments
    if run.process.returncode > 0:
      raise SystemExit(f'the run failed on its own: {run.said()[-2000:]}')


def main(argv, f=flags.FLAGS):
  """Prints the comparison as JSON."""
  cli.no_arguments(argv)
  rng = random.Random(f.seed)
  targets = [phase for phase in PHASES for _ in range(getattr(f, phase))]
  rng.shuffle(targets)
  with tempfile.TemporaryDirectory() as folder:
    whole, broken, cache = (os.path.join(folder, name) for name in ('whole', 'broken', 'compiled'))
    unbroken = Run(whole, os.path.join(folder, 'own'), f.steps)
    if unbroken.process.wait():
      raise SystemExit(unbroken.said()[-2000:])
    moments = broken_run(broken, cache, f.steps, targets, rng)
    hashes = []
    for workdir in (whole, broken):
      summary = json.loads(pathlib.Path(workdir, 'summary.json').read_text(encoding='utf-8'))
      hashes.append(summary['parameters_sha256'])
    same = {
      'metrics': metrics.repeatable(whole) == metrics.repeatable(broken),
      'parameters': hashes[0] == hashes[1],
    }
  result = {
    'steps': f.steps,
    'seed': f.seed,
    'kills': len(moments),
    'fell': collections.Counter(moment['fell'] for moment in moments),
    'left_out': len(targets),
    'same': same,
    'parameters_sha256': hashes[0],
    'moments': moments,
  }
  print(json.dumps(result, indent=2))
  return int(not all(same.values()))


def define_flags(f=flags.FLAGS):
  flags.DEFINE_integer('compiling', 15, 'Kills while programs compile.', flag_values=f)
  flags.DEFINE_integer('steps_at', 5, 'Kills during steps.', flag_values=f)
  flags.DEFINE_integer('saving', 5, 'Kills while a checkpoint is written.', flag_values=f)
  flags.DEFINE_integer('evaluating', 10, 'Kills during evaluations.', flag_values=f)
  flags.DEFINE_integer('steps', 60, 'Steps of the run.', flag_values=f)
  flags.DEFINE_integer('seed', 0, 'Seed of the moments.', flag_values=f)


if __name__ == '__main__':
  cli.run_main(main, define_flags)
