"""The page to click on: what its buttons show, and what they refuse."""

import contextlib
import dataclasses
import html.parser
import io
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
import urllib.request

from browsers import BROWSER
import numpy as np
from PIL import Image
from places import ROOT
import pytest
from run_command import run

from dsr_jax import api, rows
from dsr_jax import demo as demo_package
from dsr_jax.convert import locate
from dsr_jax.demo import __main__ as command
from dsr_jax.demo import views as views_lib
from dsr_jax.errors import InputError
from dsr_jax.inference import Inference

EVIL = '<script>alert(1)</script>{{7*7}}'
MORE_EVIL = '<script>alert(1)</script><img src=x onerror=alert(2)> {{7*7}} ${7*7} "\'`'
PROMPT = 'a red circle left of a blue square'


class Tags(html.parser.HTMLParser):
  """Tags, attributes and words of what is shown; every tag that opens must close."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.attributes, self.words, self._open = [], [], '', []
    self.feed(text)
    assert not self._open

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag not in ('img', 'br'):
      self._open.append(tag)

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_data(self, data):
    self.words += data


@pytest.fixture(scope='module')
def model(hf_directory):
  source = locate.resolve(str(hf_directory))
  method = dataclasses.replace(source.method, max_text_tokens=12)  # a random model finds no end
  return api.Model(Inference(dataclasses.replace(source, method=method)))


@pytest.fixture(scope='module')
def views(model):
  return views_lib.Views(model, None, '', 4)


@pytest.fixture(scope='module')
def shown(views):
  return Tags(views.draw(PROMPT, 3))


# Draw.


def test_candidates_are_shown_best_first_with_both_rewards(model, shown):
  drawn = model.generate(PROMPT, num_samples=4, seed=3)
  words = ' '.join(shown.words.split())
  places = [words.index(f'R_G {d.reward_generation:.3f}') for d in drawn]
  assert places == sorted(places)
  for d in drawn:
    assert f'R_U {d.reward_understanding:.3f}' in words
  assert all(s.startswith('data:image/png;base64,') for k, s in shown.attributes if k == 'src')
  assert all(alt for k, alt in shown.attributes if k == 'alt')


def test_the_best_of_n_is_the_best_of_the_first_n(model, shown):
  drawn = sorted(model.generate(PROMPT, num_samples=4, seed=3), key=lambda d: d.candidate)
  words = ' '.join(shown.words.split())
  for n in (1, 2, 4):
    best = max(d.reward_generation for d in drawn[:n])
    assert f'best of {n}R_G {best:.3f}' in words.replace('best of ', 'best of ').replace(
      ' R_G', 'R_G'
    )
  assert 'best of 8' not in words


def test_every_word_has_a_heat(model, shown):
  drawn = model.generate(PROMPT, num_samples=4, seed=3)
  for word in model.explain(PROMPT, drawn[0]).words:
    assert views_lib.html.signed(word.value, 1) in shown.words and word.text in shown.words


def test_two_models_are_compared_on_the_same_seeds_by_the_first(model):
  views = views_lib.Views(model, model, '', 2)
  words = Tags(views.draw(PROMPT)).words
  assert 'Before and after' in words and 'mean R_G ±0.000' in words
  drawn = model.generate(PROMPT, num_samples=2)
  for d in drawn:
    by_the_first = model.score(PROMPT, d.image).reward_generation
    assert words.count(f'R_G {by_the_first:.3f}') >= 2


# Describe.


def test_texts_are_shown_best_first_with_their_rewards(model, views, tmp_path):
  path = tmp_path / 'x.png'
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)).save(path)
  texts = model.describe(path, num_samples=4, question='Is there a red disc?', seed=1)
  words = Tags(views.describe(str(path), 'Is there a red disc?', 1)).words
  places = [
    words.index(f'R_U {t.reward_understanding:.3f}')
    for t in texts
    if t.reward_understanding is not None
  ]
  assert places and places == sorted(places)


def test_a_text_that_came_several_times_is_shown_once():
  def text(words, candidate, reward):
    return api.Description(words, candidate, reward, reward, True, [1], np.zeros(2))

  found = [text('no', 2, -1.0), text('no', 0, -1.0), text('yes', 1, -2.0), text('', 3, None)]
  assert views_lib._texts_of(found) == [
    ('no', 'R_U -1.000, R_G -1.000, 2 times'),
    ('yes', 'R_U -2.000, R_G -2.000'),
    ('(empty)', 'no reward'),
  ]


def test_a_text_that_cannot_be_read_back_is_shown_without_a_heat(views, tmp_path, monkeypatch):
  path = tmp_path / 'x.png'
  Image.new('RGB', (9, 9), 'red').save(path)

  def refuse(*args):
    raise InputError('found a text of 448 tokens')

  monkeypatch.setattr(api.Model, 'explain', refuse)
  shown = Tags(views.describe(str(path)))
  assert 'R_U' in shown.words and 'heat' not in dict(shown.attributes).values()


# What is refused, and what is put into the page.


def test_nothing_a_user_writes_becomes_part_of_the_page(views, tmp_path):
  path = tmp_path / '<script>.png'
  Image.new('RGB', (8, 8)).save(path)
  for text in (views.draw(EVIL), views.describe(str(path), EVIL)):
    found = Tags(text)
    assert 'script' not in found.tags
    assert not [k for k, _ in found.attributes if k.startswith('on')]
    assert 'alert(1)' in found.words
  broken = tmp_path / '<b>x.png'
  broken.write_bytes(b'<script>')
  assert 'script' not in Tags(views.describe(str(broken))).tags


@pytest.mark.parametrize(
  'ask, found',
  [
    (lambda v: v.draw(''), 'the prompt is empty; write a few words'),
    (lambda v: v.draw(None), 'the prompt is empty; write a few words'),
    (lambda v: v.draw('x' * 5000), 'the prompt has 5000 characters'),
    (lambda v: v.draw('red ' * 400), 'tokens, but this model has room for at most'),
    (lambda v: v.draw('red', None), 'the seed is None'),
    (lambda v: v.draw('red', -1), 'the seed is -1'),
    (lambda v: v.draw('red', 1.5), 'the seed is 1.5'),
    (lambda v: v.describe(None), 'the picture is missing'),
    (lambda v: v.step(3), 'there are no candidates of step 3'),
  ],
)
def test_what_cannot_be_answered_is_a_sentence(views, ask, found):
  shown = Tags(ask(views))
  assert found in shown.words and shown.tags == ['div', 'p']


def test_a_broken_or_too_large_picture_is_a_sentence(views, tmp_path, monkeypatch):
  path = tmp_path / 'x.png'
  whole = io.BytesIO()
  Image.new('RGB', (40, 40), 'red').save(whole, 'PNG')
  for content in (b'', b'\x89PNG\r\n\x1a\nnonsense', whole.getvalue()[:60]):
    path.write_bytes(content)
    words = Tags(views.describe(str(path))).words
    assert words.startswith('the uploaded file is not a readable image') or 'empty file' in words
    assert str(tmp_path) not in words
  Image.new('1', (9000, 8000)).save(path)
  assert (
    '9000 x 8000 pixels; reduce it to at most 64 million' in Tags(views.describe(str(path))).words
  )
  monkeypatch.setattr(views_lib, 'MAX_FILE', 100)
  assert 'MiB; reduce it to at most' in Tags(views.describe(str(path))).words


def test_a_picture_of_fifty_million_pixels_is_answered(views, tmp_path):
  path = tmp_path / 'x.png'
  Image.new('1', (10_000, 5_000), 1).save(path)
  assert 'R_U' in Tags(views.describe(str(path))).words


def test_one_request_at_a_time_works_on_the_model(views, monkeypatch):
  now, most = [0], [0]

  def generate(*args, **kwargs):
    now[0] += 1
    most[0] = max(most[0], now[0])
    time.sleep(0.02)
    now[0] -= 1
    raise InputError('busy enough')

  monkeypatch.setattr(api.Model, 'generate', generate)
  answers = []
  threads = [threading.Thread(target=lambda: answers.append(views.draw(PROMPT))) for _ in range(10)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(answers) == 10 and set(answers) == {answers[0]} and most == [1]


# A run.


def _candidates():
  """A drawn prompt with two pictures, and a picture with two texts."""
  pixels = np.zeros((1, 2, 4, 4, 3), np.uint8)
  rewards = np.array([[1.0, 2.0]], np.float32)
  both = dict(rewards=rewards, chosen=np.array([1]), rejected=np.array([0]))
  codes = np.zeros((1, 2, 4), np.int32)
  drawn = rows.Candidates('generation', ['<b>one</b>'], codes, pixels, **both)
  told = rows.Candidates(
    'understanding',
    ['what is it?'],
    codes[:, 0],
    pixels[:, 0],
    texts=[['a disc', '']],
    tokens=[[[1, 2], []]],
    **both,
  )
  return [drawn, told]


def test_a_steps_candidates_are_its_rows_or_its_sheet_and_rewards(model, tmp_path):
  (tmp_path / 'samples').mkdir()
  (tmp_path / 'checkpoints').mkdir()
  for step in (2, 10):
    Image.new('RGB', (30, 20)).save(tmp_path / 'samples' / f'{step:06d}.png')
  (tmp_path / 'samples' / 'other.png').write_bytes(b'')
  line = '{"step": 10, "loss": 1.0, "generation/reward": -1.25}\n'
  (tmp_path / 'metrics.jsonl').write_text(line)
  views = views_lib.Views(model, None, locate.run_of(f'{tmp_path}@10'), 4)
  assert views.steps() == [2, 10]
  shown = Tags(views.step(10))
  assert 'generation/reward -1.25' in shown.words and shown.tags.count('img') == 1
  rows.write(str(tmp_path), 10, rows.table(10, _candidates()))
  shown = Tags(views.step(10))
  assert shown.words.count('chosen') == shown.words.count('rejected') == 2
  for words in ('<b>one</b>', 'R_G 2.000', 'R_U 1.000', '(empty)'):
    assert words in shown.words
  assert shown.tags.count('img') == 3 and shown.tags.count('li') == 2 and 'b' not in shown.tags
  for name in (f'{tmp_path}', f'{tmp_path}:generator', f'{tmp_path}@10:generator'):
    assert locate.run_of(name) == str(tmp_path)
  assert locate.run_of('scenes') == ''


# The command.


def test_a_port_that_is_taken_is_one_sentence(monkeypatch):
  monkeypatch.setattr(command, 'check_gradio', lambda: None)
  with socket.socket() as taken:
    taken.bind(('127.0.0.1', 0))
    taken.listen()
    port = taken.getsockname()[1]
    with pytest.raises(InputError, match=f'port {port} of 127.0.0.1 is taken'):
      run(command, model='scenes', port=port)
  command.check_port('127.0.0.1', port)
  with pytest.raises(InputError, match='--port is 0'):
    command.check_port('127.0.0.1', 0)
  with pytest.raises(InputError, match='is not available'):
    command.check_port('192.0.2.1', port)  # reserved for documents: nobody's address


def test_without_gradio_the_extra_is_named(monkeypatch):
  monkeypatch.setattr(command.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(InputError, match=r"pip install 'dsr_jax\[demo\]'"):
    run(command, model='scenes')


def test_only_the_page_itself_needs_gradio():
  folder = pathlib.Path(demo_package.__path__[0])
  assert [p.name for p in folder.glob('*.py') if 'import gradio' in p.read_text()] == ['page.py']


# In a browser.


@pytest.fixture(scope='module')
def address(tmp_path_factory):
  """The address of a page that serves the embedded model, compared with itself."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  log = tmp_path_factory.mktemp('demo') / 'log'
  with open(log, 'wb') as out:
    server = subprocess.Popen(
      [sys.executable, '-m', 'dsr_jax.demo', '--model=scenes', '--num_samples=2', f'--port={port}'],
      cwd=ROOT,
      stdout=out,
      stderr=out,
      env={**os.environ, 'GRADIO_TEMP_DIR': str(log.parent)},
    )
  try:
    until = time.monotonic() + 300
    while True:
      assert server.poll() is None and time.monotonic() < until, log.read_text()
      with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', port), 1):
        break
      time.sleep(0.5)
    yield f'http://127.0.0.1:{port}'
  finally:
    server.terminate()
    server.wait(30)


