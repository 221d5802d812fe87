"""The whole command on all eight benchmarks with the smallest model: both stages, stopped at each
kind of write, and gone on with.
"""

import errno
import functools
import json
import os
import pathlib
from typing import NamedTuple

import jax
import micro_parts
import numpy as np
from PIL import Image
import pytest
from run_command import Page, run
import tiny_benchmarks

from dsr_jax import config as config_lib
from dsr_jax import sharding
from dsr_jax.errors import InputError
from dsr_jax.evaluate import __main__ as evaluate
from dsr_jax.evaluate import evaluators, geneval, registry, scoring, stats
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
  how = micro_parts.how(wishes)
  identity = {'name': name, 'weights': f'{shift}' * 64, 'trained': ''}
  made = subject.Subject(name, model, how, identity, 16, mesh)
  if work is not None:
    draw, answer = made.draw, made.answer
    made.draw = lambda prompt, words, group: (
      work.drawn.append(tuple(words)),
      draw(prompt, words, group),
    )[1]
    made.answer = lambda *x: (work.answered.append(x[3].tobytes()), answer(*x))[1]
  return made


def stub_watcher(folder, names, parts, blip_size):
  """Says something of every picture that depends on its pixels alone."""
  is_geneval = os.path.basename(folder) == 'geneval'
  rows = dict(geneval.find_pictures(folder)) if is_geneval else {}

  def record(picture, path):
    mean = float(np.asarray(picture, float).mean()) / 255
    if path in rows:
      verdict = geneval.Verdict(mean > 0.5, 'dark' * (mean <= 0.5), {})
      return geneval.result_row(path, rows[path], verdict)
    parts = t2i_compbench.PARTS[path.split('/')[0]]
    return {part: f'{mean:.4f}' if part == 'binding' else mean for part in parts}

  def look(pictures, paths):
    return list(map(record, pictures, paths))

  labels = {'geneval': 'official rules, other model'} if rows else {'spatial': 'not comparable'}
  return evaluators.Watcher(look, {**ABOUT, 'labels': labels})


@pytest.fixture(scope='module')
def tables(tmp_path_factory):
  return tiny_benchmarks.write_all(tmp_path_factory.mktemp('tables'))


@pytest.fixture(scope='module')
def command():
  """The command with the micro model, stub evaluators in this process, and a judge."""
  made = Work()

  def look(benchmark, folder, looking):
    evaluators.evaluate(benchmark, folder, looking.chosen)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(stats, 'RESAMPLES', stats.BLOCK)  # few, for speed
    patch.setattr(subject, 'load', functools.partial(load, work=made))
    patch.setattr(evaluate, '_check_exists', lambda name: None)
    patch.setattr(evaluators, '_geneval', stub_watcher)
    patch.setattr(evaluators, '_t2i_compbench', stub_watcher)
    patch.setattr(scoring, 'look', look)
    patch.setattr(judge.OpenAIJudge, '__call__', lambda self, request: f'7 {len(request.id)}')
    yield made


@pytest.fixture
def work(command):
  """What the model is made to do in a test."""
  command.drawn.clear()
  command.answered.clear()
  return command


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


class Unbroken(NamedTuple):
  """What was said, {path: bytes}, the folder, and the chunks that were drawn."""

  said: dict
  files: dict
  folder: pathlib.Path
  drawn: list


@pytest.fixture(scope='module')
def unbroken(command, tables, tmp_path_factory):
  folder = tmp_path_factory.mktemp('out') / 'unbroken'
  command.drawn.clear()
  said = run(evaluate, **flags(tables, folder))
  return Unbroken(said, contents(folder), folder, list(command.drawn))


