"""The study's plan and runner, with the fake step: cells are run once, kept, gone on with; failed
ones wait; another study is refused.
"""

import dataclasses
import os
import pathlib
import types

import fake_run
import jax
import numpy as np
from places import ROOT
import pytest
from small_study import CONFIG, flag_values, read, states

from dsr_jax import config_loading, families, losses
from dsr_jax.configs import scenes_pretrain
from dsr_jax.errors import InputError
from dsr_jax.models.unified import Text
from dsr_jax.rewards import table as rewards
from dsr_jax.rollouts import Batch, GenerationBatch
from dsr_jax.state import TrainState
from dsr_jax.study import __main__ as command
from dsr_jax.study import bench as bench_lib
from dsr_jax.study import cells as cells_lib
from dsr_jax.study import design, runner
from dsr_jax.study import evaluate as study_evaluate
from dsr_jax.study.variants import TRAINED, VARIANTS
from tests.test_readme import flags_of, python_commands, source_of


@pytest.fixture(scope='module', autouse=True)
def here():
  """The compile cache as it was."""
  kept = jax.config.jax_compilation_cache_dir
  yield
  jax.config.update('jax_compilation_cache_dir', kept)


# The plan.


def test_every_variant_is_a_valid_run_and_sees_as_many_inputs_of_a_task():
  plan = design.from_config(
    flag_values(
      **{'config.run.method.inputs_per_step': 32, 'config.run.method.group_size': 8}
    ).config,
    'nowhere',
  )
  rewarded = {}
  for variant in VARIANTS:
    config = plan.cells([variant], (3,), ['scenes'])[-1].config
    m = config.method
    rewarded[variant] = m.inputs_per_task * sum(
      'generation' in m.tasks_at(step) for step in range(m.steps)
    )
    assert config.system.eval_every * 2 == m.steps
  assert rewarded['understanding'] == 0 and rewarded['grpo_tokens'] * 4 == rewarded['unified']
  assert {n for v, n in rewarded.items() if v not in ('understanding', 'grpo_tokens')} == {
    rewarded['unified']
  }


def test_tokens_that_learn_are_as_many_in_grpo_of_equal_tokens():
  plan = design.from_config(
    flag_values(
      **{'config.run.method.inputs_per_step': 32, 'config.run.method.group_size': 8}
    ).config,
    'nowhere',
  )
  learn = {}
  for variant in ('unified', 'grpo', 'grpo_tokens'):
    m = plan.cells([variant], (0,), ['scenes'])[-1].config.method
    index, _ = losses.OBJECTIVES[m.objective].choose(np.arange(8.0)[None], m)
    learn[variant] = m.inputs_per_step * index.shape[1]
  assert learn['unified'] == learn['grpo_tokens'] and learn['grpo'] == 4 * learn['unified']


def test_seeds_and_bases_follow_the_plan_or_the_flags():
  plan = design.from_config(flag_values().config, 'nowhere', ['other=model'])

  def where(**how):
    return [
      (c.base, c.variant, c.seed)
      for c in plan.cells(['unified', 'random'], **how)
      if c.variant != 'base'
    ]

  assert where() == [(b, 'unified', s) for b in ('scenes', 'other') for s in (0, 1)] + [
    ('scenes', 'random', 0)
  ]
  assert where(seeds=(7,), bases=['other']) == [('other', 'unified', 7), ('other', 'random', 7)]


def test_wrong_flags_are_one_sentence():
  for values, words in (
    (dict(variants='nothing', output='x'), "unknown variant 'nothing' in --variants"),
    (dict(seeds='a', output='x'), '--seeds is a; set it to whole numbers'),
    (dict(seeds='-1', output='x'), 'from 0'),
    (dict(bases='none', output='x'), "unknown base 'none' in --bases"),
    ({}, '--output is missing'),
    ({'output': 'x', 'config.run.method.group_size': 1}, 'group_size is 1'),
  ):
    with pytest.raises(InputError, match=words):
      command.main(['test'], flag_values(**values))
  for argv, words in (
    (['--config=none.py'], 'no config file'),
    (
      [f'--config={CONFIG}', '--config.run.method.stepz=3'],
      'has no key config.run.method.stepz; did you mean',
    ),
  ):
    with pytest.raises(InputError, match=words):
      config_loading.check_flags(argv)
  config_loading.check_flags([f'--config={CONFIG}', '--config.run.method.steps=3', '--tune'])


