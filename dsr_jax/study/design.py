"""The cells of a study: variants x seeds x bases, and the grid of learning rates for tuning."""

import dataclasses
import glob
import os
from typing import Any

from dsr_jax import config as config_lib
from dsr_jax import config_loading, files, saved_config
from dsr_jax.errors import InputError
from dsr_jax.study.cells import KEPT_SEED, RECORD, Cell, record_of, rows_path
from dsr_jax.study.scores import validation_scores
from dsr_jax.study.variants import CONTROL, PAPER, TRAINED, VARIANTS, reward_key, run_config

GROUPS = {'run', 'bases', 'seeds', 'control_seeds', 'tune', 'measure', 'clip'}  # of the config


@dataclasses.dataclass
class Study:
  """A requested study and its folder.

  Attributes:
    directory: the study's folder.
    run: the run configuration that each variant changes a little.
    bases: {name: model}.
    seeds, control_seeds: the number of seeds of the paper's variants, and of the others.
    tune, measure, clip: groups of the config.
    settings: what must be the same when the study is resumed.
    command: as the user wrote it, for the page.
  """

  directory: str
  run: config_lib.Config
  bases: dict[str, str]
  seeds: int
  control_seeds: int
  tune: Any
  measure: Any
  clip: Any
  settings: dict
  command: str = ''

  # Cells.

  def cells(self, variants, seeds=None, bases=None) -> list[Cell]:
    """All cells of the variants (and of the base, which all of them need), in order.

    seeds, bases: the requested ones, or None for those of the config.
    """
    tuned = self._rates()
    out = []
    for variant in dict.fromkeys(('base', *variants)):
      for base in self._bases(variant, bases):
        for seed in self._seeds(variant, seeds):
          out.append(self._cell(base, variant, seed, tuned.get(variant)))
    return out

  def finished(self, besides=()) -> list[Cell]:
    """`besides`, and all other cells in this folder that have ended, requested now or not."""
    tuned = self._rates()
    known = {cell.folder for cell in besides}
    models = self.models()
    cells = list(besides)
    pattern = os.path.join(
      glob.escape(self.directory), 'cells', '*', '*', 'seed_*', glob.escape(RECORD)
    )
    for path in sorted(glob.glob(pattern)):
      folder = os.path.dirname(path)
      base, variant, seed = folder.split(os.sep)[-3:]
      if folder not in known and variant in VARIANTS and base in models:
        cells.append(self._cell(base, variant, int(seed.removeprefix('seed_')), tuned.get(variant)))
    bases, variants = list(models), list(VARIANTS)
    return sorted(cells, key=lambda c: (bases.index(c.base), variants.index(c.variant), c.seed))

  def models(self) -> dict[str, str]:
    """{base: model}, including bases of this folder that are not named now."""
    kept = files.read_json_or_none(self.path) or {}
    return {**kept.get('models', {}), **self.bases}

  def _bases(self, variant, asked):
    """Controls use only the first base, unless others are requested."""
    if asked:
      return list(asked)
    bases = list(self.bases)
    return bases[:1] if VARIANTS[variant].group == CONTROL else bases

  def _seeds(self, variant, asked):
    if VARIANTS[variant].kind != TRAINED:
      return (0,)
    return asked or range(self.seeds if VARIANTS[variant].group == PAPER else self.control_seeds)

  def _cell(self, base, variant, seed, rate) -> Cell:
    trained = VARIANTS[variant].kind == TRAINED
    drawn = trained and seed == KEPT_SEED
    config = run_config(
      self.run,
      variant,
      model=self.models()[base],
      seed=seed,
      learning_rate=rate,
      clip_model=self.clip_path,
      system__compile_cache=self.compile_cache,
      system__samples_every=run_steps(self.run, variant) if drawn else 0,
    )
    folder = os.path.join(self.directory, 'cells', base, variant, f'seed_{seed}')
    return Cell(base, variant, seed, config, folder)

  # Tuning.

  def tune_cells(self, variants) -> list[Cell]:
    """The grid of learning rates, on the first base, for each variant that trains and has its own
    learning rate.
    """
    out = []
    for variant in variants:
      if VARIANTS[variant].kind == TRAINED and not VARIANTS[variant].rate_of:
        out += [self._tune_cell(variant, rate) for rate in self.tune.learning_rates]
    return out

  def _tune_cell(self, variant, rate) -> Cell:
    base = next(iter(self.bases))
    config = run_config(
      self.run,
      variant,
      model=self.bases[base],
      seed=self.tune.seed,
      learning_rate=rate,
      clip_model=self.clip_path,
      system__compile_cache=self.compile_cache,
      system__samples_every=0,
      system__eval_every=0,
      eval__prompts_per_task=self.tune.prompts_per_task,
      eval__pictures=self.tune.pictures,
    )
    folder = os.path.join(self.directory, 'tune', variant, f'lr_{rate:g}')
    return Cell(base, variant, self.tune.seed, config, folder, 'validation')

  def tuning(self, task=None) -> dict:
    """{variant: {'learning_rate', 'score', 'scores' by rate}} for variants whose whole grid has
    ended.

    The score is the validation score of generation and the F1 of descriptions, averaged over the
    tasks that the variant learns, or that of `task` alone.
    """
    out = {}
    for variant in VARIANTS:
      cells = self.tune_cells((variant,))
      records = [record_of(cell) for cell in cells]
      if not cells or any(record is None for record in records):
        continue
      chief, shown = {}, {}
      for cell, record in zip(cells, records):
        if record['state'] != 'finished':
          continue
        method = cell.config.method
        found = validation_scores(rows_path(cell))
        rate = method.learning_rate
        chief[rate] = sum(found[t] for t in method.tasks) / len(method.tasks)
        shown[rate] = found[task] if task else chief[rate]
      if chief:
        best = max(chief, key=chief.get)
        scores = {f'{rate:g}': value for rate, value in shown.items()}
        out[variant] = {'learning_rate': best, 'score': shown[best], 'scores': scores}
    return out

  def _rates(self) -> dict[str, float]:
    """{variant: learning rate}: the rate that tuning chose for it, or for the variant whose rate it
    uses.
    """
    tuned = {name: found['learning_rate'] for name, found in self.tuning().items()}
    taken = {name: tuned[v.rate_of] for name, v in VARIANTS.items() if v.rate_of in tuned}
    return tuned | taken

  # Places.

  @property
  def path(self) -> str:
    """study.json: the settings and bases of the study in this folder."""
    return os.path.join(self.directory, 'study.json')

  @property
  def clip_path(self) -> str:
    """The CLIP of the CLIP reward."""
    return os.path.join(self.directory, 'clip')

  @property
  def compile_cache(self) -> str:
    """JAX's compilation cache, for all cells."""
    return os.path.join(self.directory, 'compiled')

  def base_path(self, cell: Cell) -> str:
    """The evaluation of the cell's base."""
    return os.path.join(self.directory, 'bases', cell.base, f'{cell.split}.json')

  def reward_path(self, cell: Cell) -> str:
    """How the cell's reward orders samples of its base."""
    name = f'{reward_key(cell.config.method)}.json'
    return os.path.join(self.directory, 'rewards', cell.base, name)

  def demonstrations(self) -> list[str]:
    """Images that were made for people to look at."""
    folder = os.path.join(self.directory, 'shown')
    if not os.path.isdir(folder):
      return []
    return sorted(
      os.path.join(folder, name) for name in os.listdir(folder) if name.endswith('.png')
    )


