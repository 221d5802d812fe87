"""Data sets of Scenes, each a pure function of (seed, index), and the fixed evaluation lists.

Every scene graph belongs to one split by its hash, so pretraining, training prompts, training pictures, validation and
evaluation share none.
"""

import hashlib

import numpy as np

from dsr_jax.scenes import grammar
from dsr_jax.scenes import questions
from dsr_jax.scenes import render
from dsr_jax.scenes import world

SPLITS = ('pretraining', 'training_prompts', 'training_pictures', 'validation', 'evaluation')
_BUCKETS = (40, 6, 6, 6, 6)  # of 64


def _bucket_table() -> tuple[str, ...]:
  return tuple(name for name, n in zip(SPLITS, _BUCKETS) for _ in range(n))


_SPLIT_OF_BUCKET = _bucket_table()


def split_of(scene: world.Scene) -> str:
  """The one split that may use this scene graph."""
  key = np.array(world.graph(scene), np.uint8).tobytes()
  return _SPLIT_OF_BUCKET[hashlib.blake2b(key, digest_size=1).digest()[0] % 64]


def _rng(purpose: int, seed: int, index: int) -> np.random.Generator:
  return np.random.default_rng((purpose, seed, index))


def _draw(rng, split: str, **how) -> world.Scene:
  while True:
    scene = world.random_scene(rng, **how)
    if split_of(scene) == split:
      return scene


def pretraining_example(seed: int, index: int) -> tuple[np.ndarray, str]:
  """A captioned picture: pixels (32, 32, 3) uint8 and a noisy, partial caption. Skewed; no held-out pair."""
  rng = _rng(1, seed, index)
  scene = _draw(rng, 'pretraining', skewed=True, held_out='exclude')
  return render.render(scene), grammar.pretraining_caption(scene, rng)


def pretraining_question(seed: int, index: int) -> tuple[np.ndarray, str, str]:
  """A picture, a question about it and its one-word answer."""
  rng = _rng(2, seed, index)
  scene = _draw(rng, 'pretraining', skewed=True, held_out='exclude')
  question = questions.random_question(scene, rng)
  return render.render(scene), question.text, question.answer


def vocabulary_texts(n: int, seed: int = 0) -> list[str]:
  """About `n` texts of every sort, to train a tokenizer on."""
  texts = [grammar.QUESTIONS_DESCRIBE]
  for i in range(n):
    rng = _rng(3, seed, i)
    if i % 4 == 0:
      texts.append(grammar.prompt(rng, grammar.CATEGORIES[i // 4 % len(grammar.CATEGORIES)]).text)
    elif i % 4 == 1:
      question = questions.random_question(world.random_scene(rng, skewed=False, held_out='include'), rng)
      texts += [question.text, question.answer]
    else:
      texts.append(grammar.caption(world.random_scene(rng, skewed=False, held_out='include'), rng))
  return texts
