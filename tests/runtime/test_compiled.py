"""Compiled steps that are kept: found again as they were, and only where nothing differs."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from places import ROOT
import pytest
import tiny_step

from dsr_jax.runtime import compiled as programs

KIND = ('seed', 'x')


def step(state, batch):
  return (
    {'w': state['w'] + batch['x'].sum(0)},
    {'loss': jnp.sin(state['w']).sum() * batch['seed']},
    {'shown': batch['x'][:1]},
  )


def given(rows=3):
  return {'w': jnp.arange(4.0)}, {
    'x': jnp.arange(4.0 * rows).reshape(rows, 4),
    'seed': np.uint32(7),
  }


def in_a_process(code, **variables):
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  env |= {
    'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "tests/runtime"}{os.pathsep}{ROOT / "tests/support"}',
    'JAX_PLATFORMS': 'cpu',
    **variables,
  }
  return subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path):
  """A folder in which the step is kept, in one below that did not exist."""
  kept = programs.Kept(str(tmp_path / 'a' / 'b'), 'step', jax.devices())
  assert kept.take(KIND, *given()) is None
  kept.put(KIND, jax.jit(step, donate_argnums=0).lower(*given()).compile())
  assert len(list((tmp_path / 'a' / 'b').iterdir())) == 1
  return tmp_path / 'a' / 'b'


def test_a_kept_step_does_what_the_compiled_one_does_and_takes_the_state_for_its_own(folder):
  wanted = jax.jit(step)(*given())
  program = programs.Kept(str(folder), 'step', jax.devices()).take(KIND, *given())
  state, batch = given()
  found = program(state, batch)
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  jax.tree.map(np.testing.assert_array_equal, found, wanted)
  assert state['w'].is_deleted() and program.memory_analysis()


def test_a_step_with_any_difference_is_not_taken(folder, monkeypatch):
  def take(identity='step', kind=KIND, args=given()):
    return programs.Kept(str(folder), identity, jax.devices()).take(kind, *args)

  assert take()
  assert take(identity='another') is None and take(kind=('x',)) is None
  assert take(args=given(rows=2)) is None
  state, batch = given()
  assert (
    take(args=({'w': state['w'].astype(jnp.float16)}, batch)) is None
    and take(args=({'v': state['w']}, batch)) is None
  )
  usual = programs.environment()
  monkeypatch.setattr(programs, 'environment', lambda: [*usual[:-1], usual[-1] + ' and a flag'])
  assert take() is None


def test_a_kept_step_runs_on_a_mesh_in_whatever_order_its_devices_are(tmp_path):
  code = f"""
import jax, numpy as np
jax.config.update('jax_num_cpu_devices', 4)
import test_compiled as t
from dsr_jax.runtime import compiled as programs
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
for order in ([2, 0, 3, 1], [0, 1, 2, 3]):
  mesh = Mesh(np.array([jax.devices()[i] for i in order]).reshape(2, 2), ('a', 'b'))
  split = lambda *axes: NamedSharding(mesh, P(*axes))
  where = {{'w': split('a')}}, {{'x': split('b', 'a'), 'seed': split()}}
  given = lambda: jax.device_put(t.given(rows=2), where)
  compiled = jax.jit(t.step, donate_argnums=0, out_shardings=(where[0], split(), split())).lower(*given()).compile()
  load = lambda: programs.Kept({str(tmp_path)!r}, 'step', mesh.devices.flat).take(t.KIND, *given())
  assert load() is None
  programs.Kept({str(tmp_path)!r}, 'step', mesh.devices.flat).put(t.KIND, compiled)
  kept = load()
  for state, batch in (given(), given()):
    found, wanted = kept(state, batch), compiled(*given())
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert found[0]['w'].sharding == wanted[0]['w'].sharding == split('a')
  kept(found[0], batch)
"""
  done = in_a_process(code)
  assert done.returncode == 0, done.stderr[-2000:]


def test_the_environment_is_of_sources_settings_and_flags(tmp_path, monkeypatch):
  usual = programs.environment()
  assert programs.environment() == usual
  monkeypatch.setenv('XLA_FLAGS', os.environ.get('XLA_FLAGS', '') + ' --xla_dump_max_hlo_modules=3')
  assert programs.environment() != usual
  monkeypatch.undo()
  precision = jax.config.jax_default_matmul_precision
  jax.config.update('jax_default_matmul_precision', 'highest')
  try:
    assert programs.environment() != usual
  finally:
    jax.config.update('jax_default_matmul_precision', precision)
  monkeypatch.setattr(programs, 'PACKAGE', tmp_path)
  (tmp_path / 'module.py').write_text('x = 1\n')
  first = programs.environment()
  (tmp_path / 'module.py').write_text('x = 2\n')
  assert usual != first != programs.environment() != usual


def test_what_cannot_be_loaded_or_kept_is_said_and_the_run_goes_on(folder, capfd):
  (file,) = folder.iterdir()
  file.write_bytes(file.read_bytes()[:1000])
  assert programs.Kept(str(folder), 'step', jax.devices()).take(KIND, *given()) is None
  assert f'not loaded   {file}' in capfd.readouterr().err
  (folder / 'file').write_text('')
  programs.Kept(str(folder / 'file'), 'step', jax.devices()).put(
    KIND, jax.jit(step).lower(*given()).compile()
  )
  assert 'not kept     the compiled step' in capfd.readouterr().err
  assert (folder / 'file').read_text() == ''


def test_a_step_says_what_it_is_made_from():
  def identity(method=tiny_step.METHOD, system=tiny_step.SYSTEM):
    return tiny_step.program.__wrapped__(method, system).identity

  usual = identity()
  assert usual == identity()
  for changes in (dict(beta=1.5), dict(objective='grpo'), dict(cfg_interval=2)):
    assert identity(tiny_step.method(**changes)) != usual
  assert identity(system=tiny_step.system(remat=True)) != usual


def test_what_a_step_is_made_from_does_not_depend_on_the_process():
  code = """
from dsr_jax.configs import common
from dsr_jax import config, sharding, step
from dsr_jax.plan import program as plan_program
from dsr_jax.models.janus import model as janus
from dsr_jax.models.janus.config import JanusConfig
made = config.from_config_dict(common.on_scenes())
mesh = sharding.make_mesh(made.system.mesh)
model = JanusConfig.scenes()
print(step.make_step(janus.graphdef_of(model), made.method, made.system, mesh, plan_program.stand_in_templates(model)).identity)
"""
  said = [in_a_process(code, PYTHONHASHSEED=seed).stdout for seed in ('1', '2')]
  assert said[0] == said[1] and len(said[0]) > 1000


def test_only_a_step_that_says_what_it_is_is_kept_and_only_in_a_folder(tmp_path):
  real = tiny_step.program(tiny_step.METHOD, tiny_step.SYSTEM)
  assert isinstance(programs.kept_in(str(tmp_path), real), programs.Kept)
  assert (
    programs.kept_in('', real) is None and programs.kept_in(str(tmp_path), jax.jit(step)) is None
  )
