"""The one command: `dsr COMMAND --flag=value`, also as `python -m dsr_jax COMMAND`.

Each command is a module that is run as `python -m MODULE` would run it, so both ways do the same.
Nothing heavy is imported before it is known which one: the list of commands appears at once.
"""

import difflib
import runpy
import sys
from typing import NamedTuple

import dsr_jax
from dsr_jax import environment


class Command(NamedTuple):
  """module: what `dsr NAME` runs; line: what it does."""

  module: str
  line: str


GROUPS = {
  'Use a model': {
    'demo': Command('dsr_jax.demo', 'a page to click on: draw, describe, compare, look into a run'),
    'generate': Command('dsr_jax.generate', 'draw pictures of a prompt, best first by R_G'),
    'describe': Command(
      'dsr_jax.describe', 'describe a picture or ask about it, best first by R_U'
    ),
    'score': Command('dsr_jax.score', 'score a text with a picture by both rewards'),
    'check': Command('dsr_jax.check', 'does this model run here as in transformers?'),
    'convert': Command('dsr_jax.convert', 'convert or export a model, a run or its adapters'),
  },
  'Reinforce it': {
    'prepare': Command('dsr_jax.prepare', "make a data set of people's own pictures"),
    'probe': Command('dsr_jax.probe', 'before training: is the reward any good on these inputs?'),
    'plan': Command('dsr_jax.plan', 'does a run fit on this slice, and how long does it take?'),
    'train': Command('dsr_jax.main', 'train, or go on training'),
    'replay': Command('dsr_jax.replay', 'run a past step again and take it apart'),
  },
  'Measure it': {
    'evaluate': Command('dsr_jax.evaluate', "ask models the paper's benchmarks, and compare them"),
    'evaluators': Command('dsr_jax.evaluate.evaluators', 'judge drawn pictures by other models'),
    'effect': Command('dsr_jax.effect', 'what finished runs changed, paired, with intervals'),
    'study': Command('dsr_jax.study', 'variants x seeds x bases, with tables and figures'),
    'benchmark': Command('dsr_jax.benchmark', "time a step's phases on this machine"),
  },
  'The small world': {
    'scenes': Command('dsr_jax.scenes', 'show pictures of Scenes, and judge one'),
    'pretrain': Command('dsr_jax.pretrain', 'make the embedded model from nothing'),
    'clip': Command('dsr_jax.study.clip', 'make the CLIP of Scenes'),
  },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
OWN_FLAGS = ('--help', '--version')


def usage() -> str:
  """All commands with a line each."""
  lines = ['dsr COMMAND --flag=value ...', '', dsr_jax.__doc__.splitlines()[0]]
  for title, group in GROUPS.items():
    lines += ['', title]
    lines += [f'  {name:10} {command.line}' for name, command in group.items()]
  lines += [
    '',
    '  dsr COMMAND --help    the flags of a command',
    '  dsr --version         the version',
    '',
    'An example: dsr generate --model=scenes --prompt="a red disc" --output=out',
  ]
  return '\n'.join(lines)


def main() -> int:
  """Runs the command that sys.argv names. Returns the exit status: 2 where there is none."""
  arguments = sys.argv[1:]
  if arguments[:1] == ['help']:  # `dsr help`, `dsr help train`
    arguments = [*arguments[1:2], '--help']
  if not arguments or arguments[0] in ('--help', '-h', '-help', '-?'):
    return _said(usage())
  name, *rest = arguments
  if name in ('--version', '-version', '-V'):
    return _said(f'dsr_jax {dsr_jax.__version__}')
  if name not in COMMANDS:
    print(f'error: {_refusal(name)}', file=sys.stderr)
    return 2
  sys.argv[1:] = rest
  environment.begin_imports()
  # With `alter_sys` absl finds the module's own words for --help.
  runpy.run_module(COMMANDS[name].module, run_name='__main__', alter_sys=True)
  return 0


def _said(text: str) -> int:
  try:
    print(text, flush=True)
  except BrokenPipeError:  # as of `| head`
    environment.drop(sys.stdout)
  return 0


def _refusal(name: str) -> str:
  """What was found instead of a command, with the nearest one."""
  if name.startswith('-'):
    near = difflib.get_close_matches(name, OWN_FLAGS, n=1, cutoff=0.5)
    hint = f'did you mean {near[0]}' if near else 'dsr --help lists the commands'
    return f'found the flag {name} in the place of the command; expected a command first; {hint}'
  known = list(COMMANDS)
  near = difflib.get_close_matches(name.lower().removeprefix('dsr_jax.'), known, n=1, cutoff=0.5)
  hint = f'did you mean {near[0]}' if near else 'dsr --help says what each does'
  return f'found the command {name!r}; expected one of {", ".join(known)}; {hint}'


if __name__ == '__main__':
  sys.exit(main())
