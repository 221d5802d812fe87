"""The golden Show-o and MAGVIT-v2 (tests/golden/showo/README.md) as our modules."""

import functools

from flax import nnx
import jax
import numpy as np
from places import ROOT

from dsr_jax.convert import placing, table
from dsr_jax.models.showo import magvit, model
from dsr_jax.models.showo.config import MagvitConfig, PhiConfig, ShowoConfig, Templates

FOLDER = ROOT / 'tests' / 'golden' / 'showo'
EOT, PAD, SOI, EOI, T2I, MMU = 39, 40, 41, 42, 45, 46
TEMPLATES = Templates(
  eos_id=EOT,
  pad_id=PAD,
  soi_id=SOI,
  eoi_id=EOI,
  generation_prefix=(T2I, EOT),
  generation_suffix=(EOT, SOI),
  understanding_prefix=(MMU, SOI),
  understanding_infix=(EOI, EOT),
  understanding_suffix=(10,),
)
CONFIG = ShowoConfig(
  text=PhiConfig(40, 32, 48, 2, 2),
  vq=MagvitConfig(4, 32, (1, 1), (1, 1), (1, 1), (1, 1)),
  num_codes=9,
  sampling_steps=6,
  templates=TEMPLATES,
)
MAGVIT = MagvitConfig(9, 32, (1, 2), (2, 1), (1, 2), (1, 2))


@functools.cache
def arrays(name):
  """{name: array} of 'showo_tiny' or 'magvit_tiny'."""
  with np.load(FOLDER / f'{name}.npz', allow_pickle=False) as stored:
    return {key: stored[key] for key in stored.files}


def weights(name):
  """{tensor's name: array}."""
  return {k.removeprefix('w::'): v for k, v in arrays(name).items() if k.startswith('w::')}


def params_from(abstract, tensors):
  """Foreign tensors -> our parameters, every one used."""
  entries = table.entries(abstract, 'showo')
  assert {e.name for e in entries} == set(tensors)
  leaves = placing.leaves(abstract, entries, tensors.__getitem__)
  return jax.tree.map(lambda leaf: jax.numpy.asarray(np.asarray(leaf)), leaves)


@functools.cache
def showo() -> model.Showo:
  """The language model is the golden one, the image tokenizer any."""
  params = model.create(CONFIG)[1]
  names = ('language_model', 'lm_head')
  theirs = params_from({name: params[name] for name in names}, weights('showo_tiny'))
  return nnx.merge(model.graphdef_of(CONFIG), {**params, **theirs})


@functools.cache
def tokenizer() -> magvit.Magvit:
  graphdef, state = nnx.split(magvit.Magvit(MAGVIT, rngs=nnx.Rngs(0)))
  params = nnx.to_pure_dict(state)
  return nnx.merge(graphdef, params_from({'vqmodel': params}, weights('magvit_tiny'))['vqmodel'])
