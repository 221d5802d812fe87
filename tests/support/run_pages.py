"""Pages of made-up runs, for whoever looks them over."""

import json

import numpy as np

from dsr_jax import rows
from dsr_jax.report import page


def finished_run(folder):
  """The page of a small finished run: before and after, curves, a sheet, tables."""
  folder.mkdir(exist_ok=True)
  rng = np.random.default_rng(0)
  (folder / 'samples').mkdir(exist_ok=True)
  lines = []
  for step in range(1, 41):
    lines.append(
      {
        'step': step,
        'loss': 1 / step,
        'generation/loss': 1 / step,
        'generation/reward_mean': -1 - rng.random(),
        'generation/reward_frozen': -1 - rng.random(),
        'understanding/reward_mean': -1 - rng.random(),
        'learning_rate': 1e-5 / step,
        'memory/process_peak_bytes': 2.1e9,
        'generation/dropped_pairs': 0.0,
        'time/step_seconds': 2.0,
      }
    )
  for step in (0, 20, 40):
    watched(str(folder), step, rng)
    value = {f'generation/{name}': 0.5 + step / 100 for name in ('mean', 'strict', 'any')}
    value |= {'generation/mean_low': 0.4, 'generation/mean_high': 0.95}
    value |= {'watched/dark_pixels': 0.1 + step / 1000, 'watched/text_length': 5.0}
    lines.append({'step': step, **{f'eval/{name}': x for name, x in value.items()}})
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  method = dict(task='unified', objective='grpo', inputs_per_step=2, group_size=2, steps=40)
  method |= dict(learning_rate=1e-5, seed=0)
  about = {'config': {'method': method}, 'about': {'model': {'name': 'scenes'}}, 'devices': '1 cpu'}
  (folder / 'config.json').write_text(json.dumps(about))
  with open(page.write(str(folder)), encoding='utf-8') as f:
    return f.read()


def watched(folder, step, rng, inputs=2, samples=4):
  """Writes the rows of a made-up fixed list: so many prompts, and samples of each."""
  shape = inputs, samples
  drawn = rows.Candidates(
    task='generation',
    prompts=(
      ['a photo of a red disc', 'a photo of two rings left of a very large blue hourglass'] * inputs
    )[:inputs],
    codes=rng.integers(0, 9, (*shape, 16)),
    pixels=rng.integers(0, 255, (*shape, 32, 32, 3), np.uint8),
    rewards=rng.normal(-1, 1, shape),
    right=rng.random(shape) < 0.5,
    reasons=[['no red disc: it is blue', '', 'no disc', ''][:samples]] * inputs,
  )
  told = rows.Candidates(
    task='understanding',
    prompts=['Describe.'] * 2,
    codes=rng.integers(0, 9, (2, 16)),
    pixels=rng.integers(0, 255, (2, 32, 32, 3), np.uint8),
    rewards=rng.normal(-1, 1, (2, 1)),
    texts=[['a red disc and a blue ring.'], ['']],
    tokens=[[[1, 2]], [[]]],
  )
  rows.write(folder, step, rows.table(step, [drawn, told]), rows.WATCHED)


def unfinished_run(folder):
  """The page of a run that has its first step alone."""
  folder.mkdir(exist_ok=True)
  (folder / 'metrics.jsonl').write_text('{"step": 1, "loss": 0.5}\n')
  with open(page.write(str(folder)), encoding='utf-8') as f:
    return f.read()


PAGES = {'finished run': finished_run, 'unfinished run': unfinished_run}
