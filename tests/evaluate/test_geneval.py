"""GenEval's rules against the official scorer's answers, and by hand, one row a rule."""

import json

from golden import content, lines
import numpy as np
import pytest

from dsr_jax.errors import InputError
from dsr_jax.evaluate import geneval, protocol
from dsr_jax.evaluate.geneval import Detection, Settings


def boxes(rows):
  return {name: [Detection.of(row) for row in found] for name, found in rows.items()}


def verdict_of(case):
  """A golden case's verdict; the classifier is a table from the kept boxes to their colors."""
  colors = {
    (name, *np.asarray(row, np.float32).tolist()): color
    for name, rows in case['detections'].items()
    for row, color in zip(rows, case['colors'].get(name, []))
  }

  def classify(objects, name):
    return [colors[(name, *map(float, d.box), float(d.score))] for d in objects]

  found = boxes(case.get('raw_detections', case['detections']))
  settings = Settings(**case.get('options', {}))
  return geneval.judge(case['metadata'], found, classify, settings)


def unordered(reason):
  """Lines as sets of words: the original names two relations in any order."""
  return [set(line.split()) for line in reason.split('\n')]


def test_all_cases_of_the_official_scorer():
  cases = lines('geneval.jsonl')
  assert len(cases) == 486
  for case in cases:
    verdict = verdict_of(case)
    assert verdict.correct == case['correct'], case['id']
    assert unordered(verdict.reason) == unordered(case['reason']), case['id']
    kept = {
      name: [[*d.box.tolist(), float(d.score)] for d in found]
      for name, found in verdict.kept.items()
    }
    wanted = {n: np.asarray(rows, np.float32).tolist() for n, rows in case['detections'].items()}
    assert kept == wanted, case['id']


def test_all_cases_of_the_official_functions():
  cases = lines('geneval_functions.jsonl')
  assert len(cases) == 120
  for case in cases:
    if case['function'] == 'iou_plus_one':
      assert geneval.iou(case['a'], case['b']) == pytest.approx(case['result'], abs=1e-12)
    else:
      assert sorted(geneval.relative_position(case['a'], case['b'])) == case['result']


def test_the_summary_prints_what_the_official_one_does():
  case = content('geneval_summary.json')
  found, wanted = geneval.summary(case['rows']), case['expected']
  assert f'{found["images"]:.2%}' == wanted['correct_images']
  assert f'{found["prompts"]:.2%}' == wanted['correct_prompts']
  assert f'{found["overall"]:.5f}' == wanted['overall']
  assert {tag: f'{x:.2%}' for tag, x in found['tasks'].items()} == {
    tag: task['percent'] for tag, task in wanted['tasks'].items()
  }
  assert found['counts'] == {
    tag: (task['correct'], task['total']) for tag, task in wanted['tasks'].items()
  }


def two(tag, second, first=None):
  include = [first or {'class': 'dog', 'count': 1}, second]
  return {'tag': tag, 'prompt': '', 'include': include}


def at(x, y, size=100, score=0.95):
  return [x - size / 2, y - size / 2, x + size / 2, y + size / 2, score]


def left_of(dog=None):
  return two('position', {'class': 'cat', 'count': 1, 'position': ['left of', 0]}, dog)


def counting(n):
  return {
    'tag': 'counting',
    'prompt': '',
    'include': [{'class': 'dog', 'count': n}],
    'exclude': [{'class': 'dog', 'count': n + 1}],
  }


RED_DOGS = {'tag': 'colors', 'include': [{'class': 'dog', 'count': 2, 'color': 'red'}]}
SCORES = [0.99, 0.98, 0.97, 0.96]
ONE_DOG = {'tag': 'single_object', 'include': [{'class': 'dog', 'count': 1}]}
MANY = [at(50 * i, 50, score=0.95 - i / 1000) for i in range(20)]
HIGH = [at(200 * i, 50, score=s) for i, s in enumerate(SCORES)]

