"""Tables of questions: read as VLMEvalKit reads them, refused where they are broken, answered,
scored, and written as its prediction files.
"""

import base64
import csv
import http.server
import io
import json
import threading
import tracemalloc

import openpyxl
from PIL import Image
import pytest

from dsr_jax.errors import InputError
from dsr_jax.evaluate import protocol
from dsr_jax.evaluate.vlmeval import (
  choice,
  hallusionbench,
  judge,
  llavabench,
  pope,
  predictions,
  prompts,
  tsv,
)


def picture(color, size=(6, 4), mode='RGB'):
  """A PNG in base64."""
  out = io.BytesIO()
  Image.new(mode, size, color).save(out, 'PNG')
  return base64.b64encode(out.getvalue()).decode()


RED, BLUE = picture('red'), picture('blue')


def write(path, columns, rows):
  with open(path, 'w', encoding='utf-8', newline='') as f:
    csv.writer(f, delimiter='\t').writerows([columns, *rows])
  return str(path)


def test_rotations_are_known_by_numbers(tmp_path):
  columns = ['index', 'question', 'image', 'answer', 'A', 'B']
  path = write(tmp_path / 'x.tsv', columns, [['x7', 'Which?', RED, 'A', 'one', 'two']])
  with pytest.raises(InputError, match='has the index x7, which must be a number'):
    choice.MMBench(path)


def test_rules_of_the_judge_that_are_not_there(tmp_path):
  with pytest.raises(InputError, match="none.json does not exist; .* LLaVA's rule.json"):
    llavabench.read_rules(str(tmp_path / 'none.json'))


@pytest.fixture
def pope_table(tmp_path):
  columns = ['index', 'question', 'image', 'answer', 'category']
  tail = ' Please answer yes or no.'
  return write(
    tmp_path / 'POPE.tsv',
    columns,
    [
      [0, 'Is there a dog?' + tail, RED, 'Yes', 'random,popular'],
      [1, 'Is there a "cat"?\nReally?' + tail, 0, 'No', 'adversarial'],
      [2, 'Is there a cow?' + tail, BLUE, 'No', 'random'],
      [3, 'No picture?', '', 'No', 'random'],
    ],
  )


def test_rows_pictures_and_questions(pope_table):
  benchmark = pope.Pope(pope_table)
  assert isinstance(benchmark, protocol.Asking)
  first, second, third = benchmark.questions()  # the row without a picture is left out
  assert first.text == '\nIs there a dog?\nAnswer the question using a single word or phrase.'
  assert second.text.startswith('\nIs there a "cat"?\nReally?\n')
  assert first.pictures == second.pictures != third.pictures
  assert benchmark.picture(second.pictures[0]).getpixel((0, 0)) == (255, 0, 0)
  assert benchmark.picture(third.pictures[0]).size == (6, 4)
  assert [q.id for q in benchmark.questions()] == ['0', '1', '2']


def test_cells_that_pandas_takes_for_missing_are_missing(tmp_path):
  path = write(
    tmp_path / 't.tsv',
    ['index', 'question', 'image', 'answer', 'hint', 'A', 'B', 'C', 'D', 'split'],
    [[7, 'Which?', RED, 'B', 'NA', 'None', '10.0', 'no', '', 'dev']],
  )
  row = choice.MMBench(path).table.rows[0]
  assert tsv.options(row) == {'B': '10.0', 'C': 'no'}
  assert row['hint'] is None


def test_prompts_of_choices():
  row = {'question': 'Which?', 'hint': None, 'A': 'x', 'B': 'y', 'C': None}
  asked = "\nWhich?\nA. x\nB. y\n\nAnswer with the option's letter from the given choices directly."
  assert prompts.multiple_choice(row) == asked
  hinted = prompts.multiple_choice({**row, 'hint': 'Look.'})
  assert hinted == f'\nHint: Look.{asked}'
  # The turn is stripped as a whole, so nothing trails.
  opened = prompts.multiple_choice({'question': 'What is <image 1>?', 'A': None})
  assert opened == '\nWhat is <image 1>?\nAnswer the question directly.'
  assert prompts.bare({'question': 'Why? '}) == 'Why?'


