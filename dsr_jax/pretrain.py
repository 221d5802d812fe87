"""Trains the embedded model from scratch: text tokenizer, image tokenizer (VQ), then both tasks
jointly.

Every example is a pure function of (seed, index), so a run that is killed resumes with the same
result.
Axes: B examples, T text tokens, N image codes, K codebook size, E code width.
"""

import dataclasses
import functools
import os
import time

from absl import flags
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsr_jax import (
  cli,
  config_loading,
  convert,
  files,
  flag_types,
  images,
  pretrain_showo,
  saved_config,
)
from dsr_jax.convert import tokenizer_files
from dsr_jax.convert.showo import tokenizer_files as showo_tokenizer
from dsr_jax.errors import InputError
from dsr_jax.models.janus import model as janus
from dsr_jax.models.janus.config import JanusConfig
from dsr_jax.models.janus.processor import Processor
from dsr_jax.models.janus.vq import unit_norm
from dsr_jax.models.showo import model as showo
from dsr_jax.models.showo.config import ShowoConfig
from dsr_jax.models.unified import Picture, Scoring, Text
from dsr_jax.pretrain_parts import (
  Pools,
  language_optimizer,
  run_loop,
  tokenizer_batch,
)
from dsr_jax.runtime import workdir as workdir_lib
from dsr_jax.scenes import render, sets, world

DEFAULT_CONFIG = 'scenes_pretrain'
FAMILIES = ('janus', 'showo')  # families for which a small model can be pretrained
CODEBOOK_DECAY = 0.98
# A code is reset to a latent if its running mean of uses per batch is below this.
DEAD_COUNT = 0.02


# Image tokenizer.


def vq_loss(model, pixels, codebook, quantise):
  """Reconstruction and commitment. pixels (B, H, W, 3) in [-1, 1]; codebook (K, E) unit rows ->
  loss, (latents, codes).
  """
  z = model.latents(pixels)
  codes = jnp.argmax(z @ codebook.T, axis=-1)
  nearest = codebook[codes]
  commitment = jnp.mean(jnp.sum(jnp.square(z - nearest), axis=-1))
  through = jnp.where(quantise, z + jax.lax.stop_gradient(nearest - z), z)
  error = model.decode_latents(through) - pixels
  loss = (
    jnp.mean(jnp.abs(error))
    + 2.0 * jnp.mean(jnp.square(error))
    + 0.25 * jnp.where(quantise, commitment, 0.0)
  )
  return loss, (z.reshape(-1, z.shape[-1]), codes.reshape(-1))


def update_codebook(key, sums, counts, z, codes, restart):
  """Updates the running mean of each code's latents; with `restart`, resets unused codes to latents
  of this batch.
  """
  size = counts.shape[0]
  hit = jax.nn.one_hot(codes, size)
  counts = CODEBOOK_DECAY * counts + (1 - CODEBOOK_DECAY) * jnp.sum(hit, axis=0)
  sums = CODEBOOK_DECAY * sums + (1 - CODEBOOK_DECAY) * (hit.T @ z)
  dead = (counts < DEAD_COUNT) & restart
  fresh = z[jax.random.choice(key, z.shape[0], (size,), replace=False)]
  sums = jnp.where(dead[:, None], fresh * 10 * DEAD_COUNT, sums)
  return sums, jnp.where(dead, 10 * DEAD_COUNT, counts)


def spread_codebook(key, z, size: int, rounds: int = 15):
  """Spherical k-means with farthest-first starting points. z (M, E) unit rows -> (size, E)."""

  def add(i, state):
    centres, best = state
    centre = z[jnp.argmin(best)]
    return centres.at[i].set(centre), jnp.maximum(best, z @ centre)

  first = z[jax.random.randint(key, (), 0, z.shape[0])]
  centres = jnp.zeros((size, z.shape[1])).at[0].set(first)
  centres, _ = jax.lax.fori_loop(1, size, add, (centres, z @ first))

  def move(_, centres):
    hit = jax.nn.one_hot(jnp.argmax(z @ centres.T, axis=-1), size)
    sums = hit.T @ z
    return jnp.where(jnp.sum(hit, axis=0)[:, None] > 0, unit_norm(sums), centres)

  return jax.lax.fori_loop(0, rounds, move, centres)


