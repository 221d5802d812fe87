"""The evaluators on folders of pictures: records, official result files, resumed, refused."""

from concurrent import futures
import fcntl
import functools
import hashlib
import json
import os
import time

import numpy as np
from PIL import Image
import pytest
import tiny_evaluators
import torch

from dsr_jax.errors import InputError
from dsr_jax.evaluate import evaluator_choice, evaluators, geneval, pictures, registry, scoring
from dsr_jax.evaluate.adapters import clip, mask2former, self_test
from dsr_jax.evaluate.answering import folders


@pytest.fixture(scope='module')
def chosen(tmp_path_factory):
  """Tiny evaluators of every kind."""
  torch.set_num_threads(1)
  folder = tmp_path_factory.mktemp('evaluators')
  return {
    'mask2former': str(tiny_evaluators.mask2former(folder / 'mask2former', classes=80)),
    'clip_colors': str(tiny_evaluators.clip(folder / 'clip_colors')),
    'clip': str(tiny_evaluators.clip(folder / 'clip', context=24)),
    'blip': str(tiny_evaluators.blip(folder / 'blip')),
    'owlv2': str(tiny_evaluators.owlv2(folder / 'owlv2')),
  }


@pytest.fixture
def small(monkeypatch):
  """The detector sees pictures of a handy size."""
  made = functools.partial(mask2former.Mask2Former, sides=(64, 96))
  monkeypatch.setattr(mask2former, 'Mask2Former', made)


@pytest.fixture
def sound(small, monkeypatch):
  """Random detectors pass the self-test."""
  found = [self_test.Found(file, name, 0.8) for file, name in self_test.photos().items()]
  monkeypatch.setattr(self_test, 'look', lambda detector: found)


def draw(folder, name, wanted):
  """Pictures of noise of some prompts in the official layout; returns their paths."""
  benchmark = registry.open_drawing(name)
  paths = []
  side_files = benchmark.side_files()
  for prompt in benchmark.prompts():
    if prompt.id in wanted:
      path = benchmark.picture_path(prompt, 0)
      (folder / path).parent.mkdir(parents=True, exist_ok=True)
      pixels = np.random.default_rng(prompt.number).integers(0, 256, (6, 6, 3), np.uint8)
      Image.fromarray(pixels).resize((36, 36), Image.Resampling.BICUBIC).save(folder / path)
      paths.append(path)
      if f'{prompt.id}/metadata.jsonl' in side_files:
        text = side_files[f'{prompt.id}/metadata.jsonl']
        (folder / prompt.id / 'metadata.jsonl').write_text(text)
  return paths


def records_of(folder):
  return folders.read_all(os.path.join(folder, evaluator_choice.RECORDS))


def test_geneval(tmp_path, chosen, sound):
  paths = draw(tmp_path, 'geneval', ('00000', '00100', '00300'))
  evaluators.evaluate('geneval', str(tmp_path), chosen)
  records = records_of(tmp_path)
  assert sorted(records) == sorted(paths)
  detector = mask2former.Mask2Former(chosen['mask2former'], 'cpu')
  colors = clip.ColorClassifier(clip.Clip(chosen['clip_colors'], 'cpu'))
  rows = dict(geneval.find_pictures(tmp_path))
  by = pictures.GenEvalEvaluators(detector, colors)
  shown = pictures.load(str(tmp_path), paths)
  wanted = pictures.judge_geneval(shown, paths, [rows[path] for path in paths], by)
  lines = (tmp_path / evaluator_choice.RESULTS).read_text().splitlines()
  for path, line, record in zip(paths, lines, wanted, strict=True):
    digest = hashlib.sha256((tmp_path / path).read_bytes()).hexdigest()
    assert records[path] == {'sha256': digest, **record}
    assert json.loads(line) == record  # the official file has nothing of ours
  about = json.loads((tmp_path / evaluator_choice.ABOUT).read_text())
  assert about['labels'] == {'geneval': 'official rules, other model'}
  assert len(about['evaluators']['mask2former']['sha256']) == 64
  assert len(about['warnings']) == 3 and 'below 0.9' in about['warnings'][0]
  scores = registry.open_drawing('geneval').score(records)
  assert scores.counts['pictures'] == 3


def test_t2i_compbench(tmp_path, chosen, sound):
  paths = draw(
    tmp_path, 't2i_compbench', ('color/000', 'spatial/000', 'non_spatial/000', 'complex/000')
  )
  evaluators.evaluate('t2i_compbench', str(tmp_path), chosen, blip_size=40)
  records = records_of(tmp_path)
  assert sorted(records) == sorted(paths)
  about = json.loads((tmp_path / evaluator_choice.ABOUT).read_text())
  assert about['labels'] == {
    'binding': 'official rules, other model',
    'spatial': 'not comparable',
    'numeracy': 'not comparable',
    'clip': 'official rules, other model',  # not the official one's shape
  }
  assert about['evaluators']['blip']['settings'] == {'size': 40, 'interpolated': True}
  assert (tmp_path / 'complex' / 'annotation_3_in_1' / 'vqa_result.json').is_file()


