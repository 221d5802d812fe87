"""Turns drawn images into records, using the evaluators it is given.

Evaluators are callables (those of `adapters`, or stubs), so this module needs neither torch nor
their models. Each evaluator gets many images at a time. A record is JSON values.

Axis: N images.
"""

from collections.abc import Callable, Mapping, Sequence
import os
from typing import Any, NamedTuple

from PIL import Image

from dsr_jax import images
from dsr_jax.evaluate import geneval
from dsr_jax.evaluate.t2i_compbench import benchmark, binding, mixed, numeracy, spatial
from dsr_jax.evaluate.t2i_compbench.words import Tagger


def load(folder: str, paths: Sequence[str]) -> list[Image.Image]:
  """The images at N paths below a folder."""
  return [images.load_image(os.path.join(folder, path)) for path in paths]


# GenEval.


class Object(NamedTuple):
  """An object in an image whose color is needed. name: its class."""

  picture: Image.Image
  detection: geneval.Detection
  name: str


class GenEvalEvaluators(NamedTuple):
  """The evaluators of GenEval's images.

  Attributes:
    detector: N images -> {class: detections} for each.
    colors: objects, from any images -> a color for each.
  """

  detector: Callable[[Sequence[Image.Image]], Sequence[Mapping[str, Sequence[geneval.Detection]]]]
  colors: Callable[[Sequence[Object]], Sequence[str]]


def judge_geneval(
  pictures: Sequence[Image.Image],
  paths: Sequence[str],
  rows: Sequence[Mapping[str, Any]],
  by: GenEvalEvaluators,
) -> list[dict[str, Any]]:
  """GenEval's result lines for N images.

  Args:
    pictures: N.
    paths: of the images, below the benchmark's folder.
    rows: the metadata of their prompts.
    by: the evaluators.
  """
  found = by.detector(pictures)
  asked = [
    geneval.asked_colors(row, geneval.keep(detections, row['tag']))
    for row, detections in zip(rows, found)
  ]
  objects = [
    Object(picture, detection, name)
    for picture, of_picture in zip(pictures, asked)
    for detections, name in of_picture
    for detection in detections
  ]
  colors = iter(by.colors(objects) if objects else ())

  def classify(detections, name):
    """`judge` asks in the same order as `asked_colors`."""
    del name
    return [next(colors) for _ in detections]

  return [
    geneval.result_row(path, row, geneval.judge(row, detections, classify))
    for path, row, detections in zip(paths, rows, found)
  ]


# T2I-CompBench.


class CompBenchEvaluators(NamedTuple):
  """The evaluators of T2I-CompBench's images.

  Attributes:
    tagger: parses prompts.
    vqa: (N images, questions for each) -> answers for each, four decimals.
    detector: (N images, labels for each) -> detections for each.
    cosine: (N images, N texts) -> N cosines.
  """

  tagger: Tagger
  vqa: Callable[[Sequence[Image.Image], Sequence[Sequence[str]]], Sequence[Sequence[str]]]
  detector: Callable[
    [Sequence[Image.Image], Sequence[Sequence[str]]], Sequence[Sequence[spatial.Detection]]
  ]
  cosine: Callable[[Sequence[Image.Image], Sequence[str]], Sequence[float]]


def measure_compbench(
  pictures: Sequence[Image.Image], paths: Sequence[str], by: CompBenchEvaluators
) -> list[dict[str, Any]]:
  """T2I-CompBench's parts for N images, as their categories need (see `benchmark.PARTS`).

  paths: of the images, below the benchmark's folder.
  """
  records: list[dict[str, Any]] = [{} for _ in paths]
  for part, measure in MEASURES.items():
    places = [i for i, path in enumerate(paths) if part in benchmark.PARTS[_category(path)]]
    if places:
      found = measure([pictures[i] for i in places], [paths[i] for i in places], by)
      for place, record in zip(places, found):
        records[place] |= record
  return records


def _category(path):
  return path.split('/')[0]


def _is_complex(path):
  return _category(path) == 'complex'


def _parsed(paths, by):
  return [by.tagger(benchmark.prompt_of(path)) for path in paths]


def _binding(pictures, paths, by):
  """A prompt without a noun chunk has no questions and therefore scores 1, as in the original."""
  questions = [binding.questions(parsed.noun_chunks) for parsed in _parsed(paths, by)]
  return [
    {benchmark.BINDING: binding.score(answers), 'questions': dict(zip(asked, answers))}
    for asked, answers in zip(questions, by.vqa(pictures, questions))
  ]


def _spatial(pictures, paths, by):
  pairs = [
    (spatial.complex_pair if _is_complex(path) else spatial.simple_pair)(parsed.tokens)
    for path, parsed in zip(paths, _parsed(paths, by))
  ]
  found = by.detector(pictures, [[label for label in pair if label] for pair in pairs])
  return [
    {benchmark.SPATIAL: spatial.score(benchmark.prompt_of(path), pair, detections)}
    for path, pair, detections in zip(paths, pairs, found)
  ]


def _clip(pictures, paths, by):
  texts = [
    mixed.clip_text(parsed.tokens) if _is_complex(path) else benchmark.prompt_of(path)
    for path, parsed in zip(paths, _parsed(paths, by))
  ]
  return [{benchmark.CLIP: float(cosine)} for cosine in by.cosine(pictures, texts)]


def _numeracy(pictures, paths, by):
  things = [numeracy.wanted(parsed.tokens) for parsed in _parsed(paths, by)]
  labels = [[numeracy.LABELS.get(thing.noun, thing.noun) for thing in one] for one in things]
  return [
    {benchmark.NUMERACY: numeracy.score(wanted, numeracy.distinct(detections))}
    for wanted, detections in zip(things, by.detector(pictures, labels))
  ]


MEASURES = {
  benchmark.BINDING: _binding,
  benchmark.SPATIAL: _spatial,
  benchmark.CLIP: _clip,
  benchmark.NUMERACY: _numeracy,
}
