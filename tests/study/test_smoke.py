"""The whole study on a tiny random model that lives in Scenes: few steps, short lists, every part
of it real.
"""

import contextlib
import dataclasses
import io
import json
import shutil

import jax
import numpy as np
import pytest
from small_study import flag_values, read

from dsr_jax import convert, train
from dsr_jax.convert import locate as model_source
from dsr_jax.models.janus import model as janus
from dsr_jax.runtime import metrics
from dsr_jax.scenes import render, sets
from dsr_jax.study import __main__ as study
from dsr_jax.study import design
from dsr_jax.study import gallery as study_gallery
from dsr_jax.study import scores as study_scores

ASKED = dict(variants='separate,base_best', seeds='0,1')
# Fewer and smaller programs.
SHORT = {
  'config.run.system.decode_segment': 64,
  'config.tune.temperatures': '(1.0,)',
  'config.tune.guidances': '(1.5,)',
}


def command(**values):
  """Runs the command in this process: (exit status, what it printed)."""
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    status = study.main(['test'], flag_values(**{**SHORT, **values}))
  return status, json.loads(out.getvalue())


@pytest.fixture(scope='module', autouse=True)
def here():
  """Short lists of prompts to draw from, few resamples, and the compile cache as it was."""
  kept = jax.config.jax_compilation_cache_dir
  caches = study_scores._cluster_counts, study_scores.seed_weights, sets.reinforcement_prompts
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sets, 'REINFORCEMENT_INPUTS', 24)
    patch.setattr(study_scores, 'RESAMPLES', 200)
    for cached in caches:
      cached.cache_clear()
    yield
  for cached in caches:
    cached.cache_clear()
  jax.config.update('jax_compilation_cache_dir', kept)


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """A model directory: random, tiny, with the tokenizer and the picture size of Scenes."""
  config = convert.read_config(model_source.EMBEDDED)[0]
  small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
  config = dataclasses.replace(
    config,
    text=dataclasses.replace(config.text, head_dim=16, **small),
    vision=dataclasses.replace(config.vision, patch_size=8, **small),
    vq=dataclasses.replace(
      config.vq,
      num_embeddings=32,
      latent_channels=32,
      base_channels=32,
      channel_multiplier=(1, 1, 1, 1),
    ),
  )  # 16 codes
  _, params = janus.create(config, 0)
  directory = tmp_path_factory.mktemp('base') / 'model'
  convert.save(str(directory), config, jax.tree.map(np.asarray, params), model_source.EMBEDDED)
  return directory


@pytest.fixture(scope='module')
def small(base, tmp_path_factory):
  """(folder, what the command printed)."""
  folder = tmp_path_factory.mktemp('study') / 'out'
  _, said = command(output=folder, **ASKED, bases=f'tiny={base}')
  return folder, said


# The whole command.


def test_every_cell_leaves_rows_and_the_tables_have_them(small):
  folder, said = small
  assert said['finished'] == said['cells'] == 1 + 2 + 1 and said['failed'] == said['waiting'] == 0
  tree = read(folder / 'results' / 'results.json')
  variants = tree['bases']['tiny']['variants']
  assert set(variants) == {'base', 'separate', 'base_best'} and variants['separate']['seeds'] == [
    0,
    1,
  ]
  for variant in ('separate', 'base_best'):
    for measure in (
      'generation',
      'generation_any',
      'description/f1',
      'description_greedy/hallucination',
      'yesno/f1',
      'extras',
    ):
      found = variants[variant][measure]
      assert len(found['by_seed']) == len(variants[variant]['seeds']) and 'difference' in found
      assert found['low'] <= found['value'] <= found['high']
  verdicts = {row['key']: row['verdict'] for row in tree['bases']['tiny']['claims']}
  assert set(verdicts.values()) == {'no data'}  # none is about these variants alone
  page = (folder / 'results' / 'README.md').read_text()
  for word in (
    'separate, SimPO',
    'base at its best',
    '### Claims',
    'no data',
    '![Gains of every variant](gains_tiny.svg)',
  ):
    assert word in page, word
  for name in page.split('](')[1:]:
    assert (folder / 'results' / name.split(')')[0]).exists(), name


def test_the_base_is_measured_once_and_is_the_first_evaluation_of_every_run(small):
  folder, _ = small
  rows = [
    read(folder / 'cells' / 'tiny' / v / f'seed_{s}' / 'evaluations' / '000000.json')
    for v in ('separate',)
    for s in (0, 1)
  ]
  own = read(folder / 'bases' / 'tiny' / 'evaluation.json')['rows']
  assert all(r == own for r in rows) and own == read(
    folder / 'cells' / 'tiny' / 'base' / 'seed_0' / 'evaluations' / '000000.json'
  )


