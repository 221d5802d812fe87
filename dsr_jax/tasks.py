"""The two tasks: how each samples, rewards its samples, and scores the samples that learn.

  generation     prompt -> G images, each with reward log p(prompt | image)        (R_G)
  understanding  image  -> G texts,  each with reward log p(image's codes | text)  (R_U)

Axes: B inputs, b inputs of a chunk, G samples, C samples that learn (2 of a pair, 1, or all G), T
text tokens, N image codes, H W pixels.
"""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dsr_jax import credit, diagnostics, images, losses
from dsr_jax.diagnostics import take
from dsr_jax.models.unified import (
  Picture,
  Sampling,
  Scoring,
  Spec,
  Text,
  UnifiedModel,
  named,
  row_keys,
  score_keys,
)
from dsr_jax.rewards import dual
from dsr_jax.rewards import table as reward_table
from dsr_jax.rewards.base import RewardInputs
from dsr_jax.rollouts import (
  Batch,
  GenerationInputs,
  Half,
  LearnerScores,
  Rewards,
  Rollout,
  Scorers,
  UnderstandingInputs,
  UpdateAux,
)


def sampling_of(method, system) -> Sampling:
  """How a run samples, in its steps and in its evaluations."""
  return Sampling(
    temperature=method.temperature,
    guidance=method.guidance,
    max_tokens=method.max_text_tokens,
    segment=system.decode_segment,
    scan=system.decode_scan,
    cfg_interval=method.cfg_interval,
    cache_dtype=system.cache_dtype,
    chunk=system.logprob_chunk,
  )


class Task(abc.ABC):
  """Base class of the two tasks.

  A task defines how to sample (`rollout`) and how the policy scores its samples
  (`learner_scores`).
  """

  name: str

  def __init__(self, method, system, spec: Spec):
    self.method = method
    self.system = system
    self.spec = spec
    self.asked = reward_table.asked(method, self.name) is not None
    self.objective = losses.OBJECTIVES[method.objective]
    # Guidance applies to images only; texts are sampled without it.
    self.sampling = sampling_of(method, system)
    # Rewards are plain likelihoods; policy scores use the sampling temperature.
    self.reward_scoring = Scoring(chunk=system.logprob_chunk)
    self.policy_scoring = Scoring(
      temperature=method.temperature,
      chunk=system.logprob_chunk,
      remat=system.remat,
      picture_likelihood=method.picture_likelihood,
      prompt_drop=named(spec, method).prompt_drop,
      prompt_drop_way=method.prompt_drop_way,
      elbo_draws=method.elbo_draws,
    )
    # Whether the sampler's log-probabilities are likelihoods, and whether they are also those of
    # policy_scoring.
    self.sampler_is_exact = self.scores_its_sampler = spec.text_sampler_is_exact

  @abc.abstractmethod
  def inputs(self, batch: Batch) -> Any:
    """The task's half of a batch, one row per input."""

  @abc.abstractmethod
  def rollout(
    self, policy: UnifiedModel, scorers: Scorers, batch: Batch, task_key, inputs
  ) -> Rollout:
    """Samples and scores a chunk of `batch`'s inputs."""

  @abc.abstractmethod
  def learner_scores(self, model: UnifiedModel, inputs, rollout: Rollout, index) -> LearnerScores:
    """`model`'s log-probabilities of samples `index` (b, C), as the loss sees them."""

  def sample_keys(self, task_key, place):
    """place (b,), the inputs' global indices -> one key per sample, (b, G)."""
    group = self.method.group_size
    return jax.vmap(lambda i: row_keys(task_key, i * group, 1, group)[0])(place)

  def rewards(
    self,
    scorers: Scorers,
    batch: Batch,
    inputs,
    *,
    text: Text,
    picture: Picture,
    question: Text,
    sample_keys,
    keys_to_score,
  ) -> Rewards:
    """The samples' rewards from the scorer, and from the initial model if that is due.

    text, picture, question: see `RewardInputs`; sample_keys (b, G); keys_to_score (b,) or None.
    """

    def score_by(model):
      return reward_table.score(
        RewardInputs(
          task=self.name,
          model=model,
          text=text,
          picture=picture,
          question=question,
          sample_keys=sample_keys,
          score_keys=keys_to_score,
          extra={**inputs.extra, **batch.shared},
          reward_params=scorers.reward_params,
          scoring=self.reward_scoring,
          eos_id=self.spec.eos_id,
          method=self.method,
        )
      )

    scored = score_by(scorers.scorer)
    live = scored.total
    unknown = jnp.full_like(live, jnp.nan)
    one_opinion = self.method.scorer == 'frozen' or not reward_table.is_self_reward(
      self.method, self.name
    )
    if scorers.frozen is None:
      frozen = unknown
    elif one_opinion:
      frozen = live
    else:
      # A branch, so that it costs nothing when it is not due.
      frozen = jax.lax.cond(
        scorers.frozen_due, lambda: score_by(scorers.frozen).total, lambda: unknown
      )
    return Rewards(live=live, frozen=frozen, terms=scored.terms)

  @abc.abstractmethod
  def watched(self, samples, rewards) -> dict:
    """Per-input diagnostics of samples and their rewards (b, G)."""

  @abc.abstractmethod
  def total(self, samples, rewards):
    """The final rewards (b, G), after the task's own corrections."""

  def with_answer(self, rollout: Rollout, answer) -> Rollout:
    """The rollout with the external rewards (B, G) added."""

    def whole(rewards):
      summed = reward_table.with_answer(rewards, answer, self.method, self.name)
      return self.total(rollout.samples, summed)

    rewards = whole(rollout.rewards)
    return rollout._replace(
      rewards=rewards,
      frozen_rewards=whole(rollout.frozen_rewards),
      diagnostics=rollout.diagnostics
      | self.watched(rollout.samples, rewards)
      | diagnostics.of_terms({'external': answer}),
      pixels=None,
    )

  def metrics(self, half: Half, aux: list[UpdateAux]) -> dict:
    """The task's metrics. aux: one per inner update; only the first and the last are used."""
    first, last = aux[0], aux[-1]
    values = diagnostics.of_update(first)
    values |= diagnostics.of_rollout(half.rollout, half.pair, half.pair_weight)
    measure = self.objective.measure
    if measure is None:
      return values | diagnostics.of_pairs(first, half.pair_weight)
    values |= measure(_loss_inputs(first, half), self.method)
    if self.sampler_is_exact:
      values |= diagnostics.against_sampler(first, self.scores_its_sampler)
    if len(aux) > 1:
      at_the_end = measure(_loss_inputs(last, half), self.method)
      values |= {f'{name}_last': value for name, value in at_the_end.items()}
    return values

  def record(self, half: Half) -> dict:
    """All samples, rewards and pairs, for the rows and sample sheets of the step."""
    return dict(
      rewards=half.rollout.rewards,
      frozen_rewards=half.rollout.frozen_rewards,
      chosen=half.pair[:, 0],
      rejected=half.pair[:, 1],
    )