def run_steps(run, variant) -> int:
  """The steps of a variant's run."""
  steps = VARIANTS[variant].changes.get('method.steps', run.method.steps)
  return steps(run) if callable(steps) else steps


# From the command line.


def from_config(config, directory, bases=(), command='') -> Study:
  """A ConfigDict of configs/scenes_study.py -> a Study.

  bases: names from it, or NAME=MODEL. Raises InputError for what a user can fix.
  """
  tree = config.to_dict()
  if set(tree) != GROUPS:
    odd = sorted(set(tree) ^ GROUPS)
    raise InputError(
      f'the groups {", ".join(odd)} of --config are missing or unknown; it needs '
      f'{", ".join(sorted(GROUPS))}: start from configs/scenes_study.py'
    )
  run = config_loading.from_config_dict(config.run)
  for key in ('seeds', 'control_seeds'):
    if tree[key] < 1:
      raise InputError(f'config.{key} is {tree[key]}; set it to at least 1')
  if not tree['tune']['learning_rates']:
    raise InputError('config.tune.learning_rates is empty; give at least one')
  return Study(
    directory=directory,
    run=run,
    bases=_named_bases(dict(config.bases), bases),
    seeds=tree['seeds'],
    control_seeds=tree['control_seeds'],
    tune=config.tune,
    measure=config.measure,
    clip=config.clip,
    settings=_settings(run, tree),
    command=command,
  )


