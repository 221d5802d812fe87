"""TensorBoard's event files, without TensorBoard, TensorFlow or protobuf: only scalars, which are a
few bytes each.

A file is a sequence of records: length (uint64), masked CRC-32C of it, data, masked CRC-32C of the
data, all little-endian. The data is an `Event` message (tensorflow/core/util/event.proto):
wall_time = 1 (double), step = 2 (int64), file_version = 3 (string), summary = 5, session_log = 7. A
`Summary` repeats value = 1 with tag = 1 (string) and simple_value = 2 (float).
"""

import os
import socket
import struct
import time

_START = 1  # SessionLog.Status: TensorBoard drops what earlier files hold at this step and after


class EventWriter:
  """Appends scalars to a new event file in `folder`."""

  def __init__(self, folder, first_step):
    """first_step: the first to come; TensorBoard drops what an earlier, killed process logged from
    there on.
    """
    os.makedirs(folder, exist_ok=True)
    name = f'events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}'
    self._file = open(os.path.join(folder, name), 'wb')
    self._write(_text(3, 'brain.Event:2'))
    self._write(_integer(2, first_step) + _message(7, _integer(1, _START)))

  def scalars(self, step, values):
    """values: flat dict of floats."""
    entries = b''.join(
      _message(1, _text(1, name) + b'\x15' + struct.pack('<f', value))
      for name, value in values.items()
    )
    self._write(_integer(2, step) + _message(5, entries))

  def _write(self, fields):
    event = b'\x09' + struct.pack('<d', time.time()) + fields
    length = struct.pack('<Q', len(event))

    def check(data):
      return struct.pack('<I', masked_crc32c(data))

    self._file.write(length + check(length) + event + check(event))
    self._file.flush()

  def close(self):
    """Ends the file."""
    self._file.close()


def crc32c(data):
  """CRC-32C (Castagnoli) of bytes."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
  return crc ^ 0xFFFFFFFF


def masked_crc32c(data):
  """As TFRecord stores it, so that a CRC of data with a CRC inside stays good."""
  crc = crc32c(data)
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _table():
  table = []
  for crc in range(256):
    for _ in range(8):
      crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    table.append(crc)
  return table


_TABLE = _table()


def _varint(n):
  out = bytearray()
  while n > 127:
    out.append(n & 127 | 128)
    n >>= 7
  return bytes([*out, n])


def _integer(field, value):
  return _varint(field << 3) + _varint(value)


def _message(field, data):
  return _varint(field << 3 | 2) + _varint(len(data)) + data


def _text(field, value):
  return _message(field, value.encode())
