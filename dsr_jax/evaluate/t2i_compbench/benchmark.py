"""T2I-CompBench: categories of 300 prompts, 10 images each, in the official scorers' folders.

    CATEGORY/samples/PROMPT_NNNNNN.png                   NNNNNN runs over the category
    CATEGORY/annotation_blip/vqa_result.json             texts of four decimals
    CATEGORY/labels/annotation_obj_detection_2d/{vqa_result,mapping}.json
    CATEGORY/annotation_clip/vqa_result.json
    CATEGORY/annotation_3_in_1/vqa_result.json           complex
    CATEGORY/annotation_num/vqa_result.json              numeracy

The paper reports the six categories of the first release. The two of T2I-CompBench++ can be drawn
too. Numeracy is scored here; `3d_spatial` is not, because its rules have a license that forbids
commercial use, so only the official scorer can score its images.
"""

from collections.abc import Mapping, Sequence
import functools
import os
from typing import Any

import numpy as np

from dsr_jax import files
from dsr_jax.data import prompts as prompts_lib
from dsr_jax.data import t2i_compbench
from dsr_jax.errors import InputError
from dsr_jax.evaluate import protocol
from dsr_jax.evaluate.stats import ratio
from dsr_jax.evaluate.t2i_compbench import mixed

NAME = 't2i_compbench'
CATEGORIES = ('color', 'shape', 'texture', 'spatial', 'non_spatial', 'complex')
EXTRA = ('numeracy', '3d_spatial')
UNSCORED = ('3d_spatial',)

# What is measured in an image of each category.
BINDING, SPATIAL, CLIP, NUMERACY = 'binding', 'spatial', 'clip', 'numeracy'
PARTS = {
  'color': (BINDING,),
  'shape': (BINDING,),
  'texture': (BINDING,),
  'spatial': (SPATIAL,),
  'non_spatial': (CLIP,),
  'complex': (BINDING, SPATIAL, CLIP),
  'numeracy': (NUMERACY,),
  '3d_spatial': (),
}
RESULT_FILES = {
  BINDING: 'annotation_blip/vqa_result.json',
  SPATIAL: 'labels/annotation_obj_detection_2d/vqa_result.json',
  CLIP: 'annotation_clip/vqa_result.json',
  NUMERACY: 'annotation_num/vqa_result.json',
}
MAPPING_FILE = 'labels/annotation_obj_detection_2d/mapping.json'
MIXED_FILE = 'annotation_3_in_1/vqa_result.json'
# Of the adapters included here: BLIP at a different size than in the official scorer, another
# detector in place of UniDet, and CLIP with the official weights.
LABELS = {
  BINDING: protocol.Label.OTHER_MODEL,
  SPATIAL: protocol.Label.NOT_COMPARABLE,
  CLIP: protocol.Label.OFFICIAL,
  NUMERACY: protocol.Label.NOT_COMPARABLE,
}


@functools.cache
def lines(stem: str) -> tuple[str, ...]:
  """The prompts in a file of the release, such as `color_val`."""
  path = os.path.join(t2i_compbench.DIRECTORY, f'{stem}.txt')
  return tuple(text for _, text in prompts_lib.read_lines(path))


def prompt_of(path: str) -> str:
  """The prompt, as every official scorer reads it: the file's name up to the first `_`."""
  return os.path.basename(path).split('_')[0]


def number_of(path: str) -> int:
  """The running number of an image within its category."""
  return int(os.path.basename(path).rsplit('_', 1)[-1].split('.')[0])


