"""The former name of the command `dsr_jax.study.clip`: `python -m dsr_jax.scenes.clip`."""

import runpy

if __name__ == '__main__':
  # By its name and not by an import: scenes knows nothing of study.
  runpy.run_module('dsr_jax.study.clip', run_name='__main__')
