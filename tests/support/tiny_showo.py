"""A tiny random Show-o as the Hub has one: three directories, made with torch, apart from the
package's own names.
"""

import json
import re

import numpy as np
import torch

from benchmarks import torch_phi
from dsr_jax.convert.showo import tokenizer_files

TEXTS = ['a red circle left of a blue square', 'two small green rings', 'yes', 'no'] * 20
LAYERS, WIDTH, INNER, HEADS, BITS = 2, 24, 40, 2, 4
LEVELS = dict(encoder=((32, 2), (64, 1)), decoder=((32, 1), (64, 2)))  # (width, blocks) of levels


def write(folder, *, weights='safetensors', seed=0):
  """Writes show-o/, magvitv2/ and phi-1_5/; returns the two state dicts, of torch."""
  generator = torch.Generator().manual_seed(seed)
  folder.mkdir(parents=True, exist_ok=True)
  words = tokenizer_files.make_tokenizer(TEXTS, 300, folder / 'phi-1_5')
  # As Phi-1.5's own: without Show-o's words.
  path = folder / 'phi-1_5' / 'tokenizer.json'
  content = json.loads(path.read_text())
  content['added_tokens'] = content['added_tokens'][:1]
  path.write_text(json.dumps(content))
  (folder / 'phi-1_5' / 'tokenizer_config.json').write_text(
    '{"tokenizer_class": "CodeGenTokenizer"}'
  )

  rows = words.vocab_size + 10 + 2**BITS + 1
  language_model = torch_phi.language_model(
    rows=rows, width=WIDTH, inner=INNER, layers=LAYERS, heads=HEADS
  )
  model = {
    f'showo.{name}': randomized(value, name, generator)
    for name, value in language_model.state_dict().items()
  }
  magvit = {name: randomized(value, name, generator) for name, value in magvit_state().items()}
  bits = 2 ** torch.arange(BITS - 1, -1, -1)
  codes = torch.arange(2**BITS)[:, None]
  magvit['quantize.embedding'] = ((codes & bits) != 0).float() * 2 - 1
  magvit['quantize.power_vals'] = bits
  config = dict(
    _class_name='Showo',
    _diffusers_version='0.30.1',
    codebook_size=2**BITS,
    llm_model_path='microsoft/phi-1_5',
    llm_vocab_size=words.vocab_size,
    load_from_showo=True,
    mask_token_id=rows - 1,
    num_vq_tokens=16,
    vocab_size=rows,
    w_clip_vit=False,
  )
  save(folder / 'show-o', config, model, weights)
  save(
    folder / 'magvitv2', dict(_class_name='MAGVITv2', _diffusers_version='0.30.1'), magvit, weights
  )
  return model, magvit


def save(folder, config, state, weights):
  from safetensors.torch import save_file  # noqa: PLC0415

  folder.mkdir(exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(config))
  if weights == 'bin':
    torch.save(state, folder / 'pytorch_model.bin')
  else:
    save_file(state, folder / 'pytorch_model.safetensors')


def randomized(value, name, generator):
  scale = 1.0 if value.ndim < 2 else float(np.prod(value.shape[1:])) ** -0.5
  return (torch.randn(value.shape, generator=generator) * scale).contiguous()


def magvit_state():
  """Names of showlab/magvitv2's parameters for other sizes."""
  state = {}

  def conv(name, i, o, size):
    state[f'{name}.weight'], state[f'{name}.bias'] = torch.zeros(o, i, size, size), torch.zeros(o)

  def norm(name, width):
    state[f'{name}.weight'], state[f'{name}.bias'] = torch.zeros(width), torch.zeros(width)

  def res(name, i, o):
    norm(f'{name}.norm1', i)
    conv(f'{name}.conv1', i, o, 3)
    norm(f'{name}.norm2', o)
    conv(f'{name}.conv2', o, o, 3)
    if i != o:
      conv(f'{name}.nin_shortcut', i, o, 1)

  def mid(name, width):
    res(f'{name}.block_1', width, width)
    norm(f'{name}.attn_1.norm', width)
    for part in ('q', 'k', 'v', 'proj_out'):
      conv(f'{name}.attn_1.{part}', width, width, 1)
    res(f'{name}.block_2', width, width)

  now = LEVELS['encoder'][0][0]
  conv('encoder.conv_in', 3, now, 3)
  for n, (width, blocks) in enumerate(LEVELS['encoder']):
    for b in range(blocks):
      res(f'encoder.down.{n}.block.{b}', now, width)
      now = width
    if n < len(LEVELS['encoder']) - 1:
      conv(f'encoder.down.{n}.downsample.conv', now, now, 3)
  mid('encoder.mid', now)
  norm('encoder.norm_out', now)
  conv('encoder.conv_out', now, BITS, 3)
  conv('encoder.quant_conv', BITS, BITS, 1)

  now = LEVELS['decoder'][-1][0]
  conv('decoder.post_quant_conv', BITS, BITS, 1)
  conv('decoder.conv_in', BITS, now, 3)
  mid('decoder.mid', now)
  for n, (width, blocks) in reversed(list(enumerate(LEVELS['decoder']))):
    for b in range(blocks):
      res(f'decoder.up.{n}.block.{b}', now, width)
      now = width
    if n:
      conv(f'decoder.up.{n}.upsample.conv', now, now, 3)
  norm('decoder.norm_out', now)
  conv('decoder.conv_out', now, 3, 3)
  return {re.sub(r'\.+', '.', k): v for k, v in state.items()}
