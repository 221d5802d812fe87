"""How commands begin and end: streams, flags, errors and exit status, the same for all of them."""

import os
import signal
import subprocess
import sys

from absl import flags
from places import ROOT
import pytest

from dsr_jax import cli, config_help, config_loading, environment, flag_types, inputs, saved_config
from dsr_jax.config import Config
from dsr_jax.errors import InputError

# A command without JAX: it starts at once.
COMMAND = '''"""Does what --do says."""
import errno, os, sys, time
from absl import flags
from dsr_jax import cli, flag_types
from dsr_jax.errors import InputError

def main(argv, f):
  cli.no_arguments(argv)
  cli.log('at work')
  if f.do == 'input':
    raise InputError('found a' + chr(10) + 'b; expected c; do d')
  if f.do == 'bug':
    raise KeyError('a bug')
  if f.do == 'sleep':
    time.sleep(60)
  if f.do in ('ENOSPC', 'EACCES', 'EMFILE', 'EIO'):
    raise OSError(getattr(errno, f.do), os.strerror(getattr(errno, f.do)), 'the/file')
  if f.do == 'memory':
    raise MemoryError
  if f.do == 'talk':
    for i in range(100000):
      cli.log('word ' * 20)
  if f.do == 'long':
    cli.print_json(['word'] * 100000)
    return
  cli.print_json({'text': 'caf\\u00e9 \\u2192', 'path': f.path, 'number': f.number}, kept=f.kept)

def define_flags(f):
  flags.DEFINE_enum('do', '', ['', 'input', 'bug', 'sleep', 'talk', 'long', 'memory', 'ENOSPC',
                               'EACCES', 'EMFILE', 'EIO'], 'What to do.', flag_values=f)
  flags.DEFINE_integer('number', 1, 'A number.', flag_values=f)
  flags.DEFINE_string('kept', '', 'Where the result lies besides.', flag_values=f)
  flag_types.define_path('path', 'x', 'A path.', f)

cli.run_main(main, define_flags)
'''


@pytest.fixture(name='command', scope='module')
def _command(tmp_path_factory):
  path = tmp_path_factory.mktemp('command') / 'command.py'
  path.write_text(COMMAND)
  return path


def shell(command, line, **variables):
  """Runs a line of bash in which CMD is the command."""
  line = line.replace('CMD', f'{sys.executable} {command}')
  environ = {**os.environ, 'PYTHONPATH': str(ROOT), **variables}
  return subprocess.run(
    ['bash', '-c', line], env=environ, capture_output=True, text=True, timeout=60
  )


@pytest.mark.parametrize(
  'arguments, said',
  [
    ('--do=input', r'error: found a\nb; expected c; do d'),
    ('--numbr=3', 'error: --numbr is not a flag of this command; did you mean --number?'),
    ('--number=3.5', 'error: --number=3.5 should be a whole number; change it'),
    ('--number', 'error: --number has no value; write --number=...'),
    ('--do=other', 'error: --do=other should be '),
    ('--number 3 word', "error: unexpected argument 'word': this command takes flags only"),
    ('--path=\\$NOT_SET/x', 'error: --path=$NOT_SET/x contains the variable $NOT_SET'),
    (
      '--path=~nobody_at_all/x',
      'error: --path=~nobody_at_all/x names a user that does not exist here',
    ),
    ('--flagfile=nowhere', 'error: the flags cannot be parsed'),
    ('--do=ENOSPC', 'error: cannot write the/file (No space left on device); free some space'),
    ('--do=EACCES', 'error: cannot open the/file (Permission denied), which must be readable'),
    ('--do=EMFILE', 'error: cannot open the/file (Too many open files); raise the limit'),
    ('--do=EIO', 'error: cannot use the/file (Input/output error)'),
    ('--do=memory', 'error: this machine has no memory left; ask for less'),
  ],
)
def test_what_a_user_can_mend_is_one_line_and_status_2(command, arguments, said):
  done = shell(command, f'CMD {arguments}')
  last = done.stderr.splitlines()[-1]
  assert done.returncode == 2 and done.stdout == '' and last.startswith(said), done.stderr
  assert 'Traceback' not in done.stderr


def test_a_bug_keeps_its_traceback(command):
  done = shell(command, 'CMD --do=bug')
  assert done.returncode == 1 and "KeyError: 'a bug'" in done.stderr


