"""The benchmarks of Scenes: players whose scores are known, the command's tables, and the best of
N.
"""

import dataclasses
import json
import os

import jax
import numpy as np
from PIL import Image
import pytest
from run_command import ROOT, TINY, picture_of, run

from dsr_jax import config as config_lib
from dsr_jax.errors import InputError
from dsr_jax.evaluate import __main__ as evaluate
from dsr_jax.evaluate import benchmarks as evaluate_scenes
from dsr_jax.evaluate import scores as evaluation
from dsr_jax.models.janus import model as janus
from dsr_jax.scenes import grammar, judge, render, sets, world

EVAL = dataclasses.replace(config_lib.Eval(), prompts_per_task=2, images_per_prompt=2, pictures=12)


class Knowing:
  """In the place of `evaluate.Sampler`: draws what is asked, tells what is there, and knows the
  answers of all lists.
  """

  def __init__(self):
    self.answers = {}
    for scenes, rows in (
      sets.evaluation_pope(6),
      sets.evaluation_choice(8),
      sets.evaluation_hallusion(3),
    ):
      self.answers |= {(render.render(scenes[r.picture]).tobytes(), r.text): r.answer for r in rows}

  def pictures(
    self, params, prompts, samples, temperature, guidance, best_of=1, seed=None, cfg_interval=0
  ):
    return np.stack([[picture_of(judge.parse(p))] * samples for p in prompts])

  def texts(self, params, pixels, questions, temperature, max_tokens=None, best_of=1, seed=None):
    rng = np.random.default_rng(0)
    if questions[0] == grammar.QUESTION_DESCRIBE:
      return [grammar.caption(judge.read(p)[0].scene, rng) for p in pixels]
    return [
      self.answers.get((p.tobytes(), q), 'yes') for p, q in zip(np.asarray(pixels), questions)
    ]


class Silent(Knowing):
  """Draws bare ground and says yes to everything."""

  def pictures(
    self, params, prompts, samples, temperature, guidance, best_of=1, seed=None, cfg_interval=0
  ):
    return np.broadcast_to(render.render(world.Scene(())), (len(prompts), samples, 32, 32, 3))

  def texts(self, params, pixels, questions, temperature, max_tokens=None, best_of=1, seed=None):
    return ['yes'] * len(questions)


def subject(sampler, name='player'):
  return evaluate_scenes.Subject(name, None, sampler, EVAL, config_lib.Method())


@pytest.fixture(scope='module')
def tables():
  knowing, silent = subject(Knowing()), subject(Silent(), 'silent')
  return {
    name: evaluate_scenes.measure(name, knowing, silent) for name in evaluate_scenes.BENCHMARKS
  }


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
  expected = evaluation.pope_scores(rows, ['yes'] * len(rows))
  found = evaluate_scenes.measure('pope', player)['scores']
  assert all(
    found[f'{track} {key}'] == e._asdict()
    for track, scores in expected.items()
    for key, e in scores.items()
  )
  scenes, rows = sets.evaluation_hallusion(3)
  assert evaluate_scenes.measure('hallusion', player)['scores'] == {
    k: e._asdict() for k, e in evaluation.hallusion_scores(rows, ['yes'] * len(rows)).items()
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
      [(2, 0, 0, 8, 0, 0), (3, 0, 0, 8, 4, 4)],
      0.0,
    ),  # a product of noun phrases
    ('a disc left of a ring', 'spatial', [(2, 0, 0, 8, 0, 0), (3, 0, 0, 8, 0, 4)], 1.0),
    (
      'a disc left of a ring',
      'spatial',
      [(3, 0, 0, 8, 0, 0), (2, 0, 0, 8, 0, 4)],
      0.5,
    ),  # both there, the wrong way round
    (
      'a disc left of a ring',
      'spatial',
      [(2, 0, 0, 8, 0, 0)],
      0.0,
    ),  # a quarter is less than a half
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
  assert evaluate_scenes.compbench(prompt, scene(*things)) == pytest.approx(expected)


def test_markdown_has_a_row_a_score_in_points(tables):
  about = {
    'model': 'm',
    'before': 'b',
    'settings': {'temperature': 1.0, 'guidance': 1.5, 'best_of': 1, 'seed': 0},
  }
  text = evaluate_scenes.markdown(about, tables)
  assert (
    '| mean | 0.0 | 100.0 | +100.0 | +100.0 … +100.0 |' in text
    and '*always yes*: overall accuracy | | 50.0 |' in text
  )
  alone = evaluate_scenes.markdown(
    {**about, 'before': None},
    {'pope': {k: tables['pope'][k] for k in ('items', 'scores', 'references')}},
  )
  assert '| overall accuracy | 100.0 | 100.0 … 100.0 |' in alone
  for table in (text, alone):
    rows = [line for line in table.splitlines() if line.startswith('|')]
    assert len({row.count('|') for row in rows}) == 1


