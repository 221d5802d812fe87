"""Runs become models of either layout, and a model is converted and placed a piece at a time."""

import json
import subprocess
import sys
import tracemalloc

import jax
import numpy as np
import original_layout
from places import ROOT
import pytest
from safetensors.numpy import load_file
from transformers import AutoProcessor, JanusForConditionalGeneration

from dsr_jax import convert
from dsr_jax.convert import __main__ as command
from dsr_jax.convert import locate, placing, writing
from dsr_jax.errors import InputError
from dsr_jax.models.common import lora
from dsr_jax.models.janus.family import JANUS

WEIGHTS = 'model.safetensors'


def run(source, target, layout='hf', **options):
  return command.convert(str(source), str(target), layout, **options)


def test_a_run_becomes_either_layout_with_the_source_models_other_tensors(
  original, make_run, tmp_path
):
  workdir = make_run(original_layout.head_of(original, 1.001), guidance=2.5)
  (workdir / 'summary.json').write_text(
    json.dumps(
      dict(
        step=7,
        steps=7,
        evaluation={'generation': dict(before=20.0, after=28.5, step=7)},
        rewards={},
      )
    )
  )
  run(f'{workdir}@7', tmp_path / 'o', 'deepseek')
  name = 'language_model.lm_head.weight'
  want = {**original[1], name: original[1][name].float() * 1.001}
  original_layout.same_tensors(
    load_file(tmp_path / 'o' / WEIGHTS), want
  )  # the trained leaf keeps every bit, the others are as they were
  run(workdir, tmp_path / 'h')
  assert json.loads((tmp_path / 'h/generation_config.json').read_text())['guidance_scale'] == 2.5
  card = (tmp_path / 'h/README.md').read_text()
  for part in (
    'step of the run: 7',
    '| objective | simpo |',
    '| prompts | mine.txt |',
    '| generation | 20.0000 | 28.5000 |',
  ):
    assert part in card
  assert str(tmp_path) not in card and str(original[0]) not in card
  np.testing.assert_array_equal(
    convert.load(tmp_path / 'h').params['lm_head']['kernel'], want[name].numpy().T
  )


def test_a_run_of_two_models_is_asked_which(original, make_run, tmp_path):
  workdir = make_run(
    {
      'generator': original_layout.head_of(original, 2),
      'understander': original_layout.head_of(original, 3),
    },
    strategy='separate',
  )
  with pytest.raises(InputError, match=':generator or .*:understander'):
    run(workdir, tmp_path / 'x')
  for role, factor in (('generator', 2), ('understander', 3)):
    run(f'{workdir}@7:{role}', tmp_path / role)
    np.testing.assert_array_equal(
      convert.load(tmp_path / role).params['lm_head']['kernel'],
      original_layout.head_of(original, factor)['lm_head']['kernel'],
    )


def test_a_role_of_a_run_of_one_model_is_refused(original, make_run, tmp_path):
  with pytest.raises(InputError, match='trained one model'):
    run(f'{make_run(original_layout.head_of(original, 1))}:generator', tmp_path / 'x')


def test_adapters_are_folded_in(original, make_run, tmp_path):
  base = convert.load(original[0])
  adapters = lora.init(base.params, JANUS.lora_targets, 3, 0)
  adapters = jax.tree.map(lambda x: x + 0.1, adapters)
  run(make_run({'lora': adapters}), tmp_path / 'h')
  got = convert.load(tmp_path / 'h').params
  want = lora.merged(base.params, JANUS.lora_targets, adapters)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)

  def kernel(params):
    return params['language_model']['layers']['mlp']['down_proj']['kernel']

  assert np.abs(kernel(got) - kernel(base.params)).max() > 0.01


