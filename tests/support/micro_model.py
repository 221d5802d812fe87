"""The smallest models behind the protocol: a bag of words, one layer, four-color pictures. They
compile in a second where a Janus takes many.

They are a backbone of their own, with a family of their own (`MICRO`) and names that no other
backbone has: what works on them depends on the protocol alone. `Micro` reads pixels and has an
  exact
sampler. `NoisyMicro` is like masked diffusion: it reads codes, its likelihoods take chance, and its
sampler's log-probabilities are not its likelihoods.
Axes: B inputs, G samples, T tokens, N codes, D width, V vocabulary, K codes in the codebook.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from dsr_jax import sharding
from dsr_jax.models.common.layers import Embedding, Linear, RMSNorm, layer_at, stack_layers
from dsr_jax.models.common.logprobs import TokenScores, guide, log_softmax
from dsr_jax.models.unified import Family, Picture, Sampling, Scoring, Spec, Text, without_eos

WIDTH, VOCABULARY, CODES, SIDE, PATCH = 8, 40, 6, 4, 4  # SIDE x SIDE codes of PATCH x PATCH pixels
NUM_CODES, PAD, EOS = SIDE * SIDE, 0, 2


class _Mix(nnx.Module):
  def __init__(self, rngs):
    for name in ('query', 'key', 'value', 'out'):
      setattr(self, name, Linear(WIDTH, WIDTH, rngs=rngs, bias=False))


class _MLP(nnx.Module):
  def __init__(self, rngs):
    for name in ('gate', 'up', 'down'):
      setattr(self, name, Linear(WIDTH, WIDTH, rngs=rngs, bias=False))


class _Block(nnx.Module):
  def __init__(self, rngs):
    self.mix, self.mlp = _Mix(rngs), _MLP(rngs)

  def __call__(self, x, context):
    """No attention: the context is one vector for all tokens."""
    a, m = self.mix, self.mlp
    x = x + a.out(jnp.tanh(a.query(x) + a.key(context) + a.value(x * context)))
    return x + m.down(jax.nn.silu(m.gate(x)) * m.up(x))


class _Trunk(nnx.Module):
  def __init__(self, rngs):
    self.words = Embedding(VOCABULARY, WIDTH, rngs=rngs, scale=1.0)
    self.blocks = stack_layers(_Block, 1, rngs)
    self.norm = RMSNorm(WIDTH, 1e-6)

  def __call__(self, x, context):
    return self.norm(layer_at(self.blocks, 0)(x, context))


class _CodeHead(nnx.Module):
  def __init__(self, rngs):
    self.inner = Linear(WIDTH, WIDTH, rngs=rngs)
    self.outer = Linear(WIDTH, CODES, rngs=rngs)

  def __call__(self, x):
    return self.outer(jnp.tanh(self.inner(x)))


class Micro(nnx.Module):
  """Satisfies `unified.UnifiedModel`."""

  spec = Spec(
    eos_id=EOS, num_codes=NUM_CODES, codebook_size=CODES, image_size=SIDE * PATCH, max_pictures=0
  )

  def __init__(self, rngs):
    self.trunk = _Trunk(rngs)
    self.word_head = Linear(WIDTH, VOCABULARY, rngs=rngs, bias=False)
    self.code_head = _CodeHead(rngs)
    self.code_table = Embedding(CODES, WIDTH, rngs=rngs, scale=1.0)
    self.eye = Linear(PATCH * PATCH * 3, WIDTH, rngs=rngs)
    self.palette = Embedding(CODES, 3, rngs=rngs, scale=0.5)  # a color a code

  def picture_from_pixels(self, pixels):
    patches = self._patches(pixels).mean(-2)  # (..., N, 3)
    distance = jnp.sum(jnp.square(patches[..., None, :] - self.palette.embedding[...]), axis=-1)
    return Picture(jnp.argmin(distance, axis=-1).astype(jnp.int32), pixels)

  def picture_from_codes(self, codes):
    colors = jnp.clip(self.palette(codes), -1, 1).reshape(*codes.shape[:-1], SIDE, SIDE, 3)
    return Picture(codes, jnp.repeat(jnp.repeat(colors, PATCH, axis=-3), PATCH, axis=-2))

  def _patches(self, pixels):
    x = pixels.reshape(*pixels.shape[:-3], SIDE, PATCH, SIDE, PATCH, 3)
    return jnp.moveaxis(x, -3, -4).reshape(*pixels.shape[:-3], NUM_CODES, PATCH * PATCH, 3)

  def _bag(self, text):
    """(..., T) -> (..., D)."""
    x = self.trunk.words(text.ids) * text.mask[..., None]
    return jnp.sum(x, axis=-2) / jnp.maximum(jnp.sum(text.mask, axis=-1), 1)[..., None]

  def _told(self, prompt, guided):
    """What is asked to be drawn, (..., 1 or 2, D): with and without the words."""
    bag = self._bag(without_eos(prompt, EOS))
    return jnp.stack([bag, jnp.zeros_like(bag)], axis=-2) if guided else bag[..., None, :]

  def _seen(self, pixels, question):
    """pixels (..., H, W, 3), question broadcast to it -> (..., D)."""
    return self._looks(pixels) + 0.1 * self._bag(question)

  def _looks(self, pixels):
    """pixels (..., H, W, 3) -> (..., D)."""
    patches = self._patches(pixels.astype(self.eye.kernel[...].dtype))
    looks = self.eye(patches.reshape(*patches.shape[:-2], -1))
    return jnp.mean(jnp.tanh(looks) * (1 + jnp.arange(NUM_CODES) % 3)[:, None], axis=-2)

  def _code_logits(self, previous, place, told, guidance):
    """previous (...) codes, place of the next, told (..., 1 or 2, D) -> (..., K)."""
    x = self.code_table(previous) * (place > 0)[..., None]
    x = jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], told.shape[-2], WIDTH))
    logits = self.code_head(self.trunk(x, jnp.broadcast_to(told, x.shape)))
    return guide(logits, guidance, axis=-2) if told.shape[-2] == 2 else logits[..., 0, :]

  def _text_logits(self, previous, seen):
    x = self.trunk.words(previous)
    return self.word_head(self.trunk(x, jnp.broadcast_to(seen, x.shape)))

  def sample_pictures(self, prompt: Text, keys, how: Sampling):
    told = self._told(prompt, how.guidance != 1.0)[:, None]
    told = jnp.broadcast_to(told, (*keys.shape, *told.shape[2:]))

    def body(previous, t):
      codes, logp = _sample(
        self._code_logits(previous, jnp.full(keys.shape, t), told, how.guidance),
        keys,
        t,
        how.temperature,
      )
      return codes, (codes, logp)

    _, out = jax.lax.scan(body, jnp.zeros(keys.shape, jnp.int32), jnp.arange(NUM_CODES))
    return tuple(jnp.moveaxis(x, 0, -1) for x in out)

  def sample_texts(self, picture: Picture, question: Text, keys, how: Sampling):
    seen = self._seen(picture.pixels, question)[:, None]
    return self._write(jnp.broadcast_to(seen, (*keys.shape, WIDTH)), keys, how)

  def read(self, pictures: Picture, mask):
    """The mean of what is seen in the row's own pictures, (B, D)."""
    seen = self._looks(pictures.pixels) * mask[..., None]
    return jnp.sum(seen, axis=1) / jnp.sum(mask, axis=1)[:, None]

  def answer(self, reading, question: Text, keys, how: Sampling):
    return self._write(reading[:, None] + 0.1 * self._bag(question), keys, how)

  def _write(self, seen, keys, how: Sampling):
    """Texts about what is seen: seen (B, G, D), keys (B, G) -> Text (B, G, T), logps (B, G, T)."""

    def body(carry, t):
      previous, ended = carry
      ids, logp = _sample(self._text_logits(previous, seen), keys, t, how.temperature)
      ids = jnp.where(ended, PAD, ids)
      return (ids, ended | (ids == EOS)), (ids, jnp.where(ended, 0.0, logp), ~ended)

    start = jnp.ones(keys.shape, jnp.int32), jnp.zeros(keys.shape, bool)
    _, out = jax.lax.scan(body, start, jnp.arange(how.max_tokens))
    ids, logp, mask = (jnp.moveaxis(x, 0, -1) for x in out)
    return Text(ids, mask), logp

  def picture_logps(self, prompt: Text, codes, keys, how: Scoring):
    del keys
    told = self._told(prompt, how.guidance != 1.0)[:, :, None]  # (B, g, 1, branches, D)
    previous = jnp.pad(codes[..., :-1], [(0, 0)] * (codes.ndim - 1) + [(1, 0)])
    shape = jnp.broadcast_shapes(told.shape[:3], codes.shape)
    told = jnp.broadcast_to(told, (*shape, *told.shape[3:]))
    previous, codes = (jnp.broadcast_to(x, shape) for x in (previous, codes))
    logits = self._code_logits(
      previous, jnp.broadcast_to(jnp.arange(NUM_CODES), shape), told, how.guidance
    )
    return _scores(logits, codes, jnp.ones(shape, bool), how.temperature)

  def text_logps(self, picture: Picture, question: Text, text: Text, keys, how: Scoring):
    del keys
    seen = self._seen(picture.pixels, Text(question.ids[:, None], question.mask[:, None]))[
      :, :, None
    ]
    previous = jnp.pad(
      text.ids[..., :-1], [(0, 0)] * (text.ids.ndim - 1) + [(1, 0)], constant_values=1
    )
    shape = jnp.broadcast_shapes(seen.shape[:3], text.ids.shape)
    previous, ids, mask = (jnp.broadcast_to(x, shape) for x in (previous, text.ids, text.mask))
    return _scores(
      self._text_logits(previous, jnp.broadcast_to(seen, (*shape, WIDTH))),
      ids,
      mask,
      how.temperature,
    )


