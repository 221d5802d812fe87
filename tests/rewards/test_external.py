"""Rewards that a run asks for outside of its step: who is asked, what is kept, what is refused."""

import contextlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import micro_parts
import numpy as np
from places import ROOT
import pytest
from run_command import TINY
import tiny_step

from dsr_jax import asked_step, config_loading, rows, train
from dsr_jax.errors import InputError
from dsr_jax.replay import look, past_step
from dsr_jax.rewards import external, table
from dsr_jax.runtime import checkpoints, metrics

GROUP = 3


def judge(task, candidates):
  """Bright pictures; long texts."""
  if task == 'generation':
    return [float(one.picture.mean()) for one in candidates]
  return [len(one.text.split()) for one in candidates]


@pytest.fixture(name='asked', autouse=True)
def _asked(monkeypatch):
  """The module `judges` of somebody's own; yields what its function `count` was asked."""
  calls = []

  def count(task, candidates):
    calls.append((task, len(candidates)))
    return judge(task, candidates)

  def late(task, candidates):
    time.sleep(30)

  def broken(task, candidates):
    raise RuntimeError('no GPU\nin sight')

  own = types.SimpleNamespace(
    count=count,
    late=late,
    broken=broken,
    short=lambda task, candidates: [1.0],
    nan=lambda task, candidates: [1.0] * (len(candidates) - 1) + [float('nan')],
    words=lambda task, candidates: ['good'] * len(candidates),
    number=3,
    alike=lambda task, candidates: np.ones(len(candidates)),
  )
  monkeypatch.setitem(sys.modules, 'judges', own)
  monkeypatch.setattr(external, 'PAUSE_SECONDS', 0.0)
  return calls


CANDIDATES = [
  external.Candidate(i, j, 'a disc', np.full((4, 4, 3), 10 * i + j, np.uint8), None)
  for i in range(2)
  for j in range(GROUP)
]


@contextlib.contextmanager
def answering(answer):
  """A server on this machine; answer: request -> (status, body). Yields its address."""

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      asked = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
      status, body = answer(asked)
      self.send_response(status)
      self.end_headers()
      with contextlib.suppress(OSError):  # who asked has left
        self.wfile.write(body)

    def log_message(self, *args):
      """Nothing."""

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    yield f'http://127.0.0.1:{server.server_port}/score'
  finally:
    server.shutdown()
    server.server_close()


def rewards_of(asked):
  """What an honest server says: a picture's place in the request, times 10, plus the candidate."""
  return [10.0 * one['picture'] + one['candidate'] for one in asked['candidates']]


def honest(asked):
  return 200, json.dumps({'rewards': rewards_of(asked)}).encode()


# One question.


def test_a_function_and_an_address_are_asked_alike():
  assert external.ask('judges:count', 'generation', CANDIDATES, 5, 0).tolist() == [
    float(one.picture.mean()) for one in CANDIDATES
  ]
  with answering(honest) as url:
    found = external.ask(url, 'generation', CANDIDATES, 5, 0)
  # Six pictures, each there once.
  assert found.tolist() == [10.0 * i + i % GROUP for i in range(6)]


def test_groups_stay_whole_in_requests_and_a_shared_picture_is_sent_once(monkeypatch):
  monkeypatch.setattr(external, 'AT_ONCE', 4)
  seen = []

  def answer(asked):
    seen.append(asked)
    return honest(asked)

  picture = np.zeros((4, 4, 3), np.uint8)
  texts = [
    external.Candidate(i, j, 'what is it?', picture, f'{i} {j}')
    for i in range(3)
    for j in range(GROUP)
  ]
  with answering(answer) as url:
    assert len(external.ask(url, 'understanding', texts, 5, 0)) == 9
  assert sorted(len(asked['candidates']) for asked in seen) == [3, 6]
  assert [len(asked['pictures']) for asked in seen] == [1, 1]
  assert sorted(one['text'] for asked in seen for one in asked['candidates'])[0] == '0 0'


