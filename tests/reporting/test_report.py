"""Metrics files, event files, sheets and the page: read back by something that did not write
them.
"""

import html.parser
import json
import os
import re
import struct

import fake_run
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
import numpy as np
import pytest

from dsr_jax import train
from dsr_jax.errors import InputError
from dsr_jax.reporting import sheets as pictures
from dsr_jax.runtime import events, metrics


def test_crc32c_has_its_published_values():  # RFC 3720, B.4, and the usual check value
  assert events.crc32c(bytes(32)) == 0x8A9136AA
  assert events.crc32c(b'\xff' * 32) == 0x62A8AB43
  assert events.crc32c(bytes(range(32))) == 0x46DD794E
  assert events.crc32c(b'123456789') == 0xE3069283


def event_class():
  """TensorBoard's Event message, as far as it is used, built by protobuf from a description."""
  file = descriptor_pb2.FileDescriptorProto(name='event.proto', package='t', syntax='proto3')
  kind = descriptor_pb2.FieldDescriptorProto

  def message(name, *fields):
    m = file.message_type.add(name=name)
    for number, field, type_, label, of in fields:
      m.field.add(name=field, number=number, type=type_, label=label, type_name=of)

  one, many = kind.LABEL_OPTIONAL, kind.LABEL_REPEATED
  message(
    'Value',
    (1, 'tag', kind.TYPE_STRING, one, None),
    (2, 'simple_value', kind.TYPE_FLOAT, one, None),
  )
  message('Summary', (1, 'value', kind.TYPE_MESSAGE, many, '.t.Value'))
  message('SessionLog', (1, 'status', kind.TYPE_INT32, one, None))
  message(
    'Event',
    (1, 'wall_time', kind.TYPE_DOUBLE, one, None),
    (2, 'step', kind.TYPE_INT64, one, None),
    (3, 'file_version', kind.TYPE_STRING, one, None),
    (5, 'summary', kind.TYPE_MESSAGE, one, '.t.Summary'),
    (7, 'session_log', kind.TYPE_MESSAGE, one, '.t.SessionLog'),
  )
  pool = descriptor_pool.DescriptorPool()
  pool.Add(file)
  return message_factory.GetMessageClass(pool.FindMessageTypeByName('t.Event'))


def test_event_files_hold_what_was_logged(tmp_path):
  writer = events.EventWriter(str(tmp_path), 5)
  writer.scalars(5, {'a/b': 1.5, 'long name ' * 30: -2.25})
  writer.scalars(70000, {'c': 1e-8})
  writer.close()
  data, read, cls = (tmp_path / os.listdir(tmp_path)[0]).read_bytes(), [], event_class()
  while data:
    (length,) = struct.unpack('<Q', data[:8])
    assert struct.unpack('<I', data[8:12])[0] == events.masked_crc32c(data[:8])
    body = data[12 : 12 + length]
    assert struct.unpack('<I', data[12 + length : 16 + length])[0] == events.masked_crc32c(body)
    read.append(cls.FromString(body))
    data = data[16 + length :]
  assert read[0].file_version == 'brain.Event:2' and read[0].wall_time > 1.7e9
  assert (read[1].step, read[1].session_log.status) == (
    5,
    1,
  )  # START: what was logged from step 5 on is dropped
  assert [(v.tag, v.simple_value) for v in read[2].summary.value] == [
    ('a/b', 1.5),
    ('long name ' * 30, -2.25),
  ]
  assert read[3].step == 70000 and read[3].summary.value[0].simple_value == np.float32(1e-8)


def test_metrics_come_back_as_they_were_and_a_half_written_line_is_dropped(tmp_path):
  value = float(np.float32(0.1))
  writer = metrics.Writer(str(tmp_path))
  for step in (1, 2, 3):
    writer.write(step, {'loss': value * step, 'time/step_seconds': step})
  writer.close()
  path = tmp_path / metrics.FILE
  with open(path, 'a', encoding='utf-8') as f:
    f.write('{"step": 4, "lo')
  assert metrics.read(tmp_path)['loss'] == ([1, 2, 3], [value, value * 2, value * 3])
  metrics.Writer(str(tmp_path), 2).close()
  assert [json.loads(line)['step'] for line in path.read_text().splitlines()] == [1, 2]
  metrics.Writer(str(tmp_path), None).close()
  assert path.read_text() == ''
  with pytest.raises(InputError, match='expected the workdir of a run'):
    metrics.read(tmp_path / 'nothing')


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