def _sample(logits, keys, index, temperature):
  logp = log_softmax(logits, temperature)

  def draw(key, row):
    return jax.random.categorical(jax.random.fold_in(key, index), row)

  ids = jax.vmap(jax.vmap(draw))(keys, logp).astype(jnp.int32)
  return ids, jnp.take_along_axis(logp, ids[..., None], axis=-1)[..., 0]


def _scores(logits, ids, mask, temperature):
  logp = log_softmax(logits, temperature)
  picked = jnp.take_along_axis(logp, ids[..., None], axis=-1)[..., 0]
  entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
  return TokenScores(jnp.where(mask, picked, 0.0), jnp.where(mask, entropy, 0.0))


class NoisyMicro(Micro):
  """As a masked-diffusion model: random likelihoods, an inexact sampler, pictures read as codes."""

  spec = dataclasses.replace(
    Micro.spec,
    reads='codes',
    likelihood_is_random=True,
    sampler_is_exact=False,
    text_sampler_is_exact=False,
  )

  def sample_pictures(self, prompt: Text, keys, how: Sampling):
    codes, logps = super().sample_pictures(prompt, keys, how)
    return codes, 0.5 * logps  # not the likelihood of what was sampled

  def picture_logps(self, prompt: Text, codes, keys, how: Scoring):
    """Words of the prompt are dropped at random, the same ones for all samples of an input."""
    assert keys.shape == codes.shape[:1], (keys.shape, codes.shape)
    length = prompt.ids.shape[-1]
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 0.7, (length,)))(keys)
    dropped = Text(prompt.ids, prompt.mask & keep[:, None])
    return super().picture_logps(dropped, codes, None, how)

  def text_logps(self, picture: Picture, question: Text, text: Text, keys, how: Scoring):
    assert keys.shape == text.ids.shape[:1], (keys.shape, text.ids.shape)
    return super().text_logps(self._shown(picture), question, text, None, how)

  def sample_texts(self, picture: Picture, question: Text, keys, how: Sampling):
    return super().sample_texts(self._shown(picture), question, keys, how)

  def read(self, pictures: Picture, mask):
    return super().read(self._shown(pictures), mask)

  def _shown(self, picture: Picture) -> Picture:
    """Only the codes are looked at."""
    return self.picture_from_codes(picture.codes)


