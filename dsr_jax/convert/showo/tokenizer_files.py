"""A tokenizer for a small Show-o, trained on texts: byte-level, with Phi-1.5's end-of-text token
and Show-o's ten added tokens.
"""

import pathlib

from tokenizers import AddedToken

from dsr_jax.convert import tokenizer_files
from dsr_jax.convert.showo import directory as directory_lib
from dsr_jax.errors import InputError
from dsr_jax.models.showo.config import NEW_WORDS
from dsr_jax.models.showo.processor import EOS, Processor


def make_tokenizer(texts, vocab_size: int, directory) -> Processor:
  """Trains a byte-level BPE and writes its files; returns the `Processor` of the new directory.

  texts: iterable of strings to learn merges from. vocab_size: maximum number of tokens, including
  the end-of-text token and Show-o's own (>= 267: these 11 and 256 bytes).
  """
  least = 256 + 1 + NEW_WORDS
  if vocab_size < least:
    raise InputError(f'vocab_size is {vocab_size}; raise it to at least {least}')
  tokenizer = tokenizer_files.train_bpe(texts, vocab_size - 1 - NEW_WORDS)
  tokenizer.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(directory / 'tokenizer.json'))
  processor = Processor.from_directory(directory)
  directory_lib.write_tokenizer(directory, processor, directory)
  return processor
