"""What the exact judge of Scenes adds to the probe: verdicts on images and texts, wrong words and
clauses, and true pairs.

Axes: P inputs, G candidates, H W pixels.
"""

import re

import numpy as np

from dsr_jax.data import order
from dsr_jax.evaluate import scores as scores_lib
from dsr_jax.scenes import grammar, judge, render, sets

_SWAP_CATEGORIES = {'colours': 'color_attr', 'counts': 'counting', 'relations': 'position'}
_RELATION_WORDS = ('left', 'right', 'above', 'over', 'below', 'under', 'next', 'beside', 'near')


def _words():
  """Word -> (field, value)."""
  table = {
    w: ('shape', i)
    for i, words in enumerate(grammar.NOUNS)
    for n in words
    for w in (n, grammar.PLURALS.get(n, n + 's'))
  }
  table |= {w: ('colour', i) for i, words in enumerate(grammar.COLOUR_WORDS) for w in words}
  table |= {w: ('texture', i) for i, words in enumerate(grammar.TEXTURE_WORDS) for w in words}
  table |= {w: ('texture', i) for i, w in grammar.TEXTURE_NOUNS.items()}
  table |= {w: ('size', value) for value, words in grammar.SIZE_WORDS.items() for w in words}
  return table | {w: ('count', i) for i, w in enumerate(grammar.NUMBERS) if i > 1}


_WORDS = _words()


def prompts(seed: int, number: int) -> list[grammar.Prompt]:
  """A run's first prompts, with their atoms."""
  return [
    sets.training_prompt(seed, i)
    for i in order.items(seed, order.PROMPTS, range(number), sets.REINFORCEMENT_INPUTS)
  ]


def scenes(seed: int, number: int) -> list:
  """The scenes that a run's first images show."""
  return [
    sets.training_scene(seed, i)
    for i in order.items(seed, order.PICTURES, range(number), sets.REINFORCEMENT_INPUTS)
  ]


def true_pairs(number: int, seed: int) -> list[tuple[str, str, np.ndarray]]:
  """(kind of swap, text, image (H, W, 3) uint8 for which the text is true), `number` of each kind;
  no run has these inputs.
  """
  rng = np.random.default_rng((77, seed))
  out = []
  for kind, category in _SWAP_CATEGORIES.items():
    for _ in range(number):
      scene = grammar.prompt_scene(rng, category)
      while sets.split_of(scene) != 'validation':
        scene = grammar.prompt_scene(rng, category)
      out.append((kind, grammar.prompt_of(scene, category, rng).text, render.render(scene)))
  return out


def judge_pictures(asked, pixels) -> dict:
  """asked: P prompts; pixels (P, G, H, W, 3) -> 'right' and 'graded' (P, G) float, and the
  readings.
  """
  verdicts = scores_lib.judge_pictures(asked, pixels)
  return {
    'right': verdicts['geneval'].astype(float),
    'graded': verdicts['graded'],
    'readings': judge.read(pixels.reshape(-1, *pixels.shape[2:])),
  }


def judge_texts(shown, texts) -> dict:
  """shown: P scenes; texts: P lists of G -> 'right' (the text says nothing wrong) and 'f1' of
  atoms, (P, G) float.
  """
  counts = [
    [judge.count_atoms(text, scene) for text in group] for scene, group in zip(shown, texts)
  ]
  right = np.array([[c.parsed and c.right == c.stated for c in group] for group in counts], float)

  def f1(p, r):
    return 2 * p * r / (p + r) if p + r else 0.0

  scores = [
    [f1(c.right / max(c.stated, 1), c.recalled / c.total) for c in group] for group in counts
  ]
  return {'right': right, 'f1': np.array(scores)}


def wrong_words(prompt: grammar.Prompt, reading: judge.Reading) -> list[tuple[int, int, bool]]:
  """(start, end, wrong) of the words of a prompt that an image makes true or false. The objects of
  a prompt differ in shape.

  A noun is wrong if the image has no such object; an adjective, a number or a relation if it is
  false for objects that are present. Words about a missing object are omitted.
  """
  if reading.scene is None:
    return []
  clause_of = {c.shape: c for c in prompt.atoms.clauses}
  said, pending, last, attribute = [], [], None, False  # (word, shape)
  for m in re.finditer('[a-z]+', prompt.text.lower()):
    word = m.group()
    field, value = _WORDS.get(word, (None, None))
    if word in ('is', 'are'):
      attribute = True  # the next adjectives are about the object before
    elif word in ('a', 'an', 'one'):
      attribute = False
    elif word in _RELATION_WORDS:
      said.append((m.span(), 'relation', None, None))
      attribute = False
    elif field == 'shape':
      said += [(span, f, v, value) for span, f, v in pending] + [(m.span(), 'shape', value, value)]
      pending, last, attribute = [], value, False
    elif field and (word in grammar.TEXTURE_NOUNS.values() or attribute and field != 'count'):
      said.append((m.span(), field, value, last))
    elif field:
      pending, attribute = [*pending, (m.span(), field, value)], False
  out = []
  for (start, end), field, value, shape in said:
    wrong = (
      _relation_wrong(prompt.atoms, reading.things)
      if field == 'relation'
      else _wrong(
        field, value, clause_of.get(shape), [t for t in reading.things if t.shape == shape]
      )
    )
    if wrong is not None:
      out.append((start, end, wrong))
  return out


def _wrong(field, value, clause, things):
  if clause is None or (field != 'shape' and not things):
    return None
  if field == 'shape':
    return not things
  if field == 'count':
    return len(things) != value
  return sum(getattr(t, field) == value for t in things) < clause.count


def _relation_wrong(atoms, things):
  if not atoms.relations:
    return None
  relation = atoms.relations[0]
  a, b = (
    [t for t in things if t.shape == atoms.clauses[i].shape]
    for i in (relation.subject, relation.target)
  )
  if not a or not b:
    return None
  return not any(grammar.relation_holds(relation.name, x, y) for x in a for y in b if x is not y)


def wrong_clause(text: str, scene) -> bool | None:
  """Whether a clause says something wrong about a scene; None if it is not a text of Scenes."""
  counts = judge.count_atoms(text, scene)
  return counts.right < counts.stated if counts.parsed else None
