"""Parts that the transformers share: linear maps, norms, GELU, stacked layers and the loop over
them.
"""

from flax import nnx
import jax
import jax.numpy as jnp

from dsr_jax import sharding

# Up to this many stacked layers are unrolled: on a CPU the gradient of a rolled loop takes twice as
# long, and a small model compiles quickly either way.
UNROLL_UP_TO = 6


class Linear(nnx.Module):
  """x: (..., in) -> (..., out), computed in x's dtype; kernel (in, out). `lora.attach` may put an
  adapter beside the kernel.
  """

  def __init__(self, width_in: int, width_out: int, *, rngs: nnx.Rngs, bias: bool = True):
    self.kernel = nnx.Param(
      jax.random.normal(rngs.params(), (width_in, width_out)) * width_in**-0.5
    )
    if bias:
      self.bias = nnx.Param(jnp.zeros(width_out))

  def __call__(self, x):
    # One plain matrix product, because on a CPU a gradient of the kernel that contracts several
    # axes takes several times as long.
    rows = x.reshape(-1, x.shape[-1])
    y = rows @ self.kernel[...].astype(x.dtype)
    if hasattr(self, 'lora_a'):
      y = y + (rows @ self.lora_a[...].astype(x.dtype)) @ self.lora_b[...].astype(x.dtype)
    y = y.reshape(*x.shape[:-1], -1)
    return y + self.bias[...].astype(x.dtype) if hasattr(self, 'bias') else y


class Head(Linear):
  """The last linear map before a softmax: x (..., in) -> float32 (..., out), for any dtype of x.

  The operands keep their dtype. The product accumulates in float32 and is returned in float32:
  rounding a logit of 20 to bfloat16 would change it by up to 1/16, and guidance of 5 would multiply
  that by 9.
  """

  def __call__(self, x):
    rows = x.reshape(-1, x.shape[-1])
    y = product_in_float32(rows, self.kernel[...].astype(x.dtype))
    y = y.reshape(*x.shape[:-1], -1)
    return y + self.bias[...].astype(jnp.float32) if hasattr(self, 'bias') else y


@jax.custom_vjp
def product_in_float32(x, kernel):
  """x (rows, in) @ kernel (in, out) -> float32 (rows, out), accumulated in float32."""
  return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)


def _product_forward(x, kernel):
  return product_in_float32(x, kernel), (x, kernel)


def _product_backward(operands, gradient):
  # In the operands' dtype, as for every other layer: a float32 gradient times a bfloat16 matrix
  # would be a float32 product, which is many times slower on an accelerator.
  _, pull_back = jax.vjp(jnp.matmul, *operands)
  return pull_back(gradient.astype(operands[0].dtype))


product_in_float32.defvjp(_product_forward, _product_backward)


class LinearsInOne:
  """K linear maps of the same x, without biases, as one product: x (..., in) -> (..., K, out).

  Creating it copies the kernels side by side, so create it once, before the loop that uses it.
  """

  def __init__(self, *linears: Linear):
    def stack(kernels):
      return jnp.stack([k[...] for k in kernels], axis=1)

    self.kernel = stack(
      [x.kernel for x in linears]
    )  # (in, K, out): `out` may be split over devices
    adapted = hasattr(linears[0], 'lora_a')
    self.adapters = (
      (stack([x.lora_a for x in linears]), stack([x.lora_b for x in linears])) if adapted else ()
    )

  def __call__(self, x):
    rows = x.reshape(-1, x.shape[-1])
    y = jnp.einsum('rd,dki->rki', rows, self.kernel.astype(x.dtype))
    if self.adapters:
      a, b = (z.astype(x.dtype) for z in self.adapters)
      y = y + jnp.einsum('rkq,qki->rki', jnp.einsum('rd,dkq->rkq', rows, a), b)
    return y.reshape(*x.shape[:-1], *y.shape[1:])


class Embedding(nnx.Module):
  """Integer ids (...) -> vectors (..., width). large: the rows may be split over devices."""

  def __init__(
    self, rows: int, width: int, *, rngs: nnx.Rngs, scale: float = 0.02, large: bool = False
  ):
    self.embedding = nnx.Param(jax.random.normal(rngs.params(), (rows, width)) * scale)
    self.large = large

  def __call__(self, ids):
    return sharding.look_up(self.embedding[...], ids) if self.large else self.embedding[...][ids]


class LayerNorm(nnx.Module):
  """Over the last axis, statistics in float32."""

  def __init__(self, width: int, eps: float):
    self.scale = nnx.Param(jnp.ones(width))
    self.bias = nnx.Param(jnp.zeros(width))
    self.eps = eps

  def __call__(self, x):
    y = x.astype(jnp.float32)  # float32 island
    mean = jnp.mean(y, axis=-1, keepdims=True)
    var = jnp.mean(jnp.square(y - mean), axis=-1, keepdims=True)
    y = (y - mean) * jax.lax.rsqrt(var + self.eps)
    return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
  """Over the last axis, statistics in float32."""

  def __init__(self, width: int, eps: float):
    self.scale = nnx.Param(jnp.ones(width))
    self.eps = eps

  def __call__(self, x):
    y = x.astype(jnp.float32)  # float32 island
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
    return (y * self.scale[...]).astype(x.dtype)


def gelu(x):
  """The exact (erf) form, which every part of Janus uses."""
  return jax.nn.gelu(x, approximate=False)


def stack_layers(make, count: int, rngs: nnx.Rngs):
  """A module whose parameters have a leading layer axis: `count` layers, made by `make(rngs)` from
  split keys.
  """
  keys = jax.random.split(rngs.params(), count)
  graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
  params = jax.vmap(lambda key: nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key)), nnx.Param)))(keys)
  return nnx.merge(graphdef, params)


def scan_layers(layers, body, carry, xs=None, *, remat: bool = False):
  """Runs `body(layer, carry, x) -> (carry, y)` over stacked layers, first to last.

  Args:
    layers: a module made by `stack_layers`.
    carry: passed from layer to layer.
    xs: pytree with a leading layer axis, one slice per layer, or None.
    remat: recompute the layer in the backward pass.

  Returns:
    The last carry and the stacked y.
  """
  graphdef, params = nnx.split(layers)

  def step(c, layer_xs):
    return body(nnx.merge(graphdef, layer_xs[0]), c, layer_xs[1])

  if remat:
    step = jax.checkpoint(step)
  count = jax.tree.leaves(params)[0].shape[0]
  return jax.lax.scan(
    step, carry, (params, xs), length=count, unroll=count if count <= UNROLL_UP_TO else 1
  )


def layer_at(layers, index: int):
  """Layer `index` of stacked layers, as a separate module."""
  graphdef, params = nnx.split(layers)
  return nnx.merge(graphdef, jax.tree.map(lambda p: p[index], params))
