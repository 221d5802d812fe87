"""The rewards by name, and weighted sums of them (`method.reward`).

  dual               one reward
  dual+0.3*clip      a sum: each term in its own units, times its weight

A task skips the terms that cannot reward it.
Axes: B inputs, G samples.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsr_jax.errors import InputError
from dsr_jax.rewards import clip, controls, dual, variants
from dsr_jax.rewards.base import Reward, RewardInputs

JUDGES = 'judge', 'judge_strict'  # they know only Scenes
REWARDS = {
  'dual': Reward(dual.dual),
  'probability': Reward(variants.probability),
  'pmi': Reward(variants.pmi),
  'contrastive': Reward(variants.contrastive, fields=('negatives',)),
  'vqa': Reward(variants.vqa, fields=('yes_question',)),
  'clip': Reward(
    clip.clip, fields=('clip',), tasks=('generation',), load=clip.load, self_reward=False
  ),
  'random': Reward(controls.random, self_reward=False),
  'forward': Reward(controls.forward),
  'shuffled': Reward(controls.shuffled, fields=('others',)),
  'judge': Reward(controls.judge, fields=('vocabulary',), self_reward=False),
  'judge_strict': Reward(controls.judge_strict, fields=('vocabulary',), self_reward=False),
  'external': Reward(None, self_reward=False),
}


class Term(NamedTuple):
  """One reward in a sum. weight: a finite number, 1 if omitted."""

  name: str
  weight: float

  @property
  def reward(self) -> Reward:
    return REWARDS[self.name]


class Scored(NamedTuple):
  """The rewards of samples.

  total (B, G): the weighted sum, still without the external term. terms {name: (B, G)}: each
  unweighted term of a sum; empty for a single reward.
  """

  total: Any
  terms: dict[str, Any]


def terms(text: str) -> tuple[Term, ...]:
  """The terms of `method.reward`.

  Raises:
    InputError: unless it is a sum of known rewards, each at most once.
  """
  found = [_term(part, text) for part in text.split('+')]
  names = [term.name for term in found]
  twice = [name for name in names if names.count(name) > 1]
  if twice:
    raise InputError(
      f'config.method.reward={text} has {twice[0]} twice; use each reward once, with the sum of '
      'its weights'
    )
  return tuple(found)


def _term(part: str, text: str) -> Term:
  weight, _, name = part.rpartition('*')
  name = name.strip()
  if name not in REWARDS:
    raise InputError(
      f'config.method.reward is {text!r}; set it to one of {", ".join(REWARDS)}, or to a weighted '
      'sum of them such as dual+0.3*clip'
    )
  if not weight:
    return Term(name, 1.0)
  try:
    number = float(weight)
  except ValueError:
    number = math.nan
  if not math.isfinite(number) or number == 0:
    raise InputError(
      f'config.method.reward={text!r} has the weight {weight.strip()!r}; use a number other than '
      '0, as in dual+0.3*clip'
    )
  return Term(name, number)


def terms_of(method, task: str) -> tuple[Term, ...]:
  """The terms that reward a task."""
  return tuple(term for term in terms(method.reward) if task in tasks_of(term, method))


def tasks_of(term: Term, method) -> tuple[str, ...]:
  """The tasks that a term rewards."""
  if term.reward.function is not None:
    return term.reward.tasks
  return tuple(task for task in term.reward.tasks if method.external_source(task))


def tasks(method) -> tuple[str, ...]:
  """The tasks that at least one term rewards."""
  able = [task for term in terms(method.reward) for task in tasks_of(term, method)]
  return tuple(dict.fromkeys(able))


def asked(method, task: str) -> Term | None:
  """The external term of a task, or None."""
  outside = [term for term in terms_of(method, task) if term.reward.function is None]
  return outside[0] if outside else None


def is_asked(method) -> bool:
  """Whether any task of the run has an external term."""
  return any(asked(method, task) for task in method.tasks)


def fields(text: str) -> tuple[str, ...]:
  """The names in `data.fields.FIELDS` that the terms need in a batch."""
  needed = [field for term in terms(text) for field in term.reward.fields]
  return tuple(dict.fromkeys(needed))


def is_self_reward(method, task: str) -> bool:
  """Whether a task's reward depends on the scorer."""
  return any(term.reward.self_reward for term in terms_of(method, task))


def load(method) -> dict[str, Any] | None:
  """The weights of the terms that have some, by name; None if no term has any."""
  loaders = {term.name: term.reward.load for term in terms(method.reward)}
  weights = {name: loader(method) for name, loader in loaders.items() if loader is not None}
  return weights or None


def score(x: RewardInputs) -> Scored:
  """The configured reward of each sample, float32. An empty text gets the worst of its group."""
  chosen = [term for term in terms_of(x.method, x.task) if term.reward.function is not None]
  values = {term.name: _score_term(term, x) for term in chosen}
  weighted = [_weighted(term, values[term.name]) for term in chosen]
  total = functools.reduce(jnp.add, weighted) if weighted else jnp.zeros(x.sample_keys.shape)
  if x.task == 'understanding':
    total = dual.worst_where_empty(total, x.text, x.eos_id)
  return jax.lax.stop_gradient(Scored(total, values if _is_sum(x.method) else {}))


def with_answer(total, answer, method, task: str):
  """Totals (B, G) and the external rewards (B, G) -> the complete weighted sum."""
  term = asked(method, task)
  assert term is not None
  return total + _weighted(term, answer)


def _weighted(term: Term, values):
  return values if term.weight == 1 else term.weight * values


def _is_sum(method) -> bool:
  return len(terms(method.reward)) > 1


def _score_term(term: Term, x: RewardInputs):
  weights = (x.reward_params or {}).get(term.name)
  return term.reward.function(x._replace(reward_params=weights)).astype(jnp.float32)
