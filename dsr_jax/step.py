"""The step: one compiled function that samples, scores by the reversed likelihood, pairs, and updates.

Phase A, without gradients and in chunks of inputs: sample G candidates of every input and score each by the likelihood of the
original input given it. Phase B, in chunks of its own: recompute the pairs' log-probabilities with gradients and update.
The step knows the model only through `models.unified.UnifiedModel`; nothing goes to the host inside it.

Axes: B inputs of a task, G candidates, T text tokens, N image codes, H W pixels.
"""

import functools
import typing

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from dsr_jax import losses
from dsr_jax import rewards as rewards_lib
from dsr_jax import sharding
from dsr_jax.models.unified import Picture, Sampling, Scoring, Text, row_keys, without_eos

SHOWN = 3  # inputs of each task whose candidates leave the step as records
_PARTS = {
    'language_model+gen_head': ('language_model', 'lm_head', 'generation_head'),
    'language_model': ('language_model', 'lm_head'),
}


class Rollouts(typing.NamedTuple):
  """What phase A leaves of a task: candidates, their log-probability when sampled, rewards and what is watched."""
  candidates: typing.Any  # codes (B, G, N), or Text (B, G, T)
  sampled_logp: jax.Array  # (B, G, N or T), under the distribution that sampled
  rewards: jax.Array  # (B, G)
  frozen_rewards: jax.Array  # (B, G), nan where the frozen model did not score this step
  target: typing.Any  # what conditions the policy: codes of the original picture (B, N), or None
  watched: dict  # scalars a chunk


# State.


def split_params(params, trainable: str):
  """Parameters -> (trainable, frozen), two dicts by top-level part."""
  parts = _PARTS.get(trainable) or tuple(k for k in params if k != 'vqmodel')
  return {k: v for k, v in params.items() if k in parts}, {k: v for k, v in params.items() if k not in parts}


def make_optimizer(method) -> optax.GradientTransformation:
  """Clip, AdamW, linear warm-up and cosine to 0."""
  # Shifted by one: neither the first update nor the last has learning rate 0, which would waste a whole rollout.
  schedule = optax.warmup_cosine_decay_schedule(0.0, method.learning_rate, method.warmup_steps + 1, method.steps + 2, 0.0)
  shifted = lambda count: schedule(count + 1)
  return optax.chain(
      optax.clip_by_global_norm(method.clip),
      optax.adamw(shifted, b1=method.adam_b1, b2=method.adam_b2, weight_decay=method.weight_decay))


def init_state(params, method, system, mesh):
  """Parameters of a loaded model -> the state of a run, laid out on the mesh.

  params: float32 masters of the trainable leaves. frozen: the others in the compute dtype, but the VQ model, a float32 island; and, where
  the frozen model is to score, `initial`: a compute-dtype copy of the trainable leaves.
  """

  def make(params):
    trained, fixed = split_params(params, method.trainable)
    frozen = {k: v if k == 'vqmodel' else _cast(v, system.compute_dtype) for k, v in fixed.items()}
    if system.frozen_every:
      frozen['initial'] = _cast(trained, system.compute_dtype)
    trained = jax.tree.map(lambda x: jnp.array(x, jnp.float32), trained)
    return dict(params=trained, frozen=frozen, opt_state=make_optimizer(method).init(trained), step=jnp.int32(0))

  layout = sharding.shardings(jax.eval_shape(make, params), mesh)
  placed = sharding.place(params, {**{k: v for k, v in layout['frozen'].items() if k != 'initial'}, **layout['params']})
  return jax.jit(make, out_shardings=layout)(placed)


def _cast(tree, dtype):
  return jax.tree.map(lambda x: x.astype(dtype), tree)


def policy_params(state):
  """All parameters of the model as it is now, float32 masters included."""
  return {**{k: v for k, v in state['frozen'].items() if k != 'initial'}, **state['params']}


# The step.


