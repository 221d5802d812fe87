"""Rows of a run: every candidate, as others read them, and as a replay makes them again."""

import dataclasses
import io
import os

import datasets
import jax
import micro_parts
import numpy as np
import pandas
from PIL import Image
import pytest
from run_command import TINY

from dsr_jax import config_loading, rows, train
from dsr_jax.errors import InputError
from dsr_jax.replay import look, past_step
from dsr_jax.runtime import metrics

GROUP = 3


def config_of(**changes):
  settings = dict(
    model='micro',
    eval__benchmark='none',
    eval__watched=2,
    eval__images_per_prompt=2,
    method__steps=3,
    method__group_size=GROUP,
    method__learning_rate=1e-3,
    system__save_every=2,
    system__samples_every=1,
    system__eval_every=2,
    system__frozen_every=2,
  )
  return config_loading.load(TINY, **settings | changes)


@pytest.fixture(name='finished', scope='module')
def _finished(tmp_path_factory):
  """(config, workdir) of a run of three steps on somebody's own prompts and pictures."""
  folder = tmp_path_factory.mktemp('rows')
  config = config_of(**micro_parts.write_inputs(folder))
  train.run(config, str(folder / 'run'), micro_parts.real())
  return config, str(folder / 'run')


def test_every_step_that_is_due_has_rows_of_all_its_candidates(finished):
  config, workdir = finished
  assert rows.steps_of(workdir) == [1, 2, 3]
  for step in (1, 2, 3):
    found = rows.read(workdir, step)
    per_task = config.method.inputs_per_task * GROUP
    assert [row['task'] for row in found] == ['generation'] * per_task + [
      'understanding'
    ] * per_task
    assert {row['step'] for row in found} == {step}
    logged = metrics.read(workdir)
    for task in ('generation', 'understanding'):
      rewards = np.array([row['reward'] for row in found if row['task'] == task], np.float32)
      mean = logged[f'{task}/reward_mean'][1][step - 1]
      assert rewards.mean() == pytest.approx(mean, rel=1e-6)
      for i in range(config.method.inputs_per_task):
        group = [r for r in found if r['task'] == task and r['input'] == i]
        values = [r['reward'] for r in group]
        chosen, rejected = (
          [r['candidate'] for r in group if r[key]] for key in ('chosen', 'rejected')
        )
        if max(values) > min(values):
          assert chosen == [int(np.argmax(values))] and rejected == [int(np.argmin(values))]
        else:
          assert not chosen and not rejected
    # The initial model scores every other step, the first among them.
    assert all((row['frozen_reward'] is None) == (step == 2) for row in found)


def test_rows_equal_what_a_replay_of_the_step_samples_and_scores(finished):
  config, workdir = finished
  builders = micro_parts.real()
  mesh = builders.make_mesh(config.system.mesh)
  with jax.set_mesh(mesh):
    model = builders.load_model(config.model)
    past = past_step.replay(builders, config, workdir, 3, mesh, model)
    ctx = train.step_context(model, config)
    seen, _ = look.look(ctx, past.before, past.batch)
  found = rows.read(workdir, 3)
  for task, one in seen.items():
    mine = [row for row in found if row['task'] == task]
    rewards = np.array([row['reward'] for row in mine], np.float32).reshape(one.rewards.shape)
    np.testing.assert_array_equal(rewards, one.rewards)
    if task == 'generation':
      codes = np.array([row['codes'] for row in mine]).reshape(one.samples.shape)
      np.testing.assert_array_equal(codes, one.samples)
      assert all(row['length'] == codes.shape[-1] for row in mine)
    else:
      ids = [ids[mask] for group in zip(*one.samples) for ids, mask in zip(*group)]
      for row, sampled in zip(mine, ids):
        ended = len(sampled) and sampled[-1] == model.spec.eos_id
        assert row['tokens'] == sampled[: len(sampled) - int(ended)].tolist()
        assert row['length'] == len(row['tokens'])
        assert row['text'] == model.processor.decode(row['tokens'])


