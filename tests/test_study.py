"""The study as a command: cells are run once, kept, gone on with; failed ones wait; a folder of another study is refused.

One tiny random model lives in Scenes; steps are few and lists short. What the runner does is tested with the fake step.
"""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import types

from absl import flags
import fake_run
import jax
import numpy as np
import pytest

from dsr_jax import config as config_lib
from dsr_jax import convert, model_source, rewards, study, study_cells, study_clip, study_scores
from dsr_jax.convert import clip as clip_files
from dsr_jax.errors import InputError
from dsr_jax.models import janus
from dsr_jax.study_variants import VARIANTS

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = str(ROOT / 'configs' / 'scenes_study.py')
SMALL = {
    'config.run.method.steps': 2, 'config.run.method.inputs_per_step': 4, 'config.run.method.group_size': 4, 'config.run.method.warmup_steps': 1,
    'config.run.method.swap_every': 1, 'config.run.method.max_text_tokens': 12, 'config.run.system.eval_every': 1,
    'config.run.system.save_every': 1, 'config.run.eval.prompts_per_task': 2, 'config.run.eval.pictures': 4,
    'config.run.eval.quick_prompts_per_task': 1, 'config.run.eval.quick_pictures': 2, 'config.run.eval.chunk': 6,
    'config.tune.learning_rates': '(1e-3, 2e-3)', 'config.tune.prompts_per_task': 1, 'config.tune.pictures': 2,
    'config.tune.temperatures': '(0.5, 1.0)', 'config.tune.guidances': '(1.0,)', 'config.measure.many_prompts_per_task': 1,
    'config.measure.many': 2, 'config.measure.scorer_inputs': 2, 'config.measure.reward_inputs': 2, 'config.seeds': 2,
    'config.control_seeds': 1, 'config.clip.steps': 2, 'config.clip.batch': 4, 'config.clip.width': 32, 'config.clip.layers': 1}


def flag_values(**values):
  f = flags.FlagValues()
  study.define_flags(f)
  words = ['test', f'--config={CONFIG}', *(f'--{name}={value}' for name, value in {**SMALL, **values}.items())]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('sys.argv', words)  # where config flags look for overrides
    patch.syspath_prepend(str(ROOT))
    f(words)
  return f


def command(**values):
  """Runs the command in this process: (exit status, what it printed)."""
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    status = study.main(['test'], flag_values(**values))
  return status, json.loads(out.getvalue())


def read(path):
  return json.loads(pathlib.Path(path).read_text())


@pytest.fixture(scope='module', autouse=True)
def here():
  """Short lists of prompts to draw from, few resamples, and the compile cache as it was."""
  kept = jax.config.jax_compilation_cache_dir
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('dsr_jax.scenes.sets.REINFORCEMENT_INPUTS', 24)
    patch.setattr(study_scores, 'RESAMPLES', 200)
    for cached in (study_scores._cluster_counts, study_scores.seed_weights):
      cached.cache_clear()
    yield
  for cached in (study_scores._cluster_counts, study_scores.seed_weights):
    cached.cache_clear()
  from dsr_jax.scenes import sets
  sets.reinforcement_prompts.cache_clear()
  jax.config.update('jax_compilation_cache_dir', kept)


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """A model directory: random, tiny, with the tokenizer and the picture size of Scenes."""
  config = convert.read_config(model_source.EMBEDDED)
  config = dataclasses.replace(
      config, text=dataclasses.replace(config.text, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, head_dim=16),
      vision=dataclasses.replace(config.vision, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2),
      vq=dataclasses.replace(config.vq, num_embeddings=32, latent_channels=32, base_channels=32))
  _, params = janus.create(config, 0)
  directory = tmp_path_factory.mktemp('base') / 'model'
  convert.save(str(directory), config, jax.tree.map(np.asarray, params), model_source.EMBEDDED)
  return directory


