"""The conditional entropy of the grammar: how much of a text its scene leaves open.

log p(text | scene) is exact: it enumerates all ways in which the grammar can derive the text from
the scene, first the plans with the text's atoms, then the wordings of each. Only the average over
scenes and texts is an estimate from a sample.
"""

import math
from typing import NamedTuple

import numpy as np

from dsr_jax.scenes import grammar, judge, world


class Entropy(NamedTuple):
  """Means over texts, in nats, and the standard error of the first."""

  per_text: float
  error: float
  per_token: float


class _DeadEnd(Exception):
  """No continuation of this path leads to the text."""


class _Path:
  """Replaces the random generator: follows `choices`, then takes the first option and records the
  others.
  """

  def __init__(self, choices: list[int], text: str | None):
    self.choices, self.text = choices, text
    self.at, self.probability, self.open = 0, 1.0, []

  def choose(self, weights) -> int:
    possible = [i for i, w in enumerate(weights) if w > 0]
    if not possible:
      raise _DeadEnd
    if self.at == len(self.choices):
      self.open += [self.choices[: self.at] + [i] for i in possible[1:]]
      self.choices = self.choices + possible[:1]
    chosen = self.choices[self.at]
    self.at += 1
    self.probability *= weights[chosen]
    return chosen

  def word(self, words, weights) -> str:
    if len(words) == 1:
      return words[0]
    return words[
      self.choose(
        [w if self.text is None or word in self.text else 0 for word, w in zip(words, weights)]
      )
    ]


def enumerate_paths(program, text: str | None = None):
  """Yields (result, probability) of every path of `program(rng)`; with a text, skips paths that
  cannot produce it.
  """
  pending = [[]]
  while pending:
    path = _Path(pending.pop(), text)
    try:
      result = program(path)
    except _DeadEnd:
      result = None
    pending += path.open
    if result is not None:
      yield result, path.probability


def _meaning(atoms: grammar.Atoms):
  """Atoms regardless of the order of clauses and the direction of relations."""

  def key(c):
    return tuple(-1 if v is None else v for v in c)

  told = []
  for r in atoms.relations:
    a, b = key(atoms.clauses[r.subject]), key(atoms.clauses[r.target])
    told.append(min((a, r.name, b), (b, grammar.INVERSE[r.name], a)))
  return tuple(sorted(map(key, atoms.clauses))), tuple(sorted(told))


def plans(scene: world.Scene, noisy: bool, wanted=None) -> dict[grammar.Atoms, float]:
  """Every plan of a scene and its probability.

  noisy: as in pretraining captions. wanted: skips plans that cannot mean exactly these clauses.
  """
  found = {}
  for groups, p in enumerate_paths(lambda rng: grammar.told_groups(scene, rng)):
    options = [_merge(enumerate_paths(lambda rng, g=g: grammar.describe(rng, g))) for g in groups]
    relations = _merge(enumerate_paths(lambda rng, groups=groups: grammar.relate(rng, groups)))
    for clauses, q in _combine(options, wanted, int(noisy)):
      for related, r in relations.items():
        atoms = grammar.Atoms(clauses, related)
        found[atoms] = found.get(atoms, 0.0) + p * q * r
  if not noisy:
    return found
  mixed = {atoms: p * (1 - grammar.P_WRONG) for atoms, p in found.items()}
  for atoms, p in found.items():
    for wrong, q in enumerate_paths(lambda rng, atoms=atoms: grammar.corrupt(atoms, rng)):
      mixed[wrong] = mixed.get(wrong, 0.0) + p * q * grammar.P_WRONG
  return mixed


def _merge(paths) -> dict:
  merged = {}
  for result, p in paths:
    merged[result] = merged.get(result, 0.0) + p
  return merged


def _combine(options: list[dict], wanted, strangers: int):
  """Yields (clauses, probability) with one choice each, at most `strangers` of them not wanted."""
  if not options:
    yield (), 1.0
    return
  for clause, p in options[0].items():
    left = strangers - (wanted is not None and clause not in wanted)
    if left >= 0:
      for rest, q in _combine(options[1:], wanted, left):
        yield (clause, *rest), p * q


def log_probability(text: str, scene: world.Scene, noisy: bool) -> float:
  """Exact log p(text | scene) in nats."""
  told = judge.parse(text)
  meaning = _meaning(told)
  total = 0.0
  for atoms, p in plans(scene, noisy, frozenset(told.clauses)).items():
    if _meaning(atoms) == meaning:
      total += p * sum(
        q
        for said, q in enumerate_paths(lambda rng, atoms=atoms: grammar.realise(atoms, rng), text)
        if said == text
      )
  return math.log(total)


def conditional_entropy(number: int = 200, seed: int = 0, *, noisy: bool) -> Entropy:
  """H(text | scene) over `number` random pretraining scenes with one text each."""
  losses, tokens = [], 0
  for i in range(number):
    rng = np.random.default_rng((99, seed, i))
    scene = world.random_scene(rng, skewed=True)
    text = grammar.pretraining_caption(scene, rng) if noisy else grammar.caption(scene, rng)
    losses.append(-log_probability(text, scene, noisy))
    tokens += len(grammar.tokens(text))
  mean = float(np.mean(losses))
  return Entropy(mean, float(np.std(losses) / number**0.5), mean * number / tokens)
