"""What stands after the name of a full-size config: meshes and chunks by slice, to be checked with
`dsr_jax.plan` before anything is rented, and other readings of the paper by name.

  --config=configs/janus_pro_7b.py:v5e:8x8    a slice
  --config=configs/janus_pro_7b.py:h100:1     one accelerator; of the 7B the adapters are trained
  --config=configs/janus_pro_7b.py:trl        the paper's batch, counted in completions
"""

from dsr_jax.errors import InputError

# Model -> slice -> (fsdp, tp, inputs of a task sampled at once, differentiated at once).
SLICES = {
  '1b': {
    'v5e:2x4': (4, 2, 16, 16),
    'v6e:2x4': (8, 1, 16, 16),
    'v5p:2x2x2': (8, 1, 64, 32),
    'h100:1': (1, 1, 8, 16),
    'h100:8': (8, 1, 64, 32),
    'h200:8': (8, 1, 64, 32),
  },
  '7b': {
    'v5p:4x4x4': (16, 4, 64, 64),
    'v6e:8x8': (16, 4, 64, 64),
    'v5e:8x8': (8, 8, 64, 8),
    'h100:1': (1, 1, 4, 8),
    'h200:8': (8, 1, 8, 8),
  },
  'showo': {
    'v5e:8x8': (64, 1, 64, 64),
    'v6e:8x8': (64, 1, 64, 64),
    'h200:8': (8, 1, 64, 64),
  },
}
# Too large for the weights' moments on this slice: adapters are trained there.
ADAPTERS = (('7b', 'h100:1'),)
TRL = 'trl'


def apply(config, model, name):
  """Sets the mesh, the chunks and the segments for slice `name` of `SLICES[model]`, or the batch of
  TRL; None leaves the defaults.
  """
  if name is None:
    return
  if name == TRL:
    _count_completions(config)
    return
  if name not in SLICES[model]:
    raise InputError(
      f'found {name!r} after the config; expected one of the slices {", ".join(SLICES[model])}, or '
      f'{TRL}, or nothing and system.mesh set by hand'
    )
  if (model, name) in ADAPTERS:
    config.method.trainable = 'lora'
  s = config.system
  if model == 'showo':  # draws in steps: segments are of its texts alone
    s.mesh.fsdp, s.mesh.tp, s.rollout_chunk, s.update_chunk = SLICES[model][name]
    s.decode_scan = name.startswith('v')
    return
  # of 576 codes: four pieces of program, a fifth of what is read of the cache is not filled yet
  s.decode_segment = 144
  s.mesh.fsdp, s.mesh.tp, s.rollout_chunk, s.update_chunk = SLICES[model][name]
  s.decode_scan = name.startswith('v')  # TPUs read a layer's weights where they lie in the stack


def _count_completions(config):
  """The batch's other reading: TRL's trainers of that time counted completions, so "64 x 2" are 16
  inputs of 8 candidates, and 5 epochs of 11,200 inputs 3,500 updates.
  """
  m = config.method
  m.inputs_per_step = 16
  m.steps = 3500
  m.separate.swap_every = 700
  config.system.rollout_chunk = config.system.update_chunk = 8  # all inputs of a task
