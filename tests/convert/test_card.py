"""An export is used at once: its card's snippet runs, and the Hub gets it."""

import base64
import contextlib
import http.server
import io
import json
import re
import sys
import threading

import huggingface_hub
from huggingface_hub import constants
import original_layout
from PIL import Image
import pytest

from dsr_jax import convert
from dsr_jax.convert import __main__ as command
from dsr_jax.convert import card, locate
from dsr_jax.errors import InputError
from dsr_jax.models.common import lora
from dsr_jax.models.janus.family import JANUS

REPOSITORY = 'somebody/janus-dsr'


def run(source, target, layout='hf', **options):
  return command.convert(str(source), str(target), layout, **options)


@pytest.fixture(name='finished', scope='module')
def _finished(original, make_run):
  """A run that was evaluated at its last step, 7."""
  workdir = make_run(original_layout.head_of(original, 1.001), objective='grpo', temperature=0.9)
  summary = dict(step=7, steps=7, evaluation={'generation/mean': dict(before=0.2, after=0.285)})
  (workdir / 'summary.json').write_text(json.dumps(summary))
  (workdir / 'watched').mkdir()
  Image.new('RGB', (8, 8), 'red').save(workdir / 'watched' / '000007.png')
  return workdir


@pytest.fixture(name='adapted', scope='module')
def _adapted(original, make_run):
  """A run of adapters."""
  adapters = lora.init(convert.load(original[0]).params, JANUS.lora_targets, 2, 0)
  return make_run({'lora': adapters}, trainable='lora')


def header_of(folder):
  return huggingface_hub.ModelCard.load(folder / 'README.md').data


# The card.


def test_a_card_says_what_the_hub_reads_and_shows_before_and_after(finished, original, tmp_path):
  (original[0] / 'README.md').write_text(
    '---\nlicense: other\nlicense_name: deepseek\nlicense_link: LICENSE-MODEL\n---\n# theirs\n'
  )
  try:
    run(finished, tmp_path / 'out')
  finally:
    (original[0] / 'README.md').unlink()
  header = header_of(tmp_path / 'out')
  assert (header.license, header.license_name) == ('other', 'deepseek')
  assert (header.library_name, header.pipeline_tag) == ('transformers', 'any-to-any')
  (result,) = header.eval_results
  assert (result.metric_type, result.metric_value) == ('generation/mean', 0.285)
  (shown,) = header.widget
  path = tmp_path / 'out' / shown['output']['url']
  assert (
    Image.open(path).size == (8, 8)
    and f']({path.name})' in (tmp_path / 'out' / 'README.md').read_text()
  )


def test_only_settings_that_had_a_meaning_are_named(finished, adapted, tmp_path):
  run(finished, tmp_path / 'out')
  text = (tmp_path / 'out' / 'README.md').read_text()
  for key in ('objective | grpo', 'temperature | 0.9', 'grpo.ratio_low |', 'learning_rate |'):
    assert f'| {key}' in text
  for key in ('gspo', 'cispo', 'dpo', 'lora', 'separate', 'clip_reward', 'yes_question', 'gamma'):
    assert f'| {key}' not in text, key
  for key in ('judge_accuracy', 'external_reward', 'ema_decay', 'sampling_steps', 'prompt_drop'):
    assert f'| {key}' not in text, key
  run(adapted, tmp_path / 'adapter', 'peft')
  text = (tmp_path / 'adapter' / 'README.md').read_text()
  assert '| lora.rank |' in text and '| learning_rate |' not in text


def test_numbers_and_pictures_of_another_step_are_left_out(finished, tmp_path):
  located = locate.locate(str(finished))
  other = card.make(located.__class__(**{**vars(located), 'step': 5}), 'hf', JANUS)
  assert not other.pictures and '## Results' not in other.text and '0.285' not in other.text


def test_a_base_on_the_hub_is_named_and_a_folder_is_not(finished):
  located = locate.locate(str(finished))
  about = {**located.about, 'model': {**located.about['model'], 'name': 'deepseek-ai/Janus-Pro-1B'}}
  there = located.__class__(**{**vars(located), 'about': about})
  assert 'base_model: deepseek-ai/Janus-Pro-1B' in card.make(there, 'hf', JANUS).text
  text = card.make(there, 'peft', JANUS).text
  assert 'base_model_relation: adapter' in text and "base = 'deepseek-ai/Janus-Pro-1B'" in text
  assert 'base_model:' not in card.make(located, 'hf', JANUS).text


class _Hidden:
  """Finds no module of these names."""

  def find_spec(self, name, path=None, target=None):
    if name.partition('.')[0] == 'torchvision':
      raise ModuleNotFoundError(name)


def snippet_of(folder):
  return re.search(r'```python\n(.*?)```', (folder / 'README.md').read_text(), re.DOTALL)[1]