def distinct_patches(pixels, z):
  """One latent per distinct patch: pixels (B, H, W, 3) uint8 and latents (B h w, E) -> (kinds, E)
  unit rows.

  Most of every image is empty ground. Codes spread over all cells would nearly all be shades of it,
  which a language model would then have to predict; codes spread over distinct patches distinguish
  things.
  """
  cells = render.patches(pixels).reshape(len(z), -1)
  _, kind = np.unique(cells, axis=0, return_inverse=True)
  sums = np.zeros((kind.max() + 1, z.shape[1]), np.float32)
  np.add.at(sums, kind.ravel(), z)
  return unit_norm(jnp.asarray(sums))


def train_picture_tokenizer(config, graphdef, params, run_dir):
  """Trains params['vqmodel'] and returns it."""
  cycles = tuple(config.vq.cycles)
  starts = [sum(cycles[:i]) for i in range(len(cycles))]
  schedule = optax.join_schedules(
    [
      optax.warmup_cosine_decay_schedule(0.0, config.vq.learning_rate, 20, steps)
      for steps in cycles
    ],
    starts[1:],
  )
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))
  size = params['vqmodel']['quantize']['embedding'].shape[0]
  vq = {k: v for k, v in params['vqmodel'].items() if k != 'quantize'}
  state = dict(
    params=vq,
    opt=optimizer.init(vq),
    sums=params['vqmodel']['quantize']['embedding'] * 0.2,
    counts=jnp.full(size, 0.2),
    step=jnp.int32(0),
  )

  def loss_fn(vq, pixels, codebook, quantise):
    model = nnx.merge(
      graphdef, {**params, 'vqmodel': {**vq, 'quantize': {'embedding': codebook}}}
    ).vqmodel
    return vq_loss(model, pixels, codebook, quantise)

  @functools.partial(jax.jit, donate_argnums=0)
  def step_fn(state, pixels):
    pixels = images.to_float(pixels)
    quantise = state['step'] >= config.vq.unquantised_steps
    codebook = unit_norm(state['sums'])
    (loss, (z, codes)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      state['params'], pixels, codebook, quantise
    )
    updates, opt = optimizer.update(grads, state['opt'])
    key = jax.random.fold_in(jax.random.key(config.seed), state['step'])
    sums, counts = update_codebook(
      key, state['sums'], state['counts'], z, codes, restart=state['step'] < starts[-1]
    )

    def keep(new, old):
      return jnp.where(quantise, new, old)

    used = jnp.sum(jnp.bincount(codes, length=size) > 0)
    new = dict(
      params=optax.apply_updates(state['params'], updates),
      opt=opt,
      sums=keep(sums, state['sums']),
      counts=keep(counts, state['counts']),
      step=state['step'] + 1,
    )
    return new, (loss, used, z)

  batch = functools.partial(tokenizer_batch, config.seed, size=config.vq.batch)

  def one(state, step):
    if step in (config.vq.unquantised_steps, *starts[1:]):
      shown = [batch(step + i) for i in range(24)]
      z = np.concatenate([step_fn(jax.tree.map(jnp.copy, state), x)[1][2] for x in shown])
      points = (
        distinct_patches(np.concatenate(shown), z) if step == starts[-1] else jnp.asarray(z[:16384])
      )
      state['sums'] = spread_codebook(jax.random.key(config.seed), points, size) * 0.2
      state['counts'] = jnp.full(size, 0.2)
    state, (loss, used, _) = step_fn(state, batch(step))
    return state, ('loss %.4f  codes used %d', (loss, used))

  state = run_loop(
    'image tokenizer', config, ('vq',), sum(cycles), state, one, os.path.join(run_dir, 'vq')
  )
  return {**state['params'], 'quantize': {'embedding': unit_norm(state['sums'])}}