@pytest.fixture(scope='module')
def small(base, tmp_path_factory):
  """(folder, what the command printed) of a study of three variants, two seeds."""
  folder = tmp_path_factory.mktemp('study') / 'out'
  _, said = command(output=folder, variants='unified,separate,base_best,best_of_8', seeds='0,1', bases=f'tiny={base}')
  return folder, said


# The whole command.


def test_every_cell_leaves_rows_and_the_tables_have_them(small):
  folder, said = small
  assert said['finished'] == said['cells'] == 1 + 2 + 2 + 1 + 1 and said['failed'] == said['waiting'] == 0
  tree = read(folder / 'results' / 'results.json')
  variants = tree['bases']['tiny']['variants']
  assert set(variants) == {'base', 'unified', 'separate', 'base_best', 'best_of_8'} and variants['unified']['seeds'] == [0, 1]
  for variant in ('unified', 'separate'):
    for measure in ('generation', 'generation_any', 'description/f1', 'description_greedy/hallucination', 'yesno/f1', 'extras'):
      found = variants[variant][measure]
      assert len(found['by_seed']) == 2 and found['low'] <= found['value'] <= found['high'] and 'difference' in found
  assert 'generation_any' not in variants['best_of_8'] and 'generation_any' in variants['base_best']
  verdicts = {row['key']: row['verdict'] for row in tree['bases']['tiny']['claims']}
  assert verdicts['over_clip'] == 'no data' and verdicts['separate_generation'] != 'no data'
  page = (folder / 'results' / 'README.md').read_text()
  for word in ('unified, SimPO', 'separate, SimPO', '### Claims', 'not confirmed', '![Gains of every variant](gains_tiny.svg)'):
    assert word in page, word
  for name in page.split('](')[1:]:
    assert (folder / 'results' / name.split(')')[0]).exists(), name


def test_the_base_is_measured_once_and_is_the_first_evaluation_of_every_run(small):
  folder, _ = small
  rows = [read(folder / 'cells' / 'tiny' / v / f'seed_{s}' / 'evaluations' / '000000.json') for v in ('unified', 'separate') for s in (0, 1)]
  own = read(folder / 'bases' / 'tiny' / 'evaluation.json')['rows']
  assert all(r == own for r in rows) and own == read(folder / 'cells' / 'tiny' / 'base' / 'seed_0' / 'evaluations' / '000000.json')


def test_pictures_scorers_and_the_reward_are_measured(small):
  folder, _ = small
  assert sorted(os.listdir(folder / 'shown')) == [f'{p}_tiny.png' for p in ('candidates', 'failures', 'pictures', 'texts')]
  rows = read(folder / 'cells' / 'tiny' / 'separate' / 'seed_1' / 'evaluations' / '000004.json')
  for task in ('generation', 'understanding'):
    live, frozen, partner = (np.array(rows[f'scorer_{task}_{s}']) for s in ('live', 'frozen', 'partner'))
    assert live.shape == frozen.shape == partner.shape == (2, 4)
    assert np.abs(live - frozen).max() > 1e-6 < np.abs(live - partner).max()
  reward = read(folder / 'rewards' / 'tiny' / 'dual.json')
  at_first = read(folder / 'bases' / 'tiny' / 'evaluation.json')['rows']
  assert at_first['scorer_generation_live'] == at_first['scorer_generation_frozen']
  assert np.allclose(reward['scorer_generation_reward'], at_first['scorer_generation_live'], atol=1e-4)  # the same inputs, keys and model


def test_the_same_command_runs_nothing_again_and_gives_the_same_tables(small, base):
  folder, said = small
  before = {p: p.stat().st_mtime_ns for p in (folder / 'cells').rglob('cell.json')}
  tables = read(folder / 'results' / 'results.json')
  again = command(output=folder, variants='unified,separate,base_best,best_of_8', seeds='0,1', bases=f'tiny={base}')[1]
  assert again == said and before == {p: p.stat().st_mtime_ns for p in (folder / 'cells').rglob('cell.json')}
  assert read(folder / 'results' / 'results.json')['bases'] == tables['bases']


