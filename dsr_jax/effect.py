"""What a run changed: paired differences of its last evaluation and its first, over one run or
several seeds of it.

  python -m dsr_jax.effect --workdirs=runs/seed0,runs/seed1,runs/seed2 [--output=docs/effect.md]

Every evaluation uses the same prompts, pictures and keys, so a difference is paired by prompt or
picture. Of several runs the mean over seeds is taken for each prompt first; intervals are 95 %
bootstraps over prompts (within tasks) and pictures, and, of the seeds, the spread is shown.
"""

import json
import os

from absl import flags
import numpy as np

from dsr_jax.errors import InputError, run_main
from dsr_jax.evaluate import scores as evaluation
from dsr_jax.scenes import sets


def rows_of(workdir: str, step: int) -> dict[str, np.ndarray]:
  path = os.path.join(workdir, 'evaluations', f'{step:06d}.json')
  if not os.path.exists(path):
    raise InputError(
      f'found no {path}; expected a finished run that was evaluated; run dsr_jax.main there to its '
      'end'
    )
  with open(path, encoding='utf-8') as f:
    return {name: np.array(rows, float) for name, rows in json.load(f).items()}


def last_step(workdir: str) -> int:
  path = os.path.join(workdir, 'summary.json')
  if not os.path.exists(path):
    raise InputError(
      f'found no {path}; expected the workdir of a finished run; run dsr_jax.main there to its end'
    )
  with open(path, encoding='utf-8') as f:
    return json.load(f)['step']


def effects(workdirs) -> list[tuple]:
  """Rows (what, before, after, difference with its interval, differences by seed)."""
  first = [rows_of(w, 0) for w in workdirs]
  last = [rows_of(w, last_step(w)) for w in workdirs]

  def mean(runs, name):
    return np.mean([r[name] for r in runs], axis=0)

  prompts = sets.evaluation_prompts(len(first[0]['generation']) // 6)
  out = []

  def generation(name, before, select=None):
    chosen = [i for i, p in enumerate(prompts) if select in (None, p.category)]
    part, take = [prompts[i] for i in chosen], lambda x: x[chosen]

    def value(x):
      return float(
        evaluation.mean_of_tasks(evaluation.generation_sums(part, take(x))[0].sum(0)[None])[0]
      )

    diff = evaluation.generation_difference(
      part, take(mean(last, 'generation')), take(mean(first, before))
    )
    seeds = [value(b['generation']) - value(a[before]) for a, b in zip(first, last)]
    out.append((name, value(mean(first, before)), value(mean(last, 'generation')), diff, seeds))

  generation('generation, mean of six tasks', 'generation')
  for task in dict.fromkeys(p.category for p in prompts):
    generation(f'generation, {task}', 'generation', task)
  if 'generation_tuned' in first[0]:
    generation(
      'generation, against the base at its best temperature and guidance', 'generation_tuned'
    )

  def sums(name, key, statistic):
    def value(x):
      return float(statistic(x.sum(0)[None])[0])

    before, after = mean(first, key), mean(last, key)
    seeds = [value(b[key]) - value(a[key]) for a, b in zip(first, last)]
    out.append(
      (name, value(before), value(after), evaluation.difference(after, before, statistic), seeds)
    )

  for key in ('description', 'description_greedy'):
    for statistic in ('f1', 'precision', 'recall', 'hallucination'):
      sums(f'{key.replace("_", ", ")}: {statistic}', key, evaluation.DESCRIPTION[statistic])
  sums('yes/no: F1', 'yesno', evaluation.YESNO['f1'])
  return out


def table(rows) -> str:
  """Markdown, in points (hundredths)."""
  lines = [
    '| score, points | before | after | difference | 95 % interval | by seed |',
    '|---|---:|---:|---:|---|---|',
  ]
  for name, before, after, d, seeds in rows:
    by_seed = ', '.join(f'{100 * s:+.1f}' for s in seeds)
    lines.append(
      f'| {name} | {100 * before:.1f} | {100 * after:.1f} | {100 * d.value:+.1f} | '
      f'{100 * d.low:+.1f} … {100 * d.high:+.1f} | {by_seed} |'
    )
  return '\n'.join(lines) + '\n'


def main(argv):
  del argv
  text = table(effects(flags.FLAGS.workdirs))
  if flags.FLAGS.output:
    with open(flags.FLAGS.output, 'w', encoding='utf-8') as f:
      f.write(text)
  print(text, end='')


if __name__ == '__main__':
  flags.DEFINE_list('workdirs', None, 'Finished runs, seeds of one configuration.', required=True)
  flags.DEFINE_string('output', '', 'Also write the table there.')
  run_main(main)