def make_step(graphdef, method, system, mesh, templates):
  """The jitted step (state, batch) -> (state, metrics, records); `state` is donated.

  Args:
    graphdef: the model's structure.
    method, system: `config.Method`, `config.System`.
    mesh: the devices.
    templates: of the model; only its eos_id is used.

  batch: prompt_ids, prompt_mask (B, Tp); instruction_ids, instruction_mask (Ti,); pixels (B, H, W, 3) uint8; question_ids, question_mask (B, Tq);
  seed, a uint32 scalar. The half of a task that is not trained is absent.
  metrics: a flat dict of float32 scalars. records: per task, candidates, rewards and the pair of the first inputs.
  """
  optimizer = make_optimizer(method)
  tasks = {name: TASKS[name](method, system, templates.eos_id) for name in method.tasks}

  def step(state, batch):
    cast = lambda tree: _cast(tree, system.compute_dtype)
    frozen = {k: v for k, v in state['frozen'].items() if k != 'initial'}
    build = lambda trained: nnx.merge(graphdef, {**frozen, **trained})
    key = jax.random.fold_in(jax.random.key(batch['seed']), state['step'])

    # Phase A. The compute-dtype weights are gathered once, before any decode loop.
    rollout_weights = sharding.gather_for_rollout(cast(state['params']))
    live = build(rollout_weights)
    frozen_model = build(state['frozen']['initial']) if system.frozen_every else None
    frozen_due = (state['step'] % max(system.frozen_every, 1)) == 0
    inputs, rollouts, pairs = {}, {}, {}
    for index, (name, task) in enumerate(tasks.items()):
      with jax.named_scope(f'{name}/rollout'):
        inputs[name] = jax.tree.map(sharding.split_rows, task.inputs(batch))
        shared = task.shared(batch)
        task_key = jax.random.fold_in(key, index)
        roll = functools.partial(task.rollout, live, frozen_model, frozen_due, shared, task_key)
        rollouts[name] = _in_chunks(roll, inputs[name], _chunk(system.rollout_chunk, method))
        pairs[name] = losses.best_and_worst(rollouts[name].rewards, method.min_margin)

    # Phase B. Sums over chunks; the weights are known from phase A, so chunks and accumulation change nothing but rounding.
    grads = jax.tree.map(jnp.zeros_like, state['params'])
    metrics, records = {}, {}
    for name, task in tasks.items():
      with jax.named_scope(f'{name}/update'):
        pair, weight = pairs[name]
        weight_sum = jnp.maximum(jnp.sum(weight), 1.0)

        def loss_fn(trained, chunk, task=task, weight_sum=weight_sum):
          row, pair, weight = chunk
          scores, mask, sampled = task.pair_scores(build(cast(trained)), *row, pair)
          mean = losses.mean_logp(scores.logp, mask)  # (b, 2)
          total, _ = losses.simpo(mean[:, 0], mean[:, 1], weight, beta=method.beta, gamma=method.gamma)
          return total / weight_sum, _pair_stats(mean, scores, mask, sampled, weight)

        def update(chunk, loss_fn=loss_fn):
          (loss, stats), grad = jax.value_and_grad(loss_fn, has_aux=True)(state['params'], chunk)
          return sharding.split_params(grad), dict(loss=loss, **stats)

        chunks = ((inputs[name], rollouts[name]), pair, weight)
        grad, stats = _sum_chunks(update, chunks, _chunk(system.update_chunk, method))
        grads = jax.tree.map(jnp.add, grads, grad)
        metrics.update({f'{name}/{k}': v for k, v in task.metrics(inputs[name], rollouts[name], pair, weight, stats).items()})
        records[name] = task.record(inputs[name], rollouts[name], pair)

    with jax.named_scope('optimizer'):
      updates, opt_state = optimizer.update(grads, state['opt_state'], state['params'])
      params = optax.apply_updates(state['params'], updates)
    metrics['loss'] = sum(metrics[f'{name}/loss'] for name in tasks)
    metrics['gradient_norm'] = optax.global_norm(grads)
    metrics['update_norm'] = optax.global_norm(updates)
    state = dict(params=params, frozen=state['frozen'], opt_state=opt_state, step=state['step'] + 1)
    return state, {k: v.astype(jnp.float32) for k, v in metrics.items()}, records

  layouts = {}

  def with_layout(state, batch):
    if not layouts:
      layouts['fn'] = jax.jit(
          step, donate_argnums=0,
          out_shardings=(sharding.shardings(jax.eval_shape(lambda s: s, state), mesh), sharding.whole(mesh), sharding.whole(mesh)))
    return layouts['fn']

  class Step:
    """The jitted step; the state's layout, known at the first call, is the output's too, so it compiles once."""

    def __call__(self, state, batch):
      return with_layout(state, batch)(state, batch)

    def lower(self, state, batch):
      return with_layout(state, batch).lower(state, batch)

    def _cache_size(self):
      return layouts['fn']._cache_size()

  return Step()


def chunks(method, system) -> dict[str, int]:
  """Inputs of a task done at once in each phase, by the key that bounds them."""
  return {f'system.{key}': _chunk(getattr(system, key), method) for key in ('rollout_chunk', 'update_chunk')}


def _chunk(size: int, method) -> int:
  part = method.inputs_per_task // method.accumulate
  return min(size or part, part)


def _in_chunks(fn, tree, chunk: int):
  """Maps fn over chunks of axis 0. Strided: rows r, r + n, r + 2n ... make a chunk, so every device chunks its own rows."""
  rows = jax.tree.leaves(tree)[0].shape[0]
  count = rows // chunk
  if count == 1:
    return fn(tree)
  split = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(chunk, count, *x.shape[1:]), 0, 1), tree)
  _, out = jax.lax.scan(lambda _, part: (None, fn(part)), None, split)
  join = lambda x: jnp.swapaxes(x, 0, 1).reshape(rows, *x.shape[2:]) if x.ndim > 1 else x
  return jax.tree.map(join, out)


