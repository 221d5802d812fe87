"""Dual self-rewards for unified multimodal models, in JAX (arXiv 2506.07963)."""

import os
import sys

from dsr_jax import environment

# Before transformers is imported: it would say on every command's first line that there is no
# torch, which nothing here needs. Who has asked for more keeps it.
os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')

if sys.argv[:1] == ['-m']:  # a command begins: python -m dsr_jax.NAME
  sys.excepthook = environment.while_imported
