"""What `dsr_jax.prepare` makes of what people have, read back by TFDS, zipfile and Pillow; and what
it refuses.
"""

import hashlib
import io
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import zipfile
import zlib

import numpy as np
from picture_sets import (
  picture,
  pictures,
  prepare,
  tfds_coco,
  write_folder,
  write_tar,
  write_zip,
)
from PIL import Image
from places import ROOT
import pytest
import run_command
import tensorflow_datasets as tfds

from dsr_jax.data import known, prepared
from dsr_jax.errors import InputError
from dsr_jax.prepare import __main__ as command
from dsr_jax.prepare import job, shards, sources


def read(to, name='folder'):
  """[(file name, bytes, width, height)] by TFDS alone."""
  builder = tfds.builder_from_directory(os.path.join(to, name, '1.0.0'))
  source = builder.as_data_source('train', decoders={'image': tfds.decode.SkipDecoding()})
  return [
    (row['file_name'].decode(), row['image'], int(row['width']), int(row['height']))
    for row in (source[i] for i in range(len(source)))
  ]


def expected(content):
  """The same, of pictures as they were made."""
  return [(name, data, *Image.open(io.BytesIO(data)).size) for name, data in content.items()]


def files_of(to, name='folder'):
  """{file: hash} of a set, but for the lock."""
  folder = pathlib.Path(to) / name / '1.0.0'
  return {
    path.name: hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.iterdir())
    if path.name not in ('.lock', prepared.RECORD)
  }


def is_prepared(to, name='folder'):
  return prepared.locate(name, str(to)) is not None


# What is read.


@pytest.mark.parametrize('kind', ['zip', 'packed zip', 'tgz', 'tar', 'folder'])
def test_a_source_is_kept_byte_for_byte_in_its_order(kind, tmp_path):
  content = pictures(21)
  if 'zip' in kind:
    packed = zipfile.ZIP_DEFLATED if 'packed' in kind else zipfile.ZIP_STORED
    content = dict(reversed(content.items()))  # the order of a zip is its own
    source = write_zip(tmp_path / 'x.zip', content, packed)
  elif kind == 'folder':
    source = write_folder(tmp_path / 'x', content)
  else:
    source = write_tar(tmp_path / f'x.{kind}', content, 'w:gz' if kind == 'tgz' else 'w')
  result = prepare(source, tmp_path / 'out')
  assert read(tmp_path / 'out') == expected(content)
  assert result['pictures'] == 21 and result['shards'] == 3 and result['left_out'] == 0


def test_tfds_decodes_what_was_prepared_as_pillow_does(tmp_path):
  content = {f'{i}.jpg': picture() for i in range(3)}
  prepare(write_zip(tmp_path / 'x.zip', content), tmp_path)
  builder = tfds.builder_from_directory(tmp_path / 'folder' / '1.0.0')
  rows = builder.as_data_source()['train']
  assert builder.info.splits['train'].num_examples == len(rows) == 3
  for row, data in zip(rows, content.values()):
    np.testing.assert_array_equal(row['image'], np.asarray(Image.open(io.BytesIO(data))))
  assert known.KNOWN['folder'].terms in builder.info.redistribution_info.license


def test_shards_have_a_fixed_number_of_pictures_in_the_order_of_the_source(tmp_path):
  content = pictures(20)
  prepare(write_zip(tmp_path / 'x.zip', content), tmp_path)
  builder = tfds.builder_from_directory(tmp_path / 'folder' / '1.0.0')
  assert builder.info.splits['train'].shard_lengths == [8, 8, 4]


def test_only_pictures_are_taken_by_what_they_hold(tmp_path):
  content = {
    'a.jpg': picture(),
    'no_suffix': picture(form='PNG'),
    'b.txt': b'words',
    'annotations/instances.json': b'{}',
    '__MACOSX/._a.jpg': b'xx',
    '.DS_Store': b'yy',
    'c.jfif': picture(),
  }
  result = prepare(write_zip(tmp_path / 'x.zip', content), tmp_path)
  assert [row[0] for row in read(tmp_path)] == ['a.jpg', 'no_suffix', 'c.jfif']
  assert result['passed_over'] == {'unrecognized': 2, 'hidden': 2}


