"""Text handling shared by the processors of all backbones: on the host, in NumPy.

Axes: B texts, T tokens.
"""

import numpy as np

from dsr_jax import inputs
from dsr_jax.errors import InputError
from dsr_jax.models.unified import Text


class TextBorder:
  """Encodes, decodes and pads. A backbone's processor adds:

  tokenizer: the transformers `PreTrainedTokenizerFast`. templates: with eos_id and pad_id.
  _special: ids that content may not have. _reserved: strings that it may not have.
  """

  _special: frozenset[int] = frozenset()
  _reserved: tuple[str, ...] = ()

  def decode(self, ids):
    """The text of (T,) ids up to the first end of text, stripped, without special tokens."""
    ids = [int(i) for i in ids]
    if self.templates.eos_id in ids:
      ids = ids[: ids.index(self.templates.eos_id)]
    ids = [i for i in ids if i not in self._special and i < len(self.tokenizer)]
    return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip()

  def pad(self, sequences, length=None):
    """Left-justified `Text` of numpy (B, T): ids int32 filled with the pad id, mask True on
    content.

    T is `length`, or the longest sequence. Raises InputError if a sequence is longer than
    `length`.
    """
    longest = max((len(s) for s in sequences), default=0)
    length = longest if length is None else length
    if longest > length:
      raise InputError(
        f'a text has {longest} tokens, more than the limit of {length}; shorten it or raise the '
        'limit'
      )
    ids = np.full((len(sequences), length), self.templates.pad_id, np.int32)
    mask = np.zeros((len(sequences), length), bool)
    for row, sequence in enumerate(sequences):
      ids[row, : len(sequence)] = sequence
      mask[row, : len(sequence)] = True
    return Text(ids, mask)

  def _encode(self, text):
    return list(self.tokenizer.encode(text, add_special_tokens=False))

  def _content(self, text, kind, max_tokens):
    """Ids of user text. Template tokens in it would change who speaks, so they are refused."""
    if not inputs.is_visible(text):
      raise InputError(f'the {kind} is empty; write one')
    ids = self._encode(text)
    found = [self.tokenizer.convert_ids_to_tokens(i) for i in ids if i in self._special]
    found += [word for word in self._reserved if word in text]
    if found:
      raise InputError(
        f'the special token {found[0]} is not allowed in the {kind} {text.strip()[:60]!r}; '
        'remove it'
      )
    if max_tokens is not None and len(ids) > max_tokens:
      raise InputError(
        f'the {kind} {text.strip()[:60]!r} has {len(ids)} tokens, more than the limit of '
        f'{max_tokens}; shorten it or raise the limit'
      )
    return ids
