"""External rewards, computed outside the step: by a Python function or an HTTP server.

  method.external_reward.generation=mine:score    a function; the current folder is on the path
  method.external_reward.understanding=http://host:8000/score

Both get all candidates of a task in a step and return one number for each; higher is better. Their
answers are saved to WORKDIR/external/STEP.json before the update, so a resumed run or a replay
never asks again.

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
AT_ONCE = 64  # candidates per request, approximately: groups are not split
REQUESTS = 4  # parallel requests
MOST_BYTES = 16 << 20  # size limit of a response
PAUSE_SECONDS = 1.0  # before the first retry; doubles before each further retry


class Candidate(NamedTuple):
  """A sample that needs a reward.

  Attributes:
    input, candidate: its indices, from 0; candidates of the same input compete with each other.
    prompt: the prompt of the image, or the question about it.
    picture: uint8 (H, W, 3), the sampled image, or the one that the text describes.
    text: the sampled text; None if the sample is an image.
  """

  input: int
  candidate: int
  prompt: str
  picture: np.ndarray
  text: str | None


class _Unanswered(Exception):
  """A request without an answer, worth a retry."""


# Sources of rewards.


def check(method, seconds: float, retries: int):
  """InputError unless all configured sources respond; called before any work. Imports a function;
  sends a server a request without candidates.
  """
  for task in method.tasks:
    source = method.external_source(task)
    if source:
      ask(source, task, [], seconds, retries)


def ask(source: str, task: str, candidates: Sequence[Candidate], seconds: float, retries: int):
  """Requests one number for each candidate, (len(candidates),) float32.

  InputError if the answer is late or is not one finite number per candidate.
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
      f'{name} returned rewards that are not numbers ({first_line(e)}); return one number for each '
      f'of {len(candidates)} candidates of {task}'
    ) from e
  if found.shape != (len(candidates),):
    raise InputError(
      f'{name} returned rewards of shape {found.shape} for {len(candidates)} candidates of {task}; '
      'return a flat list with one number per candidate, in order'
    )
  with np.errstate(over='ignore'):
    rewards = found.astype(np.float32)
  bad = np.flatnonzero(~np.isfinite(rewards))
  if bad.size:
    one = candidates[bad[0]]
    raise InputError(
      f'{name} returned the reward {values[bad[0]]} for candidate {one.candidate} of input '
      f'{one.input} ({task}); return finite numbers'
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
      f'{name} failed on {len(candidates)} candidates of {task} ({type(e).__name__}: '
      f'{first_line(e)}); fix it so that it returns one number per candidate'
    ) from e


def _imported(name: str) -> Callable:
  """The function that 'module:function' names; also finds modules in the current folder."""
  module_name, _, function_name = name.partition(':')
  if not all(part.isidentifier() for part in (*module_name.split('.'), function_name)):
    raise InputError(f'method.external_reward is {name!r}; set it to module:function or http://...')
  if os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())
  try:
    module = importlib.import_module(module_name)
  except Exception as e:
    raise InputError(
      f'cannot import {module_name} for method.external_reward ({type(e).__name__}: '
      f'{first_line(e)}); name a working module of this environment or of the current folder'
    ) from e
  function = getattr(module, function_name, None)
  if not callable(function):
    raise InputError(
      f'the module {module_name} has no function {function_name}; name an existing one in '
      'method.external_reward'
    )
  return function


def _within(seconds: float, function: Callable):
  """function(), or TimeoutError; its thread then keeps running, as Python cannot stop threads."""
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
    f'{name} returned no rewards for {task} within {seconds:g} s; make it faster, or raise '
    'system.external_seconds'
  )


# A server.


def _asked_by_http(url: str, task: str, candidates, seconds: float, retries: int):
  parts = _parts(candidates)
  with concurrent.futures.ThreadPoolExecutor(REQUESTS, 'reward') as pool:
    asked = [pool.submit(_answer, url, task, part, seconds, retries) for part in parts]
    try:
      return [value for one in asked for value in one.result()]
    finally:
      pool.shutdown(wait=False, cancel_futures=True)


def _parts(candidates) -> list:
  """The candidates of each request; groups are not split. One empty request if there are none."""
  found: list[list[Candidate]] = [[]]
  for one in candidates:
    if one.candidate == 0 and len(found[-1]) >= AT_ONCE:
      found.append([])
    found[-1].append(one)
  return found


def _answer(url: str, task: str, candidates, seconds: float, retries: int) -> list:
  """The rewards for one request's candidates; retries a request that gets no answer."""
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
          f'{url} did not answer ({e}); start the server there, or fix '
          f'method.external_reward.{task}'
        ) from e
  rewards = answer.get('rewards') if isinstance(answer, dict) else None
  if not isinstance(rewards, list) or len(rewards) != len(candidates):
    found = f'{len(rewards)} rewards' if isinstance(rewards, list) else 'no list of rewards'
    raise InputError(
      f'{url} answered with {found} for {len(candidates)} candidates of {task}; return '
      '{"rewards": [...]} with one number per candidate, in order'
    )
  return rewards


def _request(task: str, candidates) -> dict:
  """The JSON of a request. An image that several candidates share appears once."""
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
        f'{url} answered {e.code} {e.reason} instead of rewards; fix method.external_reward, or '
        'the server there'
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
      f'{url} is not a valid address ({first_line(e)}); use http://HOST:PORT/PATH'
    ) from e
  if len(content) > MOST_BYTES:
    raise InputError(f'{url} answered with more than {MOST_BYTES} bytes; return only the rewards')
  try:
    return json.loads(content)
  except (ValueError, RecursionError) as e:
    raise InputError(
      f'the answer of {url} is not JSON ({first_line(e)}); return {{"rewards": [...]}}'
    ) from e


# Saved answers.


def digest(*arrays) -> str:
  """A digest of samples, to check whether a repeated step has the same samples."""
  found = hashlib.sha256()
  for array in arrays:
    found.update(np.ascontiguousarray(array))
  return found.hexdigest()


def path_of(workdir: str, step: int) -> str:
  """The path of the saved answers of a step."""
  return os.path.join(workdir, FOLDER, f'{step:06d}.json')


def kept(workdir: str, step: int) -> dict:
  """Reads a step's saved answers: {task: {'samples': their digest, 'rewards': B lists of G}}; empty
  if there are none. InputError for a damaged file.
  """
  path = path_of(workdir, step)
  found = files.read_json_or_none(path) or {}
  try:
    for one in found.values():
      one['samples'], np.asarray(one['rewards'], np.float32)
  except (TypeError, ValueError, LookupError, AttributeError) as e:
    raise InputError(
      f'cannot read {path} ({first_line(e)}), which should hold what the run wrote; restore it '
      'from a copy, or remove it to request the rewards of its step again'
    ) from e
  return found


def keep(workdir: str, step: int, answers: dict):
  """Saves a step's answers atomically; see `kept`."""
  path = path_of(workdir, step)
  os.makedirs(os.path.dirname(path), exist_ok=True)
  files.write_json(path, answers)


def equal_groups(rewards) -> int:
  """The number of groups in rewards (B, G) whose rewards are all equal: they give no gradient."""
  return int(np.sum(np.ptp(rewards, axis=1) == 0))
