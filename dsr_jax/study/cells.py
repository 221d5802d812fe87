"""The study's cells: which there are, how one is run, and what is kept of it.

A cell is one training run (or one evaluation of the untouched base) in a folder of its own:

  DIR/cells/BASE/VARIANT/seed_S/   a run's workdir, with evaluations/STEP.json; cell.json once it
  has ended DIR/tune/VARIANT/lr_X/           the same, evaluated on the validation lists
  DIR/rewards/BASE/REWARD.json     how a reward orders candidates of the base

`cell.json` says finished or failed; a folder without it is a cell to be run, or to go on with.
"""

import copy
import dataclasses
import functools
import json
import os
import shutil
import time
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax import config as config_lib
from dsr_jax import parts as parts_lib
from dsr_jax import step as step_lib
from dsr_jax import train
from dsr_jax.errors import InputError
from dsr_jax.runtime import workdir as workdir_lib
from dsr_jax.runtime.progress import say
from dsr_jax.study import evaluate as study_evaluate
from dsr_jax.study import lanes as study_lanes
from dsr_jax.study import variants as variants_lib
from dsr_jax.study.variants import VARIANTS

PROMPT_MULTIPLE = 20  # tokens; the longest prompt differs by seed, and with it the program would
RECORD = 'cell.json'
KEPT_SEED = 0  # the seed whose last checkpoint stays, for pictures


class Stopped(Exception):
  """A signal ended the run of a cell; the same command goes on with it."""


@dataclasses.dataclass(frozen=True)
class Cell:
  """base, variant, seed; its configuration and folder; split: the lists it is evaluated on."""

  base: str
  variant: str
  seed: int
  config: config_lib.Config
  folder: str
  split: str = 'evaluation'

  @property
  def name(self) -> str:
    rate = (
      f' learning rate {self.config.method.learning_rate:g}' if self.split == 'validation' else ''
    )
    return f'{self.base} {self.variant} seed {self.seed}{rate}'

  @property
  def last_step(self) -> int:
    return self.config.method.steps if VARIANTS[self.variant].kind == variants_lib.TRAINED else 0

  @property
  def keeps_checkpoint(self) -> bool:
    """Whether the last one stays."""
    return self.split == 'evaluation' and self.seed == KEPT_SEED


# What is kept.


def record_of(cell: Cell) -> dict | None:
  """cell.json, or None for a cell that has not ended. Errors: InputError if a finished one was
  configured otherwise.
  """
  record = read_json(os.path.join(cell.folder, RECORD))
  if record and record['state'] == 'finished':
    different = config_lib.differences(config_lib.completed(record['config']), _identity(cell))
    if different:
      raise InputError(
        f'found the cell {cell.folder} of another configuration (then -> now: '
        f'{"; ".join(different)}); expected the same; '
        'restore it, move that folder away, or choose another --output'
      )
  return record


def rows_path(cell: Cell, step: int | None = None) -> str:
  """The rows of an evaluation, of the last one by default."""
  return os.path.join(
    cell.folder, 'evaluations', f'{cell.last_step if step is None else step:06d}.json'
  )


def read_json(path):
  """A file's JSON, or None where there is none."""
  try:
    with open(path, encoding='utf-8') as f:
      return json.load(f)
  except FileNotFoundError:
    return None


def write_json(path, tree):
  """Whole or not at all."""
  os.makedirs(os.path.dirname(path), exist_ok=True)
  with open(path + '.new', 'w', encoding='utf-8') as f:
    json.dump(tree, f, indent=1, allow_nan=False)
    f.write('\n')
  os.replace(path + '.new', path)


def _identity(cell: Cell) -> dict:
  """What must be the same for a finished cell to be this one: not where files lie, nor how it is
  computed.
  """
  settings = config_lib.to_json(cell.config)
  tree = {key: settings[key] for key in ('method', 'data', 'eval')} | {'split': cell.split}
  tree['method']['clip_model'] = bool(tree['method']['clip_model'])
  return tree


# Running.


