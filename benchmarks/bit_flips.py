"""Damages the newest checkpoint of a real run, a file at a time, and starts every command that
reads one: each has to say the sentence about it, with the checkpoint before it, and nothing else.

  python -m benchmarks.bit_flips [--flips=26 --seed=0]

The run is configs/scenes_tiny.py with three checkpoints. Bits are flipped at random places of its
files in turn, so that every kind of file has at least one; then every kind is truncated, emptied
and removed, the whole folder is emptied, and lastly nothing is damaged: then the commands that are
quick enough must work. All of it in one process. Prints a table; exits with 1 where an answer was
another one. `dsr_jax.study` opens its cells' checkpoints by the readers of main and of --model.
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
  """{name: (module, its flags)} of everything that reads a checkpoint of the run."""
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
  """(exit status, what it said on stderr) of a command in this process; 1 is a traceback."""
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
    # The very thing that is looked for.
    except Exception as e:
      status = 1
      print(f'{type(e).__name__}: {e}', file=sys.stderr)
  return status, said.getvalue()


def verdict(answer, newest) -> str:
  """'named' where a command said what it should; else what it said."""
  status, said = answer
  last = (said.strip().splitlines() or [''])[-1]
  whole = (
    last.startswith(f'error: cannot read the checkpoint {newest} (')
    and f'of step {NEWEST - 1}, or name it, as' in last
  )
  return 'named' if status == 2 and whole else f'status {status}: {last[:200]}'


def kind_of(path) -> str:
  """A file's kind: its path, without the names that are made up for each file."""
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
  """(what is done, to which file) of every trial."""
  files = sorted(path for path in newest.rglob('*') if path.is_file())
  kinds = {kind_of(path.relative_to(newest)): path for path in files}
  if flips < len(kinds):
    raise InputError(f'found --flips={flips} for {len(kinds)} kinds of files; expected as many')
  in_turn = list(kinds.values()) + files
  trials = [(flip, in_turn[i % len(in_turn)]) for i in range(flips)]
  return trials + [(harm, path) for harm in (truncate, empty, remove) for path in kinds.values()]


def trial(all_commands, newest, harm, path, rng) -> dict[str, str]:
  """What each command said of one damage; the file is good again afterwards."""
  good = path.read_bytes()
  harm(path, rng)
  try:
    return {name: verdict(start(*command), newest) for name, command in all_commands.items()}
  finally:
    path.write_bytes(good)


def main(argv, f=flags.FLAGS):
  """Prints the table in Markdown."""
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
    # A later step to replay from the newest checkpoint: the run's own are all before it.
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
  flags.DEFINE_integer('flips', 26, 'How many bits are flipped, one at a time.', flag_values=f)
  flags.DEFINE_integer('seed', 0, 'Of the places.', flag_values=f)


if __name__ == '__main__':
  cli.run_main(main, define_flags)
