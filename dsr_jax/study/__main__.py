"""The study: variants x seeds x bases, each a cell that is run once and kept; tables and figures
from whatever is there.

  python -m dsr_jax.study --config=configs/scenes_study.py --output=runs/study --tune      #
  learning rates, on validation
  python -m dsr_jax.study --config=configs/scenes_study.py --output=runs/study
      [--variants=unified,grpo] [--seeds=0,1] [--bases=scenes,second=DIR] [--lanes=5] [--retry]
      [--tables_only]

The same command goes on with what is missing. Cells that failed stay as they are, are reported, and
are run again with --retry. Results are in DIR/results (README.md, results.json, figures). Exit
status: 0; 1 where a cell failed; 2 for bad input.
"""

import dataclasses
import glob
import importlib.util
import os
import sys
import time
from typing import Any

from absl import flags
from ml_collections import config_flags

from dsr_jax import cli as commands
from dsr_jax import config as config_lib
from dsr_jax.errors import InputError, run_main
from dsr_jax.study.variants import CONTROL, PAPER, TRAINED, VARIANTS, reward_key, run_config

LISTS = {'run', 'bases', 'seeds', 'control_seeds', 'tune', 'measure', 'clip'}


@dataclasses.dataclass
class Study:
  """What is asked for. run: `config.Config` of a cell; bases: {name: model}; tune, measure, clip:
  groups of the config.
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

  def cells(self, variants, seeds=None, bases=None):
    """All cells of the variants (and of the base, which each needs), in order; seeds and bases:
    those asked for, or None for the plan's.
    """
    tuned = self._rates()
    everywhere = list(bases or self.bases)
    out = []
    for variant in dict.fromkeys(('base', *variants)):
      for base in everywhere if bases or VARIANTS[variant].group != CONTROL else everywhere[:1]:
        out += [
          self._cell(base, variant, seed, tuned.get(variant))
          for seed in self._seeds(variant, seeds)
        ]
    return out

  def finished(self, besides=()):
    """All cells that have ended in this folder, whatever is asked for now, after those of
    `besides`.
    """
    from dsr_jax.study.cells import RECORD

    tuned = self._rates()
    known = {cell.folder for cell in besides}
    out = list(besides)
    for path in sorted(
      glob.glob(os.path.join(glob.escape(self.directory), 'cells', '*', '*', 'seed_*', RECORD))
    ):
      base, variant, seed = os.path.dirname(path).split(os.sep)[-3:]
      if os.path.dirname(path) not in known and variant in VARIANTS and base in self.models():
        out.append(self._cell(base, variant, int(seed.removeprefix('seed_')), tuned.get(variant)))
    order = list(self.models()), list(VARIANTS)
    return sorted(out, key=lambda c: (order[0].index(c.base), order[1].index(c.variant), c.seed))

  def models(self):
    """{base: model}, also of bases of this folder that are not named now."""
    from dsr_jax.study.cells import read_json

    return {**(read_json(self.path) or {}).get('models', {}), **self.bases}

  def _seeds(self, variant, asked):
    if VARIANTS[variant].kind != TRAINED:
      return (0,)
    return asked or range(self.seeds if VARIANTS[variant].group == PAPER else self.control_seeds)

  def _cell(self, base, variant, seed, rate):
    from dsr_jax.study.cells import KEPT_SEED, Cell

    folder = os.path.join(self.directory, 'cells', base, variant, f'seed_{seed}')
    trained = VARIANTS[variant].kind == TRAINED
    more = {
      'system__samples_every': run_steps(self.run, variant) if trained and seed == KEPT_SEED else 0
    }
    config = run_config(
      self.run,
      variant,
      model=self.models()[base],
      seed=seed,
      learning_rate=rate,
      clip_model=self.clip_path,
      system__compile_cache=self.compile_cache,
      **more,
    )
    return Cell(base, variant, seed, config, folder)

  def _rates(self):
    """{variant: learning rate} that tuning chose, for itself or for a variant whose rate it
    takes.
    """
    tuned = {name: t['learning_rate'] for name, t in self.tuning().items()}
    return tuned | {name: tuned[v.rate_of] for name, v in VARIANTS.items() if v.rate_of in tuned}

  def tune_cells(self, variants):
    """The grid of learning rates of each variant that trains and has a rate of its own, on the
    first base.
    """
    from dsr_jax.study.cells import Cell

    base = next(iter(self.bases))
    out = []
    for variant in variants:
      own = VARIANTS[variant].kind == TRAINED and not VARIANTS[variant].rate_of
      for rate in self.tune.learning_rates if own else ():
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
        out.append(
          Cell(
            base,
            variant,
            self.tune.seed,
            config,
            os.path.join(self.directory, 'tune', variant, f'lr_{rate:g}'),
            'validation',
          )
        )
    return out

  def tuning(self, task=None) -> dict:
    """{variant: {'learning_rate', 'score', 'scores' by rate}} of variants whose whole grid has
    ended.

    The score is the mean of generation and of the descriptions' F1 on validation, of the tasks that
    the variant learns, or of `task`.
    """
    from dsr_jax.study import cells as study_cells
    from dsr_jax.study.scores import validation_scores

    out = {}
    for variant in VARIANTS:
      cells = self.tune_cells((variant,))
      records = [study_cells.record_of(cell) for cell in cells]
      if not cells or any(r is None for r in records):
        continue
      chief, shown = {}, {}
      for cell, record in zip(cells, records):
        if record['state'] == 'finished':
          found = validation_scores(study_cells.rows_path(cell))
          rate = cell.config.method.learning_rate
          chief[rate] = sum(found[t] for t in cell.config.method.tasks) / len(
            cell.config.method.tasks
          )
          shown[rate] = found[task] if task else chief[rate]
      if chief:
        best = max(chief, key=chief.get)
        out[variant] = {
          'learning_rate': best,
          'score': shown[best],
          'scores': {f'{rate:g}': value for rate, value in shown.items()},
        }
    return out

  # Places.

  @property
  def path(self):
    return os.path.join(self.directory, 'study.json')

  @property
  def clip_path(self):
    return os.path.join(self.directory, 'clip')

  @property
  def compile_cache(self):
    return os.path.join(self.directory, 'compiled')

  def base_path(self, cell):
    return os.path.join(self.directory, 'bases', cell.base, f'{cell.split}.json')

  def reward_path(self, cell):
    return os.path.join(
      self.directory, 'rewards', cell.base, f'{reward_key(cell.config.method)}.json'
    )

  def demonstrations(self):
    """Pictures that have been made for people."""
    folder = os.path.join(self.directory, 'shown')
    return (
      sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith('.png'))
      if os.path.isdir(folder)
      else []
    )


def run_steps(run, variant):
  """The steps of a variant's run."""
  steps = VARIANTS[variant].changes.get('method.steps', run.method.steps)
  return steps(run) if callable(steps) else steps


