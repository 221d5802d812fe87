"""Runs a command in this process, and reads its page by something that did not write it."""

import contextlib
import html.parser
import io
import itertools
import json
import sys
from unittest import mock

from absl import flags
from places import ROOT

from dsr_jax.scenes import judge, render, world

TINY = str(ROOT / 'configs' / 'scenes_tiny.py')


def run(command, **values):
  """A command's main with flags; `config__a__b` is --config.a.b. Returns what it printed on stdout,
  parsed.
  """
  f = flags.FlagValues()
  command.define_flags(f)
  argv = ['test', *(f'--{name.replace("__", ".")}={value}' for name, value in values.items())]
  with mock.patch.object(sys, 'argv', argv):  # the config's own flags are read from there
    f(argv)
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    command.main(['test'], f)
  return json.loads(out.getvalue())


class Page(html.parser.HTMLParser):
  """Words and picture sources of a page; every tag that opens must close."""

  VOID = ('meta', 'br', 'img', 'circle', 'line', 'polyline', 'polygon')

  def __init__(self, text):
    super().__init__()
    self.words, self.images, self.open = [], [], []
    self.feed(text)
    assert not self.open, self.open

  def handle_starttag(self, tag, attrs):
    if tag == 'img':
      self.images.append(dict(attrs)['src'])
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    if tag not in self.VOID:
      assert self.open.pop() == tag

  def handle_data(self, data):
    self.words.append(data)


def picture_of(atoms):
  """A picture of which a text's atoms are true, nothing else in it."""
  mentions = judge.expand(atoms)
  for step in (3, 4):  # cells between corners: things of 12 pixels need four
    for places in itertools.permutations(
      [(r, c) for r in (0, step) for c in (0, step)], len(mentions)
    ):
      things = tuple(
        world.Thing(m.shape, m.colour or 0, m.texture or 0, m.size or 8, *p)
        for m, p in zip(mentions, places)
      )
      scene = world.Scene(things)
      reading = judge.read(render.render(scene))[0]
      if reading.clean and judge.strict(atoms, reading):
        return render.render(scene)
  raise AssertionError(atoms)
