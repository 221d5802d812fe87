"""The part after the name of a full-size config: a slice, which sets mesh and chunks (check it with
`dsr_jax.plan` before you rent it), or another reading of the paper.

  --config=configs/janus_pro_7b.py:v5e:8x8    a slice
  --config=configs/janus_pro_7b.py:h100:1     one accelerator; for the 7B, trains adapters
  --config=configs/janus_pro_7b.py:trl        the paper's batch, counted in completions
"""

from dsr_jax.errors import InputError

# Model -> slice -> (fsdp, tp, inputs of a task per rollout chunk, per update chunk).
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
# The moments of all weights do not fit on these slices, so adapters are trained.
ADAPTERS = (('7b', 'h100:1'),)
TRL = 'trl'


def apply(config, model, name):
  """Sets mesh, chunks and segments for slice `name` of `SLICES[model]`, or TRL's batch; None leaves
  the defaults.
  """
  if name is None:
    return
  if name == TRL:
    _count_completions(config)
    return
  if name not in SLICES[model]:
    raise InputError(
      f'{name!r} after the config is unknown; use one of the slices {", ".join(SLICES[model])}, or '
      f'{TRL}, or leave it out and set system.mesh by hand'
    )
  if (model, name) in ADAPTERS:
    config.method.trainable = 'lora'
  s = config.system
  if model == 'showo':  # draws in steps, so it decodes only texts in segments
    s.mesh.fsdp, s.mesh.tp, s.rollout_chunk, s.update_chunk = SLICES[model][name]
    s.decode_scan = name.startswith('v')
    return
  # of 576 codes: four segments, so that a fifth of the cache that is read is not yet filled
  s.decode_segment = 144
  s.mesh.fsdp, s.mesh.tp, s.rollout_chunk, s.update_chunk = SLICES[model][name]
  s.decode_scan = name.startswith('v')  # TPUs read a layer's weights in place in the stack


def _count_completions(config):
  """The other reading of the batch: TRL's trainers of that time counted completions, so "64 x 2"
  means 16 inputs of 8 candidates, and 5 epochs of 11,200 inputs are 3,500 updates.
  """
  m = config.method
  m.inputs_per_step = 16
  m.steps = 3500
  m.separate.swap_every = 700
  config.system.rollout_chunk = config.system.update_chunk = 8  # all inputs of a task
