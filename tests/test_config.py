"""Every key is known, checked and read; what cannot be is refused in one sentence; there is one way
to find a config file.
"""

import ast
import dataclasses
import os
import subprocess
import sys

from absl import flags
from places import CONFIGS, ROOT
import pytest

from dsr_jax import cli, config_loading, main, saved_config
from dsr_jax import config as config_lib
from dsr_jax.errors import InputError

PACKAGE = ROOT / 'dsr_jax'
OTHERS = ('scenes_pretrain', 'scenes_showo_pretrain', 'scenes_study')  # not of training runs
TRAINING = [name for name in config_loading.shipped() if name not in OTHERS]
CPU = {**os.environ, 'JAX_PLATFORMS': 'cpu'}


def with_key(key, value):
  config = config_lib.defaults()
  config.update_from_flattened_dict({key: value})
  return config


# Files.


def test_the_shipped_configs_are_the_files_of_the_folder():
  files = {path.stem for path in CONFIGS.glob('*.py')}
  assert files - set(config_loading.shipped()) == {'__init__', 'slices'}
  assert set(OTHERS) < set(config_loading.shipped())


@pytest.mark.parametrize('name', TRAINING)
def test_every_training_config_is_locked_valid_and_says_how_it_is_run(name):
  assert isinstance(config_loading.load(name), config_lib.Config)
  made = config_loading.read(name)
  assert made.is_locked
  with pytest.raises((AttributeError, KeyError)):
    made.method.group_sise = 3
  if name != 'common':
    docstring = ast.get_docstring(ast.parse((CONFIGS / f'{name}.py').read_text()))
    assert f'python -m dsr_jax.main --config=configs/{name}.py' in docstring


NAMES = (
  'scenes_tiny',
  'scenes_tiny.py',
  'configs/scenes_tiny.py',
  'dsr_jax/configs/scenes_tiny.py',
  str(CONFIGS / 'scenes_tiny.py'),
)


@pytest.mark.parametrize('name', NAMES)
def test_a_shipped_config_is_found_by_every_name_from_every_folder(name, tmp_path, monkeypatch):
  expected = config_loading.load('scenes_tiny')
  assert config_loading.load(name) == expected
  monkeypatch.chdir(tmp_path)
  assert config_loading.load(name) == expected


def test_what_follows_a_colon_goes_to_the_file():
  plain = config_loading.load('janus_pro_7b').system
  slice_ = config_loading.load('janus_pro_7b:v5e:8x8').system
  assert config_loading.load('configs/janus_pro_7b.py:v5e:8x8').system == slice_
  assert (slice_.mesh.fsdp, slice_.mesh.tp) == (8, 8) and plain.mesh == config_lib.Mesh()
  with pytest.raises(InputError, match="scenes.py takes no argument, but 'v5e:8x8' follows"):
    config_loading.load('scenes:v5e:8x8')


OWN = """
from dsr_jax.configs import common

def get_config(steps='7'):
  config = common.get_config()
  config.method.steps = int(steps)
  return config
"""


def test_an_own_file_builds_on_the_shipped_ones(tmp_path, monkeypatch):
  (tmp_path / 'scenes.py').write_text(OWN)
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'own.py').write_text(OWN)
  assert config_loading.load(tmp_path / 'mine' / 'own.py').method.steps == 7
  assert config_loading.load(f'{tmp_path}/mine/own.py:9').method.steps == 9
  monkeypatch.setenv('HERE', str(tmp_path))
  monkeypatch.setenv('HOME', str(tmp_path))
  assert config_loading.load('$HERE/mine/own.py').method.steps == 7
  assert config_loading.load('~/mine/own.py').method.steps == 7
  monkeypatch.chdir(tmp_path)
  assert config_loading.load('scenes.py').method.steps == 7  # a file on disk goes first
  assert config_loading.load('scenes').method.steps == 100  # a bare name is the shipped one