def test_a_study_folder_of_another_config_is_refused_with_the_difference(tmp_path):
  design.check_same_study(design.from_config(flag_values().config, str(tmp_path / 'new')), {})
  for key, words in (
    ('config.run.method.group_size', r'method.group_size: 4 -> 8'),
    ('config.measure.many', 'measure.many: 2 -> 8'),
  ):
    with pytest.raises(InputError, match=words):
      design.check_same_study(
        design.from_config(flag_values(**{key: 8}).config, str(tmp_path / 'new')), {}
      )
  more = design.from_config(
    flag_values(**{'config.seeds': 5, 'config.run.system.eval_every': 2}).config,
    str(tmp_path / 'new'),
  )
  design.check_same_study(more, {})  # more of the same, computed and watched otherwise


def test_a_folder_of_something_else_is_refused(tmp_path):
  (tmp_path / 'x.txt').write_text('x')
  plan = design.from_config(flag_values().config, str(tmp_path))
  with pytest.raises(InputError, match='contains x.txt'):
    design.check_same_study(plan, {})


def test_a_base_with_other_weights_is_refused(tmp_path):
  plan = design.from_config(flag_values().config, str(tmp_path / 'new'), ['second=somewhere'])
  design.check_same_study(plan, {'scenes': 'a'})
  design.check_same_study(plan, {'scenes': 'a', 'second': 'b'})
  with pytest.raises(InputError, match="bases.second: 'b' -> 'c'"):
    design.check_same_study(plan, {'second': 'c'})


# The runner, with the fake step.


class FakeBench(bench_lib.Bench):
  """Runs the fake step; fail: variants whose loss is not a number."""

  def __init__(self, plan, fail=()):
    super().__init__(plan, fake_run.parts())
    self.fail, self.ran = set(fail), []

  def _builders_of(self, cell):
    self.ran.append((cell.variant, cell.seed))
    return fake_run.parts(nan_at=1 if cell.variant in self.fail else None)

  def _untouched(self, cell):
    cells_lib.write_rows(cell, {'rows': [0]})


@pytest.fixture(name='fake')
def _fake(tmp_path):
  plan = design.from_config(flag_values().config, str(tmp_path))
  return plan, plan.cells(['unified', 'random'])


def test_a_failed_cell_is_kept_reported_and_run_again_only_on_request(fake):
  plan, cells = fake
  assert [(c.variant, c.seed) for c in cells] == [
    ('base', 0),
    ('unified', 0),
    ('unified', 1),
    ('random', 0),
  ]
  bench = FakeBench(plan, fail=['unified'])
  records = runner.run_cells(plan, cells, bench)
  assert (
    states(records) == ['finished', 'failed', 'failed', 'finished']
    and 'loss is nan at step 1' in records[1]['error']
  )
  bench = FakeBench(plan)
  assert states(runner.run_cells(plan, cells, bench)) == states(records) and bench.ran == []
  assert states(runner.run_cells(plan, cells, bench, retry=True)) == ['finished'] * 4
  assert bench.ran == [('unified', 0), ('unified', 1)]
  assert 'nan' in read(os.path.join(cells[1].folder, 'earlier.json'))[0]['error']


def test_an_interrupted_cell_is_gone_on_with(fake, monkeypatch):
  plan, cells = fake
  bench = FakeBench(plan)
  run = bench_lib.train.run

  def interrupted(config, workdir, builders):
    if config.method.seed == 1:
      raise KeyboardInterrupt
    return run(config, workdir, builders)

  monkeypatch.setattr(bench_lib.train, 'run', interrupted)
  assert states(runner.run_cells(plan, cells, bench)) == ['finished', 'finished', None, None]
  monkeypatch.undo()
  bench.ran.clear()
  assert states(runner.run_cells(plan, cells, bench)) == ['finished'] * 4 and bench.ran == [
    ('unified', 1),
    ('random', 0),
  ]


def test_a_finished_cell_of_another_configuration_is_named(fake):
  plan, cells = fake
  runner.run_cells(plan, cells[:2], FakeBench(plan))
  other = dataclasses.replace(
    cells[1],
    config=dataclasses.replace(
      cells[1].config, method=dataclasses.replace(cells[1].config.method, learning_rate=0.5)
    ),
  )
  with pytest.raises(InputError, match=r'method.learning_rate: 5e-05 -> 0.5'):
    cells_lib.record_of(other)


