"""What takes more of the reward: short runs that each change one thing in configs/scenes.py.

  python -m benchmarks.levers --output=runs/levers [--levers=plain,credit_guidance --seeds=0,1]
  python -m benchmarks.levers --output=runs/levers --table

All runs have the same prompts, images and keys, and the same number of steps, and are evaluated at
their last step on the validation lists, so that the evaluation lists stay unused for the settings
that win. Run the same command again to resume; two of them with different levers or seeds can work
in one folder. Prints a Markdown table of all finished runs: generation and the F1 and hallucination
of descriptions, each against the base and against the lever `plain` of the same seeds, with 95 %
bootstraps over prompts or images after averaging over seeds.
"""

import dataclasses
import json
import os
import time

from absl import flags
import numpy as np

from dsr_jax import cli, config_loading, effect, files, flag_types, train
from dsr_jax import state as state_lib
from dsr_jax.errors import InputError
from dsr_jax.evaluate import scores, stats
from dsr_jax.evaluate.evaluator import Evaluator
from dsr_jax.scenes import grammar, sets

SPLIT = 'validation'
PLAIN = 'plain'
LEVERS: dict[str, dict[str, object]] = {
  PLAIN: {},
  # the objective
  'simpo': {'objective': 'simpo'},
  'simpo_linear': {'objective': 'simpo_linear'},
  'dr_grpo': {'objective': 'dr_grpo'},
  'kl_0': {'kl': 0.0},
  'guided': {'policy_guidance': True},
  'rate_4e-4': {'learning_rate': 4e-4},
  # which codes learn
  'credit_guidance': {'credit': 'guidance'},
  'credit_rarity': {'credit': 'rarity'},
  'credit_early': {'credit': 'early'},
  'credit_attribution': {'credit': 'attribution'},
  # the reward
  'no_instruction': {'instruction': ''},
  'eos': {'eos_in_reward': True},
  'pmi': {'reward': 'pmi'},
  'contrastive': {'reward': 'contrastive'},
  'sum': {'reward': 'dual+0.5*contrastive'},
  'frozen': {'scorer': 'frozen'},
  'ema': {'scorer': 'ema'},
  'judge': {'reward': 'judge'},
  # where the samples go
  'generation': {'task': 'generation', 'inputs_per_step': 16},
  'group_16': {'group_size': 16, 'inputs_per_step': 16},
}


def config_of(lever: str, seed: int, steps: int, prompts_per_task: int):
  """The configuration of a run. Six times as many images are described."""
  changes = {f'method__{key}': value for key, value in LEVERS[lever].items()}
  return config_loading.load(
    'scenes',
    **changes,
    method__seed=seed,
    method__steps=steps,
    eval__prompts_per_task=prompts_per_task,
    eval__pictures=6 * prompts_per_task,
    eval__tuned_temperature=-1.0,
    eval__watched=0,
    system__samples_every=0,
    system__frozen_every=0,
    system__eval_every=0,
    system__keep_last=1,
  )


def builders(folder: str) -> train.Builders:
  """Those of a real run, but evaluated on the validation lists; the base only once."""

  def make_evaluator(config, model):
    evaluator = Evaluator(config, model.processor, model.graphdef, SPLIT)
    path = os.path.join(folder, f'base_{config.eval.prompts_per_task}.json')

    def evaluate(state, step):
      kept = files.read_json_or_none(path) if step == 0 else None
      if kept is None:
        found, rows = evaluator.run(state_lib.policy_params(state, model.family), step)
        kept = {'scores': found, 'rows': {name: np.asarray(x).tolist() for name, x in rows.items()}}
        if step == 0:
          files.write_json(path, kept)
      return kept['scores'], kept['rows']

    return evaluate

  return dataclasses.replace(train.Builders(), make_evaluator=make_evaluator)


def place(folder: str, lever: str, seed: int) -> str:
  return os.path.join(folder, lever, f'seed_{seed}')


def finished(folder: str) -> dict[str, dict[int, str]]:
  """{lever: {seed: workdir}} of the runs that have ended."""
  found: dict[str, dict[int, str]] = {}
  for lever in LEVERS:
    directory = os.path.join(folder, lever)
    for name in sorted(os.listdir(directory)) if os.path.isdir(directory) else []:
      workdir = os.path.join(directory, name)
      if (files.read_json_or_none(os.path.join(workdir, 'ended.json')) or {}).get('seconds'):
        found.setdefault(lever, {})[int(name.removeprefix('seed_'))] = workdir
  return found


