"""Executes a step of a run again, from the nearest checkpoint, and the same step under another
method. Only reads the run's folder.
"""

import dataclasses
import math
import os
from typing import Any

import jax
import numpy as np

from dsr_jax import cli, config_loading, saved_config, train
from dsr_jax.convert import locate
from dsr_jax.data.batches import NAMED_PICTURES, NAMED_PROMPTS
from dsr_jax.errors import InputError
from dsr_jax.evaluate import ranking
from dsr_jax.runtime import checkpoints as checkpoints_lib
from dsr_jax.runtime import metrics as metrics_lib
from dsr_jax.runtime import run_files
from dsr_jax.runtime import workdir as workdir_lib
from dsr_jax.state import TrainState

# The learned parts of a state, which a step under another method takes from the run.
LEARNED = {'step': 'step', 'params': 'params', 'opt_state': 'opt_state', 'ema_params': 'ema'}


@dataclasses.dataclass
class PastStep:
  """A step that was executed again.

  Attributes:
    before, after: the states before and after it.
    batch: its inputs.
    metrics: its numbers, in the form of the log.
    start: the step of the checkpoint that the replay started from (0: none).
    kept: what the run holds out of training, from its checkpoints.
  """

  before: TrainState
  after: TrainState
  batch: Any
  metrics: dict[str, float]
  start: int = 0
  kept: dict | None = None


# The run.


def read_run(workdir: str):
  """A run's `config.Config`, and its logged lines of metrics {step: line}, without time and memory.

  InputError if there is no run.
  """
  path = os.path.join(workdir, 'config.json')
  content = run_files.read_json(path, 'name the workdir of a run in --workdir')
  if not isinstance(content.get('config'), dict):
    raise run_files.damaged(path, 'it has no group config')
  try:
    config = config_loading.from_config_dict(saved_config.completed(content['config']))
  # A group that is not a group; bad values of keys are InputErrors already.
  except (TypeError, AttributeError, KeyError, ValueError) as e:
    raise run_files.damaged(path, f'its group config: {e}') from e
  config = _with_inputs_found(config, content.get('folder'))
  config = _on_its_devices(config, content.get('devices'))
  lines = []
  if os.path.isfile(os.path.join(workdir, metrics_lib.FILE)):
    lines = metrics_lib.repeatable(workdir)
  else:
    cli.log(f'note         {workdir} has no {metrics_lib.FILE}')
  return config, {line.pop('step'): line for line in lines if 'loss' in line}


def _with_inputs_found(config, folder):
  """The configuration with prompts and images at their old location, if they are not here. folder:
  where the run was started; None for an old run.
  """
  if not isinstance(folder, str):
    return config
  data = config.data
  for key, named in (('prompts', NAMED_PROMPTS), ('images', NAMED_PICTURES)):
    name = getattr(data, key)
    there = os.path.join(folder, name)
    if name not in named and not os.path.lexists(name) and os.path.lexists(there):
      data = dataclasses.replace(data, **{key: there})
  return dataclasses.replace(config, data=data)


def _on_its_devices(config, devices):
  """The configuration with the CPU divided as it was in the run, whose sums depend on it. devices:
  such as '2 x cpu'; None for an old run.
  """
  number, _, kind = str(devices).partition(' x ')
  known = kind == 'cpu' and number.isdecimal() and len(number) < 5
  if not known or not 0 < int(number) < config_loading.CPU_DEVICES_BELOW:
    return config
  system = dataclasses.replace(config.system, cpu_devices=int(number))
  return dataclasses.replace(config, system=system)


def base_of(workdir: str, config, base: str = '') -> str:
  """The directory of the model that a run began with; see `locate.base_of`."""
  about = run_files.read_json(os.path.join(workdir, 'config.json'), '').get('about')
  model = about.get('model') if isinstance(about, dict) else None
  if base or (isinstance(model, dict) and 'directory' in model):
    return locate.base_of(model or {'name': config.model}, workdir, base)
  return config.model


def check_step(step: int, lines: dict, workdir: str):
  """InputError for a step that the run has not executed; it says which steps exist."""
  if step not in lines:
    have = f'steps {min(lines)} to {max(lines)}' if lines else 'no step yet'
    raise InputError(f'--step is {step}, but the run {workdir} has run {have}; change --step')


def changed(config, changes: dict[str, str]):
  """The configuration with other values of `method`; InputError if they are unknown or
  incompatible.
  """
  settings = saved_config.to_json(config)
  settings['method'] |= changes
  return config_loading.from_config_dict(settings)


# The steps.