@pytest.mark.parametrize('layout', ['hf', 'deepseek'])
def test_the_template_of_a_run_goes_with_its_weights(original, make_run, tmp_path, layout):
  workdir = make_run(original_layout.head_of(original, 2), template='plain')
  run(workdir, tmp_path / 'one', layout)
  run(tmp_path / 'one', tmp_path / 'two', 'hf')
  for name in ('one', 'two'):
    source = locate.resolve(str(tmp_path / name))
    assert source.method.template == source.bundle.processor.template == 'plain'
  assert '| template | plain |' in (tmp_path / 'one' / 'README.md').read_text()
  # transformers asks in the same words.
  processor = AutoProcessor.from_pretrained(tmp_path / 'two')
  turn = [dict(role='user', content=[dict(type='text', text='a red disc')])]
  words = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
  assert words == 'User: a red disc\n\nAssistant:'
  JanusForConditionalGeneration.from_pretrained(tmp_path / 'two')


# Memory.


def test_converting_holds_a_piece_at_a_time(hf_directory, tmp_path, monkeypatch):
  size = (hf_directory / WEIGHTS).stat().st_size
  monkeypatch.setattr(writing, 'PIECE_BYTES', 1 << 14)
  stored = convert.Stored(hf_directory)
  tracemalloc.start()
  convert.export(
    tmp_path / 'o',
    'deepseek',
    stored.config,
    stored.processor,
    stored.atom,
    hf_directory,
    kept_aside={},
    dtype='bfloat16',
  )
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert size > 1 << 20 and peak < size / 2  # tokenizer and names are most of it


@pytest.mark.parametrize(
  'slab, parts', [(1 << 11, ['lm_head']), (1 << 30, ['lm_head', 'language_model', 'vqmodel'])]
)
def test_leaves_go_to_their_shards_on_eight_devices(hf_directory, slab, parts):
  """As NumPy arrays, whatever the size of the slabs; each device asked only for its own part."""
  code = f"""
import jax, numpy as np, pathlib
jax.config.update('jax_num_cpu_devices', 8)
from dsr_jax import convert, sharding, config
from dsr_jax.convert import placing
from dsr_jax.models.janus.family import JANUS
placing.SLAB_BYTES = {slab}
mesh = sharding.make_mesh(config.Mesh(data=1, fsdp=4, tp=2))
whole = convert.load({str(hf_directory)!r})
lazy = convert.load({str(hf_directory)!r}, lambda leaf: leaf)
layout = sharding.shardings(whole.params, mesh, JANUS.sharding_rules)
asked = []
read = placing.Leaf.__getitem__
placing.Leaf.__getitem__ = lambda self, index: asked.append(read(self, index)) or asked[-1]
for name in {parts}:
  placed = sharding.place(lazy.params[name], layout[name])
  jax.tree.map(np.testing.assert_array_equal, placed, whole.params[name])
  jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or 1 / 0, placed, layout[name])
  if name == 'lm_head':
    kernel = whole.params['lm_head']['kernel']
    assert sum(x.nbytes for x in asked) == kernel.nbytes
    assert max(x.nbytes for x in asked) <= kernel.nbytes // 8
print('good')
"""
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert done.stdout == 'good\n', done.stderr[-2000:]


def test_a_leaf_reads_what_it_is_asked_for(hf_directory):
  whole, lazy = (
    convert.load(hf_directory).params,
    convert.load(hf_directory, lambda leaf: leaf).params,
  )
  for path in (
    ('language_model', 'layers', 'mlp', 'up_proj', 'kernel'),
    ('lm_head', 'kernel'),
    ('vqmodel', 'quant_conv', 'kernel'),
  ):
    a, b = whole, lazy
    for key in path:
      a, b = a[key], b[key]
    assert isinstance(b, placing.Leaf) and (b.shape, b.ndim, b.size, b.nbytes) == (
      a.shape,
      a.ndim,
      a.size,
      a.nbytes,
    )
    np.testing.assert_array_equal(b, a)
    np.testing.assert_array_equal(b[-1:, 1:3], a[-1:, 1:3])
    np.testing.assert_array_equal(b[1:], a[1:])
