"""T2I-CompBench's rules against the original's answers, and by hand, one row a rule."""

import json

from golden import lines, tokens
import numpy as np
import pytest

from dsr_jax.errors import InputError
from dsr_jax.evaluate import protocol
from dsr_jax.evaluate.t2i_compbench import benchmark as bench
from dsr_jax.evaluate.t2i_compbench import binding, mixed, numeracy, spatial
from dsr_jax.evaluate.t2i_compbench.spatial import Detection
from dsr_jax.evaluate.t2i_compbench.words import Token


def words(text):
  """'a/DET dog/NOUN' -> tokens with blanks between them."""
  parts = [part.rsplit('/', 1) for part in text.split()]
  return [Token(word, pos, i + 1 < len(parts)) for i, (word, pos) in enumerate(parts)]


def test_spatial_scores_of_all_original_cases():
  cases = lines('t2i_spatial.jsonl')
  assert len(cases) == 373
  for case in cases:
    find = spatial.simple_pair if case['mode'] == 'simple' else spatial.complex_pair
    found = [Detection(d['label'], d['box'], d['score']) for d in case['detections']]
    score = spatial.score(case['prompt'], find(tokens(case, Token)), found)
    assert spatial.relation_in(case['prompt']) == case['relation']
    # Where the original stops with an error, for want of a noun, the score is 0.
    assert score == pytest.approx(case['score'] or 0, abs=1e-6), case['id']


def test_position_scores_of_all_original_cases():
  for case in lines('t2i_position_score.jsonl'):
    score = spatial.position_score(case['relation'], case['box1'], case['box2'])
    assert score == pytest.approx(case['result'], abs=1e-12)


def test_questions_of_all_original_cases():
  cases = lines('blip_questions.jsonl')
  assert len(cases) == 180
  for case in cases:
    questions = binding.questions(case['noun_chunks'])
    assert questions == case['questions']
    assert [binding.model_text(q) for q in questions] == case['model_texts']
    assert binding.score(case['answers'][: len(questions)]) == case['score'], case['id']


def test_clip_texts_of_all_original_cases():
  for case in lines('clip_text.jsonl'):
    assert mixed.clip_text(tokens(case, Token)) == case['text']


def test_three_in_one_of_all_original_cases():
  for case in lines('three_in_one.jsonl'):
    scores = mixed.three_in_one(
      case['prompts'],
      case['spatial_prompts'],
      case['action_prompts'],
      binding=[float(text) for text in case['blip']],
      spatial=case['unidet'],
      clip=case['clip'],
    )
    np.testing.assert_allclose(scores, case['scores'], atol=1e-11)
    assert scores.mean() == pytest.approx(case['mean'])


def box(x, y, size=40):
  return (x - size / 2, y - size / 2, x + size / 2, y + size / 2)


# rule, relation, boxes, score
POSITIONS = [
  ('left of', 'on the left of', box(0, 0), box(100, 0), 1),
  ('left of, but further down than across', 'on the left of', box(0, 0), box(100, 101), 0),
  ('right of', 'on the right of', box(100, 0), box(0, 0), 1),
  ('top of', 'on the top of', box(0, 0), box(0, 100), 1),
  ('bottom of', 'on the bottom of', box(0, 100), box(0, 0), 1),
  ('"on top of" has no rule', 'on top of', box(0, 0), box(0, 100), 0),
  ('no relation', None, box(0, 0), box(0, 100), 0),
  ('near in one direction is near', 'near', box(0, 0), box(149, 400), 1),
  ('150 in both is far', 'next to', box(0, 0), box(150, 300), 0.5),
  # boxes of 40: shifted by 20 they share 800 of 2400
  ('overlap lowers', 'on the left of', box(0, 0), box(20, 0), 0.1 / (800 / 2400)),
  ('equal boxes have no relation', 'on the left of', box(3.3, 0), box(3.3, 0), 0),
]


@pytest.mark.parametrize(
  'relation, a, b, score', [r[1:] for r in POSITIONS], ids=[r[0] for r in POSITIONS]
)
def test_position_rules(relation, a, b, score):
  assert spatial.position_score(relation, a, b) == pytest.approx(score)


DOG, CAT = Detection('dog', box(0, 0), 0.9), Detection('cat', box(200, 0), 0.7)
PROMPT = 'a dog on the left of a cat'
PAIR = spatial.Pair('dog', 'cat')

