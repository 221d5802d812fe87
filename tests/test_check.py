"""dsr check: what a model takes here, and whether transformers agrees."""

import json

import numpy as np
from PIL import Image
import pytest
from run_command import run

from dsr_jax import check
from dsr_jax.inference import Inference


@pytest.fixture(scope='module')
def result(hf_directory, tmp_path_factory):
  folder = tmp_path_factory.mktemp('check') / 'out'
  printed = run(check, model=hf_directory, output=folder)
  return folder, printed


def test_transformers_agrees_about_a_sound_model(result):
  compared = result[1]['transformers']
  assert compared['compared'] and compared['agrees']
  assert compared['prompts_with_equal_ids'] == '20 of 20' and len(set(check.PROMPTS)) == 20
  assert compared['greedy_codes_equal'] == '16 of 16'
  assert 0 < max(compared['largest_difference_of_log_probabilities'].values()) < 1e-3
  assert len(set(compared['greedy_codes'])) > 1
  assert compared['greedy_codes'] == result[1]['picture']['first_codes']


def test_it_says_what_a_model_takes_here(result):
  found = result[1]
  assert found['megabytes']['process_peak'] > found['megabytes']['parameters'] >= 0
  assert found['seconds']['first_picture'] > found['seconds']['picture'] > 0
  assert found['packages']['jax'] and found['model']['parameters'] > 1000


def test_what_is_printed_is_written_with_the_picture(result):
  folder, printed = result
  assert json.loads((folder / 'check.json').read_text()) == printed
  assert Image.open(folder / 'check.png').mode == 'RGB'


def test_a_model_that_computes_something_else_is_found(hf_directory, monkeypatch, capsys):
  """Ours with a tenth of a nat more for every token."""
  score = Inference.score

  def shifted(self, *args):
    found = score(self, *args)
    return type(found)(found.text_logps + np.float32(0.1), found.image_logps)

  monkeypatch.setattr(Inference, 'score', shifted)
  result, _ = check.check(str(hf_directory))
  assert not result['transformers']['agrees']
  found = result['transformers']['largest_difference_of_log_probabilities']
  assert found['text'] == pytest.approx(0.1, abs=1e-3) and found['codes'] < 1e-3
  assert result['transformers']['greedy_codes_equal'] == '16 of 16'


def test_what_cannot_be_compared_says_why(original, hf_directory, make_run, bundle, monkeypatch):
  result, _ = check.check(str(original[0]))
  assert not result['transformers']['compared']
  assert 'original layout' in result['transformers']['reason']
  assert check.check(str(hf_directory), compare=False)[0]['transformers'] == {
    'compared': False,
    'reason': '--nocompare',
  }
  monkeypatch.setattr(check.importlib.util, 'find_spec', lambda name: None)
  assert 'torch is not installed' in str(check.check(str(hf_directory))[0]['transformers'])
