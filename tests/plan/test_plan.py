"""Plans: what fits, what is counted, what a compiled program says, and what is told to who asks for
too much.
"""

import dataclasses
import json
import os
import subprocess
import sys
import types

from flax import nnx
import hlo as plan_hlo
import jax
from jax.experimental import topologies
import jax.numpy as jnp
import mesh_run
import numpy as np
from places import ROOT
import pytest
import run_command

from dsr_jax import config as config_lib
from dsr_jax import config_loading, sharding
from dsr_jax import state as state_lib
from dsr_jax.configs import slices
from dsr_jax.errors import InputError
from dsr_jax.models.janus import model as janus
from dsr_jax.models.janus.config import JanusConfig
from dsr_jax.models.janus.family import JANUS
from dsr_jax.models.unified import Picture, Scoring, Text
from dsr_jax.plan import __main__ as plan_command
from dsr_jax.plan import costs as plan_costs
from dsr_jax.plan import memory as plan_memory
from dsr_jax.plan import program as plan_program
from dsr_jax.plan import report as plan
from dsr_jax.plan import sizes as plan_sizes

COMMON = os.path.join(ROOT, 'configs', 'common.py')


def full(size, **changes):
  """The paper's run of a published model."""
  return config_loading.load(COMMON, model=f'deepseek-ai/Janus-Pro-{size}', **changes)


# Topologies.


@pytest.mark.parametrize(
  'name, chips',
  [('v5e:8x8', 64), ('v5p:4x4x4', 64), ('v6e:8x8', 64), ('h200:8', 8), ('v5e:2x4', 8)],
)
def test_topologies_are_counted(name, chips):
  assert plan_costs.parse(name)[2] == chips


@pytest.mark.parametrize(
  'name', ['v5e:3x3', 'v5e', 'v9:4x4', 'h200:2x4', '', 'v5p:4x4', 'h200:0', 'v5e:8x8x8']
)
def test_a_topology_that_does_not_exist_is_refused_and_some_are_listed(name):
  with pytest.raises(InputError, match='the topology .* is unknown; choose one such as .*:.*, '):
    plan_costs.parse(name)


@dataclasses.dataclass(frozen=True)
class Chip:
  """What a layout asks of a TPU's device."""

  device_kind: str
  coords: tuple[int, int, int]
  id: int
  platform: str = 'tpu'
  core_on_chip: int = 0
  process_index: int = 0
  slice_index: int = 0


@pytest.mark.parametrize(
  'model, name',
  [(m, name) for m, known in slices.SLICES.items() for name in known if name.startswith('v')],
)
def test_every_slices_mesh_can_be_laid_out_on_its_chips(model, name):
  kind, _, shape = name.partition(':')
  sides = ([int(n) for n in shape.split('x')] + [1])[:3]
  kind = {'v5e': 'TPU v5 lite', 'v5p': 'TPU v5', 'v6e': 'TPU v6 lite'}[kind]
  chips = [Chip(kind, place[::-1], i) for i, place in enumerate(np.ndindex(*sides[::-1]))]
  fsdp, tp, _, _ = slices.SLICES[model][name]
  mesh = sharding.make_mesh(config_lib.Mesh(data=1, fsdp=fsdp, tp=tp), chips)
  assert dict(mesh.shape) == {'data': 1, 'fsdp': fsdp, 'tp': tp} and set(mesh.devices.flat) == set(
    chips
  )


# Bytes.


def test_the_estimate_of_the_state_is_what_the_state_takes():
  m = mesh_run
  mesh = sharding.make_mesh(config_lib.Mesh(1, 1, 1), jax.devices()[:1])
  with jax.set_mesh(mesh):
    state = state_lib.init_state(m.params(), JANUS, m.METHOD, m.SYSTEM, mesh)
  config = config_lib.Config(method=m.METHOD, system=m.SYSTEM)
  found = plan_memory.estimate(m.MODEL, config, dict(mesh.shape))
  assert found.of('always') == sum(x.nbytes for x in jax.tree.leaves(state)) - state.step.nbytes