def test_several_pictures_a_row_and_pictures_in_files(tmp_path):
  Image.new('RGBA', (3, 3), (0, 255, 0, 128)).save(tmp_path / 'a.png')
  columns = ['index', 'question', 'image', 'answer', 'A', 'B', 'split']
  cell = str([RED, picture((1, 2, 3, 0), mode='RGBA')])
  path = write(tmp_path / 'm.tsv', columns, [['v_1', 'Both?', cell, 'A', 'x', 'y', 'validation']])
  benchmark = choice.MMMU(path)
  keys = benchmark.questions()[0].pictures
  assert [benchmark.picture(key).getpixel((0, 0)) for key in keys] == [(255, 0, 0), (1, 2, 3)]
  columns[2] = 'image_path'
  path = write(tmp_path / 'p.tsv', columns, [['v_1', 'One?', 'a.png', 'A', 'x', 'y', 'dev']])
  benchmark = choice.MMMU(path)
  assert benchmark.picture(benchmark.questions()[0].pictures[0]).getpixel((0, 0)) == (0, 255, 0)
  (tmp_path / 'inner').mkdir()
  path = write(tmp_path / 'inner/p.tsv', columns, [['v', 'Q?', '../a.png', 'A', 'x', 'y', 'dev']])
  benchmark = choice.MMMU(path)
  with pytest.raises(InputError, match='is outside .*, the folder of the table'):
    benchmark.picture(benchmark.questions()[0].pictures[0])


def test_memory_does_not_grow_with_the_pictures(tmp_path):
  """A table of 40 MB is read, and one picture of it, in a few."""
  path = tmp_path / 'big.tsv'
  big = base64.b64encode(bytes(1_000_000)).decode()
  with open(path, 'w') as f:
    f.write('index\tquestion\timage\tanswer\tcategory\n')
    for i in range(30):
      f.write(f'{i}\tIs it?\t{big}\tYes\trandom\n')
    f.write(f'30\tIs it?\t{RED}\tYes\trandom\n')
  tracemalloc.start()
  benchmark = pope.Pope(str(path))
  assert benchmark.picture(protocol.PictureKey('30')).size == (6, 4)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert len(benchmark.table) == 31
  assert peak < 15e6


GOOD = ['index', 'question', 'image', 'answer', 'category']
# what is wrong, columns, rows, sentence
BROKEN = [
  ('no column', GOOD[:3], [[0, 'q', RED]], 'has no column answer, category'),
  ('no pictures', [*GOOD[:2], 'x', *GOOD[3:]], [[0, 'q', RED, 'Yes', 'random']],
   'has no column image or image_path'),
  ('a row too short', GOOD, [[0, 'q', RED, 'Yes']], 'line 2 of .* has 4 cells instead of 5'),
  ('an index twice', GOOD, [[0, 'q', RED, 'Yes', 'r'], [0, 'q', RED, 'Yes', 'r']],
   'line 3 of .* has the index 0 of an earlier row'),
  ('no index', GOOD, [['', 'q', RED, 'Yes', 'r']], 'line 2 of .* has no index'),
  ('a picture that is not there', GOOD, [[0, 'q', 5, 'Yes', 'r']],
   r'row 0 \(line 2\) of .* takes its image from row 5, which has none'),
  ('a pointer to a pointer', GOOD,
   [[0, 'q', RED, 'Yes', 'r'], [1, 'q', 0, 'Yes', 'r'], [2, 'q', 1, 'Yes', 'r']],
   'takes its image from row 1, which has none'),
  ('nothing', GOOD, [], 'has no question with an image'),
]  # fmt: skip


@pytest.mark.parametrize('columns, rows, says', [r[1:] for r in BROKEN], ids=[r[0] for r in BROKEN])
def test_broken_tables_are_refused(tmp_path, columns, rows, says):
  with pytest.raises(InputError, match=says):
    pope.Pope(write(tmp_path / 't.tsv', columns, rows))


# picture cell, sentence
PICTURES = [
  ('=' + RED, 'the image in row 0 .* has broken base64'),
  ('A' * 80, 'cannot decode the image'),
]


@pytest.mark.parametrize('cell, says', PICTURES)
def test_broken_pictures_are_refused(tmp_path, cell, says):
  benchmark = pope.Pope(write(tmp_path / 't.tsv', GOOD, [[0, 'q', cell, 'Yes', 'random']]))
  with pytest.raises(InputError, match=says):
    benchmark.picture(benchmark.questions()[0].pictures[0])


