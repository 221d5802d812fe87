"""Trains a small Show-o from scratch: image tokenizer, then both tasks jointly.

The image tokenizer is first a plain autoencoder, then quantizes to signs, with the two losses that
keep latents near their signs and all bits in use. As in the original (showlab/Show-o
training/train.py), the language model learns to draw by unmasking (the share of masked codes is the
cosine of a uniform number) and to predict the next text token; a tenth of the prompts is dropped,
for guidance.
Axes: B examples, T text tokens, N image codes.
"""

import functools
import os

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from dsr_jax import images
from dsr_jax.models.showo import magvit, maskgit
from dsr_jax.models.unified import Picture, Scoring, Text
from dsr_jax.pretrain_parts import Pools, language_optimizer, run_loop, tokenizer_batch


def image_loss(model, pixels, quantized):
  """Reconstruction, and the quantizer's two losses. pixels (B, H, W, 3) in [-1, 1] -> loss,
  codes.
  """
  z = model.latents(pixels)
  signs = jnp.where(z > 0, 1.0, -1.0)
  through = jnp.where(quantized, z + jax.lax.stop_gradient(signs - z), z)
  error = model.decoder(through) - pixels
  kept = sum(magvit.quantizer_losses(z))
  loss = (
    jnp.mean(jnp.abs(error)) + 2.0 * jnp.mean(jnp.square(error)) + jnp.where(quantized, kept, 0.0)
  )
  return loss, magvit.codes_of(z)


def train_image_tokenizer(config, graphdef, params, run_dir):
  """Trains params['vqmodel'] and returns it."""
  steps = config.vq.steps
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, config.vq.learning_rate, min(20, steps // 2), steps
  )
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))
  trained = params['vqmodel']
  state = dict(params=trained, opt=optimizer.init(trained), step=jnp.int32(0))

  def loss_fn(trained, pixels, quantized):
    model = nnx.merge(graphdef, {**params, 'vqmodel': trained}).vqmodel
    return image_loss(model, pixels, quantized)

  @functools.partial(jax.jit, donate_argnums=0)
  def step_fn(state, pixels):
    quantized = state['step'] >= config.vq.unquantised_steps
    (loss, codes), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      state['params'], images.to_float(pixels), quantized
    )
    updates, opt = optimizer.update(grads, state['opt'])
    used = jnp.sum(jnp.bincount(codes.ravel(), length=2**config.vq.bits) > 0)
    return dict(
      params=optax.apply_updates(state['params'], updates), opt=opt, step=state['step'] + 1
    ), (loss, used)

  def one(state, step):
    state, numbers = step_fn(state, tokenizer_batch(config.seed, step, config.vq.batch))
    return state, ('loss %.4f  codes used %d', numbers)

  folder = os.path.join(run_dir, 'vq')
  return run_loop('image tokenizer', config, ('vq',), config.vq.steps, state, one, folder)['params']


def masked_share(key, examples: int, codes: int):
  """Which codes to mask, (B, N) bool: a share cos(pi u / 2) of each image, with uniform u."""
  of_share, of_places = jax.random.split(key)
  share = jnp.cos(jax.random.uniform(of_share, (examples,)) * jnp.pi / 2)
  count = jnp.maximum(jnp.round(codes * share), 1)
  return maskgit.least_sure(jax.random.uniform(of_places, (examples, codes)), count[:, None])


def language_loss(model, batch, key, config):
  """The loss, and the nats per token of drawing, captions and answers."""
  examples = batch['drawn'].shape[0]

  def codes(name):
    return jax.lax.stop_gradient(model.picture_from_pixels(images.to_float(batch[name])).codes)

  drawn = codes('drawn')
  masked = masked_share(key, examples, drawn.shape[1])
  scores = model.masked_logps(
    Text(*batch['prompt']), drawn, masked, Scoring(), blank=batch['blank']
  )
  drawing = -jnp.sum(scores.logp) / jnp.sum(masked)

  picture, answer = Picture(codes('read')[:, None], None), Text(*batch['answer'])
  one_each = Text(*(x[:, None] for x in answer))
  read = model.text_logps(picture, Text(*batch['question']), one_each, None, Scoring())
  # An answer has one or two words, a caption twenty: without a weight, answers would be a fortieth
  # of the loss.
  weight = answer.mask * jnp.where(batch['asked'], config.lm.question_weight, 1.0)[:, None]

  def mean(weight):
    return -jnp.sum(read.logp[:, 0] * weight) / jnp.sum(weight)

  asked = batch['asked'][:, None]
  parts = drawing, mean(answer.mask * ~asked), mean(answer.mask * asked)
  return drawing + config.lm.text_weight * mean(weight), parts


def informed_start(params, sizes, seed: int):
  """Initial values that encode which codes look alike: each bit has its own direction in the
  embedding and in the head, and a code is the sum of its bits' directions.

  Most codes are rare, and without this, a small model must learn each one separately.
  sizes: `ShowoConfig`.
  """
  codes = slice(sizes.first_code, sizes.mask_id)
  words = params['language_model']['embed_tokens']['embedding']
  head = params['lm_head']['kernel']
  directions = jax.random.normal(jax.random.key(seed), (sizes.vq.bits, words.shape[1]))
  alike = magvit.signs_of(jnp.arange(sizes.vq.num_embeddings), sizes.vq.bits) @ directions
  alike /= jnp.std(alike)
  words = words.at[codes].set(alike * jnp.std(words[codes]))
  head = head.at[:, codes].set(alike.T * jnp.std(head[:, codes]))
  language_model = {**params['language_model'], 'embed_tokens': {'embedding': words}}
  lm_head = {**params['lm_head'], 'kernel': head}
  return {**params, 'language_model': language_model, 'lm_head': lm_head}


def train_language_model(config, graphdef, params, processor, run_dir):
  """Trains everything but params['vqmodel'] on both tasks and returns all parameters."""
  fixed = {'vqmodel': params['vqmodel']}
  trained = {name: part for name, part in params.items() if name != 'vqmodel'}
  optimizer = language_optimizer(config)
  state = dict(params=trained, opt=optimizer.init(trained), step=jnp.int32(0))

  def loss_fn(trained, batch, key):
    return language_loss(nnx.merge(graphdef, {**trained, **fixed}), batch, key, config)

  @functools.partial(jax.jit, donate_argnums=0)
  def step_fn(state, batch):
    key = jax.random.fold_in(jax.random.key(config.seed), state['step'])
    (_, parts), grads = jax.value_and_grad(loss_fn, has_aux=True)(state['params'], batch, key)
    updates, opt = optimizer.update(grads, state['opt'], state['params'])
    return dict(
      params=optax.apply_updates(state['params'], updates), opt=opt, step=state['step'] + 1
    ), parts

  pools = Pools(config, processor)

  def one(state, step):
    state, losses = step_fn(state, pools.at(step))
    return state, ('nats per token: drawing %.4f  captions %.4f  answers %.4f', losses)

  folder = os.path.join(run_dir, 'lm')
  state = run_loop('both tasks', config, ('vq', 'lm'), config.lm.steps, state, one, folder)
  return {**state['params'], **fixed}
