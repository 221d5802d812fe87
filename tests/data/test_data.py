"""Prompts, pictures and their order: what is read is what the files say, and a batch is a function
of (seed, step).
"""

import hashlib
import os
import subprocess
import sys
import types

import jax
import numpy as np
from PIL import Image
import pytest

from dsr_jax import config as config_lib
from dsr_jax.data import batches as batches_lib
from dsr_jax.data import folders, images, order, prompts, t2i_compbench
from dsr_jax.errors import InputError
from dsr_jax.models.unified import Text
from dsr_jax.rollouts import Batch, GenerationBatch, UnderstandingBatch


class WordProcessor:
  """A tokenizer of one id a character: reversible, so a row tells its prompt."""

  templates = types.SimpleNamespace(pad_id=0)

  def encode_prompt(self, text):
    return [ord(c) for c in text]

  encode_question = encode_prompt


def make(
  tmp_path, *, lines=None, pictures=0, task='unified', seed=3, inputs=4, max_prompt_tokens=64
):
  """Batches over a file of `lines` and a folder of `pictures` one-coloured images."""
  tasks = 2 if task == 'unified' else 1
  file, folder = tmp_path / 'prompts.txt', tmp_path / 'images'
  file.write_text('\n'.join(lines or ['a']))
  folder.mkdir(exist_ok=True)
  for i in range(pictures):
    Image.new('RGB', (20 + i, 30), (i, 100, 200)).save(folder / f'{i:03d}.png')
  data = config_lib.Data(prompts=str(file), images=str(folder), max_prompt_tokens=max_prompt_tokens)
  method = config_lib.Method(
    task=task, inputs_per_step=inputs * tasks, seed=seed, question='q?', instruction='i!'
  )
  return batches_lib.make(data, method, WordProcessor(), 16)


def read(batch):
  return [''.join(chr(i) for i in ids[mask]) for ids, mask in zip(*batch.generation.prompt)]


def same(a, b):
  return jax.tree.structure(a) == jax.tree.structure(b) and all(
    np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
  )


# Prompts.


def test_lines_are_read_under_every_line_end_and_byte_order_mark(tmp_path):
  file = tmp_path / 'p.txt'
  file.write_bytes('\ufeffa red disc\r\n\r\n  two cats \rone\x0cdog\n\n\tünïcode\u2028x'.encode())
  assert prompts.read_lines(str(file)) == [
    (1, 'a red disc'),
    (3, 'two cats'),
    (4, 'one\x0cdog'),
    (6, 'ünïcode\u2028x'),
  ]


@pytest.mark.parametrize(
  'content, said',
  [
    (b'', 'has no prompt; write at least one'),
    (b'\r\n \n', 'has no prompt; write at least one'),
    ('caf\u00e9'.encode('latin-1'), 'not UTF-8'),
    ('a cat'.encode('utf-16'), 'not UTF-8'),
    (None, 'cannot read'),
  ],
)
def test_unreadable_prompts_are_one_sentence(tmp_path, content, said):
  file = tmp_path / 'p.txt'
  if content is not None:
    file.write_bytes(content)
  with pytest.raises(InputError, match=said) as e:
    prompts.read_lines(str(file))
  assert str(file) in str(e.value) and '\n' not in str(e.value)


def test_json_lines_and_tables_are_read_by_their_prompt_column(tmp_path):
  rows = {
    'p.jsonl': '{"prompt": " a red disc", "seed": 3}\n\n{"id": "b", "prompt": "two cats"}\n',
    'p.txt': '{"prompt": "a red disc"}\n\n{"prompt": "two cats"}\n',
    'p.csv': 'id,prompt\n1,a red disc\n\n"2",two cats\n',
    'p.tsv': '\ufeffprompt\tid\na red disc\t1\n\ntwo cats\t2\n',
  }
  for name, content in rows.items():
    (tmp_path / name).write_text(content)
    found = prompts.read(str(tmp_path / name))
    assert [row.text for row in found] == ['a red disc', 'two cats'], name
    assert found[1].line == (4 if name.endswith('sv') else 3)
  assert prompts.read(str(tmp_path / 'p.jsonl'))[0].further == {'seed': 3}
  assert prompts.read(str(tmp_path / 'p.csv'))[1].further == {'id': '2'}
  (tmp_path / 'q.csv').write_text('prompt\n"a, b\nc"\nd\n')
  assert [(row.line, row.text) for row in prompts.read(str(tmp_path / 'q.csv'))] == [
    (2, 'a, b\nc'),
    (4, 'd'),
  ]


