"""What T2I-CompBench's rules know about a prompt: its tokens with their parts of speech, and its
noun chunks. spaCy's `en_core_web_sm` provides both (`adapters.tagger`); the rules only read them.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Token(NamedTuple):
  """A word or punctuation mark, its coarse part of speech (NOUN, PROPN, ADJ, ...), and whether a
  blank follows.
  """

  text: str
  pos: str
  blank: bool


class Parsed(NamedTuple):
  """A parsed prompt."""

  tokens: tuple[Token, ...]
  noun_chunks: tuple[str, ...]


class Tagger(Protocol):
  """Parses prompts."""

  def __call__(self, prompt: str) -> Parsed: ...


def span(tokens: Sequence[Token], start: int, length: int) -> str:
  """The text of up to `length` tokens from `start`, with the original blanks, none at the end."""
  chosen = tokens[start : start + length]
  text = ''.join(f'{token.text} ' if token.blank else token.text for token in chosen)
  return text[:-1] if chosen and chosen[-1].blank else text
