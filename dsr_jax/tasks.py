"""The two tasks: how each samples, judges its candidates, and scores those that learn; and the
numbers watched on the way.

Axes: B inputs, G candidates, C candidates that learn (2 of a pair, 1, or all G), T text tokens, N
  image codes, H W pixels.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsr_jax import losses
from dsr_jax.models.unified import Picture, Sampling, Scoring, Text, row_keys, without_eos
from dsr_jax.rewards import base as rewards_lib

SHOWN = 3  # inputs of each task whose candidates leave the step as records


class Rollouts(NamedTuple):
  """What phase A leaves of a task: candidates, their log-probability when sampled, rewards and what
  is watched.
  """

  candidates: Any  # codes (B, G, N), or Text (B, G, T)
  sampled_logp: jax.Array  # (B, G, N or T), under the distribution that sampled
  rewards: jax.Array  # (B, G)
  frozen_rewards: jax.Array  # (B, G), nan where the frozen model did not score this step
  target: Any  # what conditions the policy: codes of the original picture (B, N), or None
  watched: dict  # numbers of each input (B,)


class Judges(NamedTuple):
  """Who scores. frozen: the initial model for the log, or None; the flags (scalars) say whether
  this step's turn has come.
  """

  scorer: Any
  weights: Any  # of a reward that has its own
  frozen: Any
  frozen_due: jax.Array
  probe_due: jax.Array


class Learned(NamedTuple):
  """What phase B leaves of a task: the loss and, (B, C, T) each, log-probabilities, mask and
  entropies of those that learned.
  """

  loss: jax.Array
  logp: jax.Array
  old: jax.Array
  reference: jax.Array | None
  mask: jax.Array
  sampled: jax.Array
  entropy: jax.Array


class Task:
  """What the two tasks share. A task says how to sample, to judge, and to score candidates under
  the policy.
  """

  name: str

  def __init__(self, method, system, eos_id: int):
    self.method, self.system, self.eos_id = method, system, eos_id
    self.objective = losses.OBJECTIVES[method.objective]
    self.sampling = Sampling(
      method.temperature,
      method.guidance,
      method.max_text_tokens,
      system.decode_segment,
      system.decode_scan,
      method.cfg_interval,
      system.cache_dtype,
    )
    self.reward_scoring = Scoring(chunk=system.logprob_chunk)
    self.policy_scoring = Scoring(
      temperature=method.temperature, chunk=system.logprob_chunk, remat=system.remat
    )
    self.scores_its_sampler = True  # whether policy_scoring is the distribution that sampled

  def extra(self, batch):
    """The batch's further fields of each input, (B, ...)."""
    return {
      k.removeprefix(f'{self.name}/'): v for k, v in batch.items() if k.startswith(f'{self.name}/')
    }

  def keys(self, key, index):
    """index (b,): the inputs' global places -> one key a candidate (b, G)."""

    def one(i):
      return row_keys(key, i * self.method.group_size, 1, self.method.group_size)[0]

    return jax.vmap(one)(index)

  def judged(self, judges: Judges, case):
    """case: model -> `rewards.Case`. Rewards (b, G) by the scorer, and by the frozen model where it
    is due, else nan.
    """
    rewards = rewards_lib.score(case(judges.scorer))
    unknown = jnp.full_like(rewards, jnp.nan)
    if judges.frozen is None:
      return rewards, unknown
    if self.method.scorer == 'frozen' or not rewards_lib.REWARDS[self.method.reward].self_reward:
      return rewards, rewards
    # In a branch, so that it costs nothing when it is not due.
    return rewards, jax.lax.cond(
      judges.frozen_due, lambda: rewards_lib.score(case(judges.frozen)), lambda: unknown
    )

  def metrics(self, inputs, rolled: Rollouts, pair, weight, learned):
    """The task's numbers. learned: a `Learned` of each inner update, of which the first and the
    last are looked at.
    """
    del inputs
    first, last = learned[0], learned[-1]
    best_and_worst = take(rolled.rewards, pair)
    values = dict(
      loss=first.loss,
      entropy=_mean(first.entropy, first.mask),
      reward_mean=jnp.mean(rolled.rewards),
      reward_best=jnp.mean(best_and_worst[:, 0]),
      reward_worst=jnp.mean(best_and_worst[:, 1]),
      reward_spread=jnp.mean(jnp.std(rolled.rewards, axis=1)),
      reward_frozen=jnp.mean(rolled.frozen_rewards),
      dropped_pairs=1.0 - jnp.mean(weight),
      **{k: jnp.mean(v) for k, v in rolled.watched.items()},
    )
    if self.objective.measure is None:
      return values | _pair_metrics(first, weight)
    values |= self.objective.measure(_learners(first, rolled), self.method) | self._against_sampler(
      first
    )
    if len(learned) > 1:
      values |= {
        f'{k}_last': v
        for k, v in self.objective.measure(_learners(last, rolled), self.method).items()
      }
    return values

  def _against_sampler(self, first: Learned):
    """Of whole groups: the largest |ratio to the sampler - 1|, or, where another distribution
    sampled, the effective sample size.
    """
    gap = first.logp - first.sampled
    if self.scores_its_sampler:
      return dict(sampler_ratio_gap=jnp.max(jnp.where(first.mask, jnp.abs(jnp.expm1(gap)), 0.0)))
    weight = jax.nn.softmax(
      losses.sum_logp(gap, first.mask), axis=-1
    )  # (B, G), of whole candidates within their group
    return dict(effective_sample_size=jnp.mean(1.0 / jnp.sum(jnp.square(weight), axis=-1)))

  def _record(self, rolled: Rollouts, pair):
    return dict(rewards=rolled.rewards[:SHOWN], chosen=pair[:SHOWN, 0], rejected=pair[:SHOWN, 1])


