"""Dual self-rewards for unified multimodal models, in JAX (arXiv 2506.07963).

  import dsr_jax as dsr

  model = dsr.load('scenes')
  images = model.generate('a red disc left of a blue square')
  texts = model.describe(images[0].image)
  run = dsr.train('scenes_tiny', 'runs/tiny')

Importing the package does not import JAX: names from `dsr_jax.api` are loaded on first use.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING

from dsr_jax import environment

if TYPE_CHECKING:  # `train` is missing here because it is also a module, see the end of train.py
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

# From `dsr_jax.api`.
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

# Set before transformers is imported: otherwise every command would first print that torch is
# missing, which nothing here needs. A level that the user has set stays.
os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')

if sys.argv[:1] == ['-m']:  # a command begins: python -m dsr_jax.NAME
  environment.begin_imports()


def __getattr__(name: str):
  if name not in __all__:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  api = importlib.import_module('dsr_jax.api')
  # This import has already set `train` to the module `dsr_jax.train`, which can be called.
  if name not in globals():
    globals()[name] = getattr(api, name)
  return globals()[name]


def __dir__():
  return sorted({*globals(), *__all__})
