"""A run's adapters as a directory that peft loads onto transformers' JanusForConditionalGeneration,
and back.
"""

import os
import pathlib

import numpy as np
from safetensors.numpy import load_file, save_file

from dsr_jax import files
from dsr_jax.convert import directory as directory_lib
from dsr_jax.convert import writing
from dsr_jax.models.janus.family import JANUS

# Name of a projection -> the part of a layer that it belongs to.
PROJECTIONS = {name: path[-2] for name, path in JANUS.lora_targets.items()}
_WEIGHTS, _CONFIG = 'adapter_model.safetensors', 'adapter_config.json'
# Only the language model's: the vision tower has projections of the same names.
_TARGETS = r'.*language_model\.layers\.\d+\.(self_attn|mlp)\.(' + '|'.join(PROJECTIONS) + ')'


def save(directory, adapters, base: str, overwrite: bool = False):
  """Writes adapters, {projection: {'a': (L, in, r), 'b': (L, r, out)}}; `base` names the model they
  belong to.
  """
  directory_lib.check_target(directory, overwrite)
  tensors = {
    name: np.ascontiguousarray(np.asarray(value, np.float32).T) for name, value in _named(adapters)
  }
  rank = adapters['q_proj']['a'].shape[-1]
  config = dict(
    peft_type='LORA',
    task_type=None,
    base_model_name_or_path=base,
    r=rank,
    lora_alpha=rank,
    lora_dropout=0.0,
    bias='none',
    target_modules=_TARGETS,
    fan_in_fan_out=False,
    inference_mode=True,
    init_lora_weights=True,
    use_rslora=False,
    use_dora=False,
    modules_to_save=None,
  )
  with files.whole_directory(
    directory, directory_lib.NOT_WRITABLE, ours=writing.is_export
  ) as aside:
    save_file(tensors, os.path.join(aside, _WEIGHTS), metadata=dict(format='pt'))
    files.write_json(os.path.join(aside, _CONFIG), config, indent=2)


def load(directory, layers: int):
  """What `save` wrote: the adapters of a model of so many layers, as NumPy arrays, the scale folded
  into B.
  """
  directory = pathlib.Path(directory)
  config = files.read_json(directory / _CONFIG)
  tensors = load_file(directory / _WEIGHTS)
  scale = config['lora_alpha'] / config['r']

  def stack(name, part):
    return np.stack([tensors[_name(name, layer, part)].T for layer in range(layers)])

  return {
    name: dict(a=stack(name, 'A'), b=stack(name, 'B') * np.float32(scale)) for name in PROJECTIONS
  }


def _named(adapters):
  for name, pair in adapters.items():
    for layer in range(pair['a'].shape[0]):
      yield _name(name, layer, 'A'), pair['a'][layer]
      yield _name(name, layer, 'B'), pair['b'][layer]


def _name(projection, layer, part):
  module = f'language_model.layers.{layer}.{PROJECTIONS[projection]}.{projection}'
  return f'base_model.model.model.{module}.lora_{part}.weight'
