"""The benchmarks of Scenes as tables: each asks a model everything on a fixed list and gives sums
from which every score follows.

A benchmark is one function of a `Subject` in BENCHMARKS. It returns named `Scores`: sums by cluster
(see `scenes.evaluation`), the statistics of them, and what players get who do not look. Intervals
are 95 % bootstraps over prompts or pictures; two subjects are compared by paired differences.

Axes: P prompts, S samples a prompt, C clusters, M sums, H W pixels.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from dsr_jax import cli as commands
from dsr_jax.evaluate import scores as evaluation
from dsr_jax.evaluate.__main__ import ANSWER_TOKENS
from dsr_jax.reporting import sheets as pictures_lib
from dsr_jax.scenes import grammar, judge, questions, render, sets, world

GRID_TEMPERATURE, GRID_SEED = 1.0, 42  # of the sheets, the same for every model and run
GRID_SAMPLES, GRID_TEXTS = 4, 4


@dataclasses.dataclass(frozen=True)
class Subject:
  """A model under test: its parameters, `evaluate.Sampler`, `config.Eval` (lists), `config.Method`
  (temperature, guidance, cfg_interval).
  """

  name: str
  params: Any
  sampler: Any
  eval: Any
  method: Any
  best_of: int = 1

  def draw(self, prompts):
    """P prompts -> (P, S, H, W, 3) uint8."""
    return self.sampler.pictures(
      self.params,
      [p.text for p in prompts],
      self.eval.images_per_prompt,
      self.method.temperature,
      self.method.guidance,
      self.best_of,
      cfg_interval=self.method.cfg_interval,
    )

  def describe(self, pixels, temperature: float):
    """(P, H, W, 3) uint8 -> P texts; greedy ones are not chosen from several."""
    asked = [grammar.QUESTION_DESCRIBE] * len(pixels)
    return self.sampler.texts(
      self.params, pixels, asked, temperature, best_of=self.best_of if temperature else 1
    )

  def answer(self, pixels, rows):
    """The pictures that the rows are about, and the rows -> answers, greedy."""
    return self.sampler.texts(self.params, pixels, [r.text for r in rows], 0.0, ANSWER_TOKENS)


class Scores(NamedTuple):
  """sums (C, M) of clusters; statistics: {name: function of (R, M) sums}; strata (C,) or None."""

  sums: np.ndarray
  statistics: dict
  strata: np.ndarray | None = None


class Answers(NamedTuple):
  """What a benchmark gives: Scores by group (the group's name stands before the statistic's, unless
  it is empty), the same of players who do not look, and how many things were asked."""

  scores: dict[str, Scores]
  references: dict[str, dict[str, Scores]]
  items: int


# Generation.


def _by_task(prompts, values, tasks: bool) -> Scores:
  """values (P, S) -> the plain mean of the tasks, and each of them."""
  sums, strata = evaluation.generation_sums(prompts, values)
  statistics = {'mean': evaluation.mean_of_tasks}
  if tasks:

    def ratio(t):
      return lambda s: s[:, 2 * t] / np.maximum(s[:, 2 * t + 1], 1e-9)

    statistics |= {
      name: ratio(t) for t, name in enumerate(dict.fromkeys(p.category for p in prompts))
    }
  return Scores(sums, statistics, strata)


def geneval(subject: Subject) -> Answers:
  """GenEval's six tasks by its own rule; their mean also under stricter and softer rules, and over
  the best of a prompt's samples.
  """
  prompts = sets.evaluation_prompts(subject.eval.prompts_per_task)
  verdicts = evaluation.judge_pictures(prompts, subject.draw(prompts))
  right = verdicts['geneval']
  scores = {
    '': _by_task(prompts, right, True),
    'any sample': _by_task(prompts, right.any(1, keepdims=True), False),
    'strict': _by_task(prompts, verdicts['strict'], False),
    'graded': _by_task(prompts, verdicts['graded'], False),
  }
  return Answers(scores, {}, right.size)


def t2i_compbench(subject: Subject) -> Answers:
  """T2I-CompBench's six categories by its rules (`compbench`), the exact judge in the place of its
  models.
  """
  prompts = sets.evaluation_prompts(subject.eval.prompts_per_task, tasks=grammar.T2I_COMPBENCH)
  pixels = subject.draw(prompts)
  readings = judge.read(pixels.reshape(-1, *pixels.shape[2:]))
  samples = pixels.shape[1]
  values = np.array([compbench(prompts[i // samples], r) for i, r in enumerate(readings)]).reshape(
    -1, samples
  )
  return Answers({'': _by_task(prompts, values, True)}, {}, values.size)


def compbench(prompt: grammar.Prompt, reading: judge.Reading) -> float:
  """A picture's score from 0 to 1.

  Binding (colour, shape, texture), as BLIP-VQA: the product over noun phrases of "is it there".
  Spatial, as UniDet: a quarter for each thing, half for the relation, and nothing below a half.
  Numeracy: each noun counts alike, half for being there, half for its number.
  Complex: the mean of those that its prompt has (3-in-1).
  """
  atoms, things = prompt.atoms, reading.things

  def number(clause):
    return sum(t.shape == clause.shape for t in things)

  binding = float(all(any(grammar.matches(c, t) for t in things) for c in atoms.clauses))
  spatial = [_spatial(r, atoms.clauses, things) for r in atoms.relations]
  counting = [(number(c) > 0) / 2 + (number(c) == c.count) / 2 for c in atoms.clauses]
  if prompt.category == 'spatial':
    return float(np.mean(spatial))
  if prompt.category == 'numeracy':
    return float(np.mean(counting))
  if prompt.category != 'complex':
    return binding
  counted = any(c.count > 1 for c in atoms.clauses)
  return float(np.mean([binding, *spatial, *([np.mean(counting)] if counted else [])]))


def _spatial(relation, clauses, things) -> float:
  def of(i):
    return [t for t in things if t.shape == clauses[i].shape]

  a, b = of(relation.subject), of(relation.target)
  holds = any(grammar.relation_holds(relation.name, x, y) for x in a for y in b if x is not y)
  score = bool(a) / 4 + bool(b) / 4 + holds / 2
  return score if score >= 0.5 else 0.0


# Understanding.


def descriptions(subject: Subject) -> Answers:
  """Texts about pictures against the true scenes: sampled as the configuration says, and greedy."""
  scenes = sets.evaluation_scenes(subject.eval.pictures)
  pixels = sets.pictures(scenes)

  def score(temperature):
    return Scores(
      evaluation.description_sums(scenes, subject.describe(pixels, temperature)),
      evaluation.DESCRIPTION,
    )

  return Answers(
    {'sampled': score(subject.method.temperature), 'greedy': score(0.0)}, {}, 2 * len(scenes)
  )


def _asked(subject, scenes, rows, score, players) -> Answers:
  """Asks every row; score(answers) -> {group: Scores}. `blind_model` is the subject itself before a
  picture without things.
  """
  pixels = sets.pictures(scenes)[np.array([r.picture for r in rows])]
  bare = np.broadcast_to(render.render(world.Scene(())), pixels.shape)
  known = evaluation.reference_answers(rows)
  references = {name: score(known[name]) for name in players} | {
    'blind_model': score(subject.answer(bare, rows))
  }
  return Answers(score(subject.answer(pixels, rows)), references, len(rows))


def pope(subject: Subject) -> Answers:
  """POPE's three tracks: yes/no questions about looks that are there, and that are absent at
  random, commonly, or adversarially.
  """
  scenes, rows = sets.evaluation_pope(max(subject.eval.pictures // 2, 1))
  tracks = {'overall': questions.TRACKS, **{t: (t,) for t in questions.TRACKS}}

  def score(answers):
    return {
      name: Scores(evaluation.pope_sums(rows, answers, part), evaluation.YESNO)
      for name, part in tracks.items()
    }

  return _asked(subject, scenes, rows, score, ('always_yes', 'blind', 'chance'))


def multiple_choice(subject: Subject) -> Answers:
  """Four options in four rotations; in circular evaluation a question is right only if all its
  rotations are.
  """
  scenes, rows = sets.evaluation_choice(max(3 * subject.eval.pictures // 10, 8))

  def score(answers):
    return {'': Scores(evaluation.choice_sums(rows, answers), evaluation.CHOICE)}

  return _asked(subject, scenes, rows, score, ('blind', 'chance'))


def hallusion(subject: Subject) -> Answers:
  """HallusionBench's pairs: a picture and its edit, the same questions, other answers."""
  scenes, rows = sets.evaluation_hallusion(max(subject.eval.pictures // 4, 2))

  def score(answers):
    return {'': Scores(evaluation.hallusion_sums(rows, answers), evaluation.HALLUSION)}

  return _asked(subject, scenes, rows, score, ('always_yes', 'blind', 'chance'))


BENCHMARKS = {
  'geneval': geneval,
  't2i_compbench': t2i_compbench,
  'descriptions': descriptions,
  'pope': pope,
  'multiple_choice': multiple_choice,
  'hallusion': hallusion,
}


# Tables.


def measure(name: str, after: Subject, before: Subject | None = None) -> dict:
  """A benchmark's table, JSON values: 'items', 'scores', 'references' and, of two subjects,
  'before' and 'difference'.

  Every score is {'value', 'low', 'high'}: shares from 0 to 1 (words are counts).
  """
  commands.log(f'asking       {name}')
  answers = BENCHMARKS[name](after)
  table = {
    'items': answers.items,
    'scores': _flat(answers.scores),
    'references': {player: _flat(scores) for player, scores in answers.references.items()},
  }
  if before:
    old = BENCHMARKS[name](before).scores
    table |= {'before': _flat(old), 'difference': _flat(answers.scores, old)}
  return table


def _flat(groups, old=None) -> dict:
  """{name: estimate}; with `old`, of the paired differences groups - old."""
  out = {}
  for group, scores in groups.items():
    statistics, sums = scores.statistics, scores.sums
    if old:
      half = sums.shape[1]

      def minus(f):
        return lambda s: f(s[:, :half]) - f(s[:, half:])

      statistics = {name: minus(f) for name, f in statistics.items()}
      sums = np.concatenate([sums, old[group].sums], axis=1)
    found = evaluation.estimates(sums, statistics, scores.strata)
    out |= {' '.join(filter(None, (group, name))): e._asdict() for name, e in found.items()}
  return out


def _of_codes(settings):
  return f' of the first {settings["cfg_interval"]} codes' if settings.get('cfg_interval') else ''


def markdown(about: dict, results: dict) -> str:
  """All tables, in points (hundredths), and the players who do not look as rows of their own."""
  s = about['settings']
  lines = [
    f'Model `{about["model"]}`'
    + (f', before `{about["before"]}`' if about['before'] else '')
    + f'; temperature {s["temperature"]:g}, guidance {s["guidance"]:g}{_of_codes(s)}, best of '
    f'{s["best_of"]}, seed {s["seed"]}. '
    'Points, with 95 % intervals.'
  ]
  for name, table in results.items():
    paired = 'before' in table
    lines += ['', f'## {name}', '', f'{table["items"]} answers.', '']
    lines += (
      [
        '| score | before | after | difference | 95 % of the difference |',
        '|---|---:|---:|---:|---|',
      ]
      if paired
      else ['| score | value | 95 % |', '|---|---:|---|']
    )
    for key, e in table['scores'].items():
      scale = 1 if key.endswith('words') else 100

      def point(x, sign=''):
        return f'{scale * x:{sign}.1f}'

      if paired:
        d = table['difference'][key]
        lines.append(
          f'| {key} | {point(table["before"][key]["value"])} | {point(e["value"])} | '
          f'{point(d["value"], "+")} | '
          f'{point(d["low"], "+")} … {point(d["high"], "+")} |'
        )
      else:
        lines.append(f'| {key} | {point(e["value"])} | {point(e["low"])} … {point(e["high"])} |')
    for player, scores in table['references'].items():
      for key, e in scores.items():
        who, value = f'*{player.replace("_", " ")}*: {key}', f'{100 * e["value"]:.1f}'
        lines.append(
          f'| {who} | | {value} | | |'
          if paired
          else f'| {who} | {value} | {100 * e["low"]:.1f} … {100 * e["high"]:.1f} |'
        )
  return '\n'.join(lines) + '\n'


# Sheets.


def picture_sheet(subjects):
  """One prompt of each of GenEval's tasks, a column a seed, the models side by side; what the judge
  finds right is framed.
  """
  prompts = [sets.evaluation_prompts(1, tasks=(task,))[0] for task in grammar.GENEVAL]

  def draw(s):
    return s.sampler.pictures(
      s.params,
      [p.text for p in prompts],
      GRID_SAMPLES,
      GRID_TEMPERATURE,
      s.method.guidance,
      seed=GRID_SEED,
    )

  drawn = [draw(s) for s in subjects]
  right = [evaluation.judge_pictures(prompts, pixels)['geneval'] for pixels in drawn]
  return pictures_lib.side_by_side(
    [p.text for p in prompts], [s.name for s in subjects], drawn, right
  )


def text_sheet(subjects):
  """Some pictures with a sampled text of each model, and the share of its atoms that is right."""
  scenes = sets.evaluation_scenes(GRID_TEXTS)
  pixels = sets.pictures(scenes)
  asked = [grammar.QUESTION_DESCRIBE] * len(scenes)
  told = [
    s.sampler.texts(s.params, pixels, asked, GRID_TEMPERATURE, seed=GRID_SEED) for s in subjects
  ]
  lines = []
  for i, scene in enumerate(scenes):
    counts = [judge.count_atoms(texts[i], scene) for texts in told]
    lines.append(
      [
        (f'{c.right}/{c.stated}', f'{s.name}: {texts[i]}', c.right == c.stated)
        for s, texts, c in zip(subjects, told, counts)
      ]
    )
  return pictures_lib.statements(pixels, lines)
