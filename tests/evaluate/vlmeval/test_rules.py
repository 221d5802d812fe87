"""VLMEvalKit's extraction and metrics against its own answers, and by hand, one row a rule."""

from collections import Counter
import re

from golden import content, lines
import pytest

from dsr_jax.evaluate.vlmeval import choice, extract, hallusionbench, llavabench, pope


def test_options_of_all_original_cases():
  cases = lines('mcq_extraction.jsonl')
  assert len(cases) == 429
  for case in cases:
    answer, choices = case['answer'], case['choices']
    assert (extract.option(answer, choices) or False) == case['option'], case['id']
    assert (extract.option_by_letter(str(answer), choices) or False) == case['by_letter']
    assert (extract.option_by_text(str(answer), choices) or False) == case['by_text']


def test_yes_or_no_of_all_original_cases():
  cases = lines('yorn_extraction.jsonl')
  assert len(cases) == 343
  for case in cases:
    assert extract.yes_or_no(case['answer']) == case['label'], case['id']


def test_punctuation_of_all_original_cases():
  cases = lines('punctuation.jsonl')
  assert len(cases) == 242
  for case in cases:
    assert extract.without_punctuation(case['text']) == case['result'], case['id']


FOUR = {'A': 'a red dog', 'B': 'a blue cat', 'C': 'both', 'D': 'none of them'}

# rule, answer, options, option
OPTIONS = [
  ('a letter alone', 'B', FOUR, 'B'),
  ('in brackets, with a mark', '(B).', FOUR, 'B'),
  ('small letters are words', 'b', FOUR, None),
  ('the fourth word from the end', 'B is my choice', FOUR, 'B'),
  ('the fifth is too far', 'B is what I choose', FOUR, None),
  ('the first occurrence counts', 'B I say once more it is B', FOUR, None),
  ('two letters', 'A or B', FOUR, None),
  ('letters of the whole answer are counted', 'A is wrong, so the right one is B', FOUR, None),
  ('"answer is" where the letter is far', 'The answer is C because it looks so to me', FOUR, 'C'),
  ('with stars, in any case', 'The ANSWER IS **d** because it looks so to me', FOUR, 'D'),
  ('"answer is cat" says C', 'The answer is cat', FOUR, 'C'),
  ('"answer is correct" says C', 'My answer is correct', FOUR, 'C'),
  ('only A to D', 'the answer is e', {**FOUR, 'E': 'x'}, None),
  ('before option texts', 'answer is a blue cat', FOUR, 'A'),
  ('a refusal, whatever follows', 'Cannot determine the answer. A', FOUR, 'Z'),
  ('Z', 'Z.', FOUR, 'Z'),
  ('Z beside a letter', 'Z A', FOUR, 'A'),
  ('a failed request skips the letters', 'Failed to obtain answer via API A', FOUR, None),
  ('and not the texts', 'Failed to obtain answer via API: both', {'A': 'x' * 30, 'C': 'both'}, 'C'),
  ('an option text, in any case', 'It shows a BLUE Cat', FOUR, 'B'),
  ('two option texts', 'a blue cat and both', FOUR, None),
  ('an answer of twice the options', 'both' + ' ' * (2 * 35 - 4), FOUR, 'C'),
  ('one longer', 'both' + ' ' * (2 * 35 - 3), FOUR, None),
  ('an empty option is everywhere', 'a blue cat', {**FOUR, 'C': ''}, None),
  ('an option that is not there', 'E', FOUR, None),
  ('numbers are texts', 2.5, {'A': 2.5, 'B': 3}, 'A'),
]


@pytest.mark.parametrize(
  'answer, choices, option', [r[1:] for r in OPTIONS], ids=[r[0] for r in OPTIONS]
)
def test_option_rules(answer, choices, option):
  assert extract.option(answer, choices) == option


# rule, answer, label
YES_NO = [
  ('the word', 'Yes, there is.', 'Yes'),
  ('any case', 'NO!', 'No'),
  ('both', 'yes and no', 'Unknown'),
  ('neither', 'There is not', 'Unknown'),
  ('a part of a word', 'yesterday', 'Unknown'),
  ('a period beside a digit stays', 'no.1', 'Unknown'),
  ('a period elsewhere goes, and joins', 'No.It is', 'Unknown'),
  ('a mark that touches a blank vanishes', 'no- way', 'No'),
  ('everywhere', 'no-way is no- way', 'No'),
  ('one that does not becomes a blank', 'no-way', 'No'),
  ('with a number all marks vanish', '1,000 no-way', 'Unknown'),
]


