"""What a run changed, from files that may be damaged."""

import json

import numpy as np
import pytest

from dsr_jax import effect
from dsr_jax.errors import InputError
from dsr_jax.scenes import sets

SIZES = {
  'generation': (12, 4),
  'description': (9, 8),
  'description_greedy': (9, 8),
  'yesno': (9, 6),
}


def write_run(folder, *, right, step=3):
  """A finished run of Scenes whose pictures are right by chance at first, then by `right`."""
  (folder / 'evaluations').mkdir(parents=True)
  rng = np.random.default_rng(0)
  for at, share in ((0, 0.5), (step, right)):
    rows = {name: rng.integers(1, 9, size).tolist() for name, size in SIZES.items()}
    rows['generation'] = (rng.random(SIZES['generation']) < share).astype(int).tolist()
    (folder / 'evaluations' / f'{at:06d}.json').write_text(json.dumps(rows))
  (folder / 'summary.json').write_text(json.dumps({'step': step}))
  return str(folder)


def test_an_effect_is_the_paired_difference(tmp_path):
  found = effect.effects([write_run(tmp_path / 'run', right=1.0)])[0]
  assert found.after == 1.0 and found.difference.value == pytest.approx(1.0 - found.before)


def test_combinations_are_told_apart_by_what_training_showed(tmp_path):
  """All images of prompts with new combinations become right, no others."""
  prompts = sets.evaluation_prompts(20)
  rows = {name: np.ones((9, columns)).tolist() for name, columns in effect.ROWS.items() if columns}
  new = [[float(sets.novelty(prompt.atoms) == 'new')] * 4 for prompt in prompts]
  run = tmp_path / 'run'
  (run / 'evaluations').mkdir(parents=True)
  for step, right in ((0, np.zeros((120, 4)).tolist()), (3, new)):
    content = json.dumps({**rows, 'generation': right})
    (run / 'evaluations' / f'{step:06d}.json').write_text(content)
  (run / 'summary.json').write_text(json.dumps({'step': 3}))
  found = {e.name: e.difference.value for e in effect.effects([str(run)])}
  assert found['generation, combinations never seen'] == 1
  assert found['generation, combinations of reinforcement only'] == 0
  assert found['generation, combinations seen in pretraining'] == 0


@pytest.mark.parametrize('harm', [b'', b'{', b'[1]', b'7', b'null', b'\xff\xfe', b'[' * 100_000])
@pytest.mark.parametrize('name', ['summary.json', 'evaluations/000000.json'])
def test_a_damaged_file_is_named(name, harm, tmp_path):
  run = write_run(tmp_path / 'run', right=1.0)
  (tmp_path / 'run' / name).write_bytes(harm)
  with pytest.raises(InputError, match=f'cannot read .*{name}'):
    effect.effects([run])


@pytest.mark.parametrize('name', ['summary.json', 'evaluations/000003.json'])
def test_a_missing_file_is_named(name, tmp_path):
  run = write_run(tmp_path / 'run', right=1.0)
  (tmp_path / 'run' / name).unlink()
  with pytest.raises(InputError, match=f'{name} does not exist'):
    effect.effects([run])


@pytest.mark.parametrize(
  'change',
  [
    {'generation': 'x'},
    {'generation': [[1, 2], [3]]},
    {'generation': [1, 2]},
    {'generation': [[1, 0, 1, 0]] * 11},
    {'yesno': [[1, 2, 3]] * 9},
    {'description': []},
    {'description': [[None] * 8] * 9},
    {'yesno': {'a': 1}},
  ],
)
def test_rows_that_are_none_are_named(change, tmp_path):
  run = write_run(tmp_path / 'run', right=1.0)
  path = tmp_path / 'run' / 'evaluations' / '000003.json'
  path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
  with pytest.raises(InputError, match='cannot read .*000003.json'):
    effect.effects([run])


@pytest.mark.parametrize('step', [None, '3', -1, 2.5, True])
def test_a_step_that_is_none_is_named(step, tmp_path):
  run = write_run(tmp_path / 'run', right=1.0)
  (tmp_path / 'run' / 'summary.json').write_text(json.dumps({'step': step}))
  with pytest.raises(InputError, match='cannot read .*summary.json'):
    effect.effects([run])


def test_runs_of_other_lists_are_not_compared(tmp_path):
  runs = [write_run(tmp_path / name, right=1.0) for name in 'ab']
  for step in (0, 3):
    path = tmp_path / 'b' / 'evaluations' / f'{step:06d}.json'
    rows = json.loads(path.read_text())
    path.write_text(json.dumps({**rows, 'yesno': rows['yesno'][:5]}))
  with pytest.raises(InputError, match='the evaluations in .*/b have other sizes'):
    effect.effects(runs)
