"""The former name of the command `dsr_jax.study.clip`: `python -m dsr_jax.scenes.clip`."""

import runpy

if __name__ == '__main__':
  # Run it by name instead of importing it: scenes must not depend on study.
  runpy.run_module('dsr_jax.study.clip', run_name='__main__')
