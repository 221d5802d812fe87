"""Config files and flags -> a checked `config.Config`; saved configurations of earlier runs too.

--config takes a Python file with `get_config()`, which returns a ConfigDict, or the bare name of a
file in `dsr_jax/configs/`. What follows a colon goes to `get_config`:

  --config=scenes    --config=configs/scenes.py    --config=janus_pro_7b:v5e:8x8    --config=mine.py
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import inspect
import operator
import pathlib
import traceback

from absl import flags
import ml_collections
from ml_collections import config_flags

from dsr_jax import config as config_lib
from dsr_jax import config_help, families, inputs, saved_config
from dsr_jax.errors import InputError, first_line
from dsr_jax.losses import OBJECTIVES
from dsr_jax.rewards import table as rewards

flags.disclaim_key_flags()  # --help lists --config under the command, not under this module

CONFIGS = pathlib.Path(__file__).parent / 'configs'
# Folders whose files are found from anywhere: an installed package has no clone around it.
SHIPPED_FOLDERS = (pathlib.Path('.'), pathlib.Path('configs'), pathlib.Path('dsr_jax/configs'))
NO_CONFIGS = ('__init__', 'slices')

# Files and flags.


def shipped():
  """Names of the config files in the package, as --config takes them."""
  names = {path.stem for path in CONFIGS.glob('*.py')}
  return sorted(names - set(NO_CONFIGS))


def find(name):
  """'scenes:v5e:8x8' -> the path of the config file, and the argument ('' without a colon).

  A file on disk goes before a shipped one of the same path, so a clone reads its own configs/.
  """
  text, _, argument = str(name).partition(':')
  if text in shipped():
    return CONFIGS / f'{text}.py', argument
  path = pathlib.Path(inputs.expanded(text, '--config'))
  if path.suffix == '.py' and path.is_file():
    return path, argument
  if path.suffix == '.py' and path.parent in SHIPPED_FOLDERS and path.stem in shipped():
    return CONFIGS / path.name, argument
  raise InputError(
    f'found no config file at {text}; expected a Python file with get_config(), or one of '
    f'{", ".join(shipped())}'
  )


def read(name):
  """Runs a config file and returns its locked ConfigDict; the one way in for every command."""
  path, argument = find(name)
  spec = importlib.util.spec_from_file_location('_dsr_jax_config', path)
  module = importlib.util.module_from_spec(spec)
  with _running(path):
    spec.loader.exec_module(module)
  get_config = getattr(module, 'get_config', None)
  if get_config is None:
    raise InputError(f'found no get_config() in {path}; expected one that returns a ConfigDict')
  if not callable(get_config):
    raise InputError(f'found get_config={get_config!r} in {path}; expected a function')
  if argument and not inspect.signature(get_config).parameters:
    raise InputError(f'found {argument!r} after {path}; expected nothing, it takes no argument')
  with _running(path):
    config = get_config(argument) if argument else get_config()
  if not isinstance(config, ml_collections.ConfigDict):
    raise InputError(
      f'found a {type(config).__name__} from get_config() of {path}; expected a ConfigDict'
    )
  return config.lock()


@contextlib.contextmanager
def _running(path):
  """What goes wrong in a config file is one sentence, with the line of that file."""
  try:
    yield
  except InputError:
    raise
  except (Exception, SystemExit) as e:  # a file may fail in any way there is
    lines = [
      frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == str(path)
    ]
    if isinstance(e, SyntaxError):
      lines = [e.lineno]
    where = f' in line {lines[-1]}' if lines and lines[-1] else ''
    raise InputError(
      f'found {path} failing{where} ({type(e).__name__}: {first_line(e)}); expected a Python file '
      'with get_config(); mend it'
    ) from e


def load(name, **overrides):
  """The `Config` of --config=NAME; method__steps=3 stands for --config.method.steps=3."""
  config = read(name)
  for key, value in overrides.items():
    *parents, last = key.split('__')
    node = config
    for parent in parents:
      node = node[parent]
    try:
      node[last] = value
    except OverflowError as e:  # a whole number for a key of type float
      shown = key.replace('__', '.')
      raise InputError(
        f'found {shown} of {len(str(value))} digits; expected a finite number; change it'
      ) from e
  values = saved_config.flat(config.to_dict())
  for key in overrides:
    refuse_rate_of_others(key.replace('__', '.'), values)
  return from_config_dict(config)


class _FileParser(flags.ArgumentParser):
  """The value of a --config flag -> its ConfigDict."""

  def __init__(self, default, prefix):
    self._default = default
    self._prefix = prefix

  def parse(self, argument):
    return read(argument)

  def flag_type(self):
    return 'config file'

  def arrange(self, arguments):
    """The arguments, --config before its keys; see `check_flags`."""
    path = check_flags(arguments, self._default)
    rest, words = [], iter(arguments)
    for word in words:
      if word in ('--config', '-config'):
        next(words, None)
      elif not word.startswith(('--config=', '-config=')):
        rest.append(word)
    return [f'--config={path}', *rest]

  def help(self):
    """Of its keys."""
    return config_help.text(self._prefix) if self._default is None else ''


def define_config_flag(name, help, f=flags.FLAGS, default=None, prefix=''):
  """Defines --NAME=FILE with its overrides --NAME.key=value; returns the flag's holder.

  default: the config where none is named; `cli.parse` puts it in.
  prefix: of the group in which a run's keys stand, for --help.
  """
  holder = config_flags.DEFINE_config_file(name, help_string=help, flag_values=f)
  # ml_collections opens paths only, from the working directory only.
  f[name].parser = _FileParser(default, prefix)
  return holder


def check_flags(argv, default=None) -> str:
  """The config that is named. InputError for what absl would answer with a traceback: no --config,
  no such file, an override of an unknown key.

  argv: the command's arguments without its name. default: that of --config.
  """
  pairs = _pairs(argv)
  given = [value for name, _, value in pairs if name == 'config']
  path = next((p for p in reversed(given) if p), default)
  if path is None:
    raise InputError('found no --config; expected a config file, as --config=configs/scenes.py')
  known = saved_config.flat(read(path).to_dict())
  typed = {name.removeprefix('config.'): value for name, _, value in pairs if '.' in name}
  for key in typed:
    refuse_rate_of_others(key, {**known, **typed})
  for name, equals, value in pairs:
    key = name.removeprefix('config.').removeprefix('noconfig.')
    if key == name:
      continue
    if key in known:
      if not equals and not value and not isinstance(known[key], bool):
        raise InputError(f'found --{name} without a value; expected one; write --{name}=...')
      continue
    if any(other.startswith(f'{key}.') for other in known):
      raise InputError(
        f'found --{name}, a group of keys; expected one of them; write --{name}.KEY=VALUE'
      )
    saved_config.refuse_renamed(key)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f'did you mean config.{near[0]}' if near else 'see --help for all of them'
    raise InputError(f'found the unknown key {name}; expected a key of {path}; {hint}')
  return path


def _pairs(argv) -> list[tuple[str, str, str]]:
  """(flag, '=', value) of each flag; ('', value in the next word) where there is no '='."""
  pairs = []
  for word, following in zip(argv, [*argv[1:], '']):
    if word.startswith('-'):
      name, equals, value = word.lstrip('-').partition('=')
      pairs.append((name, equals, value if equals or following.startswith('-') else following))
  return pairs


def refuse_rate_of_others(key, values):
  """InputError where `key`, which was typed, is the rate of weights that are not trained.

  values: of all keys, {'method.trainable': 'lora'}; they may stand in a group, as `run.method...`.
  """
  group = key.removesuffix('method.learning_rate')
  if group != key and values.get(f'{group}method.trainable') == 'lora':
    raise InputError(
      f'found {key}={values[key]} with {group}method.trainable=lora, whose weights stay as they '
      f'are; expected the rate of the adapters, {group}method.lora.learning_rate (it is '
      f'{values.get(f"{group}method.lora.learning_rate")}); set that'
    )


# Between ConfigDict, dataclasses and JSON.


def from_config_dict(config):
  """ConfigDict or nested dict -> `Config`; InputError for unknown, missing or impossible values."""
  if isinstance(config, ml_collections.ConfigDict):
    config = config.to_dict()
  result = saved_config.build(config_lib.Config, config, 'config')
  result = _with_paths_expanded(result)
  _check_values(result)
  _check_method(result.method)
  _check_chunks(result.system, result.method)
  _check_data(result)
  return _with_benchmark(result)


# Paths, as a shell's user means them.

_PATHS = (
  'model',
  'data.prompts',
  'data.images',
  'method.clip_reward.model',
  'system.bucket',
  'system.compile_cache',
)


def _with_paths_expanded(config):
  for key in _PATHS:
    config = _replaced(config, key, inputs.expanded(_get(config, key), f'config.{key}'))
  return config


def _replaced(config, key, value):
  """A copy with another value of a key."""
  name, _, rest = key.partition('.')
  inner = _replaced(getattr(config, name), rest, value) if rest else value
  return dataclasses.replace(config, **{name: inner})


def _with_benchmark(config):
  """With what eval.benchmark=auto stands for."""
  if config.eval.benchmark != 'auto':
    return config
  found = 'scenes' if set(inputs_of(config)) == {'scenes'} else 'own'
  return _replaced(config, 'eval.benchmark', found)


def inputs_of(config) -> list[str]:
  """What the tasks of a run are learned from, as its keys name it."""
  read_from = {'generation': config.data.prompts, 'understanding': config.data.images}
  return [read_from[task] for task in config.method.tasks]


# Values of single keys.

_CHOICES = {
  'method.objective': OBJECTIVES,
  'method.task': config_lib.TASKS,
  'method.strategy': config_lib.STRATEGIES,
  'method.scorer': config_lib.SCORERS,
  'method.kl_estimator': config_lib.KL_ESTIMATORS,
  'method.picture_likelihood': config_lib.PICTURE_LIKELIHOODS,
  'method.prompt_drop_way': config_lib.PROMPT_DROP_WAYS,
  'method.trainable': config_lib.TRAINABLE,
  'method.crop': config_lib.CROPS,
  'system.compute_dtype': config_lib.DTYPES,
  'system.cache_dtype': config_lib.CACHE_DTYPES,
  'data.bad_images': config_lib.BAD_IMAGES,
  'system.track': config_lib.TRACKERS,
  'eval.benchmark': config_lib.BENCHMARKS,
}
_AT_LEAST = {  # least value -> keys
  2: ('method.group_size',),
  1: (
    'method.steps',
    'method.inputs_per_step',
    'method.accumulate',
    'method.max_text_tokens',
    'method.inner_updates',
    'method.guidance',
    'method.lora.rank',
    'method.elbo_draws',
    'method.separate.swap_every',
    'system.log_every',
    'system.save_every',
    'system.keep_last',
    'system.decode_segment',
    'data.max_prompt_tokens',
    'eval.prompts_per_task',
    'eval.images_per_prompt',
    'eval.pictures',
    'eval.quick_prompts_per_task',
    'eval.quick_pictures',
    'eval.chunk',
  ),
  0: (
    'method.warmup_steps',
    'method.gamma',
    'method.min_margin',
    'method.weight_decay',
    'method.seed',
    'method.adam_b1',
    'method.adam_b2',
    'method.ema_decay',
    'method.kl',
    'method.cfg_interval',
    'method.judge_accuracy',
    'method.grpo.ratio_low',
    'method.grpo.ratio_high',
    'method.gspo.ratio_low',
    'method.gspo.ratio_high',
    'system.rollout_chunk',
    'system.update_chunk',
    'system.logprob_chunk',
    'system.frozen_every',
    'system.probe_every',
    'system.samples_every',
    'system.eval_every',
    'system.keep_every',
    'system.external_retries',
    'data.seed',
    'eval.seed',
    'eval.watched',
    'eval.held_out',
  ),
}
_ABOVE_ZERO = (
  'system.external_seconds',
  'method.beta',
  'method.temperature',
  'method.learning_rate',
  'method.lora.learning_rate',
  'method.clip',
  'method.dpo.beta',
  'method.cispo.ratio_max',
)
_BELOW = {  # bound, itself excluded -> keys
  1: ('method.adam_b1', 'method.adam_b2', 'method.ema_decay', 'eval.held_out'),
  2**32: ('method.seed', 'data.seed'),
}
_NOT_EMPTY = {
  'method.question': 'a sentence',
  'model': 'a name or a path',
  'data.prompts': 'a name or a path',
  'data.images': 'a name or a path',
  'data.data_dir': 'a folder',
}
_TEXTS = ('method.question', 'method.instruction', 'method.yes_question')  # the model reads them
_WHY = {
  'method.group_size': ' (a pair is chosen from every group)',
  'method.guidance': ' (1 is off)',
}


def _check_values(config):
  for key, table in _CHOICES.items():
    value = _get(config, key)
    if value in saved_config.RENAMED_VALUES.get(key, ()):
      raise InputError(f'{key}={value} is now {key}={saved_config.RENAMED_VALUES[key][value]}')
    if value not in table:
      raise InputError(f'found config.{key}={value!r}; expected one of {", ".join(table)}')
  for low, keys in _AT_LEAST.items():
    for key in keys:
      if _get(config, key) < low:
        raise InputError(
          f'found config.{key}={_get(config, key)}; expected at least {low}{_WHY.get(key, "")}'
        )
  for key in _ABOVE_ZERO:
    if _get(config, key) <= 0:
      raise InputError(f'found config.{key}={_get(config, key)}; expected more than 0')
  for bound, keys in _BELOW.items():
    for key in keys:
      if _get(config, key) >= bound:
        raise InputError(f'found config.{key}={_get(config, key)}; expected less than {bound}')
  if config.method.judge_accuracy > 1:
    raise InputError(
      f'found config.method.judge_accuracy={config.method.judge_accuracy}; expected at most 1'
    )
  for key, what in _NOT_EMPTY.items():
    if not _get(config, key).strip():
      raise InputError(f'found an empty config.{key}; expected {what}')
  for key in _TEXTS:
    inputs.check_text(**{f'config.{key}': _get(config, key)})
  templates = {name: family for family in families.FAMILIES for name in family.templates}
  if config.method.template not in ('', *templates):
    known = ', '.join(f'{name} ({family.name})' for name, family in templates.items())
    raise InputError(
      f'found config.method.template={config.method.template!r}; expected one of {known}, or '
      "'' for the model's own"
    )
  axes = dataclasses.asdict(config.system.mesh)
  sizes = list(axes.values())
  if any(n < 1 and n != -1 for n in sizes) or sizes.count(-1) > 1:
    raise InputError(
      f'found config.system.mesh={axes}; expected positive numbers and at most one -1'
    )


def _get(config, key):
  return operator.attrgetter(key)(config)


# Values that do not go together.


def _check_method(method):
  if method.warmup_steps > method.steps:
    raise InputError(
      f'found config.method.warmup_steps={method.warmup_steps} of {method.steps} steps; expected '
      'at most as many'
    )
  tasks = len(method.tasks_at(0))
  parts = tasks * method.accumulate
  if method.inputs_per_step % parts:
    raise InputError(
      f'found config.method.inputs_per_step={method.inputs_per_step}; expected a multiple of '
      f'{parts} ({tasks} tasks x {method.accumulate} accumulated parts)'
    )
  if method.strategy == 'separate' and method.task != 'unified':
    raise InputError(
      f'found config.method.task={method.task} with strategy=separate, whose two models learn one '
      'task each; expected task=unified'
    )
  if method.inner_updates > 1 and not OBJECTIVES[method.objective].off_policy_ok:
    able = ', '.join(name for name, objective in OBJECTIVES.items() if objective.off_policy_ok)
    raise InputError(
      f'found config.method.inner_updates={method.inner_updates} with '
      f'objective={method.objective}, which has no ratio to the policy that sampled; expected '
      f'inner_updates=1, or one of {able}'
    )
  _check_pictures(method)
  names = [term.name for term in rewards.terms(method.reward)]
  if 'clip' in names and not method.clip_reward.model:
    raise InputError(
      f'found config.method.reward={method.reward} and no config.method.clip_reward.model; '
      'expected a directory of a CLIPModel in the Hugging Face layout'
    )
  before, *after = method.yes_question.split('{}')
  if len(after) != 1 or not before.strip() or not after[0].strip():
    raise InputError(
      f'found config.method.yes_question={method.yes_question!r}; expected a question with one '
      '{} inside, where the text goes'
    )
  _check_external(names, method)
  able = rewards.tasks(method)
  unable = [task for task in method.tasks if task not in able]
  if unable:
    raise InputError(
      f'found config.method.reward={method.reward} with the task {unable[0]}; expected method.task '
      f'to be {" or ".join(able)}'
    )


def _check_external(names, method):
  asked = dataclasses.asdict(method.external_reward)
  if 'external' in names and not any(asked.values()):
    raise InputError(
      f'found config.method.reward={method.reward} and nobody to ask; expected module:function or '
      'http://... in config.method.external_reward.generation, .understanding, or both'
    )
  if 'external' not in names and any(asked.values()):
    key = next(key for key, value in asked.items() if value)
    raise InputError(
      f'found config.method.external_reward.{key} with reward={method.reward}, which does not ask '
      'it; expected external in the reward, as in dual+0.3*external'
    )


def _check_pictures(method):
  """Keys of models that draw by unmasking, at -1 the model's own."""
  if method.prompt_drop != -1 and not 0 <= method.prompt_drop < 1:
    raise InputError(
      f'found config.method.prompt_drop={method.prompt_drop}; expected a share from 0 to below 1, '
      "or -1 for the model's own"
    )
  if method.sampling_steps != -1 and method.sampling_steps < 1:
    raise InputError(
      f'found config.method.sampling_steps={method.sampling_steps}; expected at least 1, or -1 for '
      "the model's own"
    )
  if method.sampling_noise != -1 and method.sampling_noise < 0:
    raise InputError(
      f'found config.method.sampling_noise={method.sampling_noise}; expected at least 0, or -1 for '
      "the model's own"
    )
  if method.elbo_draws > 1 and method.picture_likelihood != 'elbo':
    raise InputError(
      f'found config.method.elbo_draws={method.elbo_draws} with '
      f'picture_likelihood={method.picture_likelihood}, which needs no draws; expected 1, or '
      'picture_likelihood=elbo'
    )


def _check_chunks(system, method):
  part = method.inputs_per_task // method.accumulate
  for key in ('rollout_chunk', 'update_chunk'):
    chunk = getattr(system, key)
    if chunk and part % chunk:
      raise InputError(
        f'found config.system.{key}={chunk}; expected a divisor of {part}, the inputs of a task in '
        'a part of the step, or 0 for all at once'
      )


def _check_data(config):
  strange = set(inputs_of(config)) - {'scenes'}
  judged = 'judge' in [term.name for term in rewards.terms(config.method.reward)]
  if judged and strange:
    raise InputError(
      f'found config.method.reward={config.method.reward} with data of '
      f'{", ".join(sorted(strange))}; expected scenes, the only world that the judge can read; set '
      'data.prompts and data.images to scenes, or choose another reward'
    )