class Generation(Task):
  """Text to picture: G pictures a prompt, each scored by the likelihood of the prompt read off it
  (R_G).
  """

  name = 'generation'

  def __init__(self, method, system, eos_id: int):
    super().__init__(method, system, eos_id)
    if method.policy_guidance:
      self.policy_scoring = Scoring(
        method.temperature, method.guidance, system.logprob_chunk, system.remat, method.cfg_interval
      )
    self.scores_its_sampler = method.policy_guidance or method.guidance == 1.0

  def inputs(self, batch):
    rows = batch['prompt_ids'].shape[0]
    return Text(batch['prompt_ids'], batch['prompt_mask']), jnp.arange(rows), self.extra(batch)

  def shared(self, batch):
    return Text(batch['instruction_ids'], batch['instruction_mask']), whole_fields(batch)

  def rollout(self, live, judges: Judges, shared, key, inputs) -> Rollouts:
    prompt, index, extra = inputs
    instruction, whole = shared
    keys = self.keys(key, index)
    codes, logp = live.sample_pictures(prompt, keys, self.sampling)
    pictures = live.picture_from_codes(codes)

    def case(model):
      return rewards_lib.Case(
        self.name,
        model,
        prompt,
        pictures,
        instruction,
        keys,
        {**extra, **whole},
        judges.weights,
        self.reward_scoring,
        self.eos_id,
        self.method,
      )

    rewards, frozen = self.judged(judges, case)
    # The sampler against the same distribution, guidance included, in one teacher-forced pass; one
    # candidate tells.
    how = Scoring(
      self.method.temperature,
      self.method.guidance,
      self.system.logprob_chunk,
      cfg_interval=self.method.cfg_interval,
    )
    first = Text(prompt.ids[:1, None], prompt.mask[:1, None])
    replayed = live.picture_logps(first, codes[:1, :1], keys[:1, :1], how).logp
    same = jnp.mean(
      jnp.mean(codes[:, :, None] == codes[:, None, :], axis=-1, dtype=jnp.float32), axis=(1, 2)
    )
    group = codes.shape[1]
    variety = code_entropy(codes)
    watched = dict(
      similarity=(same * group - 1) / (group - 1),
      sampler_gap=jnp.broadcast_to(jnp.max(jnp.abs(replayed - logp[:1, :1])), same.shape),
      code_entropy=jnp.mean(variety, axis=1),
      reward_entropy_slope=slope(rewards, variety),
    )
    if self.system.probe_every:
      watched |= self._probes(judges, prompt, pictures, instruction, keys, extra)
    return Rollouts(codes, logp, rewards, frozen, None, watched)

  def _probes(self, judges, prompt, pictures, instruction, keys, extra):
    """How a reward is hacked, (b,) each, nan where not due: R_G's gain over the prompt with
    attributes swapped, the share of
    candidates that it tells apart, and R_G's loss when pictures are coarsened, which hits what only
    a model can see."""

    def score(text, shown):
      return rewards_lib.generation(
        judges.scorer, shown, text, instruction, self.reward_scoring, keys=keys
      )[0]

    def look():
      swapped = Text(extra['negative_ids'][:, 0], extra['negative_mask'][:, 0])
      plain = score(prompt, pictures)
      gain = plain - score(swapped, pictures)
      coarse = plain - score(prompt, Picture(pictures.codes, coarsened(pictures.pixels)))
      return dict(
        probe_swapped_gain=jnp.mean(gain, axis=1),
        probe_swapped_right=jnp.mean(gain > 0, axis=1, dtype=jnp.float32),
        probe_coarse_loss=jnp.mean(coarse, axis=1),
      )

    def unknown():
      return {k: jnp.full(v.shape, jnp.nan) for k, v in jax.eval_shape(look).items()}

    return jax.lax.cond(judges.probe_due, look, unknown)

  def pair_scores(self, model, inputs, rolled: Rollouts, pair):
    """pair (b, C): indices of candidates -> `TokenScores`, mask and log-probabilities when sampled,
    (b, C, N) each.
    """
    prompt = inputs[0]
    codes = take(rolled.candidates, pair)
    prompt = Text(prompt.ids[:, None], prompt.mask[:, None])
    scores = model.picture_logps(prompt, codes, None, self.policy_scoring)
    return scores, jnp.ones(codes.shape, bool), take(rolled.sampled_logp, pair)

  def record(self, inputs, rolled: Rollouts, pair):
    prompt = inputs[0]
    return dict(
      self._record(rolled, pair),
      codes=rolled.candidates[:SHOWN],
      prompt_ids=prompt.ids[:SHOWN],
      prompt_mask=prompt.mask[:SHOWN],
    )


