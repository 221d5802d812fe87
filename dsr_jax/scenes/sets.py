"""Data sets of Scenes, each a pure function of (seed, index), and the fixed evaluation lists.

The hash of a scene graph determines its split, so pretraining, training prompts, training images,
validation and evaluation share none.
"""

import functools
import hashlib
import itertools

import numpy as np

from dsr_jax.errors import InputError
from dsr_jax.scenes import grammar, questions, render, world

SPLITS = ('pretraining', 'training_prompts', 'training_pictures', 'validation', 'evaluation')
_BUCKETS = (40, 6, 6, 6, 6)  # of 64


def _bucket_table() -> tuple[str, ...]:
  return tuple(name for name, n in zip(SPLITS, _BUCKETS) for _ in range(n))


_SPLIT_OF_BUCKET = _bucket_table()


def split_of(scene: world.Scene) -> str:
  """The only split that may use this scene graph."""
  key = bytes(itertools.chain.from_iterable(world.graph(scene)))
  return _SPLIT_OF_BUCKET[hashlib.blake2b(key, digest_size=1).digest()[0] % 64]


def _rng(purpose: int, seed: int, index: int) -> np.random.Generator:
  return np.random.default_rng((purpose, seed, index))


def _draw(rng, split: str, **how) -> world.Scene:
  while True:
    scene = world.random_scene(rng, **how)
    if split_of(scene) == split:
      return scene


def pretraining_example(seed: int, index: int, p_single: float = 0.0) -> tuple[np.ndarray, str]:
  """A captioned image: pixels (32, 32, 3) uint8 and a noisy, partial caption. Skewed, without
  held-out pairs.

  With probability `p_single`, it shows one thing, for the start of a curriculum.
  """
  rng = _rng(1, seed, index)
  scene = _pretraining_scene(rng, p_single)
  return render.render(scene), grammar.pretraining_caption(scene, rng)


def pretraining_question(
  seed: int, index: int, p_single: float = 0.0
) -> tuple[np.ndarray, str, str]:
  """An image, a question about it and its one-word answer."""
  rng = _rng(2, seed, index)
  scene = _pretraining_scene(rng, p_single)
  question = questions.random_question(scene, rng)
  return render.render(scene), question.text, question.answer


def _pretraining_scene(rng, p_single: float) -> world.Scene:
  kind = 'one' if p_single and rng.random() < p_single else None
  return _draw(rng, 'pretraining', skewed=True, held_out='exclude', kind=kind)