@pytest.mark.parametrize('flag', ['--help', '-h', '--helpshort', '--helpfull'])
def test_help_is_no_failure(command, flag):
  done = shell(command, f'CMD --number=wrong {flag}')
  assert done.returncode == 0 and 'Does what --do says.' in done.stdout and not done.stderr
  assert '--number: A number.' in done.stdout


# Streams.


def test_a_reader_that_leaves_ends_the_command_without_a_word(command):
  done = shell(command, 'CMD --do=long | head -c1; echo ${PIPESTATUS[0]}')
  assert done.stdout == '[0\n' and done.stderr == 'at work\n'
  done = shell(command, 'CMD --do=talk 2>&1 | head -1; echo ${PIPESTATUS[0]}')
  assert done.stdout == f'at work\n{environment.PIPE_STATUS}\n' and not done.stderr


def test_a_full_stdout_is_said_and_fails_only_where_nothing_else_has_the_result(command):
  done = shell(command, 'CMD >/dev/full')
  assert done.returncode == 2 and 'cannot write the result to stdout (No space left' in done.stderr
  done = shell(command, 'CMD --kept=out >/dev/full')
  assert done.returncode == 0 and 'the result is in out' in done.stderr
  assert 'Traceback' not in done.stderr


def test_a_closed_stdout_is_refused_before_any_work(command):
  done = shell(command, 'CMD >&-')
  assert done.returncode == 2 and done.stderr.startswith('error: stdout is closed')


def test_progress_does_not_get_into_a_result_whose_stderr_is_closed_or_full(command):
  for end in ('2>&-', '2>/dev/full'):
    done = shell(command, f'CMD {end}')
    assert done.stdout.startswith('{'), end
    assert done.returncode == 0, end