@pytest.mark.parametrize(
  'name, content, said',
  [
    ('p.jsonl', '{"prompt": "a"}\n{"prompt":', 'line 2 of p.jsonl is not JSON'),
    ('p.jsonl', '\n{"text": "a"}', "line 2 of p.jsonl has the keys 'text'; write an object"),
    ('p.jsonl', '{"prompt": "a"}\n["b"]', 'line 2 of p.jsonl has no object'),
    ('p.jsonl', '{"prompt": 3}', "line 1 of p.jsonl has the keys 'prompt'"),
    ('p.jsonl', '', 'p.jsonl has no prompt; write at least one'),
    ('p.csv', 'id,text\n1,a\n', "p.csv has the columns 'id', 'text'; name the column of the"),
    ('p.csv', 'id,prompt\n1,a\n2,b,c\n', 'line 3 of p.csv has 3 columns, but .* has 2'),
    ('p.csv', 'prompt\n"a\n', 'line 2 of p.csv is not a row of a table'),
    ('p.csv', 'prompt\n', 'p.csv has no prompt; write at least one'),
    ('p.txt', 'a\n\u200b\n', 'line 2 of p.txt has no visible characters'),
    ('p.txt', 'a\0 \0c\0', 'line 1 of p.txt contains a NUL'),
  ],
)
def test_prompts_that_are_none_are_named_by_their_line(tmp_path, name, content, said):
  (tmp_path / name).write_text(content)
  with pytest.raises(InputError, match=said) as e:
    prompts.read(str(tmp_path / name))
  assert '\n' not in str(e.value)


def test_a_too_long_prompt_is_named_by_its_line(tmp_path):
  with pytest.raises(
    InputError, match=r'line 3 of prompts.txt has 9 tokens, more than the limit of 8'
  ):
    make(
      tmp_path, lines=['short', '', 'too  long', 'short'], task='generation', max_prompt_tokens=8
    )


def test_what_the_tokenizer_refuses_is_named_by_its_line(tmp_path, monkeypatch):
  def refuse(self, text):
    raise InputError(f'found a special token in {text}')

  monkeypatch.setattr(WordProcessor, 'encode_prompt', refuse)
  with pytest.raises(InputError, match='line 1 of prompts.txt: found a special token in short'):
    make(tmp_path, lines=['short'], task='generation')


# T2I-CompBench++.


@pytest.fixture(scope='module')
def compbench():
  return t2i_compbench.load()


def test_compbench_has_the_files_prompts_in_order_with_repeats(compbench):
  folder = os.path.join(os.path.dirname(t2i_compbench.__file__), 't2i_compbench_prompts')
  expected = []
  for name in (
    'color',
    'shape',
    'texture',
    'spatial',
    '3d_spatial',
    'numeracy',
    'non_spatial',
    'complex',
  ):
    with open(os.path.join(folder, f'{name}_train.txt'), encoding='utf-8', newline=None) as f:
      expected += [line.strip() for line in f.read().splitlines()]
  found = [compbench[i] for i in range(len(compbench))]
  assert found == expected
  assert len(found) == 5600 and len(set(found)) == 5559
  assert not any('\r' in prompt for prompt in found)
  assert compbench.where(700) == 'line 1 of shape_train.txt'


