"""What the probe computes with a model: samples with their self-rewards, token log-probabilities,
and the same without the condition.

Everything comes from `inference.Sampler`, as NumPy arrays, in nats.
Axes: P inputs, G samples, M other images, K instructions, R pairs, T text tokens, N image codes,
H W pixels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.inference import Sampler
from dsr_jax.models.unified import Sampling, Scoring, Text

PAIR_TOKENS = 16  # texts of pairs are padded to multiples of this, so that there are few programs


class ProbedPictures(NamedTuple):
  """Images drawn for P prompts, and all measurements of them."""

  codes: np.ndarray  # (P, G, N)
  pixels: np.ndarray  # (P, G, H, W, 3) uint8
  rewards: np.ndarray  # (P, K, G), R_G by instruction
  text_logps: np.ndarray  # (P, G, T), of the prompt given each image, by the first instruction
  code_logps: np.ndarray  # (P, G, N), of the codes under the policy
  code_entropy: np.ndarray  # (P, G, N), of the policy
  unconditional_logps: np.ndarray  # (P, G, N), of the codes without a prompt


class ProbedTexts(NamedTuple):
  """Texts written about P images, and all measurements of them."""

  codes: np.ndarray  # (P, N), of the images
  ids: np.ndarray  # (P, G, T)
  mask: np.ndarray  # (P, G, T)
  rewards: np.ndarray  # (P, G), R_U
  logps: np.ndarray  # (P, G, T), of the texts under the policy
  entropy: np.ndarray  # (P, G, T), of the policy
  unconditional_logps: np.ndarray  # (P, N), of the images' codes given no text


class Prober:
  """A model on its device, with the temperature, guidance, group size, dtype and chunks of a run.

  model: `families.Model`. method, system: of the planned run.
  """

  def __init__(self, model, method, system, seed: int):
    self._params = _as_in_a_run(model.params, model.family, system.compute_dtype)
    self._sampler = Sampler(
      model.graphdef,
      model.processor,
      chunk=system.rollout_chunk or method.inputs_per_task,
      seed=seed,
    )
    self._group = method.group_size
    self._sampling = Sampling(
      temperature=method.temperature,
      guidance=method.guidance,
      max_tokens=method.max_text_tokens,
      cfg_interval=method.cfg_interval,
    )
    self._plain = Scoring(chunk=system.logprob_chunk)
    self._policy = Scoring(temperature=method.temperature, chunk=system.logprob_chunk)
    # Guidance 0 is the unconditional branch only.
    self._unconditional = Scoring(guidance=0.0, chunk=system.logprob_chunk)
    self._counted_eos = model.spec.eos_id if method.eos_in_reward else None

  def draw(self, prompt: Text, instructions) -> ProbedPictures:
    """Prompts (P, T) and K instructions as text -> images and all measurements of them."""
    samples = self._sampler.sample_pictures(
      self._params,
      prompt,
      group=self._group,
      how=self._sampling,
      instructions=self._sampler.questions(instructions),
      scoring=self._plain,
      eos_id=self._counted_eos,
    )
    own = self._picture_logps(prompt, samples.codes, self._policy)
    alone = self._picture_logps(prompt, samples.codes, self._unconditional)
    return ProbedPictures(
      codes=samples.codes,
      pixels=samples.pixels,
      rewards=samples.rewards,
      text_logps=samples.prompt_logps,
      code_logps=own.logp,
      code_entropy=own.entropy,
      unconditional_logps=alone.logp,
    )

  def describe(self, pixels, question: Text) -> ProbedTexts:
    """Images (P, H, W, 3) uint8 and questions about them (P, Tq) -> texts and all measurements of
    them.
    """
    samples = self._sampler.sample_texts(
      self._params,
      pixels,
      question,
      group=self._group,
      how=self._sampling,
      scoring=self._plain,
    )
    own = self._sampler.text_logps(
      self._params, pixels, question, Text(samples.ids, samples.mask), self._policy
    )
    # Without a condition the text does not matter, so any text will do: the question.
    alone = self._picture_logps(question, samples.codes[:, None], self._unconditional)
    return ProbedTexts(
      codes=samples.codes,
      ids=samples.ids,
      mask=samples.mask,
      rewards=samples.rewards,
      logps=own.logp,
      entropy=own.entropy,
      unconditional_logps=alone.logp[:, 0],
    )

  def read_prompts(self, prompt: Text, codes, instruction: str) -> np.ndarray:
    """Prompts (P, T), images (P, M, N) -> log-probabilities of the prompt's tokens given each
    image (P, M, T).
    """
    _, logps = self._sampler.read_prompts(
      self._params, prompt, codes, self._instruction(instruction), self._plain
    )
    return logps

  def score_pairs(self, texts, codes, instruction: str):
    """R texts and R images (R, N) -> R_G of each pair (R,), and log-probabilities of the codes
    given the text (R, N).
    """
    longest = self._sampler.prompts(texts).ids.shape[1]
    text = self._sampler.prompts(texts, -(-longest // PAIR_TOKENS) * PAIR_TOKENS)
    codes = np.asarray(codes)[:, None]
    rewards, _ = self._sampler.read_prompts(
      self._params, text, codes, self._instruction(instruction), self._plain
    )
    given_text = self._picture_logps(text, codes, self._plain)
    return rewards[:, 0], given_text.logp[:, 0]

  def encode(self, pixels) -> np.ndarray:
    """(P, H, W, 3) uint8 -> codes (P, N)."""
    return self._sampler.encode(self._params, pixels)

  def _picture_logps(self, prompt: Text, codes, how: Scoring):
    """prompt (P, T), codes (P, h, N) -> TokenScores (P, h, N)."""
    one_each = Text(prompt.ids[:, None], prompt.mask[:, None])
    return self._sampler.picture_logps(self._params, one_each, codes, how)

  def _instruction(self, sentence: str) -> Text:
    """(Ti,)."""
    ids, mask = self._sampler.questions([sentence])
    return Text(ids[0], mask[0])


def _as_in_a_run(params, family, compute_dtype: str):
  """Parameters on the device in the compute dtype. Only the image tokenizer stays in float32,
  because small errors change its codes.
  """

  def cast(part, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), part)

  return {
    name: cast(part, None if name == family.image_tokenizer else compute_dtype)
    for name, part in params.items()
  }
