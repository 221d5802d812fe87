"""Scores of both tasks: pure functions of what a model made, with 95 % intervals.

Intervals are percentile bootstraps that resample clusters: all images of prompts with the same
words, or all questions and texts on one picture. Every score is a function of sums over clusters,
so a resample is one matrix product; the resampling is seeded, hence common to all variants of one
list. Axes: P prompts, S samples a prompt, C clusters, M sums.
"""

from collections.abc import Callable, Sequence
import re
from typing import NamedTuple

import numpy as np

from dsr_jax.errors import InputError
from dsr_jax.scenes import grammar, judge, questions, world

RESAMPLES = 2000


class Estimate(NamedTuple):
  """A score and its 95 % interval."""

  value: float
  low: float
  high: float


Statistic = Callable[[np.ndarray], np.ndarray]  # (R, M) sums -> (R,)


def estimates(
  sums: np.ndarray,
  statistics: dict[str, Statistic],
  strata: np.ndarray | None = None,
  seed: int = 0,
) -> dict[str, Estimate]:
  """Each statistic of all clusters, and its interval under resampling of clusters within strata.

  sums: (C, M), the contribution of each cluster; strata: (C,) ints, one stratum by default.
  """
  sums = np.asarray(sums, float)
  strata = np.zeros(len(sums), int) if strata is None else np.asarray(strata)
  rng = np.random.default_rng(seed)
  resampled = np.zeros((RESAMPLES, sums.shape[1]))
  for stratum in np.unique(strata):
    members = sums[strata == stratum]
    for start in range(0, RESAMPLES, 100):  # blocks, so that a long list needs little memory
      chosen = members[rng.integers(len(members), size=(100, len(members)))]
      resampled[start : start + 100] += chosen.sum(1)
  whole = sums.sum(0)[None]
  out = {}
  for name, statistic in statistics.items():
    low, high = np.percentile(statistic(resampled), (2.5, 97.5))
    out[name] = Estimate(float(statistic(whole)[0]), float(low), float(high))
  return out


def estimate(
  sums: np.ndarray, statistic: Statistic, strata: np.ndarray | None = None, seed: int = 0
) -> Estimate:
  """`estimates` of one statistic."""
  return estimates(sums, {'value': statistic}, strata, seed)['value']


def difference(
  after: np.ndarray, before: np.ndarray, statistic: Statistic, strata=None
) -> Estimate:
  """The paired difference of a statistic: both (C, M), the same clusters of the same list."""
  if np.shape(after) != np.shape(before):
    raise InputError(
      f'found scores of shapes {np.shape(after)} and {np.shape(before)}; a paired difference '
      'expects '
      'the same list; evaluate both models on one list'
    )
  m = np.shape(after)[1]
  return estimate(
    np.concatenate([after, before], 1), lambda s: statistic(s[:, :m]) - statistic(s[:, m:]), strata
  )


def _divide(a, b):
  return np.where(b > 0, a / np.maximum(b, 1e-9), 0.0)


def _f1(precision, recall):
  return _divide(2 * precision * recall, precision + recall)


def _gather(values: np.ndarray, clusters: Sequence) -> tuple[np.ndarray, list]:
  """Sums rows (N, M) by cluster name: (C, M), and the names in order of appearance."""
  names = {}
  index = [names.setdefault(c, len(names)) for c in clusters]
  sums = np.zeros((len(names), np.shape(values)[1]))
  np.add.at(sums, index, values)
  return sums, list(names)


# Generation