@pytest.mark.parametrize(
  'name, sha256',
  [
    ('3d_spatial_train', '0bba7e9ad31b0ce7908f6cbf2426a4b7ef6e8b841c1b737d0ad2d5b8e688dd93'),
    ('color_train', 'db5d3287027d453f8c977f0c7315f8a01a770f02f61fa54ae19406762982393f'),
    ('complex_train', 'd214ac45cb3c5307dd14a144c8c69aa5ffdcc7be74ff71b5dac989f8ca9f924b'),
    ('non_spatial_train', 'dbac5a9ec83204dcd0c3538a12d3212e2ce66db6f7ba45b49a1d869b2d3f2430'),
    ('numeracy_train', 'f66bb8708cb0be23c0406e14d892b25661b2b71e3e72abddc79c38466ab629c6'),
    ('shape_train', '451bdfccd330d4cf979d45664817be7959e89250b93d5c591cc562b858175a87'),
    ('spatial_train', 'af14cdf2320057d98f94077e6211c2ddfaabfbb9e3842873657baabb17e00de6'),
    ('texture_train', '4846315c5972f9e9cc82e4833099e8ec2c28b999ca77269512715f3f56bde54f'),
    ('LICENSE', '905b2fb8de6611b855171c41985efc7a36698016c083f1b39485a6f9e9d4ae00'),
  ],
)
def test_shipped_prompts_are_the_source_byte_for_byte(name, sha256):
  folder = os.path.join(os.path.dirname(batches_lib.__file__), 't2i_compbench_prompts')
  with open(os.path.join(folder, f'{name}.txt'), 'rb') as f:
    assert hashlib.sha256(f.read()).hexdigest() == sha256


def test_compbench_as_a_tfds_data_set_needs_neither_tensorflow_nor_torch(tmp_path, compbench):
  script = (
    'import sys; from dsr_jax.data.t2i_compbench_tfds import T2iCompbench; '
    f'builder = T2iCompbench(data_dir={str(tmp_path)!r}, file_format="array_record"); '
    'builder.download_and_prepare(); rows = builder.as_data_source(split="train"); '
    'print(len(rows), rows[700]["prompt"].decode(), sep="|"); '
    'print("tensorflow" in sys.modules or "torch" in sys.modules)'
  )
  done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True)
  assert done.stdout.splitlines()[-2:] == [f'5600|{compbench[700]}', 'False']


# Pictures.


@pytest.mark.parametrize('mode', ['RGB', 'L', 'LA', 'P', 'RGBA', '1', 'I;16', 'CMYK'])
@pytest.mark.parametrize('size', [(40, 30), (1, 30), (30, 1)])
def test_every_kind_of_picture_becomes_a_square_of_bytes(tmp_path, mode, size):
  suffix = 'tif' if mode == 'CMYK' else 'png'
  Image.new('RGB', size, (250, 250, 250)).convert('L' if mode == 'I;16' else mode).convert(
    mode
  ).save(tmp_path / f'x.{suffix}')
  picture = images.decoded(folders.Folder(str(tmp_path)), [0], 16)[0]
  assert picture.shape == (16, 16, 3) and picture.dtype == np.uint8


# Order.


def test_every_epoch_is_a_permutation_and_no_two_are_alike():
  epochs = [order.items(5, order.PROMPTS, range(e * 100, (e + 1) * 100), 100) for e in range(4)]
  assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 4
  others = (
    order.items(6, order.PROMPTS, range(100), 100),
    order.items(5, order.PICTURES, range(100), 100),
  )
  assert epochs[0] not in others


def test_the_order_is_the_same_on_every_machine():
  # Written down once: a resumed run must find its data where it left them, whatever NumPy is
  # installed.
  assert order.items(42, order.PROMPTS, range(8), 8) == [7, 1, 6, 4, 3, 5, 0, 2]
  assert int(order.step_seed(42, 7)) == 1446207026


def test_steps_have_seeds_of_their_own():
  assert len({int(order.step_seed(s, step)) for s in range(20) for step in range(50)}) == 1000


# Batches.


def test_a_batch_is_a_function_of_seed_and_step_alone(tmp_path):
  lines, later = [f'prompt {i}' for i in range(10)], {}
  one = make(tmp_path, lines=lines, pictures=7)
  for step in (9, 2, 5, 0):
    later[step] = one.at(step)
  two = make(tmp_path, lines=lines, pictures=7)
  for step, batch in later.items():
    again = two.at(step)
    assert same(batch, again)
  other = make(tmp_path, lines=lines, pictures=7, seed=4)
  assert not np.array_equal(other.at(0).generation.prompt.ids, later[0].generation.prompt.ids)
  assert one.fingerprint == two.fingerprint == other.fingerprint