def test_pandas_and_datasets_read_a_folder_of_rows(finished):
  _, workdir = finished
  table = pandas.read_parquet(os.path.join(workdir, rows.FOLDER))
  assert len(table) == sum(len(rows.read(workdir, step)) for step in (1, 2, 3))
  best = table[table.chosen].groupby('task').reward.mean()
  assert (best >= table.groupby('task').reward.mean()).all()
  loaded = datasets.load_dataset(
    'parquet',
    data_files=os.path.join(workdir, rows.FOLDER, '*.parquet'),
    split='train',
    cache_dir=os.path.join(workdir, 'cache'),
  )
  assert len(loaded) == len(table) and isinstance(loaded[0]['picture'], Image.Image)
  first = rows.read(workdir, 1)[0]
  pixels = np.asarray(Image.open(io.BytesIO(first['picture']['bytes'])))
  np.testing.assert_array_equal(np.asarray(loaded[0]['picture']), pixels)


def test_a_picture_that_a_whole_group_has_is_stored_about_once(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 255, (1, 96, 96, 3), np.uint8)

  def bytes_of(group):
    one = rows.Candidates(
      task='understanding',
      prompts=['what?'],
      codes=np.zeros((1, 4), np.int32),
      pixels=pixels,
      rewards=np.zeros((1, group)),
      texts=[['a'] * group],
      tokens=[[[1]] * group],
    )
    rows.write(str(tmp_path), 1, rows.table(1, [one]))
    return os.path.getsize(rows.path_of(str(tmp_path), 1))

  assert bytes_of(8) < 1.3 * bytes_of(1)


def test_a_run_that_goes_on_leaves_each_step_once(finished, tmp_path):
  """Stopped after step 3, the last checkpoint being of step 2; what came later is made again."""
  config, workdir = finished
  folder = tmp_path / 'again'
  inputs = dict(data__prompts=config.data.prompts, data__images=config.data.images)
  made = micro_parts.real()
  with pytest.raises(InputError):
    train.run(config_of(**inputs), str(folder), stops_at(made, 3))
  rows.write(str(folder), 3, rows.table(3, []))  # of a step that no checkpoint has
  train.run(config_of(**inputs), str(folder), micro_parts.real())
  for kind, steps in ((rows.FOLDER, [1, 2, 3]), (rows.WATCHED, [0, 2, 3])):
    assert rows.steps_of(str(folder), kind) == rows.steps_of(workdir, kind) == steps
    for step in steps:
      assert rows.read(str(folder), step, kind) == rows.read(workdir, step, kind)
  assert metrics.repeatable(str(folder)) == metrics.repeatable(workdir)


def stops_at(made, step):
  """Builders whose loss is NaN at a step."""

  def make_train_step(model, config, mesh, state):
    inner = made.make_train_step(model, config, mesh, state)

    def broken(state, batch):
      out = inner(state, batch)
      at = out.state.step == step
      return out._replace(
        metrics={**out.metrics, 'loss': jax.numpy.where(at, jax.numpy.nan, out.metrics['loss'])}
      )

    return jax.jit(broken, donate_argnums=0)

  return dataclasses.replace(made, make_train_step=make_train_step)


def test_the_fixed_list_is_the_same_at_every_step_and_scored_by_the_initial_model(finished):
  config, workdir = finished
  first, last = (rows.read(workdir, step, rows.WATCHED) for step in (0, 3))
  for name in ('task', 'input', 'candidate', 'prompt'):
    assert [row[name] for row in first] == [row[name] for row in last]
  drawn = [row for row in first if row['task'] == 'generation']
  assert len(drawn) == 2 * 2 and {row['input'] for row in drawn} == {0, 1}
  told = [(a, b) for a, b in zip(first, last) if a['task'] == 'understanding']
  assert all(a['picture'] == b['picture'] and a['codes'] == b['codes'] for a, b in told)
  # Before training the initial model is the policy: so its mean is the score of its own samples.
  curves = metrics.read(workdir)
  for task in ('generation', 'understanding'):
    mean = np.mean([row['reward'] for row in first if row['task'] == task])
    assert curves[f'eval/watched/reward_{task}'][1][0] == pytest.approx(mean, rel=1e-6)


def test_a_damaged_file_of_rows_is_one_sentence(tmp_path):
  (tmp_path / 'rows').mkdir()
  (tmp_path / 'rows' / '000001.parquet').write_bytes(b'PAR1 no')
  with pytest.raises(InputError, match='it is not a Parquet file'):
    rows.read(str(tmp_path), 1)
