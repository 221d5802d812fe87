"""A language model that judges answers: any callable, an address that talks like OpenAI's, or a
file of reviews that were made elsewhere.

An answer of the judge is kept as soon as it comes, in a file of one JSON object a line, so that no
request is paid for twice; what failed is not kept there, and asked again in the next run.
"""

from collections.abc import Callable
import hashlib
import http.client
import json
import os
import time
from typing import Any, NamedTuple
import urllib.error
import urllib.request

from dsr_jax import files
from dsr_jax.errors import InputError

KEY_VARIABLE = 'OPENAI_API_KEY'
TEMPERATURE = 0.2
MAX_TOKENS = 1024
ATTEMPTS = 5
FIRST_WAIT = 2.0  # seconds, doubled at each further attempt
TIMEOUT = 120.0
# Codes that another attempt may mend: too early, too many, and what servers say of themselves.
PASSING = (408, 409, 425, 429)


class Request(NamedTuple):
  """What the judge is asked about one answer."""

  id: str
  system: str
  text: str


# Gives the review, or raises `JudgeFailed`.
Judge = Callable[[Request], str]


class JudgeFailed(Exception):
  """No review was had."""


class Reply(NamedTuple):
  """A review, or '' and why there is none."""

  review: str
  failure: str = ''


class OpenAIJudge:
  """Asks `URL/chat/completions`; the key is read from the environment, and never written."""

  def __init__(self, url: str, model: str, *, attempts: int = ATTEMPTS, wait: float = FIRST_WAIT):
    """url: as `https://api.openai.com/v1`; without a key in the environment none is sent."""
    if not url.startswith(('http://', 'https://')):
      raise InputError(
        f'found --judge_url={url}; expected an address that begins with http:// or https://; '
        'correct it'
      )
    if not model:
      raise InputError('found no --judge_model; expected the name of the judge; add it')
    self.url = f'{url.rstrip("/")}/chat/completions'
    self.model = model
    self._attempts = attempts
    self._wait = wait

  def __call__(self, request: Request) -> str:
    body = {
      'model': self.model,
      'messages': [
        {'role': 'system', 'content': request.system},
        {'role': 'user', 'content': request.text},
      ],
      'temperature': TEMPERATURE,
      'max_tokens': MAX_TOKENS,
    }
    failure = ''
    for attempt in range(self._attempts):
      if attempt:
        time.sleep(self._wait * 2 ** (attempt - 1))
      try:
        return self._ask(body)
      except urllib.error.HTTPError as e:
        failure = f'HTTP {e.code}'
        if e.code < 500 and e.code not in PASSING:
          break
      except (urllib.error.URLError, http.client.HTTPException, TimeoutError, OSError) as e:
        failure = str(e)
      except (ValueError, KeyError, IndexError, TypeError):
        failure = 'an answer that is not of the expected form'
    raise JudgeFailed(failure)

  def _ask(self, body) -> str:
    headers = {'Content-Type': 'application/json'}
    key = os.environ.get(KEY_VARIABLE)
    if key:
      headers['Authorization'] = f'Bearer {key}'
    request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
      content = json.load(response)['choices'][0]['message']['content']
    if not isinstance(content, str):
      raise ValueError('no text')
    return content


class Reviewed:
  """Reviews made elsewhere: a file of one JSON object a line, with `id` and `review`."""

  def __init__(self, path: str):
    self._reviews = {}
    for number, row in _lines(path):
      if 'id' not in row or not isinstance(row.get('review'), str):
        raise InputError(
          f'found no id or review in line {number} of {path}; expected '
          '{"id": ..., "review": "8 7"}; mend the line'
        )
      self._reviews[str(row['id'])] = row['review']
    self.model = os.path.basename(path)

  def __call__(self, request: Request) -> str:
    if request.id not in self._reviews:
      raise JudgeFailed('not among the reviews')
    return self._reviews[request.id]


def ask_all(requests: list[Request], judge: Judge, cache: str | None = None) -> dict[str, Reply]:
  """{request's id: reply}; requests whose reply is in the cache are not made.

  Args:
    requests: what to ask.
    judge: who to ask; its attribute `model`, if it has one, is part of what a cached reply belongs
      to.
    cache: a file that replies are read from and added to.
  """
  model = getattr(judge, 'model', '')
  known = _read_cache(cache)
  replies = {}
  for request in requests:
    key = _key(model, request)
    if key in known:
      replies[request.id] = Reply(known[key])
      continue
    try:
      review = judge(request)
    except JudgeFailed as e:
      replies[request.id] = Reply('', str(e) or 'no reason given')
      continue
    replies[request.id] = Reply(review)
    if cache:
      _append(cache, {'key': key, 'id': request.id, 'model': model, 'review': review})
  return replies


def write_requests(requests: list[Request], path: str) -> str:
  """The file to judge: one JSON object a line. Add `review` to each line, and read it as
  `Reviewed`.
  """
  lines = [json.dumps(request._asdict(), ensure_ascii=False) for request in requests]
  return files.write_text(path, '\n'.join(lines) + '\n')


def _key(model, request):
  content = json.dumps([model, TEMPERATURE, request.system, request.text])
  return hashlib.sha256(content.encode()).hexdigest()


def _read_cache(path) -> dict[str, str]:
  if not path or not os.path.isfile(path):
    return {}
  with open(path, 'rb') as f:
    data = f.read()
  found = {}
  for line in data.split(b'\n'):
    try:
      row = json.loads(line)
      found[row['key']] = row['review']
    except (ValueError, KeyError, TypeError):
      continue  # the half line of a process that was killed while it wrote
  return found


def _append(path, row):
  os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
  with open(path, 'ab') as f:
    # Behind a half line a new one begins.
    start = b'\n' if f.tell() and _last_byte(path) != b'\n' else b''
    f.write(start + json.dumps(row, ensure_ascii=False).encode() + b'\n')


def _last_byte(path):
  with open(path, 'rb') as f:
    f.seek(-1, os.SEEK_END)
    return f.read(1)


def _lines(path) -> list[tuple[int, dict[str, Any]]]:
  try:
    with open(path, encoding='utf-8') as f:
      texts = f.read().split('\n')
    return [(i, json.loads(text)) for i, text in enumerate(texts, 1) if text.strip()]
  except (OSError, ValueError) as e:
    raise InputError(
      f'cannot read {path} ({e}); expected one JSON object a line; mend the file'
    ) from e