def test_an_epoch_shows_every_prompt_and_picture_once_even_where_steps_straddle_it(tmp_path):
  lines = [f'prompt {i}' for i in range(10)]
  made = make(tmp_path, lines=lines, pictures=6, inputs=4)
  rows = [row for step in range(5) for row in read(made.at(step))]
  assert sorted(rows[:10]) == sorted(lines) and sorted(rows[10:]) == sorted(lines)
  red = [int(pixels[8, 8, 0]) for step in range(3) for pixels in made.at(step).understanding.pixels]
  assert sorted(red[:6]) == sorted(red[6:]) == list(range(6))


def test_shapes_and_types_never_change(tmp_path):
  made = make(tmp_path, lines=['x' * n for n in (1, 5, 9)], pictures=2, inputs=2)
  shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), made.at(step)) for step in range(4)]
  assert all(shape == shapes[0] for shape in shapes)
  ints, bools = np.dtype('int32'), np.dtype('bool')
  assert shapes[0] == Batch(
    seed=((), np.dtype('uint32')),
    generation=GenerationBatch(
      prompt=Text(((2, 9), ints), ((2, 9), bools)),
      instruction=Text(((2,), ints), ((2,), bools)),
      extra={},
    ),
    understanding=UnderstandingBatch(
      pixels=((2, 16, 16, 3), np.dtype('uint8')),
      question=Text(((2, 2), ints), ((2, 2), bools)),
      extra={},
    ),
  )


def test_rows_made_apart_are_the_rows_of_the_batch(tmp_path):
  made = make(tmp_path, lines=[f'prompt {i}' for i in range(5)], pictures=5)
  batch = made.at(3)
  first, second = (made.at(3, a, a + 2) for a in (0, 2))
  joined = jax.tree.map(lambda *x: np.concatenate(x) if x[0].ndim > 1 else x[0], first, second)
  assert same(joined, batch)
  assert same(made.prompts_at(3, 2, 4), second.generation)
  assert same(made.pictures_at(3, 2, 4), second.understanding)
  assert made.texts_at(3) == read(batch)


def test_the_task_that_is_not_trained_is_absent_and_its_data_unread(tmp_path):
  drawn = make(tmp_path, lines=['a'], pictures=0, task='generation').at(0)
  assert drawn.generation.prompt.ids.shape == (4, 1) and drawn.understanding is None
  described = make(tmp_path, lines=['x' * 100], pictures=1, task='understanding').at(0)
  assert described.generation is None and described.understanding.pixels.shape == (4, 16, 16, 3)
  assert all(batch.shared == {} and batch.learning_rate is None for batch in (drawn, described))


def test_other_data_have_another_fingerprint(tmp_path):
  one = make(tmp_path, lines=['a', 'b'], task='generation')
  assert one.fingerprint != make(tmp_path, lines=['b', 'a'], task='generation').fingerprint


@pytest.mark.parametrize(
  'data, said',
  [
    (
      dict(prompts='nowhere.txt'),
      'there are no prompts nowhere.txt; set data.prompts to one of scenes, t2i_compbench, or',
    ),
    (
      dict(images='nowhere'),
      'are no images nowhere; set data.images to one of scenes, coco, journeydb, or to a folder',
    ),
  ],
)
def test_unknown_data_are_one_sentence(data, said, monkeypatch):
  monkeypatch.setattr(batches_lib.sets, 'reinforcement_prompts', lambda seed: ('a',))
  with pytest.raises(InputError, match=said):
    batches_lib.make(config_lib.Data(**data), config_lib.Method(), WordProcessor(), 32)


def test_scenes_are_drawn_for_models_of_their_size_only(monkeypatch):
  monkeypatch.setattr(batches_lib.sets, 'reinforcement_prompts', lambda seed: ('a disc', 'a ring'))
  method = config_lib.Method(inputs_per_step=4)
  batch = batches_lib.make(config_lib.Data(), method, WordProcessor(), 32).at(0)
  assert sorted(read(batch)) == ['a disc', 'a ring'] and batch.understanding.pixels.shape == (
    2,
    32,
    32,
    3,
  )
  with pytest.raises(
    InputError, match='data.images=scenes has images of 32 x 32 .* a model of 384 x 384'
  ):
    batches_lib.make(config_lib.Data(), method, WordProcessor(), 384)
