"""The 5,600 training prompts of T2I-CompBench++ (8 categories x 700) as a TFDS builder, without
TensorFlow.

The eight text files are shipped beside this module under their own licence (MIT, Copyright (c) 2023
HKU). Order and
repeats are kept: 5,559 of the 5,600 strings are distinct.

    builder = T2iCompbench(file_format='array_record')
    builder.download_and_prepare()
    builder.as_data_source(split='train')[0]   # {'prompt': b'...', 'category': b'color', 'line': 1}
"""

import functools
import os
import tempfile

import numpy as np
import tensorflow_datasets as tfds

from dsr_jax.data import prompts
from dsr_jax.errors import InputError

CATEGORIES = (
  'color',
  'shape',
  'texture',
  'spatial',
  '3d_spatial',
  'numeracy',
  'non_spatial',
  'complex',
)
_DIRECTORY = os.path.join(os.path.dirname(__file__), 't2i_compbench_prompts')


class T2iCompbench(tfds.core.GeneratorBasedBuilder):
  """Builder of the training prompts; the benchmark's validation prompts are not in it."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {
    '1.0.0': 'The *_train.txt files at commit 1b7094991a57f3c22abdd4f6e8ba6c1a15517073.'
  }

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description='Training prompts of T2I-CompBench++ for compositional text-to-image generation.',
      features=tfds.features.FeaturesDict(
        {
          'prompt': tfds.features.Text(),
          'category': tfds.features.Text(),
          'line': tfds.features.Scalar(np.int32),
        }
      ),
      homepage='https://github.com/Karine-Huang/T2I-CompBench',
      license='MIT, Copyright (c) 2023 HKU',
      disable_shuffling=True,
    )  # the files' order

  def _split_generators(self, dl_manager):
    del dl_manager  # everything is in the package
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    key = 0
    for category in CATEGORIES:
      for line, prompt in prompts.read_lines(os.path.join(_DIRECTORY, f'{category}_train.txt')):
        yield key, {'prompt': prompt, 'category': category, 'line': line}
        key += 1


@functools.lru_cache
def load(data_dir: str = '') -> prompts.Prompts:
  """The prompts through the builder's ArrayRecord files, written on first use.

  data_dir: where TFDS keeps its data sets; empty means TFDS' own default (`~/tensorflow_datasets`
    or TFDS_DATA_DIR), and where that cannot be written, a temporary folder of this process.
  """
  try:
    source = _prepare(data_dir or None)
  except OSError as e:
    if data_dir:
      raise InputError(
        f'cannot write data sets to {data_dir} ({e.strerror}); expected a writable folder; '
        'name another in data.tfds_dir'
      ) from e
    source = _prepare(tempfile.mkdtemp(prefix='dsr_jax-'))
  records = [source[i] for i in range(len(source))]
  texts = [record['prompt'].decode() for record in records]
  return prompts.Prompts(
    texts, lambda i: f'line {records[i]["line"]} of {records[i]["category"].decode()}_train.txt'
  )


def _prepare(data_dir):
  builder = T2iCompbench(data_dir=data_dir, file_format='array_record')
  builder.download_and_prepare()
  return builder.as_data_source(split='train')