def test_the_initial_model_that_evaluations_load_is_counted_where_the_state_has_none():
  m = mesh_run
  system = dataclasses.replace(m.SYSTEM, frozen_every=0)

  def estimated(benchmark, system=system, **method):
    config = config_lib.Config(
      method=dataclasses.replace(m.METHOD, **method),
      system=system,
      eval=config_lib.Eval(benchmark=benchmark),
    )
    return plan_memory.estimate(m.MODEL, config, dict(data=1, fsdp=1, tp=1))

  trained = {name: size for name, size, _ in estimated('own').parts}['trained parameters, float32']
  assert estimated('own').of('evaluation') == trained
  half = dataclasses.replace(system, compute_dtype='bfloat16')
  assert estimated('own', half).of('evaluation') == trained / 2
  assert estimated('scenes').of('evaluation') == 0
  assert estimated('own', trainable='lora').of('evaluation') == 0
  kept = estimated('own', dataclasses.replace(system, frozen_every=5))
  assert kept.of('evaluation') == 0 and kept.of('always') > estimated('own').of('always')


def test_a_mesh_divides_what_it_splits():
  config = full('7B')
  sizes = [
    plan_memory.estimate(JanusConfig.janus_pro_7b(), config, dict(data=1, fsdp=n, tp=1))
    for n in (8, 64)
  ]
  trained = [
    dict((name, size) for name, size, _ in e.parts)['trained parameters, float32'] for e in sizes
  ]
  assert trained[0] / trained[1] == pytest.approx(8, rel=0.01)
  # 6.9 G parameters, four bytes each, of the language model and both heads.
  assert trained[0] * 8 / 2**30 == pytest.approx(26.1, abs=0.3)


# Operations, against XLA's own count.


def test_counted_operations_are_those_of_the_program():
  model = dataclasses.replace(
    mesh_run.MODEL,
    text=dataclasses.replace(
      mesh_run.MODEL.text, hidden_size=96, intermediate_size=256, head_dim=24
    ),
  )
  graphdef, shapes = janus.graphdef_of(model), janus.abstract_params(model)
  s = plan_sizes.Sizes(model, mesh_run.METHOD, mesh_run.SYSTEM, 40)

  def counted(fn, *args):
    return (
      jax.jit(lambda params, *args: fn(nnx.merge(graphdef, params), *args))
      .lower(shapes, *args)
      .cost_analysis()['flops']
    )

  def of(shape, kind=jnp.int32):
    return jax.ShapeDtypeStruct(shape, kind)

  def text(*shape):
    return Text(of(shape), of(shape, jnp.bool_))

  rows, n = 3, model.num_codes
  drawn = counted(
    lambda m, p, c: m.picture_logps(p, c, None, Scoring()), text(rows, 1, 40), of((rows, 4, n))
  )
  prefix = 40 + 6 - 1  # the template's tokens, all but the last
  expected = plan_sizes.operations(rows * prefix, prefix, s) + plan_sizes.operations(
    rows * 4 * n, prefix + n, s, s.image_head
  )
  assert drawn == pytest.approx(expected, rel=0.1)
  side = model.image_size
  read = counted(
    lambda m, x, q, w: m.text_logps(Picture(None, x), q, w, None, Scoring()),
    of((rows, 1, side, side, 3), jnp.float32),
    text(rows, 8),
    text(rows, 5, 30),
  )
  prefix = 4 + model.vision.num_patches + 2 + 8 + 3 - 1
  expected = (
    rows * s.counts.eye_operations
    + plan_sizes.operations(rows * prefix, prefix, s)
    + plan_sizes.operations(rows * 150, prefix + 30, s, s.text_head)
  )
  assert read == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
  'changes',
  [
    {},
    dict(method__guidance=1.0),
    dict(method__cfg_interval=200),
    dict(system__cache_dtype='int8'),
    dict(method__cfg_interval=200, system__cache_dtype='int8'),
  ],
)
def test_bytes_of_drawing_are_the_sum_over_tokens(changes):
  config, model = full('7B', system__decode_segment=1, **changes), JanusConfig.janus_pro_7b()
  s = plan_sizes.Sizes(model, config.method, config.system, 24)
  mesh, chip = dict(data=1, fsdp=4, tp=2), plan_costs.CHIPS['v5e']
  found = next(p for p in plan_costs.phases(s, mesh, chip) if p.name == 'generation: draw').bytes
  layers, width = model.text.num_hidden_layers, model.text.hidden_size  # heads are as wide together
  kept = (
    2
    * layers
    * (
      width + 4 * model.text.num_attention_heads if 'system__cache_dtype' in changes else 2 * width
    )
  )  # of a token, in a candidate's cache
  prefix, inputs = 2 * layers * 2 * width * s.drawing_prefix, config.method.inputs_per_task
  guided = (
    0 if 'method__guidance' in changes else changes.get('method__cfg_interval', model.num_codes)
  )
  expected = 0
  for token in range(model.num_codes):
    rows = inputs * (2 if token < guided else 1) / 4
    expected += ((s.body + s.image_head) * 2 + rows * (8 * (token + 1) * kept + prefix)) / 2
  assert found == pytest.approx(expected, rel=1e-6)


