"""Resolves the name of a model to its parameters: a directory in either layout, the embedded model,
a run, or a Hub id.
"""

import dataclasses
import glob
import os
import re
from typing import Any

from absl import flags
import huggingface_hub
import jax

from dsr_jax import cli, families, files, flag_types, inputs, saved_config
from dsr_jax import config as config_lib
from dsr_jax.convert import configs, weights
from dsr_jax.convert import directory as directory_lib
from dsr_jax.convert.showo import parts as showo_parts
from dsr_jax.errors import InputError, first_line
from dsr_jax.models.common import lora
from dsr_jax.runtime import checkpoints, room
from dsr_jax.scenes import grammar

flags.disclaim_key_flags()  # --help lists the flags of `define_flags` under the command

EMBEDDED = os.path.join(os.path.dirname(os.path.dirname(__file__)), 'assets', 'scenes_base')
EMBEDDED_TEMPERATURE = 0.5  # it draws best at this temperature, on validation
EXPECTED = (
  "a model directory, a run's workdir (DIR or DIR@STEP; for a run of two models DIR:generator or "
  'DIR:understander), '
  "'scenes' for the embedded model, or a Hub id (OWNER/NAME)"
)
EXPECTED_SOURCE = "a model directory, 'scenes' for the embedded model, or a Hub id (OWNER/NAME)"
ROLES = ('generator', 'understander')  # of a run with two models
MOST_GUIDANCE = 1000
_CACHED = re.compile(r'models--(.+?)--(.+)')  # the Hub cache's folder for OWNER/NAME
_FILES = ('*.json', '*.jinja', '*.safetensors', 'LICENSE*', 'README.md')


@dataclasses.dataclass(frozen=True)
class Source:
  """A loaded model and its settings.

  bundle: config, params (float32, on the default device), processor and source of `convert.load`.
  method: the single source of settings for sampling and reading. For a run: its configuration. For
    another model: the guidance in its generation_config.json, the crop or pad of its family's own
    processor, and the method's defaults (instruction ...).
  """

  name: str
  bundle: Any
  method: config_lib.Method


@dataclasses.dataclass(frozen=True)
class Located:
  """The location of a model.

  directory: the model's directory; for a run, that of the model it started from. For a run also:
  workdir, step, trained (the leaves that it changed, nested dicts of NumPy arrays, or adapters
  under 'lora'), about (see `checkpoints.Checkpoints`).
  """

  name: str
  directory: str
  workdir: str = ''
  step: int = 0
  trained: dict = dataclasses.field(default_factory=dict)
  about: dict = dataclasses.field(default_factory=dict)


def define_flags(f=flags.FLAGS):
  """The flags of all commands that use a model."""
  flags.DEFINE_string(
    'template',
    '',
    'The words that frame prompts and questions. Janus: tokens (<|User|>) or plain (User). By '
    "default, the template that the model was trained with, else its family's first.",
    flag_values=f,
  )
  define_base_flag(f)


def define_crop_flag(f=flags.FLAGS):
  """--crop, for the commands that read an image."""
  flags.DEFINE_enum(
    'crop',
    '',
    ['', *config_lib.CROPS],
    'How to make the image square: crop to the center, or pad with gray bars. By default, as in '
    'the run; for a model that is not a run, as its family does: Janus-Pro pads.',
    flag_values=f,
  )


def define_base_flag(f=flags.FLAGS):
  """Only --base."""
  flag_types.define_path(
    'base',
    '',
    'For a run: the model that it started from, if that model has moved.',
    f,
  )


def locate(name: str, base: str = '') -> Located:
  """Finds a model or a run. InputError if there is none.

  base: for a run, the current location of the model that it started from, if that has moved.
  """
  path, step, role = split(name)
  if is_run(path):
    return _locate_run(name, path, step, role, base)
  if base:
    raise InputError(
      f'--base={base} is only for the workdir of a run, and {name} is not one; leave --base out'
    )
  for part, what in ((step, 'step'), (role, 'role')):
    if part is not None and os.path.isdir(path):
      raise InputError(
        f'{name} has a {what}, but {path} is not the workdir of a run: it has no checkpoints; '
        f'remove the {what}, or name the workdir'
      )
  return Located(name, directory_of(name))


def resolve(name: str, *, template: str = '', base: str = '', config=None) -> Source:
  """Finds and loads a model.

  Args:
    name: see `EXPECTED`.
    template: a value of `method.template`, which frames its prompts; by default the run's, else the
      model's own.
    base: see `locate`.
    config: the `config.Config` of a command that uses the model with its settings. Its template
      then overrides the model's; prints a note if it was written for another model.

  Raises:
    InputError: if there is no such model, its files are damaged, or its family has no such
      template.
  """
  located = locate(name, base)
  method = method_of(located)
  if config:
    note_other_settings(config, located)
  bundle = directory_lib.load(located.directory, lambda leaf: leaf)
  of_config = config.method.template if config else ''
  bundle = families.with_template(bundle, template or of_config or method.template)
  if located.workdir:
    check_base(located, bundle.source['hash'])
  room.check_weights(sum(leaf.nbytes for leaf in jax.tree.leaves(bundle.params)), name)
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  params = jax.tree.map(lambda leaf: leaf.placed(here), bundle.params)
  bundle = dataclasses.replace(bundle, params=params)
  if located.workdir:
    bundle = dataclasses.replace(bundle, params=_trained_params(bundle, located.trained))
  method = dataclasses.replace(method, template=families.template_of(bundle))
  return Source(name, bundle, method)