def test_tuning_tries_the_same_grid_and_its_choice_is_used(fake):
  plan, _ = fake
  cells = plan.tune_cells(['generation', 'base_best'])
  assert [(c.variant, c.config.method.learning_rate) for c in cells] == [
    ('generation', 1e-3),
    ('generation', 2e-3),
  ]
  assert not plan.tuning()

  class Bench(FakeBench):
    def _builders_of(self, cell):
      rows = {
        'generation': [[1, 0, cell.config.method.learning_rate > 1e-3]],
        'description': [[4, 3, 2, 6, 5, 1, 1, 0]],
      }
      return dataclasses.replace(
        fake_run.parts(),
        make_evaluator=lambda config, model: lambda state, step: ({'x': 0.0}, rows),
      )

  runner.run_cells(plan, cells, Bench(plan))
  chosen = plan.tuning()['generation']
  assert (
    chosen['scores'] == pytest.approx({'0.001': 1 / 3, '0.002': 2 / 3})
    and chosen['learning_rate'] == 2e-3
  )
  rates = {
    c.variant: c.config.method.learning_rate for c in plan.cells(['generation', 'unified'], (0,))
  }
  assert rates == {
    'base': plan.run.method.learning_rate,
    'generation': 2e-3,
    'unified': plan.run.method.learning_rate,
  }
  assert not list(pathlib.Path(plan.directory, 'tune').rglob('checkpoints'))


def test_some_variants_learn_at_the_rate_of_another_and_are_not_tuned(fake, monkeypatch):
  plan, _ = fake
  tuned = {c.variant for c in plan.tune_cells(VARIANTS)}
  others = {name for name, v in VARIANTS.items() if v.rate_of}
  assert not tuned & others and tuned | others == {
    name for name, v in VARIANTS.items() if v.kind == TRAINED
  }
  assert {VARIANTS[name].rate_of for name in others} <= tuned
  monkeypatch.setattr(
    plan, 'tuning', lambda: {'judge': {'learning_rate': 3e-3}, 'unified': {'learning_rate': 4e-3}}
  )
  rates = {
    c.variant: c.config.method.learning_rate
    for c in plan.cells(['grpo', 'grpo_rate', 'judge', 'judge_80'], (0,))
  }
  assert rates == {
    'base': plan.run.method.learning_rate,
    'grpo': plan.run.method.learning_rate,
    'grpo_rate': 4e-3,
    'judge': 3e-3,
    'judge_80': 3e-3,
  }


def test_tables_are_of_all_cells_that_ended_whatever_is_asked_for(fake):
  plan, cells = fake
  design.check_same_study(plan, {'scenes': 'a'})
  runner.run_cells(plan, cells, FakeBench(plan, fail=['random']))
  found = [(c.variant, c.seed) for c in plan.finished(plan.cells(['judge']))]
  assert found == [('base', 0), ('unified', 0), ('unified', 1), ('random', 0), ('judge', 0)]


def test_commands_of_the_page_are_ones_that_the_programs_know(monkeypatch):
  monkeypatch.chdir(ROOT)
  commands = list(python_commands((ROOT / 'docs' / 'study' / 'README.md').read_text()))
  assert {module for module, _ in commands} == {'dsr_jax.study', 'dsr_jax.pretrain'}
  for module, words in commands:
    assert {w[2:].partition('=')[0].partition('.')[0] for w in words} <= set(
      flags_of(source_of(module))
    )
    if module == 'dsr_jax.study':
      config_loading.check_flags(words)
    else:
      known = config_dict_keys(scenes_pretrain.get_config().to_dict())
      assert {w[2:].partition('=')[0] for w in words if '.' in w.partition('=')[0]} <= known


def config_dict_keys(tree, prefix='config'):
  """Dotted names of a nested dict's leaves."""

  def leaves(key, value):
    return (
      config_dict_keys(value, f'{prefix}.{key}') if isinstance(value, dict) else {f'{prefix}.{key}'}
    )

  return set().union(*(leaves(key, value) for key, value in tree.items()))


def test_only_the_first_seed_keeps_its_checkpoint(fake):
  plan, cells = fake
  runner.run_cells(plan, cells, FakeBench(plan))
  kept = [os.path.isdir(os.path.join(c.folder, 'checkpoints')) for c in cells[1:]]
  assert kept == [True, False, True]


