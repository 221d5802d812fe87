"""BLIP-VQA: does an image show each noun phrase of its prompt? (color, shape, texture; a part of
complex)

Source: Karine-Huang/T2I-CompBench, commit 1b70949 (MIT; its BLIP part derives from Salesforce's).
"""

from collections.abc import Sequence

import numpy as np

# Token ids in BLIP's vocabulary, which is BERT's. They are compared at the first decoder step.
YES, NO = 2748, 2053
DECODER_START = 30522  # [DEC]
ENCODER_START = 30523  # [ENC], which replaces [CLS] in every question

MOST_QUESTIONS = 8
MOST_WORDS = 50
MOST_TOKENS = 35
# Chunks that name a place, matched exactly: `The side` and `the top` are still asked about.
PLACES = ('top', 'the side', 'the left', 'the right')
REMOVED = str.maketrans('', '', '.!"()*#:;~')


def questions(noun_chunks: Sequence[str]) -> list[str]:
  """One question for each of the first eight noun chunks that are not places."""
  kept = [chunk for chunk in noun_chunks if chunk not in PLACES]
  return [f'{chunk}?' for chunk in kept[:MOST_QUESTIONS]]


def model_text(question: str) -> str:
  """A question as BLIP's tokenizer gets it. Removed punctuation leaves double blanks; only the
  right side is stripped.
  """
  text = question.lower().translate(REMOVED).rstrip(' ')
  return ' '.join(text.split(' ')[:MOST_WORDS])


def answer(yes: float, no: float) -> str:
  """The share of yes in the probabilities of the two words, with four decimals."""
  return f'{yes / (yes + no):.4f}'


def score(answers: Sequence[str]) -> str:
  """An image's score, with four decimals: the product of its answers, in float32; 1 without any.

  answers: only those to `questions`; in the original, slots without a question count as 1.
  """
  product = np.float32(1)
  for text in answers:
    product *= np.float32(float(text))
  return f'{float(product):.4f}'