def from_config(config, directory, bases=(), command='') -> Study:
  """A ConfigDict of configs/scenes_study.py -> a Study. bases: names of it, or NAME=MODEL. Errors:
  InputError.
  """
  tree = config.to_dict()
  if set(tree) != LISTS:
    odd = sorted(set(tree) ^ LISTS)
    raise InputError(
      f'found a config without or with {", ".join(odd)}; expected {", ".join(sorted(LISTS))}; '
      'start from '
      'configs/scenes_study.py'
    )
  run = config_lib.from_config_dict(config.run)
  for key in ('seeds', 'control_seeds'):
    if tree[key] < 1:
      raise InputError(f'found config.{key}={tree[key]}; expected at least 1; raise it')
  if not tree['tune']['learning_rates']:
    raise InputError('found no config.tune.learning_rates; expected at least one; name some')
  named = dict(config.bases)
  for base in bases:
    name, _, model = base.partition('=')
    if model:
      named[name] = model
    elif name not in named:
      raise InputError(
        f'found the base {name!r}; expected one of {", ".join(named)}, or NAME=MODEL; name one of '
        'them in --bases'
      )
  for name in named:
    if not name.replace('_', '').replace('-', '').isalnum():
      raise InputError(
        f'found the base name {name!r}; expected letters, digits, - and _; write NAME=MODEL'
      )
  settings = {key: config_lib.to_json(run)[key] for key in ('method', 'data', 'eval')}
  settings |= {
    key: {k: list(v) if isinstance(v, tuple) else v for k, v in tree[key].items()}
    for key in ('tune', 'measure', 'clip')
  }
  return Study(
    directory,
    run,
    named,
    tree['seeds'],
    tree['control_seeds'],
    config.tune,
    config.measure,
    config.clip,
    settings,
    command,
  )