def test_each_base_is_measured_with_its_own_tokenizer(fake, monkeypatch):
  plan, cells = fake

  def load(name):
    return families.Model(
      graphdef=None,
      params=None,
      config=None,
      processor=f'of {name}',
      source={},
      family=None,
      spec=types.SimpleNamespace(image_size=32),
    )

  monkeypatch.setattr(study_evaluate, 'Evaluator', lambda config, processor, *rest: processor)
  monkeypatch.setattr(
    study_evaluate,
    'Scorers',
    lambda graphdef, config, processor, *rest: types.SimpleNamespace(run=lambda *a: processor),
  )
  monkeypatch.setattr(bench_lib.train, 'framed', lambda model, config: (model, config))
  bench = bench_lib.Bench(plan, dataclasses.replace(fake_run.parts(), load_model=load))
  for name in ('one', 'two', 'one'):
    config = dataclasses.replace(cells[0].config, model=name)
    bench._params = {name: None}
    assert bench._evaluator(config, 'validation') == f'of {name}'
    assert bench._order(config, None, None) == f'of {name}'


def test_seeds_of_a_variant_share_one_program(fake):
  plan, cells = fake
  builders, made = fake_run.parts(), []

  def make_train_step(model, config, mesh, state):
    step = builders.make_train_step(model, config, mesh, state)
    return types.SimpleNamespace(
      lower=lambda state, batch: made.append(config.method.seed) or step.lower(state, batch)
    )

  bench = bench_lib.Bench(plan, dataclasses.replace(builders, make_train_step=make_train_step))
  model = types.SimpleNamespace(config='sizes')
  zeros = np.zeros((fake_run.SIZE, fake_run.SIZE), 'f4')
  for cell in cells[1:]:
    state = TrainState(
      step=np.int32(0), params={'w': zeros}, opt_state={'m': zeros}, fixed_params={'w': zeros}
    )
    batch = {'seed': np.uint32(cell.seed), 'x': np.zeros((8, fake_run.SIZE), 'f4')}
    step = bench._make_train_step(model, cell.config, None, state)
    step.lower(state, batch).compile()(jax.tree.map(jax.numpy.asarray, state), batch)
  assert made == [0, 0]  # one of `unified`, one of `random`


def test_batches_of_all_seeds_have_one_shape_and_carry_the_learning_rate():
  def text(*shape):
    return Text(np.ones(shape, 'i4'), np.ones(shape, bool))

  def at(step):
    extra = {'clip_ids': np.ones((2, 7), 'i4')}
    for name in ('other', 'negative'):
      extra |= {f'{name}_ids': np.ones((2, 3, 21), 'i4'), f'{name}_mask': np.ones((2, 3, 21), bool)}
    half = GenerationBatch(prompt=text(2, 13 + step), instruction=text(3), extra=extra)
    return Batch(seed=np.uint32(step), generation=half if step < 9 else None)

  inner = types.SimpleNamespace(at=at, fingerprint='f')
  batches = bench_lib._SamePrograms(inner, 0.25)
  assert batches.fingerprint == 'f'
  for step in (0, 7):
    batch = batches.at(step)
    assert batch.learning_rate == np.float32(0.25) and batch.seed == step
    half = batch.generation
    assert half.prompt.ids.shape == half.prompt.mask.shape == (2, 20)
    assert half.prompt.mask.sum() == 2 * (13 + step) == half.prompt.ids.sum()
    assert half.instruction.ids.shape == (3,) and half.extra['clip_ids'].shape == (2, 7)
    for name in ('other', 'negative'):
      assert half.extra[f'{name}_ids'].shape == half.extra[f'{name}_mask'].shape == (2, 3, 40)
      assert half.extra[f'{name}_mask'].sum() == 2 * 3 * 21
  assert batches.at(9).generation is None


# The CLIP.


def test_the_clip_is_made_once_and_can_be_a_reward(tmp_path):
  plan = design.from_config(flag_values().config, str(tmp_path))
  runner.make_clip(plan)
  made = {p: p.stat().st_mtime_ns for p in (tmp_path / 'clip').iterdir()}
  runner.make_clip(plan)
  assert made == {p: p.stat().st_mtime_ns for p in (tmp_path / 'clip').iterdir()}
  config = next(c.config for c in plan.cells(['clip'], (0,)) if c.variant == 'clip')
  weights = rewards.REWARDS['clip'].load(config.method)
  assert (
    config.method.clip_reward.model == plan.clip_path
    and np.isfinite(weights['text_projection']['kernel']).all()
  )