@pytest.fixture(scope='module')
def chromium():
  if BROWSER is None:
    pytest.skip('no Chromium on this machine: apt-get install chromium')
  sync_api = pytest.importorskip('playwright.sync_api')
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=BROWSER, args=['--no-sandbox'])
    yield browser
    browser.close()


def opened(browser, address, width, scheme='light'):
  """A page of that width; `strange` collects dialogs and requests to other places."""
  page = browser.new_context(
    viewport={'width': width, 'height': 900}, color_scheme=scheme
  ).new_page()
  page.set_default_timeout(120_000)
  page.strange = []
  page.on('dialog', lambda dialog: (page.strange.append(dialog.message), dialog.dismiss()))

  def look(request):
    if not request.url.startswith((address, 'data:', 'blob:')):
      page.strange.append(request.url)

  page.on('request', look)
  page.goto(address)
  return page


def draw(page, prompt):
  page.get_by_label('Prompt').fill(prompt)
  page.get_by_role('button', name='Draw', exact=True).click()


@pytest.mark.slow
@pytest.mark.parametrize('width', [1400, 390])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_a_person_draws_and_describes(chromium, address, width, scheme, tmp_path):
  page = opened(chromium, address, width, scheme)
  draw(page, 'a red disc')
  page.locator('.dsr h2', has_text='a red disc').wait_for()
  assert page.locator('.dsr .heat span').count() == 6  # three words under two pictures
  Image.new('RGB', (60, 40), 'red').save(tmp_path / 'x.png')
  page.get_by_role('tab', name='Describe').click()
  page.locator('input[type=file]').set_input_files(tmp_path / 'x.png')
  page.get_by_role('button', name='Remove Image').or_(page.locator('img[alt=""]')).first.wait_for()
  page.get_by_role('button', name='Describe', exact=True).click()
  page.locator('.dsr .texts li').first.wait_for()
  assert page.evaluate('document.documentElement.scrollWidth') <= width
  assert not page.strange
  page.context.close()


