"""Meshes and chunks of the full-size runs by slice, to be checked with `dsr_jax.plan` before
anything is rented.

  --config=configs/janus_pro_7b.py:v5e:8x8    the slice stands after the config's name
"""

from dsr_jax.errors import InputError

# Model -> slice -> (fsdp, tp, inputs of a task sampled at once, differentiated at once).
SLICES = {
  '1b': {
    'v5e:2x4': (4, 2, 16, 16),
    'v6e:2x4': (8, 1, 16, 16),
    'v5p:2x2x2': (8, 1, 64, 32),
    'h100:8': (8, 1, 64, 32),
    'h200:8': (8, 1, 64, 32),
  },
  '7b': {
    'v5p:4x4x4': (16, 4, 64, 64),
    'v6e:8x8': (16, 4, 64, 64),
    'v5e:8x8': (8, 8, 64, 8),
    'h200:8': (8, 1, 8, 8),
  },
  'showo': {
    'v5e:8x8': (64, 1, 64, 64),
    'v6e:8x8': (64, 1, 64, 64),
    'h200:8': (8, 1, 64, 64),
  },
}


def apply(config, model, name):
  """Sets the mesh, the chunks and the segments for slice `name` of `SLICES[model]`; None leaves the
  defaults.
  """
  if name is None:
    return
  if name not in SLICES[model]:
    raise InputError(
      f'found the slice {name!r} after the config; expected one of {", ".join(SLICES[model])}, '
      'or none and system.mesh set by hand'
    )
  s = config.system
  if model == 'showo':  # draws in steps: segments are of its texts alone
    s.mesh.fsdp, s.mesh.tp, s.rollout_chunk, s.update_chunk = SLICES[model][name]
    s.decode_scan = name.startswith('v')
    return
  # of 576 codes: four pieces of program, a fifth of what is read of the cache is not filled yet
  s.decode_segment = 144
  s.mesh.fsdp, s.mesh.tp, s.rollout_chunk, s.update_chunk = SLICES[model][name]
  s.decode_scan = name.startswith('v')  # TPUs read a layer's weights where they lie in the stack
