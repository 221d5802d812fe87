"""Runs the study's cells, and keeps what they share: evaluators, the evaluation of the untouched
base, and the compiled programs of the last variant.
"""

from collections.abc import Callable
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
from dsr_jax import files, train
from dsr_jax import state as state_lib
from dsr_jax.models.unified import Text
from dsr_jax.rollouts import Batch
from dsr_jax.runtime.progress import say
from dsr_jax.study import evaluate as study_evaluate
from dsr_jax.study import lanes as study_lanes
from dsr_jax.study import variants as variants_lib
from dsr_jax.study.cells import Cell, write_json, write_record, write_rows
from dsr_jax.study.variants import VARIANTS

PROMPT_MULTIPLE = 20  # tokens; without it, the longest prompt of each seed would need a new program
# Fields of the generation half that are prompts too.
TEXT_FIELDS = tuple(f'{text}_{part}' for text in ('other', 'negative') for part in ('ids', 'mask'))


class Stopped(Exception):
  """A signal ended the run of a cell; the same command resumes it."""


class Bench:
  """Runs cells.

  study: `design.Study`. builders: `train.Builders` for a run; None for the default ones.
  """

  def __init__(self, study, builders: train.Builders | None = None):
    self._study = study
    self._builders = builders or train.Builders()
    self._models = {}
    self._params = {}
    self._evaluators = {}
    self._scorers = {}
    # For one variant: (its key, {structure and shapes of a batch: compiled program}).
    self._programs: tuple[str | None, dict[Any, Any]] = (None, {})

  # Running.

  def run(self, cell: Cell) -> dict:
    """Runs or resumes a cell to its end; returns its record, which is also in its folder.

    Raises:
      Stopped: a signal ended it.
    """
    run_kind = {
      variants_lib.TRAINED: self._train,
      variants_lib.UNTOUCHED: self._untouched,
      variants_lib.BEST_SETTINGS: self._best_settings,
      variants_lib.BEST_OF: self._best_of,
    }[VARIANTS[cell.variant].kind]
    began = time.time()
    error = None
    try:
      run_kind(cell)
    except (Stopped, KeyboardInterrupt):
      raise
    except Exception as e:  # whatever it is, the other cells can still run
      say(traceback.format_exc())
      error = e
    return self._ended(cell, error, time.time() - began)

  def run_lanes(self, cells) -> list[dict]:
    """Like `run`, for cells that are lanes of one program; see `lanes.groups`."""
    began = time.time()

    def builders_of(cell):
      make_train_step = functools.partial(self._make_train_step, as_run=study_lanes.together)
      return dataclasses.replace(self._builders_of(cell), make_train_step=make_train_step)

    try:
      errors = study_lanes.run(cells, builders_of)
    except Exception as e:  # as above
      say(traceback.format_exc())
      errors = [e] * len(cells)
    if errors is None:
      raise Stopped(', '.join(cell.name for cell in cells))
    seconds = (time.time() - began) / len(cells)
    return [
      self._ended(cell, error, seconds, lanes=len(cells)) for cell, error in zip(cells, errors)
    ]

  def _ended(self, cell, error, seconds, **more) -> dict:
    """Writes a cell's record and returns it."""
    state = {'state': 'finished'}
    if error:
      state = {'state': 'failed', 'error': f'{type(error).__name__}: {error}'}
    record = {
      'base': cell.base,
      'variant': cell.variant,
      'seed': cell.seed,
      'split': cell.split,
      'config': cell.identity,
      'model': self.fingerprint(cell.config.model),
      'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
      **state,
      'seconds': round(seconds, 1),
      **more,
    }
    write_record(cell, record)
    return record

  # Bases.

  def fingerprint(self, name: str) -> str:
    """The fingerprint of a base's weights."""
    return self.model(name).source['fingerprint']

  def model(self, name: str):
    """A base, without its parameters."""
    if name not in self._models:
      model, _ = train.framed(self._builders.load_model(name), self._study.run)
      self._models[name] = dataclasses.replace(model, params=None)
    return self._models[name]

  def params(self, name: str):
    """A base's parameters, float32, on the device; only those of the last base are kept."""
    if name not in self._params:
      # Leaves that are still in files are loaded directly to the device; see `convert.load`.
      here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

      def put(x):
        return x.placed(here) if hasattr(x, 'placed') else jnp.asarray(x)

      self._params = {name: jax.tree.map(put, self._builders.load_model(name).params)}
    return self._params[name]

  def reward(self, cell: Cell):
    """Writes DIR/rewards/BASE/REWARD.json: rows with the cell's rewards for samples of its base,
    and with the judge's scores.
    """
    path = self._study.reward_path(cell)
    if os.path.exists(path):
      return
    config = cell.config
    params = self.params(config.model)
    scorers = self._make_scorers(config, self._study.measure.reward_inputs)
    policies = dict.fromkeys(('generation', 'understanding'), params)
    write_json(path, scorers.run(policies, {task: {'reward': params} for task in policies}))

  # Cells of each kind.

  def _train(self, cell):
    summary = train.run(cell.config, cell.folder, self._builders_of(cell))
    with open(summary, encoding='utf-8') as f:
      if not json.load(f)['finished']:
        raise Stopped(cell.name)
    if not cell.keeps_checkpoint:
      shutil.rmtree(os.path.join(cell.folder, 'checkpoints'), ignore_errors=True)

  def _untouched(self, cell):
    write_rows(cell, self._base_evaluation(cell)['rows'])

  def _best_settings(self, cell):
    """The base with the settings that score best on validation."""
    config = cell.config
    params = self.params(config.model)
    grid = self._settings_grid(cell, params)
    best = max(grid['generation'], key=grid['generation'].get)
    temperature, guidance = map(float, best.split(','))
    evaluator = self._evaluator(config, cell.split)
    _, rows = evaluator.generation(
      params, config.eval.prompts_per_task, temperature=temperature, guidance=guidance
    )
    rows |= evaluator.many(params, temperature, guidance)
    rows['description'] = evaluator.texts(
      params, float(max(grid['description'], key=grid['description'].get))
    )
    write_rows(cell, self._like_base(cell, rows))

  def _settings_grid(self, cell, params) -> dict:
    """settings.json: the validation scores for every temperature and guidance."""
    path = os.path.join(cell.folder, 'settings.json')
    grid = files.read_json_or_none(path)
    if grid is None:
      tune = self._study.tune
      lists = dataclasses.replace(
        cell.config.eval, prompts_per_task=tune.prompts_per_task, pictures=tune.pictures
      )
      evaluator = self._evaluator(dataclasses.replace(cell.config, eval=lists), 'validation')
      grid = evaluator.best_settings(params, tune.temperatures, tune.guidances)
      write_json(path, grid)
    return grid

  def _best_of(self, cell):
    """The base, with each sample the best of several by the reward."""
    config = cell.config
    params = self.params(config.model)
    evaluator = self._evaluator(config, cell.split)
    number = variants_lib.INFERENCE_BEST_OF
    _, rows = evaluator.generation(
      params,
      config.eval.prompts_per_task,
      temperature=config.method.temperature,
      guidance=config.method.guidance,
      best_of=number,
      cfg_interval=config.method.cfg_interval,
    )
    rows['description'] = evaluator.texts(params, config.method.temperature, number)
    write_rows(cell, self._like_base(cell, rows, without=('generation_many',)))

  def _like_base(self, cell, rows, without=()):
    """`rows`, plus the base's rows that cannot differ: greedy texts and answers."""
    base = {
      name: values
      for name, values in self._base_evaluation(cell)['rows'].items()
      if not name.startswith('scorer_') and name not in without
    }
    return base | rows

  # Builders of a run.

  def _builders_of(self, cell) -> train.Builders:
    def make_evaluator(config, model):
      del config, model  # the bench has both
      return functools.partial(self._evaluate, cell)

    return dataclasses.replace(
      self._builders,
      make_batches=self._make_batches,
      make_train_step=self._make_train_step,
      make_evaluator=make_evaluator,
      make_watcher=lambda *args: None,  # the study's own lists replace it
    )

  def _make_batches(self, config, model, mesh, kept=None):
    batches = self._builders.make_batches(config, model, mesh, kept)
    return _SamePrograms(batches, config.method.peak_learning_rate)

  def _make_train_step(self, model, config, mesh, state, as_run: Callable | None = None):
    """The step, compiled once for all seeds, learning rates and bases of a variant: these are
    inputs of the program, not part of it.

    as_run: jitted step -> another one; `lanes.together`.
    """
    method = dataclasses.replace(config.method, seed=0, learning_rate=1.0)
    # Neither is part of the program.
    system = dataclasses.replace(config.system, compile_cache='', samples_every=0)
    key = repr((method, system, model.config))
    if self._programs[0] != key:
      self._programs = key, {}
    step = self._builders.make_train_step(model, config, mesh, state)
    return _Reused(as_run(step) if as_run else step, self._programs[1])

  # Evaluation.

  def _evaluate(self, cell, state, step):
    """(scores, rows) of a run's state. Step 0 is the base, which is evaluated once and shared."""
    if step == 0:
      kept = self._base_evaluation(cell)
      return kept['scores'], kept['rows']
    config = cell.config
    family = self.model(config.model).family
    drawing = state_lib.policy_params(state, family)
    reading = None
    if config.method.strategy == 'separate':
      reading = state_lib.policy_params(state, family, 'understander')
    scores, rows = self._evaluator(config, cell.split).run(drawing, step, reading)
    if cell.split == 'evaluation':
      rows |= self._order(config, drawing, reading)
    return scores, rows

  def _base_evaluation(self, cell) -> dict:
    """{'scores', 'rows'} of the cell's base on the cell's lists, with the run's temperature and
    guidance.
    """
    path = self._study.base_path(cell)
    kept = files.read_json_or_none(path)
    if kept is None:
      say(f'evaluating   the base {cell.base} on the {cell.split} lists')
      params = self.params(cell.config.model)
      scores, rows = self._evaluator(cell.config, cell.split).run(params, 0)
      if cell.split == 'evaluation':
        rows |= self._order(cell.config, params, None)
      kept = {'scores': scores, 'rows': rows}
      write_json(path, kept)
    return kept

  def _order(self, config, drawing, reading):
    """Rows with the rewards of live, frozen and partner scorers for fresh samples."""
    frozen = self.params(config.model)
    method = dataclasses.replace(
      config.method, reward='dual', task='unified', clip_reward=config_lib.ClipReward()
    )
    # A base has its own tokenizer, so its name is part of the key.
    key = repr((config.model, method.temperature, method.guidance, method.max_text_tokens))
    if key not in self._scorers:
      asked = dataclasses.replace(config, method=method)
      self._scorers = {key: self._make_scorers(asked, self._study.measure.scorer_inputs)}
    policies = {'generation': drawing, 'understanding': drawing if reading is None else reading}
    scorers = {task: {'live': policy, 'frozen': frozen} for task, policy in policies.items()}
    if reading is not None:
      scorers['generation']['partner'] = reading
      scorers['understanding']['partner'] = drawing
    return self._scorers[key].run(policies, scorers)

  def _make_scorers(self, config, inputs: int):
    model = self.model(config.model)
    return study_evaluate.Scorers(
      model.graphdef, config, model.processor, model.spec.image_size, inputs
    )

  def _evaluator(self, config, split):
    method = config.method
    key = repr(
      (
        config.model,
        config.eval,
        method.temperature,
        method.guidance,
        method.max_text_tokens,
        method.instruction,
        method.steps,
        config.data.max_prompt_tokens,
        split,
      )
    )
    if key not in self._evaluators:
      model = self.model(config.model)
      self._evaluators[key] = study_evaluate.Evaluator(
        config, model.processor, model.graphdef, self._study.measure, split
      )
    return self._evaluators[key]