@pytest.mark.parametrize('answer, label', [r[1:] for r in YES_NO], ids=[r[0] for r in YES_NO])
def test_yes_no_rules(answer, label):
  assert extract.yes_or_no(answer) == label


# rule, gold answer, prediction, right
OPEN = [
  ('contains the gold answer', 'a dog', 'It is a dog.', True),
  ('A is right', 'a dog', 'A', True),
  ('so is what begins with the article', '7', 'A dog', True),
  ('and "answer is about"', '7', 'The answer is about 4', True),
  ('the other option', 'a dog', 'other answers', False),
  ('the gold answer beside the other option', 'a dog', 'a dog, other answers', False),
  ('"answer is Beta" gives B', 'Beta carotene', 'The answer is Beta carotene', False),
  ('not more than twice both options', '7', '7' + ' ' * (2 * (1 + 13) - 1), True),
  ('longer than that', '7', '7' + ' ' * 2 * (1 + 13), False),
  ('a gold answer that is a capital letter', 'C', 'C', False),
]


@pytest.mark.parametrize('gold, prediction, right', [r[1:] for r in OPEN], ids=[r[0] for r in OPEN])
def test_open_question_rules(gold, prediction, right):
  row = choice.as_choice({'answer': gold, 'A': None, 'B': None, 'prediction': prediction})
  assert (choice.chosen(row) == row['answer']) == right


def assert_equal_tables(found, wanted):
  assert found.keys() == wanted.keys()
  for split in wanted:
    assert found[split] == pytest.approx(wanted[split], abs=1e-9, nan_ok=False), split


def test_pope_of_all_original_tables():
  for case in content('pope_rating.json'):
    assert_equal_tables(pope.rating(case['rows']), case['metrics'])
    assert [extract.yes_or_no(row['prediction']) for row in case['rows']] == [
      row['extracted'] for row in case['rows']
    ]


def test_hallusionbench_of_all_original_tables():
  for case in content('hallusion_rating.json'):
    assert_equal_tables(hallusionbench.rating(case['rows']), case['metrics'])


def test_mmbench_of_all_original_tables():
  for case in content('mmbench_circular.json'):
    hits = choice.circular_hits(case['rows'])
    assert {str(k): int(v) for k, v in hits.items()} == case['hits']
    counted = [{**row, 'hit': hits[row['index']]} for row in case['rows'] if row['index'] in hits]
    assert_equal_tables(choice.accuracies(counted), case['accuracy'])


def test_mmmu_of_all_original_tables():
  for case in content('mmmu_vanilla.json'):
    rows = [choice.as_choice(row) for row in case['rows']]
    hits = {str(row['index']): choice.chosen(row) == row['answer'] for row in rows}
    assert hits == case['hits']
    table = choice.accuracies([{**row, 'hit': hits[str(row['index'])]} for row in rows])
    found = {split: values['Overall'] for split, values in table.items()}
    assert found == pytest.approx(case['accuracy'])


def test_llavabench_reviews_of_all_original_cases():
  for case in lines('llavabench_parse.jsonl'):
    found = [str(float(x)) for x in llavabench.parse(case['review'])]
    assert found == [str(float(x)) for x in case['scores']], case['id']


def test_llavabench_of_all_original_tables():
  for case in content('llavabench_score.json'):
    table = llavabench.relative_scores(case['rows'])
    assert table.keys() == case['unrounded'].keys()
    for name, values in table.items():
      assert list(values.values()) == pytest.approx(case['unrounded'][name])
      assert [round(x, 1) for x in values.values()] == case['rounded'][name]


# rule, rows of one question as (rotation, answer, prediction), right
ROTATIONS = [
  ('all right', [(0, 'A', 'A'), (1, 'B', 'B')], True),
  ('one wrong', [(0, 'A', 'A'), (1, 'B', 'A')], False),
  ('one not understood', [(0, 'A', 'A'), (1, 'B', 'perhaps')], False),
  ('a missing rotation is ignored', [(0, 'A', 'A')], True),
  ('a missing main row is not counted', [(1, 'B', 'B')], None),
]


@pytest.mark.parametrize('rows, right', [r[1:] for r in ROTATIONS], ids=[r[0] for r in ROTATIONS])
def test_circular_rules(rows, right):
  made = [
    {'index': 5 + k * 1_000_000, 'answer': answer, 'prediction': text, 'A': 'x1', 'B': 'x2'}
    for k, answer, text in rows
  ]
  assert choice.circular_hits(made).get(5) == right


