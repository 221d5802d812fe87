"""From what a user calls a model to its parameters: a directory, the embedded one, a run's workdir, or a Hub id."""

import dataclasses
import os
import re
from typing import Any

from dsr_jax import config as config_lib
from dsr_jax import processor as processor_lib
from dsr_jax.errors import InputError
from dsr_jax.scenes import grammar

EMBEDDED = os.path.join(os.path.dirname(__file__), 'assets', 'scenes_base')
EXPECTED = ("a model directory, a run's workdir (DIR or DIR@STEP), 'scenes' for the embedded model, or a Hub id "
            '(OWNER/NAME)')
EXPECTED_SOURCE = "a model directory, 'scenes' for the embedded model, or a Hub id (OWNER/NAME)"
_HUB_ID = re.compile(r'[\w-][\w.-]*/[\w-][\w.-]*')
_FILES = ('*.json', '*.jinja', '*.safetensors')


@dataclasses.dataclass(frozen=True)
class Source:
  """A model ready for use, and how it wants to be used.

  bundle: config, params, processor and source of `convert.load`.
  method: what the run was configured with; for other models the method's defaults (instruction, question, crop ...).
  guidance: classifier-free guidance weight that the model's own generation_config.json names.
  """
  name: str
  bundle: Any
  method: config_lib.Method
  guidance: float


def resolve(name: str) -> Source:
  """Finds and loads a model. Errors: InputError if there is no such model, or its files are not sound."""
  path, step = _split_step(name)
  if is_run(path):
    return _from_run(name, path, step)
  if step is not None and os.path.isdir(path):
    raise InputError(f"found a step in --model={name}, but {path} has no checkpoints; expected a run's workdir before "
                     'the @; remove the step or name the workdir')
  return _from_directory(name, directory_of(name))


def directory_of(name: str) -> str:
  """The directory, in the Hugging Face layout, of a model that is no run; a Hub id is downloaded first."""
  if name == 'scenes':
    if not os.path.isdir(EMBEDDED):
      raise InputError(f'found no embedded model in {EMBEDDED}; expected the one that the package ships; install '
                       'dsr_jax again, or name a model directory')
    return EMBEDDED
  if is_run(name):
    raise InputError(f'found the workdir of a run, {name}; expected {EXPECTED_SOURCE}; convert the run to a model '
                     'directory first')
  if os.path.isdir(name):
    return name
  if _HUB_ID.fullmatch(name):
    return _download(name)
  raise InputError(f'found no model {name!r}; expected {EXPECTED}; check the name')


def is_run(path: str) -> bool:
  """Whether `path` is the workdir of a run."""
  return os.path.isdir(os.path.join(path, 'checkpoints'))


def _split_step(name):
  """'runs/a@20' -> ('runs/a', 20); a directory whose very name has an @ stays whole."""
  path, at, step = name.rpartition('@')
  if at and step.isdecimal() and not os.path.isdir(name):
    return path, int(step)
  return name, None


def _from_directory(name, directory):
  from dsr_jax import convert
  bundle = convert.load(directory)
  method = config_lib.Method()
  if os.path.realpath(directory) == os.path.realpath(EMBEDDED):
    # The small model knows no other words for this than those it was trained with.
    method = dataclasses.replace(method, question=grammar.QUESTIONS_DESCRIBE, instruction=grammar.QUESTIONS_DESCRIBE,
                                 max_text_tokens=48)
  settings = processor_lib.read_json(os.path.join(directory, 'generation_config.json'), default={})
  guidance = settings.get('guidance_scale')
  # Janus-Pro's own samples were drawn at 5; a model that says nothing is drawn with that.
  return Source(name, bundle, method, float(guidance) if isinstance(guidance, (int, float)) else 5.0)


def _from_run(name, workdir, step):
  from dsr_jax import checkpoints
  trained, about, _ = checkpoints.load_trained(workdir, step)
  method = config_lib.Method(**about['method'])
  base = resolve(about['model']['name'])
  if base.bundle.source['hash'] != about['model']['fingerprint']:
    raise InputError(f'found other weights in {about["model"]["name"]} than those that the run {workdir} began with; '
                     'expected the same; restore that model')
  params = _merge(base.bundle.params, trained, '')
  bundle = dataclasses.replace(base.bundle, params=params)
  return dataclasses.replace(base, name=name, bundle=bundle, method=method, guidance=method.guidance)


def _merge(base, trained, path):
  """`base` with the leaves of `trained` in their places; both nested dicts. A leaf without a place is an InputError."""
  merged = dict(base)
  for key, value in trained.items():
    where = f'{path}/{key}'
    if key not in base or isinstance(value, dict) != isinstance(base[key], dict):
      raise InputError(f'found the trained parameter {where}, which the source model does not have; expected the '
                       'model that the run began with; restore that model')
    if isinstance(value, dict):
      merged[key] = _merge(base[key], value, where)
    elif value.shape != base[key].shape:
      raise InputError(f'found {where} of shape {value.shape}; expected {base[key].shape} as in the source model; '
                       'restore the model that the run began with')
    else:
      merged[key] = value
  return merged


def _download(hub_id):
  import huggingface_hub
  try:
    return huggingface_hub.snapshot_download(hub_id, allow_patterns=_FILES)
  except Exception as e:  # its own errors, those of two HTTP libraries, and OSError: all mean that there is no model
    reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:160]
    raise InputError(f'found no directory {hub_id} and could not fetch it from the Hub ({reason}); expected '
                     f'{EXPECTED}; check the name, or connect to the network once so that the model is kept') from e
