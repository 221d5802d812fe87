"""The benchmarks of Scenes: players whose scores are known, the command's tables, and the best of
N.
"""

import dataclasses
import json
import os

from absl import flags
import micro_parts
import numpy as np
from PIL import Image
import pytest
from run_command import TINY, picture_of, run

from dsr_jax import config as config_lib
from dsr_jax import generate, images
from dsr_jax.errors import InputError
from dsr_jax.evaluate import __main__ as evaluate
from dsr_jax.evaluate import benchmarks, stats
from dsr_jax.evaluate import scores as scores_lib
from dsr_jax.evaluate.sampler import ListSampler
from dsr_jax.probe.model import Prober
from dsr_jax.scenes import grammar, judge, render, sets, world

EVAL = dataclasses.replace(config_lib.Eval(), prompts_per_task=2, images_per_prompt=2, pictures=12)


class Knowing:
  """In the place of a `ListSampler`: draws what is asked, tells what is there, and knows all lists'
  answers.
  """

  def __init__(self):
    self.answers = {}
    for scenes, rows in (
      sets.evaluation_pope(6),
      sets.evaluation_choice(8),
      sets.evaluation_hallusion(3),
    ):
      for row in rows:
        picture = render.render(scenes[row.picture]).tobytes()
        self.answers[picture, row.text] = row.answer

  def pictures(self, params, prompts, samples, **how):
    return np.stack([[picture_of(judge.parse(p))] * samples for p in prompts])

  def texts(self, params, pixels, questions, **how):
    rng = np.random.default_rng(0)
    if questions[0] == grammar.QUESTION_DESCRIBE:
      return [grammar.caption(judge.read(p)[0].scene, rng) for p in pixels]
    return [
      self.answers.get((p.tobytes(), q), 'yes') for p, q in zip(np.asarray(pixels), questions)
    ]


class Silent(Knowing):
  """Draws bare ground and says yes to everything."""

  def pictures(self, params, prompts, samples, **how):
    return np.broadcast_to(render.render(world.Scene(())), (len(prompts), samples, 32, 32, 3))

  def texts(self, params, pixels, questions, **how):
    return ['yes'] * len(questions)


def subject(sampler, name='player'):
  return benchmarks.Subject(name, None, sampler, EVAL, config_lib.Method())


@pytest.fixture(scope='module')
def tables():
  knowing, silent = subject(Knowing()), subject(Silent(), 'silent')
  return {name: benchmarks.measure(name, knowing, silent) for name in benchmarks.BENCHMARKS}


CHIEF = {
  'geneval': 'mean',
  't2i_compbench': 'mean',
  'descriptions': 'greedy precision',
  'pope': 'overall accuracy',
  'multiple_choice': 'circular',
  'hallusion': 'mean',
}


@pytest.mark.parametrize('name, key', CHIEF.items())
def test_who_knows_everything_is_right_in_everything(tables, name, key):
  assert tables[name]['scores'][key] == {'value': 1.0, 'low': 1.0, 'high': 1.0}


def test_who_says_yes_is_the_always_yes_row_and_differences_are_paired(tables):
  for name in ('pope', 'hallusion'):
    assert tables[name]['before'] == tables[name]['references']['always_yes']
    # The one who knows says yes to pictures that are on no list; so the model before a bare picture
    # is that row too.
    assert tables[name]['references']['blind_model'] == tables[name]['references']['always_yes']
  pope = tables['pope']
  assert (
    pope['before']['overall accuracy']['value'] == 0.5
    and pope['difference']['overall accuracy']['value'] == 0.5
  )
  assert (
    tables['geneval']['before']['mean']['value'] == 0
    and tables['geneval']['difference']['mean']['value'] == 1
  )
  assert tables['multiple_choice']['before']['accuracy']['value'] == 0
  assert set(tables['multiple_choice']['references']) == {'blind', 'chance', 'blind_model'}
  assert set(tables['geneval']['scores']) == {
    'mean',
    *grammar.GENEVAL,
    'any sample mean',
    'strict mean',
    'graded mean',
  }
  assert set(tables['t2i_compbench']['scores']) == {'mean', *grammar.T2I_COMPBENCH}


