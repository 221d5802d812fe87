"""The second stage: scores what a model drew and answered.

Evaluators look at drawn images in a separate process (`evaluators`); answers are scored by rules,
here. If something cannot be scored, a sentence says why, and everything else is still scored.
"""

from collections.abc import Mapping
import os
import pathlib
import subprocess
import sys
from typing import Any, NamedTuple

import dsr_jax
from dsr_jax import cli, files
from dsr_jax.errors import InputError
from dsr_jax.evaluate import evaluator_choice, protocol, registry
from dsr_jax.evaluate.answering import asking, drawing, folders
from dsr_jax.evaluate.t2i_compbench import benchmark as t2i_compbench
from dsr_jax.evaluate.vlmeval import llavabench

REQUESTS = 'requests.jsonl'
EVALUATORS = 'dsr_jax.evaluate.evaluators'  # never imported here: it brings torch


class Scored(NamedTuple):
  """A model's scores in a benchmark, or None and the reason.

  about: `evaluators.json` for images; empty for answers.
  """

  scores: protocol.Scores | None
  why_not: str = ''
  about: Mapping[str, Any] = {}


class Looking(NamedTuple):
  """How images are evaluated: {kind: directory or Hub id}, and the side of BLIP's images."""

  chosen: dict[str, str]
  blip_size: int = 0


def score_drawing(name: str, folder: str, looking: Looking) -> Scored:
  """Scores drawn images."""
  try:
    benchmark = registry.open_drawing(name)
    paths = _drawn(name, benchmark, folder)
    family = t2i_compbench.NAME if name.startswith(t2i_compbench.NAME) else name
    look(family, folder, looking)
    about = files.read_json(os.path.join(folder, evaluator_choice.ABOUT))
    labels = {part: protocol.Label(label) for part, label in about['labels'].items()}
    found = folders.read_all(os.path.join(folder, evaluator_choice.RECORDS))
    scores = registry.open_drawing(name, labels).score({path: found[path] for path in paths})
  except InputError as e:
    return Scored(None, str(e))
  return Scored(scores._replace(notes=(*scores.notes, *about['warnings'])), about=about)


def look(benchmark: str, folder: str, looking: Looking) -> None:
  """Runs the evaluators on a folder, in their own process. Raises its error as an InputError."""
  command = [sys.executable, '-m', EVALUATORS, f'--benchmark={benchmark}']
  command += [f'--folder={folder}', *evaluator_choice.as_flags(*looking)]
  root = str(pathlib.Path(dsr_jax.__file__).parent.parent)
  paths = os.pathsep.join(filter(None, (root, os.environ.get('PYTHONPATH'))))
  process = subprocess.Popen(
    command,
    env={**os.environ, 'PYTHONPATH': paths, 'TRANSFORMERS_VERBOSITY': 'error'},
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )
  last = ''
  assert process.stderr is not None
  for line in process.stderr:
    text = line.rstrip()
    last = text or last
    if not text.startswith('error: '):
      cli.log(text)
  if process.wait():
    sentence = last.removeprefix('error: ')
    if sentence == last:
      sentence = (
        f'the evaluators of {benchmark} stopped with status {process.returncode} ({last}) before '
        'all images were evaluated; see their output above'
      )
    raise InputError(sentence)


def _drawn(name, benchmark, folder) -> list[str]:
  """The paths of all images that the folder should have. InputError if some are missing."""
  manifest = _manifest(name, folder)
  prompts = drawing.prompts_of(benchmark, manifest['settings']['limit'])
  paths = drawing.paths_of(benchmark, prompts)
  missing = [path for path in paths if not os.path.isfile(os.path.join(folder, path))]
  if missing:
    raise InputError(
      f'{missing[0]} and {len(missing) - 1} more of {len(paths)} images are missing in {folder}; '
      'let --stage=answer finish first'
    )
  return paths


def score_asking(name: str, benchmark: protocol.Asking, folder: str, table: str) -> Scored:
  """Scores answers. table: md5 of the question table, which must be the one that was asked."""
  try:
    manifest = _manifest(name, folder)
    asked = manifest['settings']['table_md5']
    if asked != table:
      raise InputError(
        f'{folder} has answers to the table with md5 {asked}, but --data now names the table with '
        f'md5 {table}; name the table that was answered, or answer this one in another --output'
      )
    questions = asking.questions_of(benchmark, manifest['settings']['limit'])
    records = asking.records_of(folder)
    most = manifest['settings'].get('max_pictures', 0)
    beyond = [q.id for q in questions if most and len(q.pictures) > most]
    missing = {q.id for q in questions} - set(records) - set(beyond)
    if missing:
      raise InputError(
        f'{len(missing)} of {len(questions)} questions have no answer in {folder}; let '
        '--stage=answer finish first'
      )
    answers = {q.id: records[q.id]['answer'] for q in questions if q.id in records}
    if isinstance(benchmark, llavabench.LLaVABench) and not benchmark.has_judge:
      path = benchmark.write_requests(answers, os.path.join(folder, REQUESTS))
      raise InputError(
        'LLaVABench needs a judge; set --judge_url and --judge_model, or add a `review` to each '
        f'line of {path} elsewhere and pass that file as --judge_reviews'
      )
    scores = benchmark.score(answers)
  except InputError as e:
    return Scored(None, str(e))
  cut = sum(not records[identity]['ended'] for identity in answers)
  notes = [f'{cut} answers were cut at {manifest["settings"]["max_tokens"]} tokens'] if cut else []
  if beyond:
    notes.append(
      f'{len(beyond)} questions were not asked: they have more images than this model can read'
    )
    scores.counts['not answerable'] = len(beyond)
  return Scored(scores._replace(notes=(*scores.notes, *notes)))


def _manifest(name, folder) -> dict[str, Any]:
  found = folders.read(folder)
  if found is None:
    raise InputError(f'{folder} has no {folders.MANIFEST}; run --stage=answer for {name} first')
  return found
