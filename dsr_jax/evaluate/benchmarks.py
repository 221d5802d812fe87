"""The benchmarks of Scenes as tables: each runs a model on a fixed list and returns the sums from
which all scores are computed.

A benchmark is a function of a `Subject`, with an entry in BENCHMARKS. It returns named `Scores`:
sums by cluster (see `stats`), their statistics, and the scores of reference players that do not see
the image. Intervals are 95 % bootstraps over prompts or images; two subjects are compared by paired
differences.

Axes: P prompts, S samples of a prompt, C clusters, M sums, H W pixels.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from dsr_jax import cli
from dsr_jax.evaluate import scores as scores_lib
from dsr_jax.evaluate import stats
from dsr_jax.evaluate.sampler import ANSWER_TOKENS, ListSampler
from dsr_jax.reporting import sheets
from dsr_jax.scenes import grammar, judge, render, sets, world

# The sheets' samples are the same for every model and run.
GRID_TEMPERATURE = 1.0
GRID_SEED = 42
GRID_SAMPLES = 4
GRID_TEXTS = 4


@dataclasses.dataclass(frozen=True)
class Subject:
  """A model under test.

  Attributes:
    name: in tables and sheets.
    params: its parameters.
    sampler: samples from it.
    eval: `config.Eval`, which defines the lists.
    method: `config.Method`; only temperature, guidance and cfg_interval are used.
    best_of: how many samples each image and sampled text is chosen from.
  """

  name: str
  params: Any
  sampler: ListSampler
  eval: Any
  method: Any
  best_of: int = 1

  def draw(self, prompts):
    """P prompts -> (P, S, H, W, 3) uint8."""
    return self.sampler.pictures(
      self.params,
      [p.text for p in prompts],
      self.eval.images_per_prompt,
      temperature=self.method.temperature,
      guidance=self.method.guidance,
      cfg_interval=self.method.cfg_interval,
      best=self.best_of,
    )

  def describe(self, pixels, temperature: float):
    """(P, H, W, 3) uint8 -> P texts; a greedy text is not chosen from several."""
    return self.sampler.texts(
      self.params,
      pixels,
      [grammar.QUESTION_DESCRIBE] * len(pixels),
      temperature=temperature,
      best=self.best_of if temperature else 1,
    )

  def answer(self, pixels, rows):
    """The rows' images, and the rows -> greedy answers."""
    return self.sampler.texts(
      self.params,
      pixels,
      [row.text for row in rows],
      temperature=0.0,
      max_tokens=ANSWER_TOKENS,
    )


class Scores(NamedTuple):
  """sums (C, M) of clusters; statistics: {name: function of (R, M) sums}; strata (C,) or None."""

  sums: np.ndarray
  statistics: dict
  strata: np.ndarray | None = None


class Answers(NamedTuple):
  """A benchmark's result.

  scores: by group; the group's name precedes the statistic's, unless it is empty. references: the
  same for players that do not see the image. items: how many items were asked.
  """

  scores: dict[str, Scores]
  references: dict[str, dict[str, Scores]]
  items: int


# Generation.


def _by_task(prompts, values, tasks: bool) -> Scores:
  """values (P, S) -> the unweighted mean of the tasks and, with `tasks`, each task."""
  sums, strata = scores_lib.generation_sums(prompts, values)
  statistics = {'mean': scores_lib.mean_of_tasks}
  if tasks:

    def ratio_of(t):
      return lambda s: s[:, 2 * t] / np.maximum(s[:, 2 * t + 1], 1e-9)

    for t, name in enumerate(scores_lib.tasks_of(prompts)):
      statistics[name] = ratio_of(t)
  return Scores(sums, statistics, strata)


def geneval(subject: Subject) -> Answers:
  """GenEval's six tasks by its own rule; also their mean under a stricter and a softer rule, and
  with any sample of a prompt correct.
  """
  prompts = sets.evaluation_prompts(subject.eval.prompts_per_task)
  verdicts = scores_lib.judge_pictures(prompts, subject.draw(prompts))
  right = verdicts['geneval']
  scores = {
    '': _by_task(prompts, right, tasks=True),
    'any sample': _by_task(prompts, right.any(axis=1, keepdims=True), tasks=False),
    'strict': _by_task(prompts, verdicts['strict'], tasks=False),
    'graded': _by_task(prompts, verdicts['graded'], tasks=False),
  }
  return Answers(scores, {}, right.size)


