"""A past step again: executed from the nearest checkpoint, compared with what was logged, and taken
apart.

  python -m dsr_jax.replay --workdir=runs/scenes --step=7 --input=2
  python -m dsr_jax.replay --workdir=runs/scenes --step=7 --objective=grpo --scorer=frozen

The recomputed line of metrics equals the logged one exactly on the CPU (all but time and memory).
The page shows the step's candidates with their log-probabilities and rewards, who was chosen, and
whose gradient it was; with another objective, scorer or reward also what the update would have
been, from the same parameters and the same samples. The run's folder is only read, but for the
output, WORKDIR/replays/STEP by
default: replay.html and replay.json.
"""

import dataclasses
import json
import math
import os

from absl import flags

from dsr_jax import cli as commands
from dsr_jax import config as config_lib
from dsr_jax.errors import InputError, run_main

SHOWN = 3  # inputs of each task on the page, unless one is named
CHANGES = ('objective', 'scorer', 'reward')


@dataclasses.dataclass
class Replayed:
  """A step that ran again. before, after: states; batch: its inputs; values: its metrics; start:
  the checkpoint it began from (0: none).
  """

  before: dict
  after: dict
  batch: dict
  values: dict
  logged: dict
  start: int


def read_run(workdir: str):
  """A run's `config.Config` and its logged lines of metrics {step: line}, without time and memory.
  InputError where there is no run.
  """
  from dsr_jax.runtime import metrics as metrics_lib

  path = os.path.join(workdir, 'config.json')
  if not os.path.isfile(path):
    raise InputError(f'found no {path}; expected the workdir of a run; name it in --workdir')
  with open(path, encoding='utf-8') as f:
    config = config_lib.from_config_dict(config_lib.completed(json.load(f)['config']))
  lines = (
    metrics_lib.repeatable(workdir)
    if os.path.isfile(os.path.join(workdir, metrics_lib.FILE))
    else []
  )
  return config, {line.pop('step'): line for line in lines if 'loss' in line}


def check_step(step: int, lines: dict, workdir: str):
  """InputError for a step that has not been run, saying which have."""
  if step not in lines:
    have = f'{min(lines)} to {max(lines)}' if lines else 'no step yet'
    raise InputError(
      f'found --step={step} of the run {workdir}, which has run {have}; expected one of them; '
      'change --step'
    )


def changed(config, changes: dict):
  """The configuration with other values of `method`; InputError where they do not exist or do not
  go together.
  """
  settings = config_lib.to_json(config)
  settings['method'] |= changes
  return config_lib.from_config_dict(settings)


def replay(parts, config, workdir: str, step: int, lines: dict, mesh, model) -> Replayed:
  """Executes the run's steps from the nearest checkpoint before `step` until it is done."""
  import jax

  from dsr_jax.runtime import checkpoints as checkpoints_lib
  from dsr_jax.runtime import workdir as workdir_lib

  batches = parts.make_batches(config, model, mesh)
  state = parts.init_state(model, config, mesh)
  about = workdir_lib.about(config, model.source, batches.fingerprint)
  start = 0
  if os.path.isdir(os.path.join(workdir, 'checkpoints')):
    kept = checkpoints_lib.Checkpoints(config.system.bucket or workdir, about, read_only=True)
    try:
      start = max((s for s in kept.steps() if s < step), default=0)
      if start:
        state = kept.restore(state, start)
    finally:
      kept.close()
  commands.log(
    f'from         {f"the checkpoint of step {start}" if start else "the initial model"}; '
    f'{step - start} to run'
  )
  step_fn = parts.make_step(model, config, mesh)
  for now in range(start + 1, step + 1):
    batch = batches.at(now - 1)
    before = jax.tree.map(lambda x: x.copy(), state) if now == step else None
    state, values, _ = step_fn(state, batch)
    commands.log(f'step {now}')
  return Replayed(before, state, batch, _numbers(values), lines[step], start)


def _numbers(values) -> dict:
  """A step's metrics as they are logged: floats by name, without those that this step did not
  measure (NaN).
  """
  import jax

  found = {name: float(value) for name, value in sorted(jax.device_get(values).items())}
  return {name: value for name, value in found.items() if not math.isnan(value)}


