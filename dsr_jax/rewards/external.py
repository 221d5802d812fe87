"""Rewards from outside of the step: a Python function, or an address that answers by HTTP.

  method.external_reward.generation=mine:score    a function; the current folder is on the path
  method.external_reward.understanding=http://host:8000/score

Both get a step's candidates of a task and give a number each, the higher the better. What they said
is kept in WORKDIR/external/STEP.json before it is learned from, so a run that goes on and a replay
never ask again.

Axes: B inputs, G samples.
"""

import base64
from collections.abc import Callable, Sequence
import concurrent.futures
import hashlib
import importlib
import json
import os
import sys
import threading
import time
from typing import NamedTuple
import urllib.error
import urllib.request

import numpy as np
from PIL import Image

from dsr_jax import files, images
from dsr_jax.errors import InputError, first_line

FOLDER = 'external'
AT_ONCE = 64  # candidates of a request, about: groups stay whole
REQUESTS = 4  # at the same time
MOST_BYTES = 16 << 20  # of an answer
PAUSE_SECONDS = 1.0  # before the first retry; twice as long before each further one


class Candidate(NamedTuple):
  """A sample that waits for its reward.

  Attributes:
    input, candidate: its place, from 0; candidates of one input compete with each other.
    prompt: what the picture was drawn for, or what was asked about it.
    picture: uint8 (H, W, 3), what was drawn, or what the text is about.
    text: what was written about the picture; None where one was drawn.
  """

  input: int
  candidate: int
  prompt: str
  picture: np.ndarray
  text: str | None


class _Unanswered(Exception):
  """A request that another one may answer."""


# Who is asked.


def check(method, seconds: float, retries: int):
  """InputError unless all who are to be asked are there, before any work. A function is imported;
  an address is asked for the rewards of no candidates.
  """
  for task in method.tasks:
    source = method.external_source(task)
    if source:
      ask(source, task, [], seconds, retries)


def ask(source: str, task: str, candidates: Sequence[Candidate], seconds: float, retries: int):
  """A number for each candidate, (len(candidates),) float32.

  Errors: InputError for no answer in time, and for one that is not a finite number each.
  """
  name = os.path.expandvars(source)
  if name.startswith(('http://', 'https://')):
    values = _asked_by_http(name, task, candidates, seconds, retries)
  else:
    values = _called(name, task, candidates, seconds)
  return _checked(values, name, task, candidates)


def _checked(values, name: str, task: str, candidates) -> np.ndarray:
  try:
    found = np.asarray(values, np.float64)
  except (TypeError, ValueError) as e:
    raise InputError(
      f'found rewards of {name} that are no numbers ({first_line(e)}); expected one for each of '
      f'{len(candidates)} candidates of {task}; mend it'
    ) from e
  if found.shape != (len(candidates),):
    raise InputError(
      f'found rewards of {name} in the shape {found.shape} for {len(candidates)} candidates of '
      f'{task}; expected a flat list with one number each, in their order; mend it'
    )
  with np.errstate(over='ignore'):
    rewards = found.astype(np.float32)
  bad = np.flatnonzero(~np.isfinite(rewards))
  if bad.size:
    one = candidates[bad[0]]
    raise InputError(
      f'found the reward {values[bad[0]]} of {name} for candidate {one.candidate} of input '
      f'{one.input} ({task}); expected a finite number; mend it'
    )
  return rewards


# A function.


def _called(name: str, task: str, candidates, seconds: float):
  function = _imported(name)
  if not candidates:
    return []
  try:
    return _within(seconds, lambda: function(task, list(candidates)))
  except TimeoutError as e:
    raise _too_late(name, task, seconds) from e
  except Exception as e:
    raise InputError(
      f'found that {name} failed on {len(candidates)} candidates of {task} ({type(e).__name__}: '
      f'{first_line(e)}); expected a number each; mend it'
    ) from e


def _imported(name: str) -> Callable:
  """The function that 'module:function' names; modules of the current folder are found too."""
  module_name, _, function_name = name.partition(':')
  if not all(part.isidentifier() for part in (*module_name.split('.'), function_name)):
    raise InputError(
      f'found {name!r} for method.external_reward; expected module:function, or http://...'
    )
  if os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())
  try:
    module = importlib.import_module(module_name)
  except Exception as e:
    raise InputError(
      f'cannot import {module_name} for method.external_reward ({type(e).__name__}: '
      f'{first_line(e)}); expected a module of this environment or of the current folder; mend it'
    ) from e
  function = getattr(module, function_name, None)
  if not callable(function):
    raise InputError(
      f'found no function {function_name} in the module {module_name}; expected one for '
      'method.external_reward; mend the name'
    )
  return function


def _within(seconds: float, function: Callable):
  """function(), or TimeoutError. Its thread is left behind then: Python cannot end one."""
  done: concurrent.futures.Future = concurrent.futures.Future()

  def work():
    try:
      done.set_result(function())
    except BaseException as e:
      done.set_exception(e)

  threading.Thread(target=work, daemon=True, name='reward').start()
  return done.result(seconds)


def _too_late(name: str, task: str, seconds: float) -> InputError:
  return InputError(
    f'found no rewards of {name} for {task} within {seconds:g} s; expected an answer in that time; '
    'make it faster, or raise system.external_seconds'
  )


