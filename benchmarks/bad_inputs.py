"""Gives every command bad input: it must say what is wrong in one line, and leave nothing behind.

  python -m benchmarks.bad_inputs [--seed=0 --count=300 --run=DIR]

Half of the cases are listed here, for every command; the others are made from the seed: configs,
model directories, runs, images, codes and prompts, each with a change or damage. A case passes if
the command ends with status 2 and one line `error: ...`, and leaves its working folder and its
input unchanged. A case that computes for more than CPU_SECONDS, or waits for IDLE_SECONDS without
computing, counts as a hang; other load on the machine therefore makes no difference. If the damage
may leave the input valid, status 0 passes too.

The commands are imported once; each case is a fork of that process, with its own streams and
folder, and goes through `cli.run_main` as the command itself does. `--cases=I,J` repeats cases.
Prints one JSON object; exits with 1 if a case fails.
"""

from collections import Counter
from collections.abc import Callable
import functools
import hashlib
import importlib
import json
import os
import pathlib
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from typing import NamedTuple

from absl import flags
import numpy as np
from PIL import Image

from benchmarks import fuzz_pictures
from dsr_jax import cli, flag_types, saved_config
from dsr_jax.config import Config
from dsr_jax.convert import locate

ROOT = pathlib.Path(__file__).resolve().parent.parent
CPU_SECONDS, IDLE_SECONDS = 10, 20
TINY = str(ROOT / 'dsr_jax' / 'configs' / 'scenes_tiny.py')
COMMANDS = {
  'main': 'dsr_jax.main',
  'generate': 'dsr_jax.generate',
  'describe': 'dsr_jax.describe',
  'score': 'dsr_jax.score',
  'probe': 'dsr_jax.probe.__main__',
  'replay': 'dsr_jax.replay.__main__',
  'plan': 'dsr_jax.plan.__main__',
  'study': 'dsr_jax.study.__main__',
  'pretrain': 'dsr_jax.pretrain',
  'scenes': 'dsr_jax.scenes.__main__',
  'effect': 'dsr_jax.effect',
  'evaluate': 'dsr_jax.evaluate.__main__',
  'benchmark': 'dsr_jax.benchmark',
  'convert': 'dsr_jax.convert.__main__',
  'prepare': 'dsr_jax.prepare.__main__',
}
OWN_FLAGS = ('seed', 'first', 'count', 'cases', 'all', 'run')
# What each command needs to start; IN is the folder of the given files.
GOOD = {
  'main': {'config': TINY, 'workdir': 'out'},
  'generate': {'model': 'scenes', 'prompt': 'a red disc', 'output': 'out', 'num_samples': '1'},
  'describe': {'model': 'scenes', 'image': 'IN/picture.png', 'num_samples': '1'},
  'score': {'model': 'scenes', 'text': 'a red disc', 'image': 'IN/picture.png'},
  'probe': {'config': TINY, 'model': 'scenes', 'output': 'out', 'num_inputs': '2'},
  'replay': {'workdir': 'IN/run', 'step': '2', 'output': 'out'},
  'plan': {'config': TINY, 'topology': 'h200:8', 'nocompile': None, 'config.system.mesh.fsdp': '1'},
  'study': {'config': 'scenes_study', 'output': 'out', 'tables_only': None},
  'pretrain': {'workdir': 'out'},
  'scenes': {'show': '1', 'output': 'out.png'},
  'effect': {'workdirs': 'IN/run', 'output': 'out.md'},
  'evaluate': {'model': 'scenes', 'output': 'out', 'benchmarks': 'scenes/geneval'},
  'benchmark': {'config': TINY, 'repeats': '1'},
  'convert': {'source': 'scenes', 'target': 'out', 'format': 'hf'},
  'prepare': {'dataset': 'folder', 'source': 'IN', 'data_dir': 'out'},
}


