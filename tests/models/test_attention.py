"""Attention over parts: joined to one context it gives what the parts give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.models.common import attention


@pytest.mark.parametrize('t', [1, 5, 8])
@pytest.mark.parametrize('candidates', [1, 3])
def test_fused_and_part_by_part_agree_in_values_and_gradients(t, candidates):
  r, n, p, h = 2, 3, 7, 8

  def normal(i, *shape):
    return jax.random.normal(jax.random.key(i), shape)

  q, k, v = (normal(i, r, n, candidates, t, h) for i in range(3))
  pk, pv = normal(3, r, n, p, h), normal(4, r, n, p, h)
  seen = (jnp.arange(p) < jnp.array([7, 4])[:, None])[:, None, None, None]
  causal = jnp.tril(jnp.ones((t, t), bool))

  def parts(k, v, pk, pv):
    return [(pk, pv, seen), (k, v, causal)]

  weight = normal(5, r, n, candidates, t, h)

  def run(f):
    return jax.value_and_grad(
      lambda *x: jnp.sum(weight * f(x[0], parts(*x[1:]))), argnums=range(5)
    )(q, k, v, pk, pv)

  plain, joined = run(attention.attend), run(lambda q, parts: attention.fused(q, parts, 'xla'))
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(joined)):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_part_without_a_mask_is_seen_whole():
  def normal(i, *shape):
    return jax.random.normal(jax.random.key(i), shape)

  q, k, v = normal(0, 2, 3, 2, 4, 8), normal(1, 2, 3, 5, 8), normal(2, 2, 3, 5, 8)
  np.testing.assert_allclose(
    attention.attend(q, [(k, v, None)]), attention.fused(q, [(k, v, None)], 'xla'), atol=2e-6
  )
