"""Config files and flags -> a checked `config.Config`.

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
# A shipped config is found under these folders' paths from anywhere, as an installed package has no
# clone around it.
SHIPPED_FOLDERS = (pathlib.Path('.'), pathlib.Path('configs'), pathlib.Path('dsr_jax/configs'))
NO_CONFIGS = ('__init__', 'slices')

# Files and flags.


def shipped():
  """Names of the config files in the package, as --config takes them."""
  names = {path.stem for path in CONFIGS.glob('*.py')}
  return sorted(names - set(NO_CONFIGS))


def find(name):
  """'scenes:v5e:8x8' -> the path of the config file, and the argument ('' without a colon).

  A file on disk takes precedence over a shipped one of the same path, so a clone reads its own
  configs/.
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
    f'there is no config file {text}; name a Python file with get_config(), or one of '
    f'{", ".join(shipped())}'
  )


def read(name):
  """Runs a config file and returns its locked ConfigDict; every command reads configs here."""
  path, argument = find(name)
  spec = importlib.util.spec_from_file_location('_dsr_jax_config', path)
  module = importlib.util.module_from_spec(spec)
  with _running(path):
    spec.loader.exec_module(module)
  get_config = getattr(module, 'get_config', None)
  if get_config is None:
    raise InputError(f'{path} has no get_config(); add one that returns a ConfigDict')
  if not callable(get_config):
    raise InputError(f'{path} has get_config={get_config!r}; make it a function')
  if argument and not inspect.signature(get_config).parameters:
    raise InputError(f'{path} takes no argument, but {argument!r} follows it; leave that out')
  with _running(path):
    config = get_config(argument) if argument else get_config()
  if not isinstance(config, ml_collections.ConfigDict):
    raise InputError(
      f'get_config() of {path} returns a {type(config).__name__}; return a ConfigDict'
    )
  return config.lock()