@pytest.mark.parametrize('torchvision', [False, True])
def test_the_snippet_runs_as_it_stands(torchvision, finished, tmp_path, monkeypatch, capsys):
  if torchvision:
    pytest.importorskip('torchvision')
  else:
    monkeypatch.setattr(sys, 'meta_path', [_Hidden(), *sys.meta_path])
  run(finished, tmp_path / 'out')
  monkeypatch.chdir(tmp_path / 'out')
  names = {}
  exec(compile(snippet_of(tmp_path / 'out'), 'README.md', 'exec'), names)
  assert Image.open('picture.png').size == (16, 16)
  assert names['answer'].ndim == 1 and capsys.readouterr().out


def test_the_snippet_of_adapters_runs_on_the_model_that_they_belong_to(
  adapted, hf_directory, tmp_path, monkeypatch
):
  run(adapted, tmp_path / 'out', 'peft')
  monkeypatch.chdir(tmp_path / 'out')
  text, named = re.subn(r"base = '.*'", f"base = '{hf_directory}'", snippet_of(tmp_path / 'out'))
  assert named == 1
  names = {}
  exec(compile(text, 'README.md', 'exec'), names)
  assert any('lora_A' in name for name, _ in names['model'].named_parameters())


# The Hub.


@contextlib.contextmanager
def hub(may_write=True):
  """What the Hub does about a repository, on this machine; yields its address, {path: content}."""
  stored = {}

  class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, content, status=200):
      body = json.dumps(content).encode()
      self.send_response(status)
      self.send_header('Content-Type', 'application/json')
      self.send_header('Content-Length', str(len(body)))
      self.end_headers()
      self.wfile.write(body)

    def do_GET(self):
      if self.path.endswith('/auth-check/write'):
        self.answer({}, 200 if may_write else 403)
      else:
        self.answer({'id': REPOSITORY, 'sha': 'a' * 40, 'siblings': []})

    def do_POST(self):
      content = self.rfile.read(int(self.headers['Content-Length']))
      assert self.headers['Authorization'] == 'Bearer hf_mine'
      if self.path == '/api/repos/create':
        if may_write:
          self.answer({'url': f'{address}/{REPOSITORY}'})
        else:
          self.answer({'error': 'no write access'}, 403)
      elif self.path == '/api/validate-yaml':
        self.answer({'errors': [], 'warnings': []})
      elif '/preupload/' in self.path:
        wanted = [one['path'] for one in json.loads(content)['files']]
        self.answer({'files': [_regular(path) for path in wanted]})
      elif '/commit/' in self.path:
        for line in io.BytesIO(content):
          one = json.loads(line)
          if one['key'] == 'file':
            stored[one['value']['path']] = base64.b64decode(one['value']['content'])
        self.answer({'commitUrl': f'{address}/{REPOSITORY}/commit/1', 'commitOid': '1'})
      else:
        self.answer({'error': self.path}, 404)

    def log_message(self, *args):
      """Nothing."""

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  address = f'http://127.0.0.1:{server.server_port}'
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    yield address, stored
  finally:
    server.shutdown()
    server.server_close()


def _regular(path):
  return {'path': path, 'uploadMode': 'regular', 'shouldIgnore': False, 'oid': None}


@pytest.fixture(name='token')
def _token(monkeypatch):
  monkeypatch.setenv('HF_TOKEN', 'hf_mine')


def test_what_was_written_is_uploaded_and_nothing_else(
  finished, adapted, token, tmp_path, monkeypatch
):
  for source, layout in ((finished, 'hf'), (adapted, 'peft')):
    target = tmp_path / layout
    target.mkdir()
    (target / 'mine.txt').write_text('mine')
    with hub() as (address, stored), monkeypatch.context() as patch:
      patch.setattr(constants, 'ENDPOINT', address)
      done = run(source, target, layout, overwrite=True, push_to_hub=REPOSITORY)
    assert done['pushed'] == f'{address}/{REPOSITORY}/commit/1'
    written = {str(p.relative_to(target)) for p in target.rglob('*') if p.is_file()}
    assert stored.keys() == written - {'mine.txt'} and 'README.md' in stored
    for name, content in stored.items():
      assert (target / name).read_bytes() == content
    assert f"name = '{REPOSITORY}'\n" in stored['README.md'].decode()


def test_no_token_and_one_that_may_not_write_are_said_before_any_work(
  finished, tmp_path, monkeypatch
):
  def push(repository=REPOSITORY):
    run(finished, tmp_path / 'out', push_to_hub=repository)

  monkeypatch.setattr(huggingface_hub, 'get_token', lambda: None)
  with pytest.raises(InputError, match='no token for the Hugging Face Hub'):
    push()
  with pytest.raises(InputError, match='not of the form OWNER/NAME'):
    push('mine')
  monkeypatch.undo()
  monkeypatch.setenv('HF_TOKEN', 'hf_mine')
  with hub(may_write=False) as (address, _), monkeypatch.context() as patch:
    patch.setattr(constants, 'ENDPOINT', address)
    with pytest.raises(InputError, match=r'with this token \(403') as e:
      push()
  assert '\n' not in str(e.value)
  monkeypatch.setattr(constants, 'ENDPOINT', address)  # it is gone now
  with pytest.raises(InputError, match='cannot be reached'):
    push()
  assert not (tmp_path / 'out').exists()
