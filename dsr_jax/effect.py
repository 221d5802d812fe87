"""Measures what training changed: paired differences between the last and the first evaluation, for
one run or several seeds of it.

  python -m dsr_jax.effect --workdirs=runs/seed0,runs/seed1,runs/seed2 [--output=docs/effect.md]

Every evaluation uses the same prompts, images and keys, so differences are paired by prompt or
image. For several runs, it first averages over seeds for each prompt. Intervals are 95% bootstraps
over prompts (within tasks) and images; the table also shows the spread over seeds.
"""

import os
from typing import NamedTuple

from absl import flags
import numpy as np

from dsr_jax import cli, files, flag_types
from dsr_jax.errors import InputError
from dsr_jax.evaluate import scores as scores_lib
from dsr_jax.evaluate import stats
from dsr_jax.runtime import run_files
from dsr_jax.scenes import grammar, sets


class Effect(NamedTuple):
  """A score before and after, their paired difference, and the differences of each seed."""

  name: str
  before: float
  after: float
  difference: stats.Estimate
  by_seed: list[float]


# Tables of an evaluation on Scenes -> numbers per row: sums, or None for the number of images.
ROWS = {'generation': None, 'description': 8, 'description_greedy': 8, 'yesno': 6}
TUNED = 'generation_tuned'  # only some runs have it, at step 0


def rows_of(workdir: str, step: int) -> dict[str, np.ndarray]:
  """The rows of the evaluation of a step: {name: (P, S) or (C, M)}."""
  path = os.path.join(workdir, 'evaluations', f'{step:06d}.json')
  content = run_files.read_json(
    path, 'name a finished run that was evaluated, or run dsr_jax.main there to its end'
  )
  rows = {}
  for name in (*ROWS, TUNED):
    if name not in content:
      continue
    try:
      rows[name] = np.array(content[name], float)
    except (TypeError, ValueError) as e:
      raise run_files.damaged(path, f'{name} is not a table of numbers') from e
  missing = [name for name in ROWS if name not in rows]
  if missing:
    raise InputError(
      f'{path} has no rows {missing[0]}; name runs that were evaluated with eval.benchmark=scenes'
    )
  for name, values in rows.items():
    columns = ROWS.get(name)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
      raise run_files.damaged(path, f'{name} is not a table of numbers')
    if columns and values.shape[1] != columns:
      raise run_files.damaged(path, f'{name} has rows of {values.shape[1]} numbers, not {columns}')
  if len(rows['generation']) % len(grammar.GENEVAL):
    raise run_files.damaged(path, f'generation has {len(rows["generation"])} rows')
  return rows


def last_step(workdir: str) -> int:
  """The last step of a finished run."""
  path = os.path.join(workdir, 'summary.json')
  summary = run_files.read_json(
    path, 'name the workdir of a finished run, or run dsr_jax.main there to its end'
  )
  step = summary.get('step')
  if type(step) is not int or step < 0:
    raise run_files.damaged(path, f'its step is {step!r}')
  return step


def check_comparable(workdirs, first, last):
  """InputError unless all evaluations have rows of the same shapes."""
  for workdir, before, after in zip(workdirs, first, last):
    for name in ROWS:
      shapes = [rows[name].shape for rows in (first[0], before, after)]
      if len(set(shapes)) > 1:
        raise InputError(
          f'the evaluations in {workdir} have other sizes ({name}: {shapes[1]} before, {shapes[2]} '
          f'after; {shapes[0]} in the first run); compare runs of one configuration, which are '
          'evaluated on the same prompts and images'
        )


