"""Fine-tuning on true pairs of prompts and images, instead of reinforcement: what the trained
parameters can learn in as many updates, with the same optimizer and learning rate.

`benchmarks.levers` runs it as `clean_pairs`. Prompts and images are uniform, as in reinforcement,
but each prompt comes with an image that shows it, and each image with a true text that names all
its things.

Axes: B pairs, T tokens, H W pixels.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsr_jax import chunks, images, sharding, train
from dsr_jax import state as state_lib
from dsr_jax.models.unified import Scoring, Text
from dsr_jax.scenes import grammar, render, sets, world
from dsr_jax.step import StepOutput

PAIRS = 128  # per task and step: as many sequences as 16 inputs with 8 candidates
CHUNK = 16  # pairs at once
PROMPT_DROPOUT = 0.1  # as in pretraining; needed for guidance
PROMPTS, PICTURES = 201, 202  # of the random generators


def drawing_pair(seed: int, index: int) -> tuple[str, np.ndarray]:
  """A prompt, and an image (H, W, 3) uint8 that shows it; the categories take turns."""
  rng = np.random.default_rng((PROMPTS, seed, index))
  category = grammar.CATEGORIES[index % len(grammar.CATEGORIES)]
  while True:
    scene = grammar.prompt_scene(rng, category, held_out='half')
    if sets.split_of(scene) == 'training_prompts':
      return grammar.prompt_of(scene, category, rng).text, render.render(scene)


def describing_pair(seed: int, index: int) -> tuple[np.ndarray, str]:
  """An image (H, W, 3) uint8, and a true text about it that omits none of its things."""
  rng = np.random.default_rng((PICTURES, seed, index))
  while True:
    scene = world.random_scene(rng, skewed=False, held_out='half')
    if sets.split_of(scene) == 'training_pictures':
      break
  while True:
    atoms = grammar.plan_caption(scene, rng)
    if sum(clause.count for clause in atoms.clauses) == len(scene.things):
      return render.render(scene), grammar.realise(atoms, rng)


class Pairs:
  """The batches of a run, by step: a dict of arrays on all devices."""

  def __init__(self, config, model, mesh, kept=None):
    del kept
    self._seed, self._mesh, self._processor = config.method.seed, mesh, model.processor
    self._lengths = config.data.max_prompt_tokens, config.method.max_text_tokens
    self._question = model.processor.encode_question(config.method.question)
    self.fingerprint = f'true pairs of seed {self._seed}'

  def at(self, step: int):
    """The batch of a step (from 0)."""
    drawing, describing = (
      [pair(self._seed, step * PAIRS + i) for i in range(PAIRS)]
      for pair in (drawing_pair, describing_pair)
    )
    encoder, (prompt_length, text_length) = self._processor, self._lengths
    rng = np.random.default_rng((self._seed, step))
    batch = dict(
      prompt=encoder.pad([encoder.encode_prompt(text) for text, _ in drawing], prompt_length),
      drawn=np.stack([pixels for _, pixels in drawing]),
      read=np.stack([pixels for pixels, _ in describing]),
      question=encoder.pad([self._question] * PAIRS, None),
      answer=encoder.pad([encoder.encode_answer(text) for _, text in describing], text_length),
      blank=rng.random(PAIRS) < PROMPT_DROPOUT,
    )
    return sharding.place(batch, jax.tree.map(lambda x: sharding.whole(self._mesh), batch))


def make_train_step(model, config, mesh, state):
  """The jitted step: (state, batch) -> `StepOutput`; the state is donated."""
  ctx = train.step_context(model, config)

  def loss_fn(params, state, batch, tokens):
    """A chunk's share of the loss. tokens: of all texts of the step."""
    model = ctx.build(state, params)

    def one_candidate(tree):
      return jax.tree.map(lambda x: x[:, None], tree)

    codes = model.picture_from_pixels(images.to_float(batch['drawn'])).codes
    drawn = model.picture_logps(
      one_candidate(Text(*batch['prompt'])),
      jax.lax.stop_gradient(codes)[:, None],
      None,
      Scoring(),
      blank=batch['blank'],
    )
    picture = one_candidate(model.picture_from_pixels(images.to_float(batch['read'])))
    answer = one_candidate(Text(*batch['answer']))
    read = model.text_logps(picture, Text(*batch['question']), answer, None, Scoring())
    drawing = -jnp.sum(drawn.logp) / (PAIRS * drawn.logp.shape[-1])
    describing = -jnp.sum(read.logp * answer.mask) / tokens
    return drawing + describing, {'nats_drawing': drawing, 'nats_describing': describing}

  def step(state, batch):
    tokens = jnp.sum(batch['answer'].mask)

    def chunk_gradient(chunk):
      gradient = jax.value_and_grad(loss_fn, has_aux=True)
      return gradient(state.params, state, chunk, tokens), ()

    (((loss, parts), grads), _) = chunks.summed(chunk_gradient, batch, CHUNK)
    updates, opt_state = ctx.optimizer.update(grads, state.opt_state, state.params)
    rate = state_lib.learning_rate(ctx.method, state.step, None)
    params = optax.apply_updates(state.params, jax.tree.map(lambda u: -rate * u, updates))
    state = state.after_update(None, params, opt_state, ctx.method.ema_decay)
    return StepOutput(state, {'loss': loss, 'learning_rate': rate, **parts}, {})

  return jax.jit(step, donate_argnums=0)