@pytest.mark.parametrize(
  'text, words',
  [
    ('x = 1', 'has no get_config(); add one'),
    ('def get_config(): return {}', 'returns a dict; return a ConfigDict'),
    ('get_config = 3', 'has get_config=3; make it a function'),
    ('def get_config(:', 'fails in line 1 (SyntaxError'),
    ('import nothing_of_that_name', 'fails in line 1 (ModuleNotFoundError'),
    ('def get_config():\n  return {}[1]', 'fails in line 2 (KeyError'),
    ('import sys\nsys.exit(3)', 'fails in line 2 (SystemExit'),
    ('x = "\0"', 'fails'),
  ],
)
def test_a_file_that_is_no_config_is_refused(text, words, tmp_path):
  (tmp_path / 'own.py').write_text(text)
  with pytest.raises(InputError) as e:
    config_loading.load(tmp_path / 'own.py')
  assert words in str(e.value) and 'own.py' in str(e.value)


@pytest.mark.parametrize('name', ['nothing', 'slices', 'configs/nothing.py', '/', ''])
def test_an_unknown_name_is_answered_with_the_shipped_ones(name):
  with pytest.raises(InputError) as e:
    config_loading.load(name)
  assert str(e.value).endswith(', '.join(config_loading.shipped()))


def parsed(*words, **more):
  """The value of a --config flag after a command line."""
  f = flags.FlagValues()
  words = ['test', *words]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('sys.argv', words)  # `parse` sets it, for config flags look for overrides there
    config_loading.define_config_flag('config', 'The run.', f, **more)
    cli.parse(f, words)
  return f.config


def test_the_flag_takes_names_and_overrides(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  words = ('--config=scenes', '--config.method.grpo.ratio_low=.1', '--config.method.steps', '5')
  config = parsed(*words)
  assert config.is_locked
  method = config_loading.from_config_dict(config).method
  assert (method.grpo.ratio_low, method.steps) == (0.1, 5)
  assert parsed('--config.seed=4', default='scenes_pretrain').seed == 4
  assert parsed('--config=scenes_study', default='scenes_pretrain').run.method.steps == 36
  with pytest.raises(InputError, match='--config is missing'):
    parsed()
  with pytest.raises(InputError, match='--config.method.steps has no value'):
    parsed('--config=scenes', '--config.method.steps', '--config.method.seed=1')


# Keys.


def test_the_defaults_are_the_papers():
  m = config_loading.from_config_dict(config_lib.defaults()).method
  assert (m.group_size, m.inputs_per_step, m.steps) == (8, 128, 438)
  assert (m.learning_rate, m.warmup_steps, m.beta, m.gamma) == (3e-6, 5, 2.0, 0.5)
  assert m.inputs_per_task == 64 and m.tasks == ('generation', 'understanding')
  assert dataclasses.replace(m, task='generation').inputs_per_task == 128


def test_the_dataclasses_import_nothing_of_the_package():
  code = (
    'import sys, dsr_jax.config; '
    "print(sorted(m for m in sys.modules if m.startswith(('dsr_jax.', 'jax', 'flax'))))"
  )
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  # The package itself looks at the environment, without any library.
  assert done.stdout.strip() == "['dsr_jax.config', 'dsr_jax.environment', 'dsr_jax.errors']"


def test_loading_a_config_leaves_the_devices_alone():
  """Several processes must find one another before JAX looks for devices."""
  code = (
    'from dsr_jax import config_loading; from jax._src import xla_bridge; '
    "config_loading.load('scenes'); print(xla_bridge.backends_are_initialized())"
  )
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, env=CPU
  )
  assert done.stdout.strip() == 'False', done.stderr


class Reads(ast.NodeVisitor):
  """Attribute chains of a module as tuples: m = config.method; m.lora.rank -> (config, method,
  lora, rank).
  """

  def __init__(self, tree, self_name='self'):
    self.aliases, self.chains, self._self = {}, set(), self_name
    for node in ast.walk(tree):
      if isinstance(node, ast.Assign):
        for target in node.targets:
          self._assign(target, node.value)
    self.visit(tree)

  def _assign(self, target, value):
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
      for t, v in zip(target.elts, value.elts, strict=False):
        self._assign(t, v)
    elif isinstance(target, ast.Name) and isinstance(value, ast.Attribute):
      self.aliases.setdefault(target.id, set()).update(self._resolved(value))

  def _resolved(self, node):
    if isinstance(node, ast.Attribute):
      name = node.attr.lstrip('_')
      return {(*chain, name) for chain in self._resolved(node.value)}
    if isinstance(node, ast.Name):
      own = (self._self if node.id == 'self' else node.id,)
      return {own} | self.aliases.get(node.id, set())
    return {()}

  def visit_Attribute(self, node):
    if isinstance(node.ctx, ast.Load):
      self.chains |= self._resolved(node)
    self.generic_visit(node)