def test_the_picture_tokenizer_of_the_published_models_costs_what_is_known():
  encode, decode = plan_sizes.vq_operations(JanusConfig.janus_pro_7b())
  assert encode == pytest.approx(0.31e12, rel=0.1) and decode == pytest.approx(0.57e12, rel=0.1)


def test_a_step_of_the_large_model_is_predicted_by_phase_and_under_twenty_seconds():
  config = full('7B', system__mesh={'data': 1, 'fsdp': 8, 'tp': 8}, system__decode_segment=64)
  report, _ = plan.plan(config, 'v5e:8x8', compiling=False)
  assert report['fits'] and 3 < report['step_seconds'] <= 20
  assert report['run_hours'] == pytest.approx(report['step_seconds'] * 438 / 3600)
  assert (
    sum(p['seconds'] for p in report['phases']) == report['step_seconds']
    and len(report['phases']) == 10
  )
  fewer = dataclasses.replace(
    config, system=dataclasses.replace(config.system, mesh=config_lib.Mesh(1, 4, 8))
  )
  assert (
    plan.plan(fewer, 'v5e:4x8', compiling=False)[0]['step_seconds'] > 1.5 * report['step_seconds']
  )


# What programs say.

HLO = """HloModule jit_step, entry_computation_layout={()->f32[]}

%adder (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %sum = f32[] add(%a, %b)
}

%moved (p: bf16[4,8]) -> bf16[64,8] {
  %p = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %ag = bf16[64,8]{1,0} all-gather(%p), dimensions={0}
}

%body (t: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %t = (s32[], bf16[4,8]{1,0}) parameter(0)
  %cp = (f32[2,1024]{1,0:T(8,128)}, f32[2,1024]{1,0:T(8,128)}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
  %done = f32[2,1024]{1,0} collective-permute-done(%cp)
  %ar = f32[9999]{0} all-reduce(%y), to_apply=%adder
  %f = bf16[64,8]{1,0} fusion(%z), kind=kLoop, calls=%moved
  ROOT %r = (s32[], bf16[4,8]{1,0}) tuple(%i, %w)
}

%cond (t: (s32[], bf16[4,8])) -> pred[] {
  %t = (s32[], bf16[4,8]{1,0}) parameter(0)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%other (t: (s32[])) -> (s32[]) {
  %big = f32[4096,4096]{1,0} all-gather(%q), dimensions={0}
  ROOT %r2 = (s32[]) tuple(%i)
}

ENTRY %main (x: f32[3,5,46]) -> f32[] {
  %x = f32[3,5,46]{2,1,0} parameter(0)
  %table = f32[46,32]{1,0} parameter(1)
  %while.1 = (s32[], bf16[4,8]{1,0}) while(%init), condition=%cond, body=%body, metadata={op_name="jit(step)/generation/rollout/decode/while"}
  %while.2 = (s32[]) while(%init2), condition=%cond, body=%other, metadata={op_name="jit(step)/generation/update/while"}
  ROOT %out = f32[] add(%a, %b)
}
"""  # noqa: E501


