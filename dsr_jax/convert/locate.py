"""From what a user calls a model to its parameters: a directory in either layout, the embedded one,
a run, or a Hub id.
"""

import dataclasses
import os
import re
from typing import Any

import huggingface_hub
import jax

from dsr_jax import config as config_lib
from dsr_jax import families, files, saved_config
from dsr_jax.convert import directory as directory_lib
from dsr_jax.convert.showo import parts as showo_parts
from dsr_jax.errors import InputError, first_line
from dsr_jax.models.common import lora
from dsr_jax.runtime import checkpoints
from dsr_jax.scenes import grammar

EMBEDDED = os.path.join(os.path.dirname(os.path.dirname(__file__)), 'assets', 'scenes_base')
EXPECTED = (
  "a model directory, a run's workdir (DIR or DIR@STEP, of two models DIR:generator or "
  'DIR:understander), '
  "'scenes' for the embedded model, or a Hub id (OWNER/NAME)"
)
EXPECTED_SOURCE = "a model directory, 'scenes' for the embedded model, or a Hub id (OWNER/NAME)"
ROLES = ('generator', 'understander')  # of a run of two models
_HUB_ID = re.compile(r'[\w-][\w.-]*/[\w-][\w.-]*')
_FILES = ('*.json', '*.jinja', '*.safetensors', 'LICENSE*', 'README.md')


@dataclasses.dataclass(frozen=True)
class Source:
  """A model ready for use, and how it wants to be used.

  bundle: config, params (float32, on the default device), processor and source of `convert.load`.
  method: what the run was configured with; for other models the method's defaults (instruction,
  question, crop ...).
  guidance: classifier-free guidance weight that the model's own generation_config.json names.
  """

  name: str
  bundle: Any
  method: config_lib.Method
  guidance: float


@dataclasses.dataclass(frozen=True)
class Located:
  """Where a model lies.

  directory: of the model, for a run of the one it began with. Of a run also: workdir, step, trained
  (the leaves that it changed, nested dicts of NumPy arrays, or adapters under 'lora'), about (see
  `checkpoints.Checkpoints`).
  """

  name: str
  directory: str
  workdir: str = ''
  step: int = 0
  trained: dict = dataclasses.field(default_factory=dict)
  about: dict = dataclasses.field(default_factory=dict)


def locate(name: str) -> Located:
  """Finds a model, a run's included. Errors: InputError if there is none."""
  path, step, role = _split(name)
  if is_run(path):
    return _locate_run(name, path, step, role)
  for part, what in ((step, 'step'), (role, 'role')):
    if part is not None and os.path.isdir(path):
      raise InputError(
        f"found a {what} in {name}, but {path} has no checkpoints; expected a run's workdir before "
        'it; '
        f'remove the {what}, or name the workdir'
      )
  return Located(name, directory_of(name))


def resolve(name: str) -> Source:
  """Finds and loads a model. Errors: InputError if there is no such model, or its files are not
  sound.
  """
  located = locate(name)
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  bundle = directory_lib.load(located.directory, lambda leaf: leaf.placed(here))
  guidance = _guidance(located.directory, bundle.config)
  if not located.workdir:
    return Source(name, bundle, _method_of(located.directory), guidance)
  check_base(located, bundle.source['hash'])
  method = saved_config.saved_method(located.about['method'])
  if 'lora' in located.trained:
    targets = families.family_of(bundle.config).lora_targets
    params = lora.merged(bundle.params, targets, located.trained['lora'])
  else:
    params = merged(bundle.params, located.trained)
  return Source(name, dataclasses.replace(bundle, params=params), method, method.guidance)


def check_base(located: Located, fingerprint: str):
  """InputError unless the model that a run began with still has the weights it had."""
  if located.about['model']['fingerprint'] != fingerprint:
    raise InputError(
      f'found other weights in {located.about["model"]["name"]} than those that the run '
      f'{located.workdir} '
      'began with; expected the same; restore that model'
    )


