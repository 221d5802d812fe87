"""The command's results: tables of all benchmarks as JSON, Markdown and LaTeX; curves of a run."""

import dataclasses
from typing import Any

import numpy as np

from dsr_jax.evaluate import comparison, paper, protocol, registry
from dsr_jax.evaluate.scoring import Scored

# The paper's rows that appear beside ours, by the model's family.
PAPER_ROWS = {
  'Janus': ('Janus-Pro-1B', 'Janus-Pro-7B', 'Janus-Pro-7B+DSR'),
  'Show-o': ('Show-o', 'Show-o+DSR'),
}


@dataclasses.dataclass(frozen=True)
class Results:
  """Everything that was scored.

  Attributes:
    models: names, in order: the first is the one to compare with, the last is the one under test.
    steps: one per model if the models are the checkpoints of a run, else None.
    scored: {benchmark: one `Scored` per model}.
    family: of the models.
    limit: groups per category; 0: all.
  """

  models: tuple[str, ...]
  steps: tuple[int, ...] | None
  scored: dict[str, tuple[Scored, ...]]
  family: str
  limit: int

  @property
  def after(self) -> str:
    return self.models[-1]

  @property
  def before(self) -> str | None:
    return self.models[0] if len(self.models) > 1 else None

  def tables(self) -> dict[str, comparison.Table]:
    """{benchmark: table} for the benchmarks in which the last model was scored."""
    found = {}
    for name, scored in self.scored.items():
      after, before = scored[-1].scores, scored[0].scores if self.before else None
      if after is None:
        continue
      notes = []
      if self.limit:
        notes.append(
          f'a quick look: {self.limit} of each category (--limit={self.limit}), not the benchmark'
        )
      if self.before and before is None:
        notes.append(f'{self.before} was not scored: {scored[0].why_not}')
      found[name] = comparison.table(
        about_of(name),
        after,
        before,
        # A score on part of a benchmark cannot be compared with the paper's.
        paper_rows=() if self.limit else PAPER_ROWS.get(self.family, ()),
        notes=notes,
      )
    return found

  def why_not(self) -> dict[str, str]:
    """{benchmark: why it has no score}, for the last model."""
    return {name: s[-1].why_not for name, s in self.scored.items() if s[-1].scores is None}

  def overview(self) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of one table: a row per model and per row of the paper, a column per
    benchmark.
    """
    names = [name for name, scored in self.scored.items() if any(s.scores for s in scored)]
    head = ['', *(f'{about_of(name).title}, {about_of(name).headline}' for name in names)]
    rows = []
    for i, model in enumerate(self.models):
      cells = [_headline(self.scored[name][i].scores) for name in names]
      rows.append([model, *cells])
    printed = {} if self.limit else {name: _paper_headline(self, name) for name in names}
    for row in PAPER_ROWS.get(self.family, ()):
      cells = [f'{printed[n][row]:g}' if row in printed.get(n, {}) else '' for n in names]
      if any(cells):
        rows.append([f'paper: {row}', *cells])
    return head, rows

  def curves(self) -> dict[str, dict[str, Any]]:
    """{benchmark: {'steps', 'values', 'low', 'high'} for its headline}; empty without steps."""
    if self.steps is None:
      return {}
    found = {}
    for name, scored in self.scored.items():
      points = [
        (step, _estimate(s.scores)) for step, s in zip(self.steps, scored) if s.scores is not None
      ]
      points = [(step, e) for step, e in points if np.all(np.isfinite(e))]
      if len(points) > 1:
        found[name] = {
          'statistic': about_of(name).headline,
          'steps': [step for step, _ in points],
          'values': [e.value for _, e in points],
          'low': [e.low for _, e in points],
          'high': [e.high for _, e in points],
        }
    return found


def about_of(name: str) -> protocol.About:
  """The description of a benchmark; the `++` of a name is added to its title."""
  base = name.removesuffix('++')
  [about] = [about for about in registry.abouts() if about.name == base]
  return about if base == name else dataclasses.replace(about, title=f'{about.title}++')


def _estimate(scores: protocol.Scores):
  return comparison.estimates(scores)[next(iter(scores.statistics))]


def _headline(scores: protocol.Scores | None) -> str:
  if scores is None:
    return ''
  decimals = 4 if scores.scale == 1 else 1
  value = _estimate(scores).value
  return f'{value:.{decimals}f}' if np.isfinite(value) else 'none'


def _paper_headline(results: Results, name: str) -> dict[str, float]:
  """The paper's numbers for a headline's column, if ours are comparable."""
  scores = results.scored[name][-1].scores
  statistic = about_of(name).headline
  if scores is None or not scores.label(statistic).comparable():
    return {}
  return paper.rows_of(about_of(name).name, statistic)


# Formats.


def to_json(results: Results) -> dict[str, Any]:
  """JSON values."""
  benchmarks = {}
  for name, table in results.tables().items():
    [benchmarks[name]] = comparison.to_json([table]).values()
    scores, about = results.scored[name][-1].scores, results.scored[name][-1].about
    if scores is not None and scores.breakdown:
      benchmarks[name]['breakdown'] = {
        part: {key: comparison.finite(x) for key, x in numbers.items()}
        for part, numbers in scores.breakdown.items()
      }
    if about:
      benchmarks[name]['evaluators'] = about['evaluators']
  found = {
    'model': results.after,
    'before': results.before,
    'models': list(results.models),
    'limit': results.limit,
    'paper': paper.SOURCE,
    'benchmarks': benchmarks,
    'not_scored': results.why_not(),
  }
  head, rows = results.overview()
  found['overview'] = {row[0]: dict(zip(head[1:], row[1:])) for row in rows}
  if results.steps is not None:
    found['curves'] = results.curves()
  return found


def to_markdown(results: Results) -> str:
  """The overview and a section per benchmark."""
  compared = f', before `{results.before}`' if results.before else ''
  parts = [f'Model `{results.after}`{compared}.']
  parts += [f"The paper's numbers: {paper.SOURCE}. Intervals are 95 %, paired for differences.", '']
  head, rows = results.overview()
  if len(head) > 1:
    parts += comparison.markdown_table(head, rows) + ['']
  tables = list(results.tables().values())
  parts.append(comparison.to_markdown(tables, results.after, results.before))
  for name, why in results.why_not().items():
    parts += [f'## {about_of(name).title}', '', f'Not scored: {why}', '']
  return '\n'.join(parts).rstrip('\n') + '\n'


def to_latex(results: Results) -> str:
  """One tabular per benchmark."""
  tables = list(results.tables().values())
  return comparison.to_latex(tables, results.after, results.before)
