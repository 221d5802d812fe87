"""The prompts of T2I-CompBench++: 5,600 for training (8 categories x 700), and those for
validation.

The eight text files are next to this module, under their own license (MIT, Copyright (c) 2023 HKU).
Order and repeats are kept: 5,559 of the 5,600 strings are distinct.
"""

import functools
import os

from dsr_jax.data import prompts

CATEGORIES = (
  'color',
  'shape',
  'texture',
  'spatial',
  '3d_spatial',
  'numeracy',
  'non_spatial',
  'complex',
)
DIRECTORY = os.path.join(os.path.dirname(__file__), 't2i_compbench_prompts')


def lines(split: str = 'train'):
  """(category, line number from 1, prompt) of every prompt of a split (train, val), in the files'
  order.
  """
  for category in CATEGORIES:
    for line, prompt in prompts.read_lines(os.path.join(DIRECTORY, f'{category}_{split}.txt')):
      yield category, line, prompt


@functools.cache
def load() -> prompts.Prompts:
  """The training prompts; the benchmark's validation prompts are not among them."""
  rows = list(lines())

  def where(index):
    category, line, _ = rows[index]
    return f'line {line} of {category}_train.txt'

  return prompts.Prompts([prompt for _, _, prompt in rows], where)


def validation(number: int) -> prompts.Prompts:
  """The first prompts of the validation lists, cycling through the categories."""
  by_category = {category: [] for category in CATEGORIES}
  for category, line, prompt in lines('val'):
    by_category[category].append((f'line {line} of {category}_val.txt', prompt))
  rows = [row for turn in zip(*by_category.values()) for row in turn][:number]
  return prompts.Prompts([prompt for _, prompt in rows], lambda i: rows[i][0])