def test_moves_in_decode_loops_are_found_in_called_computations_and_started_pairs():
  program = plan_hlo.Program(HLO)
  assert program.entry == 'main' and [name for name, _ in program.loops('decode')] == ['while.1']
  assert [(i.opcode, i.bytes) for i in program.decode_moves()] == [
    ('collective-permute-start', 8192),
    ('all-gather', 1024),
  ]
  assert program.collectives() == {
    'all-gather': (2, 4096 * 4096 * 4),
    'collective-permute': (1, 8192),
    'all-reduce': (1, 4 * 9999),
  }
  assert program.positions(46, (32,)) == 15 and program.positions(46) == 32


def test_loops_are_found_by_their_scope_in_a_real_program():
  def fn(x):
    with jax.named_scope('decode'):
      return jax.lax.scan(lambda c, _: (jnp.tanh(c @ c), None), x, None, length=5)[0]

  program = plan_hlo.Program(jax.jit(fn).lower(jnp.ones((7, 7))).compile().as_text())
  ((_, body),) = program.loops('decode')
  assert any('dot' in i.opcode or 'custom-call' in i.opcode or 'fusion' in i.opcode for i in body)


# The command.


def small():
  """The smallest real run there is."""
  return config_loading.load(
    os.path.join(ROOT, 'configs', 'scenes_tiny.py'),
    method__task='generation',
    method__inputs_per_step=2,
    system__frozen_every=0,
  )


def test_the_compiled_half_says_what_the_compiler_says(monkeypatch, tmp_path):
  asked = []
  monkeypatch.setattr(
    topologies,
    'get_topology_desc',
    lambda **kwargs: asked.append(kwargs) or types.SimpleNamespace(devices=jax.devices()[:1]),
  )
  monkeypatch.setattr(plan_program, 'sizes_of', lambda name: mesh_run.MODEL)
  report, estimate = plan.plan(small(), 'v5e:1x1', hlo=str(tmp_path / 'program.txt'))
  assert asked == [{'platform': 'tpu', 'topology_name': 'v5e:1x1'}]
  found = report['compiled']
  assert (
    report['fits'] and report['needed_bytes'] == found['total_bytes'] > found['arguments_bytes'] > 0
  )
  program = plan_hlo.Program((tmp_path / 'program.txt').read_text())
  assert len(program.loops('decode')) == 1 and not program.decode_moves()
  table = plan.table(report, estimate)
  assert 'compiled in' in table and 'generation: draw' in table and 'a step' in table


def test_a_compiler_that_refuses_is_told_in_numbers():
  class Refusing:
    def compile(self):
      raise jax.errors.JaxRuntimeError(
        'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space '
        'hbm. '
        'Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.'
      )

  found = plan_program.measure(Refusing())
  assert found['total_bytes'] == 20.5 * 2**30 and 'Exceeded' in found['refused']


def test_without_the_tpu_compiler_one_sentence_says_what_to_install(monkeypatch):
  def missing(**kwargs):
    raise RuntimeError('Failed to open libtpu.so')

  monkeypatch.setattr(topologies, 'get_topology_desc', missing)
  with pytest.raises(InputError, match='there is no TPU compiler .*requirements-tpu.txt'):
    plan.plan(small(), 'v5e:1x1')


def command(*args):
  return subprocess.run(
    [sys.executable, '-m', 'dsr_jax.plan', *args],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=600,
  )


