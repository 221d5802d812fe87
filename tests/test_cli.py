"""What the commands share: one form of flags, and checks of what they are given."""

import ast

from absl import flags
from places import ROOT
import pytest

from dsr_jax import cli
from dsr_jax.errors import InputError

MODULES = sorted((ROOT / 'dsr_jax').rglob('*.py'))
COMMANDS = [
  path
  for path in MODULES
  if "if __name__ == '__main__':" in path.read_text()
  and 'runpy.run_module(' not in path.read_text()  # a command's former name
  and path.name != 'coordination_log.py'  # a filter of a process's own, which nobody types
]


def name(path):
  return str(path.relative_to(ROOT))


def functions(path):
  return {node.name: node for node in ast.parse(path.read_text()).body if hasattr(node, 'name')}


@pytest.mark.parametrize('path', COMMANDS, ids=name)
def test_a_command_defines_and_reads_its_flags_in_the_holder_that_it_is_given(path):
  found = functions(path)
  assert [a.arg for a in found['define_flags'].args.args] == ['f']
  assert [a.arg for a in found['main'].args.args] == ['argv', 'f']


def test_importing_a_module_defines_no_flags():
  assert len(COMMANDS) > 10
  for path in MODULES:
    for node in ast.parse(path.read_text()).body:
      if isinstance(node, ast.Assign | ast.AnnAssign | ast.Expr):
        assert 'DEFINE_' not in ast.unparse(node), f'{name(path)}:{node.lineno}'


def test_words_that_are_no_flags_and_flags_left_empty_are_one_sentence():
  cli.no_arguments(['program'])
  cli.require(model='scenes', text='x')
  with pytest.raises(InputError, match="unexpected argument 'red': this command takes flags only"):
    cli.no_arguments(['program', 'red'])
  with pytest.raises(InputError, match='--text is missing; add --text='):
    cli.require(model='scenes', text='')


def test_a_flag_with_choices_names_them():
  f = flags.FlagValues()
  flags.DEFINE_enum('do', 'draw', ['draw', 'write'], 'What to do.', flag_values=f)
  with pytest.raises(InputError, match='--do=sing should be one of draw, write'):
    cli.parse(f, ['program', '--do=sing'])


@pytest.mark.parametrize(
  'changes, found',
  [
    (dict(num_samples=0), '--num_samples is 0; set it to .* from 1 to'),
    (dict(temperature=-1.0), '--temperature is -1.0; set it to 0'),
    (dict(temperature=float('nan')), '--temperature is nan; set it to 0'),
    (dict(cfg_weight=float('inf')), '--cfg_weight is inf; set it to'),
    (dict(seed=2**32), '--seed is 4294967296; set it to .* from 0 to'),
  ],
)
def test_numbers_that_no_model_can_sample_with_are_refused(changes, found):
  good = dict(num_samples=1, temperature=0.0, seed=0, cfg_weight=None)
  cli.check_sampling(**good)
  with pytest.raises(InputError, match=found):
    cli.check_sampling(**good | changes)
