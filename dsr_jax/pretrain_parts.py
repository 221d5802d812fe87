"""Parts of pretraining that all families share: captioned images of Scenes, the optimizer, and a
loop that resumes.

Every example is a pure function of (seed, index).
"""

import concurrent.futures
import contextlib
import json
import time

import jax
import numpy as np
import optax

from dsr_jax import cli
from dsr_jax.runtime import checkpoints
from dsr_jax.scenes import grammar, render, sets, world
from dsr_jax.state import TrainState

TEXT_BUCKET = 16  # pad captions to multiples of this, for few shapes and compilations
QUESTION_TOKENS = 24
# Batches that are drawn together and sorted by text length, to reduce padding.
SORTED_BATCHES = 8


# Data.


def tokenizer_picture(seed: int, index: int):
  """A crowded image with uniformly drawn looks, (32, 32, 3) uint8.

  The image tokenizer sees every pair of shape and surface. Only the language model, which learns
  their words, is pretrained without the held-out pairs.
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
  """SORTED_BATCHES batches of captioned images, each padded to its own longest text."""
  count = SORTED_BATCHES * config.lm.batch
  first = pool * count
  captions = []
  # One thing per image at first: the model then learns what its words mean in a hundred steps, but
  # in a thousand among four things.
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


class Pools:
  """Batches of captioned images by step; makes the next pool in the background."""

  def __init__(self, config, processor):
    self._config, self._processor = config, processor
    self._ahead, self._pools = concurrent.futures.ThreadPoolExecutor(1), {}

  def at(self, step: int):
    """The batch of a step (from 0)."""
    i, place = divmod(step, SORTED_BATCHES)
    batch = self._pool(i).result()[place]
    self._pool(i + 1)
    self._pools.pop(i - 1, None)
    return batch

  def _pool(self, i):
    if i not in self._pools:
      self._pools[i] = self._ahead.submit(language_batches, self._config, self._processor, i)
    return self._pools[i]


# Optimizer and loop.


def language_optimizer(config) -> optax.GradientTransformation:
  """The optimizer of a language model: warm-up, cosine decay, Muon and Adam."""
  steps, peak = config.lm.steps, config.lm.learning_rate
  schedule = optax.warmup_cosine_decay_schedule(0.0, peak, min(60, steps // 2), steps, peak * 0.01)
  # Muon for the matrices (stacked layers are batches of matrices), Adam for embeddings, heads,
  # norms and biases.
  matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

  def by_muon(tree):
    return jax.tree_util.tree_map_with_path(
      lambda path, x: matrix if _is_inner_matrix(jax.tree_util.keystr(path), x) else None, tree
    )

  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.contrib.muon(
      schedule,
      consistent_rms=0.2,
      weight_decay=0.01,
      adam_b2=0.98,
      muon_weight_dimension_numbers=by_muon,
    ),
  )


def _is_inner_matrix(path: str, x) -> bool:
  outer = ('embed', 'lm_head', 'vision_head')
  return (
    x.ndim in (2, 3) and path.endswith("['kernel']") and not any(name in path for name in outer)
  )


def _wrapped(state) -> TrainState:
  """A stage's state, a dict with `step`, in the form that checkpoints need."""
  parts = {name: part for name, part in state.items() if name != 'step'}
  return TrainState(step=state['step'], params=parts, opt_state=None, fixed_params={})


def _unwrapped(state: TrainState):
  return {**state.params, 'step': state.step}


def run_loop(title, config, part, steps, state, one, directory):
  """Runs `one(state, step) -> (state, (form, numbers))` to the end, starting from the last
  checkpoint of a run with the same settings.

  Fetches numbers only to print them, so that an accelerator does not wait for the host.
  """
  settings = {
    key: value
    for key, value in json.loads(config.to_json_best_effort()).items()
    if key in (*part, 'seed', 'vocab_size')
  }
  about = dict(method=settings, data=dict(fingerprint='scenes'), model=dict(fingerprint='none'))
  saved = checkpoints.Checkpoints(directory, about, keep_last=1)
  with contextlib.closing(saved):  # on an interrupt, waits for a pending checkpoint
    if saved.latest() is not None:
      state = _unwrapped(saved.restore(_wrapped(state)))
    first = int(state['step'])
    start = time.time()
    for step in range(first, steps):
      state, (form, numbers) = one(state, step)
      if step % 20 == 0 or step == steps - 1:
        line = form % tuple(map(float, numbers))
        rate = (time.time() - start) / (step + 1 - first)
        cli.log(
          f'{title}: step {step + 1}/{steps}  {line}  {rate:.2f} s per step, '
          f'{rate * (steps - step - 1) / 60:.0f} min left'
        )
      if (step + 1) % config.save_every == 0 or step + 1 == steps:
        saved.save(step + 1, _wrapped(state))
  return state