class Case(NamedTuple):
  """A command line and its input.

  make: function of the folder IN that adds files to those that are always there. may_pass: whether
  the input may still be valid.
  """

  command: str
  what: str
  arguments: list[str | bytes]
  make: Callable[[pathlib.Path], None] | None = None
  may_pass: bool = False


def case(command, what, changes=None, extra=(), make=None, may_pass=False) -> Case:
  """The good command line of a command with some flags changed; None leaves a flag out."""
  values = {**GOOD[command]}
  for name, value in (changes or {}).items():
    values.pop(name, None)
    if value is not None:
      values[name] = value
  arguments = []
  for name, value in values.items():
    if isinstance(value, bytes):
      arguments.append(b'--' + name.encode() + b'=' + value)
    else:
      arguments.append(f'--{name}' if value is None else f'--{name}={value}')
  return Case(command, what, [*arguments, *extra], make, may_pass)


# Listed cases.

REQUIRED = {
  'main': ('config', 'workdir'),
  'generate': ('model', 'prompt', 'output'),
  'describe': ('model', 'image'),
  'score': ('model', 'text', 'image'),
  'probe': ('config', 'model', 'output'),
  'replay': ('workdir', 'step'),
  'plan': ('config', 'topology'),
  'study': ('config', 'output'),
  'pretrain': ('workdir',),
  'scenes': ('show', 'output'),
  'effect': ('workdirs',),
  'evaluate': ('model', 'output'),
  'benchmark': ('config',),
  'convert': ('source', 'target', 'format'),
  'prepare': ('dataset', 'source', 'data_dir'),
}
OUTPUTS = {
  'main': 'workdir',
  'generate': 'output',
  'probe': 'output',
  'replay': 'output',
  'study': 'output',
  'pretrain': 'workdir',
  'scenes': 'output',
  'effect': 'output',
  'evaluate': 'output',
  'convert': 'target',
  'prepare': 'data_dir',
}
# Values of single flags.
VALUES = [
  ('generate', 'num_samples', ('0', '-1', '1.5', 'x', '1e3', '99999999999999999999', '1000000000')),
  ('generate', 'temperature', ('-1', 'nan', 'inf', 'hot')),
  ('generate', 'cfg_weight', ('-1', 'nan', 'inf', '')),
  ('generate', 'seed', ('-1', '4294967296', '')),
  ('generate', 'prompt', (' ', 'a <|User|> b', 'word ' * 30000, b'a red \xff disc')),
  ('generate', 'model', ('nowhere', 'IN', 'IN/picture.png', '', '/dev/zero', 'a/b/c')),
  ('describe', 'image', ('nowhere.png', 'IN', '/dev/zero', 'IN/pipe', 'IN/empty', '', b'caf\xe9')),
  ('describe', 'question', (' ', '<|Assistant|>', 'why ' * 30000, b'\xff')),
  ('describe', 'max_tokens', ('0', '-3', 'many', '99999999999')),
  ('score', 'text', ('', ' ', '<|User|>', 'word ' * 30000)),
  ('score', 'image', ('IN/text.txt', '/proc/self/mem', 'IN/pipe', '~nobody_at_all/x.png')),
  ('probe', 'num_inputs', ('1', '0', '-5', 'x', '1000000000000')),
  ('probe', 'seed', ('-1', '4294967296')),
  ('replay', 'step', ('0', '-1', '99', 'x', '1.5')),
  ('replay', 'input', ('-1', '99', 'x')),
  ('replay', 'objective', ('nonsense',)),
  ('replay', 'scorer', ('nonsense',)),
  ('replay', 'reward', ('nonsense', '2*', 'dual+')),
  ('replay', 'workdir', ('nowhere', 'IN', 'IN/picture.png')),
  ('plan', 'topology', ('', 'nonsense', 'v5e', 'v5e:0x0', 'v5e:-1x8', 'h200:0', 'h200:x')),
  ('study', 'variants', ('nonsense',)),
  ('study', 'seeds', ('-1', 'x', '1.5')),
  ('study', 'bases', ('nonsense', 'a/b=scenes')),
  ('study', 'lanes', ('0', '-1', 'x')),
  ('scenes', 'show', ('0', '-1', '2000000000', 'x')),
  ('scenes', 'entropy', ('0', '-1', 'x', '1000000000000')),
  ('scenes', 'seed', ('-1', 'x')),
  ('effect', 'workdirs', ('nowhere', 'IN', 'IN/run,nowhere', ',')),
  ('benchmark', 'repeats', ('0', '-1', 'x', '1000000000')),
  ('benchmark', 'phases', ('nonsense', 'draw,nonsense')),
  ('prepare', 'dataset', ('nonsense', '')),
  ('prepare', 'source', ('nowhere', 'IN/text.txt', 'IN/empty_folder', 'IN/pipe', 'IN/empty')),
  ('prepare', 'workers', ('0', '-1', 'x')),
  ('prepare', 'name', ('A', '../x', 'a/b')),
  ('evaluate', 'benchmarks', ('nonsense',)),
  ('evaluate', 'best_of', ('0', '-1', 'x')),
  ('convert', 'format', ('', 'gguf', 'peft')),
  ('convert', 'dtype', ('int8', 'float')),
  ('convert', 'source', ('nowhere', 'IN', 'IN/picture.png', '/dev/zero')),
  ('pretrain', 'config.lm.batch', ('0', '-1', 'x')),
  ('pretrain', 'config.save_every', ('0', 'x')),
  ('pretrain', 'config.lm.learning_rate', ('nan', '-1', 'inf')),
  ('main', 'wait_seconds', ('nan', '-1', '0', 'soon')),
  ('main', 'process', ('-1', '0', 'x')),
  ('main', 'coordinator', ('nonsense', 'host:port', ':1', 'localhost:99999')),
  ('main', 'config', ('nowhere.py', 'IN', 'IN/text.txt', 'scenes_tiny:v5e', '$NOT_SET/c.py', '')),
  ('main', 'config.data.prompts', ('nowhere.txt', 'IN', 'IN/pipe', 'IN/empty', 'IN/picture.png')),
  ('main', 'config.data.images', ('nowhere', 'IN/empty_folder', 'IN/text.txt', '$NOT_SET/x')),
  ('main', 'config.model', ('', 'nowhere', 'IN', 'IN/run')),
  ('main', 'config.system.bucket', ('IN/picture.png', '$NOT_SET')),
]


