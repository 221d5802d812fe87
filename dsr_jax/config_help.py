"""The keys of a configuration for --help: each with its default and its meaning, which is the
comment at its field in `config.py`.
"""

import dataclasses
import inspect
import textwrap

from dsr_jax import config as config_lib
from dsr_jax import saved_config

_INDENT = ' ' * 8


def text(prefix: str = '') -> str:
  """Every key of `config.Config`. prefix: the group that contains them, such as 'run.'."""
  meaning = meanings()
  lines = ['Keys of the config, set by --config.KEY=VALUE, and their defaults:']
  for key, value in saved_config.flat(dataclasses.asdict(config_lib.Config())).items():
    lines.append(f'  {prefix}{key}={value!r}')
    lines += textwrap.wrap(
      meaning[key], 92, initial_indent=_INDENT, subsequent_indent=_INDENT, break_on_hyphens=False
    )
  return '\n'.join(lines)


def meanings(kind=config_lib.Config, prefix='') -> dict[str, str]:
  """{key: its meaning, or '' if the name says it} of a dataclass and of nested dataclasses."""
  comments = _comments(kind)
  found = {}
  for field in dataclasses.fields(kind):
    key = f'{prefix}{field.name}'
    if dataclasses.is_dataclass(field.type):
      found |= meanings(field.type, f'{key}.')
    else:
      found[key] = comments.get(field.name, '')
  return found


def _comments(kind) -> dict[str, str]:
  """{field: the comment after it, or the comments above it} in a dataclass's source."""
  found, above = {}, []
  for line in inspect.getsource(kind).splitlines():
    code, _, comment = line.partition('  # ' if not line.strip().startswith('#') else '# ')
    name = code.partition(':')[0].strip()
    if not code.strip():
      above.append(comment.strip())
    elif ': ' in code and '=' in code:
      found[name] = ' '.join([*above, comment.strip()]).strip()
      above = []
    else:
      above = []
  return found
