"""A bare machine gets what the project needs, pinned, and `make` installs it once."""

import ast
import importlib.metadata
import itertools
import os
import pathlib
import shutil
import stat
import subprocess
import sys
import sysconfig
import tomllib

from packaging.requirements import Requirement
from places import ROOT
import pytest
import yaml

import dsr_jax

pytestmark = pytest.mark.slow

FILES = (
  'requirements.txt',
  'requirements-eval.txt',
  'requirements-test.txt',
  'requirements-tpu.txt',
  'requirements-gpu.txt',
  'requirements-demo.txt',
)
# Import name -> package, where they differ; and what a required package cannot do without.
MODULES = {
  'PIL': 'pillow',
  'absl': 'absl-py',
  'orbax': 'orbax-checkpoint',
  'ml_collections': 'ml-collections',
  'tensorflow_datasets': 'tensorflow-datasets',
  'tensorboardX': 'tensorboardx',
  'google_crc32c': 'google-crc32c',
}
COME_ALONG = {
  'tokenizers': 'transformers',
  'huggingface_hub': 'transformers',
  'etils': 'orbax-checkpoint',
  'ml_dtypes': 'jax',
  'jaxlib': 'jax',
  'starlette': 'gradio',
}


# What is asked for where it is used, and stays out of a plain installation: file -> packages.
ON_REQUEST = {
  'convert/weights.py': {'torch'},  # reads .bin files, and is imported where one is met
  'study/figures.py': {'matplotlib'},
  'demo/page.py': {'gradio'},
  'dsr_jax/tracking.py': {'wandb'},
  'evaluate/vlmeval/predictions.py': {'openpyxl'},
  'evaluate/adapters/*.py': {'torch', 'spacy'},
}


def requirements(file):
  lines = [line.split(' #')[0].strip() for line in (ROOT / file).read_text().splitlines()]
  return [Requirement(line) for line in lines if line and not line.startswith(('#', '-r'))]


def names(file):
  return {requirement.name.lower() for requirement in requirements(file)}


@pytest.mark.parametrize('file', FILES)
def test_every_requirement_names_one_version(file):
  for requirement in requirements(file):
    assert [spec.operator for spec in requirement.specifier] == ['=='], requirement


@pytest.mark.parametrize(
  'version, jax, flax',
  [('3.11', '0.10.2', '0.12.8'), ('3.12', '0.12.0', '0.12.12'), ('3.13', '0.12.0', '0.12.12')],
)
def test_each_python_gets_one_jax_and_the_flax_that_fits_it(version, jax, flax):
  for file in ('requirements.txt', 'requirements-tpu.txt', 'requirements-gpu.txt'):
    chosen = [
      r
      for r in requirements(file)
      if not r.marker or r.marker.evaluate({'python_version': version})
    ]
    pins = {name: [str(r.specifier) for r in chosen if r.name == name] for name in ('jax', 'flax')}
    assert pins['jax'] == [f'=={jax}']
    assert pins['flax'] == ([f'=={flax}'] if file == 'requirements.txt' else [])


def test_what_is_installed_here_is_what_is_pinned():
  files = (
    'requirements.txt',
    'requirements-eval.txt',
    'requirements-demo.txt',
    'requirements-test.txt',
  )
  for requirement in itertools.chain(*map(requirements, files)):
    if not requirement.marker or requirement.marker.evaluate():
      assert requirement.specifier.contains(importlib.metadata.version(requirement.name)), (
        requirement
      )


def project():
  return tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']


def pinned(*files):
  """{name: versions that the files pin}."""
  found = {}
  for requirement in itertools.chain(*map(requirements, files)):
    version = next(iter(requirement.specifier)).version
    found.setdefault(requirement.name.lower(), set()).add(version)
  return found


def test_the_package_asks_for_ranges_that_hold_what_is_pinned():
  pins = pinned('requirements.txt')
  ranges = {r.name.lower(): r for r in map(Requirement, project()['dependencies'])}
  assert ranges.keys() == pins.keys()
  for name, requirement in ranges.items():
    operators = {spec.operator for spec in requirement.specifier}
    assert '==' not in operators and '>=' in operators, requirement
    for version in pins[name]:
      assert requirement.specifier.contains(version), (requirement, version)


def test_only_the_tests_and_extras_need_torch_gradio_and_matplotlib():
  assert not names('requirements.txt') & {'torch', 'tensorflow', 'pytest', 'gradio'}
  assert 'torch' in names('requirements-eval.txt') and 'pytest' in names('requirements-test.txt')
  included = (ROOT / 'requirements-test.txt').read_text().splitlines()
  assert {'-r requirements-eval.txt', '-r requirements-demo.txt'} <= set(included)
  pins = pinned('requirements-eval.txt', 'requirements-demo.txt', 'requirements-test.txt')
  extras = project()['optional-dependencies']
  assert extras.keys() == {'demo', 'torch', 'study', 'wandb'}
  for requirement in map(Requirement, itertools.chain(*extras.values())):
    assert '==' not in {spec.operator for spec in requirement.specifier}, requirement
    for version in pins[requirement.name]:
      assert requirement.specifier.contains(version), (requirement, version)


