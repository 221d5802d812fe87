"""Makes the embedded model from nothing: word tokenizer, picture tokenizer (VQ), then both tasks
jointly.

Every example is a pure function of (seed, index), so a run that is killed continues as if it had
not been.
Axes: B examples, T text tokens, N image codes, K codebook size, E code width.
"""

import concurrent.futures
import dataclasses
import functools
import json
import os
import time

from absl import flags
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsr_jax import cli, config_loading, convert, files, flag_types, images, saved_config
from dsr_jax.convert import tokenizer_files
from dsr_jax.errors import InputError
from dsr_jax.models.janus import model as janus
from dsr_jax.models.janus.config import JanusConfig
from dsr_jax.models.janus.processor import Processor
from dsr_jax.models.janus.vq import unit_norm
from dsr_jax.models.unified import Picture, Scoring, Text
from dsr_jax.runtime import checkpoints
from dsr_jax.runtime import workdir as workdir_lib
from dsr_jax.scenes import grammar, render, sets, world

DEFAULT_CONFIG = 'scenes_pretrain'
CODEBOOK_DECAY = 0.98
# A code used less than this a batch, on the running mean, is started again from a latent.
DEAD_COUNT = 0.02
TEXT_BUCKET = 16  # captions are padded to a multiple of this: few shapes, few compilations
QUESTION_TOKENS = 24
# So many batches are drawn together and sorted by text length: little padding is computed.
SORTED_BATCHES = 8


# Data.


def tokenizer_picture(seed: int, index: int):
  """A crowded picture with uniform looks, (32, 32, 3) uint8.

  The picture tokenizer sees every pair of shape and surface; which pairs go with which words is the
  language model's part, and that is pretrained without the held-out ones.
  """
  rng = np.random.default_rng((101, seed, index))
  while True:
    scene = world.random_scene(
      rng, skewed=False, held_out='include', kind='mixed' if index % 4 else None
    )
    if sets.split_of(scene) == 'pretraining':
      return render.render(scene)


def tokenizer_batch(seed: int, step: int, size: int):
  return np.stack([tokenizer_picture(seed, step * size + i) for i in range(size)])