def differences(logged: dict, values: dict) -> dict:
  """{name: [logged, recomputed]} of what is not the very same number; None stands for a missing
  one.
  """
  return {
    name: [logged.get(name), values.get(name)]
    for name in sorted(logged.keys() | values.keys())
    if logged.get(name) != values.get(name)
  }


def what_if(parts, config, replayed: Replayed, mesh, model):
  """The same step under another method: its metrics, its state after it, and its state before
  it.
  """
  import jax

  state = parts.init_state(model, config, mesh)
  missing = [name for name in state if name not in replayed.before]
  if missing:
    raise InputError(
      f'found scorer={config.method.scorer} in a replay of a run that kept no {missing[0]}; '
      'expected a scorer whose parameters '
      'the run has; choose policy or frozen'
    )
  same = {
    name: jax.tree.map(lambda x: x.copy(), replayed.before[name])
    for name in state
    if name != 'frozen'
  }
  before = {**state, **same}
  batch = parts.make_batches(config, model, mesh).at(int(replayed.before['step']))
  kept = jax.tree.map(lambda x: x.copy(), before)
  after, values, _ = parts.make_step(model, config, mesh)(before, batch)
  return kept, after, batch, _numbers(values)


def compare(replayed: Replayed, after, seen, other) -> dict:
  """How another update would have differed: {'cosine', 'norm_ratio'} of the two updates, and a
  task's choices.

  seen, other: `replay_step.Seen` by task, of the run's method and of the other one.
  """
  import jax
  import numpy as np

  from dsr_jax.probe import measures

  def minus(new):
    return np.concatenate(
      [
        np.ravel(np.asarray(a) - np.asarray(b))
        for a, b in zip(jax.tree.leaves(new['params']), jax.tree.leaves(replayed.before['params']))
      ]
    ).astype(np.float64)

  a, b = minus(replayed.after), minus(after)

  def norm(x):
    return float(np.linalg.norm(x))

  out = {
    'cosine': float(a @ b) / max(norm(a) * norm(b), 1e-300),
    'norm_ratio': norm(b) / max(norm(a), 1e-300),
    'tasks': {},
  }
  for task in seen:
    old, new = seen[task].rewards, other[task].rewards
    out['tasks'][task] = {
      'same_best': float(np.mean(old.argmax(1) == new.argmax(1))),
      'same_worst': float(np.mean(old.argmin(1) == new.argmin(1))),
      'rank_correlation': measures.rank_correlation(old, new),
    }
  return out


def _task_json(seen, model, chosen):
  """A task's numbers for replay.json: shares of all inputs, and everything about those in
  `chosen`.
  """
  import numpy as np

  inputs = []
  for i in chosen:
    one = {
      'input': i,
      'rewards': seen.rewards[i].tolist(),
      'learning': seen.index[i].tolist(),
      'weight': float(seen.weight[i]),
      'push': seen.push[i].tolist(),
      'gradient_share': float(seen.share[i]),
      'gradient_norm': float(seen.norm[i]),
      'candidates': [],
    }
    for j in range(seen.rewards.shape[1]):
      mask = seen.mask[i, j]
      tokens = (
        seen.candidates[i, j] if not hasattr(seen.candidates, 'ids') else seen.candidates.ids[i, j]
      )
      text = (
        {}
        if not hasattr(seen.candidates, 'ids')
        else {'text': model.processor.decode(tokens[mask])}
      )
      one['candidates'].append(
        {
          **text,
          'tokens': tokens[mask].tolist(),
          'logps': commands.rounded(np.asarray(seen.logps[i, j][mask], np.float32)),
        }
      )
    inputs.append(one)
  return {
    'gradient_shares': seen.share.tolist(),
    'gradient_norms': seen.norm.tolist(),
    'inputs': inputs,
  }


