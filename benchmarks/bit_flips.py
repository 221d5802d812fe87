"""Damages the newest checkpoint of a real run, one file at a time, and starts every command that
reads a checkpoint: each must print one error that names it and the checkpoint before it.

  python -m benchmarks.bit_flips [--flips=26 --seed=0]

The run is configs/scenes_tiny.py with three checkpoints. Bits are flipped at random positions of
its files in turn, so that every kind of file gets at least one flip. Then every kind is truncated,
emptied and removed, and the whole folder is emptied. Last, nothing is damaged, and the commands
that are quick enough must work. Everything runs in one process. Prints a table; exits with 1 if an
answer is wrong. `dsr_jax.study` opens its cells' checkpoints with the readers of main and --model.
"""

import collections
import contextlib
import io
import json
import pathlib
import random
import re
import shutil
import sys
import tempfile
from unittest import mock

from absl import flags, logging
import jax
import numpy as np
from PIL import Image

from dsr_jax import cli, describe, generate, score
from dsr_jax import main as training
from dsr_jax.convert import __main__ as convert
from dsr_jax.errors import InputError
from dsr_jax.evaluate import __main__ as evaluate
from dsr_jax.probe import __main__ as probe
from dsr_jax.replay import __main__ as replay

TINY = 'configs/scenes_tiny.py'
RUN = {'config': TINY, 'config.model': 'scenes', 'config.eval.benchmark': 'none'}
RUN |= {'config.system.keep_last': 3}
NEWEST = 3


def commands(run, folder):
  """{name: (module, its flags)} of all commands that read a checkpoint of the run."""
  image, output = str(folder / 'picture.png'), str(folder / 'output')
  drawing = {'prompt': 'a red circle', 'num_samples': 1, 'output': output}
  return {
    'main': (training, {**RUN, 'workdir': run}),
    'generate': (generate, {'model': run, **drawing}),
    'generate RUN@3': (generate, {'model': f'{run}@{NEWEST}', **drawing}),
    'describe': (describe, {'model': run, 'image': image, 'num_samples': 1, 'max_tokens': 2}),
    'describe --compare': (describe, {'model': 'scenes', 'compare': run, 'image': image,
                                      'num_samples': 1, 'max_tokens': 2}),
    'score': (score, {'model': run, 'text': 'a red circle', 'image': image}),
    'probe': (probe, {'model': run, 'config': TINY, 'output': output}),
    'evaluate': (evaluate, {'model': run, 'config': TINY, 'output': output}),
    'convert': (convert, {'source': run, 'target': str(folder / 'exported'), 'format': 'hf'}),
    'replay': (replay, {'workdir': run, 'step': NEWEST + 1, 'output': output}),
  }  # fmt: skip


def start(command, values) -> tuple[int, str]:
  """(exit status, stderr) of a command in this process; status 1 is a traceback."""
  f = flags.FlagValues()
  command.define_flags(f)
  argv = ['command', *(f'--{name}={value}' for name, value in values.items())]
  said = io.StringIO()
  quiet = contextlib.redirect_stdout(io.StringIO())
  with mock.patch.object(sys, 'argv', argv), contextlib.redirect_stderr(said), quiet:
    f(argv)
    try:
      command.main(['command'], f)
      status = 0
    except InputError as e:
      status = 2
      print(f'error: {e}', file=sys.stderr)
    # What this benchmark looks for.
    except Exception as e:
      status = 1
      print(f'{type(e).__name__}: {e}', file=sys.stderr)
  return status, said.getvalue()


def verdict(answer, newest) -> str:
  """'named' if a command printed the right error; else what it printed."""
  status, said = answer
  last = (said.strip().splitlines() or [''])[-1]
  whole = (
    last.startswith(f'error: cannot read the checkpoint {newest} (')
    and f'of step {NEWEST - 1}, or name that one as' in last
  )
  return 'named' if status == 2 and whole else f'status {status}: {last[:200]}'


def kind_of(path) -> str:
  """A file's kind: its path, without generated names."""
  return re.sub(r'[0-9a-f]{32}', 'DATA', str(path))


