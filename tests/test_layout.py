"""How the package hangs together: no circles, imports at the top, mesh axes in one place."""

import ast
import functools
import graphlib

from places import ROOT
import pytest

PACKAGE = 'dsr_jax'
AXES = {'fsdp', 'tp'}
# Subscripts, as of `mesh.shape['tp']`, read a size; calls of these lay something out.
LAYOUTS = {'P', 'PartitionSpec', 'NamedSharding', 'Mesh', 'AbstractMesh', 'make_mesh', 'shard_map'}
COLLECTIVES = {'psum', 'pmean', 'pmax', 'all_gather', 'all_to_all', 'ppermute', 'axis_index'}


def name_of(path):
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


@functools.cache
def modules():
  """{name: syntax tree} of every file; a package's name is that of its __init__.py."""
  return {
    name_of(path): ast.parse(path.read_text()) for path in sorted((ROOT / PACKAGE).rglob('*.py'))
  }


def imported(node):
  """Modules of the package that an import statement names."""
  if isinstance(node, ast.Import):
    return {alias.name for alias in node.names} & modules().keys()
  if isinstance(node, ast.ImportFrom):
    assert node.level == 0, 'imports are absolute'
    names = {f'{node.module}.{alias.name}' for alias in node.names}
    found = names & modules().keys()
    # A name that is no module is something inside the module that it is taken from.
    return found | ({node.module} & modules().keys() if names - found else set())
  return set()


def imports(name, tree=None):
  """Modules of the package that a module imports anywhere, inside functions too."""
  found = set().union(*(imported(node) for node in ast.walk(tree or modules()[name])))
  return found - {name}


def circle_in(graph):
  """A circle of a graph {node: nodes that it needs} as text, or ''."""
  try:
    graphlib.TopologicalSorter(graph).prepare()
  except graphlib.CycleError as e:
    return ' -> '.join(reversed(e.args[1]))
  return ''


def folders():
  return sorted({name.rpartition('.')[0] for name in modules()} - {''})


def test_no_file_imports_itself_by_way_of_others():
  assert not circle_in({name: imports(name) for name in modules()})


@pytest.mark.parametrize('folder', folders())
def test_no_part_of_a_folder_imports_itself_by_way_of_its_neighbors(folder):
  """The parts are files and subfolders; a subfolder imports what any file in it does. The
  folder's own __init__.py is its face, not a part of it.
  """
  depth = folder.count('.') + 2

  def part(name):
    return '.'.join(name.split('.')[:depth]) if name.startswith(f'{folder}.') else None

  graph = {}
  for name in modules():
    if part(name):
      needs = {part(other) for other in imports(name)} - {None, part(name)}
      graph[part(name)] = graph.get(part(name), set()) | needs
  assert not circle_in(graph)


def test_who_answers_benchmarks_knows_nothing_of_the_evaluators():
  """They bring torch. (transformers itself imports it where it is installed.)"""
  needed, found = {f'{PACKAGE}.evaluate.__main__'}, set()
  while needed:
    name = needed.pop()
    found.add(name)
    needed |= imports(name) - found
  assert f'{PACKAGE}.evaluate.answering.subject' in found
  assert f'{PACKAGE}.evaluate.evaluators' in modules()
  assert not {name for name in found if '.adapters' in name or name.endswith('.evaluators')}


def test_circles_are_found():
  assert circle_in({'a': {'b'}, 'b': {'c'}, 'c': {'a'}}) and not circle_in({'a': {'b'}, 'b': set()})
  late = ast.parse('def f():\n  from dsr_jax import losses\n  from dsr_jax.models import unified')
  assert imports('x', late) == {'dsr_jax.losses', 'dsr_jax.models.unified'}
  assert imports('x', ast.parse('from dsr_jax.errors import InputError')) == {'dsr_jax.errors'}


@pytest.mark.parametrize('name', modules())
def test_own_modules_are_imported_at_the_top_of_the_file(name):
  found = {
    module
    for function in ast.walk(modules()[name])
    if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for node in ast.walk(function)
    for module in imported(node)
  }
  assert not found


def called(node):
  return getattr(node.func, 'attr', getattr(node.func, 'id', ''))


def axes_in(node):
  """Axes of the mesh that a call names as text to lay something out, or to talk along."""
  if not isinstance(node, ast.Call) or called(node) not in LAYOUTS | COLLECTIVES:
    return set()
  words = {x.value for x in ast.walk(node) if isinstance(x, ast.Constant)}
  return {word for word in words if isinstance(word, str)} & AXES


@pytest.mark.parametrize('name', [name for name in modules() if name != 'dsr_jax.sharding'])
def test_only_sharding_names_axes_of_the_mesh(name):
  tree = modules()[name]
  for node in ast.walk(tree):
    assert not axes_in(node), f'line {node.lineno}'
    if isinstance(node, ast.ImportFrom) and node.module == 'jax.sharding':
      assert 'PartitionSpec' not in {alias.name for alias in node.names}, f'line {node.lineno}'
    if isinstance(node, ast.Attribute) and ast.unparse(node) in (
      'jax.P',
      'jax.sharding.PartitionSpec',
    ):
      raise AssertionError(f'line {node.lineno}')


def test_the_rule_about_axes_sees_what_it_forbids():
  assert any(axes_in(node) for node in ast.walk(modules()['dsr_jax.sharding']))
  assert axes_in(ast.parse("P(None, ('data', 'fsdp'))").body[0].value) == {'fsdp'}