class Bench:
  """Runs cells, and keeps between them what they share: evaluators, the base's own evaluation, the
  last variant's programs.

  study: `study.Study`. parts: `parts.Parts` of a run, the real ones if None.
  """

  def __init__(self, study, parts=None):
    self._study, self._parts = study, parts or parts_lib.real()
    self._models, self._evaluators, self._scorers, self._params = {}, {}, {}, {}
    self._programs = None, {}  # of one variant: (its key, compiled programs by shapes of the batch)

  def run(self, cell: Cell) -> dict:
    """Runs a cell to its end, from where it was; returns its record, which is also in its folder.
    Errors: `Stopped`.
    """
    began, error = time.time(), None
    try:
      kind = VARIANTS[cell.variant].kind
      {
        variants_lib.TRAINED: self._train,
        variants_lib.UNTOUCHED: self._untouched,
        variants_lib.BEST_SETTINGS: self._best_settings,
        variants_lib.BEST_OF: self._best_of,
      }[kind](cell)
    except (Stopped, KeyboardInterrupt):
      raise
    except Exception as e:  # whatever it is, the other cells need not suffer from it
      say(traceback.format_exc())
      error = e
    return self._ended(cell, error, time.time() - began)

  def run_lanes(self, cells) -> list[dict]:
    """As `run`, of cells that are lanes of one program; see `study_lanes.groups`."""
    began = time.time()

    def parts_of(cell):
      return dataclasses.replace(
        self._parts_of(cell),
        make_step=functools.partial(self._make_step, as_run=study_lanes.together),
      )

    try:
      errors = study_lanes.run(cells, parts_of)
    except Exception as e:  # as above
      say(traceback.format_exc())
      errors = [e] * len(cells)
    if errors is None:
      raise Stopped(', '.join(cell.name for cell in cells))
    seconds = (time.time() - began) / len(cells)
    return [
      self._ended(cell, error, seconds, lanes=len(cells)) for cell, error in zip(cells, errors)
    ]

  def _ended(self, cell, error, seconds, **more):
    """Writes a cell's record."""
    state = (
      {'state': 'failed', 'error': f'{type(error).__name__}: {error}'}
      if error
      else {'state': 'finished'}
    )
    record = {
      'base': cell.base,
      'variant': cell.variant,
      'seed': cell.seed,
      'split': cell.split,
      'config': _identity(cell),
      'model': self.fingerprint(cell.config.model),
      'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
      **state,
      'seconds': round(seconds, 1),
      **more,
    }
    write_json(os.path.join(cell.folder, RECORD), record)
    return record

  def fingerprint(self, name: str) -> str:
    return self.model(name).source['fingerprint']

  def model(self, name: str):
    """A base, without its parameters."""
    if name not in self._models:
      self._models[name] = dataclasses.replace(self._parts.load_model(name), params=None)
    return self._models[name]

  def params(self, name: str):
    """A base's parameters, float32, on the device; of the base asked for last alone."""
    if name not in self._params:
      # Leaves that still lie in files go to the device by themselves; see `convert.load`.
      here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

      def put(x):
        return x.placed(here) if hasattr(x, 'placed') else jnp.asarray(x)

      self._params = {name: jax.tree.map(put, self._parts.load_model(name).params)}
    return self._params[name]

  def reward(self, cell: Cell):
    """DIR/rewards/BASE/REWARD.json: rows of how the cell's reward orders candidates of its base,
    and of how the judge does.
    """
    path = self._study.reward_path(cell)
    if not os.path.exists(path):
      c = cell.config
      model, params = self.model(c.model), self.params(c.model)
      size, inputs = model.config.vision.image_size, self._study.measure.reward_inputs
      scorers = study_evaluate.Scorers(model.graphdef, c, model.processor, size, inputs)
      each = dict.fromkeys(('generation', 'understanding'), params)
      write_json(path, scorers.run(each, {task: {'reward': params} for task in each}))

  # Cells of each kind.

  def _train(self, cell):
    with open(train.run(cell.config, cell.folder, self._parts_of(cell)), encoding='utf-8') as f:
      if not json.load(f)['finished']:
        raise Stopped(cell.name)
    if not cell.keeps_checkpoint:
      shutil.rmtree(os.path.join(cell.folder, 'checkpoints'), ignore_errors=True)

  def _untouched(self, cell):
    write_rows(cell, self._evaluation(cell)({'params': None}, 0)[1])

  def _best_settings(self, cell):
    """The base at the settings that suit it best on validation."""
    tune, c = self._study.tune, cell.config
    params, path = self.params(c.model), os.path.join(cell.folder, 'settings.json')
    grid = read_json(path)
    if grid is None:
      lists = dataclasses.replace(
        c.eval, prompts_per_task=tune.prompts_per_task, pictures=tune.pictures
      )
      validation = self._evaluator(dataclasses.replace(c, eval=lists), 'validation')
      grid = validation.best_settings(params, tune.temperatures, tune.guidances)
      write_json(path, grid)
    temperature, guidance = map(
      float, max(grid['generation'], key=grid['generation'].get).split(',')
    )
    evaluator = self._evaluator(c, cell.split)
    rows = evaluator.generation(params, c.eval.prompts_per_task, temperature, guidance)[1]
    rows |= evaluator.many(params, temperature, guidance)
    rows['description'] = evaluator.texts(
      params, float(max(grid['description'], key=grid['description'].get))
    )
    write_rows(cell, self._like_base(cell, rows))

  def _best_of(self, cell):
    """The base, each sample the best of several by the reward."""
    c, params = cell.config, self.params(cell.config.model)
    evaluator, n = self._evaluator(c, cell.split), variants_lib.INFERENCE_BEST_OF
    rows = evaluator.generation(
      params,
      c.eval.prompts_per_task,
      c.method.temperature,
      c.method.guidance,
      n,
      c.method.cfg_interval,
    )[1]
    rows['description'] = evaluator.texts(params, c.method.temperature, n)
    write_rows(cell, self._like_base(cell, rows, without=('generation_many',)))

  def _like_base(self, cell, rows, without=()):
    """Rows, and the base's where they are the same: greedy texts and answers."""
    base = {
      k: v
      for k, v in self._base_evaluation(cell)['rows'].items()
      if not k.startswith('scorer_') and k not in without
    }
    return base | rows

  # What a run is made of.

  def _parts_of(self, cell):
    return dataclasses.replace(
      self._parts,
      make_batches=self._make_batches,
      make_step=self._make_step,
      make_evaluator=lambda config, model: self._evaluation(cell),
    )

  def _make_batches(self, config, model, mesh):
    return _SamePrograms(self._parts.make_batches(config, model, mesh), config.method.learning_rate)

  def _make_step(self, model, config, mesh, as_run=lambda step: step):
    """The step, compiled once for all seeds, learning rates and bases of a variant: those and the
    weights are its inputs.
    """
    method = dataclasses.replace(config.method, seed=0, learning_rate=1.0)
    system = dataclasses.replace(
      config.system, compile_cache='', samples_every=0
    )  # no part of the program
    key = repr((method, system, model.config))
    if self._programs[0] != key:
      self._programs = key, {}
    return _Reused(as_run(self._parts.make_step(model, config, mesh)), self._programs[1])

  def _evaluation(self, cell):
    """Function (state, step) -> (scores, rows) of a run. The base is evaluated once and shared."""

    def evaluate(state, step):
      c = cell.config
      if step == 0:
        kept = self._base_evaluation(cell)
        return kept['scores'], kept['rows']
      drawing = step_lib.policy_params(state)
      reading = (
        step_lib.policy_params(state, 'understander') if c.method.strategy == 'separate' else None
      )
      scores, rows = self._evaluator(c, cell.split).run(drawing, step, reading)
      if cell.split == 'evaluation':
        rows |= self._order(c, drawing, reading)
      return scores, rows

    return evaluate

  def _base_evaluation(self, cell):
    """{'scores', 'rows'} of the cell's base on the cell's lists at the run's temperature and
    guidance.
    """
    path = self._study.base_path(cell)
    kept = read_json(path)
    if kept is None:
      c = cell.config
      say(f'evaluating   the base {cell.base} on the {cell.split} lists')
      params = self.params(c.model)
      scores, rows = self._evaluator(c, cell.split).run(params, 0)
      if cell.split == 'evaluation':
        rows |= self._order(c, params, None)
      kept = {'scores': scores, 'rows': rows}
      write_json(path, kept)
    return kept

  def _order(self, config, drawing, reading):
    """Rows of how live, frozen and partner scorers order fresh candidates."""
    model, frozen = self.model(config.model), self.params(config.model)
    c = dataclasses.replace(
      config,
      method=dataclasses.replace(config.method, reward='dual', task='unified', clip_model=''),
    )
    key = repr(
      (config.model, c.method.temperature, c.method.guidance, c.method.max_text_tokens)
    )  # a base has its own tokenizer
    if key not in self._scorers:
      self._scorers = {
        key: study_evaluate.Scorers(
          model.graphdef,
          c,
          model.processor,
          model.config.vision.image_size,
          self._study.measure.scorer_inputs,
        )
      }
    policies = {'generation': drawing, 'understanding': drawing if reading is None else reading}
    scorers = {task: {'live': policy, 'frozen': frozen} for task, policy in policies.items()}
    if reading is not None:
      scorers['generation']['partner'], scorers['understanding']['partner'] = reading, drawing
    return self._scorers[key].run(policies, scorers)

  def _evaluator(self, config, split):
    model, m = self.model(config.model), config.method
    key = repr(
      (
        config.model,
        config.eval,
        m.temperature,
        m.guidance,
        m.max_text_tokens,
        m.instruction,
        m.steps,
        config.data.max_prompt_tokens,
        split,
      )
    )
    if key not in self._evaluators:
      self._evaluators[key] = study_evaluate.Evaluator(
        config, model.processor, model.graphdef, self._study.measure, split
      )
    return self._evaluators[key]