def written_down() -> list[Case]:
  """The cases that are the same for every seed, the most informative first."""
  cases = []
  for command, names in REQUIRED.items():
    cases.append(case(command, 'unknown flag', extra=['--nonsense=1']))
    cases.append(case(command, 'stray word', extra=['word']))
    cases += [case(command, f'no --{name}', {name: None}) for name in names]
  for command, flag in OUTPUTS.items():
    for place in ('/proc/x', 'IN/picture.png/x', 'IN/circle'):
      cases.append(case(command, f'{flag} {place}', {flag: place}))
  for command, flag, values in VALUES:
    for value in values:
      drop = {'config': {}, 'entropy': {'show': None}}.get(flag, {})
      shown = repr(value)[:40]
      cases.append(case(command, f'{flag} {shown}', {**drop, flag: value}))
  return cases


# Cases made from a seed.


def seeded(seed: int, index: int) -> Case:
  """Case `index` of a seed."""
  rng = random.Random(f'{seed} {index}')
  return MAKERS[index % len(MAKERS)](rng)


BAD_VALUES = ('x', '', 'None', '[1, 2]', '1e999', 'nan', '-inf', '1.5', '{}', '-7')


def override(rng):
  """A configuration key set to a value that is seldom valid."""
  keys = saved_config.flat(saved_config.to_json(Config()))
  key, value = rng.choice(sorted(keys)), rng.choice(BAD_VALUES)
  return case('plan', f'{key}={value}', extra=[f'--config.{key}={value}'], may_pass=True)


