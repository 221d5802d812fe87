"""Runs the models that evaluate sampled images, in a separate process: it imports torch and
transformers, which the code that answers benchmarks never imports.

  python -m dsr_jax.evaluate.evaluators --benchmark=geneval --folder=OUTPUT/MODEL/geneval
  [--evaluator.mask2former=DIR --evaluator.clip_colors=DIR]

The folder may come from any program, as long as it has the official layout. Writes to it

    records/          {image: its hash and the evaluator's outputs}, one file per batch; an image is
                      evaluated again only if it changed
    evaluators.json   every evaluator with its version and hash, and the labels of its numbers
    results.jsonl     GenEval's own results file; or T2I-CompBench's vqa_result.json
"""

from collections.abc import Callable, Sequence
import contextlib
import fcntl
import hashlib
import json
import os
from typing import Any, NamedTuple

from absl import flags
from PIL import Image

from dsr_jax import cli, files, flag_types, inputs
from dsr_jax.errors import InputError, first_line
from dsr_jax.evaluate import geneval, pictures, protocol
from dsr_jax.evaluate.answering import folders
from dsr_jax.evaluate.evaluator_choice import (
  ABOUT,
  KINDS,
  RECORDS,
  RESULTS,
  check,
  chosen_of,
  define_evaluator_flags,
)
from dsr_jax.evaluate.overlap import parts_of, prepared
from dsr_jax.evaluate.t2i_compbench import benchmark as t2i_compbench

try:
  from dsr_jax.evaluate.adapters import (
    blip_vqa,
    clip,
    mask2former,
    open_detector,
    self_test,
    tagger,
  )
except ImportError as e:  # torch and spaCy are extras: whoever lacks them is told so
  MISSING = f'no {e.name}' if e.name else f'that they cannot be imported ({first_line(e)})'
else:
  MISSING = ''

BATCH = 16  # pictures that are looked at together, and between two writes
HASH = 'sha256'  # of a record's picture


class Watcher(NamedTuple):
  """The evaluators of a benchmark.

  Attributes:
    look: (pictures, their paths below the folder) -> their records.
    about: of the evaluators, JSON values.
  """

  look: Callable[[Sequence[Image.Image], Sequence[str]], list[dict[str, Any]]]
  about: dict[str, Any]


def evaluate(benchmark: str, folder: str, chosen: dict[str, str], blip_size: int = 0) -> str:
  """Looks at every picture of a folder that has no record yet, or has changed since.

  Args:
    benchmark: geneval or t2i_compbench.
    folder: in the official layout.
    chosen: {kind: directory or Hub id}, of those that differ from the defaults.
    blip_size: of BLIP's pictures; 0: its checkpoint's own.

  Returns:
    The path of `evaluators.json`.
  """
  if MISSING:
    raise InputError(
      f'looked for the evaluators and found {MISSING}; expected all that requirements-eval.txt '
      'names; pip install -r requirements-eval.txt'
    )
  if not os.path.isdir(folder):
    raise InputError(
      f'found no folder {inputs.shown(folder)}; expected the pictures of {benchmark}; correct '
      '--folder'
    )
  paths = find_pictures(benchmark, folder)
  names = {name: chosen.get(name) or kind.default for name, kind in KINDS.items()}
  parts = sorted({path.split('/')[0] for path in paths})
  build = _geneval if benchmark == geneval.NAME else _t2i_compbench
  watcher = build(folder, names, parts, blip_size)
  with _alone(folder):
    _claim(folder, watcher.about)
    records = _look(folder, paths, watcher)
  if benchmark == geneval.NAME:
    rows = ({k: x for k, x in record.items() if k != HASH} for record in records.values())
    files.write_text(os.path.join(folder, RESULTS), ''.join(json.dumps(r) + '\n' for r in rows))
  else:
    t2i_compbench.T2ICompBench().write_results(records, folder)
  return os.path.join(folder, ABOUT)


@contextlib.contextmanager
def _alone(folder):
  """One process at a time: what a command that was killed had started ends after its next pictures,
  and nothing that it looks at yet should be looked at again.
  """
  held = os.open(folder, os.O_RDONLY)
  try:
    with contextlib.suppress(OSError):  # a file system without locks
      try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        cli.log(f'waiting      for others who look at the pictures of {folder}')
        fcntl.flock(held, fcntl.LOCK_EX)
    yield
  finally:
    os.close(held)


def _look(folder, paths, watcher) -> dict[str, dict[str, Any]]:
  """The records of all pictures, in their order; those are looked at that have none."""
  place = os.path.join(folder, RECORDS)
  hashes = {path: _hash_of(os.path.join(folder, path)) for path in paths}
  _forget_changed(place, hashes)
  done = set(folders.read_all(place))
  left = [path for path in paths if path not in done]

  def load(batch):
    return pictures.load(folder, batch)

  for batch, shown in prepared(parts_of(left, BATCH), load):
    found = watcher.look(shown, batch)
    records = {path: {HASH: hashes[path], **record} for path, record in zip(batch, found)}
    name = f'{folders.digest_of([*batch, *(hashes[path] for path in batch)])}.json'
    files.write_json(os.path.join(place, name), records, indent=1)
    done |= set(batch)
    cli.log(f'looked at    {len(done)} of {len(paths)} pictures')
  records = folders.read_all(place)
  return {path: records[path] for path in paths}


def find_pictures(benchmark: str, folder: str) -> list[str]:
  """Paths of all pictures below a folder in the official layout."""
  if benchmark == geneval.NAME:
    return [path for path, _ in geneval.find_pictures(folder)]
  return t2i_compbench.find_pictures(folder)