def check_same_study(study, fingerprints):
  """Writes DIR/study.json, or InputError with the differences if the folder is of another study.
  fingerprints: {base: of its weights}.
  """
  from dsr_jax.study.cells import read_json, write_json

  kept = read_json(study.path)
  if kept is None:
    others = (
      [n for n in os.listdir(study.directory) if not n.startswith('.')]
      if os.path.isdir(study.directory)
      else []
    )
    if others:
      raise InputError(
        f'found {others[0]} in {study.directory}; expected a new or empty folder, or that of a '
        'study; name another --output'
      )
    kept = {'settings': study.settings, 'bases': {}, 'models': {}}
  shared = {name: fingerprints[name] for name in fingerprints if name in kept['bases']}
  different = config_lib.differences(config_lib.completed(kept['settings']), study.settings)
  different += config_lib.differences(
    {name: kept['bases'][name] for name in shared}, shared, 'bases.'
  )
  if different:
    raise InputError(
      f'found a study of another configuration in {study.directory} (then -> now: '
      f'{"; ".join(different)}); expected '
      'the same; use the same settings, or another --output'
    )
  write_json(
    study.path,
    {
      **kept,
      'bases': {**kept['bases'], **fingerprints},
      'models': {**kept['models'], **{name: study.bases[name] for name in fingerprints}},
    },
  )


# Running.


def make_clip(study):
  """DIR/clip, the CLIP of the CLIP reward, unless it is there."""
  if os.path.isdir(study.clip_path):
    return
  from dsr_jax.convert import clip as files
  from dsr_jax.convert import locate as model_source
  from dsr_jax.models.janus import processor
  from dsr_jax.runtime.progress import say
  from dsr_jax.study import clip as scenes_clip

  directory, c = model_source.directory_of(next(iter(study.bases.values()))), study.clip
  say(f'CLIP         trained for {c.steps} steps of {c.batch} captioned pictures')
  config, params, facts = scenes_clip.train(
    processor.Processor.from_directory(directory),
    steps=c.steps,
    size=c.batch,
    learning_rate=c.learning_rate,
    seed=c.seed,
  )
  say(f'CLIP         finds {100 * facts["found"]:.0f} % of the pictures of a batch by their texts')
  with commands.whole_directory(study.clip_path) as aside:
    files.save(aside, config, params, directory)


def run_cells(study, cells, bench, retry=False, lanes=1):
  """Runs cells that have not ended, up to `lanes` of a variant in one program. Returns their
  records; None for those that a signal kept from running."""
  from dsr_jax.runtime.progress import say
  from dsr_jax.study import cells as study_cells
  from dsr_jax.study import lanes as study_lanes

  records = [study_cells.record_of(cell) for cell in cells]
  if retry:
    for i, cell in enumerate(cells):
      if records[i] and records[i]['state'] == 'failed':
        study_cells.with_retry(cell)
        records[i] = None
  todo = [i for i, record in enumerate(records) if record is None]

  def said():
    return sum(r['state'] == 'failed' for r in records if r)

  say(
    f'study        {len(cells)} cells: {len(cells) - len(todo) - said()} finished, {said()} '
    f'failed, {len(todo)} to run'
  )
  took, done = 0.0, 0
  for group in study_lanes.groups([cells[i] for i in todo], lanes):
    group = [todo[i] for i in group]
    now = [cells[i] for i in group]
    left = f'; about {took / done * (len(todo) - done) / 60:.0f} min left' if done else ''
    say(
      f'cell         {done + 1} of {len(todo)}: {", beside ".join(cell.name for cell in now)}{left}'
    )
    began = time.time()
    if now[0].config.method.reward == 'clip':
      make_clip(study)
    try:
      ended = bench.run_lanes(now) if len(now) > 1 else [bench.run(now[0])]
    except (study_cells.Stopped, KeyboardInterrupt):
      say('stopped      the same command goes on')
      break
    took, done = took + time.time() - began, done + len(now)
    for i, record in zip(group, ended):
      records[i] = record
      why = f': {record["error"]}' if 'error' in record else ''
      say(
        f'cell         {cells[i].name}: {record["state"]} in {record["seconds"] / 60:.1f} min{why}'
      )
  return records


def finish(study, cells, bench):
  """What is made of all cells that are there: rewards measured on the base, pictures for people,
  tables and figures. Returns DIR/results.

  cells: those that were asked for. bench: None where nothing more is to be computed than tables.
  """
  from dsr_jax.study import cells as study_cells
  from dsr_jax.study import gallery as study_gallery
  from dsr_jax.study import tables as study_tables

  cells = study.finished(cells)
  records = [study_cells.record_of(cell) for cell in cells]
  if bench:
    for cell, record in zip(cells, records):
      if record and record['state'] == 'finished' and VARIANTS[cell.variant].kind == TRAINED:
        bench.reward(cell)
    study_gallery.make(study, cells, records)
  return study_tables.write(study, cells, records)


def chosen_variants(names) -> list[str]:
  """Those named, all if none is. InputError lists those that exist."""
  names = [name.strip() for name in names if name.strip()] or list(VARIANTS)
  for name in names:
    if name not in VARIANTS:
      raise InputError(
        f'found the variant {name!r}; expected some of {", ".join(VARIANTS)}; name those in '
        '--variants'
      )
  return [name for name in VARIANTS if name in names]


