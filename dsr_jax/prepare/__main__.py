"""Prepares your own images, COCO or JourneyDB as a data set that a run reads by name.

  python -m dsr_jax.prepare --dataset=coco --source=train2017.zip --data_dir=DIR
  python -m dsr_jax.prepare --dataset=journeydb --source=journeydb/train/imgs --data_dir=DIR
  python -m dsr_jax.prepare --dataset=folder --source=pictures --data_dir=DIR --name=my_pictures

The source needs no unpacking: a zip, .tgz archives (some or all), a folder, or a data set prepared
by TFDS. Images are decoded once as a check, and stored byte for byte. A command that was stopped
resumes, and ends with the same files. Then train with `data.images=coco data.data_dir=DIR`, or a
mixture, `coco:2800+journeydb:2800`.
"""

import os

from absl import flags

from dsr_jax import cli, flag_types
from dsr_jax.data import known, prepared
from dsr_jax.errors import InputError
from dsr_jax.prepare import job


def main(argv, f=flags.FLAGS):
  """Prints one JSON object: where the data set is, its number of images, and how a run names it."""
  cli.no_arguments(argv)
  cli.require(dataset=f.dataset, source=f.source, data_dir=f.data_dir)
  if f.dataset not in known.KNOWN:
    raise InputError(f'--dataset is {f.dataset}; set it to one of {", ".join(known.KNOWN)}')
  name = f.name or f.dataset
  if not prepared.is_name(name) or '/' in name:
    raise InputError(f'--name is {name}; use lowercase letters, digits and _, with a letter first')
  cli.check_range(1, 1024, workers=f.workers)
  cli.print_json(
    job.prepare(
      dataset=f.dataset,
      name=name,
      source=f.source,
      data_dir=f.data_dir,
      workers=f.workers,
      overwrite=f.overwrite,
    )
  )


def define_flags(f=flags.FLAGS):
  flags.DEFINE_string('dataset', None, f'Kind of source: {", ".join(known.KNOWN)}.', flag_values=f)
  flag_types.define_path(
    'source', None, 'A zip, a .tgz archive or a folder of them, or a folder of images.', f
  )
  flag_types.define_path(
    'data_dir',
    None,
    "Folder of prepared sets, or gs://BUCKET/FOLDER; a run's data.data_dir.",
    f,
  )
  flags.DEFINE_string(
    'name', None, 'Its name in data.images (default: the dataset).', flag_values=f
  )
  flags.DEFINE_integer(
    'workers', os.cpu_count() or 1, 'Number of threads that read and decode.', flag_values=f
  )
  flags.DEFINE_bool(
    'overwrite', False, 'Start over if another source was prepared there.', flag_values=f
  )


if __name__ == '__main__':
  cli.run_main(main, define_flags)
