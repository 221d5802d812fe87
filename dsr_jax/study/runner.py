"""Runs a study's cells one after another, then makes the images, tables and figures."""

import os
import time

from dsr_jax import files
from dsr_jax.convert import clip as clip_files
from dsr_jax.convert import locate
from dsr_jax.models.janus.processor import Processor
from dsr_jax.runtime.progress import say
from dsr_jax.study import bench as bench_lib
from dsr_jax.study import clip as clip_lib
from dsr_jax.study import gallery, lanes, tables
from dsr_jax.study.cells import record_of, with_retry
from dsr_jax.study.variants import TRAINED, VARIANTS


def run_cells(study, cells, bench, retry=False, most_lanes=1) -> list[dict | None]:
  """Runs the cells that have not ended, up to `most_lanes` of a variant in one program.

  Returns: the records of all cells; None for those that a signal prevented from running.
  """
  records = [record_of(cell) for cell in cells]
  if retry:
    for i, cell in enumerate(cells):
      if records[i] and records[i]['state'] == 'failed':
        with_retry(cell)
        records[i] = None
  todo = [i for i, record in enumerate(records) if record is None]
  failed = sum(record['state'] == 'failed' for record in records if record)
  say(
    f'study        {len(cells)} cells: {len(cells) - len(todo) - failed} finished, {failed} '
    f'failed, {len(todo)} to run'
  )

  took, done = 0.0, 0
  for group in lanes.groups([cells[i] for i in todo], most_lanes):
    indices = [todo[i] for i in group]
    now = [cells[i] for i in indices]
    left = f'; about {took / done * (len(todo) - done) / 60:.0f} min left' if done else ''
    names = ', beside '.join(cell.name for cell in now)
    say(f'cell         {done + 1} of {len(todo)}: {names}{left}')
    began = time.time()
    if now[0].config.method.reward == 'clip':
      make_clip(study)
    try:
      ended = bench.run_lanes(now) if len(now) > 1 else [bench.run(now[0])]
    except (bench_lib.Stopped, KeyboardInterrupt):
      say('stopped      run the same command to resume')
      break
    took, done = took + time.time() - began, done + len(now)
    for i, record in zip(indices, ended):
      records[i] = record
      why = f': {record["error"]}' if 'error' in record else ''
      minutes = record['seconds'] / 60
      say(f'cell         {cells[i].name}: {record["state"]} in {minutes:.1f} min{why}')
  return records


def make_clip(study):
  """Trains DIR/clip, the CLIP of the CLIP reward, unless it exists."""
  if os.path.isdir(study.clip_path):
    return
  directory = locate.directory_of(next(iter(study.bases.values())))
  how = study.clip
  say(f'CLIP         training for {how.steps} steps of {how.batch} captioned images')
  config, params, facts = clip_lib.train(
    Processor.from_directory(directory),
    steps=how.steps,
    size=how.batch,
    learning_rate=how.learning_rate,
    seed=how.seed,
  )
  say(f'CLIP         matches {100 * facts["found"]:.0f} % of the texts in a batch to their images')
  with files.whole_directory(study.clip_path) as aside:
    clip_files.save(aside, config, params, directory)


def finish(study, cells, bench) -> str:
  """Makes everything that is based on all existing cells: rewards measured on the base, images for
  people, tables and figures.

  cells: the requested ones. bench: None to make only tables and figures.

  Returns: DIR/results.
  """
  cells = study.finished(cells)
  records = [record_of(cell) for cell in cells]
  if bench:
    for cell, record in zip(cells, records):
      if record and record['state'] == 'finished' and VARIANTS[cell.variant].kind == TRAINED:
        bench.reward(cell)
    gallery.make(study, cells, records)
  return tables.write(study, cells, records)
