"""Words of a text for the probe: attribute swaps, removable clauses, and the tokens of words. Uses
no model and no judge.

Works on English text of any length. Attributes that a text lacks (a color, a number, a relation)
are omitted, never guessed.
"""

import re
from typing import NamedTuple

KINDS = ('colours', 'counts', 'relations')
COLOURS = (
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
)
_SAME_COLOUR = {'violet': 'purple', 'grey': 'gray'}
_NUMBERS = ('two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine', 'ten')
_OPPOSITES = {
  'left': 'right',
  'above': 'below',
  'over': 'under',
  'top': 'bottom',
  'front': 'back',
  'behind': 'before',
}
_OPPOSITES |= {b: a for a, b in _OPPOSITES.items()}
_RELATION = re.compile(
  r'\s+(?:(?:is|are)\s+)?((?:(?:to|on) the )?(?:left|right) of|(?:on (?:the )?)?top '
  r'of|above|below|over|under|beneath|next to|beside|near|'
  r'in front of|behind|inside|on)\s+',
  re.IGNORECASE,
)
_PRONOUN = re.compile(r'(?:it|they|he|she|this|these)\b', re.IGNORECASE)


class Clause(NamedTuple):
  """A part of a text that may be true or false by itself, and two texts that differ only in it:
  `with_it` and `without` ('' is no text).
  """

  text: str
  with_it: str
  without: str
  kind: str  # 'thing' or 'relation'


def swapped(text: str, kind: str) -> str | None:
  """The text with one attribute changed; None if there is none to change.

  colours: the first two different ones are swapped, a single one becomes another. counts: the first
  number becomes a neighboring number. relations: the first one is reversed.
  """
  words = [(m.group(), m.start(), m.end()) for m in re.finditer(r'[A-Za-z]+', text)]

  def name(word):
    return _SAME_COLOUR.get(word.lower(), word.lower())

  if kind == 'colours':
    found = [w for w in words if name(w[0]) in COLOURS]
    other = next((w for w in found if name(w[0]) != name(found[0][0])), None)
    if not found:
      return None
    if other is None:
      return _replaced(text, [(found[0], COLOURS[(COLOURS.index(name(found[0][0])) + 3) % 8])])
    return _replaced(text, [(found[0], other[0]), (other, found[0][0])])
  if kind == 'counts':
    found = [w for w in words if name(w[0]) in _NUMBERS]

    def change(i):
      return _NUMBERS[i - 1 if i else 1]

    return (
      _replaced(text, [(found[0], change(_NUMBERS.index(name(found[0][0]))))]) if found else None
    )
  found = [w for w in words if name(w[0]) in _OPPOSITES]
  return _replaced(text, [(found[0], _OPPOSITES[name(found[0][0])])]) if found else None


def _replaced(text, changes):
  """Applies changes [((word, start, end), new)], keeps the case of the old word, and adapts the
  article before it.
  """
  for (word, start, end), new in sorted(changes, key=lambda c: -c[0][1]):
    new = new.lower().capitalize() if word[0].isupper() else new.lower()
    before = text[:start]
    article = re.search(r'\b([Aa])n?\s+$', before)
    if article:
      before = before[: article.start()] + article[1] + ('n ' if new[0] in 'aeiou' else ' ')
    text = before + new + text[end:]
  return text


def clauses(text: str) -> list[Clause]:
  """The clauses of a text: its objects (noun phrases with later statements about them) and its
  relations.

  An object is tested by the list of all objects with and without it, a relation by its two objects
  joined by it and by "and".
  """
  things, relations = [], []
  for sentence in filter(None, (s.strip() for s in re.split(r'[.;!?\n]+', text))):
    if _PRONOUN.match(sentence) and things:  # "it is red" is about the object before
      things[-1] = f'{things[-1]}. {sentence}'
      continue
    again = bool(things)  # in a later sentence, "the" refers to an object already named
    parts = _RELATION.split(sentence)
    new = [_things(part) for part in parts[::2]]
    for i, relation in enumerate(parts[1::2]):
      if new[i] and new[i + 1]:
        relations.append((new[i][-1], relation, new[i + 1][0]))
    said = [t for group in new for t in group]
    things += [t for t in said if not (again and len(parts) > 1 and t.lower().startswith('the '))]
  together = ' and '.join
  out = [
    Clause(t, together(things), together(things[:i] + things[i + 1 :]), 'thing')
    for i, t in enumerate(things)
  ]
  return out + [
    Clause(f'{a} {r} {b}', f'{a} {r} {b}', f'{a} and {b}', 'relation') for a, r, b in relations
  ]


def _things(part):
  found = [t.strip() for t in re.split(r',\s*(?:and\s+)?|\s+and\s+', part) if t.strip()]
  # "it is small and red": a part without its own noun phrase belongs to the object before
  out = []
  for thing in found:
    if out and not re.match(
      r'(?:a|an|the|one|there|\d+|' + '|'.join(_NUMBERS) + r')\b', thing, re.IGNORECASE
    ):
      out[-1] = f'{out[-1]} and {thing}'
    else:
      out.append(thing)
  return out


def token_spans(processor, text: str) -> list[tuple[int, int]]:
  """The position of each token of `processor.encode_prompt(text)` in text.strip(): (start, end) in
  characters.
  """
  found = processor.tokenizer(
    ' ' + text.strip(), add_special_tokens=False, return_offsets_mapping=True
  )['offset_mapping']
  return [(max(start - 1, 0), end - 1) for start, end in found]


def by_word(spans, values, words) -> list[float]:
  """Sums of a text's token values (T,) over words [(start, end)]: a token counts for every word
  that its span overlaps.
  """
  return [
    float(sum(v for (a, b), v in zip(spans, values) if a < end and b > start))
    for start, end in words
  ]


def words_of(text: str) -> list[tuple[int, int]]:
  """(start, end) of every word of text.strip()."""
  return [m.span() for m in re.finditer(r'\S+', text.strip())]