def test_a_cell_of_the_study_is_the_run_of_main(small, base):
  """The same configuration in the ordinary loop, without padding to a common length and without shared programs."""
  folder, _ = small
  f = flag_values(output=folder)
  plan = study.from_config(f.config, str(folder), [f'tiny={base}'])
  cell = next(c for c in plan.cells(['unified'], (1,), ['tiny']) if c.variant == 'unified')
  from dsr_jax import metrics, train
  config = dataclasses.replace(cell.config, eval=dataclasses.replace(cell.config.eval, benchmark='none'))
  other = folder.parent / 'main'
  train.run(config, str(other))
  ours, theirs = metrics.read(cell.folder), metrics.read(other)
  for name in ('generation/reward_mean', 'understanding/reward_mean', 'loss'):
    assert ours[name][1] == pytest.approx(theirs[name][1], abs=1e-4), name


def test_a_study_folder_of_another_config_is_refused_with_the_difference(small, base):
  folder, _ = small
  with pytest.raises(InputError, match=r'run|method.group_size: 4 -> 8'):
    command(output=folder, bases=f'tiny={base}', variants='unified', **{'config.run.method.group_size': 8})
  with pytest.raises(InputError, match=r"measure.many: 2 -> 3"):
    command(output=folder, bases=f'tiny={base}', variants='unified', **{'config.measure.many': 3})


def test_tuning_tries_the_same_grid_and_its_choice_is_used(base, tmp_path):
  status, said = command(output=tmp_path / 'out', variants='generation', bases=f'tiny={base}', tune=True)
  assert status == 0 and said['cells'] == 2
  chosen = said['tuning']['generation']
  assert set(chosen['scores']) == {'0.001', '0.002'} and chosen['score'] == max(chosen['scores'].values())
  plan = study.from_config(flag_values().config, str(tmp_path / 'out'), [f'tiny={base}'])
  rates = {c.variant: c.config.method.learning_rate for c in plan.cells(['generation', 'unified'], (0,), ['tiny'])}
  assert rates['generation'] == chosen['learning_rate'] and rates['unified'] == plan.run.method.learning_rate
  assert not list((tmp_path / 'out' / 'tune').rglob('checkpoints'))


# The plan.


def test_every_variant_is_a_valid_run_and_sees_as_many_inputs_of_a_task():
  plan = study.from_config(flag_values(**{'config.run.method.inputs_per_step': 32, 'config.run.method.group_size': 8}).config, 'nowhere')
  rewarded = {}
  for variant in VARIANTS:
    config = plan.cells([variant], (3,), ['scenes'])[-1].config
    m = config.method
    rewarded[variant] = m.inputs_per_task * sum('generation' in m.tasks_at(step) for step in range(m.steps))
    assert config.system.eval_every * 2 == m.steps
  assert rewarded['understanding'] == 0 and rewarded['grpo_tokens'] * 4 == rewarded['unified']
  assert {n for v, n in rewarded.items() if v not in ('understanding', 'grpo_tokens')} == {rewarded['unified']}


def test_tokens_that_learn_are_as_many_in_grpo_of_equal_tokens():
  from dsr_jax import losses
  plan = study.from_config(flag_values(**{'config.run.method.inputs_per_step': 32, 'config.run.method.group_size': 8}).config, 'nowhere')
  learn = {}
  for variant in ('unified', 'grpo', 'grpo_tokens'):
    m = plan.cells([variant], (0,), ['scenes'])[-1].config.method
    index, _ = losses.OBJECTIVES[m.objective].choose(np.arange(8.0)[None], m)
    learn[variant] = m.inputs_per_step * index.shape[1]
  assert learn['unified'] == learn['grpo_tokens'] and learn['grpo'] == 4 * learn['unified']


def test_seeds_and_bases_follow_the_plan_or_the_flags():
  plan = study.from_config(flag_values().config, 'nowhere', ['other=model'])
  where = lambda **how: [(c.base, c.variant, c.seed) for c in plan.cells(['unified', 'random'], **how) if c.variant != 'base']
  assert where() == [(b, 'unified', s) for b in ('scenes', 'other') for s in (0, 1)] + [('scenes', 'random', 0)]
  assert where(seeds=(7,), bases=['other']) == [('other', 'unified', 7), ('other', 'random', 7)]


