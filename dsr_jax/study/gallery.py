"""Images for people: the base and a trained model side by side with the same seeds, samples with
their rewards, and failures by kind.

They are made once for each base, from the first variant in SHOWN that has a finished cell with a
checkpoint, and are in DIR/shown.
"""

import os
import shutil

import numpy as np

from dsr_jax import families, files, images
from dsr_jax.convert import locate
from dsr_jax.evaluate import benchmarks
from dsr_jax.evaluate.sampler import ListSampler
from dsr_jax.reporting import sheets
from dsr_jax.runtime.progress import say
from dsr_jax.scenes import grammar, judge, sets, world
from dsr_jax.study.evaluate import failure

SHOWN = ('unified', 'grpo', 'generation')
# {kind of failure: the task in which to look for it}.
KINDS = {'count': 'counting', 'binding': 'color_attr', 'position': 'position'}
EACH = 4  # failures shown of each kind
LOOKED_AT = 50  # prompts per task that are drawn to find them
PARTS = ('pictures', 'texts', 'candidates', 'failures')


def make(study, cells, records):
  """Makes the missing images."""
  finished = [cell for cell, r in zip(cells, records) if r and r['state'] == 'finished']
  for base in dict.fromkeys(cell.base for cell in cells):
    done = [
      cell
      for cell in finished
      if cell.base == base and cell.variant in SHOWN and locate.is_run(cell.folder)
    ]
    paths = {part: os.path.join(study.directory, 'shown', f'{part}_{base}.png') for part in PARTS}
    if done and not all(map(os.path.exists, paths.values())):
      _make(min(done, key=lambda cell: SHOWN.index(cell.variant)), paths)


def _make(cell, paths):
  say(f'drawing      {cell.name}: before and after')
  before = _subject(cell.config.model, 'before', cell.config)
  after = _subject(cell.folder, 'after', cell.config)
  for part, sheet in (
    ('pictures', benchmarks.picture_sheet((before, after))),
    ('texts', benchmarks.text_sheet((before, after))),
    ('failures', failures(after)),
  ):
    files.write_bytes(paths[part], images.png(sheet))
  candidates = os.path.join(cell.folder, 'samples', f'{cell.last_step:06d}.png')
  if os.path.exists(candidates):
    shutil.copyfile(candidates, paths['candidates'])


def _subject(source, name, config) -> benchmarks.Subject:
  model = families.model_of(locate.resolve(source).bundle, source, config.method)
  return benchmarks.Subject(
    name=name,
    params=model.params,
    sampler=ListSampler(
      model.graphdef,
      model.processor,
      chunk=config.eval.chunk,
      max_prompt_tokens=config.data.max_prompt_tokens,
      max_text_tokens=config.method.max_text_tokens,
      seed=config.eval.seed,
      instruction=config.method.instruction,
    ),
    eval=config.eval,
    method=config.method,
  )


def failures(subject: benchmarks.Subject):
  """A sheet of images with wrong counts, attributes and positions, and of texts that describe
  what is not in the image.
  """
  pixels, lines = [], []
  for kind in KINDS:
    failed, said = _failed_pictures(subject, kind)
    pixels += failed
    lines += said
  failed, said = _inventions(subject)
  pixels += failed
  lines += said
  if not pixels:
    pixels = [np.full((world.IMAGE_SIZE, world.IMAGE_SIZE, 3), 255, np.uint8)]
    lines = [[('', 'no failures of these kinds were found', True)]]
  return sheets.statements(np.stack(pixels), lines)


def _failed_pictures(subject, kind):
  """Images with this kind of failure, and the lines about each."""
  prompts = sets.evaluation_prompts(LOOKED_AT, tasks=(KINDS[kind],))
  drawn = subject.sampler.pictures(
    subject.params,
    [p.text for p in prompts],
    1,
    temperature=benchmarks.GRID_TEMPERATURE,
    guidance=subject.method.guidance,
    seed=benchmarks.GRID_SEED,
  )[:, 0]
  readings = judge.read(drawn)
  found = [i for i, (p, r) in enumerate(zip(prompts, readings)) if failure(p, r) == kind][:EACH]
  lines = [
    [
      (kind, f'asked for: {prompts[i].text}', True),
      ('', f'drawn: {_in_words(readings[i])}', False),
      ('fails', '; '.join(judge.reasons(prompts[i], readings[i])), False),
    ]
    for i in found
  ]
  return [drawn[i] for i in found], lines


def _inventions(subject):
  """Images whose texts are partly false, and the lines about each."""
  scenes = sets.evaluation_scenes(LOOKED_AT)
  pixels = sets.pictures(scenes)
  texts = subject.sampler.texts(
    subject.params,
    pixels,
    [grammar.QUESTION_DESCRIBE] * len(scenes),
    temperature=benchmarks.GRID_TEMPERATURE,
    seed=benchmarks.GRID_SEED,
  )
  counts = [judge.count_atoms(text, scene) for text, scene in zip(texts, scenes)]
  found = [i for i, c in enumerate(counts) if c.parsed and c.right < c.stated][:EACH]
  lines = [
    [
      ('invented', f'says: {texts[i]}', False),
      ('', f'there is: {_in_words(judge.Reading(scenes[i]))}', True),
    ]
    for i in found
  ]
  return [pixels[i] for i in found], lines


def _in_words(reading) -> str:
  """What the judge sees, in words."""
  seen = [f'{thing.name} at ({thing.row}, {thing.col})' for thing in reading.things]
  seen += ['something unreadable'] * reading.blobs
  return ', '.join(seen) or 'nothing'