def merge_ground_codes(config, graphdef, params):
  """Merges the codes of the empty ground into one per tint, and gives the freed codes to the
  patches that are hardest to distinguish.

  The ground is five sixths of an image, so training spreads dozens of codes over meaningless shades
  of it, which cost a language model about two nats per cell. Returns the tokenizer with its new
  codebook; the encoder is unchanged.
  """
  model = nnx.merge(graphdef, params).vqmodel
  codebook = np.array(model.quantize.embedding[...])
  shown = tokenizer_batch(config.seed, sum(config.vq.cycles), 512)
  latents = jax.jit(lambda x: nnx.merge(graphdef, params).vqmodel.latents(images.to_float(x)))
  z = np.concatenate([latents(x) for x in np.split(shown, 8)]).reshape(-1, codebook.shape[1])
  cells = render.patches(shown).reshape(len(z), -1)
  tints = [
    np.all(cells == np.tile(np.array(rgb, np.uint8), world.CELL**2), axis=-1)
    for rgb in render.GROUND_RGB
  ]
  codes = np.argmax(z @ codebook.T, axis=-1)
  uses, empty = (
    np.bincount(c, minlength=len(codebook)) for c in (codes, codes[np.any(tints, axis=0)])
  )
  free = np.flatnonzero((empty > 0.5 * uses) | (uses == 0))
  taken = np.setdiff1d(np.arange(len(codebook)), free)
  ground = unit_norm(np.stack([z[tint].mean(axis=0) for tint in tints]))
  kinds = np.asarray(distinct_patches(shown, z))
  kept = np.concatenate([codebook[taken], ground])
  while len(kept) < len(codebook):  # farthest first
    kept = np.concatenate([kept, kinds[np.argmin(np.max(kinds @ kept.T, axis=-1))][None]])
  cli.log(f'image tokenizer: {len(free)} codes of the empty ground merged into {len(tints)}')
  return {**params['vqmodel'], 'quantize': {'embedding': jnp.asarray(kept, jnp.float32)}}


def polish_decoder(config, graphdef, params, run_dir):
  """Trains only the decoder of params['vqmodel'], with the final codebook, and returns the whole
  tokenizer.
  """
  parts = ('decoder', 'post_quant_conv')
  fixed, trained = (
    {k: v for k, v in params['vqmodel'].items() if (k in parts) == own} for own in (False, True)
  )
  optimizer = optax.adam(
    optax.cosine_decay_schedule(config.vq.learning_rate * 0.5, config.vq.polish_steps), b2=0.99
  )
  state = dict(params=trained, opt=optimizer.init(trained), step=jnp.int32(0))

  def loss_fn(trained, pixels):
    model = nnx.merge(graphdef, {**params, 'vqmodel': {**fixed, **trained}}).vqmodel
    error = model.decode(jax.lax.stop_gradient(model.encode(pixels))) - pixels
    return jnp.mean(jnp.abs(error)) + 2.0 * jnp.mean(jnp.square(error))

  @functools.partial(jax.jit, donate_argnums=0)
  def step_fn(state, pixels):
    loss, grads = jax.value_and_grad(loss_fn)(state['params'], images.to_float(pixels))
    updates, opt = optimizer.update(grads, state['opt'])
    return dict(
      params=optax.apply_updates(state['params'], updates), opt=opt, step=state['step'] + 1
    ), loss

  def one(state, step):
    state, loss = step_fn(
      state, tokenizer_batch(config.seed, sum(config.vq.cycles) + step, config.vq.batch)
    )
    return state, ('loss %.4f', (loss,))

  state = run_loop(
    'image decoder',
    config,
    ('vq',),
    config.vq.polish_steps,
    state,
    one,
    os.path.join(run_dir, 'decoder'),
  )
  return {**fixed, **state['params']}


# Language model.


