"""Checksums of the files in a folder: written when it is complete, compared when it is read.

CHECKSUMS has the size of every file and the CRC of each of its blocks: {'algorithm': 'crc32c',
'files': {'state/d/ab12': [size, crc, crc, ...]}}. It always detects a single changed bit; a CRC
protects against damage, not against forgery. Several threads read the blocks, and with several
processes, each can read a part of them.

The CRC is Castagnoli's, for which processors have an instruction: it takes a sixth of the time of
CRC-32. Earlier versions wrote CRC-32 without the name of the algorithm: {'state/d/ab12': [size,
...]}.
"""

from collections.abc import Callable
from concurrent import futures
import json
import os
import zlib

import google_crc32c

# (bytes, CRC of the preceding bytes) -> CRC of everything so far.
ALGORITHMS: dict[str, Callable[[bytes, int], int]] = {
  'crc32c': lambda data, crc: google_crc32c.extend(crc, data),
  'crc32': zlib.crc32,
}
ALGORITHM = 'crc32c'
CHECKSUMS = 'checksums.json'
BLOCK_BYTES = 64 << 20
READ_BYTES = 1 << 20  # per read, so that the bytes are still in the CPU cache for the checksum
THREADS = min(8, os.cpu_count() or 1)


def write(folder, later: dict[str, bytes] | None = None):
  """Writes `folder`/CHECKSUMS for all its files.

  Args:
    folder: `epath.Path` on a disk or in a bucket.
    later: {name: content} of files that will be added when the folder is final.
  """
  sizes = {path: _size(folder / path) for path in _files(folder)}
  blocks = [(path, block) for path, size in sizes.items() for block in _blocks(size)]
  found = _crcs(folder, blocks, ALGORITHM)
  content = {path: [size] for path, size in sizes.items()}
  for (path, _), crc in zip(blocks, found):
    content[path].append(crc)
  for name, data in (later or {}).items():
    content[name] = [len(data), *(ALGORITHMS[ALGORITHM](data, 0) for _ in _blocks(len(data)))]
  whole = {'algorithm': ALGORITHM, 'files': content}
  (folder / CHECKSUMS).write_text(json.dumps(whole, indent=0, sort_keys=True) + '\n')


def exist(folder) -> bool:
  """Whether the folder has checksums."""
  return (folder / CHECKSUMS).exists()


def damage(folder, part: int = 0, parts: int = 1) -> str:
  """A description of the first damaged file in a folder, or '' if all files are intact.

  part, parts: checks only every `parts`-th block, starting at block `part`.

  Raises:
    OSError: a file exists but cannot be read.
  """
  try:
    algorithm, content = _checked(json.loads((folder / CHECKSUMS).read_bytes()))
  except (ValueError, RecursionError):
    return f'{CHECKSUMS} is not a list of checksums'
  for path, (size, *_) in content.items():
    if not (folder / path).exists():
      return f'{path} is missing'
    if _size(folder / path) != size:
      return f'{path} has {_size(folder / path):,} bytes of {size:,}'
  blocks = [(path, block) for path, (size, *_) in content.items() for block in _blocks(size)]
  expected = [crc for _, (_, *crcs) in content.items() for crc in crcs]
  mine = slice(part, None, parts)
  for (path, _), crc, found in zip(
    blocks[mine], expected[mine], _crcs(folder, blocks[mine], algorithm), strict=True
  ):
    if crc != found:
      return f'{path} has changed since it was written'
  return ''


def _checked(found) -> tuple[str, dict[str, list[int]]]:
  """The algorithm and the files of CHECKSUMS; ValueError if its format is wrong."""
  if not isinstance(found, dict):
    raise ValueError
  algorithm, content = 'crc32', found  # the format of earlier versions
  if found.keys() == {'algorithm', 'files'}:
    algorithm, content = found['algorithm'], found['files']
  if algorithm not in list(ALGORITHMS) or not isinstance(content, dict) or not content:
    raise ValueError
  for entry in content.values():
    if not isinstance(entry, list) or not all(type(number) is int for number in entry):
      raise ValueError
    if not entry or entry[0] < 0 or len(entry) != 1 + len(_blocks(entry[0])):
      raise ValueError
  return algorithm, content


def _files(folder, inside='') -> list[str]:
  """Sorted relative paths of all files below a folder."""
  found = []
  for child in sorted(folder.iterdir(), key=str):
    path = inside + child.name
    if child.is_dir():
      found += _files(child, f'{path}/')
    elif path != CHECKSUMS:
      found.append(path)
  return found


def _size(path) -> int:
  return path.stat().length


def _blocks(size) -> range:
  """Offsets of the blocks of a file of `size` bytes; an empty file has none."""
  return range(0, size, BLOCK_BYTES)


def _crcs(folder, blocks, algorithm) -> list[int]:
  """The CRC of each block (path, offset), in order."""
  extended = ALGORITHMS[algorithm]

  def crc_of(block):
    path, start = block
    crc = 0
    left = BLOCK_BYTES
    with (folder / path).open('rb') as f:
      f.seek(start)
      while left and (data := f.read(min(READ_BYTES, left))):
        crc = extended(data, crc)
        left -= len(data)
    return crc

  with futures.ThreadPoolExecutor(THREADS) as pool:
    return list(pool.map(crc_of, blocks))
