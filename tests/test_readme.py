"""What the documents tell people to type and to open is there: commands, flags, keys, files, links,
tests.
"""

import ast
import os
import re
import shlex

from places import ROOT
import pytest

from dsr_jax import config as config_lib
from dsr_jax import config_loading, saved_config
from dsr_jax.errors import InputError

DOCUMENTS = sorted(
  [
    ROOT / 'README.md',
    ROOT / 'CONTRIBUTING.md',
    ROOT / 'tpu' / 'README.md',
    *(ROOT / 'docs').glob('*.md'),
  ]
)
GROUPS = ('method', 'system', 'data', 'eval')
KINDS = {'DEFINE_integer': int, 'DEFINE_float': float, 'int': int, 'float': float}


def name(path):
  return str(path.relative_to(ROOT))


documents = pytest.mark.parametrize('path', DOCUMENTS, ids=name)


def code_lines(text):
  """The lines of fenced and of indented code blocks, with continuations joined."""
  fenced, lines, above = False, [], ''
  for line in text.splitlines():
    if line.lstrip().startswith('```'):
      fenced = not fenced
    elif fenced or (line.startswith('    ') and (not above.strip() or above.startswith('    '))):
      lines.append(line.strip())
    above = line
  return '\n'.join(lines).replace('\\\n', ' ').splitlines()


def python_commands(text):
  """(module, flags) of each `python -m` command of this project."""
  for line in code_lines(text):
    found = re.match(r'(?:\$ )?(?:\w+=\S+ )*(?:\S*/)?python3? -m (.+)', line)
    words = shlex.split(found[1], comments=True) if found else ['']
    if words[0].startswith(('dsr_jax.', 'benchmarks.')):
      yield words[0], words[1:]


def source_of(module):
  path = ROOT.joinpath(*module.split('.'))
  found = [p for p in (path.with_suffix('.py'), path / '__main__.py') if p.is_file()]
  assert found, f'no module {module}'
  return found[0]


def flags_of(path):
  """{flag: its type} of the absl or argparse flags that a program defines; its source is read, not
  run.
  """
  flags = {}
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
      called = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
      if called.startswith(('DEFINE_', 'define_')):
        flags[node.args[0].value] = KINDS.get(called, str)
      elif called == 'add_argument':
        kinds = [
          k.value.id for k in node.keywords if k.arg == 'type' and isinstance(k.value, ast.Name)
        ]
        flags[node.args[0].value.lstrip('-')] = KINDS.get(*kinds, str) if kinds else str
  return flags


def check_config(module, path, changes):
  """A config file takes the changes {key: text}, and with them it is one that the command
  accepts.
  """
  config = config_loading.read(path)
  flat = {}
  for key, text in changes.items():
    group, _, last = key.rpartition('.')
    node = config
    for part in filter(None, group.split('.')):
      assert part in node, f'{path} has no key {key}'
      node = node[part]
    assert last in node, f'{path} has no key {key}'
    flat[key] = text if isinstance(node[last], str) else type(node[last])(ast.literal_eval(text))
  config.update_from_flattened_dict(flat)
  if module == 'dsr_jax.main':
    config_loading.from_config_dict(config)


@documents
def test_every_command_is_one_that_its_program_knows(path):
  for module, words in python_commands(path.read_text()):
    flags = flags_of(source_of(module))
    given, changes = {}, {}
    if module.startswith('benchmarks.') and words and words[0].isalpha():
      words = words[1:]  # what it measures
    for word in words:
      assert re.fullmatch(r'--[\w.]+=.+', word, re.DOTALL), f'{module}: {word!r} is no --flag=value'
      flag, _, value = word[2:].partition('=')
      if flag.startswith('config.'):
        changes[flag[len('config.') :]] = value
      else:
        assert flag in flags, f'{module} has no flag --{flag}'
        given[flag] = flags[flag](value)
    assert changes == {} or 'config' in flags, f'{module} has no --config'
    if 'config' in given and 'config' in flags:
      check_config(module, given['config'], changes)


@documents
def test_every_make_target_config_and_requirements_file_exists(path):
  text = path.read_text()
  makefile = (ROOT / 'Makefile').read_text()
  for target in re.findall(r'(?:`|^    )make ([a-z]+)', text, re.MULTILINE):
    assert re.search(rf'^{target}:', makefile, re.MULTILINE), f'no target {target}'
  for file in re.findall(r'\b(?:configs/\w+\.py|requirements[\w-]*\.txt)', text):
    assert (ROOT / file).is_file(), f'no file {file}'


@documents
def test_every_relative_link_and_picture_is_there(path):
  text = re.sub(r'`[^`\n]*`', '', path.read_text())
  for target in re.findall(r'\]\(([^)\s]+)\)', text) + re.findall(r'(?:src|href)="([^"]+)"', text):
    if not re.match(r'[a-z]+:', target):
      file, _, heading = target.partition('#')
      there = path.parent / file if file else path
      assert there.exists(), f'{target} is not there'
      assert os.path.realpath(there).startswith(str(ROOT.resolve())), (
        f'{target} lies outside the project'
      )
      if heading:
        lines = re.findall(r'^#+ (.+)$', there.read_text(), re.MULTILINE)
        anchors = [
          re.sub(r'[^\w\- ]', '', line.lower()).replace(' ', '-') for line in lines
        ]  # as GitHub makes them
        assert heading in anchors, f'no heading {target}'


@documents
def test_every_key_and_test_that_is_named_exists(path):
  text = path.read_text()
  config = saved_config.to_json(config_loading.from_config_dict(config_lib.defaults()))
  for key in re.findall(rf'`((?:{"|".join(GROUPS)})\.\w+(?:\.\w+)*)(?:=[^`]*)?`', text):
    node = config
    for part in key.split('.'):
      assert isinstance(node, dict) and part in node, f'no key {key}'
      node = node[part]
  sources = '\n'.join(p.read_text() for p in (ROOT / 'tests').rglob('*.py'))
  for test in re.findall(r'`(test_\w+)`', text):
    assert f'def {test}(' in sources, f'no test {test}'


def test_commands_are_found_and_wrong_ones_are_not_missed():
  text = """Text

    python -m dsr_jax.score --text="a b" \\
      --image=x.png
    . .venv/bin/activate

```
$ A=1 .venv/bin/python -m dsr_jax.main --x=1
```
"""
  assert list(python_commands(text)) == [
    ('dsr_jax.score', ['--text=a b', '--image=x.png']),
    ('dsr_jax.main', ['--x=1']),
  ]
  assert len(list(python_commands((ROOT / 'README.md').read_text()))) >= 10
  assert flags_of(source_of('dsr_jax.generate'))['num_samples'] is int
  assert {'config', 'workdir'} <= set(flags_of(source_of('dsr_jax.pretrain')))
  with pytest.raises(AssertionError):
    source_of('dsr_jax.nothing')
  with pytest.raises(AssertionError):
    check_config('dsr_jax.main', 'configs/scenes.py', {'method.group_sise': '3'})
  with pytest.raises(InputError):
    check_config('dsr_jax.main', 'configs/scenes.py', {'method.group_size': '1'})
