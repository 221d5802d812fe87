"""Text in, images and text out: sampling for lists of prompts, images and questions.

Axes: P prompts or images, S samples of each, K samples of which the best is kept, H W pixels.
"""

import dataclasses

import numpy as np

from dsr_jax.inference import Sampler, best_of
from dsr_jax.models.unified import Sampling, Scoring

QUESTION_TOKENS = 32
ANSWER_TOKENS = 6
DEFAULTS = Sampling()


class ListSampler:
  """Samples from models of one structure for lists of texts.

  instruction: what the model is asked about its images when R_G chooses the best of K (otherwise
  unused). sampling: how the decoder works; temperature, guidance and lengths are arguments of the
  methods.
  """

  def __init__(
    self,
    graphdef,
    processor,
    *,
    chunk: int,
    max_prompt_tokens: int,
    max_text_tokens: int,
    seed: int,
    instruction: str = '',
    sampling: Sampling = DEFAULTS,
  ):
    self._sampler = Sampler(graphdef, processor, chunk=chunk, seed=seed)
    self._prompt_tokens = max_prompt_tokens
    self._text_tokens = max_text_tokens
    self._instruction = instruction
    self._sampling = sampling

  def pictures(
    self,
    params,
    prompts,
    samples: int,
    *,
    temperature: float,
    guidance: float,
    best: int = 1,
    seed: int | None = None,
    cfg_interval: int = 0,
  ):
    """P prompts -> (P, S, H, W, 3) uint8; each of the S is the best by R_G of `best` samples."""
    drawn = self._sampler.sample_pictures(
      params,
      self._sampler.prompts(prompts, self._prompt_tokens),
      group=samples * best,
      how=dataclasses.replace(
        self._sampling, temperature=temperature, guidance=guidance, cfg_interval=cfg_interval
      ),
      instructions=self._sampler.questions([self._instruction]) if best > 1 else None,
      seed=seed,
    )
    if best == 1:
      return drawn.pixels
    return best_of(drawn.pixels, drawn.rewards.reshape(-1, samples, best))

  def texts(
    self,
    params,
    pixels,
    questions,
    *,
    temperature: float,
    max_tokens: int | None = None,
    best: int = 1,
    seed: int | None = None,
  ) -> list[str]:
    """(P, H, W, 3) uint8 and P questions -> P texts, each the best by R_U of `best` samples."""
    written = self._sampler.sample_texts(
      params,
      pixels,
      self._sampler.questions(questions, QUESTION_TOKENS),
      group=best,
      how=dataclasses.replace(
        self._sampling, temperature=temperature, max_tokens=max_tokens or self._text_tokens
      ),
      scoring=Scoring() if best > 1 else None,
      seed=seed,
    )
    if best == 1:
      chosen = np.zeros(len(pixels), int)
    else:
      chosen = np.argmax(written.rewards, axis=-1)
    rows = np.arange(len(pixels))
    return self._sampler.words(written.ids[rows, chosen], written.mask[rows, chosen])