def effects(workdirs) -> list[Effect]:
  """The effect on every score, over the runs of all seeds."""
  first = [rows_of(workdir, 0) for workdir in workdirs]
  last = [rows_of(workdir, last_step(workdir)) for workdir in workdirs]
  check_comparable(workdirs, first, last)
  prompts = sets.evaluation_prompts(len(first[0]['generation']) // len(grammar.GENEVAL))
  out = [_generation('generation, mean of six tasks', prompts, first, last)]
  for task in scores_lib.tasks_of(prompts):
    here = [p.category == task for p in prompts]
    out.append(_generation(f'generation, {task}', prompts, first, last, here=here))
  for level, name in sets.NOVELTY.items():
    here = [sets.novelty(p.atoms) == level for p in prompts]
    if any(here):
      share = scores_lib.share_of_all
      name = f'generation, {name}'
      out.append(_generation(name, prompts, first, last, here=here, statistic=share))
  if TUNED in first[0]:
    name = 'generation, against the base at its best temperature and guidance'
    out.append(_generation(name, prompts, first, last, before=TUNED))
  for rows in ('description', 'description_greedy'):
    for statistic in ('f1', 'precision', 'recall', 'hallucination'):
      name = f'{rows.replace("_", ", ")}: {statistic}'
      out.append(_sums(name, rows, scores_lib.DESCRIPTION[statistic], first, last))
  out.append(_sums('yes/no: F1', 'yesno', scores_lib.YESNO['f1'], first, last))
  return out


def _generation(
  name,
  prompts,
  first,
  last,
  *,
  here=None,
  before='generation',
  statistic=scores_lib.mean_of_tasks,
) -> Effect:
  """Effect on a statistic of correct images, rows (P, S).

  here: which prompts count (P,); None: all. before: the name of the rows before training.
  """
  chosen = range(len(prompts)) if here is None else np.flatnonzero(here)
  part = [prompts[i] for i in chosen]
  before_rows = [run[before][chosen] for run in first]
  after_rows = [run['generation'][chosen] for run in last]

  def value(rows):
    sums, _ = scores_lib.generation_sums(part, rows)
    return float(statistic(sums.sum(axis=0)[None])[0])

  # Average over the seeds first, for each prompt.
  old, new = np.mean(before_rows, axis=0), np.mean(after_rows, axis=0)
  return Effect(
    name=name,
    before=value(old),
    after=value(new),
    difference=scores_lib.generation_difference(part, new, old, statistic),
    by_seed=[value(b) - value(a) for a, b in zip(before_rows, after_rows)],
  )


def _sums(name, key, statistic, first, last) -> Effect:
  """Effect on a statistic of sums over images, rows (C, M)."""

  def value(rows):
    return float(statistic(rows.sum(axis=0)[None])[0])

  old = np.mean([run[key] for run in first], axis=0)
  new = np.mean([run[key] for run in last], axis=0)
  return Effect(
    name=name,
    before=value(old),
    after=value(new),
    difference=stats.difference(new, old, statistic),
    by_seed=[value(b[key]) - value(a[key]) for a, b in zip(first, last)],
  )


def table(rows: list[Effect]) -> str:
  """The effects as a Markdown table, in points (hundredths)."""
  lines = [
    '| score, points | before | after | difference | 95 % interval | by seed |',
    '|---|---:|---:|---:|---|---|',
  ]
  for row in rows:
    d = row.difference
    by_seed = ', '.join(f'{100 * seed:+.1f}' for seed in row.by_seed)
    lines.append(
      f'| {row.name} | {100 * row.before:.1f} | {100 * row.after:.1f} | {100 * d.value:+.1f} | '
      f'{100 * d.low:+.1f} … {100 * d.high:+.1f} | {by_seed} |'
    )
  return '\n'.join(lines) + '\n'


def main(argv, f=flags.FLAGS):
  """Prints the table."""
  cli.no_arguments(argv)
  cli.require(workdirs=f.workdirs)
  if f.output:
    files.check_output_file(f.output)
  text = table(effects(f.workdirs))
  if f.output:
    files.write_text(f.output, text)
  cli.print_text(text.rstrip('\n'), kept=f.output)


def define_flags(f=flags.FLAGS):
  flag_types.define_paths('workdirs', [], 'Finished runs: several seeds of one configuration.', f)
  flag_types.define_path('output', '', 'Also write the table to this file.', f)


if __name__ == '__main__':
  cli.run_main(main, define_flags)
