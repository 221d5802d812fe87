"""Imports and exports checkpoints in either layout; only this package knows foreign tensor names.

python -m dsr_jax.convert --source=MODEL --target=DIR --format=hf
"""

from dsr_jax.convert.directory import (
  Bundle,
  Stored,
  check_target,
  export,
  load,
  open_stored,
  read_config,
  save,
)

__all__ = [
  'Bundle',
  'Stored',
  'check_target',
  'export',
  'load',
  'open_stored',
  'read_config',
  'save',
]
