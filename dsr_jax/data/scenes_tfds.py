"""Scenes as TFDS data sets, written as ArrayRecord files without TensorFlow.

    builder = Scenes(config='pictures', file_format='array_record')
    builder.download_and_prepare()
    builder.as_data_source(split='evaluation')[0]   # {'image': (32, 32, 3) uint8, 'caption':
    b'...', 'scene': b'[...]'}

Configs: `captions` (split pretraining: noisy, skewed captions), `pictures` (splits training,
without a caption, validation, evaluation), `prompts` (the same splits: prompt, category and atoms).
Scenes and atoms are JSON.
"""

import dataclasses
import io
import json

import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

from dsr_jax.scenes import grammar, render, sets, world


@dataclasses.dataclass
class Sizes(tfds.core.BuilderConfig):
  """The kind of examples ('pictures', 'captions' or 'prompts'), their number, and their seed."""

  kind: str = 'pictures'
  pretraining: int = 20_000
  training: int = sets.REINFORCEMENT_INPUTS
  held_out: int = 1_000  # validation, and as many for evaluation (a sixth of it for each task)
  seed: int = 0


class Scenes(tfds.core.GeneratorBasedBuilder):
  """Builder of Scenes."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First release.'}
  BUILDER_CONFIGS = [Sizes(name=kind, kind=kind) for kind in ('pictures', 'captions', 'prompts')]

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text
    picture = tfds.features.Image(shape=(world.IMAGE_SIZE, world.IMAGE_SIZE, 3), dtype=np.uint8)
    features = {
      'captions': {'image': picture, 'caption': text()},
      'pictures': {'image': picture, 'caption': text(), 'scene': text()},
      'prompts': {'prompt': text(), 'category': text(), 'atoms': text()},
    }[self.builder_config.kind]
    return tfds.core.DatasetInfo(
      builder=self,
      description='A small world of shapes with an exact judge.',
      features=tfds.features.FeaturesDict(features),
      license='Apache-2.0',
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # everything is generated
    make = {'captions': self._captions, 'pictures': self._pictures, 'prompts': self._prompts}[
      self.builder_config.kind
    ]
    splits = (
      ('pretraining',)
      if self.builder_config.kind == 'captions'
      else ('training', 'validation', 'evaluation')
    )
    return {split: make(split) for split in splits}

  def _captions(self, split):
    del split
    for i in range(self.builder_config.pretraining):
      pixels, caption = sets.pretraining_example(self.builder_config.seed, i)
      yield i, {'image': png(pixels), 'caption': caption}

  def _pictures(self, split):
    sizes = self.builder_config
    if split == 'training':
      scenes = (sets.training_scene(sizes.seed, i) for i in range(sizes.training))
    else:
      scenes = sets.evaluation_scenes(sizes.held_out, split, sizes.seed)
    for i, scene in enumerate(scenes):
      # Training images are unpaired: they have no text.
      caption = (
        ''
        if split == 'training'
        else grammar.caption(scene, np.random.default_rng((sizes.seed, i)))
      )
      yield (
        i,
        {'image': png(render.render(scene)), 'caption': caption, 'scene': json.dumps(scene.things)},
      )

  def _prompts(self, split):
    sizes = self.builder_config
    if split == 'training':
      prompts = (sets.training_prompt(sizes.seed, i) for i in range(sizes.training))
    else:
      prompts = sets.evaluation_prompts(
        max(sizes.held_out // len(grammar.GENEVAL), 1), split, sizes.seed
      )
    for i, p in enumerate(prompts):
      atoms = {'clauses': [c._asdict() for c in p.atoms.clauses], 'relations': p.atoms.relations}
      yield i, {'prompt': p.text, 'category': p.category, 'atoms': json.dumps(atoms)}

  def _generate_examples(self):
    raise NotImplementedError('each split has its own generator')


def png(pixels: np.ndarray) -> io.BytesIO:
  """(H, W, 3) uint8 as a PNG file in memory: TFDS can encode an array only with TensorFlow."""
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, 'PNG')
  file.seek(0)
  return file
