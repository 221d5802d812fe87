"""Trains a CLIP on Scenes, with the embedded model's size and the same noisy captions, as an
external reward for comparison.

  python -m dsr_jax.study.clip --output=DIR
  python -m dsr_jax.study.clip --compare=DIR --model=scenes

The first command trains a CLIP and writes a directory that transformers loads. The second measures
how well its cosine and R_G rank images. Both print JSON on stdout.

Axes: B pairs, P prompts, G images per prompt, T tokens.
"""

import concurrent.futures
import functools

from absl import flags
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsr_jax import cli, families, files, flag_types, images
from dsr_jax.convert import clip as clip_files
from dsr_jax.convert import locate, writing
from dsr_jax.errors import InputError
from dsr_jax.evaluate import ranking
from dsr_jax.evaluate import scores as scores_lib
from dsr_jax.inference import Sampler
from dsr_jax.models import clip
from dsr_jax.models.janus.processor import Processor
from dsr_jax.models.unified import Sampling
from dsr_jax.scenes import sets, world

MAX_TOKENS = 50  # the grammar's longest text, with its first and last special tokens
MAX_SCALE = np.log(100.0)  # log of the logits' scale, with OpenAI's bound
CHUNK = 16  # prompts sampled at once

# Training one.


def config_for(vocab_size: int, eos_id: int) -> clip.ClipConfig:
  """The sizes of the embedded model's language model and vision tower."""
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
  """Captioned images from pretraining: pixels (B, H, W, 3) uint8 and ids (B, T)."""
  pairs = [sets.pretraining_example(seed, step * size + i) for i in range(size)]
  pixels = np.stack([pixels for pixels, _ in pairs])
  ids = clip_files.encode_texts(processor.tokenizer, [text for _, text in pairs], MAX_TOKENS)
  return pixels, ids


def loss_fn(params, graphdef, pixels, ids):
  """Cross-entropy of the pairs within the batch, in both directions -> loss, and the share of texts
  whose most similar image is their own.
  """
  model = nnx.merge(graphdef, params)
  seen = model.pictures(images.to_float(pixels))
  logits = jnp.exp(params['logit_scale']) * model.texts(ids) @ seen.T

  def own(x):
    return jnp.mean(jnp.diagonal(jax.nn.log_softmax(x, axis=-1)))

  found = jnp.mean(jnp.argmax(logits, axis=-1) == jnp.arange(len(ids)), dtype=jnp.float32)
  return -(own(logits) + own(logits.T)) / 2, found


