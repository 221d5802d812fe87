"""A CLIP of Scenes, of the embedded model's size and taught by the same noisy captions: what an
external reward is worth there.

  python -m dsr_jax.scenes.clip --output=DIR                   # trains one; a directory that
  transformers loads; JSON on stdout
  python -m dsr_jax.scenes.clip --compare=DIR --model=scenes   # how well its cosine, and R_G, order
  pictures; JSON on stdout

Axes: B pairs, P prompts, G pictures of a prompt, T tokens.
"""

import concurrent.futures
import functools

from absl import flags
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsr_jax import cli as commands
from dsr_jax.convert import clip as files
from dsr_jax.convert import locate as model_source
from dsr_jax.errors import InputError, run_main
from dsr_jax.models import clip
from dsr_jax.models.janus import model as janus
from dsr_jax.models.janus import processor as processor_lib
from dsr_jax.models.unified import Sampling, Scoring, Text, row_keys
from dsr_jax.rewards import base as rewards
from dsr_jax.scenes import grammar, judge, sets, world

MAX_TOKENS = 50  # the grammar's longest text, its beginning and its end
MAX_SCALE = np.log(100.0)  # of the logits, as OpenAI bounds it
CHUNK = 16  # prompts sampled at once


def config_for(vocab_size: int, eos_id: int) -> clip.ClipConfig:
  """Sizes like the embedded model's language model and vision tower."""
  tower = clip.TowerConfig(128, 384, 4, 4, act='gelu')
  return clip.ClipConfig(
    text=tower,
    vision=tower,
    projection_dim=128,
    vocab_size=vocab_size,
    max_positions=MAX_TOKENS,
    eos_id=eos_id,
    image_size=world.IMAGE_SIZE,
    patch_size=4,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
  )


def batch(processor, seed: int, step: int, size: int):
  """Captioned pictures of pretraining: pixels (B, H, W, 3) uint8 and ids (B, T)."""
  pairs = [sets.pretraining_example(seed, step * size + i) for i in range(size)]
  return np.stack([pixels for pixels, _ in pairs]), files.encode_texts(
    processor.tokenizer, [text for _, text in pairs], MAX_TOKENS
  )


def loss_fn(params, graphdef, pixels, ids):
  """Cross-entropy of the pairs within the batch, in both directions -> loss and share of texts that
  find their picture.
  """
  model = nnx.merge(graphdef, params)
  seen = model.pictures(pixels.astype(jnp.float32) / 127.5 - 1.0)
  logits = jnp.exp(params['logit_scale']) * model.texts(ids) @ seen.T

  def own(x):
    return jnp.mean(jnp.diagonal(jax.nn.log_softmax(x, axis=-1)))

  found = jnp.mean(jnp.argmax(logits, axis=-1) == jnp.arange(len(ids)), dtype=jnp.float32)
  return -(own(logits) + own(logits.T)) / 2, found