def gap(name: str, after, before) -> stats.Estimate:
  """A paired difference of rows, each the mean over seeds."""
  if name == 'generation':
    prompts = sets.evaluation_prompts(len(after) // len(grammar.GENEVAL), SPLIT)
    return scores.generation_difference(prompts, after, before)
  return stats.difference(after, before, scores.DESCRIPTION[name])


def table(folder: str) -> str:
  """All finished runs as Markdown, in points."""
  runs = finished(folder)
  lines = [
    '| lever | seeds | generation - base | - plain | F1 - base | - plain | hallucination - base | '
    'core-minutes |',
    '|---|---:|---|---|---|---|---|---:|',
  ]
  for lever, seeds in runs.items():
    common = sorted(set(seeds) & set(runs.get(PLAIN, {})))
    cells = []
    for name in ('generation', 'f1', 'hallucination'):
      rows = 'generation' if name == 'generation' else 'description'

      def mean(lever, chosen, step, rows=rows):
        return np.mean([effect.rows_of(runs[lever][s], step(s))[rows] for s in chosen], axis=0)

      def last(lever):
        return lambda seed: effect.last_step(runs[lever][seed])

      chosen = sorted(seeds)
      after = mean(lever, chosen, last(lever))
      cells.append(_shown(gap(name, after, mean(lever, chosen, lambda seed: 0))))
      if name != 'hallucination' and lever != PLAIN and common:
        here = mean(lever, common, last(lever))
        cells.append(_shown(gap(name, here, mean(PLAIN, common, last(PLAIN)))))
      elif name != 'hallucination':
        cells.append('')
    spent = [_ended(workdir)['core_seconds'] for workdir in seeds.values()]
    cells.append(f'{np.mean(spent) / 60:.1f}')
    lines.append(f'| {lever} | {len(seeds)} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def _ended(workdir: str) -> dict:
  return files.read_json_or_none(os.path.join(workdir, 'ended.json')) or {}


def _shown(d: stats.Estimate) -> str:
  return f'{100 * d.value:+.1f} ({100 * d.low:+.1f} … {100 * d.high:+.1f})'


def main(argv, f=flags.FLAGS):
  """Runs what is missing, and prints the table."""
  cli.no_arguments(argv)
  cli.require(output=f.output)
  unknown = sorted(set(f.levers) - set(LEVERS))
  if unknown:
    raise InputError(f'--levers: {unknown[0]} is unknown; choose from {", ".join(LEVERS)}')
  if not f.table:
    for seed in map(int, f.seeds):
      for lever in f.levers or LEVERS:
        workdir = place(f.output, lever, seed)
        if _ended(workdir):
          continue
        began, used = time.time(), time.process_time()
        config = config_of(lever, seed, f.steps, f.prompts_per_task)
        summary = train.run(config, workdir, builders(f.output))
        with open(summary, encoding='utf-8') as file:
          if not json.load(file)['finished']:
            return 1  # stopped by a signal
        # since the last start, if the run was interrupted
        took = {
          'seconds': time.time() - began,
          'core_seconds': time.process_time() - used,
        }
        files.write_json(os.path.join(workdir, 'ended.json'), took)
  print(table(f.output))


def define_flags(f=flags.FLAGS):
  flag_types.define_path('output', None, 'Folder of all runs.', f)
  flags.DEFINE_list('levers', [], f'Any of {", ".join(LEVERS)} (default: all).', flag_values=f)
  flags.DEFINE_list('seeds', ['0', '1'], 'Seeds of each lever.', flag_values=f)
  flags.DEFINE_integer('steps', 80, 'Steps of each run.', lower_bound=6, flag_values=f)
  flags.DEFINE_integer('prompts_per_task', 60, 'For the evaluation.', lower_bound=1, flag_values=f)
  flags.DEFINE_bool('table', False, 'Run nothing, only print the table.', flag_values=f)


if __name__ == '__main__':
  cli.run_main(main, define_flags)