# An address.


def _asked_by_http(url: str, task: str, candidates, seconds: float, retries: int):
  parts = _parts(candidates)
  with concurrent.futures.ThreadPoolExecutor(REQUESTS, 'reward') as pool:
    asked = [pool.submit(_answer, url, task, part, seconds, retries) for part in parts]
    try:
      return [value for one in asked for value in one.result()]
    finally:
      pool.shutdown(wait=False, cancel_futures=True)


def _parts(candidates) -> list:
  """Some candidates a request, groups whole; one without any where there are none."""
  found: list[list[Candidate]] = [[]]
  for one in candidates:
    if one.candidate == 0 and len(found[-1]) >= AT_ONCE:
      found.append([])
    found[-1].append(one)
  return found


def _answer(url: str, task: str, candidates, seconds: float, retries: int) -> list:
  """A part's rewards, asked for again where a request is not answered."""
  body = json.dumps(_request(task, candidates)).encode()
  for attempt in range(retries + 1):
    if attempt:
      time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
    try:
      answer = _within(seconds, lambda: _posted(url, body, seconds))
      break
    except TimeoutError as e:
      if attempt == retries:
        raise _too_late(url, task, seconds) from e
    except _Unanswered as e:
      if attempt == retries:
        raise InputError(
          f'found no answer of {url} ({e}); expected rewards; start what answers there, or mend '
          f'method.external_reward.{task}'
        ) from e
  rewards = answer.get('rewards') if isinstance(answer, dict) else None
  if not isinstance(rewards, list) or len(rewards) != len(candidates):
    found = f'{len(rewards)} rewards' if isinstance(rewards, list) else 'no list of rewards'
    raise InputError(
      f'found {found} in the answer of {url} for {len(candidates)} candidates of {task}; expected '
      '{"rewards": [...]} with a number each, in their order; mend it'
    )
  return rewards


def _request(task: str, candidates) -> dict:
  """JSON of a request: a picture that several candidates have is there once."""
  pictures: list[str] = []
  places: dict[int, int] = {}
  told = []
  for one in candidates:
    if id(one.picture) not in places:
      places[id(one.picture)] = len(pictures)
      pictures.append(base64.b64encode(images.png(Image.fromarray(one.picture))).decode())
    told.append(one._asdict() | {'picture': places[id(one.picture)]})
  return {'task': task, 'candidates': told, 'pictures': pictures}


def _posted(url: str, body: bytes, seconds: float):
  request = urllib.request.Request(url, body, {'Content-Type': 'application/json'})
  try:
    with urllib.request.urlopen(request, timeout=seconds) as response:
      content = response.read(MOST_BYTES + 1)
  except urllib.error.HTTPError as e:
    if e.code < 500 and e.code not in (408, 429):
      raise InputError(
        f'found that {url} answers {e.code} {e.reason}; expected rewards; mend '
        'method.external_reward, or what answers there'
      ) from e
    raise _Unanswered(f'{e.code} {e.reason}') from e
  except TimeoutError:
    raise
  except OSError as e:  # URLError too
    reason = getattr(e, 'reason', e)
    if isinstance(reason, TimeoutError):
      raise reason from e
    raise _Unanswered(first_line(reason)) from e
  except ValueError as e:
    raise InputError(
      f'found the address {url} ({first_line(e)}); expected http://HOST:PORT/PATH; mend it'
    ) from e
  if len(content) > MOST_BYTES:
    raise InputError(f'found more than {MOST_BYTES} bytes of {url}; expected rewards; mend it')
  try:
    return json.loads(content)
  except (ValueError, RecursionError) as e:
    raise InputError(
      f'found no JSON in the answer of {url} ({first_line(e)}); expected {{"rewards": [...]}}; '
      'mend it'
    ) from e


# What was said.


def digest(*arrays) -> str:
  """Of samples: whether those of a step that runs again are the same."""
  found = hashlib.sha256()
  for array in arrays:
    found.update(np.ascontiguousarray(array))
  return found.hexdigest()


def path_of(workdir: str, step: int) -> str:
  """Where what was said of a step's candidates is."""
  return os.path.join(workdir, FOLDER, f'{step:06d}.json')


def kept(workdir: str, step: int) -> dict:
  """{task: {'samples': their digest, 'rewards': B lists of G}} that were said of a step; none where
  nobody was asked. Errors: InputError for a damaged file.
  """
  path = path_of(workdir, step)
  found = files.read_json_or_none(path) or {}
  try:
    for one in found.values():
      one['samples'], np.asarray(one['rewards'], np.float32)
  except (TypeError, ValueError, LookupError, AttributeError) as e:
    raise InputError(
      f'cannot read {path} ({first_line(e)}); expected what the run wrote there; bring it back '
      'from a copy, or remove it: its step is then asked for again'
    ) from e
  return found


def keep(workdir: str, step: int, answers: dict):
  """Writes what was said of a step, whole or not at all; see `kept`."""
  path = path_of(workdir, step)
  os.makedirs(os.path.dirname(path), exist_ok=True)
  files.write_json(path, answers)


def equal_groups(rewards) -> int:
  """Of rewards (B, G), the groups of which all are equal: nothing is learned from those."""
  return int(np.sum(np.ptp(rewards, axis=1) == 0))
