"""Attention over parts: joined to one context it gives what the parts give."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.models import attention, decode_kernel

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize('t', [1, 5, 8])
@pytest.mark.parametrize('candidates', [1, 3])
def test_fused_and_part_by_part_agree_in_values_and_gradients(t, candidates):
  r, n, p, h = 2, 3, 7, 8
  normal = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
  q, k, v = (normal(i, r, n, candidates, t, h) for i in range(3))
  pk, pv = normal(3, r, n, p, h), normal(4, r, n, p, h)
  seen = (jnp.arange(p) < jnp.array([7, 4])[:, None])[:, None, None, None]
  causal = jnp.tril(jnp.ones((t, t), bool))
  parts = lambda k, v, pk, pv: [(pk, pv, seen), (k, v, causal)]
  weight = normal(5, r, n, candidates, t, h)
  run = lambda f: jax.value_and_grad(lambda *x: jnp.sum(weight * f(x[0], parts(*x[1:]))), argnums=range(5))(q, k, v, pk, pv)
  plain, joined = run(attention.attend), run(lambda q, parts: attention.fused(q, parts, 'xla'))
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(joined)):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_part_without_a_mask_is_seen_whole():
  normal = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
  q, k, v = normal(0, 2, 3, 2, 4, 8), normal(1, 2, 3, 5, 8), normal(2, 2, 3, 5, 8)
  np.testing.assert_allclose(attention.attend(q, [(k, v, None)]), attention.fused(q, [(k, v, None)], 'xla'), atol=2e-6)


def one_token(heads: int = 2, room: int = 48, h: int = 16):
  """A new token's queries, a padded shared part, and a cache of its own."""
  r, c, p = 4, 3, 7
  normal = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
  seen = (jnp.arange(p) < jnp.array([7, 4, 1, 5])[:, None])[:, None, None, None]
  shared = normal(0, r, heads, p, h), normal(1, r, heads, p, h), seen
  return normal(2, r, heads, c, 1, h), shared, (normal(3, r, heads, c, room, h), normal(4, r, heads, c, room, h))


@pytest.mark.parametrize('room', [48, 64])  # blocks of 16 and of 32 keys
def test_the_kernel_reads_what_is_filled_and_nothing_more(room):
  q, shared, own = one_token(room=room)
  kernel = jax.jit(lambda own, count: attention.by_kernel(q, shared, own, count, interpret=True))
  for count in (1, 5, 16, 17, room):
    plain = attention.attend(q, [shared, (*own, jnp.arange(room) < count)])
    unfilled = jax.tree.map(lambda x: x.at[:, :, :, count:].set(1e3), own)
    np.testing.assert_allclose(kernel(own, count), plain, atol=2e-6)
    np.testing.assert_allclose(kernel(unfilled, count), plain, atol=2e-6)


@pytest.mark.parametrize('room, h', [(40, 16), (48, 24), (48, 8)])
def test_a_cache_that_the_kernel_does_not_serve_is_known(room, h):
  assert decode_kernel.block_of(room, h) is None


def test_the_kernel_runs_where_rows_and_heads_are_split():
  """On virtual devices in a process of their own: each has its own rows and heads."""
  code = '''
import jax, numpy as np
jax.config.update('jax_num_cpu_devices', 4)
import test_attention
from dsr_jax import config, sharding
from dsr_jax.models import attention
for data, fsdp, tp in ((1, 2, 2), (1, 4, 1)):
  with jax.set_mesh(sharding.make_mesh(config.Mesh(data, fsdp, tp))):
    q, shared, own = test_attention.one_token()
    kernel = jax.jit(lambda *x: attention.by_kernel(*x, 17, interpret=True))
    split = jax.tree.map(lambda x: jax.jit(sharding.split_heads)(x), own)
    assert len({str(s.index) for s in split[0].addressable_shards}) == 4
    plain = attention.attend(q, [shared, (*own, jax.numpy.arange(48) < 17)])
    np.testing.assert_allclose(kernel(q, shared, split), plain, atol=2e-6)
'''
  env = {**os.environ, 'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "tests"}', 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run([sys.executable, '-c', code], env={k: v for k, v in env.items() if k != 'XLA_FLAGS'}, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]


def test_the_kernel_lowers_for_a_gpu():
  q, shared, own = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, one_token())
  lowered = jax.jit(attention.by_kernel).trace(q, shared, own, jnp.int32(5)).lower(lowering_platforms=('cuda',))
  assert 'decode_attention' in lowered.as_text()