def replay(builders, config, workdir: str, step: int, mesh, model) -> PastStep:
  """Executes the run's steps from the nearest checkpoint before `step` through `step`.

  builders: `train.Builders`.
  """
  kept = checkpoints_lib.newest_held_out(config.system.bucket or workdir)
  batches = builders.make_batches(config, model, mesh, kept)
  state = builders.init_state(model, config, mesh)
  facts = getattr(batches, 'facts', None)
  about = workdir_lib.about(config, model.source, batches.fingerprint, facts)
  state, start = _nearest_checkpoint(state, about, config, workdir, step)
  origin = f'the checkpoint of step {start}' if start else 'the initial model'
  cli.log(f'from         {origin}; {step - start} to run')

  asking = train.answers_of(config, model, workdir, asks=False)
  train_step = builders.make_train_step(model, config, mesh, state, **asking)
  for now in range(start + 1, step + 1):
    batch = batches.at(now - 1)
    before = _copied(state) if now == step else None  # the step donates its state
    state, metrics, _ = train_step(state, batch)
    cli.log(f'step {now}')
  return PastStep(before, state, batch, _as_logged(metrics), start, kept)


def _nearest_checkpoint(state, about, config, workdir, step):
  """(state, its step) of the last checkpoint before `step`; without one, the given state and 0."""
  folder = config.system.bucket or workdir
  start = max((s for s in checkpoints_lib.steps_in(folder) if s < step), default=0)
  if start:
    state = checkpoints_lib.restore(folder, start, state, about)
  return state, start


def what_if(builders, config, workdir: str, past: PastStep, mesh, model) -> PastStep:
  """The same step under another method, from the same parameters."""
  state = builders.init_state(model, config, mesh)
  learned = {}
  for part, name in LEARNED.items():
    if getattr(state, part) is None:
      continue
    if getattr(past.before, part) is None:
      raise InputError(
        f'scorer={config.method.scorer} needs parameters that the run does not have, as it kept no '
        f'{name}; choose policy or frozen'
      )
    learned[part] = _copied(getattr(past.before, part))
  state = dataclasses.replace(state, **learned)
  before = _copied(state)
  batches = builders.make_batches(config, model, mesh, past.kept)
  batch = batches.at(int(past.before.step))
  asking = train.answers_of(config, model, workdir, asks=False)
  train_step = builders.make_train_step(model, config, mesh, state, **asking)
  after, metrics, _ = train_step(state, batch)
  return PastStep(before, after, batch, _as_logged(metrics))


def _copied(tree):
  return jax.tree.map(lambda x: x.copy(), tree)


def _as_logged(metrics) -> dict[str, float]:
  """Floats by name, without the metrics that this step did not measure (NaN)."""
  found = {name: float(value) for name, value in sorted(jax.device_get(metrics).items())}
  return {name: value for name, value in found.items() if not math.isnan(value)}


# Comparing.


def differences(logged: dict, metrics: dict) -> dict:
  """{name: [logged, recomputed]} of all logged numbers that are not equal; None for a missing one.

  A number that only the recomputed step has was not measured when the run was made.
  """
  return {
    name: [value, metrics.get(name)]
    for name, value in sorted(logged.items())
    if metrics.get(name) != value
  }


def compare(past: PastStep, other: PastStep, seen: dict, other_seen: dict) -> dict:
  """How another update would have differed: 'cosine' and 'norm_ratio' of the two updates, and in
  'tasks' how far their choices agree.

  seen, other_seen: `look.Seen` by task, for the run's method and for the other one.
  """
  a, b = _update(past), _update(other)
  length, other_length = float(np.linalg.norm(a)), float(np.linalg.norm(b))
  tasks = {}
  for task in seen:
    old, new = seen[task].rewards, other_seen[task].rewards
    tasks[task] = {
      'same_best': float(np.mean(old.argmax(1) == new.argmax(1))),
      'same_worst': float(np.mean(old.argmin(1) == new.argmin(1))),
      'rank_correlation': ranking.rank_correlation(old, new),
    }
  return {
    'cosine': float(a @ b) / max(length * other_length, 1e-300),
    'norm_ratio': other_length / max(length, 1e-300),
    'tasks': tasks,
  }


def _update(step: PastStep) -> np.ndarray:
  """What a step added to the parameters, as one vector."""
  pairs = zip(jax.tree.leaves(step.after.params), jax.tree.leaves(step.before.params))
  return np.concatenate([np.ravel(np.asarray(new) - np.asarray(old)) for new, old in pairs]).astype(
    np.float64
  )