class T2ICompBench:
  """The benchmark; see `protocol.Drawing`.

  An image's record holds the parts of its category: `binding`, `spatial`, `clip`, `numeracy`.
  """

  about = protocol.About(
    name=NAME,
    title='T2I-CompBench',
    kind='generation',
    headline='mean',
    source='Karine-Huang/T2I-CompBench 1b70949',
    license='MIT',
  )
  samples = mixed.SAMPLES

  def __init__(
    self,
    categories: Sequence[str] = CATEGORIES,
    labels: Mapping[str, protocol.Label] | None = None,
  ):
    """labels: of each part's evaluator, where it differs from `LABELS`."""
    unknown = [name for name in categories if name not in PARTS]
    if unknown:
      raise InputError(
        f'unknown category {unknown[0]!r} of T2I-CompBench; choose from {", ".join(PARTS)}'
      )
    self.categories = tuple(categories)
    self._labels = {**LABELS, **(labels or {})}

  def prompts(self) -> tuple[protocol.Prompt, ...]:
    return tuple(
      protocol.Prompt(id=f'{category}/{i:03d}', text=text, group=category, number=i)
      for category in self.categories
      for i, text in enumerate(lines(f'{category}_val'))
    )

  def picture_path(self, prompt: protocol.Prompt, sample: int) -> str:
    number = prompt.number * self.samples + sample
    return f'{prompt.group}/samples/{prompt.text}_{number:06d}.png'

  def side_files(self) -> dict[str, str]:
    return {}  # the official scorers read everything from the names of the images

  def score(self, records: Mapping[str, Mapping[str, Any]]) -> protocol.Scores:
    """Clusters are prompts, strata the categories that occur."""
    paths = sorted(records, key=_place)
    values = {path: self.value(path, records[path]) for path in paths}
    scored = [path for path in paths if values[path] is not None]
    present = [name for name in PARTS if name in {path.split('/')[0] for path in scored}]
    rows, strata, clusters = [], [], []
    for path in scored:
      place = present.index(path.split('/')[0])
      row = np.zeros(2 * len(present))
      row[2 * place : 2 * place + 2] = values[path], 1
      rows.append(row)
      strata.append(place)
      clusters.append(f'{present[place]}: {prompt_of(path)}')
    names, sums, of_cluster = protocol.gathered(rows, clusters, strata)
    statistics = {'mean': _mean_of_categories}
    labels = {}
    for place, category in enumerate(present):
      statistics[category] = protocol.share_of(2 * place, 2 * place + 1)
      labels[category] = protocol.worst(*(self._labels[part] for part in PARTS[category]))
    labels['mean'] = protocol.worst(*labels.values())
    unscored = len(paths) - len(scored)
    notes = []
    if unscored:
      notes.append(f'{unscored} images of 3d_spatial need the official scorer.')
    return protocol.Scores(
      clusters=names,
      sums=sums,
      statistics=statistics,
      strata=of_cluster,
      labels=labels,
      scale=1.0,
      items=tuple({'picture': path, 'score': values[path], **records[path]} for path in paths),
      counts={'pictures': len(scored), 'prompts': len(names), 'not scored': unscored},
      notes=tuple(notes),
    )

  def value(self, path: str, record: Mapping[str, Any]) -> float | None:
    """An image's score from 0 to 1; None in a category that is not scored here."""
    category = path.split('/')[0]
    if category in UNSCORED:
      return None
    missing = [part for part in PARTS.get(category, ()) if part not in record]
    if missing or category not in PARTS:
      raise InputError(
        f'the record of {path} has no {missing[0] if missing else "category"}, which its score '
        'needs; evaluate the folder again'
      )
    parts = {part: float(record[part]) for part in PARTS[category]}
    if category != 'complex':
      return next(iter(parts.values()))
    mix = mixed.three_in_one(
      [prompt_of(path)],
      lines('complex_val_spatial'),
      lines('complex_val_action'),
      binding=[parts[BINDING]],
      spatial=[parts[SPATIAL]],
      clip=[parts[CLIP]],
      samples=1,
    )
    return float(mix[0])

  def write_results(self, records: Mapping[str, Mapping[str, Any]], folder: str) -> list[str]:
    """The official scorers' result files, below `folder`; returns their paths."""
    written = []
    for category in PARTS:
      paths = sorted((p for p in records if p.split('/')[0] == category), key=_place)
      if not paths:
        continue
      for part in PARTS[category]:
        # BLIP-VQA's answers are texts, all others numbers.
        answers = [
          {'question_id': number_of(path), 'answer': records[path][part]} for path in paths
        ]
        written.append(_write(folder, category, RESULT_FILES[part], answers))
        if part == SPATIAL:
          mapping = [
            {'image': os.path.basename(path), 'question_id': number_of(path)} for path in paths
          ]
          written.append(_write(folder, category, MAPPING_FILE, mapping))
      if category == 'complex':
        answers = [
          {'question_id': number_of(path), 'answer': self.value(path, records[path])}
          for path in paths
        ]
        written.append(_write(folder, category, MIXED_FILE, answers))
    return written


def find_pictures(folder: str) -> list[str]:
  """Paths below the folder of every image in the official layout, from any program."""
  found = []
  for category in PARTS:
    samples = os.path.join(folder, category, 'samples')
    if os.path.isdir(samples):
      names = [name for name in os.listdir(samples) if name.endswith('.png')]
      found += sorted((f'{category}/samples/{name}' for name in names), key=_place)
  if not found:
    raise InputError(
      f'{folder} has no images (CATEGORY/samples/PROMPT_000000.png and so on); draw the benchmark '
      'first'
    )
  return found


def _place(path):
  return path.split('/')[0], number_of(path)


def _write(folder, category, name, rows):
  return files.write_json(os.path.join(folder, category, name), rows)


def _mean_of_categories(sums):
  """(R, 2 categories) -> the unweighted mean of the categories."""
  return ratio(sums[:, ::2], sums[:, 1::2]).mean(axis=1)