def chosen_seeds(names):
  """Seeds of a flag, or None for the plan's."""
  try:
    seeds = [int(name) for name in names]
  except ValueError as e:
    raise InputError(
      f'found --seeds={",".join(names)}; expected whole numbers with commas between; change it'
    ) from e
  if any(seed < 0 for seed in seeds):
    raise InputError(f'found --seeds={",".join(names)}; expected numbers from 0; change it')
  return tuple(dict.fromkeys(seeds)) or None


def main(argv, f=flags.FLAGS):
  commands.no_arguments(argv)
  commands.require(config=f.config, output=f.output)
  variants, seeds = chosen_variants(f.variants), chosen_seeds(f.seeds)
  study = from_config(f.config, f.output, f.bases, _command())
  names = [base.partition('=')[0] for base in f.bases] or None
  study.tune_cells(variants)  # a wrong setting is found here, before anything is loaded
  from dsr_jax.runtime import workdir
  from dsr_jax.study import cells as study_cells
  from dsr_jax.study import lanes as study_lanes

  workdir.check_writable(study.directory)
  workdir.check_accelerator()
  lanes = study_lanes.number(f.lanes)
  workdir.use_compile_cache(study.compile_cache)
  bench = study_cells.Bench(study)
  fingerprints = {name: bench.fingerprint(study.bases[name]) for name in names or study.bases}
  check_same_study(study, fingerprints)
  with workdir.locked(study.directory):
    cells = study.tune_cells(variants) if f.tune else study.cells(variants, seeds, names)
    if f.tables_only:
      records = [study_cells.record_of(cell) for cell in cells]
    else:
      records = run_cells(study, cells, bench, f.retry, lanes)
    out = {'output': study.directory, 'cells': len(cells), **_counts(records)}
    if f.tune:
      out['tuning'] = {name: t for name, t in study.tuning().items() if name in variants}
    else:
      out['results'] = finish(study, cells, None if f.tables_only or None in records else bench)
  commands.print_json(out)
  return 1 if out['failed'] else 0


def check_flags(argv):
  """Finds what absl would answer with a traceback: no such config file, an override of an unknown
  key.
  """
  pairs = dict(a.lstrip('-').partition('=')[::2] for a in argv if a.startswith('-'))
  path = pairs.get('config')
  if path is None:
    return
  if not os.path.isfile(path):
    raise InputError(
      f'found no config file at {path}; expected a Python file with get_config(); see configs/'
    )
  spec = importlib.util.spec_from_file_location('_study_config', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  known = module.get_config()
  for name in pairs:
    node = known
    for part in name.split('.')[1:]:
      if not hasattr(node, 'keys') or part not in node:
        raise InputError(
          f'found the unknown key {name}; expected a key of {path}; see it and dsr_jax/config.py'
        )
      node = node[part]


def _counts(records):
  state = [r['state'] if r else 'waiting' for r in records]
  return {name: state.count(name) for name in ('finished', 'failed', 'waiting')}


def _command():
  return ' '.join(['python -m dsr_jax.study', *sys.argv[1:]])


def define_flags(f=flags.FLAGS):
  config_flags.DEFINE_config_file(
    'config',
    None,
    'The study: configs/scenes_study.py, keys set by --config.key=value.',
    flag_values=f,
  )
  flags.DEFINE_string(
    'output', None, 'The folder of the study; what was finished there stays.', flag_values=f
  )
  flags.DEFINE_list(
    'variants', [], f'Some of {", ".join(VARIANTS)}; all by default.', flag_values=f
  )
  flags.DEFINE_list(
    'seeds',
    [],
    'Seeds of every variant; by default config.seeds, of controls config.control_seeds.',
    flag_values=f,
  )
  flags.DEFINE_list(
    'bases',
    [],
    "Names in config.bases, or NAME=MODEL; by default all for the paper's variants, the first for "
    'controls.',
    flag_values=f,
  )
  flags.DEFINE_bool(
    'tune',
    False,
    'Choose learning rates on validation instead: the same grid for every variant.',
    flag_values=f,
  )
  flags.DEFINE_string(
    'lanes',
    'auto',
    'How many seeds of a variant, or with --tune learning rates, run side by side in one program; '
    'auto: '
    'one on CPUs, all on one accelerator.',
    flag_values=f,
  )
  flags.DEFINE_bool(
    'retry', False, 'Run cells that failed again, from their beginning.', flag_values=f
  )
  flags.DEFINE_bool(
    'tables_only', False, 'Run nothing: tables and figures from what is there.', flag_values=f
  )


if __name__ == '__main__':
  define_flags()
  run_main(main, check_flags)