def test_another_version_of_a_table_is_refused(tmp_path, pope_table):
  with pytest.raises(InputError, match='instead of c12f5acb142f2ef1f85a26ba2fbe41d5'):
    tsv.locate('pope', pope_table, str(tmp_path))
  assert tsv.locate('pope', str(tmp_path), 'x', any_version=True) == pope_table
  with pytest.raises(InputError, match='none.tsv, the table POPE.tsv, does not exist'):
    tsv.locate('pope', str(tmp_path / 'none.tsv'), 'x')


def test_not_utf8(tmp_path):
  (tmp_path / 't.tsv').write_bytes(b'index\tquestion\timage\n0\t\xff\t1\n')
  with pytest.raises(InputError, match='should be a TSV file in UTF-8'):
    tsv.Table(str(tmp_path / 't.tsv'))


ANSWERS = {'0': 'Yes, I think', '1': '=1+1', '2': 'no \x07bell'}


def test_prediction_files(pope_table, tmp_path):
  """What VLMEvalKit reads: all but the pictures, and the prediction; the same bytes twice."""
  benchmark = pope.Pope(pope_table)
  path = benchmark.write_predictions(ANSWERS, str(tmp_path), 'mine')
  assert path == str(tmp_path / 'mine_POPE.xlsx')
  first = open(path, 'rb').read()
  benchmark.write_predictions(ANSWERS, str(tmp_path), 'mine')
  assert open(path, 'rb').read() == first
  rows = list(openpyxl.load_workbook(path, data_only=True).active.values)
  assert rows[0] == ('index', 'question', 'answer', 'category', 'prediction')
  assert [row[0] for row in rows[1:]] == [0, 1, 2]
  assert [row[-1] for row in rows[1:]] == ['Yes, I think', '=1+1', 'no bell']
  path = benchmark.write_predictions(ANSWERS, str(tmp_path), 'mine', form='tsv')
  with open(path, encoding='utf-8', newline='') as f:
    rows = list(csv.reader(f, delimiter='\t'))
  assert rows[2][1].startswith('Is there a "cat"?\nReally?') and rows[2][-1] == '=1+1'
  with pytest.raises(InputError, match="unknown format 'json'"):
    predictions.path_of('x', 'mine', 'POPE', 'json')


def values(scores):
  total = scores.sums.sum(axis=0)[None]
  return {name: float(f(total)[0]) for name, f in scores.statistics.items()}


def test_pope_scores_equal_the_rating(pope_table):
  benchmark = pope.Pope(pope_table)
  scores = benchmark.score(ANSWERS)
  rows = [
    {'category': 'random,popular', 'answer': 'Yes', 'extracted': 'Yes'},
    {'category': 'adversarial', 'answer': 'No', 'extracted': 'Unknown'},
    {'category': 'random', 'answer': 'No', 'extracted': 'No'},
  ]
  table, found = pope.rating(rows), values(scores)
  assert 100 * found['F1'] == pytest.approx(table['Overall']['Overall'])
  assert 100 * found['accuracy'] == pytest.approx(table['Overall']['acc'])
  assert 100 * found['F1 random'] == pytest.approx(table['random']['Overall'])
  # By POPE's own scorer `=1+1` says yes.
  assert found["POPE's own accuracy adversarial"] == 0
  assert scores.clusters == ('0', '2')
  assert scores.counts['unknown'] == 1
  with pytest.raises(InputError, match='an answer to question 9, which is not in'):
    benchmark.score({'9': 'Yes'})


def test_hallusionbench_scores_equal_the_rating(tmp_path):
  columns = ['index', 'question', 'image', 'answer', 'category', 'l2-category']
  rows = [
    [f'VD_chart_1_{s}_{f}_{q}', 'Is it?', RED, 'Yes', 'VD', 'chart']
    for s in range(3)
    for f in range(2)
    for q in range(2)
  ]
  benchmark = hallusionbench.HallusionBench(write(tmp_path / 't.tsv', columns, rows))
  answers = {row[0]: 'yes' if i % 5 else 'no' for i, row in enumerate(rows)}
  rated = [
    {'index': row[0], 'category': 'VD', 'l2-category': 'chart', 'score': answers[row[0]] == 'yes'}
    for row in rows
  ]
  table = hallusionbench.rating(rated)['Overall']
  found = values(benchmark.score(answers))
  assert 100 * found.pop('mean') == pytest.approx(sum(table.values()) / 3)
  assert {name: 100 * x for name, x in found.items()} == pytest.approx(table)
  assert benchmark.questions()[0].group == benchmark.questions()[3].group