def test_wrong_flags_are_one_sentence():
  for values, words in ((dict(variants='nothing', output='x'), "found the variant 'nothing'"), (dict(seeds='a', output='x'), 'found --seeds=a'),
                        (dict(seeds='-1', output='x'), 'from 0'), (dict(bases='none', output='x'), "found the base 'none'"), ({}, 'no --output'),
                        ({'output': 'x', 'config.run.method.group_size': 1}, 'group_size=1')):
    with pytest.raises(InputError, match=words):
      study.main(['test'], flag_values(**values))
  for argv, words in ((['--config=none.py'], 'no config file'), ([f'--config={CONFIG}', '--config.run.method.stepz=3'], 'unknown key')):
    with pytest.raises(InputError, match=words):
      study.check_flags(argv)
  study.check_flags([f'--config={CONFIG}', '--config.run.method.steps=3', '--tune'])


def test_a_folder_of_something_else_is_refused(tmp_path):
  (tmp_path / 'x.txt').write_text('x')
  plan = study.from_config(flag_values().config, str(tmp_path))
  with pytest.raises(InputError, match='found x.txt'):
    study.check_same_study(plan, {})


def test_a_base_with_other_weights_is_refused(tmp_path):
  plan = study.from_config(flag_values().config, str(tmp_path / 'new'))
  study.check_same_study(plan, {'scenes': 'a'})
  study.check_same_study(plan, {'scenes': 'a', 'second': 'b'})
  with pytest.raises(InputError, match="bases.second: 'b' -> 'c'"):
    study.check_same_study(plan, {'second': 'c'})


# The runner, with the fake step.


class FakeBench(study_cells.Bench):
  """Runs the fake step; fail: variants whose loss is not a number."""

  def __init__(self, plan, fail=()):
    super().__init__(plan, fake_run.parts())
    self.fail, self.ran = set(fail), []

  def _parts_of(self, cell):
    self.ran.append((cell.variant, cell.seed))
    return fake_run.parts(nan_at=1 if cell.variant in self.fail else None)

  def _untouched(self, cell):
    study_cells.write_rows(cell, {'rows': [0]})


@pytest.fixture(name='fake')
def _fake(tmp_path):
  plan = study.from_config(flag_values().config, str(tmp_path))
  return plan, plan.cells(['unified', 'random'])


def states(records):
  return [r['state'] if r else None for r in records]


def test_a_failed_cell_is_kept_reported_and_run_again_only_on_request(fake):
  plan, cells = fake
  assert [(c.variant, c.seed) for c in cells] == [('base', 0), ('unified', 0), ('unified', 1), ('random', 0)]
  bench = FakeBench(plan, fail=['unified'])
  records = study.run_cells(plan, cells, bench)
  assert states(records) == ['finished', 'failed', 'failed', 'finished'] and 'loss = nan at step 1' in records[1]['error']
  bench = FakeBench(plan)
  assert states(study.run_cells(plan, cells, bench)) == states(records) and bench.ran == []
  assert states(study.run_cells(plan, cells, bench, retry=True)) == ['finished'] * 4
  assert bench.ran == [('unified', 0), ('unified', 1)]
  assert 'nan' in read(os.path.join(cells[1].folder, 'earlier.json'))[0]['error']


def test_an_interrupted_cell_is_gone_on_with(fake, monkeypatch):
  plan, cells = fake
  bench = FakeBench(plan)
  run = study_cells.train.run

  def interrupted(config, workdir, parts):
    if config.method.seed == 1:
      raise KeyboardInterrupt
    return run(config, workdir, parts)

  monkeypatch.setattr(study_cells.train, 'run', interrupted)
  assert states(study.run_cells(plan, cells, bench)) == ['finished', 'finished', None, None]
  monkeypatch.undo()
  bench.ran.clear()
  assert states(study.run_cells(plan, cells, bench)) == ['finished'] * 4 and bench.ran == [('unified', 1), ('random', 0)]


