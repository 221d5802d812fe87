"""The study's statistics on made-up cells: known effects are found, with intervals that hold what
they promise.
"""

import json
import types
from xml.etree import ElementTree

from matplotlib.text import Text
import numpy as np
import pytest

from dsr_jax.errors import InputError
from dsr_jax.evaluate import scores as scores_lib
from dsr_jax.scenes import grammar, judge, render, sets, world
from dsr_jax.study import claims, figures, scores
from dsr_jax.study import evaluate as study_evaluate
from dsr_jax.study import law as study_law
from dsr_jax.study import tables as study_tables
from dsr_jax.study import variants as variants_lib

PER_TASK, PICTURES, STEPS = 20, 60, 8
QUICK = 10
BASE = (0.4, 0.5)  # the chance that a picture is right, that an atom is


def cell(folder, variant, seed, effect=(0.0, 0.0), rates=None):
  """A finished cell whose pictures and texts are right by chance, more often by `effect`; rates:
  extra of each task.
  """
  trained = variants_lib.VARIANTS[variant].kind == variants_lib.TRAINED
  place = folder / variant / f'seed_{seed}'
  (place / 'evaluations').mkdir(parents=True)
  for step in range(0, STEPS + 1, STEPS // 4) if trained else (0,):
    share = step / STEPS if trained else 1.0
    quick = step not in (0, STEPS)
    rows = made_rows(
      QUICK if quick else PER_TASK,
      QUICK if quick else PICTURES,
      [share * e for e in effect],
      seed,
      rates,
    )
    (place / 'evaluations' / f'{step:06d}.json').write_text(json.dumps(rows))
  method = types.SimpleNamespace(tasks=('generation', 'understanding'))
  return types.SimpleNamespace(
    base='b',
    variant=variant,
    seed=seed,
    folder=str(place),
    last_step=STEPS if trained else 0,
    config=types.SimpleNamespace(method=method),
  )


def made_rows(per_task, pictures, effect, seed, rates=None):
  rng = np.random.default_rng((seed, 1))  # common random numbers: the same luck, another threshold
  luck = rng.random((6, PER_TASK, 4))[:, :per_task]
  extra = np.array([(rates or {}).get(task, 0.0) for task in grammar.GENEVAL])
  right = (luck < BASE[0] + effect[0] + extra[:, None, None]).astype(int).reshape(6 * per_task, 4)
  atoms = (rng.random((PICTURES, 10))[:pictures] < BASE[1] + effect[1]).sum(1)
  sums = np.stack(
    [
      np.full(pictures, 10),
      atoms,
      atoms,
      np.full(pictures, 10),
      np.full(pictures, 7),
      np.ones(pictures),
      atoms < 10,
      np.zeros(pictures),
    ],
    1,
  )
  zeros = np.zeros_like(right)
  return {
    'generation': right.tolist(),
    'strict': right.tolist(),
    'graded': right.tolist(),
    'extras': zeros.tolist(),
    'pebbles': zeros.tolist(),
    'failure': (1 - right).tolist(),
    'description': sums.tolist(),
    'description_greedy': sums.tolist(),
    'yesno': np.ones((pictures, 6)).tolist(),
  }


@pytest.fixture(scope='module', autouse=True)
def few_draws():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(scores, 'RESAMPLES', 1000)
    scores._cluster_counts.cache_clear()
    scores.seed_weights.cache_clear()
    yield
  scores._cluster_counts.cache_clear()
  scores.seed_weights.cache_clear()


@pytest.fixture(name='results', scope='module')
def _results(tmp_path_factory, few_draws):
  folder = tmp_path_factory.mktemp('cells')
  effects = {
    'base': (0, 0),
    'unified': (0.25, 0.2),
    'generation': (0.25, -0.2),
    'understanding': (-0.2, 0.2),
    'grpo': (0.1, 0.1),
    'separate': (0.25, 0.2),
    'clip': (0.45, 0.0),
  }
  return scores.Results(
    [cell(folder, v, s, e) for v, e in effects.items() for s in ((0,) if v == 'base' else range(3))]
  )


def test_the_value_is_that_of_the_evaluation_itself(results):
  rows = results.rows('b', 'unified', 1)
  assert results.score('b', 'unified', 'generation', (1,)).value == pytest.approx(
    np.mean(rows['generation'])
  )
  expected = scores_lib.DESCRIPTION['f1'](np.sum(rows['description'], 0)[None])[0]
  assert results.score('b', 'unified', 'description/f1', (1,)).value == pytest.approx(expected)
  assert results.score('b', 'unified', 'generation/counting', (1,)).value == pytest.approx(
    np.mean(rows['generation'][40:60])
  )


def test_of_one_seed_the_interval_is_that_of_the_paired_bootstrap(results):
  after, before = (np.array(results.rows('b', v, 0)['generation']) for v in ('unified', 'base'))
  other = scores_lib.generation_difference(sets.evaluation_prompts(PER_TASK), after, before)
  scores_ = results.score('b', 'unified', 'generation', (0,)) - results.score(
    'b', 'base', 'generation', (0,)
  )
  assert scores_.value == pytest.approx(other.value)
  assert scores_.interval == pytest.approx((other.low, other.high), abs=0.02)


def test_intervals_hold_the_truth_as_often_as_they_say_also_of_few_seeds():
  rng, held, runs = np.random.default_rng(0), 0, 200

  def statistic(s):
    return s[:, 0] / s[:, 1]

  for _ in range(runs):
    luck = rng.normal(0, 0.1, (4, 1)) + rng.normal(0, 0.3, (1, 40)) + rng.normal(0, 0.2, (4, 40))
    found = scores.score(np.stack([luck, np.ones_like(luck)], -1), statistic)
    held += found.interval[0] <= 0 <= found.interval[1]
  assert 0.85 <= held / runs <= 0.99


def test_differences_are_narrower_than_scores_because_they_are_paired(results):
  def width(s):
    return s.interval[1] - s.interval[0]

  apart = results.score('b', 'unified', 'generation', (0, 1)) - results.score(
    'b', 'grpo', 'generation', (0, 1)
  )
  assert width(apart) < width(results.score('b', 'grpo', 'generation', (0, 1)))
  same = results.difference('b', 'separate', 'unified', 'generation')
  assert same.value == 0 and width(same) == 0


def test_claims_that_hold_are_confirmed_and_those_that_do_not_are_reversed(results):
  rows = claims.claims_of(results, 'b')
  assert json.loads(json.dumps(rows)) == rows  # they are stored so
  verdicts = {row['key']: row['verdict'] for row in rows}
  assert verdicts['improves_generation'] == verdicts['improves_understanding'] == 'confirmed'
  assert verdicts['understanding_hurts_generation'] == 'confirmed'
  assert verdicts['generation_on_understanding'] == 'falls'
  assert verdicts['unified_is_both'] == 'confirmed'
  assert verdicts['separate_generation'] == 'not confirmed'  # equal is not more
  assert verdicts['simpo_groups'] == 'confirmed'
  assert verdicts['over_clip'] == 'reversed'
  assert verdicts['simpo_tokens'] == verdicts['beyond_random'] == 'no data'
  assert verdicts['saturates_earlier'] == 'not confirmed'  # both grow alike


def test_binding_gains_most_only_if_its_gain_is_above_every_other(tmp_path):
  verdict = {}
  for name, rates in (('binding', {'color_attr': 0.4}), ('counting', {'counting': 0.4})):
    cells = [cell(tmp_path / name, 'base', 0)] + [
      cell(tmp_path / name, 'unified', s, (0.05, 0.1), rates) for s in range(3)
    ]
    verdict[name] = {r['key']: r['verdict'] for r in claims.claims_of(scores.Results(cells), 'b')}[
      'binding_gains_most'
    ]
  assert verdict == {'binding': 'confirmed', 'counting': 'reversed'}


def test_holm_by_hand():
  adjusted = claims.holm([0.01, None, 0.04, 0.03])
  assert adjusted[1] is None and [adjusted[i] for i in (0, 2, 3)] == pytest.approx(
    [0.03, 0.06, 0.06]
  )


def test_equality_needs_a_narrow_interval():
  wide = scores.Score(0.0, np.random.default_rng(0).normal(0, 0.05, 1000))
  narrow = scores.Score(0.0, np.random.default_rng(0).normal(0, 0.005, 1000))
  assert wide.p_outside > 0.05 > narrow.p_outside


def test_error_closed_is_the_share_of_what_was_missing(results):
  closed = claims.error_closed(results, 'b', 'unified')
  before, after = (results.score('b', v, 'generation').value for v in ('base', 'unified'))
  assert closed.value == pytest.approx((after - before) / (1 - before))


def test_failures_are_named_by_what_is_wrong():
  red_square, blue_disc = world.Thing(0, 0, 0, 8, 0, 0), world.Thing(2, 4, 0, 8, 0, 4)
  atoms = judge.parse('a red square left of a blue disc')
  prompt = grammar.Prompt('a red square left of a blue disc', atoms, 'position')

  def kind(*things, p=prompt):
    return study_evaluate.failure(p, judge.Reading(world.Scene(things)))

  assert kind(red_square, blue_disc) == 'right'
  assert kind(red_square) == 'missing'
  assert kind(red_square._replace(colour=4), blue_disc._replace(colour=0)) == 'binding'
  assert kind(red_square._replace(col=4), blue_disc._replace(col=0)) == 'position'
  assert study_evaluate.failure(prompt, judge.Reading(None, 1)) == 'unreadable'
  two = grammar.Prompt('two discs', judge.parse('two discs'), 'counting')
  assert (
    kind(blue_disc, p=two)
    == kind(*(blue_disc._replace(row=r) for r in (0, 3, 6)), p=two)
    == 'count'
  )


def test_rows_of_true_pictures_are_right_and_have_nothing_extra():
  prompts = sets.evaluation_prompts(1)

  def scene(p):
    return next(
      s
      for s in (
        grammar.prompt_scene(np.random.default_rng(i), p.category, held_out='include')
        for i in range(20000)
      )
      if judge.geneval(p.atoms, judge.Reading(s), True)
    )

  shown = [p for p in prompts if p.category in ('single_object', 'colors')]
  pixels = np.stack([[render.render(scene(p))] for p in shown])
  rows = study_evaluate.picture_rows(shown, pixels)
  assert (
    rows['generation'] == [[1]] * len(shown)
    and rows['failure'] == [[0]] * len(shown)
    and rows['extras'] == [[0]] * len(shown)
  )


def test_the_slope_on_length_leaves_out_what_correctness_explains():
  rng = np.random.default_rng(0)
  truth = rng.integers(0, 3, (50, 8)).astype(float)
  length = 5 * truth + rng.integers(0, 4, (50, 8))  # the better a text the longer it is
  found = study_law.slope_at_equal_truth(3 * truth - 0.25 * length, length, truth)
  assert found['value'] == pytest.approx(-0.25) and found['low'] == pytest.approx(-0.25)
  assert study_law.slope_at_equal_truth(truth, truth, truth) is None


def marks(figure):
  """Points with intervals in all panels."""
  return sum(len(panel.containers) for panel in figure.axes)


def lines(figure):
  """Joined lines of several points in all panels."""
  return [
    line
    for panel in figure.axes
    for line in panel.lines
    if line.get_label().startswith('_child')
    and line.get_linestyle() == '-'
    and len(line.get_xdata()) > 2
  ]


def law_point(variant, accuracy, gain, base='b', task='generation'):
  return {
    'base': base,
    'variant': variant,
    'task': task,
    'accuracy': {'accuracy': accuracy},
    'skill': 0.4 if base == 'b' else 0.3,
    'gain': {'value': gain, 'low': gain - 0.05, 'high': gain + 0.02},
  }


def crowd():
  """A law with many variants at nearly one place, and five judges on a line."""
  names = [v for v in variants_lib.VARIANTS if not v.startswith(('judge', 'base'))]
  points = [law_point(v, 0.79 + 0.001 * i, 0.002 * i) for i, v in enumerate(names)]
  for i, judge_name in enumerate(('judge', 'judge_90', 'judge_80', 'judge_70', 'judge_60')):
    points += [law_point(judge_name, 1 - 0.1 * i, 0.5 - 0.1 * i, base) for base in ('b', 'c')]
  return points


def test_figures_have_a_mark_for_each_thing_and_are_svg_the_same_each_time(results):
  assert marks(figures.gains(results, 'b')) == 2 * 6
  assert marks(figures.categories(results, 'b')) == 6 * 3
  evolution = figures.evolution(results, 'b')
  assert len(lines(evolution)) == 2 * 5 and marks(evolution) == 2 * 5
  assert marks(figures.law(crowd())) == len(crowd())
  text = figures.svg(figures.law(crowd()))
  assert ElementTree.fromstring(text.encode()).tag.endswith('svg')
  assert text == figures.svg(figures.law(crowd()))
  assert figures.gains(scores.Results([]), 'b') is None and figures.law([]) is None


def test_every_panel_names_its_axes_and_every_figure_says_what_it_shows(results):
  drawn = [figures.law(crowd()), figures.evolution(results, 'b'), figures.gains(results, 'b')]
  for figure in drawn:
    assert all(panel.get_xlabel() and panel.get_title(loc='left') for panel in figure.axes)
    assert len(figure.get_supxlabel()) > 60


def test_the_line_of_the_law_goes_through_the_judges_and_is_drawn():
  points = crowd()
  line = study_law.line(points, 'generation')
  assert line['slope'] == pytest.approx(1.0) and line['intercept'] == pytest.approx(-0.5)
  assert line['no_gain_at'] == pytest.approx(0.5) and line['points'] == 10
  (panel,) = figures.law(points).axes
  drawn = [y for y in (np.array(found.get_ydata(), float) for found in panel.lines) if len(y) == 2]
  assert any(np.allclose(y, [-5, 50]) for y in drawn)
  assert study_law.line(points, 'understanding') is None


def test_names_of_crowded_points_do_not_overlap_and_nothing_leaves_the_frame():
  figure = figures.law(crowd())
  figure.set_dpi(100)
  figure.draw_without_rendering()
  (panel,) = figure.axes
  boxes = [Text.get_window_extent(name) for name in panel.texts]  # without the lines to them
  assert len(boxes) == len([p for p in crowd() if p['base'] == 'b'])
  assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
  frame, whole = panel.get_window_extent(), figure.bbox
  assert all(box.x0 > frame.x1 and box.x1 <= whole.x1 for box in boxes)
  low, high = panel.get_ylim()
  left, right = panel.get_xlim()
  for p in crowd():
    assert low < 100 * p['gain']['low'] and 100 * p['gain']['high'] < high
    assert left < p['accuracy']['accuracy'] < right


@pytest.mark.parametrize('places', [[0.5] * 8, [0.0, 0.99, 1.0, 1.0], [-3.0, 5.0], [0.1, 0.9], []])
def test_places_are_moved_apart_and_stay_within(places):
  moved = figures.apart(places, 0.05)
  assert all(np.diff(moved) >= 0.05 - 1e-9) and all(0 <= place <= 1 for place in moved)
  if places == [0.1, 0.9]:
    assert moved == places


def test_the_end_of_the_evolution_is_also_shown_on_the_whole_lists(results):
  figure = figures.evolution(results, 'b')
  whole = results.difference('b', 'unified', 'base', 'generation')
  first = figure.axes[0].containers[0]
  assert first.lines[0].get_ydata()[0] == pytest.approx(100 * whole.value)
  assert f'{6 * QUICK} and {6 * PER_TASK} prompts' in figure.get_supxlabel().replace('\n', ' ')


def test_without_matplotlib_one_sentence_says_what_to_install(monkeypatch):
  monkeypatch.setattr(figures, 'matplotlib', None)
  with pytest.raises(InputError, match='need matplotlib, which is not installed; .*pip install'):
    figures.check_matplotlib()


def test_claims_of_several_bases_stand_side_by_side(results):
  def found(skill):
    return {
      'variants': {'base': {'generation': {'value': skill}}},
      'claims': claims.claims_of(results, 'b'),
    }

  assert study_tables.replicates({'one': found(0.5)}) == []
  lines = study_tables.replicates({'one': found(0.57), 'two': found(0.3)})
  assert '| claim | one (57) | two (30) |' in lines
  gain = next(line for line in lines if line.startswith('| DSR improves generation |'))
  assert gain.count('confirmed: +') == 2
  assert not any('equal tokens' in line for line in lines)  # no cells