def test_the_official_pope_answer():
  for text, answer in [
    ('No, there is not', 'no'),
    ('there is not one', 'no'),
    ('Yes. No.', 'yes'),
    ('NO', 'yes'),
    ('nothing', 'yes'),
    ('', 'yes'),
    ('no,', 'no'),
  ]:
    assert pope.official_answer(text) == answer


def pope_rows():
  """The 5,127 questions as VLMEvalKit has them: each once, with its tracks joined."""
  joined = {}
  for track in pope.TRACKS:
    for row in lines(f'coco_pope_{track}.json'):
      key = row['image'], row['text']
      entry = joined.setdefault(key, {'answer': row['label'].capitalize(), 'tracks': []})
      assert entry['answer'] == row['label'].capitalize()
      entry['tracks'].append(track)
  return joined


def test_pope_files_counted_two_ways():
  """Answers of a player who says yes to even places: from our table, and by counting each track's
  own file.
  """
  joined = pope_rows()
  assert len(joined) == 5127
  said = {key: 'Yes' if i % 2 else 'No' for i, key in enumerate(joined)}
  rows = [
    {
      'category': ','.join(entry['tracks']),
      'answer': entry['answer'],
      'extracted': said[key],
    }
    for key, entry in joined.items()
  ]
  table = pope.rating(rows)
  total = Counter()
  for track in pope.TRACKS:
    asked = lines(f'coco_pope_{track}.json')
    assert len(asked) == 3000 and sum(row['label'] == 'yes' for row in asked) == 1500
    # A question may stand twice in a track's file; the joined table counts it as often.
    pairs = Counter((row['label'], said[row['image'], row['text']]) for row in asked)
    total += pairs
    hits = pairs['yes', 'Yes'] + pairs['no', 'No']
    f1 = (
      2 * pairs['yes', 'Yes'] / (2 * pairs['yes', 'Yes'] + pairs['no', 'Yes'] + pairs['yes', 'No'])
    )
    assert table[track]['acc'] == pytest.approx(100 * hits / 3000)
    assert table[track]['Overall'] == pytest.approx(100 * f1)
  f1 = 2 * total['yes', 'Yes'] / (2 * total['yes', 'Yes'] + total['no', 'Yes'] + total['yes', 'No'])
  assert table['Overall']['Overall'] == pytest.approx(100 * f1)


def test_hallusionbench_sample_counted_two_ways():
  """The authors' sample of real answers: by our table, and by sets of keys counted by hand."""

  def key(row):
    names = ('category', 'subcategory', 'visual_input', 'set_id', 'figure_id', 'question_id')
    return '_'.join(row[name] for name in names)

  questions_of = {key(row): row for row in content('HallusionBench.json')}
  answers = {'0': 'No', '1': 'Yes'}
  gold = {name: answers[row['gt_answer']] for name, row in questions_of.items()}
  assert len(gold) == 1129
  # The sample is of an earlier release: its rows that the questions still hold, word for word.
  sample = [
    row
    for row in content('HallusionBench_result_sample.json')
    if key(row) in gold and questions_of[key(row)]['question'] == row['question']
  ]
  rows = [
    {
      'index': key(row),
      'category': row['category'],
      'l2-category': row['subcategory'],
      'score': extract.yes_or_no(row['model_prediction']) == gold[key(row)],
    }
    for row in sample
  ]
  assert len(rows) > 100
  table = hallusionbench.rating(rows)['Overall']

  def says(row):
    return set(re.findall(r'\b(?:yes|no)\b', row['model_prediction'].lower()))

  wrong = [row for row in sample if says(row) != {gold[key(row)].lower()}]
  places = ('subcategory', 'set_id')
  figures = {tuple(row[n] for n in (*places, 'figure_id')) for row in sample}
  bad_figures = {tuple(row[n] for n in (*places, 'figure_id')) for row in wrong}
  questions = {tuple(row[n] for n in (*places, 'question_id')) for row in sample}
  bad_questions = {tuple(row[n] for n in (*places, 'question_id')) for row in wrong}
  assert table['aAcc'] == pytest.approx(100 * (1 - len(wrong) / len(sample)))
  assert table['fAcc'] == pytest.approx(100 * (1 - len(bad_figures) / len(figures)))
  assert table['qAcc'] == pytest.approx(100 * (1 - len(bad_questions) / len(questions)))
