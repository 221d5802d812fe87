"""Runs the study: variants x seeds x bases. Each cell runs once and is kept; tables and figures use
all existing cells.

  python -m dsr_jax.study --config=configs/scenes_study.py --output=runs/study --tune
  python -m dsr_jax.study --config=configs/scenes_study.py --output=runs/study
      [--variants=unified,grpo] [--seeds=0,1] [--bases=scenes,second=DIR] [--lanes=5] [--retry]
      [--tables_only]

The first command chooses learning rates on validation; the second runs the study. Run the same
command again to resume with the missing cells. Failed cells are kept and reported; --retry reruns
them. Results are in DIR/results (README.md, results.json, figures). Exit status: 0; 1 if a cell
failed; 2 for bad input.
"""

import sys

from absl import flags

from dsr_jax import cli, config_loading, flag_types
from dsr_jax.runtime import workdir
from dsr_jax.study import design, figures, lanes, runner
from dsr_jax.study.bench import Bench
from dsr_jax.study.cells import record_of
from dsr_jax.study.variants import VARIANTS


def main(argv, f=flags.FLAGS):
  """Prints a summary as JSON."""
  cli.no_arguments(argv)
  cli.require(config=f.config, output=f.output)
  figures.check_matplotlib()
  variants = design.chosen_variants(f.variants)
  seeds = design.chosen_seeds(f.seeds)
  study = design.from_config(f.config, f.output, f.bases, _command())
  bases = [base.partition('=')[0] for base in f.bases] or None
  study.tune_cells(variants)  # raises for a wrong setting, before anything is loaded
  workdir.check_writable(study.directory)
  workdir.check_accelerator()
  most_lanes = lanes.number(f.lanes)

  bench = Bench(study)
  fingerprints = {name: bench.fingerprint(study.bases[name]) for name in bases or study.bases}
  design.check_same_study(study, fingerprints)
  workdir.use_compile_cache(study.compile_cache)
  with workdir.locked(study.directory):
    cells = study.tune_cells(variants) if f.tune else study.cells(variants, seeds, bases)
    if f.tables_only:
      records = [record_of(cell) for cell in cells]
    else:
      records = runner.run_cells(study, cells, bench, f.retry, most_lanes)
    out = {'output': study.directory, 'cells': len(cells), **_counts(records)}
    if f.tune:
      out['tuning'] = {name: found for name, found in study.tuning().items() if name in variants}
    else:
      computing = not f.tables_only and None not in records
      out['results'] = runner.finish(study, cells, bench if computing else None)
  cli.print_json(out, kept=study.directory)
  return 1 if out['failed'] else 0


def _counts(records):
  states = [record['state'] if record else 'waiting' for record in records]
  return {name: states.count(name) for name in ('finished', 'failed', 'waiting')}


def _command():
  return ' '.join(['python -m dsr_jax.study', *sys.argv[1:]])


def define_flags(f=flags.FLAGS):
  config_loading.define_config_flag(
    'config',
    'Config file of the study, configs/scenes_study.py; set its keys with --config.key=value.',
    f,
    prefix='run.',
  )
  flag_types.define_path('output', None, 'Folder of the study. Finished cells in it are kept.', f)
  flags.DEFINE_list('variants', [], f'Any of {", ".join(VARIANTS)} (default: all).', flag_values=f)
  flags.DEFINE_list(
    'seeds',
    [],
    'Seeds of every variant (default: config.seeds; for controls, config.control_seeds).',
    flag_values=f,
  )
  flag_types.define_paths(
    'bases',
    [],
    "Names in config.bases, or NAME=MODEL (default: all for the paper's variants, the first for "
    'controls).',
    f,
  )
  flags.DEFINE_bool(
    'tune',
    False,
    'Choose learning rates on validation instead, with the same grid for every variant.',
    flag_values=f,
  )
  flags.DEFINE_string(
    'lanes',
    'auto',
    'Number of seeds of a variant (with --tune, of learning rates) that run side by side in one '
    'program; auto: one on CPUs, all on one accelerator.',
    flag_values=f,
  )
  flags.DEFINE_bool('retry', False, 'Rerun failed cells from the start.', flag_values=f)
  flags.DEFINE_bool(
    'tables_only', False, 'Run nothing; make tables and figures from existing cells.', flag_values=f
  )


if __name__ == '__main__':
  cli.run_main(main, define_flags)