@pytest.mark.slow
def test_a_script_in_a_prompt_and_a_broken_upload_are_shown_and_not_run(
  chromium, address, tmp_path
):
  page = opened(chromium, address, 1400)
  draw(page, MORE_EVIL)
  title = page.locator('.dsr h2')
  title.wait_for()
  assert title.inner_text() == MORE_EVIL and title.locator('*').count() == 0
  (tmp_path / 'x.png').write_bytes(b'\x89PNG\r\n\x1a\nnonsense')
  page.get_by_role('tab', name='Describe').click()
  page.locator('input[type=file]').set_input_files(tmp_path / 'x.png')
  page.wait_for_timeout(1000)
  page.get_by_role('button', name='Describe', exact=True).click()
  message = page.locator('.dsr .message')
  message.wait_for()
  assert 'the uploaded file is not a readable image' in message.inner_text()
  assert not page.strange
  page.context.close()


@pytest.mark.slow
def test_ten_people_click_at_once_and_all_are_answered(chromium, address):
  pages = [opened(chromium, address, 800) for _ in range(10)]
  for i, page in enumerate(pages):
    draw(page, f'a red disc {i}')
  for i, page in enumerate(pages):
    page.locator('.dsr h2', has_text=f'a red disc {i}').wait_for()
    page.context.close()


@pytest.mark.slow
def test_every_answer_forbids_other_hosts(address):
  with urllib.request.urlopen(address) as answer:
    assert "default-src 'self'" in answer.headers['content-security-policy']