def unread(keys, chains):
  """Keys that no chain ends with: (config, method, lora, rank) reads method.lora.rank, and so does
  (lora, rank). The key `model`, which is in no group, is read by (config, model).
  """
  ends = {chain[-2:] for chain in chains}
  return [key for key in keys if tuple(f'config.{key}'.split('.')[-2:]) not in ends]


def test_every_key_is_read_somewhere_in_the_package():
  chains = set()
  for path in PACKAGE.rglob('*.py'):
    if path.name == 'config_loading.py' or path.parent.name == 'configs':
      continue
    tree = ast.parse(path.read_text())
    if path.name != 'config.py' or path.parent != PACKAGE:
      chains |= Reads(tree).chains
      continue
    for node in tree.body:  # properties read the keys of their own class
      if isinstance(node, ast.ClassDef):
        chains |= Reads(node, self_name=node.name.lower()).chains
  # sharding.py asks for all three sizes at once
  mesh = {('mesh', axis.name) for axis in dataclasses.fields(config_lib.Mesh)}
  keys = saved_config.flat(saved_config.to_json(config_lib.Config()))
  assert unread(keys, chains | mesh) == []


def test_a_key_that_is_not_read_would_be_found():
  tree = ast.parse("""
def step(config, optimizer):
  m, s = config.method, config.system
  m.lora.rank + optimizer.steps + dpo.gamma + s.remat
  m.beta = 3
""")
  keys = ['method.lora.rank', 'system.remat', 'method.steps', 'method.gamma', 'method.beta']
  assert unread(keys, Reads(tree).chains) == ['method.steps', 'method.gamma', 'method.beta']


# Values.


@pytest.mark.parametrize(
  'key, value, words',
  [
    ('method.group_size', 1, 'at least 2'),
    ('method.objective', 'dpo', 'simpo'),
    ('method.reward', 'likes', 'dual'),
    ('method.task', 'both', 'unified, generation, understanding'),
    ('method.scorer', 'judge', 'policy'),
    ('method.trainable', 'all', 'all_but_vq'),
    ('method.crop', 'squash', 'crop, pad'),
    ('method.inputs_per_step', 127, 'a multiple of 2'),
    ('method.accumulate', 3, 'a multiple of 6'),
    ('method.steps', 0, 'at least 1'),
    ('method.warmup_steps', 500, 'at most the 438 steps'),
    ('method.temperature', 0.0, 'above 0'),
    ('method.guidance', 0.5, '1 is off'),
    ('method.cfg_interval', -1, 'at least 0'),
    ('method.learning_rate', -1e-3, 'above 0'),
    ('method.learning_rate', float('nan'), 'finite'),
    ('method.steps', 10**12, 'at most 4294967296'),
    ('system.keep_every', 10**400, 'at most 4294967296'),
    ('method.adam_b2', 1.0, 'below 1'),
    ('method.seed', -1, 'at least 0'),
    ('method.seed', 2**32, 'below 4294967296'),
    ('method.judge_accuracy', 1.5, 'at most 1'),
    ('method.question', ' ', 'a sentence'),
    ('method.grpo.ratio_low', -0.1, 'at least 0'),
    ('method.gspo.ratio_high', -0.1, 'at least 0'),
    ('method.cispo.ratio_max', 0.0, 'above 0'),
    ('method.dpo.beta', 0.0, 'above 0'),
    ('method.lora.rank', 0, 'at least 1'),
    ('method.lora.learning_rate', 0.0, 'above 0'),
    ('method.template', 'User', 'tokens (Janus), plain (Janus)'),
    ('method.separate.swap_every', 0, 'at least 1'),
    ('method.inner_updates', 2, 'grpo, dr_grpo'),
    ('system.cpu_devices', -1, 'at least 0'),
    ('system.cpu_devices', 5000, 'below 1025'),
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
    ('eval.benchmark', 'geneval', 'auto, scenes, own, none'),
  ],
)
def test_an_impossible_value_is_refused_with_what_was_found_and_expected(key, value, words):
  with pytest.raises(InputError) as e:
    config_loading.from_config_dict(with_key(key, value))
  message = str(e.value)
  assert words in message and str(value)[:20] in message and '\n' not in message
  assert key.split('.')[-1] in message


