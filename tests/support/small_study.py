"""A study of two steps a cell: its flags, and what its files and records say."""

import json
import pathlib

from absl import flags
from places import ROOT
import pytest

from dsr_jax.study import __main__ as command

CONFIG = str(ROOT / 'configs' / 'scenes_study.py')
SMALL = {
  'config.run.method.steps': 2,
  'config.run.method.inputs_per_step': 4,
  'config.run.method.group_size': 4,
  'config.run.method.warmup_steps': 1,
  'config.run.method.separate.swap_every': 1,
  'config.run.method.max_text_tokens': 12,
  'config.run.system.eval_every': 1,
  'config.run.system.save_every': 1,
  'config.run.eval.prompts_per_task': 2,
  'config.run.eval.pictures': 4,
  'config.run.eval.quick_prompts_per_task': 1,
  'config.run.eval.quick_pictures': 2,
  'config.run.eval.chunk': 6,
  'config.tune.learning_rates': '(1e-3, 2e-3)',
  'config.tune.prompts_per_task': 1,
  'config.tune.pictures': 2,
  'config.tune.temperatures': '(0.5, 1.0)',
  'config.tune.guidances': '(1.0,)',
  'config.measure.many_prompts_per_task': 1,
  'config.measure.many': 2,
  'config.measure.scorer_inputs': 2,
  'config.measure.reward_inputs': 2,
  'config.seeds': 2,
  'config.control_seeds': 1,
  'config.clip.steps': 2,
  'config.clip.batch': 4,
}


def flag_values(**values):
  """The flags of the command; values: of flags and of keys of the config."""
  f = flags.FlagValues()
  command.define_flags(f)
  words = [
    'test',
    f'--config={CONFIG}',
    *(f'--{name}={value}' for name, value in {**SMALL, **values}.items()),
  ]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('sys.argv', words)  # where config flags look for overrides
    patch.syspath_prepend(str(ROOT))
    f(words)
  return f


def read(path):
  """JSON of a file."""
  return json.loads(pathlib.Path(path).read_text())


def states(records):
  """Of each cell: finished, failed or None."""
  return [r['state'] if r else None for r in records]
