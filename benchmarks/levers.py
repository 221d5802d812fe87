"""What takes more of the reward: short runs that each change one thing in configs/scenes.py at
temperature 1.

  python -m benchmarks.levers --output=runs/levers [--levers=plain,credit_guidance --seeds=0,1]
  python -m benchmarks.levers --output=runs/levers --table

All runs have the same prompts, images and keys, and the same number of steps, and are evaluated at
their last step on the validation lists, so that the evaluation lists stay unused for the settings
that win. Run the same command again to resume; two of them with different levers or seeds can work
in one folder. Prints a Markdown table of all finished runs: generation and the F1 and hallucination
of descriptions, each against the base at the run's temperature and against the lever `plain` of the
same seeds, generation also against the base at the temperature at which it draws best, with 95 %
bootstraps over seeds and prompts or images; and the time of all cores, with the evaluation.
"""

import dataclasses
import glob
import json
import os
import time

from absl import flags
import numpy as np

from benchmarks import chosen_inputs, clean_pairs
from dsr_jax import cli, config_loading, effect, files, flag_types, train
from dsr_jax import state as state_lib
from dsr_jax.errors import InputError
from dsr_jax.evaluate import scores
from dsr_jax.evaluate.evaluator import Evaluator
from dsr_jax.runtime import cpu
from dsr_jax.scenes import grammar, sets
from dsr_jax.study import scores as study_scores

SPLIT = 'validation'
BEST_TEMPERATURE = 0.5  # the base draws best there, on validation
PLAIN, CLEAN_PAIRS = 'plain', 'clean_pairs'
HIGH_SPREAD, PAIRED = 'high_spread', 'paired'
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
  'judge_strict': {'reward': 'judge_strict'},
  # no reward: `benchmarks.clean_pairs`
  CLEAN_PAIRS: {},
  # what is sampled
  'temperature_0.7': {'temperature': 0.7},
  'temperature_0.5': {'temperature': 0.5},
  'temperature_0.3': {'temperature': 0.3},
  'temperature_0.5_kl_0.1': {'temperature': 0.5, 'kl': 0.1},
  'temperature_0.5_frozen': {'temperature': 0.5, 'scorer': 'frozen'},
  'temperature_0.5_frozen_kl_0.1': {'temperature': 0.5, 'scorer': 'frozen', 'kl': 0.1},
  'temperature_0.5_judge_strict': {'temperature': 0.5, 'reward': 'judge_strict'},
  'temperature_0.3_frozen': {'temperature': 0.3, 'scorer': 'frozen'},
  'temperature_0.3_rarity': {'temperature': 0.3, 'credit': 'rarity'},
  'plain_sampled_at_0.5': {},
  # where the samples go
  'generation': {'task': 'generation', 'inputs_per_step': 16},
  'group_16': {'group_size': 16, 'inputs_per_step': 16},
  'inputs_128': {'inputs_per_step': 128},
  # which inputs: `benchmarks.chosen_inputs`
  HIGH_SPREAD: {},
  PAIRED: {},
}

# Levers that are evaluated at another temperature than that of the run.
EVALUATED_AT = {'plain_sampled_at_0.5': 0.5}

CHOSEN_INPUTS = {HIGH_SPREAD: chosen_inputs.HighSpread, PAIRED: chosen_inputs.Paired}


def config_of(
  lever: str,
  seed: int,
  steps: int,
  prompts_per_task: int,
  eval_every: int = 0,
  compile_cache: str = '',
):
  """The configuration of a run. Six times as many images are described."""
  setting = {'temperature': 1.0, **LEVERS[lever]}
  changes = {f'method__{key}': value for key, value in setting.items()}
  return config_loading.load(
    'scenes',
    **changes,
    method__seed=seed,
    method__steps=steps,
    eval__prompts_per_task=prompts_per_task,
    eval__pictures=6 * prompts_per_task,
    eval__quick_prompts_per_task=prompts_per_task,
    eval__quick_pictures=6 * prompts_per_task,
    eval__tuned_temperature=-1.0,
    eval__watched=0,
    system__samples_every=0,
    system__frozen_every=0,
    system__eval_every=eval_every,
    system__keep_last=1,
    system__compile_cache=compile_cache,
  )