def test_a_number_beyond_all_floats_is_refused():
  config = config_lib.defaults().to_dict()
  config['method']['beta'] = 10**400
  with pytest.raises(InputError, match='beta'):
    config_loading.from_config_dict(config)


def test_unknown_missing_and_mistyped_keys_are_refused():
  config = config_lib.defaults().to_dict()

  def refused(words, **parts):
    with pytest.raises(InputError, match=words):
      config_loading.from_config_dict({**config, **parts})

  method = config['method']
  refused(
    'config.method.group_sise is not a key.*did you mean config.method.group_size',
    method={**method, 'group_sise': 4},
  )
  refused("group_size is '8'; set it to a value of type int", method={**method, 'group_size': '8'})
  refused(
    "method.lora.rank is '8'; set it to a value",
    method={**method, 'lora': {**method['lora'], 'rank': '8'}},
  )
  refused('config.method.lora.rank is missing; set every key', method={**method, 'lora': {}})
  refused(r'config.method is a group of keys, not a value \(3\)', method=3)
  with pytest.raises(InputError, match='config.system is missing'):
    config_loading.from_config_dict({k: v for k, v in config.items() if k != 'system'})


# Saved configurations, and names that were.


def old_names(settings):
  """A configuration of today as an earlier version would have saved it."""
  tree = saved_config.to_json(settings)
  method = tree['method']
  for old, new in saved_config.RENAMED.items():
    _, group, leaf = new.split('.')
    method[old.split('.')[1]] = method[group][leaf]
  for group in ('grpo', 'gspo', 'cispo', 'dpo', 'lora', 'separate', 'clip_reward'):
    del method[group]
  return tree


def test_a_saved_configuration_older_than_a_key_has_its_default():
  now = saved_config.to_json(config_loading.load('scenes', method__beta=1.5))
  older = {**now, 'method': {k: v for k, v in now['method'].items() if k != 'cfg_interval'}}
  older['method']['grpo'] = {'ratio_high': now['method']['grpo']['ratio_high']}
  assert saved_config.completed(older) == saved_config.completed(now) == now
  assert saved_config.completed({'method': older['method'], 'split': 'evaluation'}) == {
    'method': now['method'],
    'split': 'evaluation',
  }
  # what a checkpoint says of its model
  about = {'model': {'name': 'scenes'}}
  assert saved_config.completed(about) == about


def test_a_saved_configuration_with_old_names_is_the_same_run():
  now = config_loading.load(
    'scenes',
    method__grpo__ratio_high=0.3,
    method__gspo__ratio_low=1e-4,
    method__cispo__ratio_max=4.0,
    method__dpo__beta=0.2,
    method__lora__rank=3,
    method__separate__swap_every=7,
    method__clip_reward__model='a/clip',
  )
  saved = old_names(now)
  before = str(saved)
  assert set(saved['method']) > {'ratio_high', 'sequence_low', 'lora_rank', 'clip_model'}
  translated = saved_config.completed(saved)
  assert saved_config.differences(translated, saved_config.to_json(now)) == []
  assert config_loading.from_config_dict(translated) == now
  # A run names its template; those of then had one.
  expected = dataclasses.replace(now.method, template='tokens')
  assert saved_config.saved_method(saved['method']) == expected
  assert str(saved) == before  # what was read stays as it was
  other = saved_config.to_json(config_loading.load('scenes'))
  assert 'method.lora.rank: 3 -> 16' in saved_config.differences(translated, other)


def test_adapters_saved_before_they_had_a_rate_of_their_own_keep_the_one_they_learned_at():
  now = saved_config.to_json(config_loading.load('scenes', method__trainable='lora'))['method']
  older = {**now, 'learning_rate': 5e-5, 'lora': {'rank': 4}}
  oldest = {k: v for k, v in older.items() if k != 'lora'} | {'lora_rank': 4}
  for saved in (older, oldest):
    method = saved_config.saved_method(saved)
    assert (method.lora.rank, method.lora.learning_rate, method.peak_learning_rate) == (
      4,
      5e-5,
      5e-5,
    )
  whole = saved_config.saved_method({**older, 'trainable': 'language_model'})
  assert (whole.peak_learning_rate, whole.lora.learning_rate) == (5e-5, 1e-4)


