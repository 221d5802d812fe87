"""Prepares a data set: threads check the items of the source, which are written in their order."""

import collections
from collections.abc import Iterator
import concurrent.futures
import hashlib
import io
import json
import os
import time
from typing import NamedTuple

from dsr_jax import cli, images, inputs
from dsr_jax.data import folders, known, prepared
from dsr_jax.errors import InputError
from dsr_jax.prepare import shards, sources

MAX_FAULTY = 0.01  # share of images that may be left out
SHOWN_NAMES = 3  # names of passed-over items to note; the others are only counted
_QUEUED = 4  # items per worker to read ahead of writing
_SAY_SECONDS = 10.0


class Looked(NamedTuple):
  """An item of the source: an image (data, width, height), its fault, or why it is not an image."""

  name: str
  data: bytes = b''
  width: int = 0
  height: int = 0
  fault: str = ''
  other: str = ''


def look(item: sources.Item) -> Looked:
  """Reads an item and decodes all of it."""
  try:
    data = item.read()
    _, (width, height) = images.verify(io.BytesIO(data), inputs.shown(item.name))
  except sources.NoPicture as e:
    return Looked(item.name, other=str(e))
  except InputError as e:
    return Looked(item.name, fault=folders.fault_of(e))
  return Looked(item.name, data, width, height)


def prepare(
  dataset: str,
  name: str,
  source: str,
  data_dir: str,
  workers: int,
  overwrite: bool = False,
  shard_size: int = shards.PICTURES_A_SHARD,
) -> dict:
  """Prepares a data set, or resumes preparing it; returns the outcome as JSON values.

  Args:
    dataset: a name in `known.KNOWN`.
    name: the name of the new set.
    source, data_dir: paths of the input and the output.
    workers: threads that read and decode; the result does not depend on their number.
    overwrite: whether to replace a set that was prepared, or begun, from another source.
    shard_size: images per shard.

  Raises InputError; an unfinished set is then never taken for a complete one.
  """
  cli.log(f'license      {known.KNOWN[dataset].license}')
  cli.log(f'terms        {known.KNOWN[dataset].terms}')
  prepared.check_reachable(data_dir, '--data_dir')
  volumes = sources.open_source(source, dataset)
  with shards.Place(data_dir, name) as place:
    note = _note(place, volumes, overwrite, dataset, name, source, shard_size)
    if not note['finished'] or place.size(prepared.INFO) < 0:
      _Job(place, volumes, note, workers, shard_size).run()
    return _result(place, note)


def _note(place, volumes, overwrite, dataset, name, source, shard_size) -> dict:
  """The note to resume from: that of an earlier start with this source, else a new one."""
  found = place.read_json(prepared.RECORD)
  if found is not None or place.size(prepared.INFO) >= 0:
    if _is_of(found, volumes, shard_size) and _is_whole(place, found, name):
      return found
    if not overwrite:
      raise InputError(
        f'{place.directory} is damaged, or was prepared or begun from another source; add '
        '--overwrite to start over there, or choose another --name or --data_dir'
      )
  place.clear()
  about = known.KNOWN[dataset]
  return {
    'dataset': dataset,
    'name': name,
    'source': os.path.abspath(source),
    'license': about.license,
    'terms': about.terms,
    'shard_size': shard_size,
    'volumes': [],  # identities of the volumes that were begun
    'next': [0, 0],  # volume and item where the next shard starts
    'shards': [],
    'num_bytes': 0,
    'left_out': [],
    'passed_over': {},
    'finished': False,
    'sha256': '',
  }


def _is_of(note, volumes, shard_size) -> bool:
  """Whether a note matches this source: all of it if finished, otherwise its beginning."""
  try:
    begun = [volume.identity for volume in volumes[: len(note['volumes'])]]
    same = note['volumes'] == begun and note['shard_size'] == shard_size
    return same and (not note['finished'] or len(begun) == len(volumes))
  except (KeyError, TypeError):
    return False


def _is_whole(place, note, name) -> bool:
  """Whether the shards of a note exist with their sizes."""
  return all(
    place.size(prepared.SHARD.format(name=name, split=prepared.SPLIT, index=i)) == shard['bytes']
    for i, shard in enumerate(note['shards'])
  )


def _result(place, note) -> dict:
  pictures = sum(shard['examples'] for shard in note['shards'])
  name = note['name']
  return {
    'directory': place.directory,
    'pictures': pictures,
    'shards': len(note['shards']),
    'bytes': note['num_bytes'],
    'left_out': len(note['left_out']),
    'passed_over': {why: entry['number'] for why, entry in note['passed_over'].items()},
    'use': f'data.images={name}',
  }


