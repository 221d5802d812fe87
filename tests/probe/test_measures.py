"""The probe's numbers against slow formulas of their own, and its words on texts whose answers are
plain.
"""

import itertools

import numpy as np
import pytest

from dsr_jax.config import Method
from dsr_jax.convert import locate
from dsr_jax.evaluate import ranking, stats
from dsr_jax.models.janus.processor import Processor
from dsr_jax.probe import measures, words
from dsr_jax.probe import scenes as probe_scenes
from dsr_jax.scenes import grammar, judge, render, sets


def values(seed=0, groups=12, size=5):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 4, (groups, size)).astype(float), rng.random((groups, size))


def test_best_mean_and_worst_are_of_the_candidates_that_the_reward_picks():
  rewards, scores = values()
  found = ranking.best_mean_worst(rewards, scores)
  assert found['best'].value == pytest.approx(
    np.mean([s[np.argmax(r)] for r, s in zip(rewards, scores)])
  )
  assert found['worst'].value == pytest.approx(
    np.mean([s[np.argmin(r)] for r, s in zip(rewards, scores)])
  )
  assert found['mean'].value == pytest.approx(scores.mean())
  assert found['best_there_is'].value == pytest.approx(scores.max(1).mean())
  assert found['gain'].value == pytest.approx(found['best'].value - found['mean'].value)
  assert found['gain'].low <= found['gain'].value <= found['gain'].high


def test_best_of_n_is_the_mean_over_all_choices_of_n():
  rewards, scores = values()
  curve = ranking.best_of_curve(rewards, scores)
  for n in range(1, 6):
    expected = []
    for r, s in zip(rewards, scores):
      for chosen in itertools.combinations(range(5), n):
        chosen = list(chosen)
        expected.append(s[chosen][r[chosen] == r[chosen].max()].mean())
    assert len(curve) == 5 and (
      n not in (1, 5) or curve[n - 1] == pytest.approx(np.mean(expected))
    )  # ties: exact at both ends
  unique = np.random.default_rng(1).random((6, 5))
  for n, value in enumerate(ranking.best_of_curve(unique, scores[:6]), 1):
    assert value == pytest.approx(
      np.mean(
        [
          s[max(c, key=lambda k: r[k])]
          for r, s in zip(unique, scores)
          for c in itertools.combinations(range(5), n)
        ]
      )
    )


def test_pairwise_accuracy_counts_pairs_that_differ_and_halves_ties():
  rewards, scores = np.array([[1.0, 2.0, 2.0]]), np.array([[0.0, 1.0, 0.0]])
  found = ranking.pairwise_accuracy(
    rewards, scores
  )  # (0, 1) right, (1, 2) a tie, (0, 2) told apart by nothing
  assert found['pairs'] == 2 and found['accuracy'].value == pytest.approx(0.75)
  assert ranking.pairwise_accuracy(rewards, np.zeros((1, 3))) == {'accuracy': None, 'pairs': 0}