def judge_pictures(prompts: Sequence[grammar.Prompt], pixels: np.ndarray) -> dict[str, np.ndarray]:
  """Verdicts on pixels (P, S, 32, 32, 3) uint8: 'geneval' and 'strict' (P, S) bool, 'graded' (P, S)
  float.
  """
  if len(prompts) != len(pixels) or not len(prompts):
    raise InputError(
      f'found {len(prompts)} prompts and pictures of {len(pixels)}; expected as many, at least '
      'one; '
      'pass samples of all prompts'
    )
  samples = np.shape(pixels)[1]
  readings = judge.read(np.asarray(pixels).reshape(-1, *np.shape(pixels)[2:]))
  verdicts = [judge.verdict(prompts[i // samples], r) for i, r in enumerate(readings)]
  return {
    rule: np.array([v[rule] for v in verdicts]).reshape(-1, samples)
    for rule in ('geneval', 'strict', 'graded')
  }


def generation_sums(
  prompts: Sequence[grammar.Prompt], correct: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """(C, 2 tasks): each cluster's correct images and images, in the columns of its task; and the
  strata (C,).
  """
  tasks = list(dict.fromkeys(p.category for p in prompts))
  rows = np.zeros((len(prompts), 2 * len(tasks)))
  for i, p in enumerate(prompts):
    t = tasks.index(p.category)
    rows[i, 2 * t : 2 * t + 2] = np.sum(correct[i]), np.size(correct[i])
  sums, names = _gather(rows, [(tasks.index(p.category), p.text) for p in prompts])
  return sums, np.array([task for task, _ in names])


def mean_of_tasks(sums: np.ndarray) -> np.ndarray:
  """The plain mean of the tasks' scores, as GenEval has it."""
  return _divide(sums[:, ::2], sums[:, 1::2]).mean(1)


def generation_scores(prompts: Sequence[grammar.Prompt], pixels: np.ndarray) -> dict:
  """Scores of generated pictures.

  Args:
    prompts: P prompts.
    pixels: (P, S, 32, 32, 3) uint8, S pictures each.

  Returns: 'tasks' {category: Estimate}, 'mean' (their plain mean), 'any' (at least one of the S is
    right), 'strict' and 'graded' (means of tasks under the other rules), 'correct' (P, S) bool:
    GenEval's rule.
  """
  verdicts = judge_pictures(prompts, pixels)
  correct = verdicts['geneval']

  def mean(values):
    return estimate(*_with_strata(prompts, values))

  tasks = {}
  for t, category in enumerate(dict.fromkeys(p.category for p in prompts)):
    sums, strata = generation_sums(prompts, correct)
    tasks[category] = estimate(sums[strata == t][:, 2 * t : 2 * t + 2], mean_of_tasks)
  return {
    'tasks': tasks,
    'mean': mean(correct),
    'any': mean(correct.any(1, keepdims=True)),
    'strict': mean(verdicts['strict']),
    'graded': mean(verdicts['graded']),
    'correct': correct,
  }


def _with_strata(prompts, values):
  sums, strata = generation_sums(prompts, values)
  return sums, mean_of_tasks, strata


def generation_difference(
  prompts: Sequence[grammar.Prompt], after: np.ndarray, before: np.ndarray
) -> Estimate:
  """Difference of the mean of tasks between two `correct` arrays (P, S) of one list."""
  sums_after, strata = generation_sums(prompts, after)
  return difference(sums_after, generation_sums(prompts, before)[0], mean_of_tasks, strata)


# Description


def description_sums(
  scenes: Sequence[world.Scene], texts: Sequence[str], clusters: Sequence | None = None
) -> np.ndarray:
  """(C, 8) by picture: stated, right, recalled, total, words, texts, texts with a wrong atom,
  unparsable texts.
  """
  _same_length(scenes, texts)
  rows = []
  for scene, text in zip(scenes, texts):
    c = judge.count_atoms(text, scene)
    rows.append(
      (c.stated, c.right, c.recalled, c.total, c.words, 1, c.right < c.stated, not c.parsed)
    )
  return _gather(np.array(rows, float), range(len(scenes)) if clusters is None else clusters)[0]


DESCRIPTION = {
  'f1': lambda s: _f1(_divide(s[:, 1], s[:, 0]), _divide(s[:, 2], s[:, 3])),
  'precision': lambda s: _divide(s[:, 1], s[:, 0]),
  'recall': lambda s: _divide(s[:, 2], s[:, 3]),
  'hallucination': lambda s: 1 - _divide(s[:, 1], s[:, 0]),
  'hallucinated_texts': lambda s: _divide(s[:, 6], s[:, 5]),
  'unparsable': lambda s: _divide(s[:, 7], s[:, 5]),
  'words': lambda s: _divide(s[:, 4], s[:, 5]),
}


def description_scores(
  scenes: Sequence[world.Scene], texts: Sequence[str], clusters: Sequence | None = None
) -> dict[str, Estimate]:
  """Scores of texts about scenes, over all atoms.

  precision: of the atoms that the texts state; recall: of the shapes, colours and textures there
    are; hallucination:
  1 - precision (CHAIR's instance rate); hallucinated_texts: texts with a wrong atom (its sentence
  rate). Unparsable texts state one atom, a wrong one. `clusters` names each text's picture if
  several texts tell of one.
  """
  return estimates(description_sums(scenes, texts, clusters), DESCRIPTION)


# Questions


def extract_yesno(text: str) -> str:
  """'yes', 'no' or 'unknown', as VLMEvalKit does: the one of the two words that occurs."""
  words = re.sub(r'[;/\[\]"{}()=+\\_\-><@`,?!.]', ' ', text.lower()).split()
  if ('yes' in words) == ('no' in words):
    return 'unknown'
  return 'yes' if 'yes' in words else 'no'


def extract_option(text: str, options: Sequence[str]) -> str | None:
  """The one option whose words occur in the text, or None."""
  found = [o for o in options if re.search(rf'\b{re.escape(o)}\b', text.lower())]
  return found[0] if len(found) == 1 else None


def yesno_sums(
  answers: Sequence[str], truths: Sequence[str], clusters: Sequence | None = None
) -> np.ndarray:
  """(C, 6): true positives, false positives, false negatives, right, said yes, number. Unknown
  counts as no in F1.
  """
  _same_length(truths, answers)
  rows = []
  for answer, truth in zip(answers, truths):
    said = extract_yesno(answer)
    rows.append(
      (
        (said == 'yes') & (truth == 'yes'),
        (said == 'yes') & (truth == 'no'),
        (said != 'yes') & (truth == 'yes'),
        said == truth,
        said == 'yes',
        1,
      )
    )
  return _gather(np.array(rows, float), range(len(rows)) if clusters is None else clusters)[0]


YESNO = {
  'f1': lambda s: _divide(2 * s[:, 0], 2 * s[:, 0] + s[:, 1] + s[:, 2]),
  'accuracy': lambda s: _divide(s[:, 3], s[:, 5]),
  'yes_ratio': lambda s: _divide(s[:, 4], s[:, 5]),
}


def yesno_scores(
  answers: Sequence[str], truths: Sequence[str], clusters: Sequence | None = None
) -> dict[str, Estimate]:
  """F1 (positive = yes), accuracy and share of yes. `clusters` names each question's picture."""
  return estimates(yesno_sums(answers, truths, clusters), YESNO)


def pope_sums(
  rows: Sequence[questions.Row], answers: Sequence[str], tracks: Sequence[str] = questions.TRACKS
) -> np.ndarray:
  """`yesno_sums` by picture, a row counting once in each of its tracks: VLMEvalKit's Overall."""
  _same_length(rows, answers)
  each = [(a, r) for a, r in zip(answers, rows) for t in r.tracks if t in tracks]
  return yesno_sums([a for a, _ in each], [r.answer for _, r in each], [r.picture for _, r in each])


def pope_scores(
  rows: Sequence[questions.Row], answers: Sequence[str]
) -> dict[str, dict[str, Estimate]]:
  """{'overall' and each track: {'f1', 'accuracy', 'yes_ratio'}}."""
  parts = {'overall': questions.TRACKS, **{t: (t,) for t in questions.TRACKS}}
  return {
    part: estimates(pope_sums(rows, answers, tracks), YESNO) for part, tracks in parts.items()
  }


def choice_sums(rows: Sequence[questions.Row], answers: Sequence[str]) -> np.ndarray:
  """(C, 4) by question: its rotations that are right, rotations, whether all of them are right,
  1.
  """
  _same_length(rows, answers)
  right = np.array(
    [[extract_option(a, r.options) == r.answer, 1] for a, r in zip(answers, rows)], float
  )
  sums, _ = _gather(right, [r.group for r in rows])
  return np.concatenate([sums, sums[:, :1] == sums[:, 1:], np.ones((len(sums), 1))], 1)


CHOICE = {
  'accuracy': lambda s: _divide(s[:, 0], s[:, 1]),
  'circular': lambda s: _divide(s[:, 2], s[:, 3]),
}


def choice_scores(rows: Sequence[questions.Row], answers: Sequence[str]) -> dict[str, Estimate]:
  """'accuracy' of single questions and 'circular': a question is right only if all its rotations
  are.
  """
  return estimates(choice_sums(rows, answers), CHOICE)


def hallusion_sums(rows: Sequence[questions.Row], answers: Sequence[str]) -> np.ndarray:
  """(C, 6) by set, a picture and its edit: right and number of questions, of figures, and of
  questions on all figures.
  """
  _same_length(rows, answers)
  right = [extract_yesno(a) == r.answer for a, r in zip(answers, rows)]
  sets = {}
  for r, ok in zip(rows, right):
    sets.setdefault(r.group, []).append((r.picture, r.question, ok))

  def whole(members, key):
    return [all(m[2] for m in members if m[key] == v) for v in sorted({m[key] for m in members})]

  sums = []
  for members in sets.values():
    parts = ([m[2] for m in members], whole(members, 0), whole(members, 1))
    sums.append([x for part in parts for x in (sum(part), len(part))])
  return np.array(sums, float)


HALLUSION = {
  'aAcc': lambda s: _divide(s[:, 0], s[:, 1]),
  'fAcc': lambda s: _divide(s[:, 2], s[:, 3]),
  'qAcc': lambda s: _divide(s[:, 4], s[:, 5]),
  'mean': lambda s: sum(_divide(s[:, i], s[:, i + 1]) for i in (0, 2, 4)) / 3,
}


def hallusion_scores(rows: Sequence[questions.Row], answers: Sequence[str]) -> dict[str, Estimate]:
  """HallusionBench's aAcc (questions), fAcc (figures with all questions right), qAcc (questions
  right on all figures) and their mean."""
  return estimates(hallusion_sums(rows, answers), HALLUSION)


def reference_answers(rows: Sequence[questions.Row], seed: int = 0) -> dict[str, list[str]]:
  """Answers of players who do not look: 'always_yes', 'chance' (a coin, or a random option), and
  'blind' (yes to a look that pretraining makes usual, the option that is the shape's usual
  colour)."""
  rng = np.random.default_rng(seed)
  chance = [
    r.options[int(rng.random() * 4)] if r.options else ('no', 'yes')[int(rng.random() * 2)]
    for r in rows
  ]
  return {
    'always_yes': ['yes'] * len(rows),
    'chance': chance,
    'blind': [_blind(r, rng) for r in rows],
  }


def _blind(row: questions.Row, rng) -> str:
  words = re.findall('[a-z]+', row.text)
  shape = next(i for i, nouns in enumerate(grammar.NOUNS) if set(nouns) & set(words))
  usual = world.COLOURS[world.USUAL_COLOUR[shape]]
  if row.options:
    return usual if usual in row.options else row.options[int(rng.random() * 4)]
  said = [w for words_of in grammar.COLOUR_WORDS for w in words_of if w in words]
  if said:
    return 'yes' if said[0] in grammar.COLOUR_WORDS[world.USUAL_COLOUR[shape]] else 'no'
  texture = grammar.TEXTURE_WORDS[world.USUAL_TEXTURE[shape]] + (
    grammar.TEXTURE_NOUNS.get(world.USUAL_TEXTURE[shape], ''),
  )
  return 'yes' if set(texture) & set(words) else 'no'


def _same_length(a, b):
  if len(a) != len(b) or not len(a):
    raise InputError(
      f'found {len(b)} answers to {len(a)} inputs; expected one each, at least one; pass the whole '
      'list'
    )
