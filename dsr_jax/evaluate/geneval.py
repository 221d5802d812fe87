"""GenEval: 553 prompts in six tasks, 4 images each, judged by a detector and a color classifier.

This module has the rules (pure functions of boxes, scores and colors), the prompts, and the folders
and result files of the official scorer, which reads them unchanged. The models are in `adapters`.
Source: djghosh13/geneval, commit af4902f (MIT); its prompts are in data/geneval.

Boxes are [x1, y1, x2, y2] in pixels, y down. All comparisons are in float32, the detector's
precision: a score of float32(.3) does not exceed .3.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import json
import os
import re
from typing import Any, NamedTuple

import numpy as np

from dsr_jax.data import prompts as prompts_lib
from dsr_jax.errors import InputError
from dsr_jax.evaluate import protocol
from dsr_jax.evaluate.stats import ratio

NAME = 'geneval'
TASKS = ('single_object', 'two_object', 'counting', 'colors', 'position', 'color_attr')
COLORS = (
  'red',
  'orange',
  'yellow',
  'green',
  'blue',
  'purple',
  'pink',
  'brown',
  'black',
  'white',
)
# A color's text feature is the mean of these templates' normalized features, normalized again.
COLOR_TEMPLATES = (
  'a photo of a {color} {name}',
  'a photo of a {color}-colored {name}',
  'a photo of a {color} object',
)
BACKGROUND = '#999'  # of a cut-out object
SAMPLES = 4
DIRECTORY = os.path.join(os.path.dirname(os.path.dirname(__file__)), 'data', 'geneval')

NO_OFFSET = 1e-3  # pixels
DIAGONAL = 0.5  # of the offset's length: how much of it must lie along an axis


class Settings(NamedTuple):
  """The official scorer's options, with its defaults.

  Attributes:
    threshold: a detection's score must exceed it.
    counting_threshold: the same in the task `counting`.
    max_objects: how many objects of a class are kept, the best ones.
    max_overlap: a detection with this IoU or more with a better one is dropped; 1 drops none.
    position_threshold: the share of both objects' sides that the offset must exceed.
  """

  threshold: float = 0.3
  counting_threshold: float = 0.9
  max_objects: int = 16
  max_overlap: float = 1.0
  position_threshold: float = 0.1


OFFICIAL = Settings()


class Detection(NamedTuple):
  """One object: box (4,) float32, its score, and the pixels that belong to it, (H, W) bool."""

  box: np.ndarray
  score: np.float32
  mask: np.ndarray | None = None

  @classmethod
  def of(cls, row: Sequence[float]) -> 'Detection':
    """From [x1, y1, x2, y2, score]."""
    values = np.asarray(row, np.float32)
    return cls(values[:4], values[4])


class Verdict(NamedTuple):
  """Whether an image is correct; if not, why, in the official wording; the detections counted."""

  correct: bool
  reason: str
  kept: dict[str, list[Detection]]


# (detections of one class, the class) -> their colors.
Classify = Callable[[Sequence[Detection], str], Sequence[str]]


# Rules.


def judge(
  metadata: Mapping[str, Any],
  detections: Mapping[str, Sequence[Detection]],
  classify: Classify,
  settings: Settings = OFFICIAL,
) -> Verdict:
  """An image's verdict.

  Args:
    metadata: the prompt's row: tag, include, exclude.
    detections: {class: everything the detector found}, in any order.
    classify: gives the colors of the detections that a clause is about; called only if a clause
      names a color.
    settings: the official options.
  """
  kept = keep(detections, metadata['tag'], settings)
  reasons = []
  matched = []  # of each include clause: its objects, or None if it failed
  for clause in metadata.get('include', []):
    objects, why = _include(clause, kept, matched, classify, settings)
    matched.append(objects)
    reasons += [why] if why is not None else []
  for clause in metadata.get('exclude', []):
    found = len(kept.get(clause['class'], []))
    if found >= clause['count']:
      reasons.append(f'expected {clause["class"]}<{clause["count"]}, found {found}')
  return Verdict(correct=not reasons, reason='\n'.join(reasons), kept=kept)


def keep(
  detections: Mapping[str, Sequence[Detection]], tag: str, settings: Settings = OFFICIAL
) -> dict[str, list[Detection]]:
  """The detections that count, best first; classes without any are omitted."""
  threshold = settings.counting_threshold if tag == 'counting' else settings.threshold
  kept = {}
  for name, found in detections.items():
    # Of equal scores, the later one comes first, as in the original's reversed order.
    order = np.argsort(np.array([d.score for d in found], np.float32))[::-1]
    confident = [found[i] for i in order if np.float32(found[i].score) > np.float32(threshold)]
    best = _apart(confident[: settings.max_objects], settings.max_overlap)
    if best:
      kept[name] = best
  return kept


def _apart(best_first, max_overlap):
  """Non-maximum suppression; the default of 1 drops nothing."""
  if max_overlap == 1:
    return best_first
  kept = []
  for detection in best_first:
    if all(iou(other.box, detection.box) < max_overlap for other in kept):
      kept.append(detection)
  return kept


def _include(clause, kept, matched, classify, settings):
  """(the objects of an include clause, None), or (None, why the clause failed)."""
  name, count = clause['class'], clause['count']
  objects = _objects(clause, kept)
  if len(objects) < count:
    return None, f'expected {name}>={count}, found {len(objects)}'
  if 'color' in clause:
    colors = list(classify(objects, name))
    wanted = clause['color']
    if colors.count(wanted) < count:
      others = ', '.join(f'{colors.count(c)} {c}' for c in COLORS if c in colors)
      found = f'{colors.count(wanted)} {wanted}; and {others}'
      return None, f'expected {wanted} {name}>={count}, found {found}'
  if 'position' in clause:  # checked only if the color is correct
    relation, target = clause['position']
    if matched[target] is None:
      return None, f'no target for {name} to be {relation}'
    for thing in objects:
      for other in matched[target]:
        relations = relative_position(thing.box, other.box, settings.position_threshold)
        if relation not in relations:
          found = ' and '.join(relations)
          return None, f'expected {name} {relation} target, found {found} target'
  return objects, None


def _objects(clause, kept):
  """What a clause is about: the best detections of its class, up to its count."""
  return kept.get(clause['class'], [])[: clause['count']]


def asked_colors(
  metadata: Mapping[str, Any], kept: Mapping[str, Sequence[Detection]]
) -> list[tuple[Sequence[Detection], str]]:
  """(objects, class) for each time that `judge` asks for colors, in the same order, so that the
  objects of many images can be classified together.
  """
  return [
    (_objects(clause, kept), clause['class'])
    for clause in metadata.get('include', [])
    if 'color' in clause and len(_objects(clause, kept)) == clause['count']
  ]


def iou(a: Sequence[float], b: Sequence[float]) -> float:
  """Intersection over union of two boxes whose last pixels count (+1); 0 if both are empty."""
  shared = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
  union = _area(a) + _area(b) - shared
  return shared / union if union else 0


def _area(box):
  return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)


def relative_position(a, b, threshold: float = 0.1) -> list[str]:
  """Where box a is relative to box b: up to two of left of, right of, above, below.

  The offset of the centers counts only beyond `threshold` times the sum of both boxes' sides. What
  remains along an axis must exceed half the length of the whole offset.
  """
  corners_a = np.asarray(a, np.float32).reshape(2, 2)
  corners_b = np.asarray(b, np.float32).reshape(2, 2)
  offset = corners_a.mean(axis=0) - corners_b.mean(axis=0)
  sides = np.abs(corners_a[1] - corners_a[0]) + np.abs(corners_b[1] - corners_b[0])
  beyond = np.maximum(np.abs(offset) - np.float32(threshold) * sides, 0) * np.sign(offset)
  if np.all(np.abs(beyond) < NO_OFFSET):
    return []
  across, down = beyond / np.linalg.norm(offset)
  relations = {
    'left of': across < -DIAGONAL,
    'right of': across > DIAGONAL,
    'above': down < -DIAGONAL,
    'below': down > DIAGONAL,
  }
  return [name for name, holds in relations.items() if holds]


def summary(rows: Sequence[Mapping[str, Any]]) -> dict:
  """The numbers that the official summary prints.

  Args:
    rows: one per image; tag, correct, and metadata or group, which identifies the prompt.

  Returns:
    Shares `images`, `prompts` (any image of the prompt is correct), `tasks` {tag: share}, and
    `overall`, the unweighted mean of the tasks that occur.
  """
  if not rows:
    raise InputError('there are no judged images to summarize; judge at least one first')
  by_task, by_prompt = {}, {}
  for row in rows:
    by_task.setdefault(row['tag'], []).append(bool(row['correct']))
    by_prompt.setdefault(row.get('metadata', row.get('group')), []).append(bool(row['correct']))
  tasks = {tag: float(np.mean(values)) for tag, values in by_task.items()}
  return {
    'images': float(np.mean([bool(row['correct']) for row in rows])),
    'prompts': float(np.mean([any(values) for values in by_prompt.values()])),
    'tasks': tasks,
    'counts': {tag: (sum(values), len(values)) for tag, values in by_task.items()},
    'overall': float(np.mean(list(tasks.values()))),
  }


# Prompts, folders and files.


@functools.cache
def metadata() -> tuple[dict[str, Any], ...]:
  """The 553 rows: tag, prompt, include, exclude."""
  path = os.path.join(DIRECTORY, 'evaluation_metadata.jsonl')
  return tuple(json.loads(line) for _, line in prompts_lib.read_lines(path))


@functools.cache
def object_names() -> tuple[str, ...]:
  """The 80 classes of COCO in the detector's order, three of them renamed."""
  path = os.path.join(DIRECTORY, 'object_names.txt')
  return tuple(name for _, name in prompts_lib.read_lines(path))


