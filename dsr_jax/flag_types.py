"""Flags for paths. A shell does not expand `--output=~/x`, nor quoted text in a script, so `~` and
`$VAR` are expanded here, for every flag that takes a path or a model.
"""

from absl import flags

from dsr_jax import inputs

flags.disclaim_key_flags()  # --help lists these flags under the command, not under this module


class _PathParser(flags.ArgumentParser):
  """A path, or a model's name."""

  def __init__(self, name):
    self._name = name

  def parse(self, argument):
    return inputs.expanded(argument, f'--{self._name}')

  def flag_type(self):
    return 'path'


class _PathsParser(_PathParser):
  """Several paths, separated by commas; NAME=PATH is allowed, and only the path is expanded."""

  def parse(self, argument):
    if isinstance(argument, list):  # a default
      return argument
    found = [part.strip() for part in argument.split(',') if part.strip()]
    return [self._one(part) for part in found]

  def _one(self, part):
    name, equals, path = part.rpartition('=')
    return name + equals + super().parse(path)


def define_path(name, default, help, f=flags.FLAGS):
  """Defines a flag whose value is a path, or the name of a model."""
  flags.DEFINE(_PathParser(name), name, default, help, f)


def define_paths(name, default, help, f=flags.FLAGS):
  """Defines a flag whose value is a list of such values."""
  flags.DEFINE(_PathsParser(name), name, default, help, f, flags.ListSerializer(','))
