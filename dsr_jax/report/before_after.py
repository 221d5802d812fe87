"""The samples of the fixed list: the same prompts and images with the same keys, before and now.

Axes: S samples of a prompt, H W pixels.
"""

import io
import itertools
from typing import NamedTuple

import numpy as np
from PIL import Image

from dsr_jax import rows as rows_lib
from dsr_jax.reporting import html as page_lib
from dsr_jax.reporting import sheets

SHOWN = 8  # prompts, and images; always the first ones, whatever their results


class Side(NamedTuple):
  """One model's result for an item: its name ('before', 'after step 40'), samples, and a line for
  each wrong sample that says why.
  """

  name: str
  samples: list[page_lib.Sample]
  reasons: list[str]


class Item(NamedTuple):
  """A prompt, or an image (`src`), with each model's result."""

  title: str
  sides: list[Side]
  src: str = ''


def items(workdir: str, task: str) -> list[Item]:
  """The first items of the fixed list, before training and at the last evaluated step."""
  steps = _steps(workdir)
  by_step = [_by_item(workdir, step, task) for step in steps]
  found = []
  for item in _common(by_step):
    groups = [groups[item] for groups in by_step]
    first = groups[0][0]
    sides = [_side(step, group, task) for step, group in zip(steps, groups)]
    if task == 'generation':
      found.append(Item(first['prompt'], sides))
    else:
      found.append(Item(f'Image {first["input"] + 1}', sides, src=_src(first)))
  return found


def sheet(workdir: str, step: int) -> Image.Image:
  """One image with the drawn and the described items of a step, beside those of step 0."""
  steps = [0, step] if step and rows_lib.steps_of(workdir, rows_lib.WATCHED)[0] == 0 else [step]
  parts = []
  drawn = [_by_item(workdir, s, 'generation') for s in steps]
  chosen = _common(drawn)
  if chosen:
    # A resumed run may have another `eval.watched`; only what both steps have is shown.
    each = min(len(groups[i]) for groups in drawn for i in chosen)
    pixels = [np.stack([_pixels_of(groups[i][:each]) for i in chosen]) for groups in drawn]
    right = [
      np.array([[bool(row['right']) for row in groups[i][:each]] for i in chosen])
      for groups in drawn
    ]
    prompts = [drawn[0][i][0]['prompt'] for i in chosen]
    parts.append(sheets.side_by_side(prompts, [_name(s) for s in steps], pixels, right))
  told = [_by_item(workdir, s, 'understanding') for s in steps]
  chosen = _common(told)
  if chosen:
    shown = np.stack([_pixels_of(told[0][i])[0] for i in chosen])
    lines = [
      [
        (_name(s), groups[i][0]['text'], groups[i][0]['right'] is not False)
        for s, groups in zip(steps, told)
      ]
      for i in chosen
    ]
    parts.append(sheets.statements(shown, lines))
  return sheets.stack(parts)


def _common(by_step: list[dict]) -> list:
  """The first items that all steps have."""
  if not by_step:
    return []
  return [item for item in by_step[0] if all(item in one for one in by_step)][:SHOWN]


def texts(workdir: str, step: int) -> str:
  """The descriptions of a step as a Markdown table."""
  lines = ['| image | text | reward | |', '|---|---|---:|---|']
  for row in rows_lib.read(workdir, step, rows_lib.WATCHED):
    if row['text'] is not None:
      text = row['text'].replace('|', '\\|').replace('\n', ' ')
      reward = '' if row['reward'] is None else f'{row["reward"]:.3f}'
      lines.append(
        f'| {row["input"] + 1} | {text or "(empty)"} | {reward} | {row["reason"] or ""} |'
      )
  return '\n'.join(lines)


def _steps(workdir: str) -> list[int]:
  """Step 0, and the last one with a fixed list."""
  steps = rows_lib.steps_of(workdir, rows_lib.WATCHED)
  return sorted({steps[0], steps[-1]}) if steps else []


def _name(step: int) -> str:
  return f'after step {step}' if step else 'before'


def _by_item(workdir: str, step: int, task: str) -> dict[tuple, list[dict]]:
  """A step's rows of a task by prompt or image; equal ones are numbered. The position does not
  identify an item, because a run resumed with changed data has it elsewhere.
  """
  rows = [r for r in rows_lib.read(workdir, step, rows_lib.WATCHED) if r['task'] == task]
  found = {}
  for _, group in itertools.groupby(rows, key=lambda r: r['input']):
    group = list(group)
    about = group[0]['prompt'] if task == 'generation' else group[0]['picture']['bytes']
    before = sum(item == about for item, _ in found)
    found[about, before] = group
  return found


def _side(step: int, group: list[dict], task: str) -> Side:
  samples, reasons = [], []
  for row in group:
    words = {True: 'right', False: 'wrong', None: ''}[row['right']]
    reward = '' if row['reward'] is None else f'{row["reward"]:.2f}'
    mark = {'right': 'up', 'wrong': 'down', '': ''}[words]
    number = f'{row["candidate"] + 1}'
    if task == 'generation':
      alt = f'{row["prompt"]}, sample {number}, {_name(step)}'
      lines = [' '.join(x for x in (number, words) if x), reward]
      samples.append(page_lib.Sample(mark, lines, src=_src(row), alt=alt))
    else:
      lines = [' '.join(x for x in (_name(step), reward, words) if x)]
      samples.append(page_lib.Sample(mark, lines, text=row['text']))
    if row['reason']:
      reasons.append(f'{number}: {row["reason"]}' if task == 'generation' else row['reason'])
  return Side(_name(step), samples, reasons)


def _src(row: dict) -> str:
  """The image of a row for a page, made smaller if it is large."""
  png = row['picture']['bytes']
  image = Image.open(io.BytesIO(png))
  if image.width <= page_lib.TILE:
    return page_lib.data_uri(png)
  return page_lib.picture(np.asarray(image.convert('RGB')))


def _pixels_of(group: list[dict]) -> np.ndarray:
  """(S, H, W, 3) uint8."""
  return np.stack(
    [np.asarray(Image.open(io.BytesIO(row['picture']['bytes'])).convert('RGB')) for row in group]
  )
