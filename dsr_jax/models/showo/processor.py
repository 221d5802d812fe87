"""Text processing: Phi-1.5's tokenizer with Show-o's tokens, and Show-o's prompt templates.

Everything here runs on the host in NumPy and needs no model. Show-o adds ten tokens to the
tokenizer when it starts, so their ids follow from its size; a tokenizer.json that already has them
has the same ids.

A prompt has no leading space and an answer has one, so the first word of a text has a different id
in each role: `templates.as_prompt` and `as_answer` convert between them.
Source: showlab/Show-o training/prompting_utils.py, inference_mmu.py.
"""

import pathlib

import numpy as np
from tokenizers import Tokenizer

from dsr_jax import files
from dsr_jax.errors import InputError, first_line
from dsr_jax.models.border import TextBorder
from dsr_jax.models.showo.config import NEW_WORDS, PROMPT_TOKENS, Templates

EOS, PAD, SOI, EOI, T2I, MMU = '<|endoftext|>', '[PAD]', '<|soi|>', '<|eoi|>', '<|t2i|>', '<|mmu|>'
# They follow the tokenizer's own in this order; the first is the padding token.
WORDS = (PAD, SOI, EOI, '<|sov|>', '<|eov|>', T2I, MMU, '<|t2v|>', '<|v2v|>', '<|lvg|>')
_SPACE = '\u0120'  # a space in byte-level vocabularies


class Processor(TextBorder):
  """Encodes and decodes texts for one model.

  Attributes:
    tokenizer: the transformers `PreTrainedTokenizerFast`, with Show-o's tokens.
    template: one of `TEMPLATES`.
    templates: the `Templates` that the model's protocol methods put around contents.
    prompt_tokens: the maximum; a longer prompt is refused.
  """

  def __init__(self, tokenizer, template: str = 'demo', prompt_tokens: int = PROMPT_TOKENS):
    self.tokenizer, self.template, self.prompt_tokens = tokenizer, template, prompt_tokens
    ids = _with_words(tokenizer)
    self._special = frozenset((ids[EOS], *(ids[word] for word in WORDS)))
    words = min(ids[word] for word in WORDS)  # the vocabulary's size without them
    encode = self._encode
    if template == 'tuned':
      infix = (ids[EOI], *encode('USER:'))
    else:
      infix = (ids[EOI], ids[EOS], *encode('USER: \n'))
    as_prompt, as_answer = _first_words(tokenizer, words, self._special)
    self.templates = Templates(
      eos_id=ids[EOS],
      pad_id=ids[PAD],
      soi_id=ids[SOI],
      eoi_id=ids[EOI],
      generation_prefix=(ids[T2I], ids[EOS]),
      generation_suffix=(ids[EOS], ids[SOI]),
      understanding_prefix=(ids[MMU], ids[SOI]),
      understanding_infix=infix,
      understanding_suffix=tuple(encode(' ASSISTANT:')),
      as_prompt=as_prompt,
      as_answer=as_answer,
    )

  @property
  def vocab_size(self) -> int:
    """Number of ids that a text may have."""
    return len(np.frombuffer(self.templates.as_prompt, np.int32))

  @classmethod
  def from_directory(cls, directory, template='demo', prompt_tokens: int = PROMPT_TOKENS):
    """Reads tokenizer.json."""
    tokenizer = load_tokenizer(pathlib.Path(directory) / 'tokenizer.json')
    return cls(tokenizer, template, prompt_tokens)

  def with_template(self, template: str):
    """The same tokenizer with another template, one of `TEMPLATES`."""
    return Processor(self.tokenizer, template, self.prompt_tokens)

  def encode_prompt(self, text, max_tokens=None):
    """Ids of a drawing prompt's content, without a leading space."""
    room = min(self.prompt_tokens, max_tokens or self.prompt_tokens)
    return self._content(text.strip(), 'prompt', room)

  def encode_question(self, text, max_tokens=None):
    """Ids of a question's content: after a line break (`demo`), or after a space (`tuned`).

    Empty for an empty text, such as an empty instruction.
    """
    if not text.strip():
      return []
    before = ' ' if self.template == 'tuned' else ''
    return self._content(before + text.strip(), 'question', max_tokens)

  def encode_turn(self, text):
    """Ids of everything after the image in a user's turn, except the template's own line break:
    the same as for a question.
    """
    return self.encode_question(text)

  def encode_answer(self, text, max_tokens=None):
    """Ids of an answer with its leading space, and the end-of-text token."""
    return self._content(' ' + text.strip(), 'answer', max_tokens and max_tokens - 1) + [
      self.templates.eos_id
    ]


def load_tokenizer(path):
  """tokenizer.json -> `PreTrainedTokenizerFast`. Raises InputError if it cannot be read."""
  # transformers takes a second to import, and many commands need no tokenizer.
  from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

  if not path.is_file():
    raise InputError(
      f'there is no {path.name} in {path.parent}; fetch the one of microsoft/phi-1_5 into '
      'that folder'
    )
  files.check_no_pointer(path)
  try:
    tokenizer = Tokenizer.from_file(str(path))
  except Exception as e:  # the Rust code raises plain Exception
    raise InputError(
      f'cannot read {path} as a tokenizer.json ({first_line(e)}); fetch the file again'
    ) from e
  if tokenizer.token_to_id(EOS) is None:
    raise InputError(
      f'the tokenizer in {path.parent} has no {EOS}; use the one that belongs to the checkpoint, '
      'which is that of microsoft/phi-1_5'
    )
  return PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    bos_token=EOS,
    eos_token=EOS,
    unk_token=EOS,
    padding_side='left',
    clean_up_tokenization_spaces=False,
  )


def _with_words(tokenizer):
  """Adds Show-o's tokens if they are missing. Returns token -> id, including the end of text."""
  known = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
  if not any(word in known for word in WORDS):
    first = len(tokenizer)
    tokenizer.add_special_tokens({'pad_token': PAD})
    tokenizer.add_tokens(list(WORDS[1:]))
  else:
    first = len(tokenizer) - NEW_WORDS
    tokenizer.pad_token = PAD
  ids = {word: tokenizer.convert_tokens_to_ids(word) for word in WORDS}
  if list(ids.values()) != list(range(first, first + NEW_WORDS)):
    raise InputError(
      f"the last tokens of the tokenizer are not Show-o's ten, {', '.join(WORDS)}, in that order; "
      'use the tokenizer of microsoft/phi-1_5'
    )
  return ids | {EOS: tokenizer.convert_tokens_to_ids(EOS)}


def _first_words(tokenizer, size, special):
  """The two tables of `Templates`: from ids with a leading space to ids without, and back."""
  words = tokenizer.convert_ids_to_tokens(range(size))
  added = set(tokenizer.added_tokens_decoder)
  by_word = {word: i for i, word in enumerate(words) if i not in special and i not in added}
  as_prompt, as_answer = np.arange(size, dtype=np.int32), np.arange(size, dtype=np.int32)
  for word, i in by_word.items():
    if word.startswith(_SPACE):
      as_prompt[i] = by_word.get(word[1:], i)
    else:
      as_answer[i] = by_word.get(_SPACE + word, i)
  return as_prompt.tobytes(), as_answer.tobytes()