def test_choices_score_by_their_own_rules(tmp_path):
  columns = ['index', 'question', 'image', 'answer', 'A', 'B', 'split']
  rows = [
    [1, 'q1', RED, 'A', 'x1', 'y1', 'dev'],
    [1_000_001, 'q1', 1, 'B', 'y1', 'x1', 'dev'],
    [2, 'q2', BLUE, 'A', 'x2', 'y2', 'dev'],
    [1_000_002, 'q2', 2, 'B', 'y2', 'x2', 'dev'],
  ]
  path = write(tmp_path / 't.tsv', columns, rows)
  answers = {'1': 'A', '1000001': 'B', '2': 'A', '1000002': 'A'}
  assert values(choice.MMBench(path).score(answers)) == {'accuracy': 0.5}
  assert values(choice.SEEDBench(path).score(answers)) == {'accuracy': 0.75}
  scores = choice.SEEDBench(path).score(answers)
  assert scores.clusters == ('1', '2')
  rows = [
    [1, 'q1', RED, '42', '', '', 'validation'],
    [2, 'q2', RED, 'A', 'x', 'y', 'validation'],
    [3, 'q3', RED, 'B', 'x', 'y', 'dev'],
  ]
  benchmark = choice.MMMU(write(tmp_path / 'u.tsv', columns, rows))
  found = values(benchmark.score({'1': 'It is 42', '2': 'B', '3': 'B'}))
  assert found == {'accuracy': 0.5, 'accuracy dev': 1.0}


@pytest.fixture
def llava(tmp_path):
  columns = ['index', 'question', 'image', 'caption', 'gpt4_ans', 'category']
  rows = [
    [i, f'q{i}', RED if i < 2 else BLUE, 'A dog.', 'It is a dog.', category]
    for i, category in enumerate(llavabench.CATEGORIES)
  ]
  path = write(tmp_path / 'LLaVABench.tsv', columns, rows)
  rules = tmp_path / 'rule.json'
  rule = {'role': 'Assistant', 'prompt': 'Rate both.'}
  rules.write_text(json.dumps({f'llava_bench_{name}': rule for name in llavabench.CATEGORIES}))
  return path, llavabench.read_rules(str(rules))


SAID = {'0': 'one', '1': 'two', '2': 'three'}


def test_llavabench_asks_the_judge_and_keeps_failures_in_the_means(llava, tmp_path):
  path, rules = llava
  asked = []

  def stub(request):
    asked.append(request)
    if request.id == '2':
      raise judge.JudgeFailed('no')
    return {'0': '8 6\nfine', '1': 'nonsense'}[request.id]

  cache = str(tmp_path / 'judged.jsonl')
  benchmark = llavabench.LLaVABench(path, rules, stub, cache)
  scores = benchmark.score(SAID)
  assert asked[0].text == (
    '[Context]\nA dog.\n\n[Question]\nq0\n\n[Assistant 1]\nIt is a dog.\n\n[End of Assistant 1]\n\n'
    '[Assistant 2]\none\n\n[End of Assistant 2]\n\n[System]\nRate both.\n\n'
  )
  assert values(scores)['relative score'] == pytest.approx((6 - 1 - 1) / (8 - 1 - 1))
  assert (scores.counts['failed'], scores.counts['unreadable']) == (1, 1)
  benchmark.score(SAID)
  assert [request.id for request in asked] == ['0', '1', '2', '2']  # what failed is asked again
  # A line that a kill cut short does no harm.
  with open(cache, 'ab') as f:
    f.write(b'{"key": "ab')
  llavabench.LLaVABench(path, rules, stub, cache).score(SAID)
  assert [request.id for request in asked][4:] == ['2']