def test_the_command_counts_for_gpus_and_prints_json_alone_on_stdout():
  done = command(
    '--config=configs/common.py',
    '--config.model=deepseek-ai/Janus-Pro-1B',
    '--topology=h200:8',
    '--config.system.rollout_chunk=16',
  )
  assert done.returncode == 0, done.stderr
  report = json.loads(done.stdout)
  assert (
    report['mesh'] == {'data': 1, 'fsdp': 8, 'tp': 1}
    and report['fits']
    and report['compiled'] is None
  )
  assert 'optimizer' in done.stderr and 'a step' in done.stderr


def test_the_command_refuses_what_cannot_fit_and_says_by_how_much_and_what_would():
  done = command(
    '--config=configs/common.py',
    '--config.model=deepseek-ai/Janus-Pro-7B',
    '--topology=v5e:2x4',
    '--nocompile',
  )
  assert done.returncode == 2
  last = done.stderr.strip().splitlines()[-1]
  assert (
    last.startswith('error: the step needs ')
    and ' GiB per device, ' in last
    and ' more than the 14.96 that it may use (' in last
  )
  assert 'lower system.rollout_chunk' in last and 'take more devices' in last


@pytest.mark.parametrize(
  'values, message',
  [
    ({}, '--topology is missing'),
    (dict(topology='v5e:5x5'), "the topology 'v5e:5x5'"),
    (dict(topology='v5e:8x8', config__system__mesh__tp=3), 'a multiple of 3'),
    (
      dict(topology='v5e:16x16', config__model='x/Janus-Pro-7B', compile='false'),
      'inputs of a task are computed at once',
    ),
  ],
)
def test_bad_input_is_one_sentence(values, message):
  with pytest.raises(InputError, match=message) as found:
    run_command.run(plan_command, config=COMMON, **values)
  assert '\n' not in str(found.value)


# The full-size configs on the slices they name.


@pytest.mark.parametrize(
  'size, name', [(size, name) for size, names in slices.SLICES.items() for name in names]
)
def test_each_slice_of_the_full_size_configs_fits_as_counted(size, name):
  file = size if size == 'showo' else f'janus_pro_{size}'
  config = config_loading.load(os.path.join(ROOT, 'configs', f'{file}.py:{name}'))
  report, _ = plan.plan(config, name, compiling=False)
  assert report['fits'], report['needed_bytes'] / report['memory_bytes']
  assert (config.method.steps, config.method.inputs_per_step, config.method.group_size) == (
    438,
    128,
    8,
  )


def test_a_slice_that_a_config_does_not_know_is_refused():
  with pytest.raises(
    InputError, match="'v5e:1x1' after the config is unknown; use one of the slices v5p:4x4x4"
  ):
    config_loading.load(os.path.join(ROOT, 'configs', 'janus_pro_7b.py:v5e:1x1'))


def test_of_the_7b_one_accelerator_trains_adapters():
  one, eight = (config_loading.load(f'janus_pro_7b:{name}') for name in ('h100:1', 'h200:8'))
  assert (one.method.trainable, one.method.objective) == ('lora', 'simpo')
  assert eight.method.trainable == config_loading.load('janus_pro_1b:h100:1').method.trainable
  # Nothing else of the method differs.
  assert one.method == dataclasses.replace(eight.method, trainable='lora')


def test_the_batch_counted_in_completions_shows_as_many_inputs_five_times():
  method = config_loading.load('janus_pro_7b:trl').method
  paper = config_loading.load('janus_pro_7b').method
  assert (method.inputs_per_step, method.steps, method.separate.swap_every) == (16, 3500, 700)
  assert method.inputs_per_step * method.group_size == 64 * 2
  # 5 epochs of 5,600 prompts and 5,600 pictures; the paper's last step is not whole.
  assert method.steps * method.inputs_per_step == 5 * 11_200
  assert 0 <= paper.steps * paper.inputs_per_step - 5 * 11_200 < paper.inputs_per_step
  same = dict(inputs_per_step=128, steps=438, separate=paper.separate)
  assert dataclasses.replace(method, **same) == paper
