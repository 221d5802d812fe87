"""Kills a real evaluation of the embedded model and compares what it leaves with an unbroken one's:
every file, byte for byte.

  python -m benchmarks.kills_evaluate [--kills=10 --seed=0 --limit=4]

Draws prompts of GenEval and answers tables as POPE's and MMBench's about pictures of Scenes, then
scores the answers. Every kill is SIGKILL shortly after so many files are there, a number drawn from
all of them, then the same command again on what the kill left. Pictures, rewards, answers and
manifests that were complete at a kill must be untouched in the end: nothing is made twice. Prints
one JSON object; exits with 1 where anything differs.
"""

import base64
import csv
import io
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time

from absl import app, flags
from PIL import Image

from dsr_jax import cli
from dsr_jax.scenes import sets

ROOT = pathlib.Path(__file__).resolve().parent.parent
PICTURES = 24  # asked about, three questions each
KEPT = ('.png', 'metadata.jsonl', 'manifest.json')


def write_tables(folder: pathlib.Path):
  """POPE.tsv and MMBench_DEV_EN.tsv about pictures of Scenes."""
  scenes, rows = sets.evaluation_pope(PICTURES)
  pictures = [_base64(pixels) for pixels in sets.pictures(scenes)]
  table, owner = [], {}
  for index, row in enumerate(rows):
    image = owner.setdefault(row.picture, index)
    image = pictures[row.picture] if image == index else image
    table.append([index, row.text, image, row.answer.capitalize(), 'random'])
  _write(folder / 'POPE.tsv', ['index', 'question', 'image', 'answer', 'category'], table)
  table = []
  for rotation in range(2):
    for i, picture in enumerate(pictures):
      image = i if rotation else picture
      options = ('disc', 'ring') if rotation else ('ring', 'disc')
      index = i + 1_000_000 * rotation
      table.append([index, 'What is shown?', image, 'A', *options, 'shapes', 'dev'])
  columns = ['index', 'question', 'image', 'answer', 'A', 'B', 'category', 'split']
  _write(folder / 'MMBench_DEV_EN.tsv', columns, table)


def _base64(pixels) -> str:
  out = io.BytesIO()
  Image.fromarray(pixels).save(out, 'PNG')
  return base64.b64encode(out.getvalue()).decode()


def _write(path, columns, rows):
  with open(path, 'w', encoding='utf-8', newline='') as f:
    csv.writer(f, delimiter='\t').writerows([columns, *rows])


class Evaluation:
  """One process of the command, and what can be seen of it from outside."""

  def __init__(self, output, data, limit):
    command = [sys.executable, '-m', 'dsr_jax.evaluate', '--model=scenes', '--any_version']
    command += ['--benchmarks=geneval,pope,mmbench', f'--data={data}', f'--output={output}']
    command += [f'--limit={limit}', '--config=scenes', '--config.eval.chunk=8']
    command += ['--config.system.compute_dtype=float32']
    self.output, self.said_at = output, f'{output}.log'
    # GenEval's evaluators are not here: without a network that is a sentence at once.
    environment = {**os.environ, 'HF_HUB_OFFLINE': '1', 'JAX_PLATFORMS': 'cpu'}
    with open(self.said_at, 'w', encoding='utf-8') as log:
      self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

  def pieces(self) -> int:
    """How many files are complete."""
    names = (name for _, _, names in os.walk(self.output) for name in names)
    return sum(not name.endswith('.new') for name in names)

  def said(self) -> str:
    return pathlib.Path(self.said_at).read_text(encoding='utf-8', errors='replace')


def contents(folder) -> dict[str, bytes]:
  """{path: bytes} of all files."""
  root = pathlib.Path(folder)
  return {
    str(path.relative_to(root)): path.read_bytes() for path in root.rglob('*') if path.is_file()
  }


def times(folder) -> dict[str, int]:
  """{path: when it was written} of what must be made once only."""
  root = pathlib.Path(folder)
  return {
    str(path.relative_to(root)): path.stat().st_mtime_ns
    for path in root.rglob('*')
    if path.name.endswith(KEPT) or path.parent.name in ('answers', 'rewards')
  }


def broken(output, data, limit, goals, rng) -> tuple[list[dict], list[str]]:
  """Runs to the end over all kills, each once so many files are there; (moments, files that were
  written a second time).
  """
  moments: list[dict] = []
  again: list[str] = []
  kept: dict[str, int] = {}
  while True:
    run = Evaluation(output, data, limit)
    begun = time.time()
    goal = goals.pop(0) if goals else None
    while goal is not None and run.process.poll() is None:
      if run.pieces() >= goal:
        time.sleep(rng.uniform(0, 0.05))
        run.process.kill()
        run.process.wait()
        moments.append({'files': run.pieces(), 'after_s': round(time.time() - begun, 1)})
        cli.log(f'kill {len(moments)}: {moments[-1]}')
        break
      time.sleep(0.005)
    status = run.process.wait()
    now = times(output)
    again += [path for path, when in kept.items() if now.get(path) != when]
    kept = now
    if status == 0:
      return moments, again
    if status > 0:
      raise SystemExit(f'the command failed by itself: {run.said()[-2000:]}')


def main(argv, f=flags.FLAGS):
  """Prints what was compared, as JSON."""
  cli.no_arguments(argv)
  rng = random.Random(f.seed)
  with tempfile.TemporaryDirectory() as folder:
    data = pathlib.Path(folder, 'data')
    data.mkdir()
    write_tables(data)
    whole = Evaluation(os.path.join(folder, 'whole'), data, f.limit)
    if whole.process.wait():
      raise SystemExit(whole.said()[-2000:])
    wanted = contents(whole.output)
    goals = sorted(rng.sample(range(1, len(wanted)), f.kills))
    output = os.path.join(folder, 'broken')
    moments, again = broken(output, data, f.limit, goals, rng)
    found = contents(output)
  # Only the sentence about what could not be scored names the folder.
  found, wanted = ({k: _without_folder(v) for k, v in x.items()} for x in (found, wanted))
  different = [
    path for path in sorted(wanted.keys() | found.keys()) if found.get(path) != wanted.get(path)
  ]
  result = {
    'kills': len(moments),
    'seed': f.seed,
    'files': len(wanted),
    'different': different,
    'made_twice': again,
    'moments': moments,
  }
  print(json.dumps(result, indent=2))
  sys.exit(bool(different or again or len(moments) < f.kills))


def _without_folder(data: bytes) -> bytes:
  return re.sub(rb'/\S*/(whole|broken)/', b'', data)


def define_flags(f=flags.FLAGS):
  flags.DEFINE_integer('kills', 10, 'How many.', flag_values=f)
  flags.DEFINE_integer('limit', 4, 'Prompts or questions of each category.', flag_values=f)
  flags.DEFINE_integer('seed', 0, 'Of the moments.', flag_values=f)


if __name__ == '__main__':
  define_flags()
  app.run(main)
