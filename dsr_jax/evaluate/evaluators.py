"""Runs the models that evaluate sampled images, in a separate process, because they need torch and
transformers, which the code that answers benchmarks never imports.

  python -m dsr_jax.evaluate.evaluators --benchmark=geneval --folder=OUTPUT/MODEL/geneval
  [--evaluator.mask2former=DIR --evaluator.clip_colors=DIR]

The folder may come from any program, as long as it has the official layout. Writes these into it:

    records/          {image: its hash and the evaluator's outputs}, one file per batch; an image is
                      evaluated again only if it changed
    evaluators.json   every evaluator with its version and hash, and the labels of its numbers
    results.jsonl     GenEval's own results file; for T2I-CompBench, its vqa_result.json files
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
except ImportError as e:  # torch and spaCy are extras; `evaluate` says what is missing
  MISSING = f'no {e.name}' if e.name else f'that they cannot be imported ({first_line(e)})'
else:
  MISSING = ''

BATCH = 16  # images evaluated together and written to one file
HASH = 'sha256'  # the key of an image's hash in its record


class Watcher(NamedTuple):
  """The evaluators of a benchmark.

  Attributes:
    look: (images, their paths below the folder) -> their records.
    about: what to record about the evaluators, JSON values.
  """

  look: Callable[[Sequence[Image.Image], Sequence[str]], list[dict[str, Any]]]
  about: dict[str, Any]


def evaluate(benchmark: str, folder: str, chosen: dict[str, str], blip_size: int = 0) -> str:
  """Evaluates every image of a folder that has no record yet, or has changed since.

  Args:
    benchmark: geneval or t2i_compbench.
    folder: in the official layout.
    chosen: {kind: directory or Hub id} of the evaluators that are not the defaults.
    blip_size: side of BLIP's input images; 0: the checkpoint's own.

  Returns:
    The path of `evaluators.json`.
  """
  if MISSING:
    raise InputError(
      f'the evaluators need the packages in requirements-eval.txt, but found {MISSING}; '
      'pip install -r requirements-eval.txt'
    )
  if not os.path.isdir(folder):
    raise InputError(
      f'--folder {inputs.shown(folder)} does not exist; give the folder with the images of '
      f'{benchmark}'
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
  """One process at a time. The evaluators of a killed command still finish a batch of images;
  waiting for them avoids evaluating those images twice.
  """
  held = os.open(folder, os.O_RDONLY)
  try:
    with contextlib.suppress(OSError):  # a file system without locks
      try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        cli.log(f'waiting      for another process that evaluates the images of {folder}')
        fcntl.flock(held, fcntl.LOCK_EX)
    yield
  finally:
    os.close(held)


def _look(folder, paths, watcher) -> dict[str, dict[str, Any]]:
  """The records of all images, in their order. Evaluates the images that have no record."""
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
    cli.log(f'evaluated    {len(done)} of {len(paths)} images')
  records = folders.read_all(place)
  return {path: records[path] for path in paths}


def find_pictures(benchmark: str, folder: str) -> list[str]:
  """Paths of all images below a folder in the official layout."""
  if benchmark == geneval.NAME:
    return [path for path, _ in geneval.find_pictures(folder)]
  return t2i_compbench.find_pictures(folder)


def _hash_of(path) -> str:
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def _forget_changed(place, hashes):
  """Deletes the records of images that have changed or are gone."""
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
    cli.log(f'note         {forgotten} evaluated images have changed or are gone: records deleted')


def _claim(folder, about):
  """InputError if other evaluators wrote the folder's records."""
  path = os.path.join(folder, ABOUT)
  found = files.read_json_or_none(path)
  if found is not None and os.path.isdir(os.path.join(folder, RECORDS)):
    for name in sorted({*found['evaluators'], *about['evaluators']}):
      old, new = (x['evaluators'].get(name) for x in (found, about))
      different = [k for k in new or {} if k != 'name' and (old or {}).get(k) != new[k]]
      if (old is None) != (new is None) or different:
        what = different[0] if different else 'presence'
        raise InputError(
          f'the records in {folder} come from a different {name} ({what}: '
          f'{(old or {}).get(what)} there, {(new or {}).get(what)} now); use the same evaluator, '
          f'or remove the folder {RECORDS} in it to evaluate again'
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
  """Loads only the evaluators that the existing categories need."""
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
    # Only whether it detects anything: its confidences are always lower, so its warnings below .9
    # would mean nothing.
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
  """JSON values, exactly as they are read back from a file."""
  return json.loads(json.dumps(about))


def _self_test(detector, name) -> list[str]:
  return self_test.check(self_test.look(detector), name)


def _as_geneval(detector):
  """Adapts a detector of named things to the self-test: it looks for the objects of the photos."""

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
      f'--benchmark is {f.benchmark}; set it to {geneval.NAME} or {t2i_compbench.NAME}'
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
