"""The paper's own numbers (arXiv 2506.07963, version 1), for comparison with ours.

Its headline row mixes two of its own rows: .7824 for color and .5786 for shape come from the run
that learned generation alone (Table 4); the joint run has .7773, .5763 and .7292.
"""

import csv
import functools
import os
from typing import NamedTuple

SOURCE = 'arXiv 2506.07963v1'
PATH = os.path.join(os.path.dirname(os.path.dirname(__file__)), 'data', 'paper', 'tables.csv')

# The paper's name for each of our statistics. T2I-CompBench's and GenEval's are shares, as printed;
# the others are percentages.
METRICS = {
  ('t2i_compbench', 'color'): 'color',
  ('t2i_compbench', 'shape'): 'shape',
  ('t2i_compbench', 'texture'): 'texture',
  ('t2i_compbench', 'spatial'): 'spatial',
  ('t2i_compbench', 'non_spatial'): 'non_spatial',
  ('t2i_compbench', 'complex'): 'complex',
  ('geneval', 'single_object'): 'single_object',
  ('geneval', 'two_object'): 'two_object',
  ('geneval', 'counting'): 'counting',
  ('geneval', 'colors'): 'colors',
  ('geneval', 'position'): 'position',
  ('geneval', 'color_attr'): 'color_attr',
  ('geneval', 'overall'): 'overall',
  ('hallusionbench', 'mean'): 'hallusionbench',
  ('llavabench', 'relative score'): 'llavabench',
  ('pope', 'F1'): 'pope',
  ('mmbench', 'accuracy'): 'mmb',
  ('seedbench', 'accuracy'): 'seed_img',
  ('mmmu', 'accuracy'): 'mmmu',
}


class Number(NamedTuple):
  """One number of a table."""

  table: int
  row: str
  metric: str
  value: float


@functools.cache
def numbers() -> tuple[Number, ...]:
  """All numbers, in the paper's order."""
  with open(PATH, encoding='utf-8', newline='') as f:
    rows = csv.DictReader(line for line in f if not line.startswith('#'))
    return tuple(Number(int(r['table']), r['row'], r['metric'], float(r['value'])) for r in rows)


def rows_of(benchmark: str, statistic: str) -> dict[str, float]:
  """{row: value} from the main tables (1, 2, 3, 5) for one of our statistics; empty if the paper
  has no such column.
  """
  metric = METRICS.get((benchmark, statistic))
  return {n.row: n.value for n in numbers() if n.metric == metric and n.table in (1, 2, 3, 5)}