def test_scores_are_those_of_the_libraries_own_functions():
  player = subject(Silent())
  scenes, rows = sets.evaluation_pope(6)
  expected = scores_lib.pope_scores(rows, ['yes'] * len(rows))
  found = benchmarks.measure('pope', player)['scores']
  assert all(
    found[f'{track} {key}'] == e._asdict()
    for track, scores in expected.items()
    for key, e in scores.items()
  )
  scenes, rows = sets.evaluation_hallusion(3)
  sums = scores_lib.hallusion_sums(rows, ['yes'] * len(rows))
  expected = stats.estimates(sums, scores_lib.HALLUSION)
  assert benchmarks.measure('hallusion', player)['scores'] == {
    k: e._asdict() for k, e in expected.items()
  }


def scene(*things):
  return judge.read(render.render(world.Scene(tuple(world.Thing(*t) for t in things))))[0]


@pytest.mark.parametrize(
  'text, category, things, expected',
  [
    ('a red disc and a blue ring', 'color', [(2, 0, 0, 8, 0, 0), (3, 4, 0, 8, 4, 4)], 1.0),
    (
      'a red disc and a blue ring',
      'color',
      [(2, 0, 0, 8, 0, 0), (3, 0, 0, 8, 4, 4)],  # a product of noun phrases
      0.0,
    ),
    ('a disc left of a ring', 'spatial', [(2, 0, 0, 8, 0, 0), (3, 0, 0, 8, 0, 4)], 1.0),
    (
      'a disc left of a ring',
      'spatial',
      [(3, 0, 0, 8, 0, 0), (2, 0, 0, 8, 0, 4)],  # both there, the wrong way round
      0.5,
    ),
    (
      'a disc left of a ring',
      'spatial',
      [(2, 0, 0, 8, 0, 0)],  # a quarter is less than a half
      0.0,
    ),
    (
      'two discs and a ring',
      'numeracy',
      [(2, 0, 0, 8, 0, 0), (2, 0, 0, 8, 0, 4), (3, 0, 0, 8, 4, 4)],
      1.0,
    ),
    ('two discs and a ring', 'numeracy', [(2, 0, 0, 8, 0, 0), (3, 0, 0, 8, 4, 4)], 0.75),
    ('a red disc left of a ring', 'complex', [(2, 4, 0, 8, 0, 0), (3, 0, 0, 8, 0, 4)], 0.5),
  ],
)
def test_compbench_scores_by_hand(text, category, things, expected):
  prompt = grammar.Prompt(text, judge.parse(text), category)
  assert benchmarks.compbench(prompt, scene(*things)) == pytest.approx(expected)


def test_markdown_has_a_row_a_score_in_points(tables):
  about = {
    'model': 'm',
    'before': 'b',
    'settings': {'temperature': 1.0, 'guidance': 1.5, 'best_of': 1, 'seed': 0},
  }
  text = benchmarks.markdown(about, tables)
  assert (
    '| mean | 0.0 | 100.0 | +100.0 | +100.0 … +100.0 |' in text
    and '*always yes*: overall accuracy | | 50.0 |' in text
  )
  alone = benchmarks.markdown(
    {**about, 'before': None},
    {'pope': {k: tables['pope'][k] for k in ('items', 'scores', 'references')}},
  )
  assert '| overall accuracy | 100.0 | 100.0 … 100.0 |' in alone
  for table in (text, alone):
    rows = [line for line in table.splitlines() if line.startswith('|')]
    assert len({row.count('|') for row in rows}) == 1


def test_sheets_show_every_model_on_the_same_prompts():
  one, two = (benchmarks.picture_sheet([subject(Knowing())] * n) for n in (1, 2))
  assert two.width > 1.5 * one.width and two.height == one.height
  assert benchmarks.text_sheet([subject(Knowing()), subject(Silent())]).height > 4 * 96


# The real sampler.