# Each kind of write, in the order of the command: (part of the path that is renamed to, which one).
KINDS = [
  ('one/geneval/manifest.json', 1),
  ('one/geneval/00', 2),  # a metadata.jsonl
  ('one/geneval/pending.zip', 2),
  ('.png', 3),
  ('one/geneval/rewards/', 1),
  ('one/t2i_compbench/pending.zip', 1),
  ('one/pope/answers/', 1),
  ('one/mmmu/answers/', 1),
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
  said, wanted, _, drawn = unbroken
  assert len(set(drawn)) == len(drawn) / 2  # two models
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


# What the whole command leaves.


def test_layouts_tables_and_the_page(unbroken):
  said, files, folder, _ = unbroken
  assert said['output'] == str(folder) and set(said) == {'output', *EIGHT}
  # The official scorers' own layouts.
  assert len(geneval.find_pictures(folder / 'two' / 'geneval')) == 6 * 4
  assert len(t2i_compbench.find_pictures(folder / 'two' / 't2i_compbench')) == 6 * 10
  assert 'two/geneval/results.jsonl' in files
  assert 'two/t2i_compbench/complex/annotation_3_in_1/vqa_result.json' in files
  assert 'two/mmmu/two_MMMU_DEV_VAL.xlsx' in files
  found = json.loads(files['results.json'])
  assert found['before'] == 'one' and found['model'] == 'two' and found['limit'] == 1
  for name in EIGHT:
    table = found['benchmarks'][name]
    assert any('--limit=1' in note for note in table['notes'])
    for line in table['statistics'].values():
      assert line['paper'] == {}  # a part is no number of the paper's
      assert set(line['difference']) == {'value', 'low', 'high'}
  assert found['benchmarks']['mmbench']['breakdown']['dev'].keys() == {'Overall', 'CP', 'shapes'}
  assert found['benchmarks']['pope']['breakdown'].keys() > {'Overall', 'random'}
  assert found['benchmarks']['llavabench']['breakdown']['overall']['relative'] > 0
  assert b'\\begin{tabular}' in files['results.tex']
  for section in ('GenEval', 'MMBench', 'LLaVABench', 'a quick look'):
    assert section in files['results.md'].decode()
  page = Page(files['page.html'].decode())
  words = ' '.join(page.words)
  for text in ('one', 'two', 'Candidates and their rewards', 'nats', 'Is there a thing', 'GenEval'):
    assert text in words, text
  # Six prompts of two benchmarks by two models, four samples each; candidates; questions' pictures.
  assert len(page.images) > 2 * 6 * 2 * 4
  assert all(src.startswith('data:image/') for src in page.images)


def test_the_same_model_twice_differs_by_nothing_and_is_asked_once(work, tables, tmp_path):
  output = tmp_path / 'out'
  asked = flags(tables, output, model='one', before='one', benchmarks='geneval,mmbench')
  run(evaluate, **asked)
  assert sorted(os.listdir(output)) == [
    'one',
    'page.html',
    'results.json',
    'results.md',
    'results.tex',
  ]
  assert len(work.drawn) == len(set(work.drawn))
  found = json.loads((output / 'results.json').read_text())['benchmarks']
  for table in found.values():
    for line in table['statistics'].values():
      assert line['difference'] == {'value': 0, 'low': 0, 'high': 0}
  # Another model, or other settings, in its folder is refused, and the difference named.
  with pytest.raises(InputError, match='settings.limit: 1 there, 2 now'):
    run(evaluate, **{**asked, 'limit': 2})
  (output / 'one' / 'geneval' / 'manifest.json').write_text(
    (output / 'one' / 'geneval' / 'manifest.json')
    .read_text()
    .replace('"weights": "', '"weights": "x')
  )
  with pytest.raises(InputError, match='answers of another model .*model.weights: x'):
    run(evaluate, **asked)


def test_stages_apart_leave_what_both_together_leave(work, tables, tmp_path):
  names = 'geneval,pope'
  run(evaluate, **flags(tables, tmp_path / 'both', benchmarks=names))
  said = run(evaluate, **flags(tables, tmp_path / 'apart', benchmarks=names, stage='answer'))
  assert said == {'output': str(tmp_path / 'apart')}
  assert not (tmp_path / 'apart' / 'results.json').exists()
  calls = len(work.drawn), len(work.answered)
  run(evaluate, **flags(tables, tmp_path / 'apart', benchmarks=names, stage='score'))
  assert (len(work.drawn), len(work.answered)) == calls
  assert contents(tmp_path / 'apart') == contents(tmp_path / 'both')
  # Answers are read by the questions that were asked, or not at all.
  other = damaged(tables, tmp_path / 'data', lambda text: text.replace('Yes', 'No'))
  said = run(evaluate, **flags(other, tmp_path / 'apart', benchmarks='pope', stage='score'))
  assert 'has answers to the table with md5' in said['not_scored']['pope']


def test_what_is_missing_is_one_sentence_and_the_others_get_their_scores(
  work, tables, tmp_path, monkeypatch
):
  def no_torch(benchmark, folder, looking):
    raise InputError('found no torch, which the evaluators need; expected it; install it')

  monkeypatch.setattr(scoring, 'look', no_torch)
  output = tmp_path / 'out'
  asked = flags(tables, output, model='one', benchmarks='geneval,pope,llavabench', judge_url=None,
                judge_model=None)  # fmt: skip
  said = run(evaluate, **asked)
  assert 'F1' in said['pope'] and set(said['not_scored']) == {'geneval', 'llavabench'}
  assert 'found no torch' in said['not_scored']['geneval']
  requests = output / 'one' / 'llavabench' / scoring.REQUESTS
  assert str(requests) in said['not_scored']['llavabench']
  assert 'Not scored: found no torch' in (output / 'results.md').read_text()
  # Judged elsewhere, the file scores it.
  reviews = tmp_path / 'reviews.jsonl'
  lines = [json.loads(line) for line in requests.read_text().splitlines()]
  reviews.write_text('\n'.join(json.dumps({**line, 'review': '8 4'}) for line in lines))
  said = run(evaluate, **{**asked, 'judge_reviews': reviews})
  assert said['llavabench']['relative score'] == 50


def test_checkpoints_of_a_run_become_curves(work, tables, tmp_path, monkeypatch):
  names = ('base', 'run@4', 'run@8')
  monkeypatch.setattr(
    evaluate, 'models_of', lambda model, before, base: evaluate.Models(names, (0, 4, 8))
  )
  asked = flags(tables, tmp_path / 'out', model='run@all', benchmarks='geneval,pope')
  run(evaluate, **asked)
  found = json.loads((tmp_path / 'out' / 'results.json').read_text())
  assert found['before'] == 'base' and found['model'] == 'run@8'
  for name in ('geneval', 'pope'):
    assert found['curves'][name]['steps'] == [0, 4, 8]
    values = [found['overview'][model] for model in names]
    assert len(values) == 3
  assert 'Over the run' in (tmp_path / 'out' / 'page.html').read_text()


def test_the_best_of_several_by_its_own_reward(work, tables, tmp_path):
  asked = flags(tables, tmp_path / 'out', model='one', benchmarks='geneval,llavabench', best_of=3)
  run(evaluate, **asked)
  folder = tmp_path / 'out' / 'one'
  records = drawing.rewards_of(str(folder / 'geneval'))
  assert len(records) == 24
  for record in records.values():
    assert len(record['rewards']) == 3
    assert record['chosen'] == int(np.argmax(record['rewards']))
  prompt = drawing.prompts_of(registry.open_drawing('geneval'), 1)[0]
  first = registry.open_drawing('geneval').picture_path(prompt, 0)
  kept = drawing.candidate_paths(prompt, 3)[records[first]['chosen']]
  assert (folder / 'geneval' / kept).read_bytes() == (folder / 'geneval' / first).read_bytes()
  for record in asking.records_of(str(folder / 'llavabench')).values():
    best = int(np.argmax(record['rewards']))
    assert record['answer'] == record['candidates'][best] and len(record['candidates']) == 3


def test_the_best_of_several_has_as_much_room_as_one_answer(work, tables, tmp_path, monkeypatch):
  """The first room is small; who has not ended in it is asked again, candidates too."""
  monkeypatch.setattr(asking, 'OPEN_ROOM', 2)
  asked = flags(tables, tmp_path / 'out', model='one', benchmarks='llavabench', best_of=2)
  run(evaluate, **asked)
  records = asking.records_of(str(tmp_path / 'out' / 'one' / 'llavabench')).values()
  lengths = [len(text.split()) for record in records for text in record['candidates']]
  assert max(lengths) > 2


def fresh(chunk, max_tokens=4):
  """The model with so many candidates or answers at once."""
  made = load('one', subject.Wishes(max_tokens=max_tokens), sharding.make_mesh(config_lib.Mesh()))
  made.chunk = chunk
  return made


def stopped_at_its_third(made, method):
  """Of three chunks one is kept: the second is at work when the third cannot be started."""
  real, calls = getattr(made, method), []

  def stops(*args):
    calls.append(args)
    if len(calls) == 3:
      raise KeyboardInterrupt
    return real(*args)

  setattr(made, method, stops)
  return made


def pieces(folder):
  """What each file of records is about."""
  return [set(json.loads(path.read_text())) for path in sorted(pathlib.Path(folder).iterdir())]


def test_a_picture_depends_on_its_prompt_and_sample_alone(tmp_path):
  """Not on what else is drawn, nor on how much at once; and none is drawn twice."""
  benchmark, team = registry.open_drawing('geneval'), evaluate.distributed.Team()
  few, more = str(tmp_path / 'few'), str(tmp_path / 'more')
  drawing.draw('geneval', fresh(8), benchmark, few, 1, team)
  with pytest.raises(KeyboardInterrupt):
    drawing.draw('geneval', stopped_at_its_third(fresh(8), 'draw'), benchmark, more, 2, team)
  [kept] = pieces(os.path.join(more, 'rewards'))
  times = {path: os.stat(os.path.join(more, path)).st_mtime_ns for path in kept}
  # Gone on with by another machine: other chunks.
  drawing.draw('geneval', fresh(24), benchmark, more, 2, team)
  assert {path: os.stat(os.path.join(more, path)).st_mtime_ns for path in kept} == times
  assert sum(map(len, pieces(os.path.join(more, 'rewards')))) == 2 * 6 * 4
  records, others = drawing.rewards_of(few), drawing.rewards_of(more)
  assert len(records) == 6 * 4 and len(others) == 2 * 6 * 4
  for path, record in records.items():
    assert others[path]['codes'] == record['codes']
    one, other = (np.asarray(Image.open(os.path.join(f, path)), int) for f in (few, more))
    # A pixel between two levels may be rounded to either.
    assert np.abs(one - other).max() <= 1
  assert len({str(record['codes']) for record in others.values()}) > len(others) / 2


def test_a_picture_that_is_gone_is_drawn_again_and_no_other(tmp_path):
  benchmark, team = registry.open_drawing('geneval'), evaluate.distributed.Team()
  drawing.draw('geneval', fresh(8), benchmark, str(tmp_path), 1, team)
  before = contents(tmp_path)
  path = max(path for path in before if path.endswith('.png'))
  os.unlink(tmp_path / path)
  made = fresh(8)
  real, drawn = made.draw, []
  made.draw = lambda *args: (drawn.append(set(args[1])), real(*args))[1]
  drawing.draw('geneval', made, benchmark, str(tmp_path), 1, team)
  [words] = drawn
  assert words == {subject.word('geneval', path.split('/')[0])}
  after = contents(tmp_path)
  assert {p: after[p] for p in before if p != path} == {p: before[p] for p in before if p != path}
  assert path in after


def test_an_answer_is_not_given_twice_by_another_machine(tables, tmp_path, monkeypatch):
  """One that has room for more answers, and asks more questions about a picture at once."""
  benchmark = registry.open_asking('pope', '', str(tables / 'POPE.tsv'), any_version=True)
  team = evaluate.distributed.Team()
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(asking, 'QUESTIONS', 1)
    asking.ask('pope', stopped_at_its_third(fresh(2), 'answer'), benchmark, str(tmp_path), 0, team)
  [kept] = pieces(tmp_path / 'answers')
  assert len(kept) == 2
  asking.ask('pope', fresh(16), benchmark, str(tmp_path), 0, team)
  asking.ask('pope', fresh(16), benchmark, str(tmp_path / 'whole'), 0, team)
  assert sum(map(len, pieces(tmp_path / 'answers'))) == 6
  assert asking.answers_of(str(tmp_path)) == asking.answers_of(str(tmp_path / 'whole'))


def test_a_model_of_no_numbers_is_refused(tables, tmp_path):
  broken = fresh(8)
  broken.model.params = jax.tree.map(lambda x: x * np.nan, broken.model.params)
  pope = registry.open_asking('pope', '', str(tables / 'POPE.tsv'), any_version=True)
  team = evaluate.distributed.Team()
  for begin in (
    lambda: drawing.draw(
      'geneval', broken, registry.open_drawing('geneval'), str(tmp_path / 'drawn'), 1, team
    ),
    lambda: asking.ask('pope', broken, pope, str(tmp_path / 'asked'), 0, team),
  ):
    with pytest.raises(InputError, match='log-probabilities or images of the model contain NaN'):
      begin()
  assert not [path for path in contents(tmp_path) if path.endswith('.png') or 'answers' in path]


def test_an_answer_that_does_not_end_is_asked_again_with_more_room(tables, tmp_path):
  benchmark = registry.open_asking('pope', '', str(tables / 'POPE.tsv'), any_version=True)
  team = evaluate.distributed.Team()
  long, short = fresh(16, max_tokens=40), fresh(16, max_tokens=3)
  asking.ask('pope', long, benchmark, str(tmp_path / 'long'), 0, team)
  asking.ask('pope', short, benchmark, str(tmp_path / 'short'), 0, team)
  rooms = {name[:5] for name in os.listdir(tmp_path / 'long' / 'answers')}
  assert '00016' in rooms
  records = asking.records_of(str(tmp_path / 'long'))
  assert len(records) == 6
  for identity, record in asking.records_of(str(tmp_path / 'short')).items():
    assert records[identity]['answer'].startswith(record['answer'])
    assert len(record['answer'].split()) <= 3


# Bad input.


def damaged(tables, folder, change):
  """A copy of the tables in which POPE's text is changed."""
  folder.mkdir()
  for path in tables.iterdir():
    (folder / path.name).write_bytes(path.read_bytes())
  (folder / 'POPE.tsv').write_text(change((folder / 'POPE.tsv').read_text()))
  return folder


@pytest.mark.parametrize(
  'change, changes, said',
  [
    (lambda text: text, {'any_version': False}, 'has md5 .* instead of c12f5acb'),
    (lambda text: text.replace('answer', 'reply', 1), {}, 'POPE.tsv has no column answer'),
    (
      lambda text: text.replace('\t0\t', '\t9\t', 1),
      {},
      'row 1 .* takes its image from row 9, which has none',
    ),
    (lambda text: text.replace('iVBOR', 'i!BOR', 1), {}, 'the image in row 0 .* has broken base64'),
    (
      lambda text: text,
      {'benchmarks': 'geneval', 'evaluator.clip': True},
      '--evaluator.clip=.* holds a none',
    ),
  ],
)
def test_bad_input_is_one_sentence(change, changes, said, work, tables, tmp_path):
  asked = flags(damaged(tables, tmp_path / 'data', change), tmp_path / 'out', benchmarks='pope')
  if 'evaluator.clip' in changes:
    (tmp_path / 'data' / 'config.json').write_text('{}')
    changes = {**changes, 'evaluator.clip': tmp_path / 'data'}
  with pytest.raises(InputError, match=said) as e:
    run(evaluate, **{**asked, **changes})
  assert '\n' not in str(e.value)
  assert not (tmp_path / 'out').exists() or 'base64' in said


def test_a_limit_takes_the_same_of_each_category_and_keeps_groups_whole(tables):
  mmbench = registry.open_asking(
    'mmbench', '', str(tables / 'MMBench_DEV_EN.tsv'), any_version=True
  )
  [one, other] = asking.questions_of(mmbench, 1)
  assert one.group == other.group and int(other.id) == int(one.id) + 1_000_000
  prompts = drawing.prompts_of(registry.open_drawing('geneval'), 3)
  assert len(prompts) == 18 and len({p.group for p in prompts}) == 6
  assert prompts == sorted(prompts, key=lambda p: p.number)
  assert folders.short_name('runs/a b@20') == 'a-b@20'
