"""Lanes of the study: each is the run of its own seed and learning rate; a folder as a run alone
leaves it; one that fails, fails alone.
"""

import dataclasses
import os

import fake_run
import jax
import numpy as np
import pytest
from small_study import flag_values, read, states
import tiny_step

from dsr_jax import config as config_lib
from dsr_jax import sharding
from dsr_jax import state as state_lib
from dsr_jax.errors import InputError
from dsr_jax.models.unified import Text
from dsr_jax.rewards import scenes_judge as callback
from dsr_jax.runtime import checkpoints, metrics
from dsr_jax.scenes import world
from dsr_jax.step import StepOutput
from dsr_jax.study import bench as bench_lib
from dsr_jax.study import cells as cells_lib
from dsr_jax.study import design, runner
from dsr_jax.study import lanes as study_lanes

# Sums of a few hundred float32 products, in another order: some 1e-6 of numbers of size 1, found
# 1e-5 at most. Adam divides a gradient by its size: where there is next to none, rounding becomes a
# share of the learning rate, 1e-2; found 1e-5 at most in parameters, 1e-6 in moments. Between the
# runs of two seeds there are 2e-2.
METRIC, PARAMETER, MOMENT = 3e-5, 3e-5, 3e-6
APART = 500  # so many times the tolerance, at least, is what two seeds differ by
RATES = 1e-2, 3e-3
CASES = {
  'unified': {},
  'separate': dict(
    strategy='separate', separate=config_lib.Separate(swap_every=1), inputs_per_step=4
  ),
  'grpo of the judge': dict(objective='grpo', inner_updates=2, reward='judge', judge_accuracy=0.9),
}


@pytest.fixture(scope='module', autouse=True)
def here():
  """The compile cache as it was."""
  kept = jax.config.jax_compilation_cache_dir
  yield
  jax.config.update('jax_compilation_cache_dir', kept)


# The program.


def batch(method, step, seed, shared):
  """Of a seed, which has a learning rate of its own, and prompts of its own length."""
  made = tiny_step.batch(method.tasks_at(step), seed=10 * seed + step, shared=shared)
  half = made.generation
  if half is not None:
    prompt = Text(*(np.pad(x, [(0, 0), (0, seed)]) for x in half.prompt))
    half = half._replace(prompt=prompt)
  return made._replace(generation=half, learning_rate=np.float32(RATES[seed]))


@pytest.mark.parametrize('case', CASES)
def test_a_lane_is_the_run_of_its_seed_and_rate(case, monkeypatch):
  shared = {}
  if 'judge' in case:  # of pictures smaller than Scenes' own, by their colour
    monkeypatch.setattr(world, 'IMAGE_SIZE', 16)
    monkeypatch.setattr(
      callback,
      'verdicts_on_pictures',
      lambda pixels, *_: np.asarray(pixels, np.float32).mean((2, 3, 4)) / 255,
    )
    monkeypatch.setattr(
      callback,
      'verdicts_on_texts',
      lambda pixels, ids, *_: np.asarray(ids, np.float32).mean(-1) / 40,
    )
    shared = {'token_bytes': np.zeros(5, 'u1'), 'token_ends': np.zeros(5, 'i4')}
  method, system, steps = tiny_step.method(**CASES[case]), tiny_step.system(frozen_every=2), 3

  def at(seed):
    return lambda step: batch(method, step, seed, shared)

  alone = [tiny_step.run(method, system, steps, at(seed)) for seed in (0, 1)]
  with jax.set_mesh(sharding.make_mesh(system.mesh)):
    step = study_lanes.together(tiny_step.program(method, system))
    state = study_lanes.stacked_state(tiny_step.start(method, system) for _ in (0, 1))
    for i in range(steps):
      state, values, records = step(state, study_lanes.stacked([at(seed)(i) for seed in (0, 1)]))

  def far(a, b):
    return max(
      float(np.max(np.abs(x - y), initial=0))
      for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )

  for lane, other in ((0, 1), (1, 0)):
    mine = jax.device_get(study_lanes.state_of(state, lane))
    for part, tolerance in (('params', PARAMETER), ('opt_state', MOMENT)):
      assert far(getattr(mine, part), getattr(alone[lane][0], part)) < tolerance
      assert far(getattr(mine, part), getattr(alone[other][0], part)) > APART * tolerance
    assert mine.step == steps
    for part in ('fixed_params', 'ref_params'):
      assert far(getattr(mine, part), getattr(alone[lane][0], part)) == 0
    for name, value in alone[lane][1].items():
      np.testing.assert_allclose(values[name][lane], value, rtol=METRIC, atol=METRIC, err_msg=name)
    for task, record in alone[lane][2].items():
      for name in {'codes', 'text_ids', 'text_mask', 'chosen', 'rejected'} & set(record):
        np.testing.assert_array_equal(records[task][name][lane], record[name], err_msg=name)
    own = dataclasses.replace(method, learning_rate=RATES[lane])
    np.testing.assert_allclose(
      values['learning_rate'][lane], state_lib.learning_rate(own, steps - 1), rtol=1e-6
    )