def test_every_version_is_the_same():
  assert project()['dynamic'] == ['version']
  assert yaml.safe_load((ROOT / 'CITATION.cff').read_text())['version'] == dsr_jax.__version__


# Installed elsewhere.


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
  """The folder of an environment with the package, built from what is here; what the package needs
  it has from the environment of the tests.
  """
  folder = tmp_path_factory.mktemp('installed')
  source = folder / 'source'
  source.mkdir()
  for name in ('pyproject.toml', 'LICENSE', 'README.md'):
    shutil.copy(ROOT / name, source)
  ignore = shutil.ignore_patterns('__pycache__', 'build', '*.egg-info')
  shutil.copytree(ROOT / 'dsr_jax', source / 'dsr_jax', ignore=ignore)
  pip('wheel', '--no-deps', '--no-build-isolation', '--wheel-dir', folder, source)

  environment = folder / 'environment'
  subprocess.run([sys.executable, '-m', 'venv', environment], check=True)
  (there,) = environment.glob('lib/python*/site-packages')
  here = sysconfig.get_path('purelib')
  # Unlike a plain path, a site folder has its own .pth files read.
  (there / 'tests.pth').write_text(f'import site; site.addsitedir({here!r})\n')
  (wheel,) = folder.glob('dsr_jax-*.whl')
  pip('install', '--no-deps', '--no-index', wheel, python=environment / 'bin' / 'python')
  return environment