def test_a_server_that_fails_twice_is_asked_a_third_time():
  times = []

  def answer(asked):
    times.append(1)
    return honest(asked) if len(times) > 2 else (503, b'')

  with answering(answer) as url:
    assert external.ask(url, 'generation', CANDIDATES, 5, 2).shape == (6,)
    assert len(times) == 3
    times.clear()
    with pytest.raises(InputError, match='did not answer .*503'):
      external.ask(url, 'generation', CANDIDATES, 5, 1)


SAYS = {
  b'{"rewards": [1, 2]}': 'answered with 2 rewards for 6 candidates of generation; return',
  b'{"rewards": [1, 2, 3, 4, 5, NaN]}': 'the reward nan for candidate 2 of input 1',
  b'{"rewards": [1, 2, 3, 4, 5, "x"]}': 'that are not numbers .* return one number',
  b'{"rewards": [1, 2, 3, 4, 5, [6]]}': 'that are not numbers .* return one number',
  b'{"scores": []}': 'no list of rewards',
  b'[1, 2]': 'no list of rewards',
  b'<html>': 'the answer of .* is not JSON',
}


@pytest.mark.parametrize('body', SAYS)
def test_a_server_that_says_something_else_is_one_sentence(body):
  with answering(lambda asked: (200, body)) as url:
    with pytest.raises(InputError, match=SAYS[body]) as e:
      external.ask(url, 'generation', CANDIDATES, 5, 0)
  assert '\n' not in str(e.value) and '; return ' in str(e.value)


def test_a_wrong_address_and_a_late_answer_are_one_sentence():
  def late(asked):
    time.sleep(1)
    return honest(asked)

  with answering(late) as url:
    with pytest.raises(InputError, match=r'no rewards for generation within 0\.2 s; make it'):
      external.ask(url, 'generation', CANDIDATES, 0.2, 1)
  with pytest.raises(InputError, match='did not answer .*refused'):  # it is closed now
    external.ask(url, 'generation', CANDIDATES, 5, 1)
  with answering(lambda asked: (404, b'')) as url:
    with pytest.raises(InputError, match='answered 404'):
      external.ask(url, 'generation', CANDIDATES, 5, 5)
  for address in ('http://', 'http://127.0.0.1:99999/'):
    with pytest.raises(InputError, match='; use http://HOST|; start the server'):
      external.ask(address, 'generation', CANDIDATES, 5, 0)


FUNCTIONS = {
  'judges:short': r'of shape \(1,\) for 6 candidates',
  'judges:nan': 'judges:nan returned the reward nan for candidate 2 of input 1',
  'judges:words': 'that are not numbers',
  'judges:broken': r'failed on 6 candidates of generation \(RuntimeError: no GPU\)',
  'judges:late': r'judges:late returned no rewards for generation within 0\.2 s',
  'judges:number': 'no function number',
  'judges:nothing': 'no function nothing',
  'no_such_module_at_all:score': 'cannot import no_such_module_at_all',
  'judges': 'set it to module:function',
  'ftp://host/score': 'set it to module:function',
}


@pytest.mark.parametrize('source', FUNCTIONS)
def test_a_function_that_gives_something_else_is_one_sentence(source):
  with pytest.raises(InputError, match=FUNCTIONS[source]) as e:
    external.ask(source, 'generation', CANDIDATES, 0.2, 0)
  assert '\n' not in str(e.value)


# The configuration.


def test_a_term_that_nobody_answers_is_refused_and_one_of_a_single_task_covers_that_alone():
  with pytest.raises(InputError, match='has no source; set module:function'):
    tiny_step.load(method__reward='dual+external')
  with pytest.raises(InputError, match='external_reward.generation has no effect'):
    tiny_step.load(method__external_reward__generation='judges:count')
  with pytest.raises(InputError, match='task understanding'):
    tiny_step.load(method__reward='external', method__external_reward__generation='judges:count')
  config = tiny_step.load(
    method__reward='dual+0.5*external', method__external_reward__generation='judges:count'
  )
  assert table.asked(config.method, 'generation').weight == 0.5
  assert table.asked(config.method, 'understanding') is None
  with pytest.raises(InputError, match='is 0.0; set it to a number above 0'):
    tiny_step.load(system__external_seconds=0.0)