# rule, prompt, pair, detections, score
PICTURES = [
  ('a quarter each and half', PROMPT, PAIR, [DOG, CAT], 0.225 + 0.175 + 0.5),
  ('one thing alone: below .5, so 0', PROMPT, PAIR, [DOG], 0),
  ('below .5 becomes 0', PROMPT.replace('left', 'right'), PAIR, [DOG, CAT], 0),
  ('exactly .5 stays', 'a dog on top of a cat', PAIR,
   [DOG._replace(score=1.0), CAT._replace(score=1.0)], 0.5),
  ('the first box of a label', PROMPT, PAIR, [DOG._replace(score=0.6), DOG, CAT], 0.825),
  ('labels must be equal', PROMPT, PAIR, [DOG, CAT._replace(label='cats')], 0),
  ('nothing found', PROMPT, PAIR, [], 0),
  ('no pair', PROMPT, spatial.Pair(None, None), [DOG, CAT], 0),
]  # fmt: skip


@pytest.mark.parametrize(
  'prompt, pair, found, score', [r[1:] for r in PICTURES], ids=[r[0] for r in PICTURES]
)
def test_spatial_rules(prompt, pair, found, score):
  assert spatial.score(prompt, pair, found) == pytest.approx(score)


# rule, function, tokens, pair
PAIRS = [
  ('first and last noun', spatial.simple_pair, 'a/DET dog/NOUN near/ADP a/DET cat/NOUN',
   ('dog', 'cat')),
  ('one noun twice', spatial.simple_pair, 'a/DET dog/NOUN', ('dog', 'dog')),
  ('people are persons', spatial.simple_pair, 'a/DET girl/NOUN near/ADP a/DET man/NOUN',
   ('person', 'person')),
  ('no noun, no pair', spatial.simple_pair, 'nearby/ADV', (None, None)),
  ('around the preposition', spatial.complex_pair,
   'the/DET old/ADJ dog/NOUN sat/VERB next/ADP to/ADP the/DET red/ADJ cat/NOUN', ('dog', 'cat')),
  ('two prepositions make no pair', spatial.complex_pair,
   'dog/NOUN near/ADP cat/NOUN near/ADP cow/NOUN', (None, None)),
  ('a proper noun before', spatial.complex_pair, 'Rex/PROPN near/ADP cat/NOUN', ('Rex', 'cat')),
  ('after, a proper noun only without a noun, and followed by another word',
   spatial.complex_pair, 'dog/NOUN near/ADP Tom/PROPN Cat/PROPN sat/VERB', ('dog', 'Cat')),
  ('a last proper noun is not seen', spatial.complex_pair, 'dog/NOUN near/ADP Tom/PROPN',
   (None, None)),
  ('"on the top of" is no preposition of complex prompts', spatial.complex_pair,
   'dog/NOUN on/ADP the/DET top/NOUN of/ADP cat/NOUN', (None, None)),
]  # fmt: skip


@pytest.mark.parametrize('find, text, pair', [r[1:] for r in PAIRS], ids=[r[0] for r in PAIRS])
def test_pair_rules(find, text, pair):
  assert find(words(text)) == pair


def test_relations_are_looked_for_in_order_anywhere_in_the_prompt():
  assert spatial.relation_in('a nearby dog on the left of a cat') == 'near'
  assert spatial.relation_in('a dog next to a cat, on side of a cow') == 'on side of'
  assert spatial.relation_in('a dog above a cat') is None
  assert spatial.relation_in('a dog on top of a cat') == 'on top of'


def test_question_rules():
  assert binding.questions(['a dog', 'the left', 'The left', 'the top', 'top']) == [
    'a dog?',
    'The left?',
    'the top?',
  ]
  assert len(binding.questions(['a dog'] * 9)) == 8
  assert binding.questions([]) == [] and binding.score([]) == '1.0000'
  assert binding.model_text('The "old" * dog; ?') == 'the old  dog ?'
  assert binding.model_text(' '.join(['dog'] * 60)) == ' '.join(['dog'] * 50)
  assert binding.answer(0.2, 0.6) == '0.2500'
  assert binding.score(['0.5000', '0.5000']) == '0.2500'


def test_three_in_one_weights():
  parts = {'binding': [0.3], 'spatial': [0.6], 'clip': [0.9]}
  for prompt, wanted in (('A dog.', 0.45), ('a cat', 0.6), ('a cow', 0.6), (' a dog', 0.6)):
    found = mixed.three_in_one([prompt], ['a DOG'], ['A cat. more'], **parts, samples=1)
    assert found == pytest.approx([wanted])
  with pytest.raises(InputError, match='got scores for 1 images of 2 complex prompts'):
    mixed.three_in_one(['a', 'b'], [], [], **parts, samples=1)


