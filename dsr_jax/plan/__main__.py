"""Plans a run for a slice without the slice: does it fit, what does it compute, how long does it
take?

  python -m dsr_jax.plan --config=configs/janus_pro_7b.py --topology=v5e:8x8 [--config.key=value]

For TPU slices, the real TPU compiler compiles the real step (libtpu, from requirements-tpu.txt; no
TPU needed). For other devices, such as h200:8, the plan only counts memory and operations. Prints
a table on stderr and JSON on stdout.
"""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'  # before JAX: only the TPU compiler is needed, not a TPU
os.environ['TPU_SKIP_MDS_QUERY'] = '1'

# pylint: disable=wrong-import-position
from absl import flags

from dsr_jax import cli, config_loading, files, flag_types
from dsr_jax.errors import InputError
from dsr_jax.plan import report as report_lib


def main(argv, f=flags.FLAGS):
  """Prints the plan; the exit status is 2 if it does not fit."""
  cli.no_arguments(argv)
  if not f.topology:
    raise InputError(
      '--topology is missing; name a slice, such as --topology=v5e:8x8 or --topology=h200:8'
    )
  config = config_loading.from_config_dict(f.config)
  if f.hlo:
    files.check_output_file(f.hlo, '--hlo')
  report, estimate = report_lib.plan(config, f.topology, f.compile, f.hlo)
  cli.log(report_lib.table(report, estimate))
  cli.print_json(report)
  report_lib.check_fits(report)


def define_flags(f=flags.FLAGS):
  config_loading.define_config_flag(
    'config', 'Config file of the run, from configs/; set its keys with --config.key=value.', f
  )
  flags.DEFINE_string(
    'topology', None, 'The slice, such as v5e:8x8, v5p:4x4x4, v6e:8x8, h200:8.', flag_values=f
  )
  flags.DEFINE_bool(
    'compile',
    True,
    'Compile the step for a TPU slice; --nocompile only counts memory and operations.',
    flag_values=f,
  )
  flag_types.define_path('hlo', '', 'Output file for the text of the compiled program.', f)


if __name__ == '__main__':
  cli.run_main(main, define_flags)
