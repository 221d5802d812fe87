"""The study's cells: what one is, and what is kept of it.

A cell is one training run (or one evaluation of the untouched base) in a folder of its own:

  DIR/cells/BASE/VARIANT/seed_S/   a run's workdir, with evaluations/STEP.json; cell.json once it
                                   has ended
  DIR/tune/VARIANT/lr_X/           the same, evaluated on the validation lists
  DIR/rewards/BASE/REWARD.json     how a reward orders samples of the base

`cell.json` says finished or failed; a folder without it is a cell to be run, or to go on with.
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
KEPT_SEED = 0  # the seed whose last checkpoint stays, for images


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run of the study.

  Attributes:
    base: the base's name.
    variant: a key of `variants.VARIANTS`.
    seed: of the run.
    config: its whole configuration.
    folder: its workdir.
    split: the lists it is evaluated on.
  """

  base: str
  variant: str
  seed: int
  config: config_lib.Config
  folder: str
  split: str = 'evaluation'

  @property
  def name(self) -> str:
    """For people."""
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
    """Whether the last one stays."""
    return self.split == 'evaluation' and self.seed == KEPT_SEED

  @property
  def identity(self) -> dict:
    """What must be the same for a finished cell to be this one: neither where files lie, nor how it
    is computed.
    """
    settings = saved_config.to_json(self.config)
    tree = {key: settings[key] for key in ('method', 'data', 'eval')} | {'split': self.split}
    clip_reward = tree['method']['clip_reward']
    clip_reward['model'] = bool(clip_reward['model'])
    return tree


def record_of(cell: Cell) -> dict | None:
  """cell.json, or None for a cell that has not ended.

  Raises:
    InputError: a finished one was configured otherwise.
  """
  record = files.read_json_or_none(os.path.join(cell.folder, RECORD))
  if not record or record['state'] != 'finished':
    return record
  different = saved_config.differences(saved_config.completed(record['config']), cell.identity)
  if different:
    raise InputError(
      f'found the cell {cell.folder} of another configuration (then -> now: '
      f'{"; ".join(different)}); expected the same; restore it, move that folder away, or choose '
      'another --output'
    )
  return record


def write_record(cell: Cell, record: dict):
  """cell.json: from now on the cell has ended."""
  write_json(os.path.join(cell.folder, RECORD), record)


def rows_path(cell: Cell, step: int | None = None) -> str:
  """The rows of an evaluation, of the last one by default."""
  step = cell.last_step if step is None else step
  return os.path.join(cell.folder, 'evaluations', f'{step:06d}.json')


def write_rows(cell: Cell, rows):
  """The evaluation of a cell that trains nothing."""
  workdir_lib.write_evaluation(cell.folder, 0, rows)


def write_json(path, tree):
  """A file of the study. A NaN among scores is a mistake to be seen at once, not in a table of
  months later.
  """
  files.write_json(path, tree, indent=1, allow_nan=False)


def with_retry(cell: Cell):
  """Forgets a failed cell, so that it is run again from its beginning; what went wrong stays in
  earlier.json.
  """
  record = files.read_json_or_none(os.path.join(cell.folder, RECORD))
  path = os.path.join(cell.folder, 'earlier.json')
  earlier = (files.read_json_or_none(path) or []) + [copy.deepcopy(record)]
  shutil.rmtree(cell.folder)
  write_json(path, earlier)