def test_numeracy_rules():
  wanted = numeracy.wanted(words('two/NUM dogs/NOUN and/CCONJ a/DET cat/NOUN'))
  assert wanted == [('dog', 2), ('cat', 1)]
  assert numeracy.wanted(words('the/DET dogs/NOUN')) == []
  assert numeracy.score(wanted, ['dog', 'dog', 'cat']) == 1
  assert numeracy.score(wanted, ['dog', 'cat']) == 0.75
  assert numeracy.score(wanted, ['cat', 'cat']) == 0.25
  assert numeracy.score([numeracy.Wanted('boy', 1)], ['person']) == 1
  assert numeracy.score([numeracy.Wanted('table', 1)], ['dining table']) == 1
  assert numeracy.score([], ['dog']) == 0
  far, near = box(500, 0), box(1, 0)
  found = [DOG, DOG._replace(box=near), CAT._replace(box=near), DOG._replace(box=far)]
  assert numeracy.distinct(found) == ['dog', 'cat', 'dog']


def test_every_numeracy_prompt_counts_something():
  for prompt in bench.lines('numeracy_val'):
    plain = [Token(word, 'X', True) for word in prompt.replace(',', ' ,').split()]
    assert numeracy.wanted(plain), prompt


def test_prompts_and_paths():
  benchmark = bench.T2ICompBench([*bench.CATEGORIES, *bench.EXTRA])
  assert isinstance(benchmark, protocol.Drawing)
  prompts = benchmark.prompts()
  assert len(prompts) == 2400 and len({p.id for p in prompts}) == 2400
  paths = {benchmark.picture_path(p, s) for p in prompts for s in range(10)}
  assert len(paths) == 24000
  for prompt in prompts:
    path = benchmark.picture_path(prompt, 9)
    assert bench.prompt_of(path) == prompt.text
    assert bench.number_of(path) == 10 * prompt.number + 9
  spatial_lines = bench.lines('complex_val_spatial')
  assert (len(spatial_lines), len(bench.lines('complex_val_action'))) == (58, 212)


def test_scores_and_result_files(tmp_path):
  """Means by category, made independently; files that the official scripts would read."""
  rng = np.random.default_rng(1)
  benchmark = bench.T2ICompBench()
  records, values = {}, {}
  for prompt in benchmark.prompts()[::30]:
    for sample in range(10):
      path = benchmark.picture_path(prompt, sample)
      parts = dict(zip(('binding', 'spatial', 'clip'), rng.random(3)))
      record = {part: parts[part] for part in bench.PARTS[prompt.group]}
      if 'binding' in record:
        record['binding'] = f'{record["binding"]:.4f}'
      records[path] = record
      numbers = {part: float(value) for part, value in record.items()}
      if prompt.text in bench.lines('complex_val_spatial'):
        del numbers['clip']
      elif prompt.text in bench.lines('complex_val_action'):
        del numbers['spatial']
      values.setdefault(prompt.group, []).append(np.mean(list(numbers.values())))
  scores = benchmark.score(records)
  total = scores.sums.sum(axis=0)[None]
  found = {name: float(f(total)[0]) for name, f in scores.statistics.items()}
  wanted = {name: np.mean(x) for name, x in values.items()}
  assert found.pop('mean') == pytest.approx(np.mean(list(wanted.values())))
  assert found == pytest.approx(wanted)
  assert scores.label('color') == protocol.Label.OTHER_MODEL
  assert scores.label('spatial') == scores.label('complex') == protocol.Label.NOT_COMPARABLE
  assert scores.label('non_spatial') == protocol.Label.OFFICIAL

  written = benchmark.write_results(records, str(tmp_path))
  assert str(tmp_path / 'complex/annotation_3_in_1/vqa_result.json') in written
  rows = json.loads((tmp_path / 'color/annotation_blip/vqa_result.json').read_text())
  assert len(rows) == 100 and rows[0].keys() == {'question_id', 'answer'}
  assert isinstance(rows[0]['answer'], str)
  assert [row['question_id'] for row in rows] == sorted(row['question_id'] for row in rows)
  folder = tmp_path / 'spatial/labels/annotation_obj_detection_2d'
  mapping = json.loads((folder / 'mapping.json').read_text())
  assert mapping[0]['image'].endswith(f'_{mapping[0]["question_id"]:06d}.png')


def test_a_picture_without_its_parts_is_refused():
  with pytest.raises(InputError, match='record of complex/samples/a_000000.png has no spatial'):
    bench.T2ICompBench().score({'complex/samples/a_000000.png': {'binding': '1', 'clip': 1}})
  with pytest.raises(InputError, match="unknown category 'colour'"):
    bench.T2ICompBench(['colour'])
