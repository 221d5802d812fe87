"""The rewards by name, and weighted sums of them (`method.reward`).

  dual               one reward
  dual+0.3*clip      a sum: each term in its own units, times its weight

A term that cannot reward a task is left out there.
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
}


class Term(NamedTuple):
  """A reward of a sum. weight: a finite number, 1 where none is written."""

  name: str
  weight: float

  @property
  def reward(self) -> Reward:
    return REWARDS[self.name]


class Scored(NamedTuple):
  """What samples are worth.

  total (B, G): the weighted sum. terms {name: (B, G)}: of a sum, each term as it is, unweighted;
  of a single reward, nothing.
  """

  total: Any
  terms: dict[str, Any]


def terms(text: str) -> tuple[Term, ...]:
  """The terms of `method.reward`.

  Raises:
    InputError: for what is no sum of known rewards, each once.
  """
  found = [_term(part, text) for part in text.split('+')]
  names = [term.name for term in found]
  twice = [name for name in names if names.count(name) > 1]
  if twice:
    raise InputError(
      f'found config.method.reward={text} with {twice[0]} twice; expected each reward once; add up '
      'their weights'
    )
  return tuple(found)


def _term(part: str, text: str) -> Term:
  weight, _, name = part.rpartition('*')
  name = name.strip()
  if name not in REWARDS:
    raise InputError(
      f'found config.method.reward={text!r}; expected one of {", ".join(REWARDS)}, or a weighted '
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
      f'found the weight {weight.strip()!r} in config.method.reward={text!r}; expected a number '
      'other than 0, as in dual+0.3*clip'
    )
  return Term(name, number)


def terms_of(text: str, task: str) -> tuple[Term, ...]:
  """The terms that reward a task."""
  return tuple(term for term in terms(text) if task in term.reward.tasks)


def tasks(text: str) -> tuple[str, ...]:
  """The tasks that at least one term can reward."""
  able = [task for term in terms(text) for task in term.reward.tasks]
  return tuple(dict.fromkeys(able))


def fields(text: str) -> tuple[str, ...]:
  """Names in `data.fields.FIELDS` that the terms need of a batch."""
  needed = [field for term in terms(text) for field in term.reward.fields]
  return tuple(dict.fromkeys(needed))


def is_self_reward(text: str, task: str) -> bool:
  """Whether a task's reward depends on the scorer."""
  return any(term.reward.self_reward for term in terms_of(text, task))


def load(method) -> dict[str, Any] | None:
  """The weights of the terms that have some, by name; None where none has."""
  loaders = {term.name: term.reward.load for term in terms(method.reward)}
  weights = {name: loader(method) for name, loader in loaders.items() if loader is not None}
  return weights or None


def score(x: RewardInputs) -> Scored:
  """The configured reward of each sample, float32. An empty text has the worst of its group."""
  chosen = terms_of(x.method.reward, x.task)
  values = {term.name: _score_term(term, x) for term in chosen}
  weighted = [
    values[term.name] if term.weight == 1 else term.weight * values[term.name] for term in chosen
  ]
  total = functools.reduce(jnp.add, weighted)
  if x.task == 'understanding':
    total = dual.worst_where_empty(total, x.text, x.eos_id)
  is_sum = len(terms(x.method.reward)) > 1
  return jax.lax.stop_gradient(Scored(total, values if is_sum else {}))


def _score_term(term: Term, x: RewardInputs):
  weights = (x.reward_params or {}).get(term.name)
  return term.reward.function(x._replace(reward_params=weights)).astype(jnp.float32)
