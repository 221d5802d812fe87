"""Tables of one model, or of two and their difference, beside the paper's rows, as Markdown, JSON
and LaTeX.

Differences are paired: both models answer the same list, with one bootstrap (`stats`). A number
that is not comparable never appears beside the paper's.
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any, NamedTuple

import numpy as np

from dsr_jax.errors import InputError
from dsr_jax.evaluate import paper, stats
from dsr_jax.evaluate.protocol import About, Label, Scores

PAPER_ROWS = ('Janus-Pro-7B', 'Janus-Pro-7B+DSR')


class Line(NamedTuple):
  """A statistic of a table.

  Attributes:
    name: of the statistic.
    label: how comparable it is to the paper's.
    after: the model's value; of two models, the later one's.
    before: the earlier model's value.
    difference: after - before, paired.
    paper: {row of the paper: value}; empty if the label forbids it.
  """

  name: str
  label: Label
  after: stats.Estimate
  before: stats.Estimate | None
  difference: stats.Estimate | None
  paper: dict[str, float]


class Table(NamedTuple):
  """A benchmark's table.

  Attributes:
    about: the benchmark.
    lines: its statistics, the headline first.
    counts: how many were asked and so on, for the later model.
    notes: sentences to print under it.
    decimals: as printed.
  """

  about: About
  lines: tuple[Line, ...]
  counts: dict[str, int]
  notes: tuple[str, ...]
  decimals: int


def table(
  about: About,
  after: Scores,
  before: Scores | None = None,
  *,
  paper_rows: Sequence[str] = PAPER_ROWS,
  notes: Sequence[str] = (),
) -> Table:
  """A benchmark's table.

  Args:
    about: the benchmark.
    after: the scores of the model, or of the later one.
    before: those of the earlier one, on the same list.
    paper_rows: which of the paper's rows to show beside ours.
    notes: further sentences, such as that a limit was set.
  """
  new = estimates(after)
  old = estimates(before) if before else {}
  differences = _differences(after, before) if before else {}
  lines = []
  for name, estimate in new.items():
    label = after.label(name)
    printed = paper.rows_of(about.name, name) if label.comparable() else {}
    lines.append(
      Line(
        name=name,
        label=label,
        after=estimate,
        before=old.get(name),
        difference=differences.get(name),
        paper={row: printed[row] for row in paper_rows if row in printed},
      )
    )
  decimals = 4 if after.scale == 1 else 1
  return Table(about, tuple(lines), dict(after.counts), (*after.notes, *notes), decimals)


def estimates(scores: Scores) -> dict[str, stats.Estimate]:
  """Each statistic with its interval, in the units of tables."""
  found = stats.estimates(scores.sums, scores.statistics, scores.strata)
  return {name: _scaled(estimate, scores.scale) for name, estimate in found.items()}


def _differences(after: Scores, before: Scores) -> dict[str, stats.Estimate]:
  """Paired, by cluster; both must cover the same list."""
  if set(after.clusters) != set(before.clusters) or list(after.statistics) != list(
    before.statistics
  ):
    only = sorted(set(after.clusters) ^ set(before.clusters))
    what = f', such as {only[0]!r}' if only else ''
    raise InputError(
      f'the {len(after.clusters)} and {len(before.clusters)} clusters of prompts or images are not '
      f'the same{what}; a paired difference needs one list: evaluate both models on it'
    )
  order = [before.clusters.index(name) for name in after.clusters]
  sums = np.concatenate([after.sums, before.sums[order]], axis=1)
  paired = {name: stats.paired(statistic) for name, statistic in after.statistics.items()}
  found = stats.estimates(sums, paired, after.strata)
  return {name: _scaled(estimate, after.scale) for name, estimate in found.items()}


def _scaled(estimate, scale):
  return stats.Estimate(*(scale * x for x in estimate))


# Formats.


def to_json(tables: Sequence[Table]) -> dict[str, Any]:
  """JSON values: {benchmark: {counts, notes, statistics}}; NaN and infinity become null."""

  def numbers(estimate):
    if estimate is None:
      return None
    return {k: finite(x) for k, x in estimate._asdict().items()}

  out = {}
  for t in tables:
    statistics = {
      line.name: {
        'label': line.label.value,
        'after': numbers(line.after),
        'before': numbers(line.before),
        'difference': numbers(line.difference),
        'paper': line.paper,
      }
      for line in t.lines
    }
    out[t.about.name] = {
      'title': t.about.title,
      'source': t.about.source,
      'headline': t.about.headline,
      'counts': t.counts,
      'notes': list(t.notes),
      'statistics': statistics,
    }
  return out


def finite(value: float | None) -> float | None:
  """A number for JSON: None for NaN and infinity."""
  return value if value is not None and math.isfinite(value) else None


def to_markdown(tables: Sequence[Table], after: str, before: str | None = None) -> str:
  """One section per benchmark. after, before: names of the models."""
  parts = []
  for t in tables:
    head, rows = cells(t, after, before)
    parts += [f'## {t.about.title}', '', _counted(t.counts), '']
    parts += [*markdown_table(head, rows, last='---'), '']
    parts += [f'- {note}' for note in t.notes]
    parts += [''] * bool(t.notes)
  return '\n'.join(parts)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], last: str = '---:'):
  """Lines of a table, numbers right-aligned; last: the alignment of the last column."""
  line = '|' + '---|' + '---:|' * (len(head) - 2) + f'{last}|'
  return [_markdown_row(head), line, *(_markdown_row(row) for row in rows)]


def _markdown_row(cells):
  return '| ' + ' | '.join(cell.replace('|', '\\|') for cell in cells) + ' |'


def to_latex(tables: Sequence[Table], after: str, before: str | None = None) -> str:
  """One tabular per benchmark, for `booktabs`."""
  parts = []
  for t in tables:
    head, rows = cells(t, after, before)
    parts += [
      f'% {t.about.title}: {_counted(t.counts)}',
      f'\\begin{{tabular}}{{l{"r" * (len(head) - 2)}l}}',
      '\\toprule',
      _latex_row(head),
      '\\midrule',
      *(_latex_row(row) for row in rows),
      '\\bottomrule',
      '\\end{tabular}',
      '',
    ]
  return '\n'.join(parts)


LATEX = str.maketrans(
  {
    '\\': r'\textbackslash{}',
    '_': r'\_',
    '%': r'\%',
    '&': r'\&',
    '#': r'\#',
    '$': r'\$',
    '{': r'\{',
    '}': r'\}',
    '~': r'\textasciitilde{}',
    '^': r'\textasciicircum{}',
    '…': r'\ldots{}',
    '−': r'$-$',
  }
)


def _latex_row(cells):
  return ' & '.join(cell.translate(LATEX) for cell in cells) + r' \\'


def cells(t: Table, after: str, before: str | None):
  """Heading and rows of text: statistic, our numbers, the paper's rows, label."""
  paper_rows = list(dict.fromkeys(row for line in t.lines for row in line.paper))
  ours = [before, after, 'difference', '95 %'] if before else [after, '95 %']
  head = ['', *ours, *(f'paper: {row}' for row in paper_rows), 'label']
  rows = []
  for line in t.lines:
    shown = line.difference if before else line.after
    numbers = [_number(line.after.value, t.decimals)]
    if before:
      numbers.insert(0, _number(line.before.value, t.decimals))
      numbers.append(_number(line.difference.value, t.decimals, '+'))
    sign = '+' if before else ''
    numbers.append(
      f'{_number(shown.low, t.decimals, sign)} … {_number(shown.high, t.decimals, sign)}'
    )
    beside = [f'{line.paper[row]:g}' if row in line.paper else '' for row in paper_rows]
    rows.append([line.name, *numbers, *beside, line.label.value])
  return head, rows


def _number(value, decimals, sign=''):
  if not math.isfinite(value):
    return 'none'
  return f'{value:{sign}.{decimals}f}'


def _counted(counts: Mapping[str, int]) -> str:
  return ', '.join(f'{name}: {number}' for name, number in counts.items()) + '.'
