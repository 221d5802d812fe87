"""Commands on the second backbone: a short run of a random Show-o, and what reads it after."""

import json

import numpy as np
import pytest
from run_command import TINY, run
import scenes_showo
import small_study

from dsr_jax import config_loading, generate, train
from dsr_jax.convert import __main__ as convert
from dsr_jax.evaluate import __main__ as evaluate
from dsr_jax.probe import __main__ as probe
from dsr_jax.replay import __main__ as replay
from dsr_jax.runtime import metrics
from dsr_jax.study import __main__ as study

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  return scenes_showo.write(tmp_path_factory.mktemp('base'))


@pytest.fixture(scope='module')
def workdir(base, tmp_path_factory):
  """A run of two steps of both tasks, with an evaluation before and after."""
  folder = tmp_path_factory.mktemp('run') / 'out'
  config = config_loading.load(
    TINY,
    model=str(base),
    method__steps=2,
    method__objective='simpo',
    system__frozen_every=0,
    system__samples_every=2,
    system__eval_every=0,
    eval__watched=0,
  )
  train.run(config, str(folder))
  return folder


def test_a_run_learns_both_tasks_and_writes_its_report(workdir):
  curves = metrics.read(str(workdir))
  for name in ('reward_mean', 'loss', 'margin'):
    for task in ('generation', 'understanding'):
      steps, values = curves[f'{task}/{name}']
      assert steps == [1, 2] and np.isfinite(values).all(), (task, name)
  assert (workdir / 'report.html').stat().st_size > 0
  summary = json.loads((workdir / 'summary.json').read_text())
  assert {'before', 'after'} <= set(summary['evaluation']['description/f1'])


def test_a_replayed_step_has_the_numbers_of_the_run(workdir, tmp_path):
  said = run(replay, workdir=workdir, step=2, output=tmp_path)
  assert said['exact'] is True and not said['differences']


def test_the_probe_measures_both_rewards(base, tmp_path):
  said = run(probe, model=base, config=TINY, output=tmp_path, num_inputs=3)
  for task in ('generation', 'understanding'):
    assert said[task]['verdict'], task


def test_before_and_after_are_evaluated_on_the_same_lists(base, workdir, tmp_path):
  lists = ['scenes/geneval', 'scenes/descriptions']
  run(evaluate, model=f'{base},{workdir}', config=TINY, benchmarks=','.join(lists), output=tmp_path)
  found = json.loads((tmp_path / 'results.json').read_text())['benchmarks']
  assert list(found) == lists
  for name in lists:
    assert found[name]['scores'].keys() == found[name]['difference'].keys() > set()


def test_a_trained_model_is_exported_and_draws_what_the_run_draws(workdir, tmp_path):
  run(convert, source=workdir, target=tmp_path / 'model', format='showo')
  codes = []
  for name, model in (('run', workdir), ('exported', tmp_path / 'model')):
    output = tmp_path / name
    run(generate, model=model, prompt='a red disc', num_samples=2, cfg_weight=2, output=output)
    drawn = json.loads((output / 'samples.json').read_text())
    codes.append({sample['candidate']: sample['codes'] for sample in drawn['samples']})
  assert codes[0] == codes[1]


def test_the_study_compares_before_and_after(base, tmp_path):
  values = dict(variants='unified', seeds='0', bases=f'showo={base}', output=tmp_path)
  status = study.main(['test'], small_study.flag_values(**values))
  found = small_study.read(tmp_path / 'results' / 'results.json')
  unified = found['bases']['showo']['variants']['unified']
  assert not status and {'generation', 'description/f1'} <= set(unified)