# Which runs share a program.


@pytest.fixture(name='fake')
def _fake(tmp_path):
  plan = design.from_config(flag_values(**{'config.seeds': 3}).config, str(tmp_path))
  return plan, plan.cells(['unified', 'random'])


def test_neighbours_that_differ_in_seed_or_rate_alone_share_a_program(fake):
  plan, cells = fake

  def named(cells, most):
    return [
      [(cells[i].variant, cells[i].seed) for i in group]
      for group in study_lanes.groups(cells, most)
    ]

  base, seeds, control = [('base', 0)], [('unified', s) for s in (0, 1, 2)], [('random', 0)]
  assert named(cells, 8) == [base, seeds, control]
  assert named(cells, 2) == [base, seeds[:2], seeds[2:], control]
  assert named(cells, 1) == [base, *([s] for s in seeds), control]
  os.makedirs(os.path.join(cells[2].folder, 'checkpoints'))
  assert named(cells, 8) == [base, *([s] for s in seeds), control]
  tune = plan.tune_cells(['unified', 'grpo'])
  assert study_lanes.groups(tune, 8) == [[0, 1], [2, 3]]


def test_how_many_there_are_by_itself_or_as_asked(monkeypatch):
  assert study_lanes.number('auto') == 1 and study_lanes.number('5') == 5
  for asked in ('0', 'many', '-1', ''):
    with pytest.raises(InputError, match=f'--lanes is {asked};'):
      study_lanes.number(asked)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert study_lanes.number('auto') == study_lanes.MOST
  monkeypatch.setattr(jax, 'device_count', lambda: 4)
  assert study_lanes.number('auto') == study_lanes.number('1') == 1
  with pytest.raises(InputError, match='--lanes is 2, but .* there are 4; set --lanes=1'):
    study_lanes.number('2')


# The runner, with the fake step.


class FakeBench(bench_lib.Bench):
  """Runs the fake step; nan_seed: the seed whose loss is not a number in the second step."""

  def __init__(self, plan, nan_seed=None):
    builders = dataclasses.replace(fake_run.parts(), make_train_step=self._fake_train_step)
    super().__init__(plan, builders)
    self.nan_seed, self.programs = nan_seed, 0

  def model(self, name):
    return dataclasses.replace(super().model(name), config='sizes')

  def _fake_train_step(self, model, config, mesh, state):
    function = fake_run.parts().make_train_step(model, config, mesh, state).__wrapped__

    def step(state, batch):
      self.programs += 1
      state, values, records = function(state, batch)
      bad = (batch['seed'] == (9 if self.nan_seed is None else self.nan_seed)) & (state.step == 2)
      values = values | {'loss': jax.numpy.where(bad, jax.numpy.nan, values['loss'])}
      return StepOutput(state, values, records)

    return jax.jit(step, donate_argnums=0)

  def _make_batches(self, *args):
    return self._builders.make_batches(*args)  # the fake step's, which have no prompts

  def _evaluate(self, cell, state, step):
    return fake_run.parts().make_evaluator(cell.config, None)(state, step)

  def _untouched(self, cell):
    cells_lib.write_rows(cell, {'rows': [0]})


def files(folder):
  """Names of all files of a folder, events without the time in their names."""
  return sorted(
    {
      os.path.join(os.path.relpath(at, folder), name[:6] if name.startswith('events') else name)
      for at, _, names in os.walk(folder)
      for name in names
      if 'checkpoints' not in at
    }
  )