def config_file(rng):
  """A config file with a line changed, duplicated or removed, or with damaged bytes."""
  lines = pathlib.Path(TINY).read_text(encoding='utf-8').splitlines()
  at = rng.randrange(len(lines))
  way = rng.choice(('value', 'value', 'lost', 'doubled', 'bytes', 'raises', 'returns'))
  if way == 'value':
    at = rng.choice([i for i, line in enumerate(lines) if ' = ' in line])
    value = rng.choice(('None', "'x'", '-1', '0', 'float("nan")', '[]', 'object()', '10**30', 'm'))
    lines[at] = f'{lines[at].rpartition(" = ")[0]} = {value}'
  elif way == 'lost':
    del lines[at]
  elif way == 'doubled':
    lines.insert(at, f' {lines[at]}')
  elif way == 'raises':
    lines.append(f'raise {rng.choice(("ValueError(7)", "OSError", "SystemExit(0)", "Exception"))}')
  elif way == 'returns':
    lines[-1] = f'  return {rng.choice(("None", "{}", "m", "get_config()", "1 / 0"))}'
  text = '\n'.join(lines).encode()
  if way == 'bytes':
    text = rng.choice(fuzz_pictures.DAMAGES)(rng, text, b'\0' * 64)

  def make(folder):
    (folder / 'config.py').write_bytes(text)

  command = rng.choice(('plan', 'plan', 'evaluate', 'probe', 'main'))
  if command == 'plan':
    return case('plan', f'config: {way}', {'config': 'IN/config.py'}, make=make, may_pass=True)
  # In case the file is still valid, something else is wrong too.
  missing = {'evaluate': 'model', 'probe': 'model', 'main': 'config.model'}[command]
  changes = {'config': 'IN/config.py', missing: 'nowhere'}
  return case(command, f'config: {way}', changes, make=make)


JSON_VALUES = (None, True, 'x', '', -1, 0, 1.5, 1e999, 10**12, [], {}, [[]], 'a' * 10000)


def changed_json(rng, tree):
  """A JSON tree with one value, anywhere in it, changed or removed; and what was done, in words."""
  places = []

  def walk(node, path):
    inner = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in list(inner)[:200]:
      places.append((node, key, [*path, str(key)]))
      if isinstance(value, dict | list):
        walk(value, [*path, str(key)])

  walk(tree, [])
  node, key, path = rng.choice(places)
  if rng.random() < 0.2:
    del node[key]
    return f'{".".join(path)} lost'
  node[key] = rng.choice(JSON_VALUES)
  return f'{".".join(path)}={str(node[key])[:20]!r}'


def damaged_text(rng, text: bytes) -> bytes:
  ways = (
    lambda: text[: rng.randrange(len(text))],
    lambda: b'',
    lambda: b'[' * 20000,
    lambda: text.decode('utf-8', 'replace').encode('utf-16'),
    lambda: rng.choice(fuzz_pictures.DAMAGES)(rng, text, b'\0' * 64),
  )
  return rng.choice(ways)()


