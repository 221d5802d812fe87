"""Every page: whatever a user or a model wrote stands there as text, and nothing is fetched."""

import json

import numpy as np
import pytest
from run_command import Page

from dsr_jax.probe import page as probe_page
from dsr_jax.replay import page as replay_page
from dsr_jax.report import page as run_page
from dsr_jax.reporting import charts, html

NASTY = '<script>alert("x")</script> & \'quotes\' {{ 7 * 7 }} </style>'
SIDE, GROUP, CODES = 16, 2, 16
RNG = np.random.default_rng(0)


def noise(*shape):
  return RNG.integers(0, 255, (*shape, SIDE, SIDE, 3), np.uint8)


def run_of(folder, curves, config=None):
  """The page of a workdir with these metrics: {name: {step: value}}."""
  folder.mkdir(exist_ok=True)
  steps = sorted({step for curve in curves.values() for step in curve})
  lines = [
    {'step': step, **{name: curve[step] for name, curve in curves.items() if step in curve}}
    for step in steps
  ]
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  if config:
    (folder / 'config.json').write_text(json.dumps(config))
  with open(run_page.write(str(folder)), encoding='utf-8') as f:
    return f.read()


def config(steps):
  method = dict(task='unified', objective=NASTY, inputs_per_step=2, group_size=2, steps=steps)
  method |= dict(learning_rate=1e-5, seed=0)
  return {'config': {'method': method}, 'about': {'model': {'name': NASTY}}, 'devices': NASTY}


def run_html(tmp_path):
  curves = {
    'loss': {1: 0.5, 2: 0.25},
    f'generation/{NASTY}': {1: 0.5, 2: 0.25},
    f'eval/{NASTY}': {0: 0.5, 2: 0.25},
  }
  return run_of(tmp_path / '<b>run \'of\' & "mine"', curves, config(2))


def estimate(value):
  return {'value': value, 'low': value - 0.1, 'high': value + 0.1}


def probe_html(tmp_path):
  del tmp_path
  about = dict.fromkeys(('model', 'prompts', 'images', 'device', 'date'), NASTY)
  about |= dict(inputs=1, candidates=GROUP, temperature=1.0, guidance=1.0, seed=0)
  gate = dict(gate=NASTY, value=None, relation='>=', threshold=0.5, passed=None, reason=NASTY)
  gate |= dict(chief=True, missing=NASTY, cases=None)
  rows = {
    'inputs': 1,
    'candidates': GROUP,
    'reward': dict(best=-1.0, mean=-2.0, worst=-3.0),
    'verdict': dict(
      go=False,
      verdict=NASTY,
      gates=[gate, {**gate, 'value': 0.4, 'missing': '', 'passed': False}],
      not_measured=[NASTY],
      blind=[NASTY],
      objective=[NASTY],
    ),
    'swaps': {NASTY: {**estimate(0.5), 'cases': 3}},
  }
  generation = rows | {
    'categories': {
      NASTY: {key: estimate(0.5) for key in ('best', 'mean', 'worst', 'best_there_is')}
    },
    'best_of': dict(by_reward=[0.5, 0.6], by_judge=[0.5, 0.7]),
  }
  numbers = dict(about=about, go=False, verdict=NASTY, generation=generation, understanding=rows)
  spans = [(i, i + 1) for i in range(len(NASTY))]
  shown = {
    'generation': dict(
      texts=[NASTY],
      pixels=noise(1, GROUP),
      rewards=np.array([[-1.0, -2.0]]),
      spans=[spans],
      heat=np.ones((1, GROUP, len(spans))),
      patches=RNG.normal(size=(1, CODES)),
      right=None,
    ),
    'understanding': dict(
      pixels=noise(1),
      texts=[[NASTY, '']],
      rewards=np.array([[-1.0, -2.0]]),
      clauses=[[[(NASTY, 1.0, True)], []]],
      scores=None,
    ),
  }
  return probe_page.page(numbers, shown)


def seen(tokens):
  return {
    'rewards': np.array([-1.0, -2.0]),
    'learners': np.array([0, 1]),
    'weight': 1.0,
    'push': np.array([0.5, -0.5]),
    'share': 0.5,
    'logps': -np.ones((GROUP, tokens)),
    'mask': np.ones((GROUP, tokens), bool),
  }