# rule, metadata, detections, colors of the objects that are looked at, verdict
RULES = [
  ('a detection above .3 counts', ONE_DOG, {'dog': [at(0, 0, score=0.301)]}, None, True),
  ('one of exactly float32(.3) does not', ONE_DOG, {'dog': [at(0, 0, score=0.3)]}, None, False),
  ('other classes do no harm', ONE_DOG, {'dog': HIGH[:1], 'cat': HIGH}, None, True),
  ('more than asked for do no harm', ONE_DOG, {'dog': HIGH}, None, True),
  ('counting wants .9', counting(2), {'dog': [*HIGH[:2], at(0, 0, score=0.89)]}, None, True),
  ('exactly float32(.9) is too little', counting(1), {'dog': [at(0, 0, score=0.9)]}, None, False),
  ('exclude: one too many', counting(2), {'dog': HIGH[:3]}, None, False),
  ('too few', counting(3), {'dog': HIGH[:2]}, None, False),
  ('at most 16: 17 are never found', counting(17), {'dog': MANY}, None, False),
  ('at most 16: exclude 17 never fires', counting(16), {'dog': MANY}, None, True),
  ('colors of the first count', RED_DOGS, {'dog': HIGH[:3]}, ['red', 'red'], True),
  ('not of later ones', RED_DOGS, {'dog': HIGH[:3]}, ['red', 'blue'], False),
  ('left of, beyond both margins', left_of(), {'dog': [at(300, 0)], 'cat': [at(0, 0)]}, None, True),
  ('margin: 20 of 100 + 100', left_of(), {'dog': [at(20, 0)], 'cat': [at(0, 0)]}, None, False),
  # offset 45 -> 25 beyond the margin: 25/45 > .5; offset 39 -> 19: 19/39 < .5
  ('more than half is left', left_of(), {'dog': [at(45, 0)], 'cat': [at(0, 0)]}, None, True),
  ('less than half is left', left_of(), {'dog': [at(39, 0)], 'cat': [at(0, 0)]}, None, False),
  ('the other side', left_of(), {'dog': [at(0, 0)], 'cat': [at(300, 0)]}, None, False),
  ('best boxes alone', left_of(), {'dog': [at(300, 0)], 'cat': [at(0, 0), at(900, 0, score=0.5)]},
   None, True),
  ('of equal scores the later one', left_of(), {'dog': [at(300, 0)], 'cat': [at(900, 0), at(0, 0)]},
   None, True),
  ('a failed target fails', left_of({'class': 'dog', 'count': 2}),
   {'dog': [at(300, 0)], 'cat': [at(0, 0)]}, None, False),
]  # fmt: skip


@pytest.mark.parametrize(
  'metadata, found, colors, right', [r[1:] for r in RULES], ids=[r[0] for r in RULES]
)
def test_rules(metadata, found, colors, right):
  def classify(objects, name):
    assert colors is not None, 'colors are asked for only where a clause names one'
    assert len(objects) == len(colors)
    return colors

  assert geneval.judge(metadata, boxes(found), classify).correct == right


def test_the_prompts_are_the_553_and_their_folders_the_official_ones(tmp_path):
  benchmark = geneval.GenEval()
  assert isinstance(benchmark, protocol.Drawing)
  prompts = benchmark.prompts()
  sizes = {task: sum(p.group == task for p in prompts) for task in geneval.TASKS}
  assert sizes == dict(zip(geneval.TASKS, (80, 99, 80, 94, 100, 100)))
  assert len(geneval.object_names()) == 80
  named = {c['class'] for row in geneval.metadata() for c in row['include']}
  assert named <= set(geneval.object_names())
  assert benchmark.picture_path(prompts[7], 3) == '00007/samples/0003.png'
  for path, text in benchmark.side_files().items():
    (tmp_path / path).parent.mkdir()
    (tmp_path / path).write_text(text)
  for sample in range(2):
    path = tmp_path / benchmark.picture_path(prompts[7], sample)
    path.parent.mkdir(exist_ok=True)
    path.touch()
  for prompt in prompts:
    (tmp_path / prompt.id / 'samples').mkdir(exist_ok=True)
  found = geneval.find_pictures(str(tmp_path))
  assert [path for path, _ in found] == ['00007/samples/0000.png', '00007/samples/0001.png']
  assert found[0][1]['prompt'] == prompts[7].text


def test_scores_are_the_summary_of_the_same_rows():
  benchmark = geneval.GenEval()
  rng = np.random.default_rng(0)
  records, rows = {}, []
  for prompt in benchmark.prompts()[::7]:
    for sample in range(4):
      verdict = geneval.Verdict(bool(rng.random() < 0.6), '', {})
      path = benchmark.picture_path(prompt, sample)
      row = geneval.result_row(path, geneval.metadata()[prompt.number], verdict)
      assert json.loads(row['metadata'])['prompt'] == row['prompt'] == prompt.text
      records[path] = row
      rows.append(row)
  scores = benchmark.score(records)
  total = scores.sums.sum(axis=0)[None]
  wanted = geneval.summary(rows)
  found = {name: float(f(total)[0]) for name, f in scores.statistics.items()}
  assert found.pop('overall') == pytest.approx(wanted['overall'])
  assert found.pop('any sample') == pytest.approx(wanted['prompts'])
  assert found == pytest.approx(wanted['tasks'])


def test_a_picture_of_another_benchmark_is_refused():
  with pytest.raises(InputError, match='x_000000.png is not in a folder 00000 to 00552'):
    geneval.GenEval().score({'color/samples/x_000000.png': {'correct': True}})
  with pytest.raises(InputError, match='there is nothing to score'):
    geneval.GenEval().score({})
