"""A run's adapters as a directory that peft loads onto transformers' JanusForConditionalGeneration,
and back.
"""

import json
import pathlib

import numpy as np

from dsr_jax.convert import directory as directory_lib
from dsr_jax.models.common.lora import PROJECTIONS
from dsr_jax.models.janus.processor import read_json

_WEIGHTS, _CONFIG = 'adapter_model.safetensors', 'adapter_config.json'
# Only the language model's: the vision tower has projections of the same names.
_TARGETS = r'.*language_model\.layers\.\d+\.(self_attn|mlp)\.(' + '|'.join(PROJECTIONS) + ')'


def save(directory, adapters, base: str, overwrite: bool = False):
  """Writes adapters, {projection: {'a': (L, in, r), 'b': (L, r, out)}}; `base` names the model they
  belong to.
  """
  from safetensors.numpy import save_file

  directory_lib.check_target(directory, overwrite)
  tensors = {
    name: np.ascontiguousarray(np.asarray(value, np.float32).T) for name, value in _named(adapters)
  }
  rank = adapters['q_proj']['a'].shape[-1]
  with directory_lib.whole(directory) as aside:
    save_file(tensors, aside / _WEIGHTS, metadata=dict(format='pt'))
    (aside / _CONFIG).write_text(
      json.dumps(
        dict(
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
        ),
        indent=2,
      )
      + '\n',
      encoding='utf-8',
    )


def load(directory, layers: int):
  """What `save` wrote: the adapters of a model of so many layers, as NumPy arrays, the scale folded
  into B.
  """
  from safetensors.numpy import load_file

  directory = pathlib.Path(directory)
  config = read_json(directory / _CONFIG)
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
  return f'base_model.model.model.language_model.layers.{layer}.{PROJECTIONS[projection]}.{projection}.lora_{part}.weight'
