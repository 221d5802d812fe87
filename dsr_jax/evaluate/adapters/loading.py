"""Evaluators from a directory or a Hub id: checked before they are loaded, hashed, and described.

Everything here and beside it needs torch; nothing that answers a benchmark imports it.
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
# Images that a detector looks at together. More would be hardly faster, and large images take
# much memory.
PICTURES = 4


class About(NamedTuple):
  """What is kept of an evaluator in the results.

  Attributes:
    name: as the user named it.
    architecture: the class of transformers.
    sha256: of its weights' files, in the order of their names.
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
    model_class: of transformers, that it must be of.

  Errors: InputError if there is none, or it is another kind of model.
  """
  directory = name
  if not os.path.isdir(name):
    if not inputs.is_hub_id(name):
      raise InputError(
        f'found no evaluator {name!r}; expected a directory or a Hub id (OWNER/NAME); correct it'
      )
    try:
      directory = huggingface_hub.snapshot_download(name, allow_patterns=list(_FILES))
    except Exception as e:  # of several libraries: no network, no such repository, no leave
      raise InputError(
        f'cannot fetch the evaluator {name} ({type(e).__name__}); expected a network and a public '
        'repository; fetch it elsewhere and name its directory'
      ) from e
  found = files.read_json(os.path.join(directory, 'config.json')).get('architectures') or ['none']
  if found[0] != model_class.__name__:
    raise InputError(
      f'found a {found[0]} in {name}; expected {model_class.__name__}; name an evaluator of that '
      'kind'
    )
  if not any(file.endswith(_WEIGHTS) for file in os.listdir(directory)):
    raise InputError(
      f'found no .safetensors in {name}; expected the weights in that form; convert them, since '
      'pickled weights are not read'
    )
  return directory


def load(model_class, directory: str, device: str):
  """A model in float32, ready to be asked. Missing or unexpected weights are refused."""
  model, info = model_class.from_pretrained(
    directory, dtype=torch.float32, use_safetensors=True, output_loading_info=True
  )
  missing = sorted(info['missing_keys'])
  if missing:
    raise InputError(
      f'found no weights for {missing[0]} and {len(missing) - 1} more in {directory}; expected all '
      f'of a {model_class.__name__}; fetch the evaluator again'
    )
  return model.eval().to(device)


def about(name: str, directory: str, settings: dict[str, Any]) -> About:
  """What is kept of an evaluator in the results."""
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
  """The GPU where there is one."""
  return 'cuda' if torch.cuda.is_available() else 'cpu'