def test_lanes_leave_the_folders_and_the_checkpoint_of_runs_alone(fake, tmp_path):
  plan, cells = fake
  bench = FakeBench(plan)
  records = runner.run_cells(plan, cells, bench, most_lanes=8)
  assert states(records) == ['finished'] * 5 and [r.get('lanes') for r in records] == [
    None,
    3,
    3,
    3,
    None,
  ]
  other = dataclasses.replace(plan, directory=str(tmp_path / 'alone'))
  apart = other.cells(['unified', 'random'])
  runner.run_cells(other, apart, FakeBench(other))
  for mine, alone in zip(cells[1:4], apart[1:4]):
    together, single = files(mine.folder), files(alone.folder)
    assert [f for f in together if f != './.lock'] == [f for f in single if f != './.lock']
    assert os.path.isdir(os.path.join(mine.folder, 'checkpoints')) == os.path.isdir(
      os.path.join(alone.folder, 'checkpoints')
    )
    curves, expected = (metrics.read(cell.folder) for cell in (mine, alone))
    assert curves.keys() == expected.keys()
    for name in curves:
      assert curves[name][0] == expected[name][0], name
      if not name.startswith(metrics.UNREPEATABLE):
        np.testing.assert_allclose(curves[name][1], expected[name][1], rtol=1e-5, err_msg=name)
    for name in ('cell.json', 'summary.json', 'config.json'):
      assert set(read(os.path.join(mine.folder, name))) - {'lanes'} == set(
        read(os.path.join(alone.folder, name))
      )
  assert cells_lib.record_of(cells[2])['config'] == cells_lib.record_of(apart[2])['config']
  (mine, about, step), (single, about_single, step_single) = (
    checkpoints.load_trained(c[1].folder) for c in (cells, apart)
  )
  assert step == step_single == 2 and about == about_single
  np.testing.assert_allclose(mine['w'], single['w'], rtol=1e-5, atol=1e-6)


def test_a_run_that_fails_fails_alone_and_is_retried_alone(fake):
  plan, cells = fake
  records = runner.run_cells(plan, cells, FakeBench(plan, nan_seed=1), most_lanes=8)
  assert (
    states(records) == ['finished', 'finished', 'failed', 'finished', 'finished']
    and 'loss is nan at step 2' in records[2]['error']
  )
  assert states(runner.run_cells(plan, cells, FakeBench(plan), most_lanes=8)) == states(records)
  records = runner.run_cells(plan, cells, FakeBench(plan), retry=True, most_lanes=8)
  assert states(records) == ['finished'] * 5 and 'lanes' not in records[2]


def test_lanes_that_were_stopped_begin_again_and_finished_cells_stay(fake, monkeypatch):
  plan, cells = fake
  runner.run_cells(plan, cells[:2], FakeBench(plan))

  class Stop(study_lanes.StopSignals):
    """Asked for at the first step."""

    def __enter__(self):
      super().__enter__()
      self.requested = True
      return self

  monkeypatch.setattr(study_lanes, 'StopSignals', Stop)
  assert states(runner.run_cells(plan, cells, FakeBench(plan), most_lanes=8)) == [
    'finished',
    'finished',
    None,
    None,
    None,
  ]
  assert os.path.exists(os.path.join(cells[2].folder, metrics.FILE))
  monkeypatch.undo()
  records = runner.run_cells(plan, cells, FakeBench(plan), most_lanes=8)
  assert states(records) == ['finished'] * 5 and [r.get('lanes') for r in records] == [
    None,
    None,
    2,
    2,
    None,
  ]
  assert metrics.read(cells[2].folder)['loss'][0] == [1, 2]


def test_tuning_tries_its_rates_in_one_program(fake):
  plan, _ = fake
  cells, bench = plan.tune_cells(['generation']), FakeBench(plan)
  assert (
    states(runner.run_cells(plan, cells, bench, most_lanes=8)) == ['finished'] * 2
    and bench.programs == 1
  )
  assert [
    read(os.path.join(c.folder, 'cell.json'))['config']['method']['learning_rate'] for c in cells
  ] == [1e-3, 2e-3]