def test_who_is_not_there_is_found_before_any_work():
  method = tiny_step.load(
    method__reward='external',
    method__external_reward__generation='judges:count',
    method__external_reward__understanding='judges:nothing',
  ).method
  with pytest.raises(InputError, match='no function nothing'):
    external.check(method, 5, 0)


# Runs.


@pytest.fixture(name='inputs', scope='module')
def _inputs(tmp_path_factory):
  return micro_parts.write_inputs(tmp_path_factory.mktemp('inputs'))


def config_of(inputs, source='judges:count', **changes):
  settings = dict(
    model='micro',
    eval__benchmark='none',
    eval__watched=0,
    method__steps=3,
    method__group_size=GROUP,
    method__learning_rate=1e-3,
    method__reward='dual+0.5*external',
    method__external_reward__generation=source,
    method__external_reward__understanding=source,
    system__save_every=2,
    system__samples_every=1,
    system__eval_every=0,
    system__frozen_every=2,
  )
  return config_loading.load(TINY, **inputs | settings | changes)


@pytest.fixture(name='finished', scope='module')
def _finished(inputs, tmp_path_factory):
  """(config, workdir) of a run of three steps that asked `judges:count`."""
  own = types.SimpleNamespace(count=judge)
  folder = tmp_path_factory.mktemp('asked')
  config = config_of(inputs)
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sys.modules, 'judges', own)
    train.run(config, str(folder), micro_parts.real())
  return config, str(folder)


def groups(workdir, step, task, name):
  found = [row[name] for row in rows.read(workdir, step) if row['task'] == task]
  return np.array(found).reshape(-1, GROUP)


def test_what_came_back_is_part_of_the_reward_that_is_learned_from(finished):
  _, workdir = finished
  logged = metrics.read(workdir)
  for step in (1, 2, 3):
    kept = external.kept(workdir, step)
    for task in ('generation', 'understanding'):
      said = np.array(kept[task]['rewards'], np.float32)
      of_model = logged[f'{task}/reward/dual'][1][step - 1]
      mean = groups(workdir, step, task, 'reward').mean()
      assert logged[f'{task}/reward/external'][1][step - 1] == pytest.approx(said.mean(), rel=1e-5)
      assert f'{task}/reward/external_spread' in logged
      assert (groups(workdir, step, task, 'length') > 0).all()  # else it had the worst of its group
      assert mean == pytest.approx(of_model + 0.5 * said.mean(), rel=1e-4)
  # What is asked about is what was drawn and written.
  texts = groups(workdir, 3, 'understanding', 'text')
  words = [[len(text.split()) for text in group] for group in texts]
  np.testing.assert_array_equal(external.kept(workdir, 3)['understanding']['rewards'], words)


def test_the_initial_model_is_compared_on_the_same_sum(finished):
  """Before the first update both models are one, so both opinions are."""
  _, workdir = finished
  for task in ('generation', 'understanding'):
    rewards, frozen = (groups(workdir, 1, task, key) for key in ('reward', 'frozen_reward'))
    np.testing.assert_allclose(rewards, frozen, rtol=1e-5)


