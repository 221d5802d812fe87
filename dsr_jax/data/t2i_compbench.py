"""The 5,600 training prompts of T2I-CompBench++ (8 categories x 700).

The eight text files are shipped beside this module under their own license (MIT, Copyright (c) 2023
HKU). Order and repeats are kept: 5,559 of the 5,600 strings are distinct.
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


def lines():
  """(category, line number from 1, prompt) of every training prompt, in the files' order."""
  for category in CATEGORIES:
    for line, prompt in prompts.read_lines(os.path.join(DIRECTORY, f'{category}_train.txt')):
      yield category, line, prompt


@functools.cache
def load() -> prompts.Prompts:
  """The training prompts; the benchmark's validation prompts are not among them."""
  rows = list(lines())

  def where(index):
    category, line, _ = rows[index]
    return f'line {line} of {category}_train.txt'

  return prompts.Prompts([prompt for _, _, prompt in rows], where)
