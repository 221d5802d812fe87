"""Kills a real evaluation of the embedded model, restarts it, and compares all files with those of
an uninterrupted one, byte for byte.

  python -m benchmarks.kills_evaluate [--kills=10 --seed=0 --limit=2]

Draws prompts of GenEval and T2I-CompBench, answers tables like POPE's and MMBench's about images of
Scenes, runs small evaluators with random weights on the images, and scores everything. Each kill is
a SIGKILL at most a second after a random number of new files exist, half of them while the
evaluators run; then the same command runs again on what is left. An evaluation that ends before all
kills were made is followed by another from the start. Images, rewards, answers, records and
manifests that were complete at a kill must be untouched at the end: nothing is made twice. Prints
one JSON object; exits with 1 if anything differs.
"""

import base64
import csv
import io
import json
import os
import pathlib
import platform
import random
import subprocess
import sys
import tempfile
import time

from absl import flags
import jax
from PIL import Image
import torch
import transformers

from dsr_jax import cli
from dsr_jax.evaluate import geneval
from dsr_jax.scenes import sets
from tests.support import tiny_evaluators

ROOT = pathlib.Path(__file__).resolve().parent.parent
PICTURES = 24  # images with three questions each
KEPT = ('.png', 'metadata.jsonl', 'manifest.json')
FOLDERS = ('answers', 'rewards', 'records')  # no file in these is written twice either
DRAWN = ('geneval', 't2i_compbench')


def write_tables(folder: pathlib.Path):
  """POPE.tsv and MMBench_DEV_EN.tsv about images of Scenes."""
  scenes, rows = sets.evaluation_pope(PICTURES)
  pictures = [_base64(pixels) for pixels in sets.pictures(scenes)]
  table, owner = [], {}
  for index, row in enumerate(rows):
    image = owner.setdefault(row.picture, index)
    image = pictures[row.picture] if image == index else image
    tracks = ('random', 'popular', 'adversarial')[index % 3]
    table.append([index, row.text, image, row.answer.capitalize(), tracks])
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


def write_evaluators(folder: pathlib.Path) -> dict[str, str]:
  """{kind: directory}; both detectors find something in every image, as the self-test requires."""
  folder.mkdir()
  made = {
    'mask2former': tiny_evaluators.mask2former(folder / 'mask2former', classes=80),
    'clip_colors': tiny_evaluators.clip(folder / 'clip_colors'),
    'clip': tiny_evaluators.clip(folder / 'clip', context=32),
    'blip': tiny_evaluators.blip(folder / 'blip'),
    'owlv2': tiny_evaluators.owlv2(folder / 'owlv2'),
  }
  detector = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(made['mask2former'])
  with torch.no_grad():
    detector.class_predictor.bias[geneval.object_names().index('cat')] += 9
  detector.save_pretrained(made['mask2former'])
  detector = transformers.Owlv2ForObjectDetection.from_pretrained(made['owlv2'])
  with torch.no_grad():
    detector.class_head.logit_shift.bias += 4
  detector.save_pretrained(made['owlv2'])
  return {name: str(directory) for name, directory in made.items()}


def _base64(pixels) -> str:
  out = io.BytesIO()
  Image.fromarray(pixels).save(out, 'PNG')
  return base64.b64encode(out.getvalue()).decode()


def _write(path, columns, rows):
  with open(path, 'w', encoding='utf-8', newline='') as f:
    csv.writer(f, delimiter='\t').writerows([columns, *rows])


