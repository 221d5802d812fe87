"""The smallest Show-o that lives in Scenes, random: a model directory for commands to run on."""

import dataclasses
import pathlib

import micro_showo

from dsr_jax import convert
from dsr_jax.convert.showo import tokenizer_files
from dsr_jax.scenes import sets

CODES = 64  # 8 x 8 of 4 pixels: images of 32 x 32


def write(folder: pathlib.Path) -> pathlib.Path:
  """Writes `folder`/model and returns its path."""
  words = folder / 'tokenizer'
  processor = tokenizer_files.make_tokenizer(sets.vocabulary_texts(500, 0), 400, words)
  sizes = dataclasses.replace(
    micro_showo.sized(processor.vocab_size, CODES),
    prompt_tokens=126,
    templates=processor.templates,
  )
  convert.save(
    str(folder / 'model'), sizes, micro_showo.params(sizes), words, guidance=2.0, layout='showo'
  )
  return folder / 'model'
