"""Short runs that each change one thing: what they change, and how they are compared."""

import dataclasses
import json
import re
import types

import numpy as np
import pytest

from benchmarks import levers
from dsr_jax import saved_config
from dsr_jax.errors import InputError
from dsr_jax.scenes import grammar

PER_TASK, PICTURES = 2, 12
SIZES = {'steps': 80, 'prompts_per_task': PER_TASK}


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
  (workdir / 'ended.json').write_text(json.dumps({**SIZES, 'core_seconds': 90}))
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


def test_runs_of_other_sizes_are_not_taken_for_those_asked_for(tmp_path):
  leave(tmp_path, 'plain', 0, (0.5, 0.6), (5, 6))
  workdir = levers.place(str(tmp_path), 'plain', 0)
  levers.check_same(workdir, levers.ended(workdir), SIZES)
  with pytest.raises(InputError, match='--steps=80'):
    levers.check_same(workdir, levers.ended(workdir), {**SIZES, 'steps': 160})


def test_seeds_that_are_no_numbers_are_refused_in_a_sentence():
  with pytest.raises(InputError, match='--seeds is 0,a'):
    levers.seeds_of(['0', 'a'])


def test_runs_are_evaluated_on_the_validation_lists_and_the_base_only_once(tmp_path, monkeypatch):
  calls = []

  class Lists:
    def __init__(self, config, processor, graphdef, split):
      self.split = split

    def run(self, params, step):
      calls.append((self.split, step))
      return {'generation/mean': step / 100}, {'generation': np.full((2, 3), step)}

  monkeypatch.setattr(levers, 'Evaluator', Lists)
  monkeypatch.setattr(levers.state_lib, 'policy_params', lambda state, family: None)
  config, cooler = (levers.config_of(x, 0, 80, 60) for x in ('plain', 'temperature_0.5'))
  model = types.SimpleNamespace(processor=None, graphdef=None, family=None)
  make = levers.builders(str(tmp_path), 'plain').make_evaluator
  made = [make(config, model) for _ in range(2)]
  first, again = (evaluate(None, 0) for evaluate in made)
  assert first == again and made[1](None, 80)[1] == {'generation': [[80] * 3] * 2}
  assert calls == [('validation', 0), ('validation', 80)]
  make(cooler, model)(None, 0)  # at another temperature, the base is another one
  control = levers.builders(str(tmp_path), 'plain_sampled_at_0.5').make_evaluator
  control(config, model)(None, 0)  # the same base as that of the cooler run
  assert calls[2:] == [('validation', 0)]
