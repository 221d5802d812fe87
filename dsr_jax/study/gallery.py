"""What people look at: the base and a trained model side by side with common seeds, candidates with
their rewards, failures by kind.

Made once for each base, of the first of SHOWN that has a finished cell with a checkpoint, in
DIR/shown.
"""

import os
import shutil

import numpy as np

from dsr_jax.convert import locate as model_source
from dsr_jax.evaluate import __main__ as evaluate
from dsr_jax.models.janus import model as janus
from dsr_jax.reporting import sheets as pictures_lib
from dsr_jax.runtime.progress import say
from dsr_jax.scenes import grammar, judge, sets, world
from dsr_jax.study import evaluate as study_evaluate

SHOWN = ('unified', 'grpo', 'generation')
KINDS = {
  'count': 'counting',
  'binding': 'color_attr',
  'position': 'position',
}  # a kind of failure, and the task it is looked for in
EACH, LOOKED_AT = 4, 50  # failures shown of a kind, prompts of its task that are drawn to find them
PARTS = ('pictures', 'texts', 'candidates', 'failures')


def make(study, cells, records):
  """Makes what is missing."""
  for base in dict.fromkeys(cell.base for cell in cells):
    done = [
      c
      for c, r in zip(cells, records)
      if r and r['state'] == 'finished' and c.base == base and c.variant in SHOWN
    ]
    done = [c for c in done if model_source.is_run(c.folder)]
    paths = {part: os.path.join(study.directory, 'shown', f'{part}_{base}.png') for part in PARTS}
    if done and not all(map(os.path.exists, paths.values())):
      _make(min(done, key=lambda c: SHOWN.index(c.variant)), paths)


def _make(cell, paths):
  from dsr_jax.evaluate import benchmarks as evaluate_scenes

  say(f'drawing      {cell.name}: before and after')
  before, after = (_subject(name, cell.config) for name in (cell.config.model, cell.folder))
  sheets = {
    'pictures': evaluate_scenes.picture_sheet((before, after)),
    'texts': evaluate_scenes.text_sheet((before, after)),
    'failures': failures(after),
  }
  os.makedirs(os.path.dirname(paths['pictures']), exist_ok=True)
  for part, sheet in sheets.items():
    with open(paths[part], 'wb') as f:
      f.write(pictures_lib.png(sheet))
  candidates = os.path.join(cell.folder, 'samples', f'{cell.last_step:06d}.png')
  if os.path.exists(candidates):
    shutil.copyfile(candidates, paths['candidates'])


def _subject(name, config):
  from dsr_jax.evaluate import benchmarks as evaluate_scenes

  bundle, m = model_source.resolve(name).bundle, config.method
  sampler = evaluate.Sampler(
    janus.graphdef_of(bundle.config),
    bundle.processor,
    chunk=config.eval.chunk,
    seed=config.eval.seed,
    max_prompt_tokens=config.data.max_prompt_tokens,
    max_text_tokens=m.max_text_tokens,
    instruction=m.instruction,
  )
  return evaluate_scenes.Subject(
    'before' if name == config.model else 'after', bundle.params, sampler, config.eval, m
  )


def failures(subject):
  """A sheet of pictures that fail by number, by attribute and by place, and of texts that say what
  is not there.
  """
  from dsr_jax.evaluate.benchmarks import GRID_SEED, GRID_TEMPERATURE

  shown, lines = [], []
  for kind, task in KINDS.items():
    prompts = sets.evaluation_prompts(LOOKED_AT, tasks=(task,))
    asked, guidance = [p.text for p in prompts], subject.method.guidance
    drawn = subject.sampler.pictures(
      subject.params, asked, 1, GRID_TEMPERATURE, guidance, seed=GRID_SEED
    )[:, 0]
    readings = judge.read(drawn)
    found = [
      i for i, (p, r) in enumerate(zip(prompts, readings)) if study_evaluate.failure(p, r) == kind
    ][:EACH]
    shown += [drawn[i] for i in found]
    lines += [
      [(kind, f'asked for: {prompts[i].text}', True), ('', f'drawn: {_told(readings[i])}', False)]
      for i in found
    ]
  scenes = sets.evaluation_scenes(LOOKED_AT)
  pixels = sets.pictures(scenes)
  texts = subject.sampler.texts(
    subject.params,
    pixels,
    [grammar.QUESTION_DESCRIBE] * len(scenes),
    GRID_TEMPERATURE,
    seed=GRID_SEED,
  )
  counts = [judge.count_atoms(text, scene) for text, scene in zip(texts, scenes)]
  found = [i for i, c in enumerate(counts) if c.parsed and c.right < c.stated][:EACH]
  shown += [pixels[i] for i in found]
  lines += [
    [
      ('invented', f'says: {texts[i]}', False),
      ('', f'there is: {_told(judge.Reading(scenes[i]))}', True),
    ]
    for i in found
  ]
  if not shown:
    shown, lines = (
      [np.full((world.IMAGE_SIZE, world.IMAGE_SIZE, 3), 255, np.uint8)],
      [[('', 'no failure of these kinds was found', True)]],
    )
  return pictures_lib.statements(np.stack(shown), lines)


def _told(reading) -> str:
  """What the judge sees, in words."""
  words = [f'{thing.name} at ({thing.row}, {thing.col})' for thing in reading.things] + [
    'something unreadable'
  ] * reading.blobs
  return ', '.join(words) or 'nothing'
