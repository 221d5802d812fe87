"""The study's cells, and the files that they leave.

A cell is one training run (or one evaluation of the untouched base) in its own folder:

  DIR/cells/BASE/VARIANT/seed_S/   a run's workdir, with evaluations/STEP.json; cell.json once it
                                   has ended
  DIR/tune/VARIANT/lr_X/           the same, evaluated on the validation lists
  DIR/rewards/BASE/REWARD.json     how a reward orders samples of the base

`cell.json` says finished or failed. A cell without it is still to be run or resumed.
"""

import copy
import dataclasses
import os
import shutil

from dsr_jax import config as config_lib
from dsr_jax import files, saved_config
from dsr_jax.errors import InputError
from dsr_jax.runtime import workdir as workdir_lib
from dsr_jax.study.variants import TRAINED, VARIANTS

RECORD = 'cell.json'
KEPT_SEED = 0  # the seed whose last checkpoint is kept, for drawing images


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run of the study.

  Attributes:
    base: the base's name.
    variant: a key of `variants.VARIANTS`.
    seed: of the run.
    config: its whole configuration.
    folder: its workdir.
    split: the lists that it is evaluated on.
  """

  base: str
  variant: str
  seed: int
  config: config_lib.Config
  folder: str
  split: str = 'evaluation'

  @property
  def name(self) -> str:
    """A readable name."""
    rate = ''
    if self.split == 'validation':
      rate = f' learning rate {self.config.method.learning_rate:g}'
    return f'{self.base} {self.variant} seed {self.seed}{rate}'

  @property
  def last_step(self) -> int:
    """The step of its last evaluation."""
    return self.config.method.steps if VARIANTS[self.variant].kind == TRAINED else 0

  @property
  def keeps_checkpoint(self) -> bool:
    """Whether its last checkpoint is kept."""
    return self.split == 'evaluation' and self.seed == KEPT_SEED

  @property
  def identity(self) -> dict:
    """The settings that a finished cell must share to count as this one: neither the location of
    files nor how it is computed.
    """
    settings = saved_config.to_json(self.config)
    tree = {key: settings[key] for key in ('method', 'data', 'eval')} | {'split': self.split}
    clip_reward = tree['method']['clip_reward']
    clip_reward['model'] = bool(clip_reward['model'])
    return tree


def record_of(cell: Cell) -> dict | None:
  """cell.json, or None for a cell that has not ended.

  Raises:
    InputError: a finished cell has another configuration.
  """
  record = files.read_json_or_none(os.path.join(cell.folder, RECORD))
  if not record or record['state'] != 'finished':
    return record
  different = saved_config.differences(saved_config.completed(record['config']), cell.identity)
  if different:
    raise InputError(
      f'the finished cell {cell.folder} has another configuration (then -> now: '
      f'{"; ".join(different)}); restore that configuration, move the folder away, or choose '
      'another --output'
    )
  return record


def write_record(cell: Cell, record: dict):
  """Writes cell.json, which marks the cell as ended."""
  write_json(os.path.join(cell.folder, RECORD), record)


def rows_path(cell: Cell, step: int | None = None) -> str:
  """The rows of an evaluation, by default the last one."""
  step = cell.last_step if step is None else step
  return os.path.join(cell.folder, 'evaluations', f'{step:06d}.json')


def write_rows(cell: Cell, rows):
  """Writes the evaluation of a cell that trains nothing."""
  workdir_lib.write_evaluation(cell.folder, 0, rows)


def write_json(path, tree):
  """Writes a file of the study. Rejects NaN, so that a faulty score shows up at once and not in a
  table months later.
  """
  files.write_json(path, tree, indent=1, allow_nan=False)


def with_retry(cell: Cell):
  """Deletes a failed cell, so that it runs again from the start; its record is kept in
  earlier.json.
  """
  record = files.read_json_or_none(os.path.join(cell.folder, RECORD))
  path = os.path.join(cell.folder, 'earlier.json')
  earlier = (files.read_json_or_none(path) or []) + [copy.deepcopy(record)]
  shutil.rmtree(cell.folder)
  write_json(path, earlier)