def informed_start(params):
  """Initial values that encode what is known: where patches are, what the empty ground looks like,
  and which codes look alike.

  Without them, a small vision tower spends its first thousand steps on a constant (five sixths of
  all patches are ground) and cannot distinguish positions.
  """
  vision = params['vision_model']
  table = vision['position_embedding']['embedding']
  side, quarter = int(len(table) ** 0.5), table.shape[1] // 4
  angle = jnp.arange(side)[:, None] * jnp.pi * 2.0 ** (-jnp.arange(quarter) * 4.0 / quarter)
  wave = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)  # (side, W / 2)
  rows, columns = (
    jnp.broadcast_to(w, (side, side, 2 * quarter)) for w in (wave[:, None], wave[None])
  )
  places = 0.5 * jnp.concatenate([rows, columns], axis=-1).reshape(table.shape)
  patch = vision['patch_embedding']
  ground = images.to_float(jnp.mean(jnp.asarray(render.GROUND_RGB, jnp.float32), axis=0))
  patch = {
    **patch,
    'bias': -jnp.einsum('pqcw,c->w', patch['kernel'], ground),
  }  # the ground maps to 0
  vision = {**vision, 'patch_embedding': patch, 'position_embedding': {'embedding': places}}
  codebook = params['vqmodel']['quantize']['embedding']
  alike = {'embedding': codebook * codebook.shape[1] ** 0.5}
  return {**params, 'vision_model': vision, 'generation_embeddings': alike}


def train_language_model(config, graphdef, params, processor, run_dir):
  """Trains everything but params['vqmodel'] on both tasks and returns it."""
  fixed, trained = (
    {'vqmodel': params['vqmodel']},
    {k: v for k, v in params.items() if k != 'vqmodel'},
  )
  optimizer = language_optimizer(config)
  state = dict(params=trained, opt=optimizer.init(trained), step=jnp.int32(0))

  def loss_fn(trained, batch):
    model = nnx.merge(graphdef, {**trained, **fixed})

    def pixels(name):
      return images.to_float(batch[name])

    def axis(tree):
      return jax.tree.map(lambda x: x[:, None], tree)  # one candidate per input

    codes = jax.lax.stop_gradient(model.picture_from_pixels(pixels('drawn')).codes)
    drawn = model.picture_logps(
      axis(Text(*batch['prompt'])), codes[:, None], None, Scoring(), blank=batch['blank']
    )
    picture = axis(Picture(codes, pixels('read')))
    answer = Text(*batch['answer'])
    read = model.text_logps(picture, Text(*batch['question']), axis(answer), None, Scoring())
    drawing = -jnp.mean(drawn.logp)
    # An answer has one or two words, a caption twenty: without a weight, answers would be a
    # fortieth of the loss.
    weight = answer.mask * jnp.where(batch['asked'], config.lm.question_weight, 1.0)[:, None]

    def mean(weight):
      return -jnp.sum(read.logp[:, 0] * weight) / jnp.sum(weight)

    asked = batch['asked'][:, None]
    return drawing + config.lm.text_weight * mean(weight), (
      drawing,
      mean(answer.mask * ~asked),
      mean(answer.mask * asked),
    )

  @functools.partial(jax.jit, donate_argnums=0)
  def step_fn(state, batch):
    (_, parts), grads = jax.value_and_grad(loss_fn, has_aux=True)(state['params'], batch)
    updates, opt = optimizer.update(grads, state['opt'], state['params'])
    return dict(
      params=optax.apply_updates(state['params'], updates), opt=opt, step=state['step'] + 1
    ), parts

  pools = Pools(config, processor)

  def one(state, step):
    state, losses = step_fn(state, pools.at(step))
    return state, ('nats per token: drawing %.4f  captions %.4f  answers %.4f', losses)

  state = run_loop(
    'both tasks', config, ('vq', 'lm'), config.lm.steps, state, one, os.path.join(run_dir, 'lm')
  )
  return {**state['params'], **fixed}


# The run.

_SHARES = ('lm.prompt_dropout', 'lm.question_share')  # between 0 and 1
_MAY_BE_ZERO = ('seed', 'vq.unquantised_steps', 'vq.polish_steps', 'lm.question_weight')