def write_rows(cell: Cell, rows):
  """An evaluation of a cell that trains nothing."""
  workdir_lib.write_evaluation(cell.folder, 0, rows)


class _SamePrograms:
  """Batches for programs that runs share: with the learning rate, and prompts padded to a multiple
  of PROMPT_MULTIPLE tokens.
  """

  def __init__(self, batches, learning_rate):
    self._batches, self._rate, self.fingerprint = (
      batches,
      np.float32(learning_rate),
      batches.fingerprint,
    )

  def at(self, step):
    batch = {
      name: _padded(x) if self._is_text(name) else x for name, x in self._batches.at(step).items()
    }
    return batch | {'learning_rate': self._rate}

  @staticmethod
  def _is_text(name):
    task, _, last = name.rpartition('/')
    return (
      last.startswith(('prompt_', 'other_', 'negative_'))
      and last.endswith(('_ids', '_mask'))
      and task in ('', 'generation')
    )


def _padded(x):
  room = -x.shape[-1] % PROMPT_MULTIPLE
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, room)]) if room else x


class _Reused:
  """A step whose programs outlive a run. programs: {shapes of a batch: compiled}."""

  def __init__(self, step, programs: dict[Any, Any]):
    self._step, self._programs, self._key, self._lowered = step, programs, None, None

  def lower(self, state, batch):
    self._key = repr(
      sorted((name, jnp.shape(x), str(jnp.asarray(x).dtype)) for name, x in batch.items())
    )
    self._lowered = None if self._key in self._programs else self._step.lower(state, batch)
    return self

  def compile(self):
    if self._lowered is not None:
      self._programs[self._key] = self._lowered.compile()
    return self._programs[self._key]


def with_retry(cell: Cell):
  """Forgets a failed cell, so that it is run again from its beginning; what went wrong stays in
  earlier.json.
  """
  record = read_json(os.path.join(cell.folder, RECORD))
  earlier = (read_json(os.path.join(cell.folder, 'earlier.json')) or []) + [copy.deepcopy(record)]
  shutil.rmtree(cell.folder)
  write_json(os.path.join(cell.folder, 'earlier.json'), earlier)
