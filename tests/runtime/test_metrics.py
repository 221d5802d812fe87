"""Metrics files and event files: what was logged comes back, once, whatever a line has suffered."""

import collections
import io
import json
import os
import struct

import fake_run
import numpy as np
from PIL import Image
import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto import event_pb2, plugin_hparams_pb2

from dsr_jax import train
from dsr_jax.errors import InputError
from dsr_jax.runtime import metrics


def events_of(folder):
  """The events of all files of a folder, file by file as they were begun; every CRC is checked."""

  def check(data, crc):
    masked = ((crc32c(data) >> 15 | crc32c(data) << 17) + 0xA282EAD8) & 0xFFFFFFFF
    assert struct.unpack('<I', crc)[0] == masked

  found = []
  for path in sorted(folder.iterdir(), key=os.path.getctime):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack('<Q', data[:8])
      check(data[:8], data[8:12])
      check(data[12 : 12 + length], data[12 + length : 16 + length])
      found.append(event_pb2.Event.FromString(data[12 : 12 + length]))
      data = data[16 + length :]
  return found


def shown_by_tensorboard(folder):
  """{name: [(step, value)]}: as TensorBoard, which drops what is at or after a start's step."""
  shown = collections.defaultdict(list)
  for event in events_of(folder):
    if event.session_log.status == event_pb2.SessionLog.START:
      for name, points in shown.items():
        shown[name] = [point for point in points if point[0] < event.step]
    for value in event.summary.value:
      shown[value.tag].append((event.step, _content(value)))
  return dict(shown)


def _content(value):
  """A number, a picture's bytes, a text, or what the plugin of hyper-parameters holds."""
  kind = value.WhichOneof('value')
  if kind == 'image':
    return value.image.encoded_image_string
  if kind == 'tensor':
    return value.tensor.string_val[0].decode()
  return value.simple_value if kind else value.metadata.plugin_data.content


def test_event_files_hold_what_was_logged(tmp_path):
  writer = metrics.Writer(str(tmp_path))
  writer.write(5, {'a/b': 1.5, 'long-name/' * 30: -2.25})
  writer.write(70000, {'c': 1e-8})
  # Nothing is left in this process that a kill would take along.
  shown = shown_by_tensorboard(tmp_path / 'events')
  writer.close()
  assert shown == {
    'a/b': [(5, 1.5)],
    'long-name/' * 30: [(5, -2.25)],
    'c': [(70000, np.float32(1e-8))],
  }


def test_pictures_texts_and_settings_are_in_the_events(tmp_path):
  picture = io.BytesIO()
  Image.new('RGB', (7, 5), (200, 0, 0)).save(picture, 'PNG')
  settings = {'method.beta': 2.0, 'method.objective': 'simpo', 'system.remat': True, 'data.n': 3}
  writer = metrics.Writer(str(tmp_path), settings=settings)
  writer.media(4, {'candidates': picture.getvalue()}, {'told': '| a | b |'})
  writer.close()
  shown = shown_by_tensorboard(tmp_path / 'events')
  assert shown['candidates'] == [(4, picture.getvalue())]
  assert shown['told/text_summary'] == [(4, '| a | b |')]
  (image,) = [
    value.image
    for event in events_of(tmp_path / 'events')
    for value in event.summary.value
    if value.tag == 'candidates'
  ]
  assert (image.width, image.height) == (7, 5)
  ((step, content),) = shown['_hparams_/session_start_info']
  told = plugin_hparams_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
  assert step == 0 and told['method.beta'].number_value == 2.0
  assert told['method.objective'].string_value == 'simpo' and told['system.remat'].bool_value


def test_after_restarts_every_step_is_in_the_events_once(tmp_path):
  for stopped in (6, 11):
    with pytest.raises(InputError):
      train.run(fake_run.config(16), str(tmp_path), fake_run.parts(nan_at=stopped))
  train.run(fake_run.config(16), str(tmp_path), fake_run.parts())
  assert len(list((tmp_path / 'events').iterdir())) == 3
  shown = shown_by_tensorboard(tmp_path / 'events')
  for name, (steps, values) in metrics.read(tmp_path).items():
    assert [step for step, _ in shown[name]] == steps, name
    np.testing.assert_array_equal([v for _, v in shown[name]], np.float32(values))
  assert metrics.read(tmp_path)['loss'][0] == list(range(1, 17))
  # So are the pictures, and the settings are told once.
  pictures = {step: (tmp_path / 'samples' / f'{step:06d}.png').read_bytes() for step in (5, 10, 15)}
  assert shown['candidates'] == list(pictures.items())
  assert len(shown['_hparams_/session_start_info']) == 1


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
  with pytest.raises(InputError, match='does not exist; name the workdir of a run'):
    metrics.read(tmp_path / 'nothing')


BAD = (
  b'',
  b'\xff\xfe\x00',
  b'{"step": 4, "lo',
  b'{}',
  b'[1]',
  b'7',
  b'null',
  b'{"step": "4"}',
  b'{"step": true}',
  b'{"step": 4, "loss": "x"}',
  b'{"step": 4, "loss": NaN}',
  b'[' * 100_000,
)


@pytest.mark.parametrize('bad', BAD)
def test_a_bad_line_costs_nothing_but_itself(bad, tmp_path, capsys):
  writer = metrics.Writer(str(tmp_path))
  for step in range(1, 21):
    writer.write(step, {'loss': float(step)})
  writer.close()
  path = tmp_path / metrics.FILE
  lines = path.read_bytes().splitlines()
  lines[3] = bad
  path.write_bytes(b'\n'.join(lines) + b'\n')
  rest = [1, 2, 3, *range(5, 21)]
  assert metrics.read(tmp_path)['loss'] == (rest, [float(step) for step in rest])
  assert [line['step'] for line in metrics.repeatable(tmp_path)] == rest
  capsys.readouterr()
  metrics.Writer(str(tmp_path), 18).close()
  said = capsys.readouterr().err
  assert f'{path}: skipped 1 of 20 lines, which are not metrics: line 4 (' in said
  assert f'{path} has no lines for steps 4;' in said
  assert metrics.read(tmp_path)['loss'][0] == rest[:-2]
  capsys.readouterr()
  metrics.read(tmp_path)
  assert capsys.readouterr().err == ''


def test_missing_lines_and_a_missing_file_are_said(tmp_path, capsys):
  path = tmp_path / metrics.FILE
  path.write_text(''.join(json.dumps({'step': s, 'loss': 1.0}) + '\n' for s in (2, 3, 7, 9)))
  metrics.Writer(str(tmp_path), 8).close()
  assert 'has no lines for steps 1, 4 to 6, 8;' in capsys.readouterr().err
  path.unlink()
  metrics.Writer(str(tmp_path), 8).close()
  assert f'{path} does not exist: the metrics of steps 1 to 8 are lost' in capsys.readouterr().err
  path.unlink()
  metrics.Writer(str(tmp_path)).close()
  assert capsys.readouterr().err == ''


def test_curves_go_by_step_whatever_the_order_of_the_file(tmp_path):
  writer = metrics.Writer(str(tmp_path))
  for step in (3, 6, 0):  # the initial model is measured late where a run begins without that
    writer.write(step, {'eval/x': float(step)})
  writer.close()
  assert metrics.read(tmp_path)['eval/x'] == ([0, 3, 6], [0.0, 3.0, 6.0])