class _Job:
  """One start of a preparation."""

  def __init__(self, place, volumes, note, workers, shard_size):
    self._place, self._volumes, self._note = place, volumes, note
    self._workers = workers
    self._writer = shards.ShardWriter(place, note['name'], len(note['shards']), shard_size)
    self._serialize = shards.serializer()
    numbers = [volume.number for volume in volumes]
    self._total = None if None in numbers else sum(numbers)
    self._done = sum(shard['examples'] for shard in note['shards'])
    self._began, self._said_at = time.monotonic(), time.monotonic()
    self._began_with = self._done
    # Of the unfinished shard; noted when it is finished.
    self._left_out, self._passed_over, self._bytes = [], [], 0

  def run(self):
    note = self._note
    if note['shards']:
      cli.log(f'resuming     after {self._done} images in {len(note["shards"])} shards')
    left = sum(volume.num_bytes for volume in self._volumes) - note['num_bytes']
    self._place.check_room(max(left, 0))
    try:
      for volume, number, looked in self._looked():
        self._take(looked)
        if self._writer.is_full:
          self._finish_shard([volume, number + 1])
      self._check_faults(at_the_end=True)
      if self._writer.count:
        self._finish_shard([len(self._volumes), 0])
    except BaseException:
      self._writer.drop()
      raise
    self._finish()

  def _looked(self) -> Iterator[tuple[int, int, Looked]]:
    """(volume, item, its `Looked`) in order; a few items are read ahead."""
    queue = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(self._workers, 'pictures') as pool:
      for volume, number, item in self._items():
        queue.append((volume, number, pool.submit(look, item)))
        if len(queue) > _QUEUED * self._workers:
          volume, number, future = queue.popleft()
          yield volume, number, future.result()
      for volume, number, future in queue:
        yield volume, number, future.result()

  def _items(self):
    first, start = self._note['next']
    for index in range(first, len(self._volumes)):
      items = self._volumes[index].items(start if index == first else 0)
      for number, item in enumerate(items, start if index == first else 0):
        yield index, number, item

  def _take(self, looked):
    if looked.other:
      self._passed_over.append((looked.other, inputs.shown(looked.name)))
    elif looked.fault:
      cli.log(f'left out     {inputs.shown(looked.name)} ({looked.fault})')
      self._left_out.append([inputs.shown(looked.name), looked.fault])
      self._check_faults()
    else:
      name = inputs.shown(looked.name)
      if self._note['dataset'] == 'coco':
        name = name.rpartition('/')[2]  # the numbers are unique, and the same outside a zip
      record = self._serialize(looked.data, name, looked.width, looked.height)
      self._writer.write(record)
      self._bytes += len(record)
      self._done += 1
    self._say()

  def _check_faults(self, at_the_end=False):
    """InputError once the images that do not decode are more than may be left out."""
    faults = [*self._note['left_out'], *self._left_out]
    total = self._done + len(faults)
    # Before the end, they are compared with the total number of items, if that is known.
    of = total if at_the_end else self._total
    if faults and of is not None and len(faults) > MAX_FAULTY * of:
      self._writer.drop()
      self._place.clear()
      named = folders.shown_faults(dict(faults))
      raise InputError(
        f'found {len(faults)} of {of if at_the_end else f"at most {of}"} images in '
        f'{inputs.shown(self._note["source"])} that do not decode ({named}), more than '
        f'{MAX_FAULTY:.0%}; download them again, or remove them'
      )
    if at_the_end and not self._done:
      passed = self._passed()
      said = ', '.join(f'{entry["number"]} {why}' for why, entry in passed.items())
      self._place.clear()
      raise InputError(
        f'there is no image in {inputs.shown(self._note["source"])}{said and f" ({said})"}; set '
        '--source to PNG, JPEG, WebP, TIFF, AVIF, GIF or BMP files'
      )

  def _passed(self):
    passed = {why: dict(entry) for why, entry in self._note['passed_over'].items()}
    for why, name in self._passed_over:
      entry = passed.setdefault(why, {'number': 0, 'names': []})
      entry['number'] += 1
      entry['names'] = [*entry['names'], name][:SHOWN_NAMES]
    return passed

  def _finish_shard(self, next_item):
    """Closes the shard, then notes it; if killed in between, the next start writes it again."""
    note = self._note
    note['shards'].append(self._writer.finish())
    note['next'] = next_item
    note['volumes'] = [volume.identity for volume in self._volumes[: next_item[0] + 1]]
    note['num_bytes'] += self._bytes
    note['left_out'] += self._left_out
    note['passed_over'] = self._passed()
    self._left_out, self._passed_over, self._bytes = [], [], 0
    self._write_note()

  def _finish(self):
    """Writes the files that make it a data set."""
    note = self._note
    note['left_out'] += self._left_out
    note['passed_over'] = self._passed()
    note['volumes'] = [volume.identity for volume in self._volumes]
    note['next'] = [len(self._volumes), 0]
    records = ''.join(shard['sha256'] for shard in note['shards'])
    note['sha256'] = hashlib.sha256(records.encode()).hexdigest()
    note['finished'] = True
    about = known.KNOWN[note['dataset']]
    if about.size and self._done != about.size:
      cli.log(f'note         {self._done} images; the whole of {note["dataset"]} has {about.size}')
    for why, entry in note['passed_over'].items():
      cli.log(f'passed over  {entry["number"]} {why} ({", ".join(entry["names"])})')
    if note['left_out']:
      cli.log(f'left out     {len(note["left_out"])} images that do not decode')
    self._write_note()
    lengths = [shard['examples'] for shard in note['shards']]
    with self._place.writing():
      shards.write_info(self._place, note['name'], about, lengths, note['num_bytes'])
    self._say(at_the_end=True)

  def _write_note(self):
    self._place.write(prepared.RECORD, (json.dumps(self._note, indent=1) + '\n').encode())

  def _say(self, at_the_end=False):
    now = time.monotonic()
    if not at_the_end and now - self._said_at < _SAY_SECONDS:
      return
    self._said_at = now
    rate = (self._done - self._began_with) / max(now - self._began, 1e-9)
    of = f' of {self._total}' if self._total and not at_the_end else ''
    cli.log(f'prepared     {self._done}{of} images, {rate:,.0f} per second')
