"""Writes a run's adapters as a directory that peft loads onto transformers'
JanusForConditionalGeneration (for a Show-o, onto the original module), and reads it back.
"""

import os
import pathlib

import numpy as np
from safetensors.numpy import load_file, save_file

from dsr_jax import files
from dsr_jax.convert import directory as directory_lib
from dsr_jax.convert import writing
from dsr_jax.models.janus.family import JANUS
from dsr_jax.models.showo.family import SHOWO
from dsr_jax.models.unified import Family

_WEIGHTS, _CONFIG = 'adapter_model.safetensors', 'adapter_config.json'
# The layers in the module that peft wraps. Adapt only the language model's: Janus' vision tower has
# projections with the same names.
_LAYERS = {JANUS.name: 'model.language_model.layers', SHOWO.name: 'showo.model.layers'}


def save(directory, adapters, base: str, family: Family, overwrite: bool = False, beside=None):
  """Writes adapters, {projection: {'a': (L, in, r), 'b': (L, r, out)}}. base: name of their base
  model. beside: {name: bytes} of additional files, such as the card.
  """
  directory_lib.check_target(directory, overwrite)
  tensors = {
    name: np.ascontiguousarray(np.asarray(value, np.float32).T)
    for name, value in _named(adapters, family)
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
    target_modules=_targets(family),
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
    for name, content in (beside or {}).items():
      files.write_bytes(os.path.join(aside, name), content)


def load(directory, layers: int, family: Family):
  """Reads the output of `save`: the adapters of a model with this many layers, as NumPy arrays with
  the scale folded into B.
  """
  directory = pathlib.Path(directory)
  config = files.read_json(directory / _CONFIG)
  tensors = load_file(directory / _WEIGHTS)
  scale = config['lora_alpha'] / config['r']

  def stack(name, part):
    return np.stack([tensors[_name(family, name, layer, part)].T for layer in range(layers)])

  return {
    name: dict(a=stack(name, 'A'), b=stack(name, 'B') * np.float32(scale))
    for name in family.lora_targets
  }


def _targets(family):
  """The pattern of the adapted modules, for peft."""
  layers = _LAYERS[family.name].removeprefix('model.').replace('.', r'\.')
  parts = dict.fromkeys(path[-2] for path in family.lora_targets.values())
  return rf'.*{layers}\.\d+\.({"|".join(parts)})\.({"|".join(family.lora_targets)})'


def _named(adapters, family):
  for name, pair in adapters.items():
    for layer in range(pair['a'].shape[0]):
      yield _name(family, name, layer, 'A'), pair['a'][layer]
      yield _name(family, name, layer, 'B'), pair['b'][layer]


def _name(family, projection, layer, part):
  module = f'{_LAYERS[family.name]}.{layer}.{family.lora_targets[projection][-2]}.{projection}'
  return f'base_model.model.{module}.lora_{part}.weight'