def test_ties_and_spread():
  rewards = np.array([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
  assert ranking.ties(rewards) == {'groups': 0.5, 'pairs': pytest.approx(4 / 6)}
  assert ranking.spread(rewards) == {
    'within': pytest.approx(np.std([0, 1, 1]) / 2),
    'between': pytest.approx(1 / 6),
    'range': 0.5,
  }


def test_what_the_reward_is_blind_to_is_named():
  def estimate(value, low, high):
    return stats.Estimate(value, low, high)

  numbers = {
    'swaps': {
      'colours': {'value': 0.9, 'low': 0.8, 'high': 1.0, 'cases': 9},
      'relations': {'value': 0.4, 'low': 0.3, 'high': 0.55, 'cases': 9},
      'mean': 0.65,
    },
    'categories': {
      'counting': {'gain': estimate(-0.4, -0.6, -0.1)},
      'colors': {'gain': estimate(-0.1, -0.3, 0.1)},
    },
  }
  blind = measures.decide('generation', numbers)['blind']
  assert (
    len(blind) == 2
    and 'relations' in blind[0]
    and 'counting' in blind[1]
    and '0.40 worse' in blind[1]
  )


def test_auc_is_the_share_of_ordered_pairs():
  rng = np.random.default_rng(0)
  scores, labels = rng.integers(0, 6, 60), rng.random(60) < 0.3
  pairs = [(a > b) + (a == b) / 2 for a in scores[labels] for b in scores[~labels]]
  found = ranking.auc_interval(scores, labels, np.arange(60) // 4)
  assert found['auc'].value == pytest.approx(np.mean(pairs))
  assert (
    found['auc'].low < found['auc'].value < found['auc'].high and found['positive'] == labels.sum()
  )
  assert ranking.auc_interval([1.0], [True], [0])['auc'] is None
  assert ranking.auc_interval([], [], [])['auc'] is None


def test_slope_is_least_squares_within_groups():
  rng = np.random.default_rng(0)
  x = rng.random((7, 4))
  rewards = 3 * x + rng.random((7, 1)) * 100  # what differs between groups does not count
  assert ranking.slope(rewards, x) == {'slope': pytest.approx(3), 'correlation': pytest.approx(1)}
  assert ranking.slope(rewards, np.ones((7, 4))) is None


def test_rank_correlation_is_spearmans():
  a, b = (
    np.array([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]),
    np.array([[10.0, 30.0, 20.0], [1.0, 2.0, 3.0]]),
  )
  assert ranking.rank_correlation(a, b) == pytest.approx(0.5)  # the group without order is left out
  assert ranking.rank_correlation(a[1:], b[1:]) is None


def test_lowest_word_is_compared_with_chance():
  found = measures.lowest_is_wrong(
    [([1.0, -1.0], [False, True]), ([0.0, 1.0, 2.0], [False, True, False]), ([1.0], [True])]
  )
  assert (
    found['texts'] == 2
    and found['hits'].value == 0.5
    and found['chance'] == pytest.approx((1 / 2 + 1 / 3) / 2)
  )


def without_a_judge():
  return {
    'inputs': 64,
    'ties': {'groups': 0.1},
    'spread': {'within': 0.1},
    'swaps': {'mean': 0.9, 'cases': 64},
    'slopes': {'length': None},
  }


def judged(inputs=64, pairs=400):
  found = ranking.best_mean_worst(np.arange(4.0)[None], np.array([[0.0, 0.0, 0.0, 1.0]]))
  return without_a_judge() | {
    'inputs': inputs,
    'judged': {'f1': found},
    'pairwise': {'accuracy': stats.Estimate(0.8, 0.7, 0.9), 'pairs': pairs},
  }


def verdict_of(numbers):
  return measures.decide('understanding', numbers)['verdict']


def test_a_gate_that_fails_is_a_no_go_with_or_without_a_judge():
  long = {'slopes': {'length': {'correlation': -0.95}}}
  for numbers in (without_a_judge(), judged()):
    found = measures.decide('understanding', numbers | long)
    assert found['verdict'] == measures.NO_GO and not found['go']
    assert found['gates'][-1]['passed'] is False


def test_there_is_no_go_without_the_chief_gates():
  """Seven swaps and no judge said "go" once."""
  found = measures.decide('understanding', without_a_judge())
  assert found['verdict'] == measures.OPEN and not found['go']
  assert [g['passed'] for g in found['gates']] == [None, None, True, True, True, None]
  assert [line for line in found['not_measured'] if 'judge' in line][0].endswith('not measured')
  assert len(found['not_measured']) == 3
  assert verdict_of(judged()) == measures.GO


def test_a_number_of_too_few_cases_counts_as_not_measured():
  assert verdict_of(judged(pairs=29)) == measures.OPEN
  assert verdict_of(judged(inputs=9)) == measures.OPEN
  few = measures.decide('understanding', judged() | {'swaps': {'mean': 0.1, 'cases': 7}})
  assert few['verdict'] == measures.GO  # no chief gate, and seven cases fail nothing
  assert few['not_measured'][0].endswith('only 7 cases, needs at least 30')


def test_prompts_of_another_world_are_counted_and_bar_a_go():
  rewards = np.full((14, 4), -1.3)
  rewards[7:] = -15.0
  far = measures.unfamiliar(rewards)
  assert far['inputs'] == 7 and far['share'] == 0.5 and far['usual'] == -1.3
  found = measures.decide('understanding', judged() | {'inputs': 14, 'unfamiliar': far})
  assert found['verdict'] == measures.OPEN
  assert found['blind'][0].startswith('7 of 14 inputs are far outside what the model knows')
  near = measures.unfamiliar(np.random.default_rng(0).normal(-1.4, 0.5, (64, 8)))
  assert near['inputs'] == 0
  assert verdict_of(judged() | {'unfamiliar': near}) == measures.GO


def test_of_two_tasks_the_worse_verdict_counts():
  go, no_go, not_known = measures.GO, measures.NO_GO, measures.OPEN
  assert measures.overall([go, go]) == go
  assert measures.overall([go, not_known]) == not_known
  assert measures.overall([not_known, no_go]) == no_go


@pytest.mark.parametrize(
  'kind, text, other',
  [
    (
      'colours',
      'a photo of a red disc and an orange ring',
      'a photo of an orange disc and a red ring',
    ),
    ('colours', 'a violet disc beside a purple ring', 'a red disc beside a purple ring'),
    ('colours', 'A Red car', 'A Green car'),
    ('colours', 'a striped disc', None),
    ('counts', 'two red discs', 'three red discs'),
    ('counts', 'a photo of four rings', 'a photo of three rings'),
    ('counts', 'a ring', None),
    ('relations', 'a disc left of a ring', 'a disc right of a ring'),
    ('relations', 'a disc is under a ring', 'a disc is over a ring'),
    ('relations', 'a disc next to a ring', None),
  ],
)
def test_a_swap_changes_one_attribute(kind, text, other):
  found = words.swapped(text, kind)
  if text.startswith('a violet'):
    assert (
      found is not None and found.endswith('purple ring') and 'violet' not in found
    )  # both were one colour
  else:
    assert found == other


def test_swapped_prompts_are_not_true_of_the_picture():
  for kind, text, pixels in probe_scenes.true_pairs(12, seed=0):
    reading = judge.read(pixels)[0]
    category = {'colours': 'color_attr', 'counts': 'counting', 'relations': 'position'}[kind]

    other = words.swapped(text, kind)
    right, wrong = (
      judge.verdict(grammar.Prompt(t, judge.parse(t), category), reading)['geneval']
      for t in (text, other)
    )
    assert right and not wrong, text


def test_clauses_are_the_things_and_relations_of_a_text():
  def texts(text):
    return [(c.text, c.with_it, c.without, c.kind) for c in words.clauses(text)]

  assert texts('a red disc and two rings') == [
    ('a red disc', 'a red disc and two rings', 'two rings', 'thing'),
    ('two rings', 'a red disc and two rings', 'a red disc', 'thing'),
  ]
  assert texts('a red disc is to the left of a ring.') == [
    ('a red disc', 'a red disc and a ring', 'a ring', 'thing'),
    ('a ring', 'a red disc and a ring', 'a red disc', 'thing'),
    (
      'a red disc to the left of a ring',
      'a red disc to the left of a ring',
      'a red disc and a ring',
      'relation',
    ),
  ]
  assert texts('a disc. it is small and red.') == [
    ('a disc. it is small and red', 'a disc. it is small and red', '', 'thing')
  ]
  said = [t for t, *_ in texts('a disc, a ring and a cross. the disc is above the ring.')]
  assert said == ['a disc', 'a ring', 'a cross', 'the disc above the ring']
  assert texts('') == [] and texts(' . ') == []


def test_most_clauses_of_true_captions_are_read_and_none_is_wrong():
  rng = np.random.default_rng(0)
  read = total = 0
  for scene in sets.evaluation_scenes(60):
    for clause in words.clauses(grammar.caption(scene, rng)):
      wrong = probe_scenes.wrong_clause(clause.text, scene)
      total += 1
      read += wrong is not None
      assert not wrong, (clause.text, scene)
  assert read / total > 0.9


def test_words_are_wrong_where_the_picture_contradicts_them():
  rng = np.random.default_rng(0)
  seen = set()
  for category in grammar.CATEGORIES:
    for _ in range(10):
      scene = grammar.prompt_scene(rng, category)
      prompt = grammar.prompt_of(scene, category, rng)
      right = probe_scenes.wrong_words(prompt, judge.read(render.render(scene))[0])
      assert right and not any(wrong for *_, wrong in right), prompt.text
      for i, thing in enumerate(scene.things):  # another colour makes just that colour's word wrong
        if sum(t.shape == thing.shape for t in scene.things) == 1:
          other = thing._replace(colour=(thing.colour + 2) % 8)
          changed = scene._replace(things=scene.things[:i] + (other,) + scene.things[i + 1 :])
          labels = probe_scenes.wrong_words(prompt, judge.read(render.render(changed))[0])
          said = {prompt.text[a:b] for a, b, wrong in labels if wrong}
          named = set(grammar.COLOUR_WORDS[thing.colour]) & set(prompt.text.split())
          assert said == named or not named, (prompt.text, said)
          seen |= said
  assert len(seen) > 3


def test_tokens_are_summed_into_the_words_that_they_stand_in():
  processor = Processor.from_directory(locate.EMBEDDED)
  text = 'a red polygon left of a blue hourglass'
  spans = words.token_spans(processor, text)
  assert [text[a:b].strip() for a, b in spans] == [
    processor.decode([i]) for i in processor.encode_prompt(text)
  ]
  assert len(spans) > len(text.split())
  total = words.by_word(spans, np.ones(len(spans)), words.words_of(text))
  assert sum(total) == len(spans) and min(total) >= 1


# SimPO's curvature.


def simpo_weight(beta, gamma, gap):
  """The slope of eq. 5 in the gap of a pair, by central differences in float64."""

  def loss(gap):
    return np.log1p(np.exp(-(beta * gap - gamma)))

  return (loss(gap - 1e-5) - loss(gap + 1e-5)) / 2e-5


@pytest.mark.parametrize('beta, gamma', [(2.0, 0.5), (0.25, 0.0), (2.0, 4.0)])
def test_the_change_of_a_pairs_weight_is_that_of_the_losss_slope(beta, gamma):
  rewards = np.array([[0.0, 3.0, 1.0], [2.0, 1.0, 0.0]])
  logps = np.array([[-1.01, -1.0, -9.0], [-1.03, -9.0, -1.0]])  # gaps +.01 and -.03
  found = measures.curvature(rewards, logps, Method(beta=beta, gamma=gamma))
  assert found['margin_size'] == pytest.approx(0.02)
  slopes = [simpo_weight(beta, gamma, gap) for gap in (0.0, 0.02)]
  assert found['weight_change'] == pytest.approx(1 - slopes[1] / slopes[0], rel=0.05)


def test_curvature_is_said_only_of_simpo_and_only_if_it_is_large():
  rewards, logps = np.array([[0.0, 1.0]]), np.array([[-1.0, -1.2]])
  assert measures.curvature(rewards, logps, Method(objective='grpo')) is None
  for beta, said in ((2.0, True), (0.25, False)):
    curved = measures.curvature(rewards, logps, Method(beta=beta))
    lines = measures.decide('understanding', judged() | {'curvature': curved})['objective']
    assert any('simpo_linear' in line for line in lines) is said
  assert measures.decide('understanding', judged())['objective'] == []