def train(processor, *, steps: int, size: int, learning_rate: float, seed: int):
  """Returns the config, the parameters and how it went: loss and share of found pictures over the
  last tenth.
  """
  config = config_for(len(processor.tokenizer), processor.templates.eos_id)
  graphdef, params = clip.graphdef_of(config), clip.create(config, seed)
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, learning_rate, min(100, steps), max(steps, 101), learning_rate * 0.01
  )
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05)
  )

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def update(params, moments, pixels, ids):
    (loss, found), grad = jax.value_and_grad(loss_fn, has_aux=True)(params, graphdef, pixels, ids)
    updates, moments = optimizer.update(grad, moments, params)
    params = optax.apply_updates(params, updates)
    return (
      {**params, 'logit_scale': jnp.minimum(params['logit_scale'], MAX_SCALE)},
      moments,
      loss,
      found,
    )

  moments, history = optimizer.init(params), []
  with concurrent.futures.ThreadPoolExecutor(1) as ahead:
    following = ahead.submit(batch, processor, seed, 0, size)
    for step in range(steps):
      pixels, ids = following.result()
      following = ahead.submit(batch, processor, seed, step + 1, size)
      params, moments, loss, found = update(params, moments, pixels, ids)
      history.append((loss, found))
      if step % 100 == 0 or step == steps - 1:
        commands.log(f'step {step + 1}/{steps}  loss {float(loss):.3f}  found {float(found):.2f}')
  last = np.mean(jax.device_get(history[-max(1, steps // 10) :]), axis=0)
  return (
    config,
    jax.device_get(params),
    dict(loss=float(last[0]), found=float(last[1]), steps=steps, batch=size, captions=steps * size),
  )


def compare(clip_dir: str, source, *, per_task: int, samples: int, seed: int) -> dict:
  """Of pictures that the model draws of validation prompts: how often each reward orders two as the
  judge does.
  """
  from dsr_jax.probe import measures

  prompts = sets.evaluation_prompts(per_task, 'validation')
  processor, method = source.bundle.processor, source.method
  config, weights = files.read_config(clip_dir), files.load(clip_dir)
  graphdef = janus.graphdef_of(source.bundle.config)
  asked = Text(
    *(jnp.asarray(x[0]) for x in processor.pad([processor.encode_question(method.instruction)]))
  )

  @jax.jit
  def look(params, weights, prompt, clip_ids, first):
    model = nnx.merge(graphdef, params)
    keys = row_keys(jax.random.key(seed), first * samples, prompt.ids.shape[0], samples)
    codes, _ = model.sample_pictures(prompt, keys, Sampling(method.temperature, source.guidance))
    pictures = model.picture_from_codes(codes)
    own, _ = rewards.generation(model, pictures, prompt, asked, Scoring(), keys=keys)
    return pictures.pixels, own, clip.similarity(config, weights, pictures.pixels, clip_ids)

  text = processor.pad([processor.encode_prompt(p.text) for p in prompts])
  clip_ids = files.encode(clip_dir, [p.text for p in prompts])
  parts = []
  for first in range(0, len(prompts), CHUNK):
    rows = np.minimum(
      np.arange(first, first + CHUNK), len(prompts) - 1
    )  # the last chunk is filled up
    out = jax.device_get(
      look(
        source.bundle.params, weights, Text(text.ids[rows], text.mask[rows]), clip_ids[rows], first
      )
    )
    parts.append([x[: len(prompts) - first] for x in out])
  pixels, own, cosine = (np.concatenate(x) for x in zip(*parts))
  readings = judge.read(processor_lib.to_uint8(pixels).reshape(-1, *pixels.shape[2:]))
  graded = np.array(
    [judge.graded(prompts[i // samples].atoms, r) for i, r in enumerate(readings)]
  ).reshape(own.shape)
  right = np.array(
    [
      judge.geneval(
        prompts[i // samples].atoms, r, prompts[i // samples].category in grammar.COUNTED
      )
      for i, r in enumerate(readings)
    ]
  ).reshape(own.shape)

  def best(reward):
    return float(np.mean(right[np.arange(len(right)), reward.argmax(1)]))

  def flat(found):
    return {'pairs': found['pairs'], **(found['accuracy']._asdict() if found['accuracy'] else {})}

  return {
    'prompts': len(prompts),
    'samples': samples,
    'right': float(right.mean()),
    **{
      name: {
        'pairwise_accuracy': flat(measures.pairwise_accuracy(reward, graded)),
        'best_of': best(reward),
      }
      for name, reward in (('R_G', own), ('clip', cosine))
    },
  }


def main(argv, f=flags.FLAGS):
  commands.no_arguments(argv)
  if bool(f.output) == bool(f.compare):
    raise InputError(
      'found not exactly one of --output and --compare; expected a directory to train into, or one '
      'to measure; name one'
    )
  if f.compare:
    files.read_config(f.compare)
    commands.print_json(
      compare(
        f.compare,
        model_source.resolve(f.model),
        per_task=f.prompts_per_task,
        samples=f.num_samples,
        seed=f.seed,
      )
    )
    return
  directory = model_source.directory_of(f.model)
  processor = processor_lib.Processor.from_directory(directory)
  config, params, facts = train(
    processor, steps=f.steps, size=f.batch, learning_rate=f.learning_rate, seed=f.seed
  )
  files.save(f.output, config, params, directory)
  commands.print_json(
    {'clip': f.output, 'parameters': sum(x.size for x in jax.tree.leaves(params)), **facts}
  )


def define_flags():
  flags.DEFINE_string('output', None, 'Directory of the CLIP to be trained.')
  flags.DEFINE_string('compare', None, 'Directory of a CLIP to be measured beside R_G.')
  flags.DEFINE_string(
    'model',
    'scenes',
    f'Whose tokenizer it takes, or, with --compare, who draws and scores: {model_source.EXPECTED}.',
  )
  flags.DEFINE_integer('steps', 3000, 'Updates.', lower_bound=1)
  flags.DEFINE_integer('batch', 64, 'Captioned pictures an update.', lower_bound=2)
  flags.DEFINE_float('learning_rate', 1e-3, 'Its peak.', lower_bound=0.0)
  flags.DEFINE_integer(
    'prompts_per_task', 20, 'With --compare: prompts of each of the six tasks.', lower_bound=1
  )
  flags.DEFINE_integer('num_samples', 8, 'With --compare: pictures a prompt.', lower_bound=2)
  flags.DEFINE_integer('seed', 0, 'Of weights, captions and samples.', lower_bound=0)


if __name__ == '__main__':
  define_flags()
  run_main(main)