def vocabulary_texts(n: int, seed: int = 0) -> list[str]:
  """About `n` texts of all kinds, to train a tokenizer on."""
  texts = list(grammar.QUESTIONS_DESCRIBE)
  for i in range(n):
    rng = _rng(3, seed, i)
    if i % 4 == 0:
      texts.append(grammar.prompt(rng, grammar.CATEGORIES[i // 4 % len(grammar.CATEGORIES)]).text)
    elif i % 4 == 1:
      question = questions.random_question(
        world.random_scene(rng, skewed=False, held_out='include'), rng
      )
      texts += [question.text, question.answer]
    else:
      texts.append(grammar.caption(world.random_scene(rng, skewed=False, held_out='include'), rng))
  return texts


# Reinforcement: uniform, unpaired, with half of the held-out pairs

REINFORCEMENT_INPUTS = (
  4800  # prompts, and as many images; the paper has 5,600, but 4,800 gives equal categories
)


def training_prompt(seed: int, index: int) -> grammar.Prompt:
  """A prompt; the twelve categories take turns."""
  return _prompt(
    _rng(4, seed, index),
    'training_prompts',
    grammar.CATEGORIES[index % len(grammar.CATEGORIES)],
    'half',
  )


def training_scene(seed: int, index: int) -> world.Scene:
  """The scene of `training_picture`, for tests and reports; training does not use it."""
  return _draw(_rng(5, seed, index), 'training_pictures', skewed=False, held_out='half')


def training_picture(seed: int, index: int) -> np.ndarray:
  """An image without a text: (32, 32, 3) uint8."""
  return render.render(training_scene(seed, index))


@functools.lru_cache(maxsize=16)
def reinforcement_prompts(seed: int) -> tuple[str, ...]:
  """The prompts of a run."""
  return tuple(training_prompt(seed, i).text for i in range(REINFORCEMENT_INPUTS))


def _prompt(rng, split: str, category: str, held_out: str) -> grammar.Prompt:
  return grammar.prompt_of(_prompt_scene(rng, split, category, held_out), category, rng)


def _prompt_scene(rng, split: str, category: str, held_out: str) -> world.Scene:
  while True:
    scene = grammar.prompt_scene(rng, category, held_out=held_out)
    for _ in range(100):  # a single thing may have no place in this split
      if split_of(scene) == split and grammar.suits(scene, category):
        return scene
      scene = world.rearrange(
        scene, rng
      )  # not a new scene, so that looks stay uniform in every split


# Fixed lists for evaluation and validation: never trained on, with all held-out pairs


def evaluation_prompts(
  per_task: int = 100,
  split: str = 'evaluation',
  seed: int = 0,
  tasks: tuple[str, ...] = grammar.GENEVAL,
) -> list[grammar.Prompt]:
  """`per_task` prompts of each task (GenEval's six, or others of `grammar.CATEGORIES`), in order of
  tasks. For each task, a shorter list is the beginning of a longer one.
  """
  _check_list(split, per_task)
  return [
    _prompt(_rng(6 + SPLITS.index(split), seed, task * 100_000 + i), split, category, 'include')
    for task, category in enumerate(grammar.CATEGORIES)
    if category in tasks
    for i in range(per_task)
  ]


def mixed_prompts(number: int, split: str = 'evaluation') -> list[grammar.Prompt]:
  """The first prompts of GenEval's tasks, which take turns."""
  tasks = len(grammar.GENEVAL)
  each = -(-number // tasks)
  listed = evaluation_prompts(each, split)
  return [listed[task * each + i] for i in range(each) for task in range(tasks)][:number]


def evaluation_scenes(
  number: int = 1000, split: str = 'evaluation', seed: int = 0
) -> list[world.Scene]:
  """Scenes for descriptions and questions."""
  _check_list(split, number)
  purpose = 16 + SPLITS.index(split)
  return [
    _draw(_rng(purpose, seed, i), split, skewed=False, held_out='include') for i in range(number)
  ]


def pictures(scenes) -> np.ndarray:
  """(N, 32, 32, 3) uint8."""
  return np.stack([render.render(s) for s in scenes])


def evaluation_pope(number: int = 500, split: str = 'evaluation', seed: int = 0):
  """(scenes, rows): four yes/no questions about each of `number` images."""
  scenes = evaluation_scenes(number, split, seed)
  return scenes, questions.pope(scenes, _rng(26 + SPLITS.index(split), seed, 0))


def evaluation_choice(number: int = 300, split: str = 'evaluation', seed: int = 0):
  """(scenes, rows): one question with four options, in four rotations, about most of `number`
  images.
  """
  scenes = evaluation_scenes(number, split, seed)
  return scenes, questions.multiple_choice(scenes, _rng(36 + SPLITS.index(split), seed, 0))


def evaluation_hallusion(number: int = 250, split: str = 'evaluation', seed: int = 0):
  """(scenes, rows): `number` images, each with an edited version, and two questions about both."""
  rng = _rng(46 + SPLITS.index(split), seed, 0)
  scenes = [s for s in evaluation_scenes(2 * number, split, seed) if questions.can_edit(s)]
  return questions.hallusion_pairs(scenes[:number], rng)


def _check_list(split: str, number: int):
  if split not in ('validation', 'evaluation'):
    raise InputError(f'the list is {split!r}; use validation or evaluation')
  if number < 1:
    raise InputError(f'the list has {number} entries; use at least 1')


# Of the combinations of a shape and its color or texture in a prompt, what training shows of the
# rarest one.
NOVELTY = {
  'seen': 'combinations seen in pretraining',
  'reinforced': 'combinations of reinforcement only',
  'new': 'combinations never seen',
}


def novelty(atoms: grammar.Atoms) -> str:
  """A key of NOVELTY: 'reinforced' has a pair that only reinforcement showed, 'new' one that no
  training showed.
  """
  level = 0
  for clause in atoms.clauses:
    for value, table in (
      (clause.colour, world.HELD_OUT_COLOUR),
      (clause.texture, world.HELD_OUT_TEXTURE),
    ):
      if (clause.shape, value) in table:
        level = max(level, 1 if table.index((clause.shape, value)) < len(table) // 2 else 2)
  return list(NOVELTY)[level]