INSTRUCTION = 'Describe the image.'


@pytest.fixture(scope='module')
def model():
  return micro_parts.load()


@pytest.fixture(scope='module')
def sampler(model):
  return ListSampler(
    model.graphdef,
    model.processor,
    chunk=2,
    max_prompt_tokens=16,
    max_text_tokens=8,
    seed=3,
    instruction=INSTRUCTION,
  )


@pytest.fixture(scope='module')
def inference():
  return micro_parts.inference()


def test_the_best_of_n_pictures_is_the_one_with_the_highest_reward(sampler, model, inference):
  prompts = ['a red circle', 'two small green rings', 'a blue square']
  params = model.params
  # The same keys: three samples, or one, the best of three.
  every = sampler.pictures(params, prompts, 3, temperature=1.0, guidance=2.0)
  best = sampler.pictures(params, prompts, 1, temperature=1.0, guidance=2.0, best=3)
  asked = inference.encode(INSTRUCTION, 'question')
  for prompt, shown, chosen in zip(prompts, every, best[:, 0]):
    rewards = []
    for pixels in shown:
      square = images.to_float(pixels)
      text = inference.encode(prompt, 'prompt')
      scores = inference.score(text, inference.tokenize(square), square, asked)
      rewards.append(scores.reward_generation)
    place = [np.array_equal(p, chosen) for p in shown].index(True)
    assert rewards[place] > max(rewards) - 1e-2  # these pixels are rounded to 8 bits


def test_the_best_of_n_texts_has_the_highest_reward(sampler, model, inference):
  params = model.params
  pixels = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3)).astype(np.uint8)
  asked = inference.encode('What?', 'question')

  def texts(n, seed=None):
    return sampler.texts(params, pixels, ['What?'] * 3, temperature=1.0, best=n, seed=seed)

  def reward(text, picture):
    if not text.strip():
      return -np.inf
    square = images.to_float(picture)
    ids = inference.encode(text, 'prompt')
    return inference.score(ids, inference.tokenize(square), square, asked).reward_understanding

  def mean_reward(n):
    found = [reward(t, p) for seed in range(3) for t, p in zip(texts(n, seed), pixels)]
    return np.mean(np.maximum(found, -20))

  assert mean_reward(4) > mean_reward(1)
  assert texts(4) == texts(4) != texts(4, seed=9)


def test_evaluation_probe_and_generate_draw_and_reward_the_same(model, inference):
  prompt, group, seed = 'two small green rings', 3, 7
  method = dataclasses.replace(
    config_lib.Method(), group_size=group, guidance=2.0, instruction=INSTRUCTION
  )
  system = config_lib.System(compute_dtype='float32', rollout_chunk=2)
  samples, pictures = generate.generate(
    inference, prompt, num_samples=group, seed=seed, cfg_weight=2.0, instruction=INSTRUCTION
  )
  order = np.argsort([s['candidate'] for s in samples])
  rewards = np.array([s['reward_generation'] for s in samples])[order]

  words = model.processor.pad([model.processor.encode_prompt(prompt)])
  probed = Prober(model, method, system, seed).draw(words, [INSTRUCTION])
  np.testing.assert_array_equal(probed.codes[0], [samples[i]['codes'] for i in order])
  np.testing.assert_allclose(probed.rewards[0, 0], rewards, atol=1e-5)

  lists = ListSampler(
    model.graphdef,
    model.processor,
    chunk=2,
    max_prompt_tokens=16,
    max_text_tokens=8,
    seed=seed,
    instruction=INSTRUCTION,
  )
  best = lists.pictures(model.params, [prompt], 1, temperature=1.0, guidance=2.0, best=group)[0, 0]
  assert np.abs(best.astype(int) - pictures[0]).max() <= 1  # truncation may fall to either side


