"""Evaluators from a directory or a Hub id: checked before loading, hashed, and described.

All modules in this folder need torch; no code that answers a benchmark imports them.
"""

import hashlib
import os
from typing import Any, NamedTuple

import huggingface_hub
import torch
import transformers

from dsr_jax import files, inputs
from dsr_jax.errors import InputError

_FILES = ('*.json', '*.txt', '*.safetensors')
_WEIGHTS = ('.safetensors',)
# Images per batch of a detector. More would hardly be faster, and large images need much memory.
PICTURES = 4


class About(NamedTuple):
  """What the results record about an evaluator.

  Attributes:
    name: as the user named it.
    architecture: its class in transformers.
    sha256: of its weight files, in the order of their names.
    versions: of torch and transformers.
    settings: of the adapter.
  """

  name: str
  architecture: str
  sha256: str
  versions: dict[str, str]
  settings: dict[str, Any]


def find(name: str, model_class: type) -> str:
  """The directory of an evaluator.

  Args:
    name: a directory, or a Hub id, which is downloaded.
    model_class: the class in transformers that it must have.

  Errors: InputError if it does not exist, or is another kind of model.
  """
  directory = name
  if not os.path.isdir(name):
    if not inputs.is_hub_id(name):
      raise InputError(
        f'the evaluator {name!r} is neither a directory nor a Hub id; give one of these (a Hub id '
        'is OWNER/NAME)'
      )
    try:
      directory = huggingface_hub.snapshot_download(name, allow_patterns=list(_FILES))
    except Exception as e:  # from several libraries: no network, no such repository, no permission
      raise InputError(
        f'cannot download the evaluator {name} ({type(e).__name__}), which needs a network and a '
        'public repository; download it elsewhere and name its directory'
      ) from e
  found = files.read_json(os.path.join(directory, 'config.json')).get('architectures') or ['none']
  if found[0] != model_class.__name__:
    raise InputError(
      f'{name} holds a {found[0]}; name an evaluator that is a {model_class.__name__}'
    )
  if not any(file.endswith(_WEIGHTS) for file in os.listdir(directory)):
    raise InputError(
      f'{name} has no .safetensors file, and pickled weights are not read; convert its weights to '
      'safetensors'
    )
  return directory


def load(model_class, directory: str, device: str):
  """A model in float32 and evaluation mode. Missing weights raise an InputError."""
  model, info = model_class.from_pretrained(
    directory, dtype=torch.float32, use_safetensors=True, output_loading_info=True
  )
  missing = sorted(info['missing_keys'])
  if missing:
    raise InputError(
      f'{directory} lacks the weights of {missing[0]} and {len(missing) - 1} more parameters of a '
      f'{model_class.__name__}; download the evaluator again'
    )
  return model.eval().to(device)


def about(name: str, directory: str, settings: dict[str, Any]) -> About:
  """What the results record about an evaluator."""
  digest = hashlib.sha256()
  for file in sorted(os.listdir(directory)):
    if file.endswith(_WEIGHTS):
      with open(os.path.join(directory, file), 'rb') as f:
        digest.update(hashlib.file_digest(f, 'sha256').digest())
  config = files.read_json(os.path.join(directory, 'config.json'))
  return About(
    name=name,
    architecture=config['architectures'][0],
    sha256=digest.hexdigest(),
    versions={'torch': torch.__version__, 'transformers': transformers.__version__},
    settings=settings,
  )


def best_device() -> str:
  """The GPU if there is one."""
  return 'cuda' if torch.cuda.is_available() else 'cpu'