def _sum_chunks(fn, tree, chunk: int):
  """Sums fn over chunks of axis 0, strided as above."""
  rows = jax.tree.leaves(tree)[0].shape[0]
  count = rows // chunk
  if count == 1:
    return fn(tree)
  split = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(chunk, count, *x.shape[1:]), 0, 1), tree)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(fn, jax.tree.map(lambda x: x[0], split)))
  return jax.lax.scan(lambda acc, part: (jax.tree.map(jnp.add, acc, fn(part)), None), zeros, split)[0]


def _pair_stats(mean, scores, mask, sampled, weight):
  """Sums over the pairs of a chunk; `metrics` divides them."""
  margin = mean[:, 0] - mean[:, 1]
  gap = jnp.abs(scores.logp - sampled) * mask
  return jax.lax.stop_gradient(dict(
      margin=jnp.sum(margin * weight), preferred=jnp.sum((margin > 0) * weight), chosen_logp=jnp.sum(mean[:, 0] * weight),
      entropy=jnp.sum(scores.entropy * mask), tokens=jnp.sum(mask).astype(jnp.float32), gap=jnp.sum(gap)))


def _take(x, pair):
  """x (B, G, ...), pair (B, 2) -> (B, 2, ...)."""
  return jnp.take_along_axis(x, pair.reshape(*pair.shape, *(1,) * (x.ndim - 2)), axis=1)


class Task:
  """What the two tasks share. A task says how to sample, to score in reverse, and to score a pair under the policy."""

  def __init__(self, method, system, eos_id: int):
    self.method, self.system, self.eos_id = method, system, eos_id
    self.sampling = Sampling(temperature=method.temperature, guidance=method.guidance, max_tokens=method.max_text_tokens)
    self.reward_scoring = Scoring(chunk=system.logprob_chunk)
    self.policy_scoring = Scoring(temperature=method.temperature, chunk=system.logprob_chunk, remat=system.remat)

  def keys(self, key, index):
    """index (b,): the inputs' global places -> one key a candidate (b, G)."""
    one = lambda i: row_keys(key, i * self.method.group_size, 1, self.method.group_size)[0]
    return jax.vmap(one)(index)

  def _frozen(self, frozen_model, due, reward, live_rewards):
    """Rewards by the frozen model where it is due, else nan; in a branch, so that they cost nothing when they are not."""
    unknown = jnp.full_like(live_rewards, jnp.nan)
    if frozen_model is None:
      return unknown
    return jax.lax.cond(due, lambda: reward(frozen_model), lambda: unknown)

  def metrics(self, inputs, rolled: Rollouts, pair, weight, stats):
    del inputs
    pairs = jnp.maximum(jnp.sum(weight), 1.0)
    tokens = jnp.maximum(stats['tokens'], 1.0)
    best_and_worst = _take(rolled.rewards, pair)
    return dict(
        loss=stats['loss'], margin=stats['margin'] / pairs, preferred=stats['preferred'] / pairs, chosen_logp=stats['chosen_logp'] / pairs,
        entropy=stats['entropy'] / tokens, reward_mean=jnp.mean(rolled.rewards), reward_best=jnp.mean(best_and_worst[:, 0]),
        reward_worst=jnp.mean(best_and_worst[:, 1]), reward_spread=jnp.mean(jnp.std(rolled.rewards, axis=1)),
        reward_frozen=jnp.mean(rolled.frozen_rewards), dropped_pairs=1.0 - jnp.mean(weight),
        **{k: jnp.mean(v) for k, v in rolled.watched.items()})

  def _record(self, rolled: Rollouts, pair):
    return dict(rewards=rolled.rewards[:SHOWN], chosen=pair[:SHOWN, 0], rejected=pair[:SHOWN, 1])