class Understanding(Task):
  """Picture to text: G texts a picture, each scored by the likelihood of the picture drawn from it
  (R_U).
  """

  name = 'understanding'

  def inputs(self, batch):
    rows = batch['pixels'].shape[0]
    return (
      batch['pixels'],
      Text(batch['question_ids'], batch['question_mask']),
      jnp.arange(rows),
      self.extra(batch),
    )

  def shared(self, batch):
    return None, whole_fields(batch)

  def rollout(self, live, judges: Judges, shared, key, inputs) -> Rollouts:
    _, whole = shared
    pixels, question, index, extra = inputs
    keys = self.keys(key, index)
    picture = live.picture_from_pixels(pixels.astype(jnp.float32) / 127.5 - 1.0)
    texts, logp = live.sample_texts(picture, question, keys, self.sampling)

    def case(model):
      return rewards_lib.Case(
        self.name,
        model,
        texts,
        picture,
        question,
        keys,
        {**extra, **whole},
        judges.weights,
        self.reward_scoring,
        self.eos_id,
        self.method,
      )

    rewards, frozen = self.judged(judges, case)
    content = without_eos(texts, self.eos_id)
    length = jnp.sum(content.mask, axis=-1)
    ended = jnp.any(texts.mask & (texts.ids == self.eos_id), axis=-1)
    same = jnp.all(
      jnp.where(texts.mask, texts.ids, -1)[:, :, None]
      == jnp.where(texts.mask, texts.ids, -1)[:, None],
      axis=-1,
    )
    group = length.shape[1]
    watched = dict(
      text_length=jnp.mean(length, axis=1, dtype=jnp.float32),
      truncated=jnp.mean(~ended, axis=1, dtype=jnp.float32),
      empty=jnp.mean(length == 0, axis=1, dtype=jnp.float32),
      reward_length_slope=slope(rewards, length.astype(jnp.float32)),
      similarity=(jnp.mean(same, axis=(1, 2), dtype=jnp.float32) * group - 1) / (group - 1),
    )
    return Rollouts(texts, logp, rewards, frozen, picture.codes, watched)

  def pair_scores(self, model, inputs, rolled: Rollouts, pair):
    """pair (b, C): indices of candidates -> `TokenScores`, mask and log-probabilities when sampled,
    (b, C, T) each.
    """
    pixels, question = inputs[:2]
    texts = Text(*(take(x, pair) for x in rolled.candidates))
    pixels = pixels.astype(jnp.float32)[:, None] / 127.5 - 1.0
    scores = model.text_logps(
      Picture(rolled.target[:, None], pixels), question, texts, None, self.policy_scoring
    )
    return scores, texts.mask, take(rolled.sampled_logp, pair)

  def metrics(self, inputs, rolled, pair, weight, learned):
    # Texts are sampled without guidance: the policy that scores them, before its update, is the one
    # that sampled them.
    gap = _mean(jnp.abs(learned[0].logp - learned[0].sampled), learned[0].mask)
    return dict(super().metrics(inputs, rolled, pair, weight, learned), sampler_gap=gap)

  def record(self, inputs, rolled: Rollouts, pair):
    pixels = inputs[0]
    texts = rolled.candidates
    return dict(
      self._record(rolled, pair),
      pixels=pixels[:SHOWN],
      text_ids=texts.ids[:SHOWN],
      text_mask=texts.mask[:SHOWN],
    )