def _named_bases(known: dict[str, str], asked) -> dict[str, str]:
  """{name: model} from the config and the flag."""
  named = dict(known)
  for base in asked:
    name, _, model = base.partition('=')
    if model:
      named[name] = model
    elif name not in named:
      raise InputError(
        f'unknown base {name!r} in --bases; choose from {", ".join(named)}, or write NAME=MODEL'
      )
  for name in named:
    if not name.replace('_', '').replace('-', '').isalnum():
      raise InputError(
        f'the base name {name!r} may only have letters, digits, - and _; write NAME=MODEL'
      )
  return named


def _settings(run, tree) -> dict:
  saved = saved_config.to_json(run)
  settings = {key: saved[key] for key in ('method', 'data', 'eval')}
  for key in ('tune', 'measure', 'clip'):
    # As JSON values, for comparison with what is read back.
    settings[key] = {k: list(v) if isinstance(v, tuple) else v for k, v in tree[key].items()}
  return settings


def chosen_variants(names) -> list[str]:
  """The named variants; all if none is named. The InputError lists those that exist."""
  names = [name.strip() for name in names if name.strip()] or list(VARIANTS)
  for name in names:
    if name not in VARIANTS:
      raise InputError(f'unknown variant {name!r} in --variants; choose from {", ".join(VARIANTS)}')
  return [name for name in VARIANTS if name in names]


def chosen_seeds(names) -> tuple[int, ...] | None:
  """The seeds of the flag, or None for those of the config."""
  try:
    seeds = [int(name) for name in names]
  except ValueError as e:
    raise InputError(
      f'--seeds is {",".join(names)}; set it to whole numbers separated by commas'
    ) from e
  if any(seed < 0 for seed in seeds):
    raise InputError(f'--seeds is {",".join(names)}; set it to numbers from 0')
  return tuple(dict.fromkeys(seeds)) or None


# Resuming the same study.


def check_same_study(study: Study, fingerprints: dict[str, str]):
  """Writes DIR/study.json. Raises InputError with the differences if the folder belongs to another
  study. fingerprints: {base: fingerprint of its weights}.
  """
  kept = files.read_json_or_none(study.path)
  if kept is None:
    _check_empty(study.directory)
    kept = {'settings': study.settings, 'bases': {}, 'models': {}}
  shared = {name: fingerprints[name] for name in fingerprints if name in kept['bases']}
  different = saved_config.differences(saved_config.completed(kept['settings']), study.settings)
  different += saved_config.differences(
    {name: kept['bases'][name] for name in shared}, shared, 'bases.'
  )
  if different:
    raise InputError(
      f'the study in {study.directory} has another configuration (then -> now: '
      f'{"; ".join(different)}); use the same settings, or another --output'
    )
  models = {name: study.bases[name] for name in fingerprints}
  content = {
    **kept,
    'bases': {**kept['bases'], **fingerprints},
    'models': {**kept['models'], **models},
  }
  files.write_json(study.path, content, indent=1, allow_nan=False)


def _check_empty(directory):
  if not os.path.isdir(directory):
    return
  others = [name for name in os.listdir(directory) if not name.startswith('.')]
  if others:
    raise InputError(
      f'{directory} contains {others[0]} but is not the folder of a study; name a new or empty '
      'folder as --output'
    )
