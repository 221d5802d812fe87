"""The same step on any mesh: 8 virtual devices, in a process of their own."""

import jax
from mesh_processes import assert_same_step, finish, load, start
import mesh_run
import numpy as np
import pytest

from dsr_jax import config as config_lib
from dsr_jax import sharding
from dsr_jax.errors import InputError
from dsr_jax.models.janus import model as janus
from dsr_jax.models.janus.family import JANUS

RULES = JANUS.sharding_rules
MESHES = ('2x1x1', '4x2x1', '2x2x2')


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """A step of each mesh."""
  folder = tmp_path_factory.mktemp('meshes')
  finish(start(folder, '1x1x1', *MESHES))
  return folder


@pytest.mark.parametrize('mesh', MESHES)
def test_a_step_on_many_devices_is_the_step_on_one(runs, mesh):
  assert_same_step(load(runs, '1x1x1@1'), load(runs, f'{mesh}@1'))


@pytest.mark.slow
def test_a_reward_that_is_divided_by_its_gradient_is_divided_alike_on_many_devices(tmp_path):
  finish(start(tmp_path, '1x1x1', '2x2x2', '--credit=attribution'))
  one = load(tmp_path, '1x1x1@1')
  assert_same_step(one, load(tmp_path, '2x2x2@1'))
  assert 0 < one['metric/generation/credit_share'] < 1


def test_candidates_differ_so_that_equal_ones_mean_something(runs):
  one = load(runs, '1x1x1@1')
  assert (
    len(np.unique(one['record/generation/codes'].reshape(-1, 4), axis=0))
    > mesh_run.INPUTS * mesh_run.GROUP // 2
  )
  assert np.all(np.ptp(one['record/generation/rewards'], axis=1) > 1e-3)


def test_no_device_holds_the_logits_of_all_tokens(runs):
  m = mesh_run
  for mesh in ('1x1x1', *MESHES):
    found = load(runs, f'{mesh}@1')
    data, fsdp, _ = (int(n) for n in mesh.split('x'))
    rows = m.INPUTS * m.GROUP // (data * fsdp)
    assert found['hlo_text_positions'] <= rows * m.CHUNK, mesh
    # Guided logits of a token, or a chunk of plain ones; the table of code embeddings has an entry
    # a code.
    assert found['hlo_image_positions'] <= max(rows * max(2, m.CHUNK), m.WIDTH), mesh


def test_no_decode_loop_moves_more_than_a_token_needs(runs):
  for mesh in MESHES:
    found = load(runs, f'{mesh}@1')
    assert found['hlo_loops'] >= 2
    # Weights, caches and logits are larger than the states of a device's rows at one token.
    assert found['hlo_move'] <= 4 * 2 * mesh_run.INPUTS * mesh_run.GROUP * mesh_run.WIDTH // 2, (
      mesh,
      found['hlo_moves'],
    )


# What the mesh refuses.


def abstract(data, fsdp, tp):
  types = (jax.sharding.AxisType.Auto,) * 3
  return jax.sharding.AbstractMesh((data, fsdp, tp), sharding.AXES, axis_types=types)


@pytest.mark.parametrize(
  'sizes, message',
  [
    ((3, 1, 1), 'does not fit 8 devices, but only 3; change'),
    ((1, -1, 3), 'a multiple of 3'),
    ((2, 2, 1), '= 2 x 2 x 1 does not fit'),
  ],
)
def test_a_mesh_that_does_not_match_the_devices_is_refused(sizes, message):
  with pytest.raises(InputError, match=message):
    sharding.resolve(config_lib.Mesh(*sizes), 8)


def test_the_rest_of_the_devices_goes_where_it_is_asked():
  assert sharding.resolve(config_lib.Mesh(2, -1, 2), 8) == {'data': 2, 'fsdp': 2, 'tp': 2}


def test_heads_and_inputs_that_do_not_divide_are_refused_and_the_key_is_named():
  with pytest.raises(InputError, match='system.mesh.tp is 3, but the model has 4 attention heads'):
    sharding.check_fits({'data': 1, 'fsdp': 1, 'tp': 3}, 4, {})
  with pytest.raises(
    InputError, match='12 inputs .* not a multiple of .* = 8; change system.rollout_chunk'
  ):
    sharding.check_fits({'data': 2, 'fsdp': 4, 'tp': 1}, 4, {'system.rollout_chunk': 12})


def test_a_parameter_that_does_not_divide_is_refused():
  with pytest.raises(InputError, match='generation_head/vision_head/kernel has the size 32 x 34'):
    sharding.shardings(janus.abstract_params(mesh_run.MODEL), abstract(1, 1, 4), RULES)


def test_a_parameter_without_a_rule_and_a_rule_without_a_parameter_are_errors():
  shapes = janus.abstract_params(mesh_run.MODEL)
  with pytest.raises(ValueError, match='no sharding rule matches stranger/kernel'):
    sharding.shardings(
      {**shapes, 'stranger': {'kernel': jax.ShapeDtypeStruct((4, 4), 'f4')}},
      abstract(1, 1, 1),
      RULES,
    )
  del shapes['lm_head']
  with pytest.raises(ValueError, match='rules that match no parameter: lm_head'):
    sharding.shardings(shapes, abstract(1, 1, 1), RULES)


def test_moments_lie_as_their_parameters_do_and_large_ones_are_split():
  shapes = janus.abstract_params(mesh_run.MODEL)
  layout = sharding.shardings(
    {'params': shapes, 'mu': shapes, 'count': jax.ShapeDtypeStruct((), 'i4')},
    abstract(1, 2, 2),
    RULES,
  )
  assert jax.tree.leaves(layout['params']) == jax.tree.leaves(layout['mu'])
  kernel = layout['params']['language_model']['layers']['mlp']['down_proj']['kernel']
  assert kernel.spec == jax.P(None, 'tp', 'fsdp') and layout['count'].spec == jax.P()