def test_json_of_a_terminal_without_the_letters_is_still_json(command):
  for encoding in ('ascii', 'latin-1'):
    done = shell(command, 'CMD', PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and r'caf\u00e9 \u2192' in done.stdout


def test_letters_that_the_locale_cannot_read_are_refused(command):
  plain = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
  assert shell(command, 'CMD', **plain).returncode == 0
  done = shell(command, 'CMD --path=caf\u00e9', **plain)
  assert done.returncode == 2 and 'not UTF-8; set LC_ALL=C.UTF-8' in done.stderr


def test_a_folder_that_is_gone_is_said_so(command, tmp_path):
  (tmp_path / 'gone').mkdir()
  done = shell(command, f'cd {tmp_path}/gone; rmdir ../gone; CMD')
  assert done.returncode == 2 and 'the current folder does not exist' in done.stderr


def test_ctrl_c_ends_it_in_a_word(command):
  environ = {**os.environ, 'PYTHONPATH': str(ROOT)}
  process = subprocess.Popen(
    [sys.executable, command, '--do=sleep'], env=environ, stderr=subprocess.PIPE, text=True
  )
  assert process.stderr.readline() == 'at work\n'
  process.send_signal(signal.SIGINT)
  _, said = process.communicate(timeout=20)
  assert said == 'stopped      by Ctrl-C\n' and process.returncode == -signal.SIGINT


# What is found while a command is imported, and what JAX says.


@pytest.mark.parametrize(
  'variable, value, said',
  [
    ('JAX_PLATFORMS', 'nothing', 'error: there is no device for JAX_PLATFORMS=nothing'),
    (
      'JAX_ENABLE_X64',
      'maybe',
      "error: the environment variable JAX_ENABLE_X64 has the unknown value 'maybe'",
    ),
  ],
)
def test_a_variable_that_jax_does_not_take_is_a_sentence(variable, value, said, tmp_path):
  line = f'CMD --model=scenes --prompt=x --output={tmp_path}/out --num_samples=1'
  environ = {key: text for key, text in os.environ.items() if key != 'JAX_PLATFORMS'}
  done = subprocess.run(
    [sys.executable, '-m', 'dsr_jax.generate', *line.split()[1:]],
    env={**environ, variable: value},
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(said), done.stderr
  assert 'Traceback' not in done.stderr and os.listdir(tmp_path) == []


# A library that takes long to import, and loses what is raised in it, as JAX's callbacks do.
SLOW_LIBRARY = """
import gc, sys, time

class Lost:
  def __del__(self):
    print('imported', file=sys.stderr, flush=True)
    time.sleep(60)

lost = Lost()
del lost
"""


def test_ctrl_c_while_it_is_imported_ends_it_in_a_word(tmp_path):
  (tmp_path / 'jax.py').write_text(SLOW_LIBRARY)
  process = subprocess.Popen(
    [sys.executable, '-m', 'dsr_jax.generate'],
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(tmp_path)},
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stderr.readline() == 'imported\n'
  process.send_signal(signal.SIGINT)
  _, said = process.communicate(timeout=20)
  assert said == 'stopped      by Ctrl-C\n' and process.returncode == -signal.SIGINT


def test_ctrl_c_that_a_callback_loses_ends_it_still(command):
  line = 'import gc, time; gc.callbacks.append(lambda *_: time.sleep(60)); gc.collect()'
  source = command.read_text().replace(
    '    time.sleep(60)\n  if f.do in', f'    {line}\n  if f.do in'
  )
  assert line in source
  losing = command.with_name('losing.py')
  losing.write_text(source)
  environ = {**os.environ, 'PYTHONPATH': str(ROOT)}
  process = subprocess.Popen(
    [sys.executable, losing, '--do=sleep'], env=environ, stderr=subprocess.PIPE, text=True
  )
  assert process.stderr.readline() == 'at work\n'
  process.send_signal(signal.SIGINT)
  _, said = process.communicate(timeout=20)
  assert said == 'stopped      by Ctrl-C\n' and process.returncode == -signal.SIGINT


# Paths.


def test_paths_are_expanded_as_a_shell_does(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  monkeypatch.setenv('RUNS', '/runs')
  f = flags.FlagValues()
  flag_types.define_path('model', None, '', f)
  flag_types.define_paths('bases', [], '', f)
  f(['test', '--model=~/a@3:generator', '--bases=~/x,second=$RUNS/y,${RUNS}'])
  assert f.model == '/home/me/a@3:generator'
  assert f.bases == ['/home/me/x', 'second=/runs/y', '/runs']
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'cost$5.png').write_text('')
  assert inputs.expanded('cost$5.png', '--image') == 'cost$5.png'
  assert inputs.expanded('owner/name', '--model') == 'owner/name'


def test_path_keys_of_a_config_are_expanded(monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  monkeypatch.setenv('DATA', '/data')
  config = config_loading.load(
    'scenes_tiny', model='~/m', data__images='$DATA/p', system__compile_cache='~/c'
  )
  assert (config.model, config.data.images) == ('/home/me/m', '/data/p')
  assert config.system.compile_cache == '/home/me/c'
  with pytest.raises(InputError, match=r'config.system.bucket=.* contains the variable \$NOT_SET'):
    config_loading.load('scenes_tiny', system__bucket='$NOT_SET/b')


# Config flags.


def parse(*arguments, default=None):
  f = flags.FlagValues()
  config_loading.define_config_flag('config', 'The run.', f, default=default)
  flags.DEFINE_integer('number', 1, 'A number.', flag_values=f)
  kept = sys.argv
  try:
    cli.parse(f, ['test', *arguments])
  finally:
    sys.argv = kept
  return f


def test_keys_of_a_config_may_stand_before_it_and_a_config_may_be_the_default():
  f = parse('--config.method.steps=7', '--number', '3', '--config', 'scenes_tiny')
  assert f.config.method.steps == 7 and f.number == 3
  assert parse('--config.lm.batch=9', default='scenes_pretrain').config.lm.batch == 9


@pytest.mark.parametrize(
  'argument, said',
  [
    ('--config.method.steps=x', '--config.method.steps=x should be a whole number'),
    ('--config.method.step=1', 'has no key config.method.step; .*config.method.steps'),
    ('--config.method=1', '--config.method is a group of keys'),
    ('--config.method.steps', '--config.method.steps has no value'),
    ('--confg=scenes', '--confg is not a flag of this command; did you mean --config'),
    ('--config=nowhere.py', 'there is no config file nowhere.py'),
  ],
)
def test_a_wrong_key_is_a_sentence(argument, said):
  with pytest.raises(InputError, match=said):
    parse('--config=scenes_tiny', argument)


def test_help_lists_every_key_with_its_default_and_most_with_their_meaning():
  text, meanings = config_help.text(), config_help.meanings()
  keys = saved_config.flat(saved_config.to_json(Config()))
  assert set(meanings) == set(keys) and all(f'  {key}=' in text for key in keys)
  assert meanings['method.steps'] == '5 epochs of 5,600 prompts and 5,600 images'
  assert meanings['method.strategy'].startswith("'unified': one model. 'separate': a generator and")
  assert sum(map(bool, meanings.values())) > 0.6 * len(keys)
