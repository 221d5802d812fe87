"""Tables of questions for all six benchmarks that ask, a few rows each, and rules for a judge."""

import base64
import csv
import io
import json

import numpy as np
from PIL import Image


def picture(seed, size=(20, 14)):
  """A small picture of noise, PNG in base64."""
  pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
  out = io.BytesIO()
  Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(out, 'PNG')
  return base64.b64encode(out.getvalue()).decode()


def write(path, columns, rows):
  with open(path, 'w', encoding='utf-8', newline='') as f:
    csv.writer(f, delimiter='\t').writerows([columns, *rows])
  return str(path)


def pope(path):
  """Two pictures, three questions each."""
  rows = []
  for i in range(6):
    owner = 3 * (i // 3)
    image = picture(owner) if i == owner else owner
    tracks = ('random,popular', 'popular', 'adversarial')[i % 3]
    rows.append([i, f'Is there a thing {i}? Please answer yes or no.', image,
                 ('Yes', 'No')[i % 2], tracks])  # fmt: skip
  return write(path, ['index', 'question', 'image', 'answer', 'category'], rows)


def hallusionbench(path):
  """A figure and its edit, two questions each."""
  rows = []
  for figure in range(2):
    for question in range(2):
      index = f'VD_chart_1_0_{figure}_{question}'
      rows.append([index, f'Is it {question}?', picture(10 + figure), ('Yes', 'No')[figure],
                   'VD', 'chart'])  # fmt: skip
  return write(path, ['index', 'question', 'image', 'answer', 'category', 'l2-category'], rows)


def mmbench(path):
  """Two questions in two rotations."""
  rows = []
  for rotation in range(2):
    for i in range(2):
      image = picture(20 + i) if not rotation else i
      options = ('disc', 'ring') if not rotation else ('ring', 'disc')
      rows.append([i + rotation * 1_000_000, 'What is it?', image, 'AB'[rotation], *options,
                   'shapes', 'coarse_perception', 'dev'])  # fmt: skip
  columns = ['index', 'question', 'image', 'answer', 'A', 'B', 'category', 'l2-category', 'split']
  return write(path, columns, rows)


def seedbench(path):
  rows = [[i, 'Which one?', picture(30 + i), 'A', 'red', 'blue', 'Scene'] for i in range(2)]
  return write(path, ['index', 'question', 'image', 'answer', 'A', 'B', 'category'], rows)


def mmmu(path):
  """One question with options, one about two pictures, one open; one of the development split."""
  two = str([picture(41), picture(42)])
  rows = [
    [0, 'Which <image 1>?', picture(40), 'B', 'one', 'two', 'Art', 'validation'],
    [1, 'Compare <image 1> and <image 2>.', two, 'A', 'same', 'other', 'Art', 'validation'],
    [2, 'How many in <image 1>?', picture(43), '7', '', '', 'Math', 'validation'],
    [3, 'Which <image 1>?', picture(44), 'A', 'one', 'two', 'Math', 'dev'],
  ]
  columns = ['index', 'question', 'image', 'answer', 'A', 'B', 'category', 'split']
  return write(path, columns, rows)


def llavabench(path):
  rows = [
    [i, f'Describe it, {category}.', picture(50), 'a caption', 'an answer', category]
    for i, category in enumerate(('conv', 'detail', 'complex'))
  ]
  columns = ['index', 'question', 'image', 'caption', 'gpt4_ans', 'category']
  return write(path, columns, rows)


FILES = {
  'pope': ('POPE.tsv', pope),
  'hallusionbench': ('HallusionBench.tsv', hallusionbench),
  'mmbench': ('MMBench_DEV_EN.tsv', mmbench),
  'seedbench': ('SEEDBench_IMG.tsv', seedbench),
  'mmmu': ('MMMU_DEV_VAL.tsv', mmmu),
  'llavabench': ('LLaVABench.tsv', llavabench),
}


def write_all(folder):
  """All six tables, and `rule.json`; returns the folder."""
  folder.mkdir(exist_ok=True)
  for name, make in FILES.values():
    make(folder / name)
  rules = {
    f'llava_bench_{name}': {'role': 'Assistant', 'prompt': f'Compare, {name}.'}
    for name in ('conv', 'detail', 'complex')
  }
  (folder / 'rule.json').write_text(json.dumps(rules))
  return folder