def directory_of(name: str) -> str:
  """The directory, in either layout, of a model that is no run; a Hub id is downloaded first."""
  if name == 'scenes':
    if not os.path.isdir(EMBEDDED):
      raise InputError(
        f'found no embedded model in {EMBEDDED}; expected the one that the package ships; install '
        'dsr_jax again, or name a model directory'
      )
    return EMBEDDED
  if is_run(name):
    raise InputError(
      f'found the workdir of a run, {name}; expected {EXPECTED_SOURCE}; convert the run to a model '
      'directory first'
    )
  if os.path.isdir(name):
    return name
  if _HUB_ID.fullmatch(name):
    return _download(name)
  raise InputError(f'found no model {name!r}; expected {EXPECTED}; check the name')


def is_run(path: str) -> bool:
  """Whether `path` is the workdir of a run."""
  return os.path.isdir(os.path.join(path, 'checkpoints'))


def _split(name):
  """'runs/a@20:generator' -> ('runs/a', 20, 'generator'); a directory whose very name has an @ or a
  : stays whole.
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


def _guidance(directory, config):
  settings = files.read_json(os.path.join(directory, 'generation_config.json'), default={})
  guidance = settings.get('guidance_scale')
  # A model that says nothing is drawn as others of its family were.
  own = families.family_of(config).guidance(config)
  return float(guidance) if isinstance(guidance, (int, float)) else own


def _method_of(directory):
  """The method's defaults; of the embedded model with the question it knows."""
  method = config_lib.Method()
  if os.path.realpath(directory) == os.path.realpath(EMBEDDED):
    # The small model knows no other words for this than those it was trained with.
    method = dataclasses.replace(
      method,
      question=grammar.QUESTION_DESCRIBE,
      instruction=grammar.QUESTION_DESCRIBE,
      max_text_tokens=48,
    )
  return method


def _locate_run(name, workdir, step, role):
  trained, about, step = checkpoints.load_trained(workdir, step)
  two = set(trained) == set(ROLES)
  if two and role is None:
    raise InputError(
      f'found a run of two models in {workdir}; expected which of them; write {name}:generator or '
      f'{name}:understander'
    )
  if role is not None and not two:
    raise InputError(
      f'found the role {role!r} in {name}, whose run trained one model; expected none; remove it'
    )
  if role is not None and role not in ROLES:
    raise InputError(f'found the role {role!r} in {name}; expected {" or ".join(ROLES)}; change it')
  directory = directory_of(about['model']['name'])
  return Located(name, directory, workdir, step, trained[role] if two else trained, about)


def merged(base, trained, path=''):
  """`base` with the leaves of `trained` in their places; both nested dicts. A leaf without a place
  is an InputError.
  """
  whole = dict(base)
  for key, value in trained.items():
    where = f'{path}/{key}'
    if key not in base or isinstance(value, dict) != isinstance(base[key], dict):
      raise InputError(
        f'found the trained parameter {where}, which the source model does not have; expected the '
        'model that the run began with; restore that model'
      )
    if isinstance(value, dict):
      whole[key] = merged(base[key], value, where)
    elif value.shape != base[key].shape:
      raise InputError(
        f'found {where} of shape {value.shape}; expected {base[key].shape} as in the source model; '
        'restore the model that the run began with'
      )
    else:
      whole[key] = value
  return whole


def _download(hub_id):
  try:
    directory = huggingface_hub.snapshot_download(hub_id, allow_patterns=_FILES)
    if not any(
      name.endswith('.safetensors') for name in os.listdir(directory)
    ):  # only then torch's files, as large
      directory = huggingface_hub.snapshot_download(hub_id, allow_patterns=(*_FILES, '*.bin'))
    return showo_parts.fetched(hub_id, directory)
  except InputError:
    raise
  # its own errors, those of two HTTP libraries, and OSError: all mean that there is no model
  except Exception as e:
    reason = first_line(e)
    raise InputError(
      f'found no directory {hub_id} and could not fetch it from the Hub ({reason}); expected '
      f'{EXPECTED}; check the name, or connect to the network once so that the model is kept'
    ) from e
