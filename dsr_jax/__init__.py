"""Dual self-rewards for unified multimodal models, in JAX (arXiv 2506.07963).

  import dsr_jax as dsr

  model = dsr.load('scenes')
  pictures = model.generate('a red disc left of a blue square')
  texts = model.describe(pictures[0].image)
  run = dsr.train('scenes_tiny', 'runs/tiny')

Importing the package imports no JAX: what is in `dsr_jax.api` is loaded when it is first named.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING

from dsr_jax import environment

if TYPE_CHECKING:  # for who checks types; `train` is the module too, see its end
  from dsr_jax.api import (
    Description,
    Drawing,
    Explanation,
    InputError,
    Model,
    Run,
    Score,
    Word,
    load,
  )

__version__ = '0.1.0'

# Of `dsr_jax.api`.
__all__ = [
  'Description',
  'Drawing',
  'Explanation',
  'InputError',
  'Model',
  'Run',
  'Score',
  'Word',
  '__version__',
  'load',
  'train',
]

# Before transformers is imported: it would say on every command's first line that there is no
# torch, which nothing here needs. Who has asked for more keeps it.
os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')

if sys.argv[:1] == ['-m']:  # a command begins: python -m dsr_jax.NAME
  environment.begin_imports()


def __getattr__(name: str):
  if name not in __all__:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  api = importlib.import_module('dsr_jax.api')
  # With it has come the module `dsr_jax.train`, which can be called.
  if name not in globals():
    globals()[name] = getattr(api, name)
  return globals()[name]


def __dir__():
  return sorted({*globals(), *__all__})
