"""Short runs that each change one thing: what they change, and how they are compared."""

import dataclasses
import json
import re

import numpy as np
import pytest

from benchmarks import levers
from dsr_jax import saved_config
from dsr_jax.scenes import grammar

PER_TASK, PICTURES = 2, 12


@pytest.mark.parametrize('lever', levers.LEVERS)
def test_a_lever_changes_the_method_alone_and_the_runs_are_comparable(lever):
  plain, other = (levers.config_of(name, 1, 80, 60) for name in (levers.PLAIN, lever))
  changed = {line.split(':')[0] for line in saved_config.differences(*map(tree, (plain, other)))}
  assert changed == {f'method.{key}' for key in levers.LEVERS[lever]}


def tree(config):
  return {'method': dataclasses.asdict(config.method), 'eval': dataclasses.asdict(config.eval)}


def leave(folder, lever, seed, generation, right):
  """A finished run: shares of right images before and after, and of right things of ten told."""
  workdir = folder / lever / f'seed_{seed}'
  (workdir / 'evaluations').mkdir(parents=True)
  (workdir / 'summary.json').write_text(json.dumps({'step': 80, 'finished': True}))
  (workdir / 'ended.json').write_text(json.dumps({'seconds': 60, 'core_seconds': 90}))
  for step, share, told in zip((0, 80), generation, right):
    images = np.zeros((PER_TASK * len(grammar.GENEVAL), 10))
    images[:, : round(10 * share)] = 1
    sums = np.zeros((PICTURES, 8))
    sums[:, 0], sums[:, 1:4] = told, 10
    rows = {
      'generation': images.tolist(),
      'description': sums.tolist(),
      'description_greedy': sums.tolist(),
      'yesno': np.ones((PICTURES, 6)).tolist(),
    }
    (workdir / 'evaluations' / f'{step:06d}.json').write_text(json.dumps(rows))


def test_the_table_compares_with_the_base_and_with_the_plain_run_of_the_same_seeds(tmp_path):
  for seed in (0, 1):
    leave(tmp_path, 'plain', seed, (0.5, 0.6), (5, 6))
  leave(tmp_path, 'plain', 2, (0.5, 0.9), (5, 6))  # a seed that the other one lacks
  for seed in (0, 1):
    leave(tmp_path, 'credit_early', seed, (0.5, 0.8), (5, 5))
  (tmp_path / 'simpo' / 'seed_0').mkdir(parents=True)  # still running
  plain, early = levers.table(tmp_path).splitlines()[2:]
  assert re.match(r'\| plain \| 3 \| \+20\.0 ', plain)
  assert re.match(r'\| credit_early \| 2 \| \+30\.0 .* \| \+20\.0 .*', early)
  assert early.endswith('| 1.5 |')