def model_directory(rng):
  """The embedded model with a file changed, damaged or removed."""
  source = pathlib.Path(locate.EMBEDDED)
  name = rng.choice(
    ('config.json', 'config.json', 'config.json', 'tokenizer.json', 'tokenizer_config.json')
    + ('processor_config.json', 'generation_config.json', 'model.safetensors', 'model.safetensors')
  )
  way = rng.choice(('changed', 'changed', 'changed', 'damaged', 'lost', 'a folder'))
  seed = rng.random()

  def make(folder):
    inner = random.Random(seed)
    shutil.copytree(source, folder / 'model')
    path = folder / 'model' / name
    if not path.exists():
      path.write_text('{')
      return
    data = path.read_bytes()
    if way in ('lost', 'a folder'):
      path.unlink()
      if way == 'a folder':
        path.mkdir()
    elif name == 'model.safetensors':
      head = 8 + int.from_bytes(data[:8], 'little')
      damaged = damaged_text(inner, data[: head + 64])
      path.write_bytes(damaged + (data[head + 64 :] if way == 'changed' else b''))
    elif way == 'changed' and name != 'tokenizer.json':
      tree = json.loads(data)
      changed_json(inner, tree)
      path.write_text(json.dumps(tree))
    else:
      path.write_bytes(damaged_text(inner, data))

  command, flag = rng.choice((('convert', 'source'), ('score', 'model'), ('plan', 'config.model')))
  changes = {flag: 'IN/model'}
  if command == 'score':  # in case the model is still valid, the text is not
    changes['text'] = '<|User|>'
  return case(command, f'model: {name} {way}', changes, make=make, may_pass=command != 'score')


def run_folder(rng):
  """A finished run with a file changed, damaged or removed."""
  names = ('summary.json', 'evaluations/000000.json', 'evaluations/000003.json')
  name = rng.choice((*names, 'config.json', 'metrics.jsonl'))
  seed, way = rng.random(), rng.choice(('changed', 'damaged', 'lost'))

  def make(folder):
    inner = random.Random(seed)
    path = folder / 'run' / name
    data = path.read_bytes()
    if way == 'lost':
      path.unlink()
    elif way == 'changed' and name != 'metrics.jsonl':
      tree = json.loads(data)
      changed_json(inner, tree)
      path.write_text(json.dumps(tree))
    else:
      path.write_bytes(damaged_text(inner, data))

  if name in names:
    return case('effect', f'run: {name} {way}', make=make, may_pass=True)
  # In case the run is still valid, it has no such step.
  return case('replay', f'run: {name} {way}', {'step': '77'}, make=make)


@functools.cache
def _originals():
  return fuzz_pictures.originals()


def picture(rng):
  """A damaged image. A valid one has a size that no image of Scenes has; but damage may make an
  ICNS show another of its icons, whose sides are multiples of 32.
  """
  files = _originals()
  name, data, kind = fuzz_pictures.case(files, rng.randrange(2**32), rng.randrange(2**32))

  def make(folder):
    (folder / 'damaged').write_bytes(data)

  changes = {'show': None, 'output': None, 'judge': 'IN/damaged', 'prompt': 'a red disc'}
  return case('scenes', f'{name}: {kind}', changes, make=make, may_pass=name == 'ICNS')


def codes(rng):
  """A JSON file of image codes with something wrong."""
  count, book = 64, 512  # of the embedded model
  found = [rng.randrange(book) for _ in range(count)]
  wrong = (
    lambda: found[: rng.randrange(count)],
    lambda: found + [0],
    lambda: [*found[:-1], rng.choice((book, 10**20, -1, 0.5, None, 'x', True, [1]))],
    lambda: {'codes': {}},
    lambda: {'samples': [{}]},
    lambda: {'samples': []},
    lambda: {'image_codes': found[:-1]},
    lambda: rng.choice((None, 1, 'x', {}, [])),
  )
  text = json.dumps(rng.choice(wrong)()).encode()
  text = damaged_text(rng, json.dumps(found).encode()[:-1]) if rng.random() < 0.3 else text

  def make(folder):
    (folder / 'codes.json').write_bytes(text)

  return case('score', 'image codes', {'image': None, 'image_codes': 'IN/codes.json'}, make=make)


