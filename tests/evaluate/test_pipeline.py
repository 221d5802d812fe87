"""The whole command on all eight benchmarks with the smallest model: both stages, stopped at each
kind of write, and gone on with.
"""

import errno
import functools
import json
import os
import pathlib

import jax
import micro_parts
import numpy as np
from PIL import Image
import pytest
from run_command import Page, run
import tiny_benchmarks

from dsr_jax import sharding
from dsr_jax import config as config_lib
from dsr_jax.errors import InputError
from dsr_jax.evaluate import __main__ as evaluate
from dsr_jax.evaluate import evaluators, geneval, registry, scoring
from dsr_jax.evaluate.answering import asking, drawing, folders, subject
from dsr_jax.evaluate.t2i_compbench import benchmark as t2i_compbench
from dsr_jax.evaluate.vlmeval import judge

DRAWINGS = ('geneval', 't2i_compbench')
EIGHT = (*DRAWINGS, *registry.TABLES)
ABOUT = {'evaluators': {'stub': {'name': 'stub', 'sha256': 'f' * 64}}, 'labels': {}, 'warnings': []}


class Work:
  """What the model was made to do: (benchmark's word, ...) of each chunk."""

  def __init__(self):
    self.drawn, self.answered = [], []


def load(name, wishes, mesh, work=None):
  """A `Subject` of the micro model; another name has other weights."""
  model = micro_parts.load(name)
  shift = sum(map(ord, name)) % 7
  model.params = jax.tree.map(lambda x: x * (1 + shift / 10), model.params)
  how = subject.How(
    temperature=1.0,
    guidance=2.0,
    cfg_interval=0,
    seed=0,
    best_of=wishes.best_of,
    max_tokens=wishes.max_tokens,
    instruction='look',
    template='words',
    precision='float32',
  )
  identity = {'name': name, 'weights': f'{shift}' * 64, 'trained': ''}
  made = subject.Subject(name, model, how, identity, 16, mesh)
  if work is not None:
    draw, answer = made.draw, made.answer
    made.draw = lambda prompt, words, group: (work.drawn.append(tuple(words)), draw(prompt, words, group))[1]
    made.answer = lambda *x: (work.answered.append(x[3].tobytes()), answer(*x))[1]
  return made


def stub_watcher(folder, names, parts, blip_size):
  """Says something of every picture that depends on its pixels alone."""
  is_geneval = os.path.basename(folder) == 'geneval'
  rows = dict(geneval.find_pictures(folder)) if is_geneval else {}

  def look(folder, path):
    mean = float(np.asarray(Image.open(os.path.join(folder, path)), float).mean()) / 255
    if path in rows:
      verdict = geneval.Verdict(mean > 0.5, 'dark' * (mean <= 0.5), {})
      return geneval.result_row(path, rows[path], verdict)
    parts = t2i_compbench.PARTS[path.split('/')[0]]
    return {part: f'{mean:.4f}' if part == 'binding' else mean for part in parts}

  labels = {'geneval': 'official rules, other model'} if rows else {'spatial': 'not comparable'}
  return evaluators.Watcher(look, {**ABOUT, 'labels': labels})


@pytest.fixture(scope='module')
def tables(tmp_path_factory):
  return tiny_benchmarks.write_all(tmp_path_factory.mktemp('tables'))


@pytest.fixture
def work(monkeypatch):
  """The command with the micro model, stub evaluators in this process, and a judge."""
  made = Work()
  monkeypatch.setattr(subject, 'load', functools.partial(load, work=made))
  monkeypatch.setattr(evaluate, '_check_exists', lambda name: None)
  monkeypatch.setattr(evaluators, '_geneval', stub_watcher)
  monkeypatch.setattr(evaluators, '_t2i_compbench', stub_watcher)

  def look(benchmark, folder, looking):
    evaluators.evaluate(benchmark, folder, looking.chosen)

  monkeypatch.setattr(scoring, 'look', look)
  monkeypatch.setattr(judge.OpenAIJudge, '__call__', lambda self, request: f'7 {len(request.id)}')
  return made