RATE = r'^method.learning_rate=1e-3 .*set .*method.lora.learning_rate \(it is 0.0001\)'


@pytest.mark.parametrize(
  'words',
  [
    ['--config=scenes', '--config.method.trainable=lora', '--config.method.learning_rate=1e-3'],
    ['--config.method.learning_rate', '1e-3', '--config.method.trainable', 'lora', '--config=OWN'],
    ['--config=OWN', '--config.method.learning_rate=1e-3'],
  ],
)
def test_the_rate_of_weights_that_are_not_trained_is_refused(words, tmp_path):
  own = tmp_path / 'own.py'
  own.write_text(OWN.replace('int(steps)', "int(steps)\n  config.method.trainable = 'lora'"))
  with pytest.raises(InputError, match=RATE):
    config_loading.check_flags([word.replace('OWN', str(own)) for word in words])
  config_loading.check_flags(['--config=scenes', '--config.method.learning_rate=1e-3'])
  adapters = ['--config.method.trainable=lora', '--config.method.lora.learning_rate=1e-3']
  config_loading.check_flags(['--config=scenes', *adapters])
  with pytest.raises(InputError, match='trains only the adapters; set their rate instead'):
    config_loading.load('scenes', method__trainable='lora', method__learning_rate=1e-3)


def test_the_partner_of_a_saved_run_is_the_policy():
  now = saved_config.to_json(config_loading.load('scenes', method__strategy='separate'))
  saved = {'method': {**now['method'], 'scorer': 'partner'}}
  assert saved_config.completed(saved)['method'] == now['method']
  with pytest.raises(InputError, match='^method.scorer=partner is now method.scorer=policy$'):
    config_loading.load('scenes', method__strategy='separate', method__scorer='partner')


@pytest.mark.parametrize('old', saved_config.RENAMED)
def test_an_old_name_that_is_typed_is_answered_with_the_new_one(old):
  new = saved_config.RENAMED[old]
  assert new in saved_config.flat(saved_config.to_json(config_lib.Config()))
  sentence = f'{old} is now {new}'
  for words in (
    ('--config=scenes', f'--config.{old}=1'),
    ('--config=scenes_study', f'--config.run.{old}=1'),
  ):
    with pytest.raises(InputError) as e:
      config_loading.check_flags(words)
    assert str(e.value) == sentence
  tree = config_lib.defaults()
  tree.method[old.split('.')[1]] = 1  # in a file of one's own
  with pytest.raises(InputError) as e:
    config_loading.from_config_dict(tree)
  assert str(e.value) == sentence


def test_differences_name_every_change_and_nothing_else():
  old = {'a': 1, 'b': {'c': 2, 'd': 3}, 'e': 0}
  assert saved_config.differences(old, old) == []
  assert saved_config.differences(old, {'a': 1, 'b': {'c': 5, 'd': 3}, 'f': 9}) == [
    'b.c: 2 -> 5',
    "e: 0 -> '(absent)'",
    "f: '(absent)' -> 9",
  ]


# The command.


@pytest.mark.parametrize(
  'args, words',
  [
    (['--config=configs/nothing.py'], 'there is no config file configs/nothing.py'),
    (['--workdir=x'], '--config is missing'),
    (['--config=configs/scenes.py', '--config.method.group_sise=4'], 'config.method.group_size'),
    (
      ['--config=scenes', '--config.method.lora_rank=4'],
      'method.lora_rank is now method.lora.rank',
    ),
    (['--config=configs/scenes.py', '--config.method.group_size=1', '--workdir=NEW'], 'at least 2'),
    (['--config=configs/scenes.py'], '--workdir is missing'),
    (['--config=configs/scenes.py', '--workdir=NEW', 'stray'], 'stray'),
  ],
)
def test_main_answers_wrong_flags_in_one_sentence(args, words, tmp_path, monkeypatch):
  new = tmp_path / 'new'
  f = flags.FlagValues()
  main.define_flags(f)
  monkeypatch.setattr(sys, 'argv', ['main', *(a.replace('NEW', str(new)) for a in args)])
  with pytest.raises(InputError) as found:
    main.main(cli.parse(f, sys.argv), f)
  assert words in str(found.value) and '\n' not in str(found.value)
  assert not new.exists()
