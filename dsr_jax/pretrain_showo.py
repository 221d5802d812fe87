"""Trains a small Show-o from scratch: image tokenizer, then both tasks jointly.

The image tokenizer is taught which code each patch has. Left to itself, as an autoencoder with the
original's two losses of the quantizer, it gave the same patch of ground dozens of codes, depending
on what stood around it, and the language model learned to draw badly (docs/showo.md).

As in the original (showlab/Show-o training/train.py), the language model learns to draw by
unmasking (the share of masked codes is the cosine of a uniform number) and to predict the next text
token; a tenth of the prompts is dropped, for guidance.
Axes: B examples, T text tokens, N image codes.
"""

import functools
import os
import warnings

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import cluster, optimize

from dsr_jax import images
from dsr_jax.models.showo import magvit, maskgit
from dsr_jax.models.unified import Picture, Scoring, Text
from dsr_jax.pretrain_parts import Pools, language_optimizer, run_loop, tokenizer_batch
from dsr_jax.scenes import render

TAUGHT_IMAGES = 3000  # whose patches are given codes


def teach_codes(patches, bits: int, seed: int):
  """Assigns a code to every distinct patch: (M, C) uint8 -> patches (kinds, C), codes (kinds,).

  2**bits groups of patches by k-means, each distinct patch counted once. A group's code has the
  bits that are nearest to its principal components, whitened and rotated (iterative quantization,
  Gong and Lazebnik, CVPR 2011), with no code given twice. So a bit is nearly a linear function of
  the pixels, and the pixels of the bits, which small networks learn soon.
  """
  kinds = np.unique(patches, axis=0)
  points = kinds.astype(np.float64)
  size = 2**bits
  if len(kinds) <= size:
    centers, group = points, np.arange(len(kinds))
  else:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # an empty group only leaves its code unused
      centers, group = cluster.vq.kmeans2(points, size, minit='++', rng=seed)
  components = np.linalg.svd(centers - centers.mean(axis=0), full_matrices=False)[0][:, :bits]
  signs = np.asarray(magvit.signs_of(np.arange(size), bits))
  rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(bits, bits)))[0]
  for _ in range(30):
    _, codes = optimize.linear_sum_assignment(-(components @ rotation) @ signs.T)
    left, _, right = np.linalg.svd(components.T @ signs[codes])
    rotation = left @ right
  return kinds, codes[group]


def image_loss(model, pixels, codes):
  """The encoder must write the taught codes, the decoder draw from them. pixels (B, H, W, 3) in
  [-1, 1]; codes (B, N) -> loss, (the decoder's part, the share of right codes).
  """
  z = model.latents(pixels)
  z = z.reshape(*codes.shape, -1)
  bits = magvit.signs_of(codes, z.shape[-1])
  taught = jnp.mean(jnp.square(jax.nn.relu(1.0 - bits * z)))
  error = model.decode(codes) - pixels
  drawn = jnp.mean(jnp.abs(error)) + 2.0 * jnp.mean(jnp.square(error))
  return taught + drawn, (drawn, jnp.mean(magvit.codes_of(z) == codes))


class Lesson:
  """Looks up the taught codes of images, (B, H, W, 3) uint8 -> (B, N) int32."""

  def __init__(self, seed: int, bits: int):
    shown = render.patches(tokenizer_batch(seed, 0, TAUGHT_IMAGES))
    self.kinds, self.codes = teach_codes(shown.reshape(-1, shown.shape[-1]), bits, seed)
    self._known = {kind.tobytes(): code for kind, code in zip(self.kinds, self.codes)}

  def __call__(self, pixels):
    patches = np.ascontiguousarray(render.patches(pixels))
    flat = patches.reshape(-1, patches.shape[-1])
    found = [self._known.get(patch.tobytes(), -1) for patch in flat]
    for i in (i for i, code in enumerate(found) if code < 0):  # a rare patch: as the nearest
      far = np.sum(np.square(self.kinds.astype(np.int32) - flat[i]), axis=-1)
      found[i] = self.codes[np.argmin(far)]
    return np.asarray(found, np.int32).reshape(patches.shape[:-1])


def train_image_tokenizer(config, graphdef, params, run_dir):
  """Trains params['vqmodel'] and returns it."""
  steps = config.vq.steps
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, config.vq.learning_rate, min(20, steps // 2), steps
  )
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))
  trained = params['vqmodel']
  state = dict(params=trained, opt=optimizer.init(trained), step=jnp.int32(0))
  # only when a step needs it: a finished stage does not
  lesson = functools.cache(lambda: Lesson(config.seed, config.vq.bits))

  def loss_fn(trained, pixels, codes):
    model = nnx.merge(graphdef, {**params, 'vqmodel': trained}).vqmodel
    return image_loss(model, pixels, codes)

  @functools.partial(jax.jit, donate_argnums=0)
  def step_fn(state, pixels, codes):
    (_, (drawn, right)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      state['params'], images.to_float(pixels), codes
    )
    updates, opt = optimizer.update(grads, state['opt'])
    return dict(
      params=optax.apply_updates(state['params'], updates), opt=opt, step=state['step'] + 1
    ), (drawn, 100 * right)

  def one(state, step):
    pixels = tokenizer_batch(config.seed, step, config.vq.batch)
    state, numbers = step_fn(state, pixels, lesson()(pixels))
    return state, ('decoder %.4f  codes right %.2f %%', numbers)

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
