"""The data sets that `dsr_jax.prepare` knows by name, with their sources and licenses."""

from typing import NamedTuple


class Known(NamedTuple):
  """description: one sentence. source: an example value for --source. homepage: its origin.
  license, terms: printed and stored. size: number of images in the whole set, 0 if it varies.
  """

  description: str
  source: str
  homepage: str
  license: str
  terms: str
  size: int = 0


KNOWN = {
  'coco': Known(
    description='The photographs of COCO train2017, without annotations.',
    source='train2017.zip',
    homepage='https://cocodataset.org',
    license='Images: Flickr terms of use; annotations, which are not read: CC BY 4.0',
    terms=(
      'The COCO consortium does not own the copyright of the images; users must abide by the '
      'Flickr terms of use and take full responsibility '
      '(https://cocodataset.org/#termsofuse).'
    ),
    size=118_287,
  ),
  'journeydb': Known(
    description='The images of JourneyDB, made with Midjourney, without annotations.',
    source='journeydb/train/imgs',
    homepage='https://journeydb.github.io',
    license="JourneyDB's own Terms of Usage: non-commercial research only",
    terms=(
      'Users of the images have accepted the Terms of Usage of JourneyDB at its gated download '
      '(https://huggingface.co/datasets/JourneyDB/JourneyDB): non-commercial research, no '
      'redistribution.'
    ),
  ),
  'folder': Known(
    description='Your own images.',
    source='pictures',
    homepage='',
    license="The images' own, which is unknown here",
    terms='The owners of the images decide how they may be used.',
  ),
}


def command(name: str, data_dir: str, source: str = '') -> str:
  """The command that prepares a data set."""
  dataset = name if name in KNOWN else 'folder'
  named = '' if dataset == name else f' --name={name}'
  return (
    f'python -m dsr_jax.prepare --dataset={dataset} --source={source or KNOWN[dataset].source} '
    f'--data_dir={data_dir}{named}'
  )