def prompt(rng):
  """An invalid text, given to a command or as a line of a file."""
  special = ('<|User|>', '<|Assistant|>', '<begin_of_image>', '<|end_of_sentence|>')
  bad = rng.choice(
    (
      rng.choice((' ', '\t', '\u200b', '\ufeff', '\u2060 \u200b', '\xa0')),
      ' '.join(rng.choices(('red', 'disc', 'and', 'a'), k=rng.randrange(20000, 50000))),
      ''.join(rng.choices('abcdefgh \u00e9\u4e2d\U0001f600', k=100_000)),
      f'a red {rng.choice(special[:2])} disc',
      bytes(rng.choices((0xFF, 0xFE, 0xC3, 0x20, 0x61), k=20)) + b'\xff',
    )
  )
  if isinstance(bad, str) and rng.random() < 0.4:

    def make(folder):
      (folder / 'prompts.txt').write_text(f'{bad}\n', encoding='utf-8')

    return case('main', 'prompt file', {'config.data.prompts': 'IN/prompts.txt'}, make=make)
  command, flag = rng.choice((('generate', 'prompt'), ('score', 'text')))
  return case(command, f'{flag} {bad[:20]!r}', {flag: bad})


MAKERS = (override, config_file, model_directory, run_folder, picture, codes, prompt)

# Running the cases.


def prepare(folder: pathlib.Path, run: pathlib.Path):
  """Writes the files that every case is given."""
  pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
  Image.fromarray(pixels).save(folder / 'picture.png')
  (folder / 'text.txt').write_text('words\n')
  (folder / 'empty').write_text('')
  (folder / 'empty_folder').mkdir()
  (folder / 'circle').symlink_to('circle')
  os.mkfifo(folder / 'pipe')
  shutil.copytree(run, folder / 'run')


def state(folder: pathlib.Path) -> dict[str, str]:
  """{path: hash} of a folder."""
  found = {}
  for path in sorted(folder.rglob('*')):
    plain = path.is_file() and not path.is_symlink()
    found[str(path.relative_to(folder))] = (
      hashlib.sha256(path.read_bytes()).hexdigest() if plain else ''
    )
  return found