TASKS = {task.name: task for task in (Generation, Understanding)}


def whole_fields(batch):
  """The batch's further fields that are of no input in particular."""
  return {k.removeprefix('whole/'): v for k, v in batch.items() if k.startswith('whole/')}


def take(x, index):
  """x (B, G, ...), index (B, C) -> (B, C, ...)."""
  return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)


# What is watched.


def code_entropy(codes):
  """codes (..., N) -> entropy in nats of the codes' frequencies within a picture, (...): low where
  it is flat.
  """
  share = jnp.mean(
    codes[..., :, None] == codes[..., None, :], axis=-1, dtype=jnp.float32
  )  # of each place's code
  return -jnp.mean(jnp.log(share), axis=-1)


def slope(y, x):
  """y, x (B, G) -> least-squares slope of y on x within each group, (B,); 0 where x does not
  vary.
  """
  x, y = losses.centred(x), losses.centred(y)
  spread = jnp.sum(x * x, axis=-1)
  return jnp.where(spread > 0, jnp.sum(x * y, axis=-1) / jnp.where(spread > 0, spread, 1.0), 0.0)


def coarsened(pixels):
  """Pixels (..., H, W, 3) with every 2 x 2 replaced by its mean."""
  *lead, height, width, channels = pixels.shape
  mean = jnp.mean(pixels.reshape(-1, height // 2, 2, width // 2, 2, channels), axis=(2, 4))
  return jnp.repeat(jnp.repeat(mean, 2, axis=1), 2, axis=2).reshape(*lead, height, width, channels)


def _mean(values, mask):
  return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def _learners(learned: Learned, rolled: Rollouts):
  return losses.Learners(learned.logp, learned.old, learned.reference, learned.mask, rolled.rewards)


def _pair_metrics(first: Learned, weight):
  """Means over the pairs that count; of a best candidate alone only its log-probability."""
  mean = losses.mean_logp(first.logp, first.mask)
  pairs = jnp.maximum(jnp.sum(weight), 1.0)
  values = dict(chosen_logp=jnp.sum(mean[:, 0] * weight) / pairs)
  if mean.shape[1] == 2:
    margin = mean[:, 0] - mean[:, 1]
    values |= dict(
      margin=jnp.sum(margin * weight) / pairs, preferred=jnp.sum((margin > 0) * weight) / pairs
    )
  return values