class Generation(Task):
  """Text to image."""

  name = 'generation'

  def __init__(self, method, system, spec: Spec):
    super().__init__(method, system, spec)
    # The likelihood under the guided mixture that the sampler uses.
    self.guided_scoring = Scoring(
      temperature=method.temperature,
      guidance=method.guidance,
      chunk=system.logprob_chunk,
      remat=system.remat,
      cfg_interval=method.cfg_interval,
    )
    if method.policy_guidance:
      self.policy_scoring = self.guided_scoring
    plain = method.guidance == 1.0
    self.sampler_is_exact = spec.sampler_is_exact
    self.scores_its_sampler = spec.sampler_is_exact and (method.policy_guidance or plain)

  def inputs(self, batch: Batch) -> GenerationInputs:
    half = batch.generation
    assert half is not None
    place = jnp.arange(half.prompt.ids.shape[0])
    return GenerationInputs(half.prompt, place, half.extra)

  def rollout(
    self, policy: UnifiedModel, scorers: Scorers, batch: Batch, task_key, inputs: GenerationInputs
  ) -> Rollout:
    """Samples, decodes and scores a chunk of `batch`'s inputs."""
    assert batch.generation is not None
    prompt, instruction = inputs.prompt, batch.generation.instruction
    keys = self.sample_keys(task_key, inputs.place)
    keys_to_score = score_keys(self.spec, keys)

    # Sample G images per prompt, and decode them: codes -> pixels.
    codes, logps = policy.sample_pictures(prompt, keys, self.sampling)
    pictures = policy.picture_from_codes(codes)

    # Reward: how likely the prompt is given each image.
    rewards = self.rewards(
      scorers,
      batch,
      inputs,
      text=prompt,
      picture=pictures,
      question=instruction,
      sample_keys=keys,
      keys_to_score=keys_to_score,
    )

    # Divide an image's reward among its codes.
    divided = None
    if self.method.credit != 'equal':
      drawn = credit.Drawn(
        policy=policy,
        prompt=prompt,
        codes=codes,
        pixels=pictures.pixels,
        reward=lambda pixels: dual.of_prompts(
          scorers.scorer,
          Picture(codes, pixels),
          prompt,
          instruction,
          dataclasses.replace(self.reward_scoring, remat=self.system.remat),
          eos_id=self.spec.eos_id if self.method.eos_in_reward else None,
          keys=keys_to_score,
        ),
        how=self.reward_scoring,
        keys=keys_to_score,
      )
      divided = credit.divided(self.method.credit, drawn)

    # Monitoring.
    watched = self.watched(codes, rewards.live) | diagnostics.of_terms(rewards.terms)
    if divided is not None:
      watched['credit_share'] = jnp.mean(credit.share(divided), axis=-1)
    if self.sampler_is_exact:
      watched['sampler_gap'] = diagnostics.sampler_gap(
        policy,
        prompt,
        codes,
        logps,
        dataclasses.replace(self.guided_scoring, remat=False),
        keys=keys_to_score,
      )
    if self.system.probe_every:
      watched |= diagnostics.hack_probes(
        scorers=scorers,
        prompt=prompt,
        pictures=pictures,
        instruction=instruction,
        extra=inputs.extra,
        how=self.reward_scoring,
        keys=keys_to_score,
      )
    return Rollout(
      samples=codes,
      sample_logps=logps,
      rewards=rewards.live,
      frozen_rewards=rewards.frozen,
      score_keys=keys_to_score,
      target_codes=None,
      diagnostics=watched,
      pixels=images.levels(pictures.pixels) if self.asked else None,
      credit=divided,
    )

  def watched(self, samples, rewards) -> dict:
    return diagnostics.of_codes(samples, rewards)

  def total(self, samples, rewards):
    return rewards

  def learner_scores(
    self, model: UnifiedModel, inputs: GenerationInputs, rollout: Rollout, index
  ) -> LearnerScores:
    """`model`'s log-probabilities of samples `index` (b, C), as the loss sees them."""
    codes = take(rollout.samples, index)
    prompt = Text(inputs.prompt.ids[:, None], inputs.prompt.mask[:, None])
    scores = model.picture_logps(prompt, codes, rollout.score_keys, self.policy_scoring)
    return LearnerScores(
      logps=scores.logp,
      entropy=scores.entropy,
      mask=jnp.ones(codes.shape, bool),
      sample_logps=take(rollout.sample_logps, index),
      credit=None if rollout.credit is None else take(rollout.credit, index),
    )

  def record(self, half: Half) -> dict:
    prompt = half.inputs.prompt
    return dict(
      super().record(half),
      codes=half.rollout.samples,
      prompt_ids=prompt.ids,
      prompt_mask=prompt.mask,
    )