def test_nothing_is_looked_at_twice_and_other_evaluators_are_refused(
  tmp_path, chosen, sound, monkeypatch
):
  paths = draw(tmp_path, 't2i_compbench', ('non_spatial/000', 'non_spatial/001', 'non_spatial/002'))
  monkeypatch.setattr(evaluators, 'BATCH', 2)
  seen = []
  real = pictures.measure_compbench

  def watched(shown, paths, by):
    if len(seen) == 2 and os.path.exists(tmp_path / 'stop'):
      raise KeyboardInterrupt
    seen.extend(paths)
    return real(shown, paths, by)

  monkeypatch.setattr(pictures, 'measure_compbench', watched)
  (tmp_path / 'stop').touch()
  with pytest.raises(KeyboardInterrupt):
    evaluators.evaluate('t2i_compbench', str(tmp_path), chosen)
  (tmp_path / 'stop').unlink()
  evaluators.evaluate('t2i_compbench', str(tmp_path), chosen)
  assert seen == paths
  # But for a picture that changed, which is looked at again, and no other.
  before = records_of(tmp_path)
  Image.new('RGB', (36, 36), 'red').save(tmp_path / paths[0])
  evaluators.evaluate('t2i_compbench', str(tmp_path), chosen)
  assert seen == [*paths, paths[0]]
  after = records_of(tmp_path)
  assert [path for path in paths if after[path] != before[path]] == [paths[0]]
  with pytest.raises(
    InputError, match='records in .* come from a different clip .sha256: .* now.*remove'
  ):
    evaluators.evaluate('t2i_compbench', str(tmp_path), {**chosen, 'clip': chosen['clip_colors']})


def test_one_process_looks_at_a_folder_at_a_time(tmp_path, chosen, sound, capsys):
  """What a command that was killed left at work ends first."""
  paths = draw(tmp_path, 't2i_compbench', ('non_spatial/000',))
  held = os.open(tmp_path, os.O_RDONLY)
  fcntl.flock(held, fcntl.LOCK_EX)
  with futures.ThreadPoolExecutor(1) as pool:
    looking = pool.submit(evaluators.evaluate, 't2i_compbench', str(tmp_path), chosen)
    while not looking.done() and 'waiting' not in capsys.readouterr().err:
      time.sleep(0.01)
    assert not looking.done() and not records_of(tmp_path)
    os.close(held)
    looking.result()
  assert list(records_of(tmp_path)) == paths


def test_only_what_a_folder_needs_is_loaded(tmp_path, chosen, sound):
  draw(tmp_path, 't2i_compbench', ('non_spatial/000',))
  only = {'clip': chosen['clip'], 'blip': '/nowhere', 'owlv2': '/nowhere'}
  evaluators.evaluate('t2i_compbench', str(tmp_path), only)
  about = json.loads((tmp_path / evaluator_choice.ABOUT).read_text())
  assert set(about['evaluators']) == {'clip', 'tagger'}


def test_another_architecture_is_found_without_torch(chosen):
  with pytest.raises(InputError, match='--evaluator.blip=.* holds a CLIPModel; .* with a Blip'):
    evaluator_choice.check({'blip': chosen['clip']}, 0)
  with pytest.raises(InputError, match='--evaluator.blip=/nowhere is neither a directory nor'):
    evaluator_choice.check({'blip': '/nowhere'}, 0)
  for size in (-16, 100):
    with pytest.raises(InputError, match=f'--blip_size is {size}; set it to 0 or a multiple'):
      evaluator_choice.check(chosen, size)
  evaluator_choice.check({**chosen, 'blip': 'owner/name'}, 480)


def test_a_broken_detector_stops_its_benchmark_with_a_sentence(tmp_path, chosen, small):
  """A random detector sees nothing in the photos."""
  draw(tmp_path, 'geneval', ('00000',))
  with pytest.raises(InputError, match='found no object above 0.3 in the photos of its self-test'):
    evaluators.evaluate('geneval', str(tmp_path), chosen)
  assert not (tmp_path / evaluator_choice.RECORDS).exists()


def test_without_torch_there_is_a_sentence(tmp_path, monkeypatch):
  """Through the evaluators' own process."""
  draw(tmp_path, 'geneval', ('00000',))
  (tmp_path / 'path').mkdir()
  (tmp_path / 'path' / 'torch.py').write_text("raise ImportError('no torch', name='torch')")
  monkeypatch.setenv('PYTHONPATH', str(tmp_path / 'path'))
  with pytest.raises(InputError, match='packages in requirements-eval.txt, but found no torch'):
    scoring.look('geneval', str(tmp_path), scoring.Looking({}))
