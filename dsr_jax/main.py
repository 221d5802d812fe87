"""Trains, or goes on training.

  python -m dsr_jax.main --config=configs/scenes.py --workdir=DIR [--config.key=value]

On several hosts: the same command on each, which on a TPU slice (with `tpu/`) or under Slurm find
  one another; elsewhere with --coordinator=HOST:PORT --processes=M --process=0   (1, 2, ... on the
  others; PORT and PORT + 1 of HOST must be open)
"""

from absl import flags
from ml_collections import config_flags

from dsr_jax import config as config_lib
from dsr_jax import errors
from dsr_jax.runtime import distributed as processes

# configs/ lies beside the package, and its files import one another

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'The run: a file of configs/, its keys set by --config.key=value.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'The folder the run leaves everything in; a run that was stopped there goes on.'
)
_COORDINATOR = flags.DEFINE_string('coordinator', '', 'Several processes: HOST:PORT of the first.')
_PROCESSES = flags.DEFINE_integer('processes', 0, 'Several processes: how many.')
_PROCESS = flags.DEFINE_integer('process', -1, 'Several processes: which one this is, from 0.')
_WAIT_SECONDS = flags.DEFINE_float('wait_seconds', 300, 'How long to wait for the other processes.')


def main(argv):
  """Runs the job; prints the path of its summary on stdout."""
  if len(argv) > 1:
    raise errors.InputError(
      f'found the stray argument {argv[1]!r}; expected flags only; write --name=value'
    )
  if not _WORKDIR.value:
    raise errors.InputError(
      'found no --workdir; expected a folder to leave the run in; name one, as '
      '--workdir=runs/scenes'
    )
  config = config_lib.from_config_dict(_CONFIG.value)
  cluster = processes.find(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
  with processes.together(cluster, _WAIT_SECONDS.value) as team:
    from dsr_jax import train  # JAX starts here: --help and wrong flags need not wait for it

    summary = train.run(config, _WORKDIR.value, team=team)
  if team.lead:
    print(summary)


if __name__ == '__main__':
  errors.run_main(main, config_lib.check_flags)
