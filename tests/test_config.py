"""Every key is known, checked and used; what cannot be is refused in one sentence."""

import dataclasses
import glob
import os
import re
import subprocess
import sys

import ml_collections
from places import ROOT
import pytest

from dsr_jax import config as config_lib
from dsr_jax.errors import InputError

OTHERS = ('scenes_pretrain.py', 'scenes_study.py', 'slices.py')  # not of training runs
FILES = [
  p
  for p in sorted(glob.glob(os.path.join(ROOT, 'configs', '*.py')))
  if os.path.basename(p) not in OTHERS
]


def leaves(tree, prefix=''):
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from leaves(value, f'{prefix}{key}.')
    else:
      yield prefix + key


def with_key(path, value):
  config = config_lib.defaults()
  config.update_from_flattened_dict({path: value})
  return config


@pytest.mark.parametrize('path', FILES, ids=os.path.basename)
def test_every_config_is_locked_valid_and_says_how_it_is_run(path):
  config = config_lib.load(path)
  assert isinstance(config, config_lib.Config)
  namespace = {}
  with open(path, encoding='utf-8') as f:
    exec(compile(f.read(), path, 'exec'), namespace)  # as ml_collections does
  made = namespace['get_config']()
  assert isinstance(made, ml_collections.ConfigDict) and made.is_locked
  with pytest.raises((AttributeError, KeyError)):
    made.method.group_sise = 3
  if os.path.basename(path) != 'common.py':
    assert (
      f'python -m dsr_jax.main --config=configs/{os.path.basename(path)}' in namespace['__doc__']
    )


def test_the_defaults_are_the_papers():
  m = config_lib.from_config_dict(config_lib.defaults()).method
  assert (m.group_size, m.inputs_per_step, m.steps, m.learning_rate, m.warmup_steps) == (
    8,
    128,
    438,
    3e-6,
    5,
  )
  assert (m.beta, m.gamma) == (2.0, 0.5)
  assert m.inputs_per_task == 64 and m.tasks == ('generation', 'understanding')
  assert dataclasses.replace(m, task='generation').inputs_per_task == 128


def test_every_key_is_read_somewhere_in_the_package():
  sources = ''
  for path in glob.glob(os.path.join(ROOT, 'dsr_jax', '**', '*.py'), recursive=True):
    with open(path, encoding='utf-8') as f:
      text = f.read()
      # config.py itself reads keys only where a property is made of them
      sources += (
        ' '.join(re.findall(r'self\.\w+', text)) if os.path.basename(path) == 'config.py' else text
      )
  keys = list(leaves(config_lib.to_json(config_lib.Config())))
  assert [key for key in keys if not re.search(rf'\.{key.split(".")[-1]}\b', sources)] == []


@pytest.mark.parametrize(
  'key, value, words',
  [
    ('method.group_size', 1, 'at least 2'),
    ('method.objective', 'dpo', 'simpo'),
    ('method.task', 'both', 'unified, generation, understanding'),
    ('method.scorer', 'judge', 'policy'),
    ('method.trainable', 'all', 'all_but_vq'),
    ('method.crop', 'squash', 'crop, pad'),
    ('method.inputs_per_step', 127, 'a multiple of 2'),
    ('method.accumulate', 3, 'a multiple of 6'),
    ('method.steps', 0, 'at least 1'),
    ('method.warmup_steps', 500, 'of 438 steps'),
    ('method.temperature', 0.0, 'more than 0'),
    ('method.guidance', 0.5, '1 is off'),
    ('method.cfg_interval', -1, 'at least 0'),
    ('method.learning_rate', -1e-3, 'more than 0'),
    ('method.learning_rate', float('nan'), 'finite'),
    ('method.adam_b2', 1.0, 'less than 1'),
    ('method.seed', -1, 'at least 0'),
    ('method.question', ' ', 'a sentence'),
    ('system.rollout_chunk', 7, 'a divisor of 64'),
    ('system.update_chunk', 128, 'a divisor of 64'),
    ('system.compute_dtype', 'float16', 'float32, bfloat16'),
    ('system.cache_dtype', 'int4', 'int8'),
    ('system.mesh.data', 0, 'positive'),
    ('system.mesh.tp', -1, 'at most one -1'),
    ('system.log_every', 0, 'at least 1'),
    ('system.keep_last', 0, 'at least 1'),
    ('data.prompts', '', 'a name or a path'),
    ('data.max_prompt_tokens', 0, 'at least 1'),
    ('eval.benchmark', 'geneval', 'scenes, none'),
  ],
)
def test_an_impossible_value_is_refused_with_what_was_found_and_expected(key, value, words):
  with pytest.raises(InputError) as e:
    config_lib.from_config_dict(with_key(key, value))
  message = str(e.value)
  assert words in message and 'found' in message and 'expected' in message and '\n' not in message
  assert key.split('.')[-1] in message


