"""Both tasks measured on the fixed lists of Scenes: pictures judged, descriptions and yes/no answers parsed.

Seeds are common: candidate i of a list has the same key for every model and step, so differences are paired.
Axes: P prompts, S samples a prompt, C inputs of a chunk, T text tokens, N image codes.
"""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax import processor as processor_lib
from dsr_jax.models.unified import Picture, Sampling, Text, row_keys
from dsr_jax.scenes import evaluation, grammar, sets

QUESTION_TOKENS = 32
ANSWER_TOKENS = 6


class Sampler:
  """Samples from a model for prompts or pictures given as host data, in chunks of one shape."""

  def __init__(self, graphdef, processor, *, chunk: int, max_prompt_tokens: int, max_text_tokens: int, seed: int):
    self._processor, self._chunk = processor, chunk
    self._prompt_tokens, self._text_tokens, self._seed = max_prompt_tokens, max_text_tokens, seed

    @functools.partial(jax.jit, static_argnames=('samples', 'how'))
    def draw(params, prompt, first, seed, samples, how):
      model = nnx.merge(graphdef, params)
      keys = row_keys(jax.random.key(seed), first * samples, prompt.ids.shape[0], samples)
      codes, _ = model.sample_pictures(prompt, keys, how)
      return model.picture_from_codes(codes).pixels

    @functools.partial(jax.jit, static_argnames=('how',))
    def tell(params, pixels, question, first, seed, how):
      model = nnx.merge(graphdef, params)
      keys = row_keys(jax.random.key(seed), first, pixels.shape[0], 1)
      picture = Picture(None, pixels.astype(jnp.float32) / 127.5 - 1.0)
      return model.sample_texts(picture, question, keys, how)[0]

    self._draw, self._tell = draw, tell

  def pictures(self, params, prompts, samples: int, temperature: float, guidance: float):
    """P prompts -> (P, S, H, W, 3) uint8."""
    text = self._processor.pad([self._processor.encode_prompt(p) for p in prompts], self._prompt_tokens)
    how = Sampling(temperature=temperature, guidance=guidance)
    run = lambda first, part: processor_lib.to_uint8(np.asarray(self._draw(params, Text(*part), first, self._seed, samples, how)))
    return self._chunked(run, tuple(text))

  def texts(self, params, pixels, questions, temperature: float, max_tokens: int | None = None):
    """(P, H, W, 3) uint8 and P questions -> P texts."""
    question = self._processor.pad([self._processor.encode_question(q) for q in questions], QUESTION_TOKENS)
    how = Sampling(temperature=temperature, max_tokens=max_tokens or self._text_tokens)

    def run(first, part):
      text = jax.device_get(self._tell(params, part[0], Text(*part[1:]), first, self._seed, how))
      return np.array([self._processor.decode(ids[mask]) for ids, mask in zip(text.ids[:, 0], text.mask[:, 0])], object)

    return list(self._chunked(run, (pixels, *question)))

  def _chunked(self, run, arrays):
    """Applies run(first, part) to parts of `chunk` rows, the last one filled up with copies of its first row."""
    rows, out = len(arrays[0]), []
    for first in range(0, rows, self._chunk):
      part = tuple(a[first:first + self._chunk] for a in arrays)
      missing = self._chunk - len(part[0])
      filled = tuple(np.concatenate([a, np.repeat(a[:1], missing, axis=0)]) for a in part)
      out.append(run(first, filled)[:len(part[0])])
    return np.concatenate(out)


class Evaluator:
  """Evaluates a run's model before, during (on the beginnings of the same lists) and after."""

  def __init__(self, config, processor, graphdef, split: str = 'evaluation'):
    e, m = config.eval, config.method
    self._eval, self._method, self._split = e, m, split
    self._sampler = Sampler(graphdef, processor, chunk=e.chunk, max_prompt_tokens=config.data.max_prompt_tokens,
                            max_text_tokens=m.max_text_tokens, seed=e.seed)
    self._last = m.steps

  def run(self, params, step: int):
    """Evaluates parameters of all parts: the whole lists at the first and last step, their beginnings between.

    Returns flat scores (generation/..., description/..., yesno/...) and details: {name: rows of sums}, for `dsr_jax.effect`.
    """
    whole = step in (0, self._last)
    per_task, pictures = (self._eval.prompts_per_task, self._eval.pictures) if whole else (
        self._eval.quick_prompts_per_task, self._eval.quick_pictures)
    scores, details = self.generation(params, per_task, self._method.temperature, self._method.guidance)
    if step == 0 and self._eval.tuned_temperature >= 0:
      tuned, tuned_details = self.generation(params, per_task, self._eval.tuned_temperature, self._eval.tuned_guidance)
      scores['generation/tuned'] = tuned['generation/mean']
      details['generation_tuned'] = tuned_details['generation']
    understood, understood_details = self.understanding(params, pictures)
    return {**scores, **understood}, {**details, **understood_details}

  def generation(self, params, per_task: int, temperature: float, guidance: float):
    """GenEval's six tasks, their plain mean with its 95 % interval, and the share of prompts with any right sample."""
    prompts = sets.evaluation_prompts(per_task, self._split)
    pixels = self._sampler.pictures(params, [p.text for p in prompts], self._eval.images_per_prompt, temperature, guidance)
    scores = evaluation.generation_scores(prompts, pixels)
    flat = {f'generation/{task}': estimate.value for task, estimate in scores['tasks'].items()}
    flat = {**_with_interval('generation/mean', scores['mean']), 'generation/any': scores['any'].value,
            'generation/strict': scores['strict'].value, **flat}
    return flat, {'generation': scores['correct'].astype(int).tolist()}

  def understanding(self, params, pictures: int):
    """Descriptions, sampled at the run's temperature and greedy, and POPE-style yes/no questions, greedy."""
    scenes = sets.evaluation_scenes(pictures, self._split)
    pixels = sets.pictures(scenes)
    out, details = {}, {}
    for name, temperature in (('description', self._method.temperature), ('description_greedy', 0.0)):
      texts = self._sampler.texts(params, pixels, [grammar.QUESTIONS_DESCRIBE] * len(scenes), temperature)
      scores = evaluation.description_scores(scenes, texts)
      for key in ('f1', 'precision', 'recall', 'hallucination', 'unparsable', 'words'):
        out.update(_with_interval(f'{name}/{key}', scores[key]) if key == 'f1' else {f'{name}/{key}': scores[key].value})
      details[name] = evaluation.description_sums(scenes, texts).tolist()
    scenes, rows = sets.evaluation_pope(max(pictures // 2, 1), self._split)
    shown = sets.pictures(scenes)[np.array([r.picture for r in rows])]
    answers = self._sampler.texts(params, shown, [r.text for r in rows], 0.0, ANSWER_TOKENS)
    pope = evaluation.pope_scores(rows, answers)
    out.update(_with_interval('yesno/f1', pope['overall']['f1']))
    out.update({f'yesno/{track}_f1': scores['f1'].value for track, scores in pope.items() if track != 'overall'})
    out['yesno/accuracy'], out['yesno/yes_ratio'] = (pope['overall'][k].value for k in ('accuracy', 'yes_ratio'))
    details['yesno'] = evaluation.pope_sums(rows, answers).tolist()
    return out, details


def _with_interval(name: str, estimate) -> dict[str, float]:
  return {name: estimate.value, f'{name}_low': estimate.low, f'{name}_high': estimate.high}
