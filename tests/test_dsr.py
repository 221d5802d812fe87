"""The one command: it lists the others, and runs them as their modules."""

import subprocess
import sys

from places import ROOT
import pytest

import dsr_jax
from dsr_jax import __main__ as dsr

# Modules that can be run and are no commands: this one itself, a command's former name, and a
# filter of a process's own.
NO_COMMANDS = {'dsr_jax', 'dsr_jax.scenes.clip', 'dsr_jax.runtime.coordination_log'}


def run(capsys, monkeypatch, *arguments):
  """(exit status, stdout, stderr) of `dsr ARGUMENTS` that runs no module."""
  monkeypatch.setattr(sys, 'argv', ['dsr', *arguments])
  status = dsr.main()
  return status, *capsys.readouterr()


def module_of(path):
  name = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
  return name.removesuffix('.__main__')


def test_every_command_of_the_package_is_in_the_list_and_no_other():
  modules = (ROOT / 'dsr_jax').rglob('*.py')
  runnable = {module_of(path) for path in modules if "__name__ == '__main__'" in path.read_text()}
  assert {command.module for command in dsr.COMMANDS.values()} == runnable - NO_COMMANDS
  assert len(dsr.COMMANDS) == len(runnable - NO_COMMANDS)


@pytest.mark.parametrize('arguments', [(), ('--help',), ('-h',), ('help',)])
def test_the_list_has_a_line_of_each_command(arguments, capsys, monkeypatch):
  status, out, err = run(capsys, monkeypatch, *arguments)
  assert status == 0 and not err
  for name, command in dsr.COMMANDS.items():
    assert [line for line in out.splitlines() if line.split()[:1] == [name]] == [
      f'  {name:10} {command.line}'
    ]
  assert max(map(len, out.splitlines())) <= 80


def test_the_version_is_the_packages(capsys, monkeypatch):
  assert run(capsys, monkeypatch, '--version') == (0, f'dsr_jax {dsr_jax.__version__}\n', '')


@pytest.mark.parametrize(
  'word, found, hint',
  [
    ('trian', "there is no command 'trian'", 'did you mean train?'),
    ('Generate', "there is no command 'Generate'", 'did you mean generate?'),
    ('dsr_jax.score', "there is no command 'dsr_jax.score'", 'did you mean score?'),
    ('xyz', "there is no command 'xyz'", 'dsr --help says what each does'),
    ('--hlep', 'the flag --hlep', 'did you mean --help?'),
    ('--config=scenes', 'the flag --config=scenes', 'put a command first'),
  ],
)
def test_a_mistyped_command_is_named_with_the_nearest(word, found, hint, capsys, monkeypatch):
  status, out, err = run(capsys, monkeypatch, word)
  assert status == 2 and not out
  assert err.startswith(f'error: {found}') and hint in err and err.count('\n') == 1


def test_a_command_gets_its_flags_and_is_the_main_module(monkeypatch):
  called = []
  monkeypatch.setattr(sys, 'argv', ['dsr', 'train', '--config=scenes', '--workdir=x'])
  monkeypatch.setattr(
    dsr.runpy, 'run_module', lambda module, **how: called.append((module, sys.argv[1:], how))
  )
  dsr.main()
  how = {'run_name': '__main__', 'alter_sys': True}
  assert called == [('dsr_jax.main', ['--config=scenes', '--workdir=x'], how)]


def test_help_of_a_command_is_asked_of_the_command(monkeypatch):
  called = []
  monkeypatch.setattr(sys, 'argv', ['dsr', 'help', 'score'])
  monkeypatch.setattr(dsr.runpy, 'run_module', lambda module, **how: called.append(sys.argv[1:]))
  dsr.main()
  assert called == [['--help']]


def test_a_command_says_what_its_module_says():
  """Here of a flag left out: the same words, the same status."""
  both = [
    subprocess.run([sys.executable, '-m', *words], cwd=ROOT, capture_output=True, text=True)
    for words in (['dsr_jax', 'score', '--text=x'], ['dsr_jax.score', '--text=x'])
  ]
  assert both[0].returncode == both[1].returncode == 2
  assert both[0].stderr == both[1].stderr and '--model is missing' in both[0].stderr


def test_a_reader_that_has_left_costs_no_word():
  done = subprocess.run(
    f'{sys.executable} -m dsr_jax | true', shell=True, cwd=ROOT, capture_output=True, text=True
  )
  assert not done.stderr


def test_the_list_comes_without_jax():
  code = (
    'import sys; sys.argv = ["dsr"]; from dsr_jax import __main__ as dsr; dsr.main();'
    'assert not {"jax", "numpy", "absl"} & sys.modules.keys()'
  )
  subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True, capture_output=True)