def child(item: Case, given: pathlib.Path, here: pathlib.Path):
  """Runs the command in the fork as `python -m` does. Does not return."""
  status = 1
  try:
    os.chdir(here)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    for number, name in ((1, 'stdout'), (2, 'stderr')):
      os.dup2(os.open(given.parent / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    places = [os.fsencode(a).replace(b'IN', os.fsencode(given)) for a in item.arguments]
    for name in OWN_FLAGS:
      delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
    sys.argv = [f'{item.command}.py', *map(os.fsdecode, places)]
    module = importlib.import_module(COMMANDS[item.command])
    cli.run_main(module.main, module.define_flags)
  except SystemExit as e:
    status = e.code or 0
  except BaseException:
    traceback.print_exc()
  sys.stdout.flush()
  os._exit(status)


def outcome(item: Case, run: pathlib.Path) -> tuple[str, float]:
  """'refused', 'accepted' or what is wrong; and the seconds of CPU time."""
  with tempfile.TemporaryDirectory() as folder:
    given, here = pathlib.Path(folder) / 'in', pathlib.Path(folder) / 'here'
    given.mkdir()
    here.mkdir()
    prepare(given, run)
    if item.make:
      item.make(given)
    before = state(given)
    pid = os.fork()
    if not pid:
      child(item, given, here)
    ended, computed, since = 0, 0.0, time.monotonic()
    while not ended and time.monotonic() < since + IDLE_SECONDS:
      time.sleep(0.01)
      ended, status, used = os.wait4(pid, os.WNOHANG)
      if not ended:
        waiting, seconds = looked_at(pid)
        if not waiting or seconds > computed:
          computed, since = seconds, time.monotonic()
    if not ended:
      os.kill(pid, 9)
      os.waitpid(pid, 0)
      return 'wrong: it waits', computed
    said = (given.parent / 'stderr').read_text(errors='replace')
    left = sorted(os.listdir(here))
    seconds = used.ru_utime + used.ru_stime
    return judged(item, status, said, left, state(given) == before), seconds


def looked_at(pid: int) -> tuple[bool, float]:
  """Whether a process waits for anything other than a CPU, and its seconds of CPU time."""
  words = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
  return words[0] != 'R', (int(words[11]) + int(words[12])) / os.sysconf('SC_CLK_TCK')


def judged(item: Case, status: int, said: str, left: list[str], untouched: bool) -> str:
  """The outcome, from what a process left."""
  if os.WIFSIGNALED(status):
    return f'wrong: it ended by signal {os.WTERMSIG(status)}: {said[-300:]}'
  code = os.waitstatus_to_exitcode(status)
  if 'Traceback' in said:
    return f'wrong: a traceback: {said[-1500:]}'
  if not untouched:
    return 'wrong: it changed what it was given'
  if code == 0 and item.may_pass:
    return 'accepted'
  if code != 2:
    return f'wrong: status {code}: {said[-300:]}'
  lines = said.splitlines()
  if not lines or not lines[-1].startswith('error: '):
    return f'wrong: no sentence: {said[-300:]}'
  if sum(line.startswith('error: ') for line in lines) > 1:
    return f'wrong: more than one sentence: {said[-600:]}'
  return f'wrong: left behind: {left}' if left else 'refused'


def make_run(folder) -> pathlib.Path:
  """A finished run."""
  path = pathlib.Path(folder) / 'run'
  command = [sys.executable, '-m', 'dsr_jax.main', f'--config={TINY}', f'--workdir={path}']
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  if done.returncode:
    raise SystemExit(done.stderr[-2000:])
  return path


def cases(seed: int) -> list[Case]:
  """150 of the listed cases, spread over all of them, and 150 cases made from the seed."""
  fixed = written_down()
  fixed = [fixed[i * len(fixed) // 150] for i in range(150)]
  return fixed + [seeded(seed, i) for i in range(150)]


def main(argv, f=flags.FLAGS):
  """Prints the results as JSON."""
  cli.no_arguments(argv)
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  with tempfile.TemporaryDirectory() as folder:
    run = pathlib.Path(f.run) if f.run else make_run(folder)
    for module in COMMANDS.values():
      importlib.import_module(module)
    chosen = written_down() if f.all else cases(f.seed)
    chosen = list(enumerate(chosen))[f.first : f.first + f.count]
    if f.cases:
      chosen = [(i, item) for i, item in chosen if str(i) in f.cases]
    rows = []
    for index, item in chosen:
      found, seconds = outcome(item, run)
      rows.append((item, found, seconds))
      if found.startswith('wrong'):
        cli.log(f'{index} {item.command} {item.what}\n  {found}')
      print(f'{len(rows)} of {len(chosen)}', end='\r', file=sys.stderr, flush=True)
  wrong = [(item, found) for item, found, _ in rows if found.startswith('wrong')]
  cli.print_json(
    {
      'seed': f.seed,
      'cases': len(rows),
      'outcomes': Counter(found.partition(':')[0] for _, found, _ in rows),
      'commands': Counter(item.command for item, _, _ in rows),
      'longest_cpu_seconds': round(max(seconds for _, _, seconds in rows), 1),
      'wrong': [{'command': i.command, 'what': i.what, 'found': found} for i, found in wrong],
    }
  )
  return int(bool(wrong))


def define_flags(f=flags.FLAGS):
  flags.DEFINE_integer('seed', 0, 'Seed of the generated half.', flag_values=f)
  flags.DEFINE_integer('first', 0, 'Number of the first case.', flag_values=f)
  flags.DEFINE_integer('count', 300, 'Number of cases.', flag_values=f)
  flags.DEFINE_list('cases', [], 'Run only the cases with these numbers.', flag_values=f)
  flags.DEFINE_bool('all', False, 'Run all listed cases and no others.', flag_values=f)
  flag_types.define_path('run', '', 'A finished run of scenes_tiny (default: make one).', f)


if __name__ == '__main__':
  cli.run_main(main, define_flags)