class Understanding(Task):
  """Image to text."""

  name = 'understanding'

  def inputs(self, batch: Batch) -> UnderstandingInputs:
    half = batch.understanding
    assert half is not None
    place = jnp.arange(half.pixels.shape[0])
    return UnderstandingInputs(half.pixels, half.question, place, half.extra)

  def rollout(
    self,
    policy: UnifiedModel,
    scorers: Scorers,
    batch: Batch,
    task_key,
    inputs: UnderstandingInputs,
  ) -> Rollout:
    """Samples and scores a chunk of `batch`'s inputs."""
    question = inputs.question
    keys = self.sample_keys(task_key, inputs.place)
    keys_to_score = score_keys(self.spec, keys)

    # The model's input and the target codes of R_U come from the same crop.
    picture = policy.picture_from_pixels(images.to_float(inputs.pixels))
    texts, logps = policy.sample_texts(picture, question, keys, self.sampling)

    # Reward: how likely the image's codes are given each text.
    rewards = self.rewards(
      scorers,
      batch,
      inputs,
      text=texts,
      picture=picture,
      question=question,
      sample_keys=keys,
      keys_to_score=keys_to_score,
    )
    watched = self.watched(texts, rewards.live) | diagnostics.of_terms(rewards.terms)
    return Rollout(
      samples=texts,
      sample_logps=logps,
      rewards=rewards.live,
      frozen_rewards=rewards.frozen,
      score_keys=keys_to_score,
      target_codes=picture.codes,
      diagnostics=watched,
    )

  def watched(self, samples, rewards) -> dict:
    return diagnostics.of_texts(samples, rewards, self.spec.eos_id)

  def total(self, samples, rewards):
    return dual.worst_where_empty(rewards, samples, self.spec.eos_id)

  def learner_scores(
    self, model: UnifiedModel, inputs: UnderstandingInputs, rollout: Rollout, index
  ) -> LearnerScores:
    """`model`'s log-probabilities of samples `index` (b, C), as the loss sees them."""
    texts = Text(*(take(x, index) for x in rollout.samples))
    pixels = images.to_float(inputs.pixels)[:, None]
    assert rollout.target_codes is not None
    picture = Picture(rollout.target_codes[:, None], pixels)
    scores = model.text_logps(
      picture, inputs.question, texts, rollout.score_keys, self.policy_scoring
    )
    return LearnerScores(
      logps=scores.logp,
      entropy=scores.entropy,
      mask=texts.mask,
      sample_logps=take(rollout.sample_logps, index),
    )

  def metrics(self, half: Half, aux: list[UpdateAux]) -> dict:
    values = super().metrics(half, aux)
    if self.sampler_is_exact:
      # Texts are sampled without guidance, so before its update, the policy that scores them is
      # the one that sampled them.
      gap = jnp.abs(aux[0].logps - aux[0].sample_logps)
      values['sampler_gap'] = diagnostics.masked_mean(gap, aux[0].mask)
    return values

  def record(self, half: Half) -> dict:
    texts = half.rollout.samples
    return dict(
      super().record(half),
      codes=half.rollout.target_codes,
      pixels=half.inputs.pixels,
      text_ids=texts.ids,
      text_mask=texts.mask,
    )


TASKS: dict[str, Any] = {task.name: task for task in (Generation, Understanding)}


def _loss_inputs(aux: UpdateAux, half: Half) -> losses.LossInputs:
  return losses.LossInputs(
    logps=aux.logps,
    old_logps=aux.old_logps,
    ref_logps=aux.ref_logps,
    mask=aux.mask,
    rewards=half.rollout.rewards,
  )
