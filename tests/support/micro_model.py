"""The smallest model behind the protocol: a bag of words, one layer, four-colour pictures. It
compiles in a second where a Janus takes many.

Its parameters carry Janus' names, so that sharding, training by parts and adapters find what they
look for.
Axes: B inputs, G candidates, T tokens, N codes, D width, V vocabulary, K codes in the codebook.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from dsr_jax.models.common.layers import Embedding, Linear, RMSNorm, layer_at, stack_layers
from dsr_jax.models.common.logprobs import TokenScores, guide, log_softmax
from dsr_jax.models.unified import Picture, Sampling, Scoring, Text, without_eos

WIDTH, VOCABULARY, CODES, SIDE, PATCH = 8, 40, 6, 4, 4  # SIDE x SIDE codes of PATCH x PATCH pixels
NUM_CODES, PAD, EOS = SIDE * SIDE, 0, 2


class _Attention(nnx.Module):
  def __init__(self, rngs):
    for name in ('q_proj', 'k_proj', 'v_proj', 'o_proj'):
      setattr(self, name, Linear(WIDTH, WIDTH, rngs=rngs, bias=False))


class _MLP(nnx.Module):
  def __init__(self, rngs):
    for name in ('gate_proj', 'up_proj', 'down_proj'):
      setattr(self, name, Linear(WIDTH, WIDTH, rngs=rngs, bias=False))


class _Block(nnx.Module):
  def __init__(self, rngs):
    self.self_attn, self.mlp = _Attention(rngs), _MLP(rngs)

  def __call__(self, x, context):
    """No attention: the context is one vector for all tokens."""
    a, m = self.self_attn, self.mlp
    x = x + a.o_proj(jnp.tanh(a.q_proj(x) + a.k_proj(context) + a.v_proj(x * context)))
    return x + m.down_proj(jax.nn.silu(m.gate_proj(x)) * m.up_proj(x))


class _LanguageModel(nnx.Module):
  def __init__(self, rngs):
    self.embed_tokens = Embedding(VOCABULARY, WIDTH, rngs=rngs, scale=1.0)
    self.layers = stack_layers(_Block, 1, rngs)
    self.norm = RMSNorm(WIDTH, 1e-6)

  def __call__(self, x, context):
    return self.norm(layer_at(self.layers, 0)(x, context))


class _GenerationHead(nnx.Module):
  def __init__(self, rngs):
    self.proj_out = Linear(WIDTH, WIDTH, rngs=rngs)
    self.vision_head = Linear(WIDTH, CODES, rngs=rngs)

  def __call__(self, x):
    return self.vision_head(jnp.tanh(self.proj_out(x)))


class Micro(nnx.Module):
  """Satisfies `unified.UnifiedModel`."""

  likelihood_is_random = False

  def __init__(self, rngs):
    self.language_model = _LanguageModel(rngs)
    self.lm_head = Linear(WIDTH, VOCABULARY, rngs=rngs, bias=False)
    self.generation_head = _GenerationHead(rngs)
    self.generation_embeddings = Embedding(CODES, WIDTH, rngs=rngs, scale=1.0)
    self.vision_model = Linear(PATCH * PATCH * 3, WIDTH, rngs=rngs)
    self.vqmodel = Embedding(CODES, 3, rngs=rngs, scale=0.5)  # a colour a code

  def picture_from_pixels(self, pixels):
    patches = self._patches(pixels).mean(-2)  # (..., N, 3)
    distance = jnp.sum(jnp.square(patches[..., None, :] - self.vqmodel.embedding[...]), axis=-1)
    return Picture(jnp.argmin(distance, axis=-1).astype(jnp.int32), pixels)

  def picture_from_codes(self, codes):
    colours = jnp.clip(self.vqmodel(codes), -1, 1).reshape(*codes.shape[:-1], SIDE, SIDE, 3)
    return Picture(codes, jnp.repeat(jnp.repeat(colours, PATCH, axis=-3), PATCH, axis=-2))

  def _patches(self, pixels):
    x = pixels.reshape(*pixels.shape[:-3], SIDE, PATCH, SIDE, PATCH, 3)
    return jnp.moveaxis(x, -3, -4).reshape(*pixels.shape[:-3], NUM_CODES, PATCH * PATCH, 3)

  def _bag(self, text):
    """(..., T) -> (..., D)."""
    x = self.language_model.embed_tokens(text.ids) * text.mask[..., None]
    return jnp.sum(x, axis=-2) / jnp.maximum(jnp.sum(text.mask, axis=-1), 1)[..., None]

  def _told(self, prompt, guided):
    """What is asked to be drawn, (..., 1 or 2, D): with and without the words."""
    bag = self._bag(without_eos(prompt, EOS))
    return jnp.stack([bag, jnp.zeros_like(bag)], axis=-2) if guided else bag[..., None, :]

  def _seen(self, pixels, question):
    """pixels (..., H, W, 3), question broadcast to it -> (..., D)."""
    patches = self._patches(pixels.astype(self.vision_model.kernel[...].dtype))
    looks = self.vision_model(patches.reshape(*patches.shape[:-2], -1))
    return jnp.mean(
      jnp.tanh(looks) * (1 + jnp.arange(NUM_CODES) % 3)[:, None], axis=-2
    ) + 0.1 * self._bag(question)

  def _code_logits(self, previous, place, told, guidance):
    """previous (...) codes, place of the next, told (..., 1 or 2, D) -> (..., K)."""
    x = self.generation_embeddings(previous) * (place > 0)[..., None]
    x = jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], told.shape[-2], WIDTH))
    logits = self.generation_head(self.language_model(x, jnp.broadcast_to(told, x.shape)))
    return guide(logits, guidance, axis=-2) if told.shape[-2] == 2 else logits[..., 0, :]

  def _text_logits(self, previous, seen):
    x = self.language_model.embed_tokens(previous)
    return self.lm_head(self.language_model(x, jnp.broadcast_to(seen, x.shape)))

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
    seen = jnp.broadcast_to(self._seen(picture.pixels, question)[:, None], (*keys.shape, WIDTH))

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


def create(seed: int = 0):
  """(graphdef, params) as `models.janus.create` gives them."""
  graphdef, state = nnx.split(Micro(nnx.Rngs(seed)))
  return graphdef, nnx.to_pure_dict(state)


@dataclasses.dataclass(frozen=True)
class Templates:
  """All that the step asks of a model's templates."""

  eos_id: int = EOS
