"""A language model that judges answers: any callable, an API compatible with OpenAI's, or a file of
reviews from elsewhere.

Each review is saved as soon as it arrives, in a file with one JSON object per line, so that no
request is paid for twice. Failed requests are not saved; the next run asks them again.
"""

from collections.abc import Callable
from concurrent import futures
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
# HTTP codes below 500 that are worth another attempt: timeout, conflict, too early, too many.
PASSING = (408, 409, 425, 429)


class Request(NamedTuple):
  """What the judge is asked about one answer."""

  id: str
  system: str
  text: str


# Returns the review, or raises `JudgeFailed`.
Judge = Callable[[Request], str]


class JudgeFailed(Exception):
  """There is no review."""


class Reply(NamedTuple):
  """A review, or '' and the reason why there is none."""

  review: str
  failure: str = ''


class OpenAIJudge:
  """Asks `URL/chat/completions`. The key is read from the environment and never written."""

  at_once = 8  # requests under way together: a judge that does not answer costs minutes, not hours

  def __init__(self, url: str, model: str, *, attempts: int = ATTEMPTS, wait: float = FIRST_WAIT):
    """url: such as `https://api.openai.com/v1`. Without a key in the environment, none is sent."""
    if not url.startswith(('http://', 'https://')):
      raise InputError(
        f'--judge_url={url} is not a URL; give one that begins with http:// or https://'
      )
    if not model:
      raise InputError('--judge_model is missing; set it to the name of the judge')
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
  """Reviews from elsewhere: a file with one JSON object per line, with `id` and `review`."""

  def __init__(self, path: str):
    self._reviews = {}
    for number, row in _lines(path):
      if 'id' not in row or not isinstance(row.get('review'), str):
        raise InputError(
          f'line {number} of {path} has no id or no review; correct it to '
          '{"id": ..., "review": "8 7"}'
        )
      self._reviews[str(row['id'])] = row['review']
    self.model = os.path.basename(path)

  def __call__(self, request: Request) -> str:
    if request.id not in self._reviews:
      raise JudgeFailed('not among the reviews')
    return self._reviews[request.id]


def ask_all(requests: list[Request], judge: Judge, cache: str | None = None) -> dict[str, Reply]:
  """{request's id: reply}; requests whose reply is in the cache are not sent.

  Args:
    requests: what to ask.
    judge: which judge to ask. Two attributes are optional: `model` is part of the cache key, and
      `at_once` is how many requests may be under way together (1), each in a thread of its own.
    cache: a file that replies are read from and added to.
  """
  model = getattr(judge, 'model', '')
  known = _read_cache(cache)
  keys = {request.id: _key(model, request) for request in requests}
  replies = {name: Reply(known[key]) for name, key in keys.items() if key in known}
  pool = futures.ThreadPoolExecutor(getattr(judge, 'at_once', 1))
  try:
    asked = {pool.submit(_ask, judge, r): r.id for r in requests if r.id not in replies}
    for done in futures.as_completed(asked):
      name, reply = asked[done], done.result()
      replies[name] = reply
      if cache and not reply.failure:
        _append(cache, {'key': keys[name], 'id': name, 'model': model, 'review': reply.review})
  finally:
    pool.shutdown(wait=False, cancel_futures=True)
  if cache:
    _sort_cache(cache, list(keys.values()))
  return {request.id: replies[request.id] for request in requests}


def _ask(judge, request) -> Reply:
  try:
    return Reply(judge(request))
  except JudgeFailed as e:
    return Reply('', str(e) or 'no reason given')


def write_requests(requests: list[Request], path: str) -> str:
  """Writes the file to judge, with one JSON object per line. Add `review` to each line, then read
  it with `Reviewed`.
  """
  lines = [json.dumps(request._asdict(), ensure_ascii=False) for request in requests]
  return files.write_text(path, '\n'.join(lines) + '\n')


def _key(model, request):
  content = json.dumps([model, TEMPERATURE, request.system, request.text])
  return hashlib.sha256(content.encode()).hexdigest()


def _read_cache(path) -> dict[str, str]:
  return {key: row['review'] for key, row in _read_rows(path).items()}


def _read_rows(path) -> dict[str, dict]:
  if not path or not os.path.isfile(path):
    return {}
  with open(path, 'rb') as f:
    data = f.read()
  found = {}
  for line in data.split(b'\n'):
    try:
      row = json.loads(line)
      found[row['key']] = {**row, 'review': row['review']}
    except (ValueError, KeyError, TypeError):
      continue  # a partial line: the process was killed while writing it
  return found


def _sort_cache(path, keys):
  """Puts the replies in the order of the requests, whenever each arrived: the same file after any
  interruption. Replies to other requests come first.
  """
  place = {key: number for number, key in enumerate(keys)}
  rows = sorted(_read_rows(path).values(), key=lambda row: place.get(row['key'], -1))
  if rows:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    files.write_text(path, '\n'.join(lines) + '\n')


def _append(path, row):
  os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
  with open(path, 'ab') as f:
    # After a partial line, start a new one.
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
      f'cannot read {path} ({e}), which should have one JSON object per line; fix the file'
    ) from e