def t2i_compbench(subject: Subject) -> Answers:
  """T2I-CompBench's six categories by its rules (`compbench`), with the exact judge instead of its
  models.
  """
  prompts = sets.evaluation_prompts(subject.eval.prompts_per_task, tasks=grammar.T2I_COMPBENCH)
  pixels = subject.draw(prompts)
  samples = pixels.shape[1]
  readings = judge.read(pixels.reshape(-1, *pixels.shape[2:]))
  values = [compbench(prompts[i // samples], reading) for i, reading in enumerate(readings)]
  values = np.array(values).reshape(-1, samples)
  return Answers({'': _by_task(prompts, values, tasks=True)}, {}, values.size)


def compbench(prompt: grammar.Prompt, reading: judge.Reading) -> float:
  """An image's score from 0 to 1.

  Binding (color, shape, texture), as BLIP-VQA: the product over noun phrases of "is it present".
  Spatial, as UniDet: a quarter for each object, half for the relation; a score below a half is 0.
  Numeracy: nouns have equal weights, half for being present, half for the right number.
  Complex: the mean of the parts that the prompt has (3-in-1).
  """
  atoms, things = prompt.atoms, reading.things

  def number(clause):
    return sum(t.shape == clause.shape for t in things)

  def is_there(clause):
    return any(grammar.matches(clause, t) for t in things)

  binding = float(all(is_there(c) for c in atoms.clauses))
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
  def things_of(i):
    return [t for t in things if t.shape == clauses[i].shape]

  first, second = things_of(relation.subject), things_of(relation.target)
  holds = any(
    grammar.relation_holds(relation.name, x, y) for x in first for y in second if x is not y
  )
  score = bool(first) / 4 + bool(second) / 4 + holds / 2
  return score if score >= 0.5 else 0.0


# Understanding.


def descriptions(subject: Subject) -> Answers:
  """Texts about images, sampled as configured and greedy, compared with the true scenes."""
  scenes = sets.evaluation_scenes(subject.eval.pictures)
  pixels = sets.pictures(scenes)

  def score(temperature):
    sums = scores_lib.description_sums(scenes, subject.describe(pixels, temperature))
    return Scores(sums, scores_lib.DESCRIPTION)

  scores = {'sampled': score(subject.method.temperature), 'greedy': score(0.0)}
  return Answers(scores, {}, 2 * len(scenes))


def _asked(subject, scenes, rows, score, players) -> Answers:
  """Asks every row; score(answers) -> {group: Scores}. `blind_model` is the subject itself, shown
  an empty image.
  """
  pixels = sets.pictures(scenes)[np.array([row.picture for row in rows])]
  bare = np.broadcast_to(render.render(world.Scene(())), pixels.shape)
  known = scores_lib.reference_answers(rows)
  references = {name: score(known[name]) for name in players}
  references['blind_model'] = score(subject.answer(bare, rows))
  return Answers(score(subject.answer(pixels, rows)), references, len(rows))


def pope(subject: Subject) -> Answers:
  """POPE's three tracks: yes/no questions about looks that are present, and about absent ones that
  are random, popular or adversarial.
  """
  scenes, rows = sets.evaluation_pope(max(subject.eval.pictures // 2, 1))

  def score(answers):
    return {
      name: Scores(scores_lib.pope_sums(rows, answers, tracks), scores_lib.YESNO)
      for name, tracks in scores_lib.POPE_PARTS.items()
    }

  return _asked(subject, scenes, rows, score, ('always_yes', 'blind', 'chance'))


def multiple_choice(subject: Subject) -> Answers:
  """Four options in four rotations; in circular evaluation a question is correct only if all its
  rotations are.
  """
  scenes, rows = sets.evaluation_choice(max(3 * subject.eval.pictures // 10, 8))

  def score(answers):
    return {'': Scores(scores_lib.choice_sums(rows, answers), scores_lib.CHOICE)}

  return _asked(subject, scenes, rows, score, ('blind', 'chance'))


def hallusion(subject: Subject) -> Answers:
  """HallusionBench's pairs: an image and its edit, the same questions but different answers."""
  scenes, rows = sets.evaluation_hallusion(max(subject.eval.pictures // 4, 2))

  def score(answers):
    return {'': Scores(scores_lib.hallusion_sums(rows, answers), scores_lib.HALLUSION)}

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
  """A benchmark's table, JSON values: 'items', 'scores', 'references' and, for two subjects,
  'before' and 'difference'.

  Every score is {'value', 'low', 'high'}: shares from 0 to 1 (words are counts).
  """
  cli.log(f'asking       {name}')
  answers = BENCHMARKS[name](after)
  table = {
    'items': answers.items,
    'scores': _flat(answers.scores),
    'references': {player: _flat(scores) for player, scores in answers.references.items()},
  }
  if before:
    old = BENCHMARKS[name](before).scores
    table['before'] = _flat(old)
    table['difference'] = _flat(answers.scores, old)
  return table


def _flat(groups, old=None) -> dict:
  """{name: estimate}; with `old`, estimates of the paired differences groups - old."""
  out = {}
  for group, scores in groups.items():
    statistics, sums = scores.statistics, scores.sums
    if old:
      statistics = {name: stats.paired(statistic) for name, statistic in statistics.items()}
      sums = np.concatenate([sums, old[group].sums], axis=1)
    for name, estimate in stats.estimates(sums, statistics, scores.strata).items():
      out[f'{group} {name}'.strip()] = estimate._asdict()
  return out


def markdown(about: dict, results: dict) -> str:
  """All tables, in points (hundredths); reference players have their own rows."""
  lines = [_heading(about)]
  for name, table in results.items():
    lines += ['', f'## {name}', '', f'{table["items"]} answers.', '']
    lines += _paired_rows(table) if 'before' in table else _rows(table)
  return '\n'.join(lines) + '\n'


def _heading(about) -> str:
  settings = about['settings']
  models = f'Model `{about["model"]}`'
  if about['before']:
    models += f', before `{about["before"]}`'
  guided = f'guidance {settings["guidance"]:g}'
  if settings.get('cfg_interval'):
    guided += f' of the first {settings["cfg_interval"]} codes'
  return (
    f'{models}; temperature {settings["temperature"]:g}, {guided}, best of '
    f'{settings["best_of"]}, seed {settings["seed"]}. Points, with 95 % intervals.'
  )


def _rows(table) -> list[str]:
  lines = ['| score | value | 95 % |', '|---|---:|---|']
  for key, e in table['scores'].items():
    low, high = _point(key, e['low']), _point(key, e['high'])
    lines.append(f'| {key} | {_point(key, e["value"])} | {low} … {high} |')
  for who, e in _players(table):
    low, high = 100 * e['low'], 100 * e['high']
    lines.append(f'| {who} | {100 * e["value"]:.1f} | {low:.1f} … {high:.1f} |')
  return lines


def _paired_rows(table) -> list[str]:
  lines = [
    '| score | before | after | difference | 95 % of the difference |',
    '|---|---:|---:|---:|---|',
  ]
  for key, e in table['scores'].items():
    before = _point(key, table['before'][key]['value'])
    d = {name: _point(key, x, sign='+') for name, x in table['difference'][key].items()}
    lines.append(
      f'| {key} | {before} | {_point(key, e["value"])} | {d["value"]} | {d["low"]} … {d["high"]} |'
    )
  for who, e in _players(table):
    lines.append(f'| {who} | | {100 * e["value"]:.1f} | | |')
  return lines


def _players(table):
  for player, scores in table['references'].items():
    for key, estimate in scores.items():
      yield f'*{player.replace("_", " ")}*: {key}', estimate


def _point(key: str, value: float, sign: str = '') -> str:
  """A share in hundredths; words are counts."""
  scale = 1 if key.endswith('words') else 100
  return f'{scale * value:{sign}.1f}'


# Sheets.


def picture_sheet(subjects):
  """One prompt for each of GenEval's tasks, one column per seed, the models side by side; images
  that the judge finds correct are framed.
  """
  prompts = [sets.evaluation_prompts(1, tasks=(task,))[0] for task in grammar.GENEVAL]
  texts = [p.text for p in prompts]
  drawn = [
    subject.sampler.pictures(
      subject.params,
      texts,
      GRID_SAMPLES,
      temperature=GRID_TEMPERATURE,
      guidance=subject.method.guidance,
      seed=GRID_SEED,
    )
    for subject in subjects
  ]
  right = [scores_lib.judge_pictures(prompts, pixels)['geneval'] for pixels in drawn]
  return sheets.side_by_side(texts, [s.name for s in subjects], drawn, right)


def text_sheet(subjects):
  """Some images with a text sampled from each model, and how many of its atoms are correct."""
  scenes = sets.evaluation_scenes(GRID_TEXTS)
  pixels = sets.pictures(scenes)
  texts = [
    subject.sampler.texts(
      subject.params,
      pixels,
      [grammar.QUESTION_DESCRIBE] * len(scenes),
      temperature=GRID_TEMPERATURE,
      seed=GRID_SEED,
    )
    for subject in subjects
  ]
  lines = []
  for i, scene in enumerate(scenes):
    beside = []
    for subject, written in zip(subjects, texts):
      counts = judge.count_atoms(written[i], scene)
      beside.append(
        (
          f'{counts.right}/{counts.stated}',
          f'{subject.name}: {written[i]}',
          counts.right == counts.stated,
        )
      )
    lines.append(beside)
  return sheets.statements(pixels, lines)