def test_the_command_writes_tables_and_sheets_and_equal_models_differ_by_nothing(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(evaluate, 'ListSampler', lambda *model, **how: Knowing())
  said = run(
    evaluate,
    model='scenes',
    before='scenes',
    config=TINY,
    benchmarks='scenes/geneval,scenes/multiple_choice',
    output=tmp_path / 'out',
  )
  assert sorted(os.listdir(tmp_path / 'out')) == [
    'pictures.png',
    'results.json',
    'results.md',
    'texts.png',
  ]
  results = json.loads((tmp_path / 'out' / 'results.json').read_text())
  assert (
    list(results['benchmarks'])
    == ['scenes/geneval', 'scenes/multiple_choice']
    == [k for k in said if k != 'output']
  )
  for name, table in results['benchmarks'].items():
    assert table['scores'] == table['before'] and said[name] == {
      k: v['value'] for k, v in table['scores'].items()
    }
    assert all(d == {'value': 0, 'low': 0, 'high': 0} for d in table['difference'].values())
    assert all(0 <= e['low'] <= e['value'] <= e['high'] <= 1 for e in table['scores'].values())
  assert Image.open(tmp_path / 'out' / 'pictures.png').width > 800
  assert (tmp_path / 'out' / 'results.md').read_text().count('| mean |') >= 1


@pytest.mark.parametrize(
  'values, said',
  [
    (
      dict(benchmarks='scenes/geneval,scenes/mmmu'),
      "unknown benchmark 'scenes/mmmu' in --benchmarks; choose from geneval, t2i_compbench",
    ),
    (dict(model=''), '--model is missing'),
    (dict(best_of=0), '--best_of is 0; set it to at least 1'),
    (dict(limit=-1), '--limit is -1; set it to 0'),
    (dict(max_tokens=0), '--max_tokens is 0; set it to at least 1'),
    (dict(stage='draw'), '--stage is draw; set it to answer or score'),
    (dict(model='scenes@all'), 'no checkpoints found for scenes@all'),
    (dict(model='scenes,runs/a@all'), '@all cannot be combined with other models'),
    (dict(benchmarks='pope', data='pop=x'), '--data=pop=x names no known table'),
    (dict(benchmarks='pope', data='/nowhere'), '/nowhere does not exist; --data needs'),
    (
      dict(judge_url='ftp://x', judge_model='m', benchmarks='geneval'),
      '--judge_url=ftp://x is not a URL',
    ),
  ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(values, said, tmp_path):
  with pytest.raises(InputError, match=said) as e:
    values = {**dict(model='scenes', config=TINY, output=tmp_path / 'out'), **values}
    run(evaluate, **values)
  assert '\n' not in str(e.value) and os.listdir(tmp_path) == []


def test_a_model_of_another_size_is_refused(inference, tmp_path, monkeypatch):
  monkeypatch.setattr(evaluate.locate, 'resolve', lambda name, **how: inference.source)
  with pytest.raises(InputError, match='draws 16 x 16 pixels, but .* have 32 x 32'):
    run(evaluate, model='scenes', config=TINY, output=tmp_path / 'out')
  assert os.listdir(tmp_path) == []


def test_a_folder_of_something_else_is_refused(tmp_path):
  (tmp_path / 'notes.txt').write_text('mine')
  with pytest.raises(InputError, match='contains notes.txt, .*; name a new or empty folder'):
    run(evaluate, model='scenes', config=TINY, benchmarks='geneval', output=tmp_path)
  assert os.listdir(tmp_path) == ['notes.txt']


def test_names_mean_the_papers_benchmarks_and_lists_of_scenes_have_a_prefix():
  assert evaluate.check_benchmarks([]).scenes == tuple(benchmarks.BENCHMARKS)
  assert evaluate.check_benchmarks(['pope', 'scenes/pope', 'pope']) == (('pope',), ('pope',))


def test_two_models_are_the_second_against_the_first():
  assert evaluate.models_of('scenes,scenes', '') == (('scenes', 'scenes'), None)
  assert evaluate.models_of('scenes', 'scenes') == (('scenes', 'scenes'), None)


def test_every_benchmark_is_in_the_flags_help():
  f = flags.FlagValues()
  evaluate.define_flags(f)
  assert all(name in f['benchmarks'].help for name in evaluate.known_names())