def language_batches(config, processor, pool: int):
  """SORTED_BATCHES batches of captioned pictures, each padded to its own longest text."""
  count = SORTED_BATCHES * config.lm.batch
  first = pool * count
  captions = []
  # One thing at first: what its words look like is learned in a hundred steps there, and in a
  # thousand among four things.
  p_single = max(0.0, 1.0 - pool * SORTED_BATCHES / config.lm.single_until)
  for i in range(first, first + count):
    pixels, caption = sets.pretraining_example(config.seed, i, p_single)
    captions.append((pixels, processor.encode_prompt(caption), processor.encode_answer(caption)))
  describe = [processor.encode_question(q) for q in grammar.QUESTIONS_DESCRIBE]
  rng = np.random.default_rng((102, config.seed, pool))
  order = rng.permutation(SORTED_BATCHES)
  captions.sort(key=lambda c: len(c[1]))
  batches = []
  for b in order:
    drawing = captions[b * config.lm.batch : (b + 1) * config.lm.batch]
    asked = int(config.lm.question_share * config.lm.batch)
    reading = [(pixels, world.pick(rng, describe), answer) for pixels, _, answer in drawing[asked:]]
    for i in range(asked):
      pixels, question, answer = sets.pretraining_question(
        config.seed, (pool * SORTED_BATCHES + int(b)) * asked + i, p_single
      )
      reading.append((pixels, processor.encode_question(question), processor.encode_answer(answer)))
    longest = max(len(answer) for _, _, answer in drawing)
    length = -(-longest // TEXT_BUCKET) * TEXT_BUCKET
    prompt = processor.pad([c[1] for c in drawing], length)
    question = processor.pad([r[1] for r in reading], QUESTION_TOKENS)
    answer = processor.pad([r[2] for r in reading], length)
    batches.append(
      dict(
        drawn=np.stack([c[0] for c in drawing]),
        prompt=prompt,
        read=np.stack([r[0] for r in reading]),
        question=question,
        answer=answer,
        asked=np.arange(config.lm.batch) >= config.lm.batch - asked,
        blank=rng.random(config.lm.batch) < config.lm.prompt_dropout,
      )
    )
  return batches


# Picture tokenizer.


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
  """Running means of the latents of each code; where `restart`, codes nobody uses start again from
  a latent of this batch.
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
  """One latent for each kind of patch there is: pixels (B, H, W, 3) uint8 and latents (B h w, E) ->
  (kinds, E) unit rows.

  The empty ground is most of every picture, so codes spread over cells would nearly all be shades
  of nothing, which a language model must then predict; spread over kinds, they tell things apart.
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

  state = _loop(
    'picture tokenizer', config, ('vq',), sum(cycles), state, one, os.path.join(run_dir, 'vq')
  )
  return {**state['params'], 'quantize': {'embedding': unit_norm(state['sums'])}}


def merge_ground_codes(config, graphdef, params):
  """One code a tint for the empty ground, and the codes that frees for the patches that are told
  apart worst.

  The ground is five sixths of a picture, so training spreads dozens of codes over shades of it that
  mean nothing; a language model then pays about two nats a cell for them. Returns the tokenizer
  with its new codebook; the encoder stays.
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
  cli.log(f'picture tokenizer: {len(free)} codes of the empty ground merged into {len(tints)}')
  return {**params['vqmodel'], 'quantize': {'embedding': jnp.asarray(kept, jnp.float32)}}


def polish_decoder(config, graphdef, params, run_dir):
  """Trains the decoder of params['vqmodel'] alone, on the codes as they now are, and returns the
  whole tokenizer.
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

  state = _loop(
    'picture decoder',
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
  """Starting values that say what is known: where patches lie, what the empty ground looks like,
  which codes look alike.

  Without them a small tower spends its first thousand steps on a constant (five sixths of all
  patches are ground) and cannot tell places apart.
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
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, config.lm.learning_rate, 60, config.lm.steps, config.lm.learning_rate * 0.01
  )
  # Muon on the matrices (stacked layers are batches of matrices), Adam on embeddings, heads, norms
  # and biases.
  matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

  def by_muon(tree):
    return jax.tree_util.tree_map_with_path(
      lambda path, x: matrix if _is_inner_matrix(jax.tree_util.keystr(path), x) else None, tree
    )

  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.contrib.muon(
      schedule,
      consistent_rms=0.2,
      weight_decay=0.01,
      adam_b2=0.98,
      muon_weight_dimension_numbers=by_muon,
    ),
  )
  state = dict(params=trained, opt=optimizer.init(trained), step=jnp.int32(0))

  def loss_fn(trained, batch):
    model = nnx.merge(graphdef, {**trained, **fixed})

    def pixels(name):
      return images.to_float(batch[name])

    def axis(tree):
      return jax.tree.map(lambda x: x[:, None], tree)  # one candidate an input

    codes = jax.lax.stop_gradient(model.picture_from_pixels(pixels('drawn')).codes)
    drawn = model.picture_logps(
      axis(Text(*batch['prompt'])), codes[:, None], None, Scoring(), blank=batch['blank']
    )
    picture = axis(Picture(codes, pixels('read')))
    answer = Text(*batch['answer'])
    read = model.text_logps(picture, Text(*batch['question']), axis(answer), None, Scoring())
    drawing = -jnp.mean(drawn.logp)
    # An answer is a word or two, a caption twenty: without a weight the answers would be a fortieth
    # of the loss.
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

  ahead = concurrent.futures.ThreadPoolExecutor(1)
  pools = {}

  def pool(i):
    if i not in pools:
      pools[i] = ahead.submit(language_batches, config, processor, i)
    return pools[i]

  def one(state, step):
    i, place = divmod(step, SORTED_BATCHES)
    batch = pool(i).result()[place]
    pool(i + 1)
    pools.pop(i - 1, None)
    state, losses = step_fn(state, batch)
    return state, ('nats a token: drawing %.4f  captions %.4f  answers %.4f', losses)

  state = _loop(
    'both tasks', config, ('vq', 'lm'), config.lm.steps, state, one, os.path.join(run_dir, 'lm')
  )
  return {**state['params'], **fixed}


def _is_inner_matrix(path: str, x) -> bool:
  outer = ('embed', 'lm_head', 'vision_head')
  return (
    x.ndim in (2, 3) and path.endswith("['kernel']") and not any(name in path for name in outer)
  )


# The run.

_SHARES = ('lm.prompt_dropout', 'lm.question_share')  # from 0 to 1
_MAY_BE_ZERO = ('seed', 'vq.unquantised_steps', 'vq.polish_steps', 'lm.question_weight')


def check(config):
  """InputError for values that nothing can be trained with."""
  for key, value in saved_config.flat(config.to_dict()).items():
    low = 0 if key in (*_SHARES, *_MAY_BE_ZERO) else 1 if isinstance(value, int) else 1e-12
    high = 1 if key in _SHARES else float('inf')
    for number in value if isinstance(value, tuple) else (value,):
      if type(number) not in (int, float) or not low <= number <= high or number == float('inf'):
        limit = f'from {low} to {high}' if key in _SHARES else 'above 0' if low else '0 or more'
        raise InputError(f'found config.{key}={value}; expected numbers {limit}; change it')


def _loop(title, config, part, steps, state, one, directory):
  """Runs `one(state, step) -> (state, (form, numbers))` to the end, from the last checkpoint of a
  run with the same settings.

  Numbers are fetched only where their line is printed, so that an accelerator need not wait for the
  host.
  """
  settings = {
    key: value
    for key, value in json.loads(config.to_json_best_effort()).items()
    if key in (*part, 'seed', 'vocab_size')
  }
  about = dict(method=settings, data=dict(fingerprint='scenes'), model=dict(fingerprint='none'))
  saved = checkpoints.Checkpoints(directory, about, keep_last=1)
  if saved.latest() is not None:
    state = saved.restore(state)
  first = int(state['step'])
  start = time.time()
  for step in range(first, steps):
    state, (form, numbers) = one(state, step)
    if step % 20 == 0 or step == steps - 1:
      line = form % tuple(map(float, numbers))
      rate = (time.time() - start) / (step + 1 - first)
      cli.log(
        f'{title}: step {step + 1}/{steps}  {line}  {rate:.2f} s a step, '
        f'{rate * (steps - step - 1) / 60:.0f} min left'
      )
    if (step + 1) % config.save_every == 0 or step + 1 == steps:
      saved.save(step + 1, state)
  saved.wait()
  saved.close()
  return state


def pretrain(config, workdir: str) -> str:
  """Runs all stages and returns the directory of the finished model."""
  start = time.time()
  words = os.path.join(workdir, 'tokenizer')
  texts = sets.vocabulary_texts(20000, config.seed)
  tokenizer_files.make_tokenizer(texts, config.vocab_size, words)
  processor = Processor.from_directory(words, vocab_size=config.vocab_size)
  # Nothing is forbidden here: the model itself must learn never to write special tokens, for
  # whoever samples it unmasked.
  templates = dataclasses.replace(processor.templates, forbidden_text_ids=())
  model_config = dataclasses.replace(JanusConfig.scenes(config.vocab_size), templates=templates)
  graphdef, params = janus.create(model_config, config.seed)
  params['vqmodel'] = train_picture_tokenizer(config, graphdef, params, workdir)
  params['vqmodel'] = merge_ground_codes(config, graphdef, params)
  params = train_language_model(config, graphdef, informed_start(params), processor, workdir)
  # Codes stay, so the order does not matter.
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
  facts = dict(
    config=config.to_dict(),
    device=jax.devices()[0].device_kind,
    minutes=round((time.time() - start) / 60, 1),
  )
  files.write_json(os.path.join(workdir, 'pretraining.json'), facts, indent=2)
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
    'config', 'What to train, and how long.', f, default=DEFAULT_CONFIG
  )
  flag_types.define_path(
    'workdir',
    None,
    'Where the run lives; its result is WORKDIR/model.',
    f,
  )


if __name__ == '__main__':
  cli.run_main(main, define_flags)