@contextlib.contextmanager
def _running(path):
  """Turns any error in a config file into an InputError with the line of that file."""
  try:
    yield
  except InputError:
    raise
  except (Exception, SystemExit) as e:  # a config file may fail in any way
    lines = [
      frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == str(path)
    ]
    if isinstance(e, SyntaxError):
      lines = [e.lineno]
    where = f' in line {lines[-1]}' if lines and lines[-1] else ''
    raise InputError(
      f'{path} fails{where} ({type(e).__name__}: {first_line(e)}); fix it: it should be a Python '
      'file with get_config()'
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
        f'{shown} is a number of {len(str(value))} digits; set it to a finite number'
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
    """The arguments with --config moved before its keys; see `check_flags`."""
    path = check_flags(arguments, self._default)
    rest, words = [], iter(arguments)
    for word in words:
      if word in ('--config', '-config'):
        next(words, None)
      elif not word.startswith(('--config=', '-config=')):
        rest.append(word)
    return [f'--config={path}', *rest]

  def help(self):
    """The help text of its keys."""
    return config_help.text(self._prefix) if self._default is None else ''


def define_config_flag(name, help, f=flags.FLAGS, default=None, prefix=''):
  """Defines --NAME=FILE with its overrides --NAME.key=value; returns the flag's holder.

  default: the config to use without the flag; `cli.parse` inserts it.
  prefix: the group that contains a run's keys, for --help.
  """
  holder = config_flags.DEFINE_config_file(name, help_string=help, flag_values=f)
  # ml_collections' own parser opens only paths, relative to the working directory.
  f[name].parser = _FileParser(default, prefix)
  return holder


def check_flags(argv, default=None) -> str:
  """The value of --config. InputError for errors that absl reports with a traceback: no --config,
  no such file, an override of an unknown key.

  argv: the command's arguments without its name. default: the default of --config.
  """
  pairs = _pairs(argv)
  given = [value for name, _, value in pairs if name == 'config']
  path = next((p for p in reversed(given) if p), default)
  if path is None:
    raise InputError('--config is missing; name a config file, such as --config=configs/scenes.py')
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
        raise InputError(f'--{name} has no value; write --{name}=...')
      continue
    if any(other.startswith(f'{key}.') for other in known):
      raise InputError(f'--{name} is a group of keys; set one of them with --{name}.KEY=VALUE')
    saved_config.refuse_renamed(key)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f'did you mean config.{near[0]}?' if near else 'see --help for all keys'
    raise InputError(f'{path} has no key {name}; {hint}')
  return path


def _pairs(argv) -> list[tuple[str, str, str]]:
  """(flag, '=', value) of each flag; (flag, '', the next argument) if there is no '='."""
  pairs = []
  for word, following in zip(argv, [*argv[1:], '']):
    if word.startswith('-'):
      name, equals, value = word.lstrip('-').partition('=')
      pairs.append((name, equals, value if equals or following.startswith('-') else following))
  return pairs


def refuse_rate_of_others(key, values):
  """InputError if the user set `key` and it is the learning rate of weights that are not trained.

  values: of all keys, {'method.trainable': 'lora'}; they may be in a group, as in `run.method...`.
  """
  group = key.removesuffix('method.learning_rate')
  if group != key and values.get(f'{group}method.trainable') == 'lora':
    raise InputError(
      f'{key}={values[key]} has no effect with {group}method.trainable=lora, which trains only the '
      f'adapters; set their rate instead, {group}method.lora.learning_rate (it is '
      f'{values.get(f"{group}method.lora.learning_rate")})'
    )


# Between ConfigDict, dataclasses and JSON.


def from_config_dict(config):
  """ConfigDict or nested dict -> `Config`; InputError for unknown, missing or invalid values."""
  if isinstance(config, ml_collections.ConfigDict):
    config = config.to_dict()
  result = saved_config.build(config_lib.Config, config, 'config')
  result = _with_paths_expanded(result)
  _check_values(result)
  _check_method(result.method)
  _check_chunks(result.system, result.method)
  _check_data(result)
  return _with_benchmark(result)


# Paths in which `~` and `$VAR` are expanded.

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
  """Replaces eval.benchmark=auto by what it stands for."""
  if config.eval.benchmark != 'auto':
    return config
  found = 'scenes' if set(inputs_of(config)) == {'scenes'} else 'own'
  return _replaced(config, 'eval.benchmark', found)


def inputs_of(config) -> list[str]:
  """The data of a run's tasks, as its keys name them."""
  read_from = {'generation': config.data.prompts, 'understanding': config.data.images}
  return [read_from[task] for task in config.method.tasks]


# Values of single keys.

_CHOICES = {
  'method.objective': OBJECTIVES,
  'method.task': config_lib.TASKS,
  'method.strategy': config_lib.STRATEGIES,
  'method.scorer': config_lib.SCORERS,
  'method.kl_estimator': config_lib.KL_ESTIMATORS,
  'method.credit': config_lib.CREDITS,
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
_AT_LEAST = {  # minimum -> keys
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
    'system.cpu_devices',
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
CPU_DEVICES_BELOW = 1025
_BELOW = {  # exclusive upper bound -> keys
  1: ('method.adam_b1', 'method.adam_b2', 'method.ema_decay', 'eval.held_out'),
  CPU_DEVICES_BELOW: ('system.cpu_devices',),
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
      raise InputError(f'config.{key} is {value!r}; set it to one of {", ".join(table)}')
  for low, keys in _AT_LEAST.items():
    for key in keys:
      if _get(config, key) < low:
        raise InputError(
          f'config.{key} is {_get(config, key)}; set it to at least {low}{_WHY.get(key, "")}'
        )
  for key in _ABOVE_ZERO:
    if _get(config, key) <= 0:
      raise InputError(f'config.{key} is {_get(config, key)}; set it to a number above 0')
  for bound, keys in _BELOW.items():
    for key in keys:
      if _get(config, key) >= bound:
        raise InputError(f'config.{key} is {_get(config, key)}; set it to a number below {bound}')
  if config.method.judge_accuracy > 1:
    raise InputError(
      f'config.method.judge_accuracy is {config.method.judge_accuracy}; set it to at most 1'
    )
  for key, what in _NOT_EMPTY.items():
    if not _get(config, key).strip():
      raise InputError(f'config.{key} is empty; set it to {what}')
  for key in _TEXTS:
    inputs.check_text(**{f'config.{key}': _get(config, key)})
  templates = {name: family for family in families.FAMILIES for name in family.templates}
  if config.method.template not in ('', *templates):
    known = ', '.join(f'{name} ({family.name})' for name, family in templates.items())
    raise InputError(
      f'config.method.template is {config.method.template!r}; set it to one of {known}, or to '
      "'' for the model's own"
    )
  axes = dataclasses.asdict(config.system.mesh)
  sizes = list(axes.values())
  if any(n < 1 and n != -1 for n in sizes) or sizes.count(-1) > 1:
    raise InputError(f'config.system.mesh is {axes}; use positive numbers and at most one -1')


def _get(config, key):
  return operator.attrgetter(key)(config)


# Combinations of values.


def _check_method(method):
  if method.warmup_steps > method.steps:
    raise InputError(
      f'config.method.warmup_steps is {method.warmup_steps}; set it to at most the '
      f'{method.steps} steps of the run'
    )
  tasks = len(method.tasks_at(0))
  parts = tasks * method.accumulate
  if method.inputs_per_step % parts:
    raise InputError(
      f'config.method.inputs_per_step is {method.inputs_per_step}; set it to a multiple of '
      f'{parts} ({tasks} tasks x {method.accumulate} accumulated parts)'
    )
  if method.strategy == 'separate' and method.task != 'unified':
    raise InputError(
      f'config.method.task={method.task} does not fit strategy=separate, whose two models learn '
      'one task each; set task=unified'
    )
  if method.inner_updates > 1 and not OBJECTIVES[method.objective].off_policy_ok:
    able = ', '.join(name for name, objective in OBJECTIVES.items() if objective.off_policy_ok)
    raise InputError(
      f'config.method.inner_updates={method.inner_updates} does not fit '
      f'objective={method.objective}, which has no ratio to the policy that sampled; set '
      f'inner_updates=1, or use one of {able}'
    )
  _check_credit(method)
  _check_pictures(method)
  names = [term.name for term in rewards.terms(method.reward)]
  if 'clip' in names and not method.clip_reward.model:
    raise InputError(
      f'config.method.reward={method.reward} needs config.method.clip_reward.model; '
      'set it to the directory of a CLIPModel in the Hugging Face layout'
    )
  before, *after = method.yes_question.split('{}')
  if len(after) != 1 or not before.strip() or not after[0].strip():
    raise InputError(
      f'config.method.yes_question is {method.yes_question!r}; write a question with one {{}} '
      'inside, where the text goes'
    )
  _check_external(names, method)
  able = rewards.tasks(method)
  unable = [task for task in method.tasks if task not in able]
  if unable:
    raise InputError(
      f'config.method.reward={method.reward} does not fit the task {unable[0]}; set method.task to '
      f'{" or ".join(able)}'
    )


def _check_external(names, method):
  asked = dataclasses.asdict(method.external_reward)
  if 'external' in names and not any(asked.values()):
    raise InputError(
      f'config.method.reward={method.reward} has no source; set module:function or http://... in '
      'config.method.external_reward.generation, .understanding, or both'
    )
  if 'external' not in names and any(asked.values()):
    key = next(key for key, value in asked.items() if value)
    raise InputError(
      f'config.method.external_reward.{key} has no effect with reward={method.reward}; leave it '
      'out, or put external into the reward, as in dual+0.3*external'
    )


def _check_credit(method):
  if method.credit == 'equal':
    return
  if not OBJECTIVES[method.objective].takes_credit:
    able = ', '.join(name for name, objective in OBJECTIVES.items() if objective.takes_credit)
    raise InputError(
      f'config.method.credit={method.credit} does not fit objective={method.objective}, which has '
      f'one ratio per sequence; set credit=equal, or use one of {able}'
    )
  if 'generation' not in method.tasks:
    raise InputError(
      f'config.method.credit={method.credit} has no effect with task={method.task}, which draws '
      'nothing; set credit=equal'
    )


def _check_pictures(method):
  """Checks the keys of models that draw by unmasking; -1 is the model's own value."""
  if method.prompt_drop != -1 and not 0 <= method.prompt_drop < 1:
    raise InputError(
      f'config.method.prompt_drop is {method.prompt_drop}; set it to a share from 0 to below 1, '
      "or to -1 for the model's own"
    )
  if method.sampling_steps != -1 and method.sampling_steps < 1:
    raise InputError(
      f'config.method.sampling_steps is {method.sampling_steps}; set it to at least 1, or to -1 '
      "for the model's own"
    )
  if method.sampling_noise != -1 and method.sampling_noise < 0:
    raise InputError(
      f'config.method.sampling_noise is {method.sampling_noise}; set it to at least 0, or to -1 '
      "for the model's own"
    )
  if method.elbo_draws > 1 and method.picture_likelihood != 'elbo':
    raise InputError(
      f'config.method.elbo_draws={method.elbo_draws} does not fit '
      f'picture_likelihood={method.picture_likelihood}, which needs no draws; set it to 1, or set '
      'picture_likelihood=elbo'
    )


def _check_chunks(system, method):
  part = method.inputs_per_task // method.accumulate
  for key in ('rollout_chunk', 'update_chunk'):
    chunk = getattr(system, key)
    if chunk and part % chunk:
      raise InputError(
        f'config.system.{key} is {chunk}; set it to a divisor of {part}, the inputs of a task in a '
        'part of the step, or to 0 for all at once'
      )


def _check_data(config):
  strange = set(inputs_of(config)) - {'scenes'}
  judged = any(term.name in rewards.JUDGES for term in rewards.terms(config.method.reward))
  if judged and strange:
    raise InputError(
      f'config.method.reward={config.method.reward} cannot judge the data '
      f'{", ".join(sorted(strange))}, as the judge reads only scenes; set data.prompts and '
      'data.images to scenes, or choose another reward'
    )