def builders(folder: str, lever: str) -> train.Builders:
  """Those of a real run, but evaluated on the validation lists; the base only once."""

  def make_evaluator(config, model):
    if lever in EVALUATED_AT:
      method = dataclasses.replace(config.method, temperature=EVALUATED_AT[lever])
      config = dataclasses.replace(config, method=method)
    evaluator = Evaluator(config, model.processor, model.graphdef, SPLIT)
    path = base_path(folder, config.eval.prompts_per_task, config.method.temperature)

    def evaluate(state, step):
      kept = files.read_json_or_none(path) if step == 0 else None
      if kept is None:
        found, rows = evaluator.run(state_lib.policy_params(state, model.family), step)
        kept = {'scores': found, 'rows': {name: np.asarray(x).tolist() for name, x in rows.items()}}
        if step == 0:
          files.write_json(path, kept)
      return kept['scores'], kept['rows']

    return evaluate

  found = dataclasses.replace(train.Builders(), make_evaluator=make_evaluator)
  if lever in CHOSEN_INPUTS:
    return dataclasses.replace(found, make_batches=CHOSEN_INPUTS[lever])
  if lever != CLEAN_PAIRS:
    return found
  return dataclasses.replace(
    found,
    make_batches=clean_pairs.Pairs,
    make_train_step=clean_pairs.make_train_step,
    make_watcher=lambda *args: None,
  )


def base_path(folder: str, prompts_per_task: int, temperature: float) -> str:
  """The file of the base's evaluation at a temperature."""
  return os.path.join(folder, f'base_{prompts_per_task}_{temperature}.json')


def place(folder: str, lever: str, seed: int) -> str:
  return os.path.join(folder, lever, f'seed_{seed}')


def ended(workdir: str) -> dict:
  """What is kept of a run that has ended; {} if it has not."""
  return files.read_json_or_none(os.path.join(workdir, 'ended.json')) or {}


def check_same(workdir: str, kept: dict, sizes: dict):
  """InputError if a finished run has other sizes than those asked for."""
  different = [f'--{name}={kept[name]}' for name in sizes if kept[name] != sizes[name]]
  if different:
    raise InputError(
      f'{workdir} ended with {", ".join(different)}; use the same sizes, or another --output'
    )


def finished(folder: str) -> dict[str, dict[int, str]]:
  """{lever: {seed: workdir}} of the runs that have ended."""
  found: dict[str, dict[int, str]] = {}
  for lever in LEVERS:
    for workdir in sorted(glob.glob(os.path.join(glob.escape(folder), lever, 'seed_*'))):
      if ended(workdir):
        found.setdefault(lever, {})[int(workdir.rpartition('_')[2])] = workdir
  return found