def pip(*arguments, python=sys.executable):
  done = subprocess.run([python, '-m', 'pip', '-q', *arguments], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr


def in_the_environment(environment, program, *arguments):
  """What a program of the environment prints, run away from the clone."""
  outside = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
  return subprocess.run(
    [environment / 'bin' / program, *arguments],
    cwd=environment.parent,
    env={**outside, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
  )


def test_an_installed_package_has_one_command_and_everything_it_reads(installed):
  where = in_the_environment(installed, 'python', '-c', 'import dsr_jax; print(dsr_jax.__file__)')
  assert where.stdout.startswith(str(installed))
  said = in_the_environment(installed, 'dsr', '--version')
  assert said.stdout == f'dsr_jax {dsr_jax.__version__}\n'
  package = pathlib.Path(where.stdout.strip()).parent
  tracked = subprocess.run(
    ['git', 'ls-files', 'dsr_jax'], cwd=ROOT, capture_output=True, text=True, check=True
  ).stdout.splitlines()
  missing = [name for name in tracked if not (package.parent / name).is_file()]
  assert not missing


def test_an_installed_package_trains_by_the_name_of_a_config(installed, tmp_path):
  run = tmp_path / 'run'
  done = in_the_environment(
    installed,
    'dsr',
    'train',
    '--config=scenes_tiny',
    f'--workdir={run}',
    '--config.method.steps=1',
    '--config.eval.benchmark=none',
    # What a second program would be compiled for.
    '--config.eval.watched=0',
    '--config.system.samples_every=0',
    '--config.system.frozen_every=0',
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip() == str(run / 'summary.json')
  assert (run / 'report.html').is_file()


@pytest.mark.parametrize('extra', ['demo', 'torch', 'study', 'wandb'])
def test_every_extra_can_be_installed_beside_the_pins(extra, tmp_path):
  """By the index that pip knows; nothing is installed."""
  wanted = [f'{r.name}{r.specifier}' for r in requirements('requirements.txt') if holds(r)]
  (tmp_path / 'pins.txt').write_text('\n'.join(wanted))
  done = subprocess.run(
    [sys.executable, '-m', 'pip', 'install', '--dry-run', '--quiet', '--constraint']
    + [tmp_path / 'pins.txt', *project()['optional-dependencies'][extra]],
    capture_output=True,
    text=True,
  )
  # An index that is there lists the versions it has, also where none of them fits.
  if 'NewConnectionError' in done.stderr or '(from versions: none)' in done.stderr:
    pytest.skip('no index of packages can be reached')
  assert done.returncode == 0, done.stderr


def holds(requirement):
  return not requirement.marker or requirement.marker.evaluate()


def test_the_package_imports_only_what_it_requires():
  required = names('requirements.txt') | set(sys.stdlib_module_names) | {'dsr_jax', 'configs'}
  for path in [*(ROOT / 'dsr_jax').rglob('*.py'), *(ROOT / 'configs').glob('*.py')]:
    on_request = [packages for file, packages in ON_REQUEST.items() if path.match(file)]
    allowed = required.union(*on_request)
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        found = [alias.name for alias in node.names]
      else:
        found = [node.module] if isinstance(node, ast.ImportFrom) else []
      for name in found:
        top = name.split('.')[0]
        assert COME_ALONG.get(top, MODULES.get(top, top)) in allowed, f'{path} imports {name}'


def test_licence_and_citation_are_complete():
  licence = (ROOT / 'LICENSE').read_text()
  assert 'Apache License' in licence and 'END OF TERMS AND CONDITIONS' in licence
  assert 'MIT License' in (ROOT / 'dsr_jax/data/t2i_compbench_prompts/LICENSE.txt').read_text()
  citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
  assert (
    citation['cff-version'] == '1.2.0' and '2506.07963' in citation['preferred-citation']['url']
  )


def test_continuous_integration_runs_make_lint_and_make_test():
  script = ROOT / '.ci' / 'run'
  assert script.stat().st_mode & stat.S_IXUSR
  assert 'make lint test-all' in script.read_text()
  workflow = yaml.safe_load((ROOT / '.github' / 'workflows' / 'tests.yml').read_text())
  steps = [step.get('run', '') for step in workflow['jobs']['tests']['steps']]
  assert [step.split()[:2] for step in steps if step] == [['make', 'lint'], ['make', 'test-all']]


def test_each_commit_is_checked_by_what_make_lint_runs():
  hooks = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())['repos'][0]['hooks']
  called = {' '.join(hook['entry'].split()[1:3]) for hook in hooks}
  assert called == {'-m ruff', '-m mypy'}


# The Makefile, with programs that only write down that they were called.


class Bench:
  """A folder with the Makefile and a fake python; `calls` tells what was run."""

  def __init__(self, folder):
    self.folder = folder
    for name in ('Makefile', 'requirements.txt', 'requirements-test.txt'):
      shutil.copy(ROOT / name, folder)
    self.log = folder / 'log'
    inner = f'#!/bin/sh\necho "$@" >> {self.log}\n[ -z "$FAIL" ] || exit 1\n'
    # As python3: `-c` is the version check, `-m venv --clear DIR` makes an environment of another
    # such program.
    self.script(
      folder / 'python3',
      f"""#!/bin/sh
if [ "$1" = -c ]; then exec {sys.executable} "$@"; fi
echo "$@" >> {self.log}
mkdir -p .venv/bin
cat > .venv/bin/python <<'END'
{inner}END
chmod +x .venv/bin/python
touch .venv/bin/pip
""",
    )

  def script(self, path, text):
    path.write_text(text)
    path.chmod(0o755)

  def make(self, target, **env):
    self.log.write_text('')
    outside = {
      k: v for k, v in os.environ.items() if not k.startswith('MAKE')
    }  # the suite itself may run under make
    done = subprocess.run(
      ['make', target, f'PYTHON={self.folder}/python3'],
      cwd=self.folder,
      capture_output=True,
      text=True,
      env={**outside, **env},
    )
    self.code, self.output = done.returncode, done.stdout + done.stderr
    return self.log.read_text().splitlines()


RUN = '-m dsr_jax.main --config=configs/scenes.py --workdir=runs/scenes'


@pytest.fixture
def bench(tmp_path):
  return Bench(tmp_path)


def test_make_run_makes_the_environment_once_and_runs_the_main_job(bench):
  assert bench.make('run') == ['-m venv --clear .venv', '-m pip install -r requirements.txt', RUN]
  assert bench.make('run') == [RUN]


def test_make_test_installs_the_test_requirements_once_and_runs_the_suite(bench):
  first = bench.make('test')
  assert first[:2] == ['-m venv --clear .venv', '-m pip install -r requirements-test.txt']
  assert first[2].startswith('-m pytest') and bench.make('test') == first[2:]


def test_make_lint_installs_the_test_requirements_once_and_checks_style_and_types(bench):
  checks = ['-m ruff check', '-m ruff format --check', '-m mypy']
  assert bench.make('lint')[1:] == ['-m pip install -r requirements-test.txt', *checks]
  assert bench.make('lint') == checks


def test_changed_requirements_are_installed_again(bench):
  bench.make('run')
  with open(bench.folder / 'requirements.txt', 'a') as f:
    f.write('six==1.17.0\n')
  assert bench.make('run') == ['-m pip install -r requirements.txt', RUN]
  assert bench.make('test')[0] == '-m pip install -r requirements-test.txt'


def test_an_install_that_failed_is_taken_up_again(bench):
  assert bench.make('run', FAIL='1')[-1] == '-m pip install -r requirements.txt' and bench.code
  assert bench.make('run') == ['-m pip install -r requirements.txt', RUN] and not bench.code


def test_an_environment_that_was_cut_short_is_made_again(bench):
  (bench.folder / '.venv' / 'bin').mkdir(parents=True)  # venv was killed before it had put pip in
  assert bench.make('run')[0] == '-m venv --clear .venv'


def test_a_too_old_python_is_one_sentence(bench):
  bench.script(
    bench.folder / 'python3',
    f"""#!/bin/sh
exec {sys.executable} -c "import sys; sys.version_info = (3, 10, 1); sys.version = '3.10.1 (x)'; exec(sys.argv[1])" "$2"
""",
  )
  bench.make('run')
  assert bench.code and 'error: Python 3.10.1 is too old: 3.11 or newer is needed' in bench.output
  assert not (bench.folder / '.venv').exists()