# Config keys for sampling and asking, which fit only the model that the file was written for.
_OF_A_MODEL = (
  'temperature',
  'guidance',
  'cfg_interval',
  'question',
  'instruction',
  'max_text_tokens',
)


def note_other_settings(config, located: Located):
  """Prints the settings that a configuration written for another model applies to this one."""
  began_with = located.about['model']['name'] if located.workdir else located.name
  if _same(config.model, str(began_with)):
    return
  own = method_of(located)
  used = [
    f'{key} {getattr(config.method, key)!r} (its own: {getattr(own, key)!r})'
    for key in _OF_A_MODEL
    if getattr(config.method, key) != getattr(own, key)
  ]
  if used:
    cli.log(
      f'note         the settings of {config.model} are used for {located.name}: {", ".join(used)}'
    )


def _same(one: str, other: str) -> bool:
  """Whether two names refer to the same model; does not contact the Hub."""
  places = [os.path.realpath(EMBEDDED if name == 'scenes' else name) for name in (one, other)]
  return one == other or (places[0] == places[1] and os.path.isdir(places[0]))


def _trained_params(bundle, trained):
  """The parameters of a run: those of the model that it started from, plus the trained ones."""
  if 'lora' in trained:
    targets = families.family_of(bundle.config).lora_targets
    return lora.merged(bundle.params, targets, trained['lora'])
  return merged(bundle.params, trained)


def check_base(located: Located, fingerprint: str):
  """InputError if the model that a run started from now has other weights."""
  if located.about['model']['fingerprint'] != fingerprint:
    raise InputError(
      f'{located.about["model"]["name"]} does not have the weights that the run {located.workdir} '
      'began with; restore that model'
    )


def directory_of(name: str) -> str:
  """The directory, in either layout, of a model that is not a run. Downloads a Hub id first."""
  if name == 'scenes':
    if not os.path.isdir(EMBEDDED):
      raise InputError(
        f'the embedded model, which the package ships, is missing from {EMBEDDED}; install dsr_jax '
        'again, or name a model directory'
      )
    return EMBEDDED
  if is_run(name):
    raise InputError(
      f'{name} is the workdir of a run; convert the run to a model directory first, or name '
      f'{EXPECTED_SOURCE}'
    )
  _refuse_near_miss(name)
  if os.path.isdir(name):
    return name
  if inputs.is_hub_id(name):
    return _download(name)
  raise InputError(f'there is no model {name!r}; check the name: it can be {EXPECTED}')


def base_of(model: dict, workdir: str, base: str = '') -> str:
  """The directory of the model that a run started from.

  Args:
    model: the run's record of it: its name, and (except in old runs) its directory at that time.
    workdir: the workdir of the run.
    base: its current location, if the user gives one.
  """
  name, then = str(model.get('name')), str(model.get('directory', ''))
  if base:
    return directory_of(base)
  if name != 'scenes' and os.path.isdir(then):
    return then
  try:
    return directory_of(name)
  except InputError as e:
    raise InputError(
      f'the model {name} that the run {workdir} began with is no longer there ({e}); name its '
      'current location as --base=DIR'
    ) from e


def _refuse_near_miss(name: str):
  """InputError for a folder near the one that the user probably meant."""
  path = os.path.abspath(name)
  above = os.path.dirname(path)
  if os.path.basename(above) == 'checkpoints' and os.path.basename(path).isdecimal():
    run = os.path.dirname(above)
    raise InputError(
      f'{name} is a checkpoint; name its run and its step instead: write '
      f'{run}@{os.path.basename(path)}'
    )
  if os.path.basename(path) == 'checkpoints' and os.path.isdir(path):
    raise InputError(f'{name} has the checkpoints of a run; name the run instead: write {above}')
  cached = _CACHED.fullmatch(os.path.basename(path))
  snapshots = sorted(glob.glob(os.path.join(glob.escape(name), 'snapshots', '*')))
  if cached and not os.path.exists(os.path.join(path, 'config.json')) and os.path.isdir(path):
    hub_id = '/'.join(cached.groups())
    raise InputError(
      f'{name} is a folder of the Hub cache; name a model in it instead: write '
      f'{" or ".join([*snapshots, hub_id])}'
    )


def run_of(name: str) -> str:
  """The workdir, if the name refers to a run, its checkpoint or one of its two models; else ''."""
  path = split(name)[0]
  return path if is_run(path) else ''


def base_for(name: str, base: str, several: bool) -> str:
  """The `base` for one model of a command; with several models, it applies only to runs."""
  return base if run_of(name) or not several else ''


def is_run(path: str) -> bool:
  """Whether `path` is the workdir of a run."""
  return os.path.isdir(os.path.join(path, 'checkpoints'))


