"""Our pages as text: what a reader needs who does not see, or sees badly; no browser is asked."""

import html.parser
import json
import re

import numpy as np
import pytest

from dsr_jax import rows
from dsr_jax.report import page
from dsr_jax.reporting import charts
from dsr_jax.reporting import html as page_lib

TAGS = ('img', 'svg', 'h1', 'h2', 'h3', 'th', 'table', 'html', 'title')


def finished_run(folder):
  """The page of a small finished run: before and after, curves, a sheet, tables."""
  folder.mkdir(exist_ok=True)
  rng = np.random.default_rng(0)
  (folder / 'samples').mkdir(exist_ok=True)
  lines = []
  for step in range(1, 41):
    lines.append(
      {
        'step': step,
        'loss': 1 / step,
        'generation/loss': 1 / step,
        'generation/reward_mean': -1 - rng.random(),
        'generation/reward_frozen': -1 - rng.random(),
        'understanding/reward_mean': -1 - rng.random(),
        'learning_rate': 1e-5 / step,
        'memory/process_peak_bytes': 2.1e9,
        'generation/dropped_pairs': 0.0,
        'time/step_seconds': 2.0,
      }
    )
  for step in (0, 20, 40):
    _watched(str(folder), step, rng)
    value = {f'generation/{name}': 0.5 + step / 100 for name in ('mean', 'strict', 'any')}
    value |= {'generation/mean_low': 0.4, 'generation/mean_high': 0.95}
    value |= {'watched/dark_pixels': 0.1 + step / 1000, 'watched/text_length': 5.0}
    lines.append({'step': step, **{f'eval/{name}': x for name, x in value.items()}})
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  method = dict(task='unified', objective='grpo', inputs_per_step=2, group_size=2, steps=40)
  method |= dict(learning_rate=1e-5, seed=0)
  about = {'config': {'method': method}, 'about': {'model': {'name': 'scenes'}}, 'devices': '1 cpu'}
  (folder / 'config.json').write_text(json.dumps(about))
  with open(page.write(str(folder)), encoding='utf-8') as f:
    return f.read()


def _watched(folder, step, rng):
  drawn = rows.Candidates(
    task='generation',
    prompts=['a photo of a red disc', 'a photo of two rings left of a very large blue hourglass'],
    codes=rng.integers(0, 9, (2, 4, 16)),
    pixels=rng.integers(0, 255, (2, 4, 32, 32, 3), np.uint8),
    rewards=rng.normal(-1, 1, (2, 4)),
    right=rng.random((2, 4)) < 0.5,
    reasons=[['no red disc: it is blue', '', 'no disc', '']] * 2,
  )
  told = rows.Candidates(
    task='understanding',
    prompts=['Describe.'] * 2,
    codes=rng.integers(0, 9, (2, 16)),
    pixels=rng.integers(0, 255, (2, 32, 32, 3), np.uint8),
    rewards=rng.normal(-1, 1, (2, 1)),
    texts=[['a red disc and a blue ring.'], ['']],
    tokens=[[[1, 2]], [[]]],
  )
  rows.write(folder, step, rows.table(step, [drawn, told]), rows.WATCHED)


def unfinished_run(folder):
  """The page of a run that has its first step alone."""
  folder.mkdir(exist_ok=True)
  (folder / 'metrics.jsonl').write_text('{"step": 1, "loss": 0.5}\n')
  with open(page.write(str(folder)), encoding='utf-8') as f:
    return f.read()


PAGES = {'finished run': finished_run, 'unfinished run': unfinished_run}


class Tags(html.parser.HTMLParser):
  """[(tag, attributes)] of a page, in order."""

  def __init__(self, text):
    super().__init__()
    self.found = []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    if tag in TAGS:
      self.found.append((tag, dict(attrs)))

  def all(self, tag):
    return [attrs for name, attrs in self.found if name == tag]


@pytest.mark.parametrize('name', PAGES)
def test_pictures_charts_and_headings_have_words(name, tmp_path):
  tags = Tags(PAGES[name](tmp_path / 'run'))
  assert all(attrs['alt'] for attrs in tags.all('img'))
  assert all(attrs['role'] == 'img' and attrs['aria-label'] for attrs in tags.all('svg'))
  assert tags.all('html')[0]['lang'] == 'en' and len(tags.all('h1')) == 1
  levels = [int(tag[1]) for tag, _ in tags.found if tag in ('h1', 'h2', 'h3')]
  assert all(after - before <= 1 for before, after in zip(levels, levels[1:]))


def test_the_result_and_its_pictures_come_before_the_curves(tmp_path):
  text = finished_run(tmp_path / 'run')
  places = [text.index(words) for words in ('class="result"', 'Before and after: drawing')]
  places += [text.index(words) for words in ('The fixed list over', 'Both tasks', '>Training<')]
  assert places == sorted(places)
  assert text.count('no red disc: it is blue') == 2 * 2  # two prompts, before and after


def test_every_chief_chart_says_what_to_expect_and_names_its_axes(tmp_path):
  text = finished_run(tmp_path / 'run')
  figures = re.findall(r'<figure class="chart">.*?</figure>', text, re.DOTALL)
  chief = text[: text.index('>Everything else<')]
  shown = [figure for figure in figures if figure in chief]
  assert len(shown) >= 6 and all('class="note"' in figure for figure in shown)
  assert all('text-anchor="middle">step</text>' in figure for figure in figures)
  reward = next(figure for figure in shown if 'Reward of pictures, R_G' in figure)
  assert 'May fall while drawing improves' in reward


def test_the_loss_of_whole_groups_is_not_in_nats_a_pair(tmp_path):
  text = finished_run(tmp_path / 'run')
  loss = next(f for f in re.findall(r'<figure.*?</figure>', text, re.DOTALL) if '>Loss' in f)
  assert 'nats a pair' not in loss and 'advantages times ratios' in loss


def test_what_does_not_change_is_folded_away(tmp_path):
  text = finished_run(tmp_path / 'run')
  folded = text[text.index('What did not change: ') :]
  for words in ('Length of texts about the fixed pictures', 'Memory: process peak bytes'):
    assert words in folded and words not in text[: -len(folded)]
  assert 'Dropped' in folded or 'dropped' in folded


def luminance(color):
  channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
  linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
  """As WCAG 2 has it."""
  high, low = sorted((luminance(one), luminance(other)), reverse=True)
  return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize('part', [0, 1], ids=['light', 'dark'])
def test_words_and_curves_stand_out_from_their_ground(part):
  css, _, _ = page_lib._environment().loader.get_source(None, 'style.css')
  block = re.findall(r':root \{(.*?)\n *\}', css, re.DOTALL)[part]
  colors = dict(re.findall(r'--([a-z]+): (#[0-9a-f]{3,6})', block))
  colors = {
    name: '#' + ''.join(2 * c for c in x[1:]) if len(x) == 4 else x for name, x in colors.items()
  }
  for ground in ('paper', 'card'):
    for name in ('ink', 'faint', 'up', 'down'):
      assert contrast(colors[name], colors[ground]) >= 4.5, (name, ground)
    for role in charts.ROLES:
      assert contrast(colors[role], colors[ground]) >= 3, (role, ground)