def main(argv, f=flags.FLAGS):
  commands.no_arguments(argv)
  commands.require(workdir=f.workdir, step=f.step)
  config, lines = read_run(f.workdir)
  check_step(f.step, lines, f.workdir)
  if f.input is not None and not 0 <= f.input < config.method.inputs_per_task:
    raise InputError(
      f'found --input={f.input}; expected 0 to {config.method.inputs_per_task - 1}, the inputs of '
      'a task in a step of this run; '
      'change it'
    )
  changes = {name: getattr(f, name) for name in CHANGES if getattr(f, name)}
  other_config = changed(config, changes) if changes else None
  output = f.output or os.path.join(f.workdir, 'replays', f'{f.step:06d}')
  commands.check_output(output, lambda name: name in ('replay.html', 'replay.json'))

  import jax  # after the cheap checks: it takes seconds to import

  from dsr_jax import parts as parts_lib
  from dsr_jax.replay import look as replay_step
  from dsr_jax.replay import page as replay_page
  from dsr_jax.runtime import workdir as workdir_lib

  if config.system.compile_cache:
    workdir_lib.use_compile_cache(config.system.compile_cache)
  parts = parts_lib.real()
  mesh = parts.make_mesh(config.system.mesh)
  with jax.set_mesh(mesh):
    model = parts.load_model(config.model)
    done = replay(parts, config, f.workdir, f.step, lines, mesh, model)
    different = differences(done.logged, done.values)
    commands.log('looking      into its candidates and gradients')
    seen, by_part = replay_step.look(model, config, done.before, done.batch)
    result = {
      'workdir': f.workdir,
      'step': f.step,
      'from_checkpoint': done.start,
      'exact': not different,
      'differences': different,
      'metrics': done.values,
      'gradient_by_part': by_part,
    }
    other = None
    if other_config:
      commands.log(f'what if      {", ".join(f"{k}={v}" for k, v in changes.items())}')
      before, after, batch, values = what_if(parts, other_config, done, mesh, model)
      other, _ = replay_step.look(model, other_config, before, batch)
      result['what_if'] = {
        'changes': changes,
        'metrics': values,
        **compare(done, after, seen, other),
      }
    chosen = (
      list(range(min(SHOWN, config.method.inputs_per_task))) if f.input is None else [f.input]
    )
    shown = replay_page.prepare(model, done.before, done.batch, seen, other, chosen)
  result |= {task: _task_json(part, model, chosen) for task, part in seen.items()}
  if other:
    result['what_if'] |= {task: _task_json(part, model, chosen) for task, part in other.items()}
  with commands.whole_directory(output) as aside:
    with open(os.path.join(aside, 'replay.json'), 'w', encoding='utf-8') as file:
      json.dump(result, file, indent=1, allow_nan=False)
    with open(os.path.join(aside, 'replay.html'), 'w', encoding='utf-8') as file:
      file.write(replay_page.page(result, shown))
  commands.log(
    f'exact        {"yes, every number" if not different else "no: " + ", ".join(different)}'
  )
  keys = ('step', 'from_checkpoint', 'exact', 'differences', 'metrics', 'gradient_by_part')
  said = {
    'output': output,
    'page': os.path.join(output, 'replay.html'),
    **{k: result[k] for k in keys},
  }
  if other:
    said['what_if'] = {
      k: result['what_if'][k] for k in ('changes', 'cosine', 'norm_ratio', 'tasks', 'metrics')
    }
  commands.print_json(said)


def define_flags(f=flags.FLAGS):
  flags.DEFINE_string('workdir', None, 'The folder of a run; only read.', flag_values=f)
  flags.DEFINE_integer('step', None, 'The step to run again, from 1.', flag_values=f)
  flags.DEFINE_integer(
    'input',
    None,
    'The one prompt, and picture, to show, from 0; the first three by default.',
    flag_values=f,
  )
  flags.DEFINE_string(
    'objective', '', 'What if the step had had this method.objective?', flag_values=f
  )
  flags.DEFINE_string('scorer', '', 'What if it had had this method.scorer?', flag_values=f)
  flags.DEFINE_string('reward', '', 'What if it had had this method.reward?', flag_values=f)
  flags.DEFINE_string(
    'output', '', 'Folder to write; WORKDIR/replays/STEP by default.', flag_values=f
  )


if __name__ == '__main__':
  define_flags()
  run_main(main)
