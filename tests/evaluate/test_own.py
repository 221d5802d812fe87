"""A run on one's own prompts and pictures is measured on what it holds out of them, the same items
before and after, also where the lists change.
"""

import dataclasses
import json
import os
import signal
import types

import jax
import micro_parts
import numpy as np
from PIL import Image
from places import CONFIGS
import pytest
from run_command import Page

from dsr_jax import config_loading, sharding, train
from dsr_jax import state as state_lib
from dsr_jax.errors import InputError
from dsr_jax.evaluate import watched
from dsr_jax.report import same_items
from dsr_jax.runtime import metrics

LINES = [f'word{i} thing{i % 3}' for i in range(12)]
STEPS = 4


def write(folder):
  """Twelve prompts and twelve pictures."""
  (folder / 'prompts.txt').write_text('\n'.join(LINES))
  (folder / 'pictures').mkdir()
  for i in range(12):
    noise = np.random.default_rng(i).integers(0, 255, (20, 30, 3), np.uint8)
    Image.fromarray(noise).save(folder / 'pictures' / f'{i:02d}.png')


def config(folder, **changes):
  given = dict(
    data__prompts=str(folder / 'prompts.txt'),
    data__images=str(folder / 'pictures'),
    method__steps=STEPS,
    method__inputs_per_step=4,
    method__learning_rate=0.05,
    eval__images_per_prompt=2,
    system__eval_every=2,
    system__samples_every=0,
  )
  return config_loading.load(str(CONFIGS / 'scenes_tiny.py'), **given | changes)


def builders(taken, stop_at=None):
  """Of a real run of the micro model; taken: gets what is learned from."""
  real = micro_parts.real()

  def make_batches(*args):
    inner = real.make_batches(*args)

    def at(step):
      taken.extend(inner.texts_at(step))
      if step == stop_at:
        os.kill(os.getpid(), signal.SIGTERM)
      return inner.at(step)

    return types.SimpleNamespace(**{**vars(inner), 'at': at, 'texts_at': inner.texts_at})

  return dataclasses.replace(real, make_batches=make_batches)


def rows_of(workdir, step):
  return json.loads((workdir / 'evaluations' / f'{step:06d}.json').read_text())


def means(rows, items, name='watched_generation'):
  """The mean of the rows of some items, by hand."""
  return np.mean([rows[name][rows['watched_prompts'].index(item)] for item in items])


@pytest.fixture(scope='module')
def changed(tmp_path_factory):
  """(workdir, what was learned from, held-out prompts before and after): a run that was stopped
  after step 2, of whose lists then a held-out prompt and picture went, and others came.
  """
  folder = tmp_path_factory.mktemp('own')
  workdir, taken = folder / 'run', []
  write(folder)
  train.run(config(folder), str(workdir), builders(taken, stop_at=2))
  before = rows_of(workdir, 0)
  apart = [line for line in LINES if watched._hash(line.encode()) in before['watched_prompts']]
  lines = [line for line in LINES if line != apart[1]] + [f'new{i} thing' for i in range(40)]
  (folder / 'prompts.txt').write_text('\n'.join(lines))
  about = json.loads((workdir / 'config.json').read_text())['about']['data']
  held = about['held_out']['pictures'][0]
  for path in (folder / 'pictures').iterdir():
    if watched.hashlib.sha256(path.read_bytes()).hexdigest() == held:
      path.unlink()
  with pytest.raises(InputError, match='12 pictures -> 11; 12 prompts -> 51'):
    train.run(config(folder), str(workdir), micro_parts.real())
  train.run(config(folder), str(workdir), builders(taken), accept_changed_data=True)
  return workdir, taken, apart, [line for line in apart if line != apart[1]]


def test_own_files_are_measured_on_by_default(tmp_path):
  write(tmp_path)
  assert config(tmp_path).eval.benchmark == 'own'
  assert config(tmp_path, data__images='scenes').eval.benchmark == 'own'
  named = dict(data__images='scenes', data__prompts='scenes')
  assert config(tmp_path, **named).eval.benchmark == 'scenes'
  alone = dict(data__prompts='scenes', method__task='generation')
  assert config(tmp_path, **alone).eval.benchmark == 'scenes'
  assert config(tmp_path, eval__benchmark='none').eval.benchmark == 'none'
  for name in ('janus_pro_1b', 'janus_pro_7b', 'showo'):
    assert config_loading.load(name).eval.benchmark == 'own'