def test_without_a_weight_worth_naming_two_programs_learn_what_one_does(inputs, tmp_path, finished):
  """dual alone, in one program, against dual+external of 0 everywhere, in two."""
  sys.modules['judges'].zero = lambda task, candidates: np.zeros(len(candidates))
  one = config_of(
    inputs,
    method__reward='dual',
    method__external_reward__generation='',
    method__external_reward__understanding='',
  )
  train.run(one, str(tmp_path / 'one'), micro_parts.real())
  train.run(config_of(inputs, 'judges:zero'), str(tmp_path / 'two'), micro_parts.real())
  mine, other = metrics.read(tmp_path / 'one'), metrics.read(tmp_path / 'two')
  for name, (_, values) in mine.items():
    if not name.startswith(metrics.UNREPEATABLE):
      np.testing.assert_allclose(other[name][1], values, rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_replay_and_a_run_that_goes_on_never_ask_again(finished, inputs, asked, tmp_path):
  config, workdir = finished
  builders = micro_parts.real()
  with jax.set_mesh(builders.make_mesh(config.system.mesh)) as _:
    mesh = builders.make_mesh(config.system.mesh)
    model = builders.load_model(config.model)
    past = past_step.replay(builders, config, workdir, 2, mesh, model)
    _, lines = past_step.read_run(workdir)
    assert past_step.differences(lines[2], past.metrics) == {}
    asking = train.answers_of(config, model, workdir, asks=False)
    seen, _ = look.look(train.step_context(model, config), past.before, past.batch, **asking)
  np.testing.assert_array_equal(
    seen['generation'].rewards, groups(workdir, 2, 'generation', 'reward').astype(np.float32)
  )
  assert asked == []

  # Killed in step 3, after its rewards had come.
  other = tmp_path / 'run'
  with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:

    def killed(folder, step, answers, keep=external.keep):
      keep(folder, step, answers)
      if step == 3:
        raise KeyboardInterrupt

    patch.setattr(external, 'keep', killed)
    train.run(config_of(inputs), str(other), micro_parts.real())
  assert len(asked) == 6 and checkpoints.steps_in(str(other)) == [2]
  train.run(config_of(inputs), str(other), micro_parts.real())
  assert len(asked) == 6
  assert metrics.repeatable(other) == metrics.repeatable(workdir)


def test_candidates_that_are_not_those_of_the_run_are_not_given_its_rewards(finished):
  config, workdir = finished
  answers = asked_step.Answers(config, workdir, micro_parts.Words(), asks=False)
  with pytest.raises(InputError, match='no saved rewards for these candidates of step 2'):
    answers._said(2, {'generation': {'digest': 'another'}})


def test_steps_that_are_done_are_kept_when_nobody_answers(inputs, asked, tmp_path):
  def tired(task, candidates):
    if len(asked) == 2:
      raise RuntimeError('tired')
    return sys.modules['judges'].count(task, candidates)

  sys.modules['judges'].tired = tired
  config = config_of(inputs, 'judges:tired', system__save_every=50)
  with pytest.raises(InputError, match='RuntimeError: tired'):
    train.run(config, str(tmp_path), micro_parts.real())
  assert checkpoints.steps_in(str(tmp_path)) == [1]
  assert [line['step'] for line in metrics.repeatable(tmp_path)] == [1]
  sys.modules['judges'].tired = judge
  train.run(config, str(tmp_path), micro_parts.real())
  assert [line['step'] for line in metrics.repeatable(tmp_path)] == [1, 2, 3]


def test_groups_of_equal_rewards_raise_an_alarm(inputs, tmp_path, capfd):
  config = config_of(
    inputs,
    'judges:alike',
    method__steps=1,
    method__external_reward__understanding='',
  )
  train.run(config, str(tmp_path), micro_parts.real())
  said = capfd.readouterr().err
  number = config.method.inputs_per_task
  assert (
    f'all rewards of judges:alike are equal in {number} of {number} groups of generation' in said
  )
  assert 'external does not apply to understanding and is left out there' in said
  assert external.equal_groups(np.array([[1, 1], [1, 2], [0, 0]])) == 2


def test_the_first_process_asks_and_all_get_the_numbers_or_its_error(inputs, asked, tmp_path):
  config = config_of(inputs)
  said = []

  class First(asked_step.distributed.Team):
    def shared(self, value):
      said.append(json.loads(json.dumps(value)))
      return said[-1]

  class Second(asked_step.distributed.Team):
    processes, process = 2, 1

    def shared(self, value):
      return said.pop(0)

  samples = {
    'shape': (1, GROUP),
    'prompts': asked_step.Text(np.array([[9, 10]]), np.ones((1, 2), bool)),
    'pixels': np.random.default_rng(0).integers(0, 255, (1, GROUP, 4, 4, 3), np.uint8),
    'texts': None,
    'digest': 'd',
  }
  first, second = (
    asked_step.Answers(config, str(tmp_path), micro_parts.Words(), team)
    for team in (First(), Second())
  )
  found = first._together(lambda: first._said(1, {'generation': samples}))
  assert second._together(lambda: pytest.fail('asked')) == found
  assert len(asked) == 1 and os.listdir(tmp_path / external.FOLDER) == ['000001.json']
  with pytest.raises(asked_step.RewardsFailed, match='not numbers'):
    first._together(lambda: external.ask('judges:words', 'generation', CANDIDATES, 5, 0))
  with pytest.raises(asked_step.RewardsFailed, match='not numbers'):
    second._together(lambda: pytest.fail('asked'))


# Several processes.

OWN_REWARDS = """
import os

def bright(task, candidates):
  with open('asked', 'a') as f:
    f.write(f'{os.getpid()} {task} {len(candidates)}\\n')
  return [float(one.picture.mean()) / 255 for one in candidates]
"""


def start_run(folder, workdir, devices, *flags):
  """A real run of two steps with rewards from a function of one's own, as a process."""
  command = [sys.executable, '-m', 'dsr_jax.main', '--config=scenes_tiny', f'--workdir={workdir}']
  command += [f'--config.{key}' for key in SETTINGS]
  environment = {
    **{name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'},
    'PYTHONPATH': str(ROOT),
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
  }
  return subprocess.Popen(
    [*command, *flags],
    cwd=folder,
    env=environment,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
  )


SETTINGS = (
  'method.steps=2',
  'method.reward=dual+0.5*external',
  'method.external_reward.generation=own_rewards:bright',
  'eval.benchmark=none',
  'eval.watched=0',
  'system.samples_every=0',
  'system.frozen_every=0',
)


@pytest.mark.slow
def test_two_processes_ask_once_and_learn_what_one_process_learns(tmp_path):
  with socket.create_server(('localhost', 0)) as free:
    port = free.getsockname()[1]
  folders = [tmp_path / name for name in ('one', 'two')]
  for folder in folders:
    folder.mkdir()
    (folder / 'own_rewards.py').write_text(OWN_REWARDS)
  cluster = [f'--coordinator=localhost:{port}', '--processes=2', '--wait_seconds=300']
  two = [start_run(folders[1], 'run', 1, *cluster, f'--process={i}') for i in (0, 1)]
  one = start_run(folders[0], 'run', 2)
  for process in (*two, one):
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out[-3000:]
  asked = [folder.joinpath('asked').read_text().split() for folder in folders]
  for words in asked:
    assert words[1::3] == ['generation'] * 2 and words[2::3] == ['4', '4']  # 2 prompts, 2 each
    assert len(set(words[0::3])) == 1  # only the first process
  answers = [[external.kept(folder / 'run', step) for step in (1, 2)] for folder in folders]
  assert answers[0][0]['generation']['samples'] == answers[1][0]['generation']['samples']
  mine, other = (metrics.read(folder / 'run') for folder in folders)
  for name, (_, values) in mine.items():
    if not name.startswith(metrics.UNREPEATABLE):
      np.testing.assert_allclose(other[name][1], values, rtol=2e-3, atol=1e-4, err_msg=name)


def test_a_plan_or_a_study_of_such_a_run_is_refused():
  method = tiny_step.method(
    reward='external',
    task='generation',
    external_reward=config_loading.config_lib.ExternalReward(generation='judges:count'),
  )
  with pytest.raises(InputError, match='external reward, .* train_step .*; use asked_step'):
    tiny_step.run(method=method)