@pytest.mark.parametrize('what', ['the zip', 'the unpacked folder', 'what holds them'])
def test_coco_is_the_same_from_its_zip_and_from_its_folder(what, tmp_path):
  content = {f'train2017/{i:012d}.jpg': picture() for i in range(5)}
  source = tmp_path / 'coco_files'
  source.mkdir()
  write_zip(source / 'annotations_trainval2017.zip', {'annotations/x.json': b'{}'})
  write_zip(source / 'val2017.zip', {'val2017/1.jpg': picture()})
  if what == 'the unpacked folder':
    source = write_folder(source, content) + '/train2017'
  elif what == 'the zip':
    source = write_zip(source / 'train2017.zip', content)
  else:
    write_zip(source / 'train2017.zip', content)
  prepare(source, tmp_path, 'coco')
  assert read(tmp_path, 'coco') == [
    (name.rpartition('/')[2], *rest) for name, *rest in expected(content)
  ]


def test_numbered_archives_of_journeydb_are_read_by_number(tmp_path):
  content = pictures(12)
  folder = tmp_path / 'imgs'
  folder.mkdir()
  names = list(content)
  for number, part in ((2, names[:4]), (10, names[8:]), (9, names[4:8])):
    write_tar(folder / f'{number}.tgz', {name: content[name] for name in part})
  (folder / 'notes.txt').write_text('not a picture')
  prepare(folder, tmp_path, 'journeydb')
  assert read(tmp_path, 'journeydb') == expected(content)


def test_what_tfds_prepared_is_a_source_too(tmp_path):
  content = {f'{i:012d}.jpg': picture() for i in range(5)}
  prepare(tfds_coco(tmp_path / 'tfds', content), tmp_path / 'out', 'coco')
  assert read(tmp_path / 'out', 'coco') == expected(content)


# Stopped, and gone on.


def test_any_number_of_workers_makes_the_same_files(tmp_path):
  source = write_zip(tmp_path / 'x.zip', pictures(30))
  for workers in (1, 5):
    prepare(source, tmp_path / str(workers), workers=workers)
  assert files_of(tmp_path / '1') == files_of(tmp_path / '5')
  records = [json.loads((tmp_path / n / 'folder/1.0.0/prepared.json').read_text()) for n in '15']
  assert records[0] == records[1]


class Stop(BaseException):
  """As a kill: nothing that the program does answers to it."""


@pytest.mark.parametrize('kind', ['zip', 'tgz'])
def test_a_preparation_that_is_stopped_at_any_write_ends_with_the_same_files(
  kind, tmp_path, monkeypatch
):
  content = pictures(20)
  content['broken.jpg'] = picture()[:100]
  monkeypatch.setattr(job, 'MAX_FAULTY', 0.1)
  if kind == 'zip':
    source = write_zip(tmp_path / 'x.zip', content)
  else:
    source = tmp_path / 'x'
    source.mkdir()
    names = list(content)
    for number in range(3):
      part = names[number * 7 : number * 7 + 7]
      write_tar(source / f'{number}.tgz', {name: content[name] for name in part})
  dataset = 'folder' if kind == 'zip' else 'journeydb'
  prepare(source, tmp_path / 'unbroken', dataset, name='folder')

  # Every change of what is on disk is a moment to stop at, just before it and just after it.
  stop_at, count = [0], [0]

  def stopping(function):
    def stopped(*args, **kwargs):
      count[0] += 1
      if count[0] == stop_at[0]:
        raise Stop
      result = function(*args, **kwargs)
      count[0] += 1
      if count[0] == stop_at[0]:
        raise Stop
      return result

    return stopped

  monkeypatch.setattr(shards.os, 'replace', stopping(os.replace))
  monkeypatch.setattr(shards.ShardWriter, 'write', stopping(shards.ShardWriter.write))
  monkeypatch.setattr(shards.ShardWriter, 'drop', lambda self: None)  # a kill drops nothing
  moments = 0
  while True:
    count[0], stop_at[0] = 0, 1 + moments * 3
    to = tmp_path / f'broken{moments}'
    try:
      prepare(source, to, dataset, name='folder')
    except Stop:
      if is_prepared(to):  # what is taken for a set is a whole one
        assert read(to) == read(tmp_path / 'unbroken')
    else:
      break
    moments += 1
    stop_at[0] = 0
    prepare(source, to, dataset, name='folder')
    assert files_of(to) == files_of(tmp_path / 'unbroken')
  assert moments > 15