def replay_html(tmp_path, exact=False, count=3):
  del tmp_path
  metrics = {f'm{i}': 0.5 for i in range(count)} | {NASTY: 0.25}
  result = {
    'workdir': NASTY,
    'step': 3,
    'from_checkpoint': 2,
    'exact': exact,
    'differences': {} if exact else {NASTY: [0.5, 0.25]},
    'metrics': metrics,
    'gradient_by_part': {NASTY: 1.0},
    'generation': {'gradient_shares': [0.5, -0.0001]},
    'understanding': {'gradient_shares': [-0.5, 1.0]},
    'what_if': {
      'changes': {'objective': NASTY},
      'cosine': 0.5,
      'norm_ratio': 2.0,
      'tasks': {NASTY: dict(same_best=1.0, same_worst=0.5)},
      'metrics': {'m0': 0.75},
    },
  }
  shown = {
    'generation': [replay_page.ShownInput(0, seen(CODES), None, noise(GROUP), prompt=NASTY)],
    'understanding': [
      replay_page.ShownInput(
        0, seen(1), np.array([1.0, 2.0]), noise(), texts=(NASTY, ''), tokens=([NASTY], [NASTY])
      )
    ],
  }
  return replay_page.page(result, shown)


PAGES = {'run': run_html, 'probe': probe_html, 'replay': replay_html}


@pytest.mark.parametrize('name', PAGES)
def test_what_a_user_or_a_model_wrote_is_text_and_nothing_else(name, tmp_path):
  text = PAGES[name](tmp_path)
  page = Page(text)  # every tag that opens closes
  assert '<script' not in text and '<b>run' not in text and text.count('</style>') == 1
  assert NASTY in ' '.join(page.words)  # read back, it is what was written: not evaluated, not lost
  assert '&amp;lt;' not in text  # nor escaped twice


@pytest.mark.parametrize('name', PAGES)
def test_a_page_is_one_file_for_wide_and_narrow_light_and_dark(name, tmp_path):
  text = PAGES[name](tmp_path)
  page = Page(text)
  assert all(src.startswith('data:image/png;base64,') for src in page.images)
  assert 'http' not in text and 'url(' not in text and '<link' not in text
  assert 'name="viewport"' in text and 'prefers-color-scheme: dark' in text
  assert '@media (max-width' in text


@pytest.mark.parametrize('name', ['probe', 'replay'])
def test_every_cell_of_a_table_knows_its_column_for_narrow_pages(name, tmp_path):
  text = PAGES[name](tmp_path)
  for label in {'probe': ('measured', 'reason'), 'replay': ('logged', 'recomputed')}[name]:
    assert f'data-label="{label}"' in text


def test_equal_numbers_of_a_replay_are_folded_away_below_what_is_worth_reading(tmp_path):
  text = replay_html(tmp_path, exact=True, count=35)
  assert 'What differs' not in text
  folded = text.index('36 numbers, logged and recomputed, all equal')
  assert (
    folded > text.index('Texts about images')
    and '<td data-label="" class="">m34' not in text[:folded].split('</details>')[-1]
  )
  assert 'What differs' in replay_html(tmp_path)


def test_a_run_compares_before_and_after_on_the_same_lists_alone(tmp_path):
  curves = {
    'loss': {1: 0.5},
    'eval/generation/mean': {0: 0.5, 2: 0.75},
    'eval/generation/mean_low': {0: 0.4, 2: 0.7},
    'eval/generation/mean_high': {0: 0.6, 2: 0.8},
  }
  unfinished = ' '.join(Page(run_of(tmp_path / 'a', curves, config(4))).words)
  assert 'not measured on the same list before' in unfinished and '+0.250' not in unfinished
  finished = run_of(tmp_path / 'b', curves, config(2))
  assert '<div class="was up">+0.250</div>' in finished


@pytest.mark.parametrize('change, said', [(0.0, '±0.000'), (0.0004, '±0.000'), (-0.0004, '±0.000')])
def test_no_change_is_neither_good_nor_bad(change, said, tmp_path):
  curves = {'loss': {1: 0.5}, 'eval/a': {0: 0.5, 2: 0.5 + change}}
  assert f'<div class="was ">{said}</div>' in run_of(tmp_path / 'a', curves, config(2))


def test_a_learning_rate_is_drawn_as_it_is(tmp_path):
  curves = {name: {i: 0.1 * (i % 5) for i in range(1, 61)} for name in ('x/learning_rate', 'loss')}
  text = run_of(tmp_path / 'a', curves, config(60))
  assert text.count('class="raw"') == 1


def test_one_color_has_one_meaning():
  """Curves never have the colors of better and worse, and each role has its own."""
  css, _, _ = html._environment().loader.get_source(None, 'style.css')
  for part in css.split('@media')[:2]:
    colors = [
      line.partition(':')[2].strip()
      for line in part.replace(';', '\n').splitlines()
      if line.strip().startswith(tuple(f'--{role}:' for role in (*charts.ROLES, 'up', 'down')))
    ]
    assert len(colors) == len(set(colors)) == len(charts.ROLES) + 2
