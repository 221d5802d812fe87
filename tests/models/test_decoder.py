"""Decoding token by token: by the kernel it gives what plain products give, and both give what
teacher forcing gives.
"""

import os
import subprocess
import sys
from types import SimpleNamespace

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh
import numpy as np
from places import ROOT
import pytest

from dsr_jax.errors import InputError
from dsr_jax.models.common import attention, decode_kernel, decoder, lora, rotary
from dsr_jax.models.janus import llama
from dsr_jax.models.janus.config import TextConfig
from dsr_jax.models.janus.family import JANUS

R, C, N, H = 4, 3, 2, 16  # prefixes, candidates, heads, head width
P = S = 2 * decode_kernel.BLOCK


def one_token(key: int = 0):
  """Arguments of `decode_attention`: a new token, its rotation, a padded prefix, and a cache."""
  keys = iter(jax.random.split(jax.random.key(key), 6))

  def normal(*shape):
    return jax.random.normal(next(keys), shape)

  angle = normal(R, 1, H // 2)
  length = jnp.array([7, decode_kernel.BLOCK, 1, P], jnp.int32)
  return (
    normal(R, C, 3, N, H),
    (jnp.cos(angle), jnp.sin(angle)),
    (normal(R, N, P, H), normal(R, N, P, H)),
    length,
    (normal(R, N, C, S, H), normal(R, N, C, S, H)),
  )


def plain(qkv, turn, prefix, length, cache, index):
  """`decode_attention` by its parts."""
  q, k, v = (jnp.moveaxis(qkv[:, :, i], 2, 1)[:, :, :, None] for i in range(3))  # (R, N, C, 1, h)
  q, k = (rotary.rotate(x, rotary.Rotary(*turn)) for x in (q, k))
  cache = [c.at[:, :, :, index].set(x[:, :, :, 0]) for c, x in zip(cache, (k, v))]
  seen = (jnp.arange(P) < length[:, None])[:, None, None, None]
  out = attention.attend(q, [(*prefix, seen), (*cache, jnp.arange(S) <= index)])
  return jnp.moveaxis(out[:, :, :, 0], 1, 2), cache


@pytest.mark.parametrize('index', [0, 1, decode_kernel.BLOCK - 1, decode_kernel.BLOCK, S - 1])
def test_the_kernel_attends_to_what_is_filled_and_nothing_more(index):
  *given, cache = one_token()
  out, kept = plain(*given, cache, index)
  unfilled = [c.at[:, :, :, index:].set(1e3) for c in cache]
  for start in (cache, unfilled):
    found, found_kept = jax.jit(lambda *x: decode_kernel.decode_attention(*x, interpret=True))(
      *given, start, index
    )
    np.testing.assert_allclose(found, out, atol=2e-6)
    for a, b in zip(found_kept, kept):
      np.testing.assert_allclose(a[:, :, :, : index + 1], b[:, :, :, : index + 1], atol=1e-6)


def test_the_kernel_leaves_the_rest_of_the_cache_alone():
  *given, cache = one_token()
  _, kept = decode_kernel.decode_attention(*given, cache, 5, interpret=True)
  for a, b in zip(kept, cache):
    np.testing.assert_array_equal(a[:, :, :, 6:], b[:, :, :, 6:])
    np.testing.assert_array_equal(a[:, :, :, :5], b[:, :, :, :5])


def test_the_kernel_runs_where_rows_and_heads_are_split():
  """On virtual devices in a process of their own: each has its own rows and heads."""
  code = """
import jax, numpy as np
jax.config.update('jax_num_cpu_devices', 4)
import test_decoder
from dsr_jax import config, sharding
from dsr_jax.models.common import decode_kernel
with jax.set_mesh(sharding.make_mesh(config.Mesh(1, 2, 2))):
  *given, cache = test_decoder.one_token()
  split = [jax.jit(sharding.split_heads)(x) for x in cache]
  assert len({str(s.index) for s in split[0].addressable_shards}) == 4
  decode = jax.jit(lambda *x: decode_kernel.decode_attention(*x, interpret=True))
  found, kept = decode(*given, split, 17)
  assert len({str(s.index) for s in kept[0].addressable_shards}) == 4
  out, cache = test_decoder.plain(*given, cache, 17)
  for a, b in zip((found, *kept), (out, *cache)):
    np.testing.assert_allclose(a, b, atol=2e-6)
"""
  env = {
    **os.environ,
    'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "tests/models"}{os.pathsep}{ROOT / "tests/support"}',
    'JAX_PLATFORMS': 'cpu',
  }
  done = subprocess.run(
    [sys.executable, '-c', code],
    env={k: v for k, v in env.items() if k != 'XLA_FLAGS'},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-2000:]


def test_the_kernel_lowers_for_a_gpu_and_takes_the_place_of_the_cache():
  given = jax.tree.map(lambda x: x.astype(jnp.bfloat16), one_token())
  qkv, turn, prefix, length, cache = given
  turn, length = jax.tree.map(lambda x: x.astype(jnp.float32), turn), length.astype(jnp.int32)
  gpu = AbstractMesh(
    (1,), ('x',), abstract_device=AbstractDevice('NVIDIA H100 80GB HBM3', None, 'gpu')
  )
  with jax.sharding.use_abstract_mesh(gpu):
    lowered = (
      jax.jit(decode_kernel.decode_attention)
      .trace(qkv, turn, prefix, length, cache, 5)
      .lower(lowering_platforms=('cuda',))
    )
  call = next(
    line
    for line in lowered.as_text().splitlines()
    if 'decode_attention' in line and 'custom_call' in line
  )
  assert call.count('operand_index') == 2


def test_a_cache_too_large_to_address_is_refused():
  def shape(*s, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(s, dtype)

  def pair(*s):
    return (shape(*s), shape(*s))

  def given(rows):
    return (
      shape(rows, 8, 3, 16, 128),
      pair(rows, 1, 64),
      pair(rows, 16, 64, 128),
      shape(rows, dtype=jnp.int32),
      pair(rows, 16, 8, 576, 128),
      5,
    )

  jax.eval_shape(decode_kernel.decode_attention, *given(227))
  with pytest.raises(InputError, match='2151677952 numbers.*lower system.rollout_chunk'):
    jax.eval_shape(decode_kernel.decode_attention, *given(228))


def test_only_half_precision_on_a_recent_gpu_is_the_kernels(monkeypatch):
  assert not decode_kernel.serves(jnp.bfloat16, 128)  # on a CPU
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  for capability, wanted in (
    ('9.0', True),
    ('10.0', True),
    ('8.0', True),
    ('7.5', False),
    ('gfx942', False),
  ):
    devices = [SimpleNamespace(compute_capability=capability)]
    monkeypatch.setattr(jax, 'local_devices', lambda devices=devices: devices)
    assert decode_kernel.serves(jnp.bfloat16, 128) == attention.kernels_run(jnp.bfloat16) == wanted
  monkeypatch.setattr(jax, 'local_devices', lambda: [SimpleNamespace(compute_capability='9.0')])
  assert (
    not decode_kernel.serves(jnp.float32, 128)
    and not decode_kernel.serves(jnp.bfloat16, 24)
    and not decode_kernel.serves(jnp.bfloat16, 8)
  )


CONFIG = TextConfig(
  vocab_size=32,
  hidden_size=N * H,
  intermediate_size=40,
  num_hidden_layers=2,
  num_attention_heads=N,
  head_dim=H,
  rope_theta=1e4,
  rms_norm_eps=1e-6,
)


KINDS = ('unrolled', 'scanned', 'kernel', 'unrolled int8', 'scanned int8')


def made_as(kind, lm, prefix, tokens):
  """A decoder, and how close to teacher forcing it is."""
  if kind == 'kernel':
    return decoder.KernelDecoder(lm, prefix, C, tokens, interpret=True), 1e-5
  how, *cache_dtype = kind.split()
  return decoder.make(
    lm, prefix, C, tokens, how == 'scanned', *cache_dtype
  ), 0.02 if cache_dtype else 1e-5


@pytest.mark.parametrize('adapters', [False, True])
@pytest.mark.parametrize('kind', KINDS)
def test_decoding_gives_the_states_of_teacher_forcing(kind, adapters):
  tokens = 5
  model = nnx.Dict(language_model=llama.LanguageModel(CONFIG, rngs=nnx.Rngs(0)))
  lm = model.language_model
  if adapters:
    made = lora.init(nnx.to_pure_dict(nnx.state(model)), JANUS.lora_targets, 4, 0)
    made = {
      name: {**x, 'b': 0.1 * jax.random.normal(jax.random.key(i), x['b'].shape)}
      for i, (name, x) in enumerate(made.items())
    }
    lora.attach(model, JANUS.lora_targets, made)
  embeds = jax.random.normal(jax.random.key(1), (R, C, tokens, CONFIG.hidden_size))
  prefix = lm.prefill(
    jax.random.normal(jax.random.key(2), (R, 7, CONFIG.hidden_size)), jnp.array([7, 4, 1, 5])
  )
  wanted = lm.extend(prefix, embeds)
  made, atol = made_as(kind, lm, prefix, tokens)
  cache, step = None, jax.jit(made.step, static_argnums=3)
  for first, last in ((0, 3), (3, tokens)):
    cache = made.grow(cache, last - first)
    for t in range(first, last):
      state, cache = step(embeds[:, :, t], cache, t, last)
      np.testing.assert_allclose(state, wanted[:, :, t], atol=atol)


@pytest.mark.parametrize('kind', KINDS)
def test_the_first_of_every_two_rows_goes_on_alone(kind):
  tokens, first = 5, 3  # rows 1 and 3 end at token 3
  lm = llama.LanguageModel(CONFIG, rngs=nnx.Rngs(0))
  embeds = jax.random.normal(jax.random.key(1), (R, C, tokens, CONFIG.hidden_size))
  prefix = lm.prefill(
    jax.random.normal(jax.random.key(2), (R, 7, CONFIG.hidden_size)), jnp.array([7, 4, 1, 5])
  )
  wanted = lm.extend(prefix, embeds)
  both, atol = made_as(kind, lm, prefix, first)
  cache = both.grow(None, first)
  for t in range(first):
    state, cache = both.step(embeds[:, :, t], cache, t, first)
    np.testing.assert_allclose(state, wanted[:, :, t], atol=atol)
  alone, cache = both.first_of(2, cache, tokens)
  cache = alone.grow(cache, tokens - first)
  for t in range(first, tokens):
    state, cache = alone.step(embeds[::2, :, t], cache, t, tokens)
    np.testing.assert_allclose(state, wanted[::2, :, t], atol=atol)


def test_numbers_in_8_bits_are_the_nearest():
  x = jnp.concatenate(
    [
      jax.random.normal(jax.random.key(0), (5, 7, 33)) * jnp.logspace(-6, 6, 7)[:, None],
      jnp.zeros((5, 1, 33)),
    ],
    axis=1,
  )
  values, scale = attention.to_int8(x)
  assert values.dtype == jnp.int8 and scale.shape == (5, 8)
  np.testing.assert_array_equal(np.abs(values[:, :7]).max(-1), 127)
  assert (np.abs(values * scale[..., None] - x) <= 0.5001 * scale[..., None]).all()
  assert not np.asarray(values[:, 7]).any()


def test_attention_to_8_bits_is_attention_to_the_numbers_they_stand_for():
  def normal(key, *shape):
    return jax.random.normal(jax.random.key(key), shape)

  q, shared, own = (
    normal(0, R, N, C, 1, H),
    (normal(1, R, N, P, H), normal(2, R, N, P, H), None),
    (normal(3, R, N, C, S, H), normal(4, R, N, C, S, H)),
  )
  short = [attention.to_int8(x) for x in own]
  filled = jnp.arange(S) < 5
  long = [x.values * x.scale[..., None] for x in short]
  np.testing.assert_allclose(
    attention.attend(q, [shared, (*short, filled)]),
    attention.attend(q, [shared, (*long, filled)]),
    atol=1e-5,
  )


def test_linears_in_one_product_split_as_their_outputs_do():
  """No gather of weights where each device holds a part of every map's outputs."""
  code = """
import jax, jax.numpy as jnp, re
jax.config.update('jax_num_cpu_devices', 4)
from jax.sharding import NamedSharding, PartitionSpec as P
from types import SimpleNamespace
from dsr_jax import config, sharding
from dsr_jax.models.common import layers
mesh = sharding.make_mesh(config.Mesh(1, 1, 4))
with jax.set_mesh(mesh):
  linear = lambda k: SimpleNamespace(kernel=k)
  run = lambda x, a, b: sharding.split_vocabulary(layers.LinearsInOne(linear(a), linear(b))(x))
  def shape(s, *spec):
    return jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))
  split = shape((16, 32), None, 'tp')
  text = jax.jit(run).lower(shape((8, 16)), split, split).compile().as_text()
assert not re.search('all-gather|all-to-all|collective-permute', text), text
"""
  env = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run(
    [sys.executable, '-c', code],
    env={k: v for k, v in env.items() if k != 'XLA_FLAGS'},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-2000:]