class Generation(Task):
  """Text to picture: G pictures a prompt, each scored by the likelihood of the prompt read off it (R_G)."""

  def inputs(self, batch):
    rows = batch['prompt_ids'].shape[0]
    return Text(batch['prompt_ids'], batch['prompt_mask']), jnp.arange(rows)

  def shared(self, batch):
    return Text(batch['instruction_ids'], batch['instruction_mask'])

  def rollout(self, live, frozen_model, frozen_due, instruction, key, inputs) -> Rollouts:
    prompt, index = inputs
    keys = self.keys(key, index)
    codes, logp = live.sample_pictures(prompt, keys, self.sampling)
    pictures = live.picture_from_codes(codes)
    eos = self.eos_id if self.method.eos_in_reward else None
    reward = lambda model: rewards_lib.generation(model, pictures, prompt, instruction, self.reward_scoring, eos_id=eos, keys=keys)[0]
    rewards = reward(live)
    # The sampler against the same distribution, guidance included, in one teacher-forced pass; one candidate tells.
    how = Scoring(self.method.temperature, self.method.guidance)
    first = Text(prompt.ids[:1, None], prompt.mask[:1, None])
    replayed = live.picture_logps(first, codes[:1, :1], keys[:1, :1], how).logp
    same = jnp.mean(jnp.mean(codes[:, :, None] == codes[:, None, :], axis=-1, dtype=jnp.float32), axis=(1, 2))
    group = codes.shape[1]
    watched = dict(
        similarity=(same * group - 1) / (group - 1), sampler_gap=jnp.broadcast_to(jnp.max(jnp.abs(replayed - logp[:1, :1])), same.shape))
    return Rollouts(codes, logp, rewards, self._frozen(frozen_model, frozen_due, reward, rewards), None, watched)

  def pair_scores(self, model, inputs, rolled: Rollouts, pair):
    prompt, _ = inputs
    codes = _take(rolled.candidates, pair)
    prompt = Text(prompt.ids[:, None], prompt.mask[:, None])
    scores = model.picture_logps(prompt, codes, None, self.policy_scoring)
    return scores, jnp.ones(codes.shape, bool), _take(rolled.sampled_logp, pair)

  def record(self, inputs, rolled: Rollouts, pair):
    prompt, _ = inputs
    return dict(self._record(rolled, pair), codes=rolled.candidates[:SHOWN], prompt_ids=prompt.ids[:SHOWN], prompt_mask=prompt.mask[:SHOWN])


class Understanding(Task):
  """Picture to text: G texts a picture, each scored by the likelihood of the picture drawn from it (R_U)."""

  def inputs(self, batch):
    rows = batch['pixels'].shape[0]
    return batch['pixels'], Text(batch['question_ids'], batch['question_mask']), jnp.arange(rows)

  def shared(self, batch):
    return None

  def _picture(self, model, pixels) -> Picture:
    return model.picture_from_pixels(pixels.astype(jnp.float32) / 127.5 - 1.0)

  def rollout(self, live, frozen_model, frozen_due, shared, key, inputs) -> Rollouts:
    del shared
    pixels, question, index = inputs
    keys = self.keys(key, index)
    picture = self._picture(live, pixels)
    texts, logp = live.sample_texts(picture, question, keys, self.sampling)
    reward = lambda model: rewards_lib.understanding(model, picture.codes, texts, self.reward_scoring, eos_id=self.eos_id, keys=keys)[0]
    rewards = reward(live)
    content = without_eos(texts, self.eos_id)
    length = jnp.sum(content.mask, axis=-1)
    ended = jnp.any(texts.mask & (texts.ids == self.eos_id), axis=-1)
    same = jnp.all(jnp.where(texts.mask, texts.ids, -1)[:, :, None] == jnp.where(texts.mask, texts.ids, -1)[:, None], axis=-1)
    group = length.shape[1]
    watched = dict(
        text_length=jnp.mean(length, axis=1, dtype=jnp.float32), truncated=jnp.mean(~ended, axis=1, dtype=jnp.float32),
        empty=jnp.mean(length == 0, axis=1, dtype=jnp.float32),
        similarity=(jnp.mean(same, axis=(1, 2), dtype=jnp.float32) * group - 1) / (group - 1))
    return Rollouts(texts, logp, rewards, self._frozen(frozen_model, frozen_due, reward, rewards), picture.codes, watched)

  def pair_scores(self, model, inputs, rolled: Rollouts, pair):
    pixels, question, _ = inputs
    texts = Text(*(_take(x, pair) for x in rolled.candidates))
    pixels = pixels.astype(jnp.float32)[:, None] / 127.5 - 1.0
    scores = model.text_logps(Picture(rolled.target[:, None], pixels), question, texts, None, self.policy_scoring)
    return scores, texts.mask, _take(rolled.sampled_logp, pair)

  def metrics(self, inputs, rolled, pair, weight, stats):
    # Texts are sampled without guidance: the policy that scores the pair, before its update, is the one that sampled it.
    gap = stats['gap'] / jnp.maximum(stats['tokens'], 1.0)
    return dict(super().metrics(inputs, rolled, pair, weight, stats), sampler_gap=gap)

  def record(self, inputs, rolled: Rollouts, pair):
    pixels, _, _ = inputs
    texts = rolled.candidates
    return dict(self._record(rolled, pair), pixels=pixels[:SHOWN], text_ids=texts.ids[:SHOWN], text_mask=texts.mask[:SHOWN])


TASKS = {'generation': Generation, 'understanding': Understanding}
