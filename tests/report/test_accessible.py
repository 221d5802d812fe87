"""Our pages as text: what a reader needs who does not see, or sees badly; no browser is asked."""

import html.parser
import re

import pytest
from run_pages import PAGES, finished_run

from dsr_jax.reporting import charts
from dsr_jax.reporting import html as page_lib

TAGS = ('img', 'svg', 'h1', 'h2', 'h3', 'th', 'table', 'html', 'title')


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
  reward = next(figure for figure in shown if 'Reward of images, R_G' in figure)
  assert 'May fall while drawing improves' in reward


def test_the_loss_of_whole_groups_is_not_in_nats_a_pair(tmp_path):
  text = finished_run(tmp_path / 'run')
  loss = next(f for f in re.findall(r'<figure.*?</figure>', text, re.DOTALL) if '>Loss' in f)
  assert 'nats per pair' not in loss and 'advantages times ratios' in loss


def test_what_does_not_change_is_folded_away(tmp_path):
  text = finished_run(tmp_path / 'run')
  folded = text[text.index('What did not change: ') :]
  for words in ('Length of texts about the fixed images', 'Memory: process peak bytes'):
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
