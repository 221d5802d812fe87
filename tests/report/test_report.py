"""Sheets and the page: read back by something that did not write them."""

import html.parser
import re

import fake_run
import numpy as np

from dsr_jax import train
from dsr_jax.reporting import sheets as pictures


def test_sheets_frame_the_chosen_and_the_rejected():
  rng = np.random.default_rng(0)

  def noise(*shape):
    return rng.integers(0, 255, shape, np.uint8)

  sheet = pictures.candidates(
    ['a red disc', 'two rings ' * 30],
    noise(2, 4, 32, 32, 3),
    rng.normal(size=(2, 4)),
    np.array([2, -1]),
    np.array([0, -1]),
  )
  pixels = np.asarray(sheet)

  def frame(color):
    return np.argwhere((pixels == color).all(-1))

  tile = 96 + pictures.GAP
  chosen, rejected = frame(pictures.CHOSEN), frame(pictures.REJECTED)
  assert (
    chosen[:, 1].min() == 210 + 2 * tile - pictures.FRAME
    and rejected[:, 1].min() == 210 - pictures.FRAME
  )
  half = sheet.height // 2
  assert chosen[:, 0].max() < half and rejected[:, 0].max() < half  # the tied group has neither
  texts = pictures.captions(
    noise(1, 384, 384, 3), [['', 'word ' * 200]], np.zeros((1, 2)), np.array([1]), np.array([0])
  )
  assert pictures.stack([sheet, texts]).height > sheet.height + texts.height


class Page(html.parser.HTMLParser):
  def __init__(self, text):
    super().__init__()
    self.open, self.seen, self.urls = [], [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.seen.append(tag)
    self.urls += [v for k, v in attrs if k in ('src', 'href')]
    if tag not in ('meta', 'img', 'br', 'line', 'circle', 'polyline', 'polygon'):
      self.open.append(tag)

  def handle_endtag(self, tag):
    if tag not in ('line', 'circle', 'polyline', 'polygon'):
      assert self.open.pop() == tag


def test_the_page_is_well_formed_self_contained_and_has_curves_and_pictures(tmp_path):
  train.run(fake_run.config(12, model='<b>name & "quotes"</b>'), str(tmp_path), fake_run.parts())
  text = (tmp_path / 'report.html').read_text()
  page = Page(text)
  assert (
    page.open == []
    and page.seen.count('svg') >= 3
    and page.seen.count('img') == 2
    and 'b' in page.seen
  )
  assert all(
    u.startswith('data:image/png;base64,') for u in page.urls
  ) and 'http' not in text.replace('http-equiv', '')
  assert (
    '<b>name &amp;' not in text
    and '<b>name &' not in text
    and 'nan' not in re.findall(r'points="([^"]*)"', text)
  )
  assert 'step 12' in text and 'R_G' in text and 'before' in text