class Evaluation:
  """One process of the command, and what is visible of it from outside."""

  def __init__(self, output, data, evaluators, limit):
    command = [sys.executable, '-m', 'dsr_jax.evaluate', '--model=scenes', '--any_version']
    command += [f'--benchmarks={",".join((*DRAWN, "pope", "mmbench"))}', f'--data={data}']
    command += [f'--evaluator.{name}={directory}' for name, directory in evaluators.items()]
    command += [f'--output={output}']
    command += [f'--limit={limit}', '--config=scenes', '--config.eval.chunk=8']
    command += ['--config.system.compute_dtype=float32']
    self.output, self.said_at = output, f'{output}.log'
    environment = {
      **os.environ,
      'HF_HUB_OFFLINE': '1',
      'JAX_PLATFORMS': 'cpu',
      # Each start compiles the same programs, which are not tested here.
      'JAX_COMPILATION_CACHE_DIR': str(data / 'programs'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'OMP_NUM_THREADS': '1',
    }
    with open(self.said_at, 'w', encoding='utf-8') as log:
      self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

  def pieces(self) -> int:
    """The number of complete files."""
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
  """{path: time of writing} of the files that must be written only once."""
  root = pathlib.Path(folder)
  return {
    str(path.relative_to(root)): path.stat().st_mtime_ns
    for path in root.rglob('*')
    if path.name.endswith(KEPT) or path.parent.name in FOLDERS
  }


def looked_at(folder) -> list[str]:
  """Images that are in more than one file of records."""
  twice = []
  for records in pathlib.Path(folder).rglob('records'):
    seen: set[str] = set()
    for path in records.iterdir():
      found = json.loads(path.read_bytes()).keys()
      twice += sorted(seen & found)
      seen |= found
  return twice


def next_goal(before: int, end: int, left: int, rng) -> int:
  """The number of files at which to kill: more than the `before` that exist at the start, so that
  every kill hits a process at work, and few enough that `left` further kills fit before `end`.
  """
  return before + rng.randint(1, max(1, (end - before) // (left + 1)))


def broken(start, output, ends, rng) -> tuple[list[dict], list[str]]:
  """Runs to the end with all kills. Returns (moments, files that were written a second time).

  ends: for each kill, (first, last): it comes between these numbers of files.
  """
  moments: list[dict] = []
  again: list[str] = []
  kept: dict[str, int] = {}
  while True:
    run = start(output)
    begun = time.time()
    goal = None
    if len(moments) < len(ends):
      first, last = ends[len(moments)]
      left = sum(end == (first, last) for end in ends[len(moments) + 1 :])
      goal = next_goal(max(run.pieces(), first), last, left, rng)
    while goal is not None and run.process.poll() is None:
      if run.pieces() >= goal:
        time.sleep(rng.uniform(0, 1))  # some hit the middle of the next work, some a write
        run.process.kill()
        if run.process.wait() == 0:
          break  # it had ended
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
      raise SystemExit(f'the command failed on its own: {run.said()[-2000:]}')


def main(argv, f=flags.FLAGS):
  """Prints the comparison as JSON."""
  cli.no_arguments(argv)
  rng = random.Random(f.seed)
  with tempfile.TemporaryDirectory() as folder:
    data = pathlib.Path(folder, 'data')
    data.mkdir()
    write_tables(data)
    evaluators = write_evaluators(pathlib.Path(folder, 'evaluators'))

    def start(output):
      return Evaluation(output, data, evaluators, f.limit)

    whole = start(os.path.join(folder, 'whole'))
    begun = time.time()
    if whole.process.wait():
      raise SystemExit(whole.said()[-2000:])
    seconds = time.time() - begun
    wanted = contents(whole.output)
    if json.loads(wanted['results.json'])['not_scored']:
      raise SystemExit(whole.said()[-2000:])
    answered = sum(not is_of_scoring(path) for path in wanted)
    half = f.kills // 2
    ends = [(0, answered)] * (f.kills - half) + [(answered, len(wanted) - 3)] * half
    moments: list[dict] = []
    again: list[str] = []
    different: list[str] = []
    evaluations = 0
    while len(moments) < f.kills:  # one may end before all its kills, as files come in bursts
      output = os.path.join(folder, f'broken{evaluations}')
      killed_at, twice = broken(start, output, ends[len(moments) :], rng)
      moments += killed_at
      found = contents(output)
      again += twice + looked_at(output)
      paths = sorted(wanted.keys() | found.keys())
      different += [path for path in paths if found.get(path) != wanted.get(path)]
      evaluations += 1
  result = {
    'kills': len(moments),
    'evaluations': evaluations,
    'seed': f.seed,
    'files': len(wanted),
    'of_evaluators': len(wanted) - answered,
    'unbroken_seconds': round(seconds, 1),
    'different': different,
    'made_twice': again,
    'moments': moments,
    'device': jax.devices()[0].device_kind,
    'machine': f'{platform.processor() or platform.machine()}, {os.cpu_count()} cores',
    'load': [round(x, 1) for x in os.getloadavg()],
    'date': time.strftime('%Y-%m-%d', time.gmtime()),
  }
  print(json.dumps(result, indent=2))
  return int(bool(different or again))


def is_of_scoring(path: str) -> bool:
  """Whether a file is written after all drawing and answering."""
  parts = path.split('/')
  late = ('records', 'labels', 'evaluators.json', 'results.jsonl')
  return len(parts) < 3 or any(x in late or x.startswith('annotation_') for x in parts)


def define_flags(f=flags.FLAGS):
  flags.DEFINE_integer('kills', 10, 'Number of kills.', lower_bound=2, flag_values=f)
  flags.DEFINE_integer(
    'limit', 2, 'Prompts or questions per category.', lower_bound=1, flag_values=f
  )
  flags.DEFINE_integer('seed', 0, 'Seed of the moments.', flag_values=f)


if __name__ == '__main__':
  cli.run_main(main, define_flags)