def test_scorers_and_the_reward_are_measured(small):
  folder, _ = small
  rows = read(folder / 'cells' / 'tiny' / 'separate' / 'seed_1' / 'evaluations' / '000004.json')
  for task in ('generation', 'understanding'):
    live, frozen, partner = (
      np.array(rows[f'scorer_{task}_{s}']) for s in ('live', 'frozen', 'partner')
    )
    assert live.shape == frozen.shape == partner.shape == (2, 4)
    assert np.abs(live - frozen).max() > 1e-6 < np.abs(live - partner).max()
  reward = read(folder / 'rewards' / 'tiny' / 'dual.json')
  at_first = read(folder / 'bases' / 'tiny' / 'evaluation.json')['rows']
  assert at_first['scorer_generation_live'] == at_first['scorer_generation_frozen']
  assert np.allclose(
    reward['scorer_generation_reward'], at_first['scorer_generation_live'], atol=1e-4
  )  # the same inputs, keys and model


def test_the_same_command_runs_nothing_again_and_gives_the_same_tables(small, base):
  folder, said = small
  before = {p: p.stat().st_mtime_ns for p in (folder / 'cells').rglob('cell.json')}
  tables = read(folder / 'results' / 'results.json')
  again = command(output=folder, **ASKED, bases=f'tiny={base}')[1]
  assert again == said and before == {
    p: p.stat().st_mtime_ns for p in (folder / 'cells').rglob('cell.json')
  }
  assert read(folder / 'results' / 'results.json')['bases'] == tables['bases']


def test_a_cell_of_the_study_is_the_run_of_main(small, base):
  """The first step of each task in the ordinary loop, without padding to a common length and
  without shared programs.
  """
  folder, _ = small
  f = flag_values(**SHORT)
  plan = design.from_config(f.config, str(folder), [f'tiny={base}'])
  cell = next(c for c in plan.cells(['separate'], (1,), ['tiny']) if c.variant == 'separate')
  config = dataclasses.replace(
    cell.config, eval=dataclasses.replace(cell.config.eval, benchmark='none')
  )
  other = folder.parent / 'main'
  train.run(config, str(other))
  ours, theirs = metrics.read(cell.folder), metrics.read(other)
  for name in ('generation/reward_mean', 'understanding/reward_mean', 'loss'):
    assert ours[name][1][:1] == pytest.approx(theirs[name][1][:1], abs=1e-4), name


def test_seeds_side_by_side_leave_the_cells_that_they_leave_one_after_another(
  small, base, tmp_path
):
  folder, said = small
  other = tmp_path / 'out'
  shutil.copytree(folder, other)
  shutil.rmtree(other / 'cells' / 'tiny' / 'separate')
  assert command(output=other, **ASKED, bases=f'tiny={base}', lanes=2)[1] | {
    'output': 0,
    'results': 0,
  } == said | {'output': 0, 'results': 0}
  for seed in ('seed_0', 'seed_1'):
    mine, alone = (f / 'cells' / 'tiny' / 'separate' / seed for f in (other, folder))
    assert read(mine / 'cell.json')['lanes'] == 2 and 'lanes' not in read(alone / 'cell.json')
    names = [
      {
        str(p.relative_to(f))
        for p in f.rglob('*')
        if not {'events', 'checkpoints', '.lock'} & set(p.parts)
      }
      for f in (mine, alone)
    ]
    assert names[0] == names[1] and (mine / 'checkpoints').exists() == (
      alone / 'checkpoints'
    ).exists() == (seed == 'seed_0')
    curves, expected = metrics.read(mine), metrics.read(alone)
    assert curves.keys() == expected.keys()
    for name, (steps, values) in expected.items():
      assert curves[name][0] == steps, name
      if not name.startswith(metrics.UNREPEATABLE):
        np.testing.assert_allclose(curves[name][1], values, rtol=1e-4, atol=1e-4, err_msg=name)


def test_failures_are_found_and_shown_by_kind():
  scenes = sets.evaluation_scenes(study_gallery.LOOKED_AT)

  class Sampler:
    """Draws other scenes than those asked for, and says of every picture that there is a red
    square.
    """

    def pictures(self, params, prompts, samples, temperature, guidance, seed):
      return np.stack([[render.render(scenes[i % len(scenes)])] for i in range(len(prompts))])

    def texts(self, params, pixels, questions, temperature, seed):
      return ['there is a red square'] * len(pixels)

  class Subject:
    params, sampler = None, Sampler()

    class method:
      guidance = 1.0

  sheet = study_gallery.failures(Subject)
  assert sheet.height > 100 * study_gallery.EACH  # of invented things at least as many were found