def test_sheets_show_every_model_on_the_same_prompts():
  one, two = (evaluate_scenes.picture_sheet([subject(Knowing())] * n) for n in (1, 2))
  assert two.width > 1.5 * one.width and two.height == one.height
  assert evaluate_scenes.text_sheet([subject(Knowing()), subject(Silent())]).height > 4 * 96


# The real sampler.


@pytest.fixture(scope='module')
def sampler(bundle):
  return evaluate.Sampler(
    janus.graphdef_of(bundle.config),
    bundle.processor,
    chunk=2,
    max_prompt_tokens=16,
    max_text_tokens=8,
    seed=3,
    instruction='Describe the image.',
  )


def test_the_best_of_n_pictures_is_the_one_with_the_highest_reward(sampler, bundle, hf_directory):
  from dsr_jax.convert import locate as model_source
  from dsr_jax.inference import Inference

  prompts = ['a red circle', 'two small green rings', 'a blue square']
  params = jax.tree.map(np.asarray, bundle.params)
  every = sampler.pictures(
    params, prompts, 3, 1.0, 2.0
  )  # the same keys: three samples, or one, the best of three
  best = sampler.pictures(params, prompts, 1, 1.0, 2.0, best_of=3)
  model = Inference(model_source.resolve(str(hf_directory)))
  asked = model.encode('Describe the image.', 'question')
  for prompt, shown, chosen in zip(prompts, every, best[:, 0]):
    rewards = []
    for pixels in shown:
      square = pixels.astype(np.float32) / 127.5 - 1
      rewards.append(
        model.score(
          model.encode(prompt, 'prompt'), model.tokenize(square), square, asked
        ).reward_generation
      )
    place = [np.array_equal(p, chosen) for p in shown].index(True)
    assert rewards[place] > max(rewards) - 1e-2  # these pixels are rounded to 8 bits


def test_the_best_of_n_texts_has_the_highest_reward(sampler, bundle, hf_directory):
  from dsr_jax.convert import locate as model_source
  from dsr_jax.inference import Inference

  params = jax.tree.map(np.asarray, bundle.params)
  pixels = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3)).astype(np.uint8)

  def texts(n, seed=None):
    return sampler.texts(params, pixels, ['What?'] * 3, 1.0, best_of=n, seed=seed)

  model = Inference(model_source.resolve(str(hf_directory)))
  asked = model.encode('What?', 'question')

  def reward(text, p):
    return (
      model.score(
        model.encode(text, 'prompt'),
        model.tokenize(p.astype(np.float32) / 127.5 - 1),
        p.astype(np.float32) / 127.5 - 1,
        asked,
      ).reward_understanding
      if text.strip()
      else -np.inf
    )

  plain = np.mean(
    [max(reward(t, p), -20) for seed in range(3) for t, p in zip(texts(1, seed), pixels)]
  )
  best = np.mean(
    [max(reward(t, p), -20) for seed in range(3) for t, p in zip(texts(4, seed), pixels)]
  )
  assert best > plain
  assert texts(4) == texts(4) != texts(4, seed=9)


def test_the_command_writes_tables_and_sheets_and_equal_models_differ_by_nothing(tmp_path):
  said = run(
    evaluate,
    model='scenes',
    before='scenes',
    config=TINY,
    benchmarks='geneval,multiple_choice',
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
    == ['geneval', 'multiple_choice']
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
      dict(benchmarks='geneval,mmmu'),
      "found the benchmark 'mmmu'; expected some of geneval, t2i_compbench",
    ),
    (dict(model=''), 'found no --model'),
    (dict(best_of=0), 'found --best_of=0'),
    (dict(output=''), 'found no --output'),
    (dict(model='/nowhere/at/all'), 'found no model'),
    (dict(config__method__objective='magic'), "found config.method.objective='magic'"),
  ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(values, said, tmp_path):
  with pytest.raises(InputError, match=said) as e:
    run(evaluate, **{**dict(model='scenes', config=TINY, output=tmp_path / 'out'), **values})
  assert '\n' not in str(e.value) and os.listdir(tmp_path) == []


def test_a_model_of_another_size_is_refused(hf_directory, tmp_path):
  with pytest.raises(InputError, match='of 16 x 16 pixels; expected one of 32 x 32'):
    run(evaluate, model=hf_directory, config=TINY, output=tmp_path / 'out')
  assert os.listdir(tmp_path) == []


def test_every_benchmark_is_in_the_flags_help():
  from absl import flags

  f = flags.FlagValues()
  evaluate.define_flags(f)
  assert all(name in f['benchmarks'].help for name in evaluate_scenes.BENCHMARKS)
  assert (ROOT / 'dsr_jax' / 'evaluate.py').is_file()
