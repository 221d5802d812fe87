"""What the commands share: checks of their flags, and output that appears whole or not at all."""

import contextlib
import json
import os
import shutil
import sys
import tempfile

from dsr_jax.errors import InputError

# The tokenizer's library would say at every start that it found no PyTorch, which nothing here
# needs.
os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')


def no_arguments(argv):
  """InputError for words on the command line that are no flags."""
  if len(argv) > 1:
    raise InputError(
      f'found the stray argument {argv[1]!r}; expected flags only; write --name=value, in quotes '
      'where '
      'it has spaces'
    )


def require(**values):
  """InputError for the first of the named flags that was left empty."""
  for name, value in values.items():
    if value is None or value == '':
      raise InputError(f'found no --{name}; expected a value; add --{name}=..., or see --help')


def check_sampling(
  num_samples: int, temperature: float, seed: int, cfg_weight: float | None = None
):
  """InputError for numbers no model can sample with."""
  if num_samples < 1:
    raise InputError(f'found --num_samples={num_samples}; expected at least 1; raise it')
  if not 0 <= temperature < float('inf'):
    raise InputError(f'found --temperature={temperature}; expected 0 (greedy) or more; change it')
  if cfg_weight is not None and not 0 <= cfg_weight < float('inf'):
    raise InputError(
      f'found --cfg_weight={cfg_weight}; expected 0 or more (1 is without guidance); change it'
    )
  if not 0 <= seed < 2**32:
    raise InputError(f'found --seed={seed}; expected 0 to 4294967295; change it')


def log(message: str):
  """Progress, for people: stderr."""
  print(message, file=sys.stderr, flush=True)


def print_json(value):
  """The result, for machines: stdout."""
  print(json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False), flush=True)


def rounded(values) -> list[float]:
  """float32 values as the shortest JSON numbers that read back as the same float32."""
  return [float(str(value)) for value in values]


def check_output(directory: str, ours):
  """InputError unless `directory` can become a command's output; called before any work.

  ours: says of a file name whether this command writes such files; a folder of nothing else is
    replaced.
  """
  if os.path.lexists(directory) and not os.path.isdir(directory):
    raise InputError(
      f'found the file {directory}; expected a new folder for --output; name another'
    )
  if os.path.isdir(directory):
    others = [
      name for _, folders, files in os.walk(directory) for name in folders + files if not ours(name)
    ]
    if others:
      raise InputError(
        f'found {others[0]} in {directory}; expected a new or empty folder for --output, or an '
        'earlier '
        'output of this command; name another'
      )
  parent = _parent(directory)
  above = parent
  while not os.path.exists(above):
    above = os.path.dirname(above)
  if not os.path.isdir(above) or not os.access(above, os.W_OK | os.X_OK):
    raise InputError(
      f'cannot write to {above}; expected a writable folder for --output; name another'
    )


@contextlib.contextmanager
def whole_directory(directory: str):
  """A temporary folder beside `directory` that takes its name once the block is done, and vanishes
  if it fails.
  """
  parent = _parent(directory)
  try:
    os.makedirs(parent, exist_ok=True)
    aside = tempfile.mkdtemp(prefix=f'.{os.path.basename(os.path.abspath(directory))}-', dir=parent)
  except OSError as e:
    raise InputError(
      f'cannot write to {parent} ({e.strerror}); expected a writable folder for --output; '
      'name another'
    ) from e
  try:
    yield aside
    os.chmod(aside, 0o755)  # mkdtemp makes private ones
    if os.path.isdir(directory):
      old = tempfile.mkdtemp(prefix='.old-', dir=parent)
      os.rename(directory, os.path.join(old, 'output'))
      os.rename(aside, directory)
      shutil.rmtree(old)
    else:
      os.rename(aside, directory)
  except OSError as e:
    raise InputError(
      f'cannot write {directory} ({e.strerror}); expected room and leave to write; '
      'free some or name another --output'
    ) from e
  finally:
    shutil.rmtree(aside, ignore_errors=True)


def _parent(directory):
  return os.path.dirname(os.path.abspath(directory))
