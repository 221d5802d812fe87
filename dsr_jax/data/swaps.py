"""Hard negatives of a prompt: the same words, but with attributes exchanged between objects.

A word of one of five kinds (color, count, side, surface, size) swaps places with another of its
kind, or is replaced by one. Rewards use them as contrast, and probes test with them whether a model
reads word order at all.
"""

import re

# Kinds in the order in which they are tried. Words in a row are interchangeable in a sentence.
KINDS = {
  'colour': (
    'red',
    'orange',
    'yellow',
    'green',
    'blue',
    'purple',
    'pink',
    'brown',
    'black',
    'white',
    'gray',
    'grey',
    'violet',
  ),
  'count': ('two', 'three', 'four', 'five', 'six', 'seven', 'eight'),
  'side': ('left', 'right', 'above', 'below', 'over', 'under', 'top', 'bottom'),
  'surface': (
    'plain',
    'striped',
    'dotted',
    'solid',
    'banded',
    'spotted',
    'metallic',
    'wooden',
    'leather',
    'glass',
    'plastic',
    'rubber',
    'fluffy',
    'fabric',
  ),
  'size': ('small', 'large', 'little', 'big', 'tiny', 'huge'),
}
_OPPOSITE = {
  a: b
  for x, y in (
    ('left', 'right'),
    ('above', 'below'),
    ('over', 'under'),
    ('top', 'bottom'),
    ('small', 'large'),
    ('little', 'big'),
    ('tiny', 'huge'),
  )
  for a, b in ((x, y), (y, x))
}
_SAME = {
  'violet': 'purple',
  'grey': 'gray',
  'little': 'small',
  'tiny': 'small',
  'big': 'large',
  'huge': 'large',
  'banded': 'striped',
  'spotted': 'dotted',
  'solid': 'plain',
  'over': 'above',
  'under': 'below',
}
_WORD = re.compile(r'\w+|\W+')


def swapped(text: str, kind: str) -> str | None:
  """The text with two different words of `kind` exchanged, or its only word of that kind replaced;
  None if it has none.
  """
  parts = _WORD.findall(text)
  at = [i for i, part in enumerate(parts) if part.lower() in KINDS[kind]]
  if not at:
    return None
  other = next((i for i in at[1:] if _meaning(parts[i]) != _meaning(parts[at[0]])), None)
  if other is not None and kind != 'side':  # two side words in a text are rarely interchangeable
    parts[at[0]], parts[other] = parts[other], parts[at[0]]
  else:
    old = parts[at[0]].lower()
    new = _OPPOSITE.get(old) or _others(old, kind)[0]
    for i in at:
      if _meaning(parts[i]) == _meaning(old):
        parts[i] = new
  return ''.join(parts)


def _meaning(word: str) -> str:
  return _SAME.get(word.lower(), word.lower())


def _others(word: str, kind: str) -> list[str]:
  """Words of the kind with another meaning, starting after `word`."""
  words = KINDS[kind]
  start = words.index(word)
  return [w for w in (*words[start:], *words[:start]) if _meaning(w) != _meaning(word)]


def negatives(text: str, number: int, other: str) -> list[str]:
  """`number` texts that differ from `text`: its swaps by kind, then further replacements, then
  `other` if there are not enough.
  """
  found = [s for s in (swapped(text, kind) for kind in KINDS) if s is not None]
  for kind, words in KINDS.items():
    parts = _WORD.findall(text)
    at = next((i for i, part in enumerate(parts) if part.lower() in words), None)
    if at is not None:
      found += [
        ''.join([*parts[:at], word, *parts[at + 1 :]]) for word in _others(parts[at].lower(), kind)
      ]
  different = list(dict.fromkeys(s for s in found if s.lower() != text.lower()))
  return (different + [other] * number)[:number]
