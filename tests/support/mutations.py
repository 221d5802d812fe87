"""Model directories, run folders and configs with a fault or a few, drawn from a seed.

As a program it looks for what no sentence answers:

  python tests/support/mutations.py SEED CASES
"""

import copy
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback

import numpy as np

from dsr_jax import config as config_lib
from dsr_jax import config_loading, convert, saved_config
from dsr_jax.convert import locate, tokenizer_files
from dsr_jax.errors import InputError
from dsr_jax.models.janus import model as janus
from dsr_jax.models.janus.config import JanusConfig
from dsr_jax.replay import past_step

SECONDS = 2.0  # that a case may compute; others may be at work on the machine too
HANGS = 120  # seconds after which a case is given up
TEXTS = ['a red circle left of a blue square', 'Is there a red disc?', 'yes'] * 20
# Values that nobody expects; the last ones as raw JSON.
ODD = (
  None,
  True,
  False,
  0,
  -1,
  1,
  3,
  2**31,
  10**12,
  10**30,
  0.5,
  -0.0,
  '',
  'x',
  '32',
  [],
  {},
  [[]],
)
ODD += ([1, 2], {'a': 1}, ['x'], {'type': 'linear'}, 'é\u2581', 'y' * 5000, 1e300, 1e-300)
RAW = (
  '1e999',
  '1' * 400,
  '-1e999',
  'NaN',
  'Infinity',
  '[' * 10_000 + ']' * 10_000,
  '1' * 5000,
  '"\\ud800"',
)
LFS = b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n'
PLACE = '"<here>"'  # where raw JSON comes in


def make_directories(folder: pathlib.Path) -> list[pathlib.Path]:
  """The tiny model in both layouts, whole."""
  config, words = JanusConfig.tiny(), folder / 'words'
  tokenizer_files.make_tokenizer(TEXTS, 300, words, image_size=16, patch_size=4)
  _, params = janus.create(config, 0)
  made = []
  for layout in ('hf', 'deepseek'):
    made.append(folder / layout)
    convert.save(made[-1], config, params, words, layout=layout)
  return made


# One case.


def mutated(rng: random.Random, directory: pathlib.Path, target: pathlib.Path) -> str:
  """A copy of a model directory with one fault to three; returns what they are."""
  target.mkdir()
  for path in directory.rglob('*'):
    if path.is_file():
      copied = target / path.relative_to(directory)
      copied.parent.mkdir(exist_ok=True)
      os.link(path, copied)
  said = []
  for _ in range(rng.choice((1, 1, 1, 2, 3))):
    files = sorted(p for p in target.rglob('*') if p.is_file() and p.stat().st_size)
    jsons = [p for p in files if p.suffix == '.json']
    path = rng.choice(jsons if jsons and rng.random() < 0.7 else files)
    kinds = [_cut, _replace]
    if path.suffix == '.json':
      kinds += [_change_json] * 6
    if path.suffix == '.safetensors':
      kinds += [_change_tensors] * 4
    data = path.read_bytes()
    path.unlink()  # else the original would change with it
    said.append(f'{path.name}: {rng.choice(kinds)(rng, path, data)}')
  return '; '.join(said)


def _cut(rng, path, data):
  place = rng.randrange(len(data))
  if rng.random() < 0.5:
    path.write_bytes(data[:place])
    return f'cut after {place} bytes'
  noise = bytes(rng.randrange(256) for _ in range(rng.choice((1, 8, 64))))
  path.write_bytes(data[:place] + noise + data[place + len(noise) :])
  return f'{len(noise)} bytes of noise at {place}'


def _replace(rng, path, data):
  kind = rng.choice(('gone', 'empty', 'folder', 'dangling', 'pointer', 'other', 'list', 'pipe'))
  if kind == 'folder':
    path.mkdir()
  elif kind == 'dangling':
    path.symlink_to('nowhere')
  elif kind == 'pipe':
    os.mkfifo(path)
  elif kind != 'gone':
    content = dict(empty=b'', pointer=LFS, other=b'\xff\xfe\x00', list=b'[1, 2]')[kind]
    path.write_bytes(content)
  return kind


def _change_json(rng, path, data):
  try:
    tree = json.loads(data)
  except (ValueError, RecursionError):
    return _cut(rng, path, data)
  text, said = changed_json(rng, tree)
  path.write_text(text, encoding='utf-8', errors='surrogatepass')
  return said


def changed_json(rng, tree) -> tuple[str, str]:
  """A JSON text with one value changed, added or taken away, and what was done."""
  tree = copy.deepcopy(tree)
  node, key = _somewhere(rng, tree)
  if key is None:
    return json.dumps(rng.choice(ODD)), 'another value'
  where = f'{key!r}'[:40]
  kind = rng.random()
  if kind < 0.15:
    del node[key]
    return json.dumps(tree), f'without {where}'
  if kind < 0.3:
    node[key] = PLACE.strip('"')
    raw = rng.choice(RAW)
    return json.dumps(tree).replace(PLACE, raw, 1), f'{where} = {raw[:20]}'
  node[key] = rng.choice(ODD)
  if kind > 0.9 and isinstance(node, dict):
    node[str(rng.choice(ODD))[:20]] = node.pop(key)
  return json.dumps(tree), f'{where} = {node.get(key) if isinstance(node, dict) else node[key]!r}'[
    :80
  ]