class _SamePrograms:
  """Batches for programs that runs share: they include the learning rate, and prompts are padded to
  a multiple of PROMPT_MULTIPLE tokens.
  """

  def __init__(self, batches, learning_rate: float):
    self._batches = batches
    self._rate = np.float32(learning_rate)
    self.fingerprint = batches.fingerprint

  def at(self, step: int) -> Batch:
    """The batch of step `step` (from 0)."""
    batch = self._batches.at(step)
    return batch._replace(generation=_padded(batch.generation), learning_rate=self._rate)


def _padded(half):
  """The generation half of a batch, with padded texts (B, ..., T); None stays None."""
  if half is None:
    return None
  return half._replace(
    prompt=Text(*(_pad(x) for x in half.prompt)),
    extra={name: _pad(x) if name in TEXT_FIELDS else x for name, x in half.extra.items()},
  )


def _pad(x):
  room = -x.shape[-1] % PROMPT_MULTIPLE
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, room)]) if room else x


class _Reused:
  """A jitted step whose programs outlive a run.

  programs: {structure and shapes of a batch: compiled program}; new ones are added.
  """

  def __init__(self, step, programs: dict[Any, Any]):
    self._step = step
    self._programs = programs

  def lower(self, state, batch):
    """What `CompiledStep` compiles."""
    leaves, kind = jax.tree.flatten(batch)
    key = kind, tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
    return _Lowered(self._step, state, batch, self._programs, key)


class _Lowered:
  """A step lowered for one structure of batch, unless its program exists."""

  def __init__(self, step, state, batch, programs, key):
    self._programs = programs
    self._key = key
    self._lowered = None if key in programs else step.lower(state, batch)

  def compile(self):
    """The program, from an earlier run or compiled now."""
    if self._lowered is not None:
      self._programs[self._key] = self._lowered.compile()
    return self._programs[self._key]
