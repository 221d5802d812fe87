"""The configurations for the published models, run as they are on small weights, own prompts and
own pictures.
"""

import json
import pathlib

import numpy as np
import original_layout
from PIL import Image
from places import ROOT
import pytest

from dsr_jax import config_loading, train
from dsr_jax.convert import locate as model_source


@pytest.fixture(scope='module')
def inputs(hf_directory, hf_model, tmp_path_factory):
  """A model in the original layout, a file of prompts, a folder of pictures."""
  folder = tmp_path_factory.mktemp('own')
  original_layout.write(folder / 'model', hf_directory, hf_model)
  (folder / 'prompts.txt').write_text('a red circle left of a blue square\ntwo small green rings\n')
  (folder / 'pictures').mkdir()
  rng = np.random.default_rng(0)
  for i, size in enumerate([(40, 30), (7, 50), (33, 33)]):
    Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f'pictures/{i}.png')
  return folder


@pytest.mark.parametrize(
  'name, hub_id',
  [
    ('janus_pro_1b', 'deepseek-community/Janus-Pro-1B'),
    ('janus_pro_7b', 'deepseek-community/Janus-Pro-7B'),
  ],
)
def test_the_published_models_are_trained_with_the_papers_numbers(name, hub_id):
  config = config_loading.load(ROOT / f'configs/{name}.py')
  m = config.method
  assert config.model == hub_id and config.data.prompts == 't2i_compbench'
  assert (m.objective, m.task, m.group_size, m.inputs_per_step, m.steps) == (
    'simpo',
    'unified',
    8,
    128,
    438,
  )
  assert (m.beta, m.gamma, m.learning_rate, m.warmup_steps, m.guidance, m.temperature) == (
    2.0,
    0.5,
    3e-6,
    5,
    5.0,
    1.0,
  )


@pytest.mark.parametrize(
  'name, task', [('janus_pro_1b', 'generation'), ('janus_pro_7b', 'understanding')]
)
def test_they_run_on_own_prompts_and_pictures(name, task, inputs, tmp_path):
  """One small step each; both tasks in one step would be compiled for twice as long and say no
  more.
  """
  config = config_loading.load(
    ROOT / f'configs/{name}.py',
    model=str(inputs / 'model'),
    data__prompts=str(inputs / 'prompts.txt'),
    data__images=str(inputs / 'pictures'),
    method__steps=1,
    method__warmup_steps=1,
    method__inputs_per_step=16,
    method__task=task,
    method__group_size=2,
    method__max_text_tokens=6,
    data__max_prompt_tokens=40,
  )
  summary = json.loads(pathlib.Path(train.run(config, str(tmp_path))).read_text())
  assert summary['finished'] and summary['step'] == 1
  trained = model_source.locate(str(tmp_path))
  assert trained.step == 1 and trained.trained.keys() == {
    'language_model',
    'lm_head',
    'generation_head',
  }