def check(config):
  """InputError for values that do not allow training."""
  if config.get('family', 'janus') not in FAMILIES:
    raise InputError(f'config.family is {config.family}; set it to {" or ".join(FAMILIES)}')
  numbers = {k: v for k, v in saved_config.flat(config.to_dict()).items() if k != 'family'}
  for key, value in numbers.items():
    low = 0 if key in (*_SHARES, *_MAY_BE_ZERO) else 1 if isinstance(value, int) else 1e-12
    high = 1 if key in _SHARES else float('inf')
    for number in value if isinstance(value, tuple) else (value,):
      if type(number) not in (int, float) or not low <= number <= high or number == float('inf'):
        limit = f'from {low} to {high}' if key in _SHARES else 'above 0' if low else '0 or more'
        raise InputError(f'config.{key} is {value}; use only numbers {limit}')


def pretrain(config, workdir: str) -> str:
  """Runs all stages and returns the directory of the finished model."""
  start = time.time()
  make = {'janus': _make_janus, 'showo': _make_showo}[config.get('family', 'janus')]
  target = make(config, workdir)
  facts = dict(
    config=config.to_dict(),
    device=jax.devices()[0].device_kind,
    minutes=round((time.time() - start) / 60, 1),
  )
  files.write_json(os.path.join(workdir, 'pretraining.json'), facts, indent=2)
  return target


def _make_showo(config, workdir: str) -> str:
  words = os.path.join(workdir, 'tokenizer')
  texts = sets.vocabulary_texts(20000, config.seed)
  processor = showo_tokenizer.make_tokenizer(texts, config.vocab_size, words)
  sizes = ShowoConfig.scenes(processor.vocab_size)
  sizes = dataclasses.replace(
    sizes,
    vq=dataclasses.replace(sizes.vq, bits=config.vq.bits),
    templates=processor.templates,
  )
  graphdef, params = showo.create(sizes, config.seed)
  params['vqmodel'] = pretrain_showo.train_image_tokenizer(config, graphdef, params, workdir)
  params = pretrain_showo.informed_start(params, sizes, config.seed)
  params = pretrain_showo.train_language_model(config, graphdef, params, processor, workdir)
  target = os.path.join(workdir, 'model')
  convert.save(
    target,
    sizes,
    jax.tree.map(np.asarray, params),
    words,
    guidance=config.guidance,
    overwrite=True,
    layout='showo',
  )
  return target


def _make_janus(config, workdir: str) -> str:
  words = os.path.join(workdir, 'tokenizer')
  texts = sets.vocabulary_texts(20000, config.seed)
  tokenizer_files.make_tokenizer(texts, config.vocab_size, words)
  processor = Processor.from_directory(words, vocab_size=config.vocab_size)
  # Do not mask special tokens here: the model itself must learn never to write them, in case it is
  # sampled without a mask.
  templates = dataclasses.replace(processor.templates, forbidden_text_ids=())
  model_config = dataclasses.replace(JanusConfig.scenes(config.vocab_size), templates=templates)
  graphdef, params = janus.create(model_config, config.seed)
  params['vqmodel'] = train_picture_tokenizer(config, graphdef, params, workdir)
  params['vqmodel'] = merge_ground_codes(config, graphdef, params)
  params = train_language_model(config, graphdef, informed_start(params), processor, workdir)
  # The codes do not change, so this may come after the language model.
  params['vqmodel'] = polish_decoder(config, graphdef, params, workdir)
  target = os.path.join(workdir, 'model')
  convert.save(
    target,
    model_config,
    jax.tree.map(np.asarray, params),
    words,
    guidance=config.guidance,
    overwrite=True,
  )
  return target


def main(argv, f=flags.FLAGS):
  """Prints the directory of the finished model."""
  cli.no_arguments(argv)
  cli.require(workdir=f.workdir)
  check(f.config)
  workdir_lib.check_writable(f.workdir)
  with workdir_lib.locked(f.workdir):
    cli.print_text(pretrain(f.config, f.workdir), kept=f.workdir)


def define_flags(f=flags.FLAGS):
  config_loading.define_config_flag(
    'config', 'Config file of the training.', f, default=DEFAULT_CONFIG
  )
  flag_types.define_path(
    'workdir',
    None,
    'Folder for all outputs of the run; the result is WORKDIR/model.',
    f,
  )


if __name__ == '__main__':
  cli.run_main(main, define_flags)