def test_a_finished_cell_of_another_configuration_is_named(fake):
  plan, cells = fake
  study.run_cells(plan, cells[:2], FakeBench(plan))
  other = dataclasses.replace(cells[1], config=dataclasses.replace(
      cells[1].config, method=dataclasses.replace(cells[1].config.method, learning_rate=0.5)))
  with pytest.raises(InputError, match=r'method.learning_rate: 0.0001 -> 0.5'):
    study_cells.record_of(other)


def test_only_the_first_seed_keeps_its_checkpoint(fake):
  plan, cells = fake
  study.run_cells(plan, cells, FakeBench(plan))
  kept = [os.path.isdir(os.path.join(c.folder, 'checkpoints')) for c in cells[1:]]
  assert kept == [True, False, True]


def test_seeds_of_a_variant_share_one_program(fake):
  plan, cells = fake
  bench, made = study_cells.Bench(plan, fake_run.parts()), []
  parts = fake_run.parts()
  inner = parts.make_step

  def make_step(model, config, mesh):
    step = inner(model, config, mesh)
    return types.SimpleNamespace(lower=lambda state, batch: made.append(config.method.seed) or step.lower(state, batch))

  bench._parts = dataclasses.replace(parts, make_step=make_step)
  model = types.SimpleNamespace(config='sizes')
  for cell in cells[1:]:
    state, batch = {'params': {'w': np.zeros((64, 64), 'f4')}, 'frozen': {'w': np.zeros((64, 64), 'f4')}, 'opt_state': {
        'm': np.zeros((64, 64), 'f4')}, 'step': np.int32(0)}, {'seed': np.uint32(cell.seed), 'x': np.zeros((8, 64), 'f4')}
    bench._make_step(model, cell.config, None).lower(state, batch).compile()(jax.tree.map(jax.numpy.asarray, state), batch)
  assert made == [0, 0]  # one of `unified`, one of `random`


# The CLIP.


def test_the_clip_that_is_made_can_be_used_as_a_reward_and_reads_texts_as_it_learned_them(tmp_path):
  settings = flag_values().config.clip
  directory = study_clip.make(settings, 'scenes', str(tmp_path / 'clip'))
  from dsr_jax import processor as processor_lib
  from dsr_jax.scenes import sets
  processor = processor_lib.Processor.from_directory(model_source.EMBEDDED)
  _, ids = study_clip._batch(settings, processor, 0)
  captions = [sets.pretraining_example(settings.seed, study_clip.FIRST_EXAMPLE + i)[1] for i in range(settings.batch)]
  assert np.array_equal(ids, clip_files.encode(directory, captions))
  method = config_lib.Method(reward='clip', clip_model=directory, task='generation')
  assert rewards.REWARDS['clip'].load(method)['text_projection']['kernel'].shape == (32, 32)


def test_the_clip_learns_which_picture_belongs_to_which_text(tmp_path):
  import optax
  from dsr_jax.models import clip
  from dsr_jax import processor as processor_lib
  settings = flag_values(**{'config.clip.batch': 8}).config.clip
  config = study_clip.config_of(settings, processor_lib.Processor.from_directory(model_source.EMBEDDED))
  pixels, ids = study_clip._batch(settings, processor_lib.Processor.from_directory(model_source.EMBEDDED), 0)
  graphdef, params = clip.graphdef_of(config), clip.create(config)
  optimizer = optax.adam(3e-3)
  moments = optimizer.init(params)

  @jax.jit
  def step(params, moments):
    (_, right), grads = jax.value_and_grad(lambda p: study_clip.loss(graphdef, p, pixels, ids), has_aux=True)(params)
    updates, moments = optimizer.update(grads, moments, params)
    return optax.apply_updates(params, updates), moments, right

  for _ in range(60):
    params, moments, right = step(params, moments)
  assert right == 1.0
