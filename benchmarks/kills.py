"""Kills a real run at random moments and compares it with an unbroken one: metrics line by line,
parameters by hash.

  python -m benchmarks.kills [--kills=10 --steps=40 --seed=0]

Each kill is SIGKILL: the first one while a checkpoint is being written, the others at a random
moment after the restart's first step or, one time in three, of its start. Then the same command
again, until the run is through. Prints one JSON object; exits with 1 where the two differ.
"""

import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

from absl import app, flags

from dsr_jax import cli
from dsr_jax.runtime import metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent


def start(workdir, cache):
  settings = dict(
    model='scenes',
    **{
      'method.steps': flags.FLAGS.steps,
      'system.save_every': 3,
      'system.eval_every': 0,
      'system.samples_every': 5,
      'system.compile_cache': cache,
    },
  )
  command = [
    sys.executable,
    '-m',
    'dsr_jax.main',
    '--config=configs/scenes_tiny.py',
    f'--workdir={workdir}',
  ]
  command += [f'--config.{key}={value}' for key, value in settings.items()]
  log = open(workdir + '.log', 'a', encoding='utf-8')
  return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def lines(workdir) -> int:
  path = os.path.join(workdir, 'metrics.jsonl')
  return sum(1 for _ in open(path, encoding='utf-8')) if os.path.exists(path) else 0


def being_written(workdir) -> bool:
  folder = os.path.join(workdir, 'checkpoints')
  return os.path.isdir(folder) and any(not name.isdigit() for name in os.listdir(folder))


def wait(process, condition, limit: float = 600.0):
  end = time.time() + limit
  while process.poll() is None and not condition() and time.time() < end:
    time.sleep(0.002)


def wait_for_first_kill(process, workdir, had: int):
  """Until a checkpoint is being written; had: lines of metrics before."""
  wait(process, lambda: lines(workdir) > had + 1 and being_written(workdir))


def wait_for_next_kill(process, workdir, had: int, rng):
  """Until a random moment after the restart's first step, or of its start."""
  early = rng.random() < 1 / 3
  wait(process, lambda: early or lines(workdir) > had)
  end = time.time() + rng.uniform(0.0, 6.0 if early else 1.5)
  wait(process, lambda: time.time() > end)


def broken_run(workdir, cache, rng) -> list[dict]:
  """Runs to the end over all kills; returns their moments."""
  moments = []
  while True:
    process = start(workdir, cache)
    begun, had = time.time(), lines(workdir)
    if len(moments) < flags.FLAGS.kills:
      if moments:
        wait_for_next_kill(process, workdir, had, rng)
      else:
        wait_for_first_kill(process, workdir, had)
      if process.poll() is None:
        moment = dict(
          after_s=round(time.time() - begun, 2),
          lines=lines(workdir),
          writing=being_written(workdir),
        )
        process.kill()
        moments.append(moment)
        print(f'kill {len(moments)}: {moment}', file=sys.stderr, flush=True)
    if process.wait() == 0:
      return moments
    if process.returncode > 0:
      raise SystemExit(f'the run failed by itself; see {workdir}.log')


def main(argv):
  cli.no_arguments(argv)
  with tempfile.TemporaryDirectory() as folder:
    whole, broken, cache = (os.path.join(folder, name) for name in ('whole', 'broken', 'compiled'))
    if start(whole, cache).wait():
      raise SystemExit(open(whole + '.log', encoding='utf-8').read()[-2000:])
    moments = broken_run(broken, cache, random.Random(flags.FLAGS.seed))
    hashes = [
      json.load(open(os.path.join(d, 'summary.json'), encoding='utf-8'))['parameters_sha256']
      for d in (whole, broken)
    ]
    same = dict(
      metrics=metrics.repeatable(whole) == metrics.repeatable(broken),
      parameters=hashes[0] == hashes[1],
    )
    print(
      json.dumps(
        dict(
          steps=flags.FLAGS.steps,
          kills=len(moments),
          while_writing=sum(m['writing'] for m in moments),
          same=same,
          parameters_sha256=hashes[0],
          moments=moments,
        ),
        indent=2,
      )
    )
  sys.exit(not all(same.values()))


def define_flags(f=flags.FLAGS):
  flags.DEFINE_integer('kills', 10, 'How many.', flag_values=f)
  flags.DEFINE_integer('steps', 40, 'Of the run.', flag_values=f)
  flags.DEFINE_integer('seed', 0, 'Of the moments.', flag_values=f)


if __name__ == '__main__':
  define_flags()
  app.run(main)
