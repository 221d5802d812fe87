"""What VLMEvalKit asks Janus: the text that follows the images in the user's turn.

The turn is stripped as a whole, so a leading line break stays after the images, while trailing
blanks are lost. Source: open-compass/VLMEvalKit, commit e8e78f0, vlmeval/vlm/janus.py; other
families get the same text, so that their numbers can be compared.

Published baselines of Janus were made with plain role names, `User` and `Assistant`.

    <|User|>: <image_placeholder>\\nIs there a dog?\\nAnswer the question ...\\n\\n<|Assistant|>:
"""

from dsr_jax.evaluate.vlmeval import tsv

SHORT_ANSWER = '\nAnswer the question using a single word or phrase.'
LETTER_ANSWER = "\nAnswer with the option's letter from the given choices directly."
OPEN_ANSWER = 'Answer the question directly. '
POPE_TAIL = ' Please answer yes or no.'


def yes_no(row: tsv.Row) -> str:
  """For POPE, after its tail is removed, and for HallusionBench, which has no such tail."""
  return f'\n{row["question"]}{SHORT_ANSWER}'


def pope(row: tsv.Row) -> str:
  question = (row['question'] or '').replace(POPE_TAIL, '')
  return f'\n{question}{SHORT_ANSWER}'


def multiple_choice(row: tsv.Row) -> str:
  """Hint, question and options, each on its own line; a row without options is an open question.
  Markers such as `<image 1>` stay in the text, but all images come first.
  """
  hint = row.get('hint')
  text = '\n' if hint is None else f'\nHint: {hint}\n'
  text += f'{row["question"]}\n'
  options = tsv.options(row)
  if not options:
    return (text + OPEN_ANSWER).rstrip()
  text += ''.join(f'{letter}. {option}\n' for letter, option in options.items())
  return text + LETTER_ANSWER


def bare(row: tsv.Row) -> str:
  """LLaVABench: the question itself, directly after the image."""
  return (row['question'] or '').rstrip()
