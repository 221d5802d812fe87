"""Small sets of pictures, as people have them: zips, archives, folders, and what TFDS prepares."""

import io
import pathlib
import tarfile
import zipfile

from array_record.python import array_record_module as array_record
import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

from dsr_jax.prepare import job

RNG = np.random.default_rng(0)


def picture(size=(24, 20), mode='RGB', form='JPEG') -> bytes:
  """The bytes of a picture file; noise, so that no two are alike."""
  pixels = RNG.integers(0, 256, (size[1], size[0], 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).convert(mode).save(file, form)
  return file.getvalue()


def pictures(number):
  """{name: bytes}, of several kinds and sizes, in the order of their names."""
  made = {}
  for i in range(number):
    form, suffix = [('JPEG', 'jpg'), ('JPEG', 'jpg'), ('PNG', 'png'), ('WEBP', 'webp')][i % 4]
    mode = 'L' if i % 5 == 0 and form == 'JPEG' else 'RGB'
    made[f'{i // 10:02d}/{i:03d}.{suffix}'] = picture((20 + i % 7, 18 + i % 3), mode, form)
  return made


def write_zip(path, content, compression=zipfile.ZIP_STORED):
  with zipfile.ZipFile(path, 'w', compression) as archive:
    for name, data in content.items():
      archive.writestr(name, data)
  return str(path)


def write_tar(path, content, mode='w:gz'):
  with tarfile.open(path, mode) as archive:
    for name, data in content.items():
      member = tarfile.TarInfo(name)
      member.size = len(data)
      archive.addfile(member, io.BytesIO(data))
  return str(path)


def write_folder(path, content):
  for name, data in content.items():
    file = pathlib.Path(path) / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
  return str(path)


def prepare(source, to, dataset='folder', **how):
  """Prepares in small shards; returns what the command prints."""
  return job.prepare(
    **{
      'dataset': dataset,
      'name': dataset,
      'source': str(source),
      'data_dir': str(to),
      'workers': 2,
      'shard_size': 8,
      **how,
    }
  )


def tfds_coco(data_dir, content, form='array_record'):
  """coco/2017 as TFDS lays it out, in the format that is asked for."""
  folder = pathlib.Path(data_dir) / 'coco' / '2017' / '1.1.0'
  folder.mkdir(parents=True)
  features = tfds.features.FeaturesDict(
    {
      'image': tfds.features.Image(encoding_format='jpeg'),
      'image/filename': tfds.features.Text(),
      'image/id': np.int64,
      'objects': tfds.features.Sequence(
        {
          'bbox': tfds.features.BBoxFeature(),
          'label': tfds.features.ClassLabel(names=['cat', 'dog']),
          'is_crowd': np.bool_,
        }
      ),
    }
  )
  box = tfds.features.BBox(0.1, 0.1, 0.5, 0.5)
  rows = []
  for i, (name, data) in enumerate(content.items()):
    thing = {'bbox': box, 'label': 'cat', 'is_crowd': False}
    rows.append(
      {'image': io.BytesIO(data), 'image/filename': name, 'image/id': i, 'objects': [thing]}
    )
  serialize = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
  template = tfds.core.ShardedFileTemplate(
    data_dir=folder, dataset_name='coco', split='train', filetype_suffix='array_record'
  )
  writer = array_record.ArrayRecordWriter(
    str(template.sharded_filepath(shard_index=0, num_shards=1)), 'group_size:1'
  )
  for row in rows:
    writer.write(serialize.serialize_example(features.encode_example(row)))
  writer.close()
  identity = tfds.core.dataset_info.DatasetIdentity(
    name='coco',
    version=tfds.core.Version('1.1.0'),
    data_dir=str(folder),
    module_name='tensorflow_datasets.object_detection.coco',
    config_name='2017',
  )
  info = tfds.core.DatasetInfo(builder=identity, features=features)
  info.set_file_format(form)
  split = tfds.core.SplitInfo(
    name='train', shard_lengths=[len(rows)], num_bytes=1, filename_template=template
  )
  info.set_splits(tfds.core.splits.SplitDict([split]))
  info.write_to_directory(folder)
  return str(folder)