def _somewhere(rng, tree):
  """(node, key) of a random value, deep ones as likely as others."""
  node, key = None, None
  here = tree
  while isinstance(here, (dict, list)) and here and (key is None or rng.random() < 0.7):
    node = here
    key = rng.choice(list(here)) if isinstance(here, dict) else rng.randrange(len(here))
    here = node[key]
  return node, key


def _change_tensors(rng, path, data):
  size = int.from_bytes(data[:8], 'little')
  header, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
  name = rng.choice([name for name in header if name != '__metadata__'])
  info = header[name]
  kind = rng.choice(('number', 'number', 'shape', 'dtype', 'name', 'layer', 'odd'))
  if kind == 'number':
    first, end = info['data_offsets']
    bad = np.array(rng.choice((np.nan, np.inf, -np.inf, 1e38)), np.float32).tobytes()
    place = first + 4 * rng.randrange(max(1, (end - first) // 4))
    body[place : place + 4] = bad
  elif kind == 'shape':
    info['shape'] = rng.choice(([], [1], info['shape'][::-1], [*info['shape'], 1], [2**40, 0]))
  elif kind == 'dtype':
    info['dtype'] = rng.choice(('I32', 'F16', 'BF16', 'F64', 'F8_E4M3', 'nonsense', 3))
  elif kind == 'name':
    header[rng.choice((name + 'x', '', 'model.' + name))] = header.pop(name)
  elif kind == 'layer':
    header[name.replace('.0.', f'.{rng.choice((7, 10**7, 10**30))}.')] = header.pop(name)
  else:
    header[name] = rng.choice(ODD)
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)
  path.write_bytes(len(text).to_bytes(8, 'little') + text + bytes(body))
  return f'{kind} of {name}'


def look(directory: pathlib.Path):
  """What every command does with a model directory before it computes."""
  located = locate.locate(str(directory))
  method = locate.method_of(located)
  bundle = convert.load(located.directory, lambda leaf: leaf)
  bundle.processor.encode_prompt('a red circle')
  bundle.processor.encode_question(method.question)
  bundle.processor.pad([[1, 2]], 4)


def look_at_config(rng: random.Random, folder: pathlib.Path) -> str:
  """Reads a configuration with odd values, as a file and as a run's config.json; returns what they
  are.
  """
  tree = saved_config.to_json(config_lib.Config())
  text, said = changed_json(rng, tree)
  (folder / 'config.json').write_text(f'{{"config": {text}, "about": {text}}}', errors='replace')
  for read in (lambda: past_step.read_run(str(folder)), lambda: _as_file(rng, folder, text)):
    try:
      read()
    except InputError:
      pass
  return said


def _as_file(rng, folder, text):
  source = f'import ml_collections, json\n\ndef get_config():\n  return json.loads({text!r})\n'
  if rng.random() < 0.5:
    source = source.replace('return ', 'return ml_collections.ConfigDict(') + ')'
  if rng.random() < 0.2:
    place = rng.randrange(len(source))
    source = source[:place] + rng.choice(('(', '\0', '\t', 'é', '1/0\n')) + source[place + 1 :]
  (folder / 'own.py').write_text(source, errors='replace')
  config_loading.load(str(folder / 'own.py'))


def run(seed: int, cases: int, folder: pathlib.Path):
  """Yields (case, what it was, its seconds, the error that is no InputError or None)."""
  signal.signal(signal.SIGALRM, _give_up)
  directories = make_directories(folder)
  for case in range(cases):
    rng = random.Random(f'{seed} {case}')
    here = folder / 'case'
    shutil.rmtree(here, ignore_errors=True)
    said, error, began = '', None, time.process_time()
    signal.alarm(HANGS)
    try:
      if rng.random() < 0.25:
        here.mkdir()
        said = look_at_config(rng, here)
      else:
        said = mutated(rng, rng.choice(directories), here)
        began = time.process_time()
        look(here)
    except InputError as e:
      said += f' -> {e}'
      if '\n' in str(e) or len(str(e)) > 4000:
        error = e
    except BaseException as e:
      if isinstance(e, KeyboardInterrupt):
        raise
      error = e
    signal.alarm(0)
    yield case, said, time.process_time() - began, error


def _give_up(*_):
  raise TimeoutError('it hangs')


def main(seed, cases):
  slow = 0.0
  with tempfile.TemporaryDirectory() as folder:
    for case, said, seconds, error in run(int(seed), int(cases), pathlib.Path(folder)):
      slow = max(slow, seconds)
      if error is not None or seconds > SECONDS:
        print(f'--- {case} ({seconds:.1f} s) {said[:600]}', flush=True)
        if error is not None:
          traceback.print_exception(error, limit=-4)
    print(f'{cases} cases, the slowest {slow:.2f} s')


if __name__ == '__main__':
  main(*sys.argv[1:])
