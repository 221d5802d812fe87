"""Extracts an answer from what a model wrote, by VLMEvalKit's rules under `exact_matching`.

The rules are followed exactly, even where they are odd, because published numbers depend on them;
the tests cover every oddity. Source: open-compass/VLMEvalKit, commit e8e78f0.
"""

from collections.abc import Mapping
import re

# The extracted answer to a question with options.
NO_OPTION = 'Z'  # the model refused, or said that no option fits: wrong

# An answer that contains one of these is a refusal, whatever else it says.
REFUSALS = (
  "Sorry, I can't help with images of people yet.",
  "I can't process this file.",
  "I'm sorry, but without the image provided",
  'Cannot determine the answer',
)
API_FAILED = 'Failed to obtain answer via API'
# A letter counts only if it first occurs among the last words.
LAST_WORDS = 4
BLANKED = str.maketrans(dict.fromkeys('.()[],:;!*#{}', ' '))
# No word boundary is required after the letter: `answer is cat` and `answer is correct` give C.
ANSWER_IS = re.compile(r'answer\s+is\s*\**\s*([A-D])', re.IGNORECASE)

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r'\d,\d')
# A period is removed only if there is no digit on either side.
LONE_PERIOD = re.compile(r'(?<!\d)\.(?!\d)')
MOST_PERIODS = 32  # the original passes a flag of `re` as the count


def option(answer, choices: Mapping[str, object]) -> str | None:
  """The option that an answer chooses.

  Args:
    answer: what the model wrote; any other JSON value is converted to text first.
    choices: {letter: option text}, without the options that a row lacks.

  Returns:
    A letter, `NO_OPTION`, or None if the answer cannot be understood.
  """
  answer = str(answer)
  return option_by_letter(answer, choices) or option_by_text(answer, choices)


def option_by_letter(answer: str, choices: Mapping[str, object]) -> str | None:
  """The only option letter that is a word of the answer, if it is near the end; else the one after
  `answer is`.
  """
  if API_FAILED in answer:
    return None
  if any(refusal in answer for refusal in REFUSALS):
    return NO_OPTION
  words = answer.translate(BLANKED).split()
  named = [letter for letter in choices if letter in words]
  if len(named) == 1 and words.index(named[0]) >= len(words) - LAST_WORDS:
    return named[0]
  if not named and NO_OPTION in words:
    return NO_OPTION
  found = ANSWER_IS.search(answer)
  return found.group(1).upper() if found else None


def option_by_text(answer: str, choices: Mapping[str, object]) -> str | None:
  """The only option whose text occurs in the answer, which may be at most twice as long as all
  options together. An empty option occurs everywhere.
  """
  texts = {letter: str(text).lower() for letter, text in choices.items()}
  if len(answer.lower()) > 2 * sum(len(str(text)) for text in choices.values()):
    return None
  found = [letter for letter, text in texts.items() if text in answer.lower()]
  return found[0] if len(found) == 1 else None


def yes_or_no(answer) -> str:
  """'Yes' or 'No' if exactly one of the two words occurs, else 'Unknown'."""
  words = without_punctuation(str(answer).lower()).split()
  if ('yes' in words) == ('no' in words):
    return 'Unknown'
  return 'Yes' if 'yes' in words else 'No'


def without_punctuation(text: str) -> str:
  """A text as the VQA benchmarks normalize it.

  A punctuation mark is removed if it touches a blank anywhere in the text, or if the text has a
  number with a comma; otherwise it becomes a blank. Both are checked in the original text.
  """
  result = text
  number = COMMA_IN_NUMBER.search(text)
  for mark in PUNCTUATION:
    touches = f'{mark} ' in text or f' {mark}' in text
    result = result.replace(mark, '' if touches or number else ' ')
  return LONE_PERIOD.sub('', result, count=MOST_PERIODS)
