"""Trains a model, or resumes its training.

  python -m dsr_jax.main --config=configs/scenes.py --workdir=DIR [--config.key=value]

On several hosts, run the same command on each. On a TPU slice (with `tpu/`), under Slurm or under
Open MPI, the processes find each other. Elsewhere, add --coordinator=HOST:PORT --processes=M
--process=0 (1, 2, ... on the others; PORT of HOST must be open).
"""

from absl import flags

from dsr_jax import cli, config_loading, flag_types, train
from dsr_jax.runtime import cpu, distributed


def main(argv, f=flags.FLAGS):
  """Runs the job; prints the path of its summary on stdout."""
  cli.no_arguments(argv)
  cli.require(workdir=f.workdir)
  config = config_loading.from_config_dict(f.config)
  cluster = distributed.find(f.coordinator, f.processes, f.process)
  if cluster is None:
    config = cpu.divide(config)
  with distributed.together(cluster, f.wait_seconds) as team:
    summary = train.run(config, f.workdir, team=team, accept_changed_data=f.accept_changed_data)
  if team.lead:
    cli.print_text(summary, kept=f.workdir)


def define_flags(f=flags.FLAGS):
  config_loading.define_config_flag(
    'config', 'Config file of the run, from configs/; set its keys with --config.key=value.', f
  )
  flag_types.define_path(
    'workdir',
    None,
    'Folder for all outputs of the run. A run that was stopped there resumes.',
    f,
  )
  flags.DEFINE_bool(
    'accept_changed_data',
    False,
    'Resume even if prompts or images have changed.',
    flag_values=f,
  )
  flags.DEFINE_string(
    'coordinator', None, 'HOST:PORT of the first process, for several processes.', flag_values=f
  )
  flags.DEFINE_integer('processes', None, 'Number of processes.', flag_values=f)
  flags.DEFINE_integer('process', None, 'Index of this process, from 0.', flag_values=f)
  flags.DEFINE_float('wait_seconds', 120, 'Seconds to wait for the other processes.', flag_values=f)


if __name__ == '__main__':
  cli.run_main(main, define_flags)