def result_row(path: str, row: Mapping[str, Any], verdict: Verdict) -> dict[str, Any]:
  """A line of the official results file."""
  boxes = {
    name: [[*map(float, d.box), float(d.score)] for d in kept]
    for name, kept in verdict.kept.items()
  }
  return {
    'filename': path,
    'tag': row['tag'],
    'prompt': row['prompt'],
    'correct': verdict.correct,
    'reason': verdict.reason,
    'metadata': json.dumps(row),
    'details': json.dumps(boxes),
  }


def find_pictures(folder: str) -> list[tuple[str, dict[str, Any]]]:
  """(path below the folder, metadata) of every image in the official layout, from any program."""
  found = []
  for name in sorted(os.listdir(folder)):
    about = os.path.join(folder, name, 'metadata.jsonl')
    if not name.isdigit() or not os.path.isfile(about):
      continue
    with open(about, encoding='utf-8') as f:
      row = json.load(f)
    samples = os.path.join(folder, name, 'samples')
    for picture in sorted(os.listdir(samples)) if os.path.isdir(samples) else ():
      if re.match(r'\d+\.png', picture):
        found.append((os.path.join(name, 'samples', picture), row))
  if not found:
    raise InputError(
      f'{folder} has no images (00000/metadata.jsonl, 00000/samples/0000.png and so on); draw the '
      'benchmark first'
    )
  return found


