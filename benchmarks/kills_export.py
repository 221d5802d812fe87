"""Kills `convert --overwrite` of the embedded model while it writes, and checks what is there: the
whole old directory or the whole new one; after the next start, only the new one.

  python -m benchmarks.kills_export [--kills=10 --seed=0 --file_by_file]

Each kill is a SIGKILL at a random moment between the first trace of the output on the disk and a
little after the time that an uninterrupted export needs from there. The formats alternate, so old
and new differ in every file; one file of the user is beside them. With --file_by_file, the target
is the current folder, which cannot be renamed; then the old directory, the new one, or one that is
refused as unfinished is right. Prints one JSON object; exits with 1 if anything else was found.
"""

import collections
import hashlib
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

from absl import flags

from dsr_jax import cli, convert, files
from dsr_jax.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parent.parent
FORMATS = ('hf', 'deepseek')
MINE = 'mine.txt'


class Export:
  """One process that converts the embedded model to the folder `target`."""

  def __init__(self, target, layout, inside):
    self._target = pathlib.Path(target)
    command = [sys.executable, '-m', 'dsr_jax.convert', '--source=scenes', f'--format={layout}']
    command += ['--target=.' if inside else f'--target={target}', '--overwrite']
    self.process = subprocess.Popen(
      command,
      cwd=target if inside else self._target.parent,
      env={**os.environ, 'PYTHONPATH': str(ROOT)},
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )

  def wait_until_it_writes(self):
    """Waits until its hidden folder exists."""
    while self.process.poll() is None and not hidden(self._target):
      time.sleep(0.0005)

  def end(self) -> float:
    """Waits for the end; returns the seconds until nothing of it was hidden any more."""
    begun = time.perf_counter()
    while hidden(self._target) and self.process.poll() is None:
      time.sleep(0.0005)
    took = time.perf_counter() - begun
    _, said = self.process.communicate()
    if self.process.returncode:
      raise SystemExit(f'the export failed on its own: {said[-2000:]}')
    return took


def hidden(target) -> list[str]:
  """Hidden folders beside or in a target."""
  folders = (target.parent, target)
  return [str(path) for folder in folders for path in folder.glob(f'.*{files.MARK}*')]


def tree(target) -> dict[str, str]:
  """{path: hash} of a folder."""
  return {
    str(path.relative_to(target)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(target.rglob('*'))
    if path.is_file() and files.MARK not in str(path.relative_to(target))
  }


def found(target, old, new, inside) -> str:
  """'old', 'new' or 'unfinished' if that is right and the directory loads; else what is wrong."""
  now = tree(target)
  if now.get(MINE) != old[MINE]:
    return "wrong: the user's file is gone or another"
  if now in (old, new):
    convert.load(target)
    return 'old' if now == old else 'new'
  if not inside:
    return f'wrong: a mixture, {sorted(set(now) ^ set(new))}'
  try:
    convert.load(target)
  except InputError as e:
    return 'unfinished' if 'not finished' in str(e) else f'wrong: refused as {e}'
  return 'wrong: a mixture that loads'


def broken(target, kill: int, rng, trees, took, inside) -> dict:
  """One kill and the start after it."""
  layout = FORMATS[kill % 2]
  old, new = tree(target), trees[layout]
  export = Export(target, layout, inside)
  export.wait_until_it_writes()
  moment = rng.uniform(0, 1.2 * took[layout])
  time.sleep(moment)
  export.process.kill()
  export.process.communicate()
  left = len(hidden(target))
  state = found(target, old, new, inside)
  Export(target, layout, inside).end()
  after = tree(target) == new and not hidden(target)
  row = {'format': layout, 'after_ms': round(1000 * moment), 'found': state, 'hidden': left}
  cli.log(f'kill {kill + 1}: {row}')
  return row | {'next_start': 'whole, nothing left' if after else 'wrong'}


def main(argv, f=flags.FLAGS):
  """Prints the results as JSON."""
  cli.no_arguments(argv)
  rng, trees, took = random.Random(f.seed), {}, {}
  with tempfile.TemporaryDirectory() as folder:
    target = pathlib.Path(folder).resolve() / 'model'
    target.mkdir()
    (target / MINE).write_text('years of work')
    for layout in FORMATS:
      export = Export(target, layout, f.file_by_file)
      export.wait_until_it_writes()
      took[layout] = export.end()
      trees[layout] = tree(target)
    rows = [broken(target, i, rng, trees, took, f.file_by_file) for i in range(f.kills)]
    beside = sorted(os.listdir(folder))
  wrong = [r for r in rows if r['found'].startswith('wrong') or r['next_start'] == 'wrong']
  cli.print_text(
    json.dumps(
      {
        'kills': len(rows),
        'seed': f.seed,
        'writes_for_ms': {layout: round(1000 * seconds) for layout, seconds in took.items()},
        'found': collections.Counter(row['found'] for row in rows),
        'left_hidden': sum(bool(row['hidden']) for row in rows),
        'wrong': wrong,
        'beside': beside,
        'rows': rows,
      },
      indent=2,
    )
  )
  return int(bool(wrong) or beside != ['model'])


def define_flags(f=flags.FLAGS):
  flags.DEFINE_integer('kills', 10, 'Number of kills.', lower_bound=1, flag_values=f)
  flags.DEFINE_integer('seed', 0, 'Seed of the moments.', flag_values=f)
  flags.DEFINE_bool('file_by_file', False, 'Export into the current folder.', flag_values=f)


if __name__ == '__main__':
  cli.run_main(main, define_flags)
