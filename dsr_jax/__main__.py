"""The `dsr` command: `dsr COMMAND --flag=value`, or `python -m dsr_jax COMMAND`.

Each command is a module and runs as `python -m MODULE` would run it, so both ways do the same.
Nothing heavy is imported until the command is known, so the list of commands appears at once.
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
    'demo': Command('dsr_jax.demo', 'a web page: draw, describe, compare, inspect a run'),
    'generate': Command('dsr_jax.generate', 'draw images for a prompt, best first by R_G'),
    'describe': Command('dsr_jax.describe', 'describe an image or ask about it, best first by R_U'),
    'score': Command('dsr_jax.score', 'score a text and an image with both rewards'),
    'check': Command('dsr_jax.check', 'does a model run here as it does in transformers?'),
    'convert': Command('dsr_jax.convert', 'convert or export a model, a run or its adapters'),
  },
  'Reinforce it': {
    'prepare': Command('dsr_jax.prepare', 'make a data set from your own images'),
    'probe': Command('dsr_jax.probe', 'before training: is the reward any good on these inputs?'),
    'plan': Command('dsr_jax.plan', 'does a run fit on this slice, and how long does it take?'),
    'train': Command('dsr_jax.main', 'train, or resume a run'),
    'replay': Command('dsr_jax.replay', 'rerun a past step and inspect it'),
  },
  'Measure it': {
    'evaluate': Command('dsr_jax.evaluate', "run the paper's benchmarks, and compare models"),
    'evaluators': Command('dsr_jax.evaluate.evaluators', 'judge drawn images with other models'),
    'effect': Command('dsr_jax.effect', 'what finished runs changed, paired, with intervals'),
    'study': Command('dsr_jax.study', 'variants x seeds x bases, with tables and figures'),
    'benchmark': Command('dsr_jax.benchmark', 'time the phases of a step on this machine'),
  },
  'The small world': {
    'scenes': Command('dsr_jax.scenes', 'show images of Scenes, or judge one'),
    'pretrain': Command('dsr_jax.pretrain', 'train the embedded model from scratch'),
    'clip': Command('dsr_jax.study.clip', 'train the CLIP of Scenes'),
  },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
OWN_FLAGS = ('--help', '--version')


def usage() -> str:
  """All commands, one per line."""
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
  """Runs the command in sys.argv. Returns the exit status: 2 if there is no such command."""
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
  # With `alter_sys`, absl finds the module's docstring for --help.
  runpy.run_module(COMMANDS[name].module, run_name='__main__', alter_sys=True)
  return 0


def _said(text: str) -> int:
  try:
    print(text, flush=True)
  except BrokenPipeError:  # the reader has left, as `| head` does
    environment.drop(sys.stdout)
  return 0


def _refusal(name: str) -> str:
  """The error for a word that is not a command, with the nearest command."""
  if name.startswith('-'):
    near = difflib.get_close_matches(name, OWN_FLAGS, n=1, cutoff=0.5)
    hint = f'did you mean {near[0]}?' if near else 'dsr --help lists the commands'
    return f'the flag {name} comes before any command; put a command first; {hint}'
  known = list(COMMANDS)
  near = difflib.get_close_matches(name.lower().removeprefix('dsr_jax.'), known, n=1, cutoff=0.5)
  hint = f'did you mean {near[0]}?' if near else 'dsr --help says what each does'
  return f'there is no command {name!r}; use one of {", ".join(known)}; {hint}'


if __name__ == '__main__':
  sys.exit(main())