def test_a_run_never_learns_from_what_it_is_measured_on_also_with_changed_lists(changed):
  workdir, taken, apart, left = changed
  assert len(apart) == 4 and not set(taken) & set(apart)
  assert len(set(taken)) >= 8
  items = rows_of(workdir, STEPS)['watched_prompts']
  assert items == [watched._hash(line.encode()) for line in left]
  kept = json.loads((workdir / 'config.json').read_text())['about']['data']['held_out']
  assert len(kept['prompts']) == len(kept['pictures']) == 4  # one that comes back stays apart


def test_before_and_after_are_of_the_same_items_where_the_list_changed(changed):
  workdir, _, _, left = changed
  first, last = rows_of(workdir, 0), rows_of(workdir, STEPS)
  items = [watched._hash(line.encode()) for line in left]
  summary = json.loads((workdir / 'summary.json').read_text())['evaluation']
  one = summary['watched/reward_generation']
  assert one['items'] == '3 prompts'
  assert one['before'] == pytest.approx(means(first, items))
  assert one['after'] == pytest.approx(means(last, items))
  assert one['change_low'] <= one['after'] - one['before'] <= one['change_high']
  assert one['before'] != pytest.approx(np.mean(first['watched_generation']))
  assert summary['watched/reward_understanding']['items'] == '3 images'
  points, counted = same_items.curve(
    same_items.evaluations(str(workdir)), 'watched/entropy_generation'
  )
  assert [point.step for point in points] == [0, 2, 4] and counted == '3 prompts'
  expected = [means(rows_of(workdir, s), items, 'watched_entropy_generation') for s in (0, 2, 4)]
  assert [point.value for point in points] == pytest.approx(expected)


def test_the_page_shows_the_items_that_both_sides_have(changed):
  workdir, _, apart, left = changed
  page = Page((workdir / 'report.html').read_text())
  words = ' '.join(page.words)
  assert all(line in words for line in left)
  assert '4 prompts and 4 pictures of your own are held out' in words
  gone = next(line for line in apart if line not in left)
  assert gone not in words.split('Before and after: drawing')[1].split('The fixed list')[0]


def test_all_of_it_is_in_the_summary_and_the_metrics(changed):
  workdir, *_ = changed
  summary = json.loads((workdir / 'summary.json').read_text())['evaluation']
  curves = metrics.read(workdir)
  for name in watched.ROWS:
    assert {'before', 'after', 'change_low', 'change_high', 'items'} <= summary[name].keys(), name
    assert curves[f'eval/{name}'][0] == [0, 2, 4], name


def measured(folder, frozen_every, load=None):
  """What is measured of changed weights in a run with a copy of the initial model, or without."""
  cfg = config(folder, system__frozen_every=frozen_every)
  real = micro_parts.real()
  mesh = real.make_mesh(cfg.system.mesh)
  with jax.set_mesh(mesh):
    model, cfg = train.framed(real.load_model(cfg.model), cfg)
    batches = real.make_batches(cfg, model, mesh)
    state = real.init_state(model, cfg, mesh)
    watch = real.make_watcher(cfg, model, batches, load or real.load_model)
    moved = jax.tree.map(lambda x: 1.3 * x, state.params)
    assert (state.ref_params is None) == (frozen_every == 0)
    return watch(dataclasses.replace(state, params=moved), 1)


def test_without_a_copy_the_initial_model_is_loaded_again_for_the_measurement(tmp_path):
  write(tmp_path)
  with_copy, without = measured(tmp_path, 1), measured(tmp_path, 0)
  assert without.scores == with_copy.scores and 'watched/reward_generation' in without.scores

  def other(name):
    model = micro_parts.load(name)
    return dataclasses.replace(model, source={**model.source, 'fingerprint': 'e' * 64})

  with pytest.raises(
    InputError, match='the weights in scenes are not those that this run began with'
  ):
    measured(tmp_path, 0, other)


def test_adapters_need_no_copy():
  changes = dict(method__trainable='lora', system__frozen_every=0)
  cfg = config_loading.load(str(CONFIGS / 'scenes_tiny.py'), **changes)
  model = micro_parts.load()
  mesh = sharding.make_mesh(cfg.system.mesh)
  with jax.set_mesh(mesh):
    state = state_lib.init_state(model.params, model.family, cfg.method, cfg.system, mesh)
    found = state_lib.initial_params(model.params, state, model.family, cfg.method, cfg.system)
  assert found == {} and state.ref_params is None
