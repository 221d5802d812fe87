"""From a drawn picture to its record, by whatever evaluators it is given.

Evaluators are callables (those of `adapters`, or stubs), so this knows neither torch nor their
models. A record is JSON values; a command keeps each as it comes and leaves out what it has.
"""

from collections.abc import Callable, Mapping, Sequence
import os
from typing import Any, NamedTuple

from PIL import Image

from dsr_jax import images
from dsr_jax.evaluate import geneval
from dsr_jax.evaluate.t2i_compbench import benchmark, binding, mixed, numeracy, spatial
from dsr_jax.evaluate.t2i_compbench.words import Tagger


class CompBenchEvaluators(NamedTuple):
  """Who looks at the pictures of T2I-CompBench.

  Attributes:
    tagger: reads prompts.
    vqa: (picture, questions) -> answers, four decimals each.
    detector: (picture, labels) -> detections.
    cosine: (pictures, texts) -> cosines.
  """

  tagger: Tagger
  vqa: Callable[[Image.Image, Sequence[str]], Sequence[str]]
  detector: Callable[[Image.Image, Sequence[str]], Sequence[spatial.Detection]]
  cosine: Callable[[Sequence[Image.Image], Sequence[str]], Sequence[float]]


def judge_geneval(
  folder: str,
  path: str,
  row: Mapping[str, Any],
  detector: Callable[[Image.Image], Mapping[str, Sequence[geneval.Detection]]],
  colors: Callable[[Image.Image, Sequence[geneval.Detection], str], Sequence[str]],
) -> dict[str, Any]:
  """GenEval's line about a picture.

  Args:
    folder: of the benchmark.
    path: of the picture, below it.
    row: the prompt's metadata.
    detector: picture -> {class: detections}.
    colors: (picture, objects, class) -> a color each.
  """
  picture = images.load_image(os.path.join(folder, path))

  def classify(objects, name):
    return colors(picture, objects, name)

  verdict = geneval.judge(row, detector(picture), classify)
  return geneval.result_row(path, row, verdict)


def measure_compbench(folder: str, path: str, by: CompBenchEvaluators) -> dict[str, Any]:
  """T2I-CompBench's parts of a picture: those of its category (see `benchmark.PARTS`).

  A prompt without a noun chunk has no question, and so the binding score 1, as in the original.
  """
  category = path.split('/')[0]
  picture = images.load_image(os.path.join(folder, path))
  prompt = benchmark.prompt_of(path)
  parsed = by.tagger(prompt)
  complex_prompt = category == 'complex'
  record = {}
  for part in benchmark.PARTS[category]:
    if part == benchmark.BINDING:
      questions = binding.questions(parsed.noun_chunks)
      answers = list(by.vqa(picture, questions))
      record[part] = binding.score(answers)
      record['questions'] = dict(zip(questions, answers))
    elif part == benchmark.SPATIAL:
      find = spatial.complex_pair if complex_prompt else spatial.simple_pair
      pair = find(parsed.tokens)
      labels = [label for label in pair if label]
      record[part] = spatial.score(prompt, pair, by.detector(picture, labels))
    elif part == benchmark.CLIP:
      text = mixed.clip_text(parsed.tokens) if complex_prompt else prompt
      record[part] = float(by.cosine([picture], [text])[0])
    elif part == benchmark.NUMERACY:
      things = numeracy.wanted(parsed.tokens)
      labels = [numeracy.LABELS.get(thing.noun, thing.noun) for thing in things]
      found = numeracy.distinct(by.detector(picture, labels))
      record[part] = numeracy.score(things, found)
  return record
