"""A command's stderr is ours alone: no library speaks there, torch or no torch."""

import os
import re
import subprocess
import sys

from places import ROOT
import pytest

from dsr_jax.report import summary

# What a user has: an environment of requirements.txt, without torch.
WITHOUT_TORCH = """
from importlib.machinery import PathFinder

found = PathFinder.find_spec

def find_spec(name, path=None, target=None):
  hidden = name.partition('.')[0] in ('torch', 'torchvision')
  return None if hidden else found(name, path, target)

PathFinder.find_spec = find_spec
"""
OURS = re.compile(r'^([a-z][a-z ]{3,12} {1,9}\S.*|error: .*|)$')

LIBRARIES = """
import sys
from dsr_jax import cli
from dsr_jax.convert import locate
from dsr_jax.models.janus.processor import Processor
from dsr_jax.runtime import checkpoints

def main(argv, f):
  assert 'torch' not in sys.modules
  processor = Processor.from_directory(locate.EMBEDDED)
  assert processor.decode(processor.encode_prompt('a red disc'))
  assert checkpoints.steps_in(sys.argv[1]) == []

cli.run_main(main, lambda f: None)
"""


@pytest.fixture(name='environment')
def _environment(tmp_path):
  (tmp_path / 'site').mkdir()
  (tmp_path / 'site' / 'sitecustomize.py').write_text(WITHOUT_TORCH)
  kept = {key: value for key, value in os.environ.items() if key != 'TRANSFORMERS_VERBOSITY'}
  return {**kept, 'PYTHONPATH': f'{tmp_path / "site"}:{ROOT}', 'JAX_PLATFORMS': 'cpu'}


def stderr_of(environment, *arguments):
  done = subprocess.run(
    [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  return done.stderr


def test_a_tokenizer_without_torch_and_a_folder_only_to_be_read_say_nothing(environment, tmp_path):
  (tmp_path / 'checkpoints').mkdir()
  assert stderr_of(environment, '-c', LIBRARIES, str(tmp_path)) == ''


@pytest.mark.slow
def test_a_run_and_its_replay_say_our_lines_alone(environment, tmp_path):
  run = str(tmp_path / 'run')
  said = stderr_of(
    environment, '-m', 'dsr_jax.main', '--config=configs/scenes_tiny.py', f'--workdir={run}'
  )
  said += stderr_of(environment, '-m', 'dsr_jax.replay', f'--workdir={run}', '--step=2')
  table = summary.table(run).splitlines()
  assert set(table) <= set(said.splitlines())
  strange = [line for line in said.splitlines() if line not in table and not OURS.match(line)]
  assert not [line for line in strange if not re.match(r'step \d', line)]