@dataclasses.dataclass(frozen=True)
class Templates:
  """All that the commands ask of a model's templates."""

  eos_id: int = EOS


@dataclasses.dataclass(frozen=True)
class MicroConfig:
  """The sizes are constants of this file; noisy: `NoisyMicro`."""

  noisy: bool = False
  templates: Templates = Templates()
  image_size: int = SIDE * PATCH
  num_codes: int = NUM_CODES

  @property
  def module(self):
    return NoisyMicro if self.noisy else Micro


def create(seed: int = 0, config: MicroConfig = MicroConfig()):
  """(graphdef, params) as `models.janus.model.create` gives them."""
  graphdef, state = nnx.split(config.module(nnx.Rngs(seed)))
  return graphdef, nnx.to_pure_dict(state)


def _shapes(config):
  return jax.eval_shape(lambda: create(0, config)[1])


MICRO = Family(
  name='Micro',
  config_type=MicroConfig,
  graphdef=lambda config: create(0, config)[0],
  shapes=_shapes,
  spec=lambda config: config.module.spec,
  num_heads=lambda config: 1,
  sharding_rules=(
    (r'trunk/blocks/.*/(query|key|value|gate|up)/kernel$', sharding.STACKED_TP_OUT),
    (r'trunk/blocks/.*/(out|down)/kernel$', sharding.STACKED_TP_IN),
    (r'trunk/words/embedding$', sharding.TP_IN),
    (r'word_head/kernel$', sharding.TP_OUT),
    (r'code_head/inner/kernel$', sharding.TP_IN),
    (r'code_head/outer/kernel$', sharding.TP_OUT),
    (r'(eye|palette|code_table)/', sharding.WHOLE),
  ),
  trainable_parts={
    'language_model+gen_head': ('trunk', 'word_head', 'code_head'),
    'language_model': ('trunk', 'word_head'),
    'all_but_vq': ('trunk', 'word_head', 'code_head', 'code_table', 'eye'),
    'lora': (),
  },
  image_tokenizer='palette',
  lora_targets={
    **{name: ('trunk', 'blocks', 'mix', name) for name in ('query', 'key', 'value', 'out')},
    **{name: ('trunk', 'blocks', 'mlp', name) for name in ('gate', 'up', 'down')},
  },
)