@pytest.mark.slow
def test_a_killed_preparation_goes_on(tmp_path):
  content = {f'{i:05d}.jpg': picture((8, 8)) for i in range(600)}
  source, to = write_zip(tmp_path / 'x.zip', content), tmp_path / 'killed'
  script = (
    'from dsr_jax.prepare import job; '
    f'job.prepare("folder", "folder", {source!r}, {str(to)!r}, 1, shard_size=100)'
  )
  process = subprocess.Popen([sys.executable, '-c', script], cwd=ROOT, stderr=subprocess.DEVNULL)
  shard = to / 'folder' / '1.0.0' / 'folder-train.array_record-00000'
  while process.poll() is None and not shard.exists():
    pass
  process.kill()
  assert process.wait() == -signal.SIGKILL and not is_prepared(to)
  assert prepare(source, to, workers=3, shard_size=100)['pictures'] == len(content)
  prepare(source, tmp_path / 'unbroken', shard_size=100)
  assert files_of(to) == files_of(tmp_path / 'unbroken')


def test_the_command_prints_what_it_made(tmp_path):
  content = pictures(5)
  done = run_command.run(
    command,
    dataset='folder',
    source=write_zip(tmp_path / 'x.zip', content),
    data_dir=tmp_path,
    name='mine',
  )
  assert done['pictures'] == 5 and done['use'] == 'data.images=mine'
  assert done['directory'] == str(tmp_path / 'mine' / '1.0.0')
  assert read(tmp_path, 'mine') == expected(content)


def test_a_finished_preparation_started_again_changes_nothing(tmp_path, monkeypatch):
  source = write_zip(tmp_path / 'x.zip', pictures(9))
  first = prepare(source, tmp_path)
  monkeypatch.setattr(job, 'look', None)  # nothing is read again
  assert prepare(source, tmp_path) == first


def test_another_source_is_refused_until_it_may_overwrite(tmp_path):
  content = pictures(9)
  prepare(write_zip(tmp_path / 'x.zip', content), tmp_path)
  other = write_zip(tmp_path / 'y.zip', pictures(5))
  with pytest.raises(InputError, match='another source.*--overwrite'):
    prepare(other, tmp_path)
  assert len(read(tmp_path)) == 9
  prepare(other, tmp_path, overwrite=True)
  assert len(read(tmp_path)) == 5


