"""What the commands share: checks of their flags, and what they print.

Every command module has `define_flags(f)`, which adds its flags to an absl `FlagValues`, and
`main(argv, f)`, which reads them there; importing one defines nothing.
"""

import json
import sys

from dsr_jax.errors import InputError


def no_arguments(argv):
  """InputError for words on the command line that are no flags."""
  if len(argv) > 1:
    raise InputError(
      f'found the stray argument {argv[1]!r}; expected flags only; write --name=value, in quotes '
      'where it has spaces'
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
  r"""The result, for machines: stdout. Bytes of a path that are not UTF-8 become JSON's \udcXX."""
  text = json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False)
  print(text.encode('utf-8', 'backslashreplace').decode('utf-8'), flush=True)


def rounded(values) -> list[float]:
  """float32 values as the shortest JSON numbers that read back as the same float32."""
  return [float(str(value)) for value in values]
