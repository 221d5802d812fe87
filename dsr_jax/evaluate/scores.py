"""Scores of both tasks in Scenes: pure functions of a model's samples, with 95 % intervals.

Each score is a statistic of sums over clusters (see `stats`): all images for prompts with the same
text, or all questions and texts about one image.

Axes: P prompts, S samples of a prompt, C clusters, M sums.
"""

from collections.abc import Sequence
import re

import numpy as np

from dsr_jax.errors import InputError
from dsr_jax.evaluate.stats import (
  Estimate,
  Statistic,
  difference,
  estimate,
  estimates,
  ratio,
)
from dsr_jax.scenes import grammar, judge, questions, world

# Generation.


def judge_pictures(prompts: Sequence[grammar.Prompt], pixels: np.ndarray) -> dict[str, np.ndarray]:
  """Verdicts on pixels (P, S, 32, 32, 3) uint8: 'geneval' and 'strict' (P, S) bool, 'graded' (P, S)
  float.
  """
  if len(prompts) != len(pixels) or not len(prompts):
    raise InputError(
      f'got {len(prompts)} prompts, but images for {len(pixels)}; pass images for every prompt, '
      'and at least one prompt'
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
  """(C, 2 tasks): each cluster's number of correct images and of images, in its task's columns;
  and the strata (C,).
  """
  tasks = tasks_of(prompts)
  rows = np.zeros((len(prompts), 2 * len(tasks)))
  for i, prompt in enumerate(prompts):
    column = 2 * tasks.index(prompt.category)
    rows[i, column] = np.sum(correct[i])
    rows[i, column + 1] = np.size(correct[i])
  sums, names = gathered(rows, [(tasks.index(p.category), p.text) for p in prompts])
  return sums, np.array([task for task, _ in names])


def tasks_of(prompts: Sequence[grammar.Prompt]) -> list[str]:
  """The tasks of a list, in order of appearance."""
  return list(dict.fromkeys(p.category for p in prompts))


def mean_of_tasks(sums: np.ndarray) -> np.ndarray:
  """The unweighted mean of the tasks' scores, as in GenEval."""
  return ratio(sums[:, ::2], sums[:, 1::2]).mean(axis=1)


def share_of_all(sums: np.ndarray) -> np.ndarray:
  """The share of correct images, whatever their task."""
  return ratio(sums[:, ::2].sum(axis=1), sums[:, 1::2].sum(axis=1))


def generation_scores(prompts: Sequence[grammar.Prompt], pixels: np.ndarray) -> dict:
  """Scores of generated images.

  Args:
    prompts: P prompts.
    pixels: (P, S, 32, 32, 3) uint8, S images for each.

  Returns:
    'tasks' {category: Estimate}, 'mean' (their unweighted mean), 'any' (at least one of the S is
    correct), 'strict' and 'graded' (means of tasks under the other rules), 'correct' (P, S) bool by
    GenEval's rule.
  """
  verdicts = judge_pictures(prompts, pixels)
  correct = verdicts['geneval']

  def mean(values):
    sums, strata = generation_sums(prompts, values)
    return estimate(sums, mean_of_tasks, strata)

  sums, strata = generation_sums(prompts, correct)
  tasks = {
    category: estimate(sums[strata == t][:, 2 * t : 2 * t + 2], mean_of_tasks)
    for t, category in enumerate(tasks_of(prompts))
  }
  return {
    'tasks': tasks,
    'mean': mean(correct),
    'any': mean(correct.any(axis=1, keepdims=True)),
    'strict': mean(verdicts['strict']),
    'graded': mean(verdicts['graded']),
    'correct': correct,
  }


def generation_difference(
  prompts: Sequence[grammar.Prompt],
  after: np.ndarray,
  before: np.ndarray,
  statistic: Statistic = mean_of_tasks,
) -> Estimate:
  """Difference of a statistic between two `correct` arrays (P, S) for one list."""
  sums_after, strata = generation_sums(prompts, after)
  sums_before, _ = generation_sums(prompts, before)
  return difference(sums_after, sums_before, statistic, strata)


# Description.


def description_sums(
  scenes: Sequence[world.Scene], texts: Sequence[str], clusters: Sequence | None = None
) -> np.ndarray:
  """(C, 8) by image: stated, right, recalled, total, words, texts, texts with a wrong atom,
  unparsable texts.
  """
  _check_same_length(scenes, texts)
  rows = []
  for scene, text in zip(scenes, texts):
    c = judge.count_atoms(text, scene)
    wrong = c.right < c.stated
    rows.append((c.stated, c.right, c.recalled, c.total, c.words, 1, wrong, not c.parsed))
  sums, _ = gathered(np.array(rows, float), range(len(scenes)) if clusters is None else clusters)
  return sums


def _f1(precision, recall):
  return ratio(2 * precision * recall, precision + recall)


# precision: over the atoms that the texts state. recall: over the shapes, colors and textures in
# the image. hallucination: 1 - precision (CHAIR's instance rate). hallucinated_texts: texts with a
# wrong atom (its sentence rate). An unparsable text counts as one wrong atom.
DESCRIPTION = {
  'f1': lambda s: _f1(ratio(s[:, 1], s[:, 0]), ratio(s[:, 2], s[:, 3])),
  'precision': lambda s: ratio(s[:, 1], s[:, 0]),
  'recall': lambda s: ratio(s[:, 2], s[:, 3]),
  'hallucination': lambda s: 1 - ratio(s[:, 1], s[:, 0]),
  'hallucinated_texts': lambda s: ratio(s[:, 6], s[:, 5]),
  'unparsable': lambda s: ratio(s[:, 7], s[:, 5]),
  'words': lambda s: ratio(s[:, 4], s[:, 5]),
}


# Questions.


def extract_yesno(text: str) -> str:
  """'yes', 'no' or 'unknown', as in VLMEvalKit: whichever of the two words occurs alone."""
  words = re.sub(r'[;/\[\]"{}()=+\\_\-><@`,?!.]', ' ', text.lower()).split()
  if ('yes' in words) == ('no' in words):
    return 'unknown'
  return 'yes' if 'yes' in words else 'no'


def extract_option(text: str, options: Sequence[str]) -> str | None:
  """The only option that occurs in the text, or None."""
  found = [o for o in options if re.search(rf'\b{re.escape(o)}\b', text.lower())]
  return found[0] if len(found) == 1 else None


def yesno_sums(
  answers: Sequence[str], truths: Sequence[str], clusters: Sequence | None = None
) -> np.ndarray:
  """(C, 6): true positives, false positives, false negatives, correct answers, yes answers, all
  answers. Unknown counts as no in F1.
  """
  _check_same_length(truths, answers)
  rows = []
  for answer, truth in zip(answers, truths):
    said = extract_yesno(answer)
    rows.append(
      (
        said == 'yes' and truth == 'yes',
        said == 'yes' and truth == 'no',
        said != 'yes' and truth == 'yes',
        said == truth,
        said == 'yes',
        1,
      )
    )
  sums, _ = gathered(np.array(rows, float), range(len(rows)) if clusters is None else clusters)
  return sums


YESNO = {
  'f1': lambda s: ratio(2 * s[:, 0], 2 * s[:, 0] + s[:, 1] + s[:, 2]),
  'accuracy': lambda s: ratio(s[:, 3], s[:, 5]),
  'yes_ratio': lambda s: ratio(s[:, 4], s[:, 5]),
}


POPE_PARTS = {'overall': questions.TRACKS, **{track: (track,) for track in questions.TRACKS}}


def pope_sums(
  rows: Sequence[questions.Row], answers: Sequence[str], tracks: Sequence[str] = questions.TRACKS
) -> np.ndarray:
  """`yesno_sums` by image; a row counts once in each of its tracks: VLMEvalKit's Overall."""
  _check_same_length(rows, answers)
  asked = [
    (answer, row) for answer, row in zip(answers, rows) for track in row.tracks if track in tracks
  ]
  return yesno_sums(
    [answer for answer, _ in asked],
    [row.answer for _, row in asked],
    clusters=[row.picture for _, row in asked],
  )


def pope_scores(
  rows: Sequence[questions.Row], answers: Sequence[str]
) -> dict[str, dict[str, Estimate]]:
  """{'overall' and each track: {'f1', 'accuracy', 'yes_ratio'}}."""
  return {
    part: estimates(pope_sums(rows, answers, tracks), YESNO) for part, tracks in POPE_PARTS.items()
  }


def choice_sums(rows: Sequence[questions.Row], answers: Sequence[str]) -> np.ndarray:
  """(C, 4) by question: correct rotations, rotations, whether all of them are correct, 1."""
  _check_same_length(rows, answers)
  right = [
    (extract_option(answer, row.options) == row.answer, 1) for answer, row in zip(answers, rows)
  ]
  sums, _ = gathered(np.array(right, float), [row.group for row in rows])
  all_right = sums[:, :1] == sums[:, 1:]
  return np.concatenate([sums, all_right, np.ones((len(sums), 1))], axis=1)


CHOICE = {
  'accuracy': lambda s: ratio(s[:, 0], s[:, 1]),
  'circular': lambda s: ratio(s[:, 2], s[:, 3]),
}


def hallusion_sums(rows: Sequence[questions.Row], answers: Sequence[str]) -> np.ndarray:
  """(C, 6) by set (an image and its edit): the number correct and the number in total, of
  questions, of figures, and of questions over all figures.
  """
  _check_same_length(rows, answers)
  sums = {}
  by_set, by_figure, by_question = {}, {}, {}
  for row, answer in zip(rows, answers):
    right = extract_yesno(answer) == row.answer
    by_set.setdefault(row.group, []).append(right)
    by_figure.setdefault(row.group, {}).setdefault(row.picture, []).append(right)
    by_question.setdefault(row.group, {}).setdefault(row.question, []).append(right)
  for name, single in by_set.items():
    figures = [all(x) for x in by_figure[name].values()]
    asked = [all(x) for x in by_question[name].values()]
    sums[name] = [n for hits in (single, figures, asked) for n in (sum(hits), len(hits))]
  return np.array(list(sums.values()), float)


HALLUSION = {
  'aAcc': lambda s: ratio(s[:, 0], s[:, 1]),
  'fAcc': lambda s: ratio(s[:, 2], s[:, 3]),
  'qAcc': lambda s: ratio(s[:, 4], s[:, 5]),
  'mean': lambda s: sum(ratio(s[:, i], s[:, i + 1]) for i in (0, 2, 4)) / 3,
}


# Reference players, which do not see the image.


def reference_answers(rows: Sequence[questions.Row], seed: int = 0) -> dict[str, list[str]]:
  """'always_yes'. 'chance': a coin, or a random option. 'blind': yes to a look that is usual in
  pretraining, or the option that is the shape's usual color.
  """
  rng = np.random.default_rng(seed)
  chance = []
  for row in rows:
    options = row.options or ('no', 'yes')
    chance.append(options[int(rng.random() * len(options))])
  return {
    'always_yes': ['yes'] * len(rows),
    'chance': chance,
    'blind': [_blind(row, rng) for row in rows],
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
  texture = world.USUAL_TEXTURE[shape]
  textures = {*grammar.TEXTURE_WORDS[texture], grammar.TEXTURE_NOUNS.get(texture, '')}
  return 'yes' if textures & set(words) else 'no'


# Helpers.


def gathered(values: np.ndarray, clusters: Sequence) -> tuple[np.ndarray, list]:
  """Sums of rows (N, M) by cluster name: (C, M), and the names in order of appearance."""
  place = {}
  index = [place.setdefault(name, len(place)) for name in clusters]
  sums = np.zeros((len(place), np.shape(values)[1]))
  np.add.at(sums, index, values)
  return sums, list(place)


def _check_same_length(inputs, answers):
  if len(inputs) != len(answers) or not len(inputs):
    raise InputError(
      f'got {len(answers)} answers for {len(inputs)} inputs; pass one answer per input, and at '
      'least one'
    )
