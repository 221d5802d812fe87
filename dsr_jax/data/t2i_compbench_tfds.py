"""The training prompts of T2I-CompBench++ as a TFDS data set, without TensorFlow.

builder = T2iCompbench(file_format='array_record')
builder.download_and_prepare()
builder.as_data_source(split='train')[0]   # {'prompt': b'...', 'category': b'color', 'line': 1}
"""

import numpy as np
import tensorflow_datasets as tfds

from dsr_jax.data import t2i_compbench


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
    for key, (category, line, prompt) in enumerate(t2i_compbench.lines()):
      yield key, {'prompt': prompt, 'category': category, 'line': line}