def test_archives_that_come_later_are_read_by_a_preparation_that_was_stopped(tmp_path, monkeypatch):
  content = pictures(24)
  names = list(content)
  folder = tmp_path / 'imgs'
  folder.mkdir()
  for number in range(2):
    part = {name: content[name] for name in names[number * 8 : number * 8 + 8]}
    write_tar(folder / f'{number}.tgz', part)
  whole = (folder / '1.tgz').read_bytes()
  (folder / '1.tgz').write_bytes(whole[: len(whole) // 2])
  with pytest.raises(InputError, match='1.tgz is cut short or damaged'):
    prepare(folder, tmp_path, 'journeydb')
  assert not is_prepared(tmp_path, 'journeydb')
  (folder / '1.tgz').write_bytes(whole)
  write_tar(folder / '2.tgz', {name: content[name] for name in names[16:]})
  prepare(folder, tmp_path, 'journeydb')
  assert read(tmp_path, 'journeydb') == expected(content)


# Pictures that do not decode.


def bomb(side) -> bytes:
  """A small PNG file whose header claims so many pixels a side."""
  data = bytearray(picture(form='PNG'))
  header = b'IHDR' + side.to_bytes(4, 'big') * 2 + data[24:29]
  data[12:33] = header + zlib.crc32(header).to_bytes(4, 'big')
  return bytes(data)


def test_what_does_not_decode_is_left_out_named_and_counted(tmp_path, capsys):
  content = {f'{i:03d}.jpg': picture((8, 8)) for i in range(200)}
  content |= {'cut.jpg': picture((64, 64))[:-200], 'bomb.png': bomb(20_000)}
  result = prepare(write_zip(tmp_path / 'x.zip', content), tmp_path)
  assert result['left_out'] == 2 and result['pictures'] == 200
  err = capsys.readouterr().err
  assert 'cut.jpg (image file is truncated' in err and 'bomb.png (20000 x 20000 pixels' in err
  record = json.loads((tmp_path / 'folder/1.0.0/prepared.json').read_text())
  assert [name for name, _ in record['left_out']] == ['cut.jpg', 'bomb.png']
  assert {row[0] for row in read(tmp_path)}.isdisjoint({'cut.jpg', 'bomb.png'})


def test_more_than_one_in_a_hundred_is_an_error_that_leaves_nothing(tmp_path):
  content = {f'{i}.jpg': picture((8, 8)) for i in range(40)}
  content |= {'a.jpg': b'', 'b.jpg': b'words'}
  with pytest.raises(InputError) as e:
    prepare(write_zip(tmp_path / 'x.zip', content), tmp_path / 'out')
  assert 'of at most 42 images' in str(e.value) and 'a.jpg: empty file' in str(e.value)
  assert not (tmp_path / 'out').exists()
  tgz = write_tar(tmp_path / 'x.tgz', content)
  with pytest.raises(InputError, match='found 2 of 42 images .* more than 1%'):
    prepare(tgz, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


# What is refused.


def cut_in_half(path):
  whole = pathlib.Path(path).read_bytes()
  pathlib.Path(path).write_bytes(whole[: len(whole) // 2])
  return path


def encrypted(path):
  """Sets the flag of encryption in the first member's two headers."""
  data = bytearray(pathlib.Path(path).read_bytes())
  for signature, offset in ((b'PK\x03\x04', 6), (b'PK\x01\x02', 8)):
    data[data.index(signature) + offset] |= 1
  pathlib.Path(path).write_bytes(data)
  return path


def empty(path):
  pathlib.Path(path).write_bytes(b'')
  return str(path)


def cut_tar(path, content, keep):
  data = pathlib.Path(write_tar(path, content, 'w')).read_bytes()
  pathlib.Path(path).write_bytes(data[:keep])
  return str(path)


ONE = {'a.jpg': picture(), 'b.jpg': picture()}
REFUSED = {
  'a zip cut in half': (
    lambda p: cut_in_half(write_zip(p / 'x.zip', ONE)),
    'cut short or damaged .*download it again',
  ),
  'a zip of nothing': (lambda p: write_zip(p / 'x.zip', {}), 'there is no image in'),
  'a zip without pictures': (
    lambda p: write_zip(p / 'x.zip', {'a.txt': b'x'}),
    r'there is no image in .* \(1 unrecognized\)',
  ),
  'a path above': (
    lambda p: write_zip(p / 'x.zip', {**ONE, '../c.jpg': picture()}),
    r"path '\.\./c\.jpg', which leads outside",
  ),
  'a path inside and out again': (
    lambda p: write_zip(p / 'x.zip', {**ONE, 'd/../../c.jpg': picture()}),
    'leads outside',
  ),
  'an absolute path': (
    lambda p: write_zip(p / 'x.zip', {'/c.jpg': picture()}),
    "path '/c.jpg', which leads outside",
  ),
  'a path of Windows': (
    lambda p: write_zip(p / 'x.zip', {'..\\c.jpg': picture()}),
    'leads outside',
  ),
  'a tar with a path above': (
    lambda p: write_tar(p / 'x.tgz', {**ONE, '../c.jpg': picture()}),
    'leads outside',
  ),
  'an encrypted zip': (
    lambda p: encrypted(write_zip(p / 'x.zip', ONE)),
    r'encrypted \(a\.jpg\)',
  ),
  'an empty file': (lambda p: empty(p / 'x.zip'), 'x.zip is empty, not a zip'),
  'a text': (lambda p: write_folder(p / 'x', {'a.txt': b'words'}) + '/a.txt', 'neither a zip nor'),
  'an empty folder': (
    lambda p: write_folder(p / 'x', {'y/z.txt': b''}) + '/y',
    'there is no image',
  ),
  'nothing': (lambda p: str(p / 'absent'), '--source is .*/absent, which does not exist'),
  'a tgz cut in half': (
    lambda p: cut_in_half(write_tar(p / 'x.tgz', ONE)),
    'cut short or damaged .*download it again',
  ),
  'a tgz without its last bytes': (
    lambda p: (
      pathlib.Path(p / 'x.tgz').write_bytes(
        pathlib.Path(write_tar(p / 'y.tgz', ONE)).read_bytes()[:-4]
      )
      and str(p / 'x.tgz')
    ),
    'cut short or damaged',
  ),
  'a tar that ends after a whole member': (
    lambda p: cut_tar(p / 'x.tar', {'a.jpg': picture()}, 512 + -(-len(picture()) // 512) * 512),
    'cut short or damaged',
  ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_bad_sources_are_one_sentence_and_leave_no_data_set(case, tmp_path):
  make, said = REFUSED[case]
  source = make(tmp_path)
  with pytest.raises(InputError, match=said) as e:
    prepare(source, tmp_path / 'out')
  assert '\n' not in str(e.value)
  assert not is_prepared(tmp_path / 'out')


def test_folders_of_ones_own_stay_and_new_ones_go_where_nothing_came_of_them(tmp_path):
  source = write_zip(tmp_path / 'x.zip', {'words.txt': b'no picture'})
  (tmp_path / 'own').mkdir()
  for to in ('own', 'new/deep'):
    with pytest.raises(InputError, match='there is no image in'):
      prepare(source, tmp_path / to)
  assert sorted(os.listdir(tmp_path)) == ['own', 'x.zip'] and os.listdir(tmp_path / 'own') == []


@pytest.mark.parametrize('keep', range(0, 3000, 250))
def test_no_cut_of_a_tar_is_taken_for_the_whole(keep, tmp_path):
  content = {f'{i}.jpg': picture((4, 4)) for i in range(2)}
  source = cut_tar(tmp_path / 'x.tar', content, keep)
  with pytest.raises(InputError):
    prepare(source, tmp_path / 'out')
  assert not is_prepared(tmp_path / 'out')


def test_a_member_that_is_damaged_in_the_zip_is_a_picture_that_does_not_decode(tmp_path):
  source = write_zip(tmp_path / 'x.zip', {f'{i}.jpg': picture((8, 8)) for i in range(150)})
  data = bytearray(pathlib.Path(source).read_bytes())
  data[data.index(b'PK\x03\x04') + 200] ^= 255
  pathlib.Path(source).write_bytes(data)
  assert prepare(source, tmp_path)['left_out'] == 1


def test_too_small_a_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
  source = write_zip(tmp_path / 'x.zip', ONE)
  usage = type('Usage', (), {'free': 1 << 20})
  monkeypatch.setattr(shards.shutil, 'disk_usage', lambda path: usage)
  with pytest.raises(InputError, match='has 1 MiB free, but the images need about 64 MiB'):
    prepare(source, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_a_disk_that_fills_up_is_one_sentence_and_the_command_goes_on(tmp_path):
  content = {f'{i:02d}.jpg': picture((200, 200)) for i in range(50)}
  source = write_zip(tmp_path / 'x.zip', content)
  to = tmp_path / 'out'
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (300 << 10, limits[1]))  # of a file
  try:
    with pytest.raises(InputError, match=f'^cannot write {to}/folder/1.0.0 .*resumes$'):
      prepare(source, to, shard_size=40)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert not is_prepared(to) and not list(to.rglob('*.new'))
  prepare(source, to, shard_size=40)
  assert read(to) == expected(content)


def test_two_preparations_of_one_set_are_refused(tmp_path):
  source = write_zip(tmp_path / 'x.zip', ONE)
  with shards.Place(str(tmp_path / 'out'), 'folder'):
    with pytest.raises(InputError, match='another preparation is running'):
      prepare(source, tmp_path / 'out')
  prepare(source, tmp_path / 'out')


@pytest.mark.parametrize(
  'flags, said',
  [
    ({'dataset': 'imagenet'}, '--dataset is imagenet; set it to one of coco, journeydb, folder'),
    ({'name': 'My Pictures'}, '--name is My Pictures; use lowercase letters'),
    ({'workers': 0}, '--workers is 0; set it to a number from 1'),
    ({'source': ''}, '--source is missing; add --source='),
  ],
)
def test_flags_that_cannot_be_are_one_sentence(flags, said, tmp_path):
  flags = {'dataset': 'folder', 'source': 'x.zip', 'data_dir': str(tmp_path), **flags}
  with pytest.raises(InputError, match=said):
    run_command.run(command, **flags)


def test_a_bucket_gets_whole_shards(tmp_path, monkeypatch):
  """A folder stands for the bucket; nothing appears there but under its final name."""
  monkeypatch.setattr(prepared, 'is_remote', lambda path: 'bucket' in str(path))
  seen = set()
  put = shards.Place.put

  def looking(self, name):
    put(self, name)
    seen.update(os.listdir(self.directory))

  monkeypatch.setattr(shards.Place, 'put', looking)
  content = pictures(20)
  prepare(write_zip(tmp_path / 'x.zip', content), tmp_path / 'bucket')
  assert read(tmp_path / 'bucket') == expected(content)
  assert {f'folder-train.array_record-{i:05d}' for i in range(3)} <= seen
  assert not [name for name in seen if '.new' in name]


def test_license_and_terms_are_printed_and_stored(tmp_path, capsys):
  content = {f'{i}.jpg': picture() for i in range(2)}
  prepare(write_zip(tmp_path / 'x.zip', content), tmp_path, 'coco')
  about = known.KNOWN['coco']
  err = capsys.readouterr().err
  stored = (tmp_path / 'coco/1.0.0/LICENSE').read_text()
  record = json.loads((tmp_path / 'coco/1.0.0/prepared.json').read_text())
  for words in (about.license, about.terms):
    assert words in err and words in stored and words in (record['license'], record['terms'])


def test_a_file_that_is_too_large_for_a_picture_is_not_read(tmp_path, monkeypatch):
  monkeypatch.setattr(sources, 'MAX_FILE_BYTES', 1 << 16)
  content = {f'{i}.jpg': picture((8, 8)) for i in range(150)} | {'big.jpg': bytes(1 << 20)}
  source = write_zip(tmp_path / 'x.zip', content, zipfile.ZIP_DEFLATED)
  result = prepare(source, tmp_path)
  assert result['left_out'] == 1 and result['pictures'] == 150