def score(name: str, rows) -> study_scores.Score:
  """A score of several seeds, with its draws over seeds and prompts or images. rows: (N, P, S) or
  (N, C, M).
  """
  if name != 'generation':
    return study_scores.score(rows, scores.DESCRIPTION[name])
  prompts = sets.evaluation_prompts(len(rows[0]) // len(grammar.GENEVAL), SPLIT)
  sums = [scores.generation_sums(prompts, np.asarray(one)) for one in rows]
  return study_scores.score([one for one, _ in sums], scores.mean_of_tasks, sums[0][1])


def table(folder: str) -> str:
  """All finished runs as Markdown, in points."""
  runs = finished(folder)
  effect.check_comparable(
    *zip(
      *(
        (workdir, effect.rows_of(workdir, 0), effect.rows_of(workdir, effect.last_step(workdir)))
        for seeds in runs.values()
        for workdir in seeds.values()
      )
    )
  )
  best = _base_at_its_best(folder, runs)
  lines = [
    '| lever | seeds | generation - base | - base at its best | - plain | F1 - base | - plain | '
    'hallucination - base | - plain | core-minutes |',
    '|---|---:|---|---|---|---|---|---|---|---:|',
  ]
  for lever, seeds in runs.items():
    common = sorted(set(seeds) & set(runs.get(PLAIN, {}))) if lever != PLAIN else []
    cells = []
    for name in ('generation', 'f1', 'hallucination'):
      here = _scored(name, [seeds[seed] for seed in sorted(seeds)])
      cells.append(_shown(here - _scored(name, [seeds[seed] for seed in sorted(seeds)], 0)))
      if name == 'generation':
        cells.append('' if best is None else _shown(here - best))
      if common:
        theirs = _scored(name, [runs[PLAIN][seed] for seed in common])
        cells.append(_shown(_scored(name, [seeds[seed] for seed in common]) - theirs))
      else:
        cells.append('')
    minutes = np.mean([ended(workdir)['core_seconds'] for workdir in seeds.values()]) / 60
    lines.append(f'| {lever} | {len(seeds)} | {" | ".join(cells)} | {minutes:.1f} |')
  return '\n'.join(lines)


def _base_at_its_best(folder: str, runs) -> study_scores.Score | None:
  """The base's generation at BEST_TEMPERATURE, if a run of the folder has evaluated it."""
  workdir = next(iter(next(iter(runs.values())).values()))
  path = base_path(folder, ended(workdir)['prompts_per_task'], BEST_TEMPERATURE)
  kept = files.read_json_or_none(path)
  return None if kept is None else score('generation', [kept['rows']['generation']])


def _scored(name: str, workdirs, step: int | None = None) -> study_scores.Score:
  """A score of these runs at a step, by default the last one."""
  rows = 'generation' if name == 'generation' else 'description'

  def of(workdir):
    return effect.rows_of(workdir, effect.last_step(workdir) if step is None else step)[rows]

  return score(name, [of(workdir) for workdir in workdirs])


def _shown(d: study_scores.Score) -> str:
  low, high = d.interval
  return f'{100 * d.value:+.1f} ({100 * low:+.1f} … {100 * high:+.1f})'


def seeds_of(words) -> list[int]:
  """--seeds as numbers."""
  try:
    return [int(word) for word in words]
  except ValueError as e:
    raise InputError(f'--seeds is {",".join(words)}; use whole numbers') from e


def main(argv, f=flags.FLAGS):
  """Runs what is missing, and prints the table."""
  cli.no_arguments(argv)
  cli.require(output=f.output)
  unknown = sorted(set(f.levers) - set(LEVERS))
  if unknown:
    raise InputError(f'--levers: {unknown[0]} is unknown; choose from {", ".join(LEVERS)}')
  seeds = seeds_of(f.seeds)
  sizes = {'steps': f.steps, 'prompts_per_task': f.prompts_per_task}
  if not f.table:
    for seed in seeds:
      for lever in f.levers or LEVERS:
        workdir = place(f.output, lever, seed)
        if kept := ended(workdir):
          check_same(workdir, kept, sizes)
          continue
        began, used = time.time(), time.process_time()
        cache = os.path.join(f.output, 'compile_cache')  # seeds share their programs
        asked = config_of(lever, seed, eval_every=f.eval_every, compile_cache=cache, **sizes)
        config = cpu.divide(asked)
        summary = train.run(config, workdir, builders(f.output, lever))
        with open(summary, encoding='utf-8') as file:
          if not json.load(file)['finished']:
            return 1  # stopped by a signal
        # since the last start, if the run was interrupted
        took = {
          'seconds': time.time() - began,
          'core_seconds': time.process_time() - used,
        }
        files.write_json(os.path.join(workdir, 'ended.json'), sizes | took)
  print(table(f.output) if finished(f.output) else 'no run has ended')


def define_flags(f=flags.FLAGS):
  flag_types.define_path('output', None, 'Folder of all runs.', f)
  flags.DEFINE_list('levers', [], f'Any of {", ".join(LEVERS)} (default: all).', flag_values=f)
  flags.DEFINE_list('seeds', ['0', '1'], 'Seeds of each lever.', flag_values=f)
  flags.DEFINE_integer('steps', 80, 'Steps of each run.', lower_bound=6, flag_values=f)
  flags.DEFINE_integer('prompts_per_task', 60, 'For the evaluation.', lower_bound=1, flag_values=f)
  flags.DEFINE_integer(
    'eval_every',
    0,
    'Steps between further evaluations on the same lists; 0: none.',
    lower_bound=0,
    flag_values=f,
  )
  flags.DEFINE_bool('table', False, 'Run nothing, only print the table.', flag_values=f)


if __name__ == '__main__':
  cli.run_main(main, define_flags)