def flip(path, rng):
  data = bytearray(path.read_bytes())
  bit = rng.randrange(8 * len(data))
  data[bit // 8] ^= 1 << bit % 8
  path.write_bytes(data)


def truncate(path, rng):
  data = path.read_bytes()
  path.write_bytes(data[: rng.randrange(1, len(data))])


def empty(path, rng):
  del rng
  path.write_bytes(b'')


def remove(path, rng):
  del rng
  path.unlink()


def damages(newest, flips, rng):
  """(damage, file) of every trial."""
  files = sorted(path for path in newest.rglob('*') if path.is_file())
  kinds = {kind_of(path.relative_to(newest)): path for path in files}
  if flips < len(kinds):
    raise InputError(f'--flips is {flips}; raise it to the number of kinds of files, {len(kinds)}')
  in_turn = list(kinds.values()) + files
  trials = [(flip, in_turn[i % len(in_turn)]) for i in range(flips)]
  return trials + [(harm, path) for harm in (truncate, empty, remove) for path in kinds.values()]


def trial(all_commands, newest, harm, path, rng) -> dict[str, str]:
  """What each command printed about one damage; restores the file afterwards."""
  good = path.read_bytes()
  harm(path, rng)
  try:
    return {name: verdict(start(*command), newest) for name, command in all_commands.items()}
  finally:
    path.write_bytes(good)


def main(argv, f=flags.FLAGS):
  """Prints the table as Markdown."""
  cli.no_arguments(argv)
  rng = random.Random(f.seed)
  logging.set_verbosity(logging.WARNING)
  jax.config.update('jax_platforms', 'cpu')
  answers, wrong = collections.defaultdict(collections.Counter), []
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    run, newest = str(folder / 'run'), folder / 'run' / 'checkpoints' / str(NEWEST)
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / 'picture.png')
    status, said = start(training, {**RUN, 'workdir': run})
    if status:
      raise SystemExit(said[-2000:])
    all_commands = commands(run, folder)
    # To replay from the newest checkpoint takes a later step than any in the run.
    metrics = folder / 'run' / 'metrics.jsonl'
    metrics.write_text(metrics.read_text() + json.dumps({'step': NEWEST + 1, 'loss': 0}) + '\n')

    def note(what, kind, said_by):
      for command, words in said_by.items():
        answers[(what, kind)][words == 'named'] += 1
        if words != 'named':
          wrong.append(f'{what} {kind}, {command}: {words}')
          cli.log(wrong[-1])
      cli.log(f'{what} {kind}: {answers[(what, kind)]}')

    for harm, path in damages(newest, f.flips, rng):
      kind = kind_of(path.relative_to(newest))
      note(harm.__name__, kind, trial(all_commands, newest, harm, path, rng))
    shutil.move(newest, folder / 'aside')
    newest.mkdir()
    note('empty', 'the folder', {c: verdict(start(*v), newest) for c, v in all_commands.items()})
    newest.rmdir()
    shutil.move(folder / 'aside', newest)
    for quick in ('main', 'generate', 'describe', 'score', 'convert'):
      status, said = start(*all_commands[quick])
      if status:
        wrong.append(f'undamaged, {quick}: {said[-300:]}')

  print(f'Seed {f.seed}; {len(all_commands)} commands: {", ".join(all_commands)}.\n')
  print('| damage | file | trials | starts | named, with the checkpoint before |')
  print('|---|---|---:|---:|---:|')
  for (what, kind), count in answers.items():
    starts = count.total()
    print(f'| {what} | `{kind}` | {starts // len(all_commands)} | {starts} | {count[True]} |')
  total = sum((count for count in answers.values()), collections.Counter())
  print(f'| all | | {total.total() // len(all_commands)} | {total.total()} | {total[True]} |')
  for line in wrong:
    print(f'\nWrong: {line}')
  return int(bool(wrong))


def define_flags(f=flags.FLAGS):
  flags.DEFINE_integer('flips', 26, 'Number of bits to flip, one at a time.', flag_values=f)
  flags.DEFINE_integer('seed', 0, 'Seed of the positions.', flag_values=f)


if __name__ == '__main__':
  cli.run_main(main, define_flags)