def train(processor, *, steps: int, size: int, learning_rate: float, seed: int):
  """Returns the config, the parameters and facts about the training: loss and share of found images
  over the last tenth of the steps, among others.
  """
  config = config_for(len(processor.tokenizer), processor.templates.eos_id)
  graphdef, params = clip.graphdef_of(config), clip.create(config, seed)
  schedule = optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=learning_rate,
    warmup_steps=min(100, steps),
    decay_steps=max(steps, 101),
    end_value=learning_rate * 0.01,
  )
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05)
  )

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def update(params, opt_state, pixels, ids):
    differentiate = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, found), grads = differentiate(params, graphdef, pixels, ids)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    params['logit_scale'] = jnp.minimum(params['logit_scale'], MAX_SCALE)
    return params, opt_state, loss, found

  opt_state, history = optimizer.init(params), []
  with concurrent.futures.ThreadPoolExecutor(1) as ahead:
    following = ahead.submit(batch, processor, seed, 0, size)
    for step in range(steps):
      pixels, ids = following.result()
      following = ahead.submit(batch, processor, seed, step + 1, size)
      params, opt_state, loss, found = update(params, opt_state, pixels, ids)
      history.append((loss, found))
      if step % 100 == 0 or step == steps - 1:
        cli.log(f'step {step + 1}/{steps}  loss {float(loss):.3f}  found {float(found):.2f}')
  last = np.mean(jax.device_get(history[-max(1, steps // 10) :]), axis=0)
  facts = {
    'loss': float(last[0]),
    'found': float(last[1]),
    'steps': steps,
    'batch': size,
    'captions': steps * size,
  }
  return config, jax.device_get(params), facts


# Comparing it with the self-reward.


def compare(clip_dir: str, source, *, per_task: int, samples: int, seed: int) -> dict:
  """For images that the model draws for validation prompts: how often each reward orders two images
  as the judge does.

  source: `locate.Source`: the model that draws and scores, with its method.
  """
  config, weights = clip_files.read_config(clip_dir), clip_files.load(clip_dir)
  prompts = sets.evaluation_prompts(per_task, 'validation')
  texts = [p.text for p in prompts]
  model, method = families.model_of(source.bundle, source.name), source.method
  params = jax.device_put(model.params)
  sampler = Sampler(model.graphdef, model.processor, chunk=CHUNK, seed=seed)

  drawn = sampler.sample_pictures(
    params,
    sampler.prompts(texts),
    group=samples,
    how=Sampling(
      temperature=method.temperature, guidance=method.guidance, cfg_interval=method.cfg_interval
    ),
    instructions=sampler.questions([method.instruction]),
  )
  self_rewards = drawn.rewards[:, 0]
  score = jax.jit(functools.partial(_cosine, model.graphdef, config))
  cosines = sampler.chunked(
    lambda first, codes, ids: score(params, weights, codes, ids),
    drawn.codes,
    clip_files.encode(clip_dir, texts),
  )
  verdicts = scores_lib.judge_pictures(prompts, drawn.pixels)
  right, graded = verdicts['geneval'], verdicts['graded']

  def measured(reward):
    found = ranking.pairwise_accuracy(reward, graded)
    accuracy = found['accuracy']
    best = right[np.arange(len(right)), reward.argmax(axis=1)]
    return {
      'pairwise_accuracy': {
        'pairs': found['pairs'],
        **(accuracy._asdict() if accuracy else {}),
      },
      'best_of': float(np.mean(best)),
    }

  return {
    'prompts': len(prompts),
    'samples': samples,
    'right': float(right.mean()),
    'R_G': measured(self_rewards),
    'clip': measured(cosines),
  }


def _cosine(graphdef, config, params, weights, codes, ids):
  """CLIP's cosine of prompts, ids (P, T), and their images, codes (P, G, N) -> (P, G).

  It sees the decoded images without the rounding of a file.
  """
  pictures = nnx.merge(graphdef, params).picture_from_codes(codes)
  return clip.similarity(config, weights, pictures.pixels, ids)


# The command.


def main(argv, f=flags.FLAGS):
  cli.no_arguments(argv)
  if bool(f.output) == bool(f.compare):
    raise InputError(
      'exactly one of --output and --compare is needed; name either a directory to train into, or '
      'one to measure'
    )
  if f.compare:
    clip_files.read_config(f.compare)
    result = compare(
      f.compare,
      locate.resolve(f.model),
      per_task=f.prompts_per_task,
      samples=f.num_samples,
      seed=f.seed,
    )
    cli.print_json(result)
    return
  files.check_place(f.output)
  directory = locate.directory_of(f.model)
  config, params, facts = train(
    Processor.from_directory(directory),
    steps=f.steps,
    size=f.batch,
    learning_rate=f.learning_rate,
    seed=f.seed,
  )
  with files.whole_directory(f.output, ours=writing.is_export) as aside:
    clip_files.save(aside, config, params, directory)
  parameters = sum(x.size for x in jax.tree.leaves(params))
  cli.print_json({'clip': f.output, 'parameters': parameters, **facts}, kept=f.output)


def define_flags(f=flags.FLAGS):
  flag_types.define_path('output', None, 'Output directory for the trained CLIP.', f)
  flag_types.define_path('compare', None, 'Directory of a CLIP to compare with R_G.', f)
  flag_types.define_path(
    'model',
    'scenes',
    f'The model whose tokenizer CLIP uses; with --compare, it draws and scores: {locate.EXPECTED}.',
    f,
  )
  flags.DEFINE_integer('steps', 3000, 'Number of updates.', lower_bound=1, flag_values=f)
  flags.DEFINE_integer('batch', 64, 'Captioned images per update.', lower_bound=2, flag_values=f)
  flags.DEFINE_float('learning_rate', 1e-3, 'Peak learning rate.', lower_bound=0.0, flag_values=f)
  flags.DEFINE_integer(
    'prompts_per_task',
    20,
    'With --compare: number of prompts for each of the six tasks.',
    lower_bound=1,
    flag_values=f,
  )
  flags.DEFINE_integer(
    'num_samples', 8, 'With --compare: images per prompt.', lower_bound=2, flag_values=f
  )
  flags.DEFINE_integer(
    'seed', 0, 'Seed of weights, captions and samples.', lower_bound=0, flag_values=f
  )


if __name__ == '__main__':
  cli.run_main(main, define_flags)