def split(name: str) -> tuple[str, int | None, str | None]:
  """'runs/a@20:generator' -> ('runs/a', 20, 'generator'). Does not split the name of an existing
  directory that contains @ or :.
  """
  if os.path.isdir(name):
    return name, None, None
  path, role = name, None
  before, colon, after = name.rpartition(':')
  if colon and (after in ROLES or is_run(before.rpartition('@')[0]) or is_run(before)):
    path, role = before, after
  before, at, step = path.rpartition('@')
  if at and step.isdecimal() and not os.path.isdir(path):
    return before, int(step), role
  return path, None, role


def _guidance(directory, own):
  path = os.path.join(directory, 'generation_config.json')
  guidance = files.read_json(path, default={}).get('guidance_scale')
  # A model without settings is sampled with those of its family's published samples.
  if guidance is None:
    return own
  if type(guidance) not in (int, float) or not 0 <= guidance <= MOST_GUIDANCE:
    raise InputError(
      f'guidance_scale in {path} is {configs.shown(guidance)}; change it to a number from 0 to '
      f'{MOST_GUIDANCE} (1 is without guidance)'
    )
  return float(guidance)


def method_of(located: Located) -> config_lib.Method:
  """The `Source.method` of a located model, before its weights are read."""
  if located.workdir:
    return saved_config.saved_method(located.about['method'])
  return _method_of(located.directory)


def _method_of(directory):
  """The settings of a model that is not a run. The embedded model has the question that it knows
  and the temperature at which it draws best.
  """
  content = files.read_json(os.path.join(directory, 'config.json'), default={})
  own = directory_lib.reader_of(content).settings(content)
  method = config_lib.Method(**own | dict(guidance=_guidance(directory, own['guidance'])))
  if os.path.realpath(directory) == os.path.realpath(EMBEDDED):
    # The embedded model understands only the words that it was trained with.
    method = dataclasses.replace(
      method,
      question=grammar.QUESTION_DESCRIBE,
      instruction=grammar.QUESTION_DESCRIBE,
      max_text_tokens=48,
      temperature=EMBEDDED_TEMPERATURE,
    )
  return method


def _locate_run(name, workdir, step, role, base):
  trained, about, step = checkpoints.load_trained(workdir, step)
  two = set(trained) == set(ROLES)
  if two and role is None:
    raise InputError(
      f'{workdir} is a run of two models; say which one: write {name}:generator or '
      f'{name}:understander'
    )
  if role is not None and not two:
    raise InputError(
      f'{name} has the role {role!r}, but its run trained one model; remove the role'
    )
  if role is not None and role not in ROLES:
    raise InputError(f'the role {role!r} in {name} is unknown; use {" or ".join(ROLES)}')
  directory = base_of(about['model'], workdir, base)
  return Located(name, directory, workdir, step, trained[role] if two else trained, about)


def merged(base, trained, path=''):
  """Replaces leaves of `base` by those of `trained`; both are nested dicts. InputError for a leaf
  that `base` does not have.
  """
  whole = dict(base)
  for key, value in trained.items():
    where = f'{path}/{key}'
    if key not in base or isinstance(value, dict) != isinstance(base[key], dict):
      raise InputError(
        f'the source model does not have the trained parameter {where}; restore the model that the '
        'run began with'
      )
    if isinstance(value, dict):
      whole[key] = merged(base[key], value, where)
    elif value.shape != base[key].shape:
      raise InputError(
        f'{where} has shape {value.shape}, but {base[key].shape} in the source model; restore the '
        'model that the run began with'
      )
    else:
      whole[key] = value
  return whole


def _download(hub_id):
  try:
    directory = huggingface_hub.snapshot_download(hub_id, allow_patterns=_FILES)
    if not any(
      name.endswith('.safetensors') for name in os.listdir(directory)
    ):  # only then torch's files, which are as large
      directory = huggingface_hub.snapshot_download(hub_id, allow_patterns=(*_FILES, '*.bin'))
    return showo_parts.fetched(hub_id, directory)
  except InputError:
    raise
  # the Hub's own errors, those of two HTTP libraries, and OSError: all mean that there is no model
  except Exception as e:
    reason = first_line(e)
    kept = _kept(hub_id)
    if kept:
      # From an earlier download, or from another program: the card and license may be missing.
      cli.log(f'note         could not reach the Hub ({reason}): reading {hub_id} from {kept}')
      return kept
    raise InputError(
      f'there is no directory {hub_id}, and it could not be fetched from the Hub ({reason}); '
      f'connect to the network once so that the model is kept, or check the name: it can be '
      f'{EXPECTED}'
    ) from e


def _kept(hub_id) -> str:
  """The cached snapshot of a Hub id, if it has every file that a model needs; else ''."""
  cache = huggingface_hub.constants.HF_HUB_CACHE
  needed = ('config.json', 'tokenizer.json')
  paths = [huggingface_hub.try_to_load_from_cache(hub_id, name, cache) for name in needed]
  if not all(isinstance(path, str) for path in paths):
    return ''
  directory = os.path.dirname(paths[0])
  try:
    weights.Checkpoint(directory)
  except InputError:
    return ''
  return directory