def test_llavabench_without_a_judge_gives_the_file_to_judge(llava, tmp_path):
  path, rules = llava
  benchmark = llavabench.LLaVABench(path, rules)
  with pytest.raises(InputError, match='LLaVABench needs a judge'):
    benchmark.score(SAID)
  with pytest.raises(InputError, match='--judge_rules is missing'):
    llavabench.LLaVABench(path).requests(SAID)
  written = benchmark.write_requests(SAID, str(tmp_path / 'to_judge.jsonl'))
  lines = [json.loads(line) for line in open(written)]
  reviewed = tmp_path / 'reviewed.jsonl'
  reviewed.write_text('\n'.join(json.dumps({**line, 'review': '10 5'}) for line in lines))
  scores = llavabench.LLaVABench(path, rules, judge.Reviewed(str(reviewed))).score(SAID)
  assert values(scores)['relative score'] == 0.5
  reviewed.write_text('{"id": 1}\n')
  with pytest.raises(InputError, match='line 1 of .* has no id or no review'):
    judge.Reviewed(str(reviewed))


class Server(http.server.BaseHTTPRequestHandler):
  """Answers the codes and bodies of its class in turn."""

  script = []
  seen = []

  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
    self.seen.append((self.path, self.headers.get('Authorization'), body))
    code, text = self.script.pop(0)
    self.send_response(code)
    self.end_headers()
    self.wfile.write(text.encode())

  def log_message(self, *arguments):
    pass


@pytest.fixture
def server():
  Server.script, Server.seen = [], []
  running = http.server.HTTPServer(('127.0.0.1', 0), Server)
  threading.Thread(target=running.serve_forever, daemon=True).start()
  yield f'http://127.0.0.1:{running.server_port}/v1/'
  running.shutdown()
  running.server_close()


REQUEST = judge.Request('1', 'be fair', 'judge this')
REVIEW = json.dumps({'choices': [{'message': {'content': '8 7'}}]})


def test_an_address_is_asked_with_the_key_and_again_after_errors(server, monkeypatch):
  monkeypatch.setenv(judge.KEY_VARIABLE, 'secret')
  Server.script = [(500, ''), (429, ''), (200, 'no json'), (200, '{}'), (200, REVIEW)]
  assert judge.OpenAIJudge(server, 'gpt', wait=0)(REQUEST) == '8 7'
  path, key, body = Server.seen[-1]
  assert (path, key) == ('/v1/chat/completions', 'Bearer secret')
  assert body['model'] == 'gpt' and body['temperature'] == 0.2
  assert [m['content'] for m in body['messages']] == ['be fair', 'judge this']


def test_a_judge_that_never_answers_fails(server, monkeypatch):
  monkeypatch.delenv(judge.KEY_VARIABLE, raising=False)
  Server.script = [(500, '')] * 3
  with pytest.raises(judge.JudgeFailed, match='HTTP 500'):
    judge.OpenAIJudge(server, 'gpt', attempts=3, wait=0)(REQUEST)
  Server.script = [(401, '')]
  with pytest.raises(judge.JudgeFailed, match='HTTP 401'):  # no use in asking again
    judge.OpenAIJudge(server, 'gpt', wait=0)(REQUEST)
  assert len(Server.seen) == 4 and Server.seen[-1][1] is None
  with pytest.raises(judge.JudgeFailed):
    judge.OpenAIJudge('http://127.0.0.1:9', 'gpt', attempts=2, wait=0)(REQUEST)
  with pytest.raises(InputError, match='--judge_url=ftp://x is not a URL'):
    judge.OpenAIJudge('ftp://x', 'gpt')


def test_requests_are_under_way_together_and_replies_keep_their_order(tmp_path):
  together = threading.Barrier(3, timeout=30)

  class Slow:
    at_once, model = 3, 'slow'

    def __call__(self, request):
      together.wait()
      if request.id == '1':
        raise judge.JudgeFailed('no')
      return f'{request.id} 5'

  requests = [judge.Request(str(i), 'be fair', f'judge {i}') for i in range(6)]
  cache = tmp_path / 'cache.jsonl'
  replies = judge.ask_all(requests, Slow(), str(cache))
  assert list(replies) == [r.id for r in requests]
  assert [r.review for r in replies.values()] == ['0 5', '', '2 5', '3 5', '4 5', '5 5']
  assert [json.loads(line)['id'] for line in open(cache)] == list('02345')
