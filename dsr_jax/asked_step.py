"""A step with an external reward: `step.rollout` and `step.update` as two programs, with the
request for rewards in between.

All computation is in `step`; this module only calls the two in order.
Axes: B inputs, G samples, T tokens.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from dsr_jax import sharding
from dsr_jax import step as step_lib
from dsr_jax.errors import InputError
from dsr_jax.models.unified import Text
from dsr_jax.rewards import external, table
from dsr_jax.rewards.external import Candidate
from dsr_jax.runtime import distributed, run_files
from dsr_jax.runtime.progress import say


class RewardsFailed(distributed.SharedError):
  """The rewards for this step could not be obtained. The state before the step is still intact."""


@dataclasses.dataclass
class Answers:
  """Requests the rewards of a step, or reads the saved ones if the step ran before.

  workdir: the run's workdir. team: the first process asks, and all get the rewards. asks: False to
  only read saved rewards, as `replay` does.
  """

  config: Any
  workdir: str
  processor: Any
  team: distributed.Team = dataclasses.field(default_factory=distributed.Team)
  asks: bool = True

  def check(self):
    """InputError unless all sources respond. Called before any work, by all processes."""
    self._together(lambda: external.check(self.config.method, *self._limits) or {})

  def __call__(self, step: int, ctx: step_lib.StepContext, halves) -> dict[str, np.ndarray]:
    """The rewards {task: (B, G)} of the samples in a step's halves. With several processes, all
    must call it.
    """
    seen = {name: _seen(half) for name, half in halves.items() if ctx.tasks[name].asked}
    found = self._together(lambda: self._said(step, seen))
    return {name: np.asarray(rewards, np.float32) for name, rewards in found.items()}

  @property
  def _limits(self):
    return self.config.system.external_seconds, self.config.system.external_retries

  def _together(self, ask):
    """Runs `ask` in the first process; all processes get its result or its error."""
    found, error = None, ''
    if self.team.lead:
      try:
        found = ask()
      except InputError as e:
        error = str(e)
    found, error = self.team.shared((found, error))
    if error:
      raise RewardsFailed(error)
    return found

  def _said(self, step: int, seen) -> dict[str, list]:
    kept = external.kept(self.workdir, step)
    said = {}
    for name, samples in seen.items():
      before = kept.get(name)
      same = before is not None and before['samples'] == samples['digest']
      if not same and not self.asks:
        raise InputError(
          f'{self.workdir} has no saved rewards for these candidates of step {step}; candidates '
          'may differ on other devices: use the devices that the run used'
        )
      said[name] = before if same else self._ask(step, name, samples)
    if said != kept:
      with run_files.writing(external.path_of(self.workdir, step)):
        external.keep(self.workdir, step, said)
    return {name: one['rewards'] for name, one in said.items()}

  def _ask(self, step: int, task: str, samples) -> dict:
    candidates = self._candidates(samples)
    source = self.config.method.external_source(task)
    rewards = external.ask(source, task, candidates, *self._limits)
    rewards = rewards.reshape(samples['shape'])
    equal = external.equal_groups(rewards)
    if equal:
      say(
        f'alarm        step {step}: all rewards of {source} are equal in {equal} of '
        f'{len(rewards)} groups of {task}; they do not distinguish the candidates'
      )
    return {'samples': samples['digest'], 'rewards': rewards.tolist()}

  def _candidates(self, samples) -> list[Candidate]:
    """The B G candidates, group by group."""

    def words(ids, mask):
      return self.processor.decode(ids[mask])

    prompts, pixels, texts = (samples[name] for name in ('prompts', 'pixels', 'texts'))
    inputs, group = samples['shape']
    found = []
    for i in range(inputs):
      prompt = words(prompts.ids[i], prompts.mask[i])
      for j in range(group):
        text = None if texts is None else words(texts.ids[i, j], texts.mask[i, j])
        picture = pixels[i, j] if texts is None else pixels[i]
        found.append(Candidate(i, j, prompt, picture, text))
    return found


def _seen(half) -> dict:
  """The parts of a half that a request needs, on the host. All processes must call it."""
  inputs, rollout = half.inputs, half.rollout
  drawn = rollout.pixels is not None
  texts = None if drawn else Text(*map(sharding.fetch, rollout.samples))
  prompts = Text(*map(sharding.fetch, inputs.prompt if drawn else inputs.question))
  pixels = sharding.fetch(rollout.pixels if drawn else inputs.pixels)
  samples = (sharding.fetch(rollout.samples),) if drawn else texts
  return {
    'shape': rollout.rewards.shape,
    'prompts': prompts,
    'pixels': pixels,
    'texts': texts,
    'digest': external.digest(*prompts, *samples, *(() if drawn else (pixels,))),
  }


class AskedStep:
  """Like the jitted `train_step`: (state, batch) -> `StepOutput`. Donates the state in the update.

  Raises `RewardsFailed`, which leaves the state unchanged.
  """

  def __init__(self, ctx: step_lib.StepContext, answers: Answers, rollout, update):
    self._ctx = ctx
    self._answers = answers
    self._rollout = rollout
    self._update = update

  def __call__(self, state, batch):
    halves = self._rollout(state, batch)
    with jax.transfer_guard_device_to_host('allow'):  # the loop forbids it while a step runs
      answers = self._answers(int(sharding.fetch(state.step)) + 1, self._ctx, halves)
    return self._update(state, batch, halves, answers)

  def lower(self, state, batch):
    """Same as for a jitted function."""
    return _Lowered(self, self._rollout.lower(state, batch), state, batch)

  def compiled(self, rollout, state, batch):
    """This step with both programs compiled. rollout: the first program."""
    halves = jax.tree.map(
      lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
      jax.eval_shape(self._rollout, state, batch),
      rollout.output_shardings,
    )
    rewards = {
      name: jax.ShapeDtypeStruct(half.rollout.rewards.shape, np.float32)
      for name, half in halves.items()
      if self._ctx.tasks[name].asked
    }
    update = self._update.lower(state, batch, halves, rewards).compile()
    return _Compiled(self._ctx, self._answers, rollout, update)


class _Lowered:
  def __init__(self, step: AskedStep, rollout, state, batch):
    self._step, self._rollout, self._inputs = step, rollout, (state, batch)

  def compile(self):
    return self._step.compiled(self._rollout.compile(), *self._inputs)


class _Compiled(AskedStep):
  def memory_analysis(self):
    """The analysis of the larger program."""
    found = [program.memory_analysis() for program in (self._rollout, self._update)]
    return max(found, key=lambda x: x.temp_size_in_bytes) if all(found) else None


def make(ctx: step_lib.StepContext, state, mesh, answers: Answers) -> AskedStep:
  """The step of a run whose `method.reward` has an external term."""
  assert table.is_asked(ctx.method)

  def update(state, batch, halves, rewards):
    halves = step_lib.answered(ctx, state, halves, rewards)
    return step_lib.update(ctx, state, batch, halves)

  return AskedStep(
    ctx,
    answers,
    jax.jit(functools.partial(step_lib.rollout, ctx)),
    jax.jit(
      update,
      donate_argnums=0,
      out_shardings=step_lib.output_shardings(ctx, state, mesh),
    ),
  )