def _hash_of(path) -> str:
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def _forget_changed(place, hashes):
  """Takes the records of pictures away that are not what they were, or are gone."""
  forgotten = 0
  for name in sorted(os.listdir(place)) if os.path.isdir(place) else ():
    path = os.path.join(place, name)
    if not name.endswith('.json'):
      continue
    records = files.read_json(path)
    kept = {key: x for key, x in records.items() if hashes.get(key, '') == x.get(HASH)}
    if len(kept) < len(records):
      forgotten += len(records) - len(kept)
      files.write_json(path, kept, indent=1)
  if forgotten:
    cli.log(f'note         {forgotten} pictures are not those that were looked at earlier: again')


def _claim(folder, about):
  """InputError if the folder's records are of other evaluators."""
  path = os.path.join(folder, ABOUT)
  found = files.read_json_or_none(path)
  if found is not None and os.path.isdir(os.path.join(folder, RECORDS)):
    for name in sorted({*found['evaluators'], *about['evaluators']}):
      old, new = (x['evaluators'].get(name) for x in (found, about))
      different = [k for k in new or {} if k != 'name' and (old or {}).get(k) != new[k]]
      if (old is None) != (new is None) or different:
        what = different[0] if different else 'presence'
        raise InputError(
          f'found records in {folder} that another {name} made ({what}: '
          f'{(old or {}).get(what)} there, {(new or {}).get(what)} now); expected the same; remove '
          f'its folder {RECORDS} to look again'
        )
  files.write_json(path, about, indent=1)


def _geneval(folder, names, parts, blip_size) -> Watcher:
  del parts, blip_size
  detector = mask2former.Mask2Former(names['mask2former'])
  warnings = _self_test(detector, names['mask2former'])
  colors = clip.Clip(names['clip_colors'])
  classifier = clip.ColorClassifier(colors)
  rows = dict(geneval.find_pictures(folder))

  by = pictures.GenEvalEvaluators(detector, classifier)

  def look(shown, paths):
    return pictures.judge_geneval(shown, paths, [rows[path] for path in paths], by)

  label = protocol.worst(mask2former.LABEL, colors.label(clip.COLOR_SHAPE))
  about = {
    'evaluators': {
      'mask2former': detector.about._asdict(),
      'clip_colors': colors.about._asdict(),
    },
    'labels': {'geneval': label.value},
    'warnings': warnings,
  }
  return Watcher(look, _plain(about))


def _t2i_compbench(folder, names, parts, blip_size) -> Watcher:
  """Only the evaluators of the categories that are there are loaded."""
  del folder
  needed = {part for category in parts for part in t2i_compbench.PARTS.get(category, ())}
  abouts, labels = {}, {}
  vqa = detector = cosine = None
  reads = tagger.SpacyTagger()
  abouts['tagger'] = reads.about
  if t2i_compbench.BINDING in needed:
    vqa = blip_vqa.BlipVqa(names['blip'], size=blip_size or None)
    abouts['blip'] = vqa.about._asdict()
    labels[t2i_compbench.BINDING] = blip_vqa.LABEL
  if needed & {t2i_compbench.SPATIAL, t2i_compbench.NUMERACY}:
    detector = open_detector.OpenDetector(names['owlv2'])
    # That it sees anything; its confidences are lower throughout, so .9 says nothing about it.
    _self_test(_as_geneval(detector), names['owlv2'])
    abouts['owlv2'] = detector.about._asdict()
    labels[t2i_compbench.SPATIAL] = open_detector.LABEL
    labels[t2i_compbench.NUMERACY] = open_detector.LABEL
  if t2i_compbench.CLIP in needed:
    scorer = clip.Clip(names['clip'])
    cosine = scorer.cosines
    abouts['clip'] = scorer.about._asdict()
    labels[t2i_compbench.CLIP] = scorer.label(clip.SCORE_SHAPE)
  by = pictures.CompBenchEvaluators(reads, vqa, detector, cosine)

  def look(shown, paths):
    return pictures.measure_compbench(shown, paths, by)

  about = {'evaluators': abouts, 'labels': labels, 'warnings': []}
  return Watcher(look, _plain(about))


def _plain(about):
  """JSON values, as they are read back."""
  return json.loads(json.dumps(about))


def _self_test(detector, name) -> list[str]:
  return self_test.check(self_test.look(detector), name)


def _as_geneval(detector):
  """A detector of named things as one of the classes of the self-test's photos."""

  names = sorted(set(self_test.photos().values()))

  def look(shown):
    return [_by_class(found) for found in detector(shown, [names] * len(shown))]

  return look


def _by_class(found) -> dict[str, list[geneval.Detection]]:
  by_class: dict[str, list[geneval.Detection]] = {}
  for thing in found:
    by_class.setdefault(thing.label, []).append(geneval.Detection.of([*thing.box, thing.score]))
  return by_class


# The command.


def main(argv, f=flags.FLAGS):
  cli.no_arguments(argv)
  cli.require(benchmark=f.benchmark, folder=f.folder)
  if f.benchmark not in (geneval.NAME, t2i_compbench.NAME):
    raise InputError(
      f'found --benchmark={f.benchmark}; expected {geneval.NAME} or {t2i_compbench.NAME}; '
      'correct it'
    )
  chosen = chosen_of(f)
  check(chosen, f.blip_size)
  path = evaluate(f.benchmark, f.folder, chosen, f.blip_size)
  cli.print_json({'evaluators': path})


def define_flags(f=flags.FLAGS):
  flags.DEFINE_string('benchmark', None, 'geneval or t2i_compbench.', flag_values=f)
  flag_types.define_path('folder', None, "The benchmark's images, in the official layout.", f)
  define_evaluator_flags(f)


if __name__ == '__main__':
  cli.run_main(main, define_flags)