def test_unknown_missing_and_mistyped_keys_are_refused():
  config = config_lib.defaults().to_dict()
  with pytest.raises(
    InputError, match='unknown key config.method.group_sise.*did you mean config.method.group_size'
  ):
    config_lib.from_config_dict({**config, 'method': {**config['method'], 'group_sise': 4}})
  with pytest.raises(InputError, match='found no config.system'):
    config_lib.from_config_dict({k: v for k, v in config.items() if k != 'system'})
  with pytest.raises(InputError, match="group_size='8'; expected a value of type int"):
    config_lib.from_config_dict({**config, 'method': {**config['method'], 'group_size': '8'}})
  with pytest.raises(InputError, match='config.method=3; expected a group of keys'):
    config_lib.from_config_dict({**config, 'method': 3})


def test_a_saved_configuration_older_than_a_key_has_its_default():
  now = config_lib.to_json(
    config_lib.load(os.path.join(ROOT, 'configs', 'scenes.py'), method__beta=1.5)
  )
  older = {**now, 'method': {k: v for k, v in now['method'].items() if k != 'cfg_interval'}}
  assert config_lib.completed(older) == config_lib.completed(now) == now
  assert config_lib.completed({'method': older['method'], 'split': 'evaluation'}) == {
    'method': now['method'],
    'split': 'evaluation',
  }
  assert config_lib.completed({'model': {'name': 'scenes'}}) == {
    'model': {'name': 'scenes'}
  }  # what a checkpoint says of its model


def test_differences_name_every_change_and_nothing_else():
  old = {'a': 1, 'b': {'c': 2, 'd': 3}, 'e': 0}
  assert config_lib.differences(old, old) == []
  assert config_lib.differences(old, {'a': 1, 'b': {'c': 5, 'd': 3}, 'f': 9}) == [
    'b.c: 2 -> 5',
    "e: 0 -> '(absent)'",
    "f: '(absent)' -> 9",
  ]


@pytest.mark.parametrize(
  'args, words',
  [
    (['--config=configs/nothing.py'], 'found no config file at configs/nothing.py'),
    (['--workdir=x'], 'found no --config'),
    (['--config=configs/scenes.py', '--config.method.group_sise=4'], 'config.method.group_size'),
    (['--config=configs/scenes.py', '--config.method.group_size=1', '--workdir=NEW'], 'at least 2'),
    (['--config=configs/scenes.py'], 'found no --workdir'),
    (['--config=configs/scenes.py', '--workdir=NEW', 'stray'], 'stray'),
  ],
)
def test_main_answers_wrong_flags_in_one_sentence(args, words, tmp_path):
  new = tmp_path / 'new'
  command = [sys.executable, '-m', 'dsr_jax.main', *(a.replace('NEW', str(new)) for a in args)]
  done = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, 'JAX_PLATFORMS': 'cpu'}
  )
  assert done.returncode == 2 and done.stdout == ''
  assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1 and words in done.stderr
  assert not new.exists()
