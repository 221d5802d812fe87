"""Makes the small CLIP of the study's CLIP reward, from nothing: pretraining's captioned pictures, contrastively.

Its captions are those the base was pretrained on, partial and now and then wrong; it never sees the judge. Source of the loss:
arXiv 2103.00020. Axes: B pairs, T text tokens, H W pixels.
"""

import functools
import os
import time

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsr_jax import commands
from dsr_jax import model_source
from dsr_jax.convert import clip as clip_files
from dsr_jax.models import clip
from dsr_jax.progress import say
from dsr_jax.scenes import sets, world

FIRST_EXAMPLE = 10_000_000  # far from those the base saw
POSITIONS = 64  # tokens of the longest text and its end
PATCH = 4
MAX_SCALE = 100.0


def config_of(settings, processor) -> clip.ClipConfig:
  """Sizes; settings: the group `clip` of configs/scenes_study.py."""
  tower = clip.TowerConfig(settings.width, 4 * settings.width, settings.layers, max(settings.width // 32, 1))
  return clip.ClipConfig(text=tower, vision=tower, projection_dim=settings.width, vocab_size=len(processor.tokenizer),
                         max_positions=POSITIONS, eos_id=processor.templates.eos_id, image_size=world.IMAGE_SIZE, patch_size=PATCH)


def loss(graphdef, params, pixels, ids):
  """Symmetric cross entropy over a batch: pixels (B, H, W, 3) uint8, ids (B, T). Returns the loss and the share of texts matched right."""
  model = nnx.merge(graphdef, params)
  scale = jnp.minimum(jnp.exp(model.logit_scale[...]), MAX_SCALE)
  logits = scale * model.pictures(pixels.astype(jnp.float32) / 127.5 - 1.0) @ model.texts(ids).T
  # Pictures may share a caption: each such pair is as right as its own.
  same = jnp.all(ids[:, None] == ids[None], axis=-1)
  target = same / jnp.sum(same, axis=-1, keepdims=True)
  both = optax.softmax_cross_entropy(logits, target) + optax.softmax_cross_entropy(logits.T, target)
  right = same[jnp.arange(len(ids)), jnp.argmax(logits, axis=-1)]
  return jnp.mean(both) / 2, jnp.mean(right)


def make(settings, model: str, directory: str) -> str:
  """Trains one unless `directory` has it; returns the directory. model: whose tokenizer it uses."""
  if os.path.isdir(directory):
    return directory
  from dsr_jax import processor as processor_lib
  source = model_source.directory_of(model)
  processor = processor_lib.Processor.from_directory(source)
  config = config_of(settings, processor)
  graphdef, params = clip.graphdef_of(config), clip.create(config, settings.seed)
  schedule = optax.warmup_cosine_decay_schedule(0.0, settings.learning_rate, max(settings.steps // 20, 1), settings.steps + 1)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.05))
  moments = optimizer.init(params)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, moments, pixels, ids):
    (value, right), grads = jax.value_and_grad(lambda p: loss(graphdef, p, pixels, ids), has_aux=True)(params)
    updates, moments = optimizer.update(grads, moments, params)
    return optax.apply_updates(params, updates), moments, value, right

  began = time.time()
  for i in range(settings.steps):
    pixels, ids = _batch(settings, processor, i)
    params, moments, value, right = step(params, moments, pixels, ids)
    if i % 50 == 0 or i == settings.steps - 1:
      left = (time.time() - began) / (i + 1) * (settings.steps - i - 1) / 60
      say(f'CLIP         step {i + 1}/{settings.steps}  loss {float(value):.3f}  matched {float(right):.2f}  {left:.0f} min left')
  with commands.whole_directory(directory) as aside:
    clip_files.save(aside, config, jax.device_get(params), source)
  return directory


def _batch(settings, processor, step):
  """Captioned pictures: pixels (B, H, W, 3) uint8 and ids (B, T), each with its end."""
  first = FIRST_EXAMPLE + step * settings.batch
  pairs = [sets.pretraining_example(settings.seed, first + i) for i in range(settings.batch)]
  eos = processor.templates.eos_id
  ids = np.full((len(pairs), POSITIONS), eos, np.int32)
  for row, (_, caption) in zip(ids, pairs):
    encoded = [t for t in processor.tokenizer.encode(caption) if t != eos][:POSITIONS - 1]
    row[:len(encoded)] = encoded
  return np.stack([pixels for pixels, _ in pairs]), ids
