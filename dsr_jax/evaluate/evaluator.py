"""The evaluation inside a run: both tasks on the fixed lists of Scenes. Images are judged;
descriptions and yes/no answers are parsed.

Axes: P prompts, S samples of a prompt, C clusters (images), M sums.
"""

import numpy as np

from dsr_jax.evaluate import scores as scores_lib
from dsr_jax.evaluate import stats
from dsr_jax.evaluate.sampler import ANSWER_TOKENS, ListSampler
from dsr_jax.scenes import grammar, sets
from dsr_jax.tasks import sampling_of

# The scores of descriptions that a run logs.
LOGGED = ('f1', 'precision', 'recall', 'hallucination', 'unparsable', 'words')


class Evaluator:
  """Evaluates a run's model before, during (on the first part of each list) and after training.

  split: 'evaluation' or 'validation', the lists of prompts and images.
  """

  def __init__(self, config, processor, graphdef, split: str = 'evaluation'):
    self._eval = config.eval
    self._method = config.method
    self._split = split
    self._sampler = ListSampler(
      graphdef,
      processor,
      chunk=config.eval.chunk,
      max_prompt_tokens=config.data.max_prompt_tokens,
      max_text_tokens=config.method.max_text_tokens,
      seed=config.eval.seed,
      instruction=config.method.instruction,
      sampling=sampling_of(config.method, config.system),
    )

  def run(self, params, step: int, reader=None):
    """Evaluates parameters.

    The first and the last step use the whole lists, others only the first part of each.

    Args:
      params: the model that draws.
      step: of the run.
      reader: the model that describes and answers, if it is not the one that draws.

    Returns:
      Flat scores (generation/..., description/..., yesno/...), and details for `dsr_jax.effect`:
      {name: rows of sums}.
    """
    if self.is_whole(step):
      per_task, pictures = self._eval.prompts_per_task, self._eval.pictures
    else:
      per_task, pictures = self._eval.quick_prompts_per_task, self._eval.quick_pictures

    scores, details = self.generation(
      params,
      per_task,
      temperature=self._method.temperature,
      guidance=self._method.guidance,
      cfg_interval=self._method.cfg_interval,
    )
    if step == 0 and self._eval.tuned_temperature >= 0:
      tuned, tuned_details = self.generation(
        params,
        per_task,
        temperature=self._eval.tuned_temperature,
        guidance=self._eval.tuned_guidance,
      )
      scores['generation/tuned'] = tuned['generation/mean']
      details['generation_tuned'] = tuned_details['generation']

    understood, understood_details = self.understanding(
      params if reader is None else reader, pictures
    )
    return {**scores, **understood}, {**details, **understood_details}

  def is_whole(self, step: int) -> bool:
    """Whether the evaluation at this step uses the whole lists."""
    return step in (0, self._method.steps)

  def generation(
    self, params, per_task: int, *, temperature: float, guidance: float, cfg_interval: int = 0
  ):
    """GenEval's six tasks, their unweighted mean with its 95 % interval, and the share of prompts
    with at least one correct sample.

    Returns: flat scores, and {'generation': rows (P, S) of 0 or 1}.
    """
    prompts = sets.evaluation_prompts(per_task, self._split)
    pixels = self._sampler.pictures(
      params,
      [p.text for p in prompts],
      self._eval.images_per_prompt,
      temperature=temperature,
      guidance=guidance,
      cfg_interval=cfg_interval,
    )
    found = scores_lib.generation_scores(prompts, pixels)
    scores = {
      **with_interval('generation/mean', found['mean']),
      'generation/any': found['any'].value,
      'generation/strict': found['strict'].value,
    }
    for task, estimate in found['tasks'].items():
      scores[f'generation/{task}'] = estimate.value
    return scores, {'generation': found['correct'].astype(int).tolist()}

  def understanding(self, params, pictures: int):
    """Descriptions, both sampled at the run's temperature and greedy, and POPE-style yes/no
    questions, answered greedily.

    Returns: flat scores, and rows (C, M) of sums for each list.
    """
    sampled, sampled_rows = self._descriptions(
      params, pictures, 'description', self._method.temperature
    )
    greedy, greedy_rows = self._descriptions(params, pictures, 'description_greedy', 0.0)
    answers, answer_rows = self._yesno(params, max(pictures // 2, 1))
    details = {
      'description': sampled_rows,
      'description_greedy': greedy_rows,
      'yesno': answer_rows,
    }
    return {**sampled, **greedy, **answers}, details

  def _descriptions(self, params, pictures: int, name: str, temperature: float):
    scenes = sets.evaluation_scenes(pictures, self._split)
    texts = self._sampler.texts(
      params,
      sets.pictures(scenes),
      [grammar.QUESTION_DESCRIBE] * len(scenes),
      temperature=temperature,
    )
    sums = scores_lib.description_sums(scenes, texts)
    found = stats.estimates(sums, scores_lib.DESCRIPTION)
    scores = with_interval(f'{name}/f1', found['f1'])
    for key in LOGGED:
      scores[f'{name}/{key}'] = found[key].value
    return scores, sums.tolist()

  def _yesno(self, params, pictures: int):
    scenes, rows = sets.evaluation_pope(pictures, self._split)
    answers = self._sampler.texts(
      params,
      sets.pictures(scenes)[np.array([r.picture for r in rows])],
      [r.text for r in rows],
      temperature=0.0,
      max_tokens=ANSWER_TOKENS,
    )
    pope = scores_lib.pope_scores(rows, answers)
    overall = pope.pop('overall')
    scores = with_interval('yesno/f1', overall['f1'])
    for track, found in pope.items():
      scores[f'yesno/{track}_f1'] = found['f1'].value
    scores['yesno/accuracy'] = overall['accuracy'].value
    scores['yesno/yes_ratio'] = overall['yes_ratio'].value
    return scores, scores_lib.pope_sums(rows, answers).tolist()


def with_interval(name: str, estimate: stats.Estimate) -> dict[str, float]:
  """An estimate as three flat scores."""
  return {name: estimate.value, f'{name}_low': estimate.low, f'{name}_high': estimate.high}