def flags(tables, output, **changes):
  """Of the whole command; a judge that needs no network."""
  values = {
    'model': 'one,two',
    'benchmarks': ','.join(EIGHT),
    'output': output,
    'data': tables,
    'any_version': True,
    'limit': 1,
    'max_tokens': 4,
    'judge_url': 'http://localhost:1',
    'judge_model': 'stub',
    'judge_rules': tables / 'rule.json',
  }
  return {name: value for name, value in {**values, **changes}.items() if value is not None}


def contents(folder):
  """{path: bytes} of all files; lines of the judge's cache come in any order."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(pathlib.Path(folder).rglob('*'))
    if path.is_file()
  }


@pytest.fixture
def unbroken(work, tables, tmp_path):
  said = run(evaluate, **flags(tables, tmp_path / 'unbroken'))
  return said, contents(tmp_path / 'unbroken')


# Each kind of write, in the order of the command: (part of the path that is renamed to, which one).
KINDS = [
  ('one/geneval/manifest.json', 1),
  ('one/geneval/00', 2),  # a metadata.jsonl
  ('one/geneval/pending.zip', 2),
  ('.png', 3),
  ('one/geneval/rewards/', 1),
  ('one/t2i_compbench/pending.zip', 1),
  ('one/pope/answers/', 1),
  ('one/mmmu/answers/', 2),
  ('one/mmbench/one_MMBench_DEV_EN.xlsx', 1),
  ('two/geneval/pending.zip', 1),
  ('one/geneval/evaluators.json', 1),
  ('one/geneval/records/', 2),
  ('one/geneval/results.jsonl', 1),
  ('one/t2i_compbench/complex/annotation_3_in_1/vqa_result.json', 1),
  ('results.json', 1),
  ('results.md', 1),
  ('results.tex', 1),
  ('page.html', 1),
]


def test_stopped_at_each_kind_of_write_it_ends_with_the_same_files(
  work, tables, tmp_path, unbroken, monkeypatch
):
  """No picture or answer that was kept is made again."""
  said, wanted = unbroken
  drawn, answered = list(work.drawn), list(work.answered)
  assert len(set(drawn)) == len(drawn) / 2  # two models
  work.drawn.clear()
  work.answered.clear()
  output = tmp_path / 'broken'
  real = os.replace
  for part, number in KINDS:
    left = number

    def fails(old, new, part=part):
      nonlocal left
      if part in f'{new}':
        left -= 1
        if not left:
          raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
      real(old, new)

    before = {path: os.stat(output / path).st_mtime_ns for path in contents(output)}
    monkeypatch.setattr(os, 'replace', fails)
    with pytest.raises(InputError, match=r'cannot write below .*No space left') as e:
      run(evaluate, **flags(tables, output))
    assert '\n' not in str(e.value) and not left, part
    monkeypatch.setattr(os, 'replace', real)
    for path, time in before.items():  # what was kept is kept
      if path.endswith(('.png', 'manifest.json')) or '/answers/' in path or '/records/' in path:
        assert os.stat(output / path).st_mtime_ns == time, path
  assert run(evaluate, **flags(tables, output)) == {**said, 'output': str(output)}
  found = contents(output)
  leftovers = [path for path in found if path.endswith('.new') or 'pending' in path]
  assert not leftovers
  assert found.keys() == wanted.keys()
  assert [path for path in wanted if found[path] != wanted[path]] == []
  # Chunks were begun again only where their one file was not yet there: one a failure before it,
  # and the one that was launched ahead.
  again = len(work.drawn) - len(drawn)
  assert 0 < again <= 2 * sum('pending' in part or 'geneval/manifest' in part for part, _ in KINDS)
  calls = len(work.drawn), len(work.answered)
  run(evaluate, **flags(tables, output))
  assert (len(work.drawn), len(work.answered)) == calls
  assert contents(output) == found