class GenEval:
  """The benchmark; see `protocol.Drawing`.

  An image's record is its line of the results file; scoring reads its `correct`.
  """

  about = protocol.About(
    name=NAME,
    title='GenEval',
    kind='generation',
    headline='overall',
    source='djghosh13/geneval af4902f',
    license='MIT',
  )
  samples = SAMPLES

  def __init__(self, label: protocol.Label = protocol.Label.OTHER_MODEL):
    """label: of the evaluators. The official detector is not available in `transformers`."""
    self._label = label

  def prompts(self) -> tuple[protocol.Prompt, ...]:
    return tuple(
      protocol.Prompt(id=f'{i:05d}', text=row['prompt'], group=row['tag'], number=i)
      for i, row in enumerate(metadata())
    )

  def picture_path(self, prompt: protocol.Prompt, sample: int) -> str:
    return f'{prompt.id}/samples/{sample:04d}.png'

  def side_files(self) -> dict[str, str]:
    return {f'{i:05d}/metadata.jsonl': json.dumps(row) for i, row in enumerate(metadata())}

  def score(self, records: Mapping[str, Mapping[str, Any]]) -> protocol.Scores:
    """Clusters are prompts with the same text, strata the tasks that occur."""
    rows = metadata()
    paths = sorted(records)
    numbers = [self._number(path) for path in paths]
    tasks = [task for task in TASKS if any(rows[n]['tag'] == task for n in numbers)]
    values, strata = [], []
    for path, number in zip(paths, numbers):
      task = tasks.index(rows[number]['tag'])
      value = np.zeros(2 * len(tasks) + 2)
      value[2 * task] = bool(records[path]['correct'])
      value[2 * task + 1] = 1
      values.append(value)
      strata.append(task)
    # Whether any image of a prompt is correct, counted once, in the row of its first image.
    for first, any_right in _prompts_right(numbers, [records[path]['correct'] for path in paths]):
      values[first][-2:] = any_right, 1
    names = [f'{rows[n]["tag"]}: {rows[n]["prompt"]}' for n in numbers]
    clusters, sums, of_cluster = protocol.gathered(values, names, strata)
    statistics = {'overall': _mean_of_tasks}
    statistics |= {task: protocol.share_of(2 * t, 2 * t + 1) for t, task in enumerate(tasks)}
    last = 2 * len(tasks)
    statistics['any sample'] = protocol.share_of(last, last + 1)
    return protocol.Scores(
      clusters=clusters,
      sums=sums,
      statistics=statistics,
      strata=of_cluster,
      labels=dict.fromkeys(statistics, self._label),
      scale=1.0,
      items=tuple({'picture': path, **records[path]} for path in paths),
      counts={'pictures': len(paths), 'prompts': len(set(numbers))},
    )

  def _number(self, path):
    folder = path.split('/')[0]
    if not folder.isdigit() or int(folder) >= len(metadata()):
      raise InputError(
        f'the image {path} is not in a folder 00000 to {len(metadata()) - 1:05d}; judge a folder '
        'drawn for this benchmark'
      )
    return int(folder)


def _mean_of_tasks(sums):
  """(R, 2 tasks + 2) -> the unweighted mean of the tasks."""
  return ratio(sums[:, :-2:2], sums[:, 1:-2:2]).mean(axis=1)


def _prompts_right(numbers, correct):
  """(index of a prompt's first image, whether any of its images is correct)."""
  first, right = {}, {}
  for place, (number, value) in enumerate(zip(numbers, correct)):
    first.setdefault(number, place)
    right[number] = right.get(number, False) or bool(value)
  return [(first[number], right[number]) for number in first]
