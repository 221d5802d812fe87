"""What the page's buttons show: HTML of a model's images, texts and rewards. It needs no Gradio.

Templates escape everything that a user enters. A request that cannot be answered gives an error
message on the page. Only one request at a time uses the models and decodes an image, so memory does
not grow with the number of users.

Axes: N image codes, H W pixels.
"""

import collections
import glob
import io
import itertools
import os
import threading
from typing import NamedTuple

import numpy as np
from PIL import Image

from dsr_jax import api, images
from dsr_jax import rows as rows_lib
from dsr_jax.errors import InputError
from dsr_jax.reporting import html
from dsr_jax.runtime import metrics

PACKAGE = 'dsr_jax.demo'  # of the templates
MAX_PROMPT = 2000  # characters of a prompt or question
MAX_PIXELS = 64_000_000  # of an uploaded image; a phone's largest have 50 million
MAX_FILE = 32 * 2**20  # bytes of an uploaded image
SMALLEST = 160  # minimum side of an image on the page, in pixels
BEST_OF = (1, 2, 4, 8, 16, 32)
INPUTS = 3  # inputs shown of a step: the first ones of each task
# The choices are few because each value compiles its own program.
OWN = 'its own'  # the first model's, for all
TEMPERATURES = {OWN: None, 'plain (1)': 1.0, 'calmer (0.5)': 0.5, 'greedy (0)': 0.0}
GUIDANCES = {OWN: None, 'none (1)': 1.0, 'some (2)': 2.0, 'much (5)': 5.0}


class Picture(NamedTuple):
  """An image on the page. mark: 'up', 'down' or ''; lines: the text below it."""

  src: str
  alt: str
  lines: list[str]
  mark: str = ''


class Heat(NamedTuple):
  """A text's words with colors, and an image's patches."""

  title: str
  words: list[html.Word]
  patches: str


class Input(NamedTuple):
  """A step's input with its candidates. texts: (text, its caption, mark), if the input is an
  image.
  """

  title: str
  pictures: list[Picture]
  texts: list[tuple[str, str, str]]


class Views:
  """The models of the page, and what each button shows.

  model, compare: `api.Model`s; compare may be None. run: the workdir of a run, or ''.
  """

  def __init__(self, model: api.Model, compare: api.Model | None, run: str, num_samples: int):
    self._models = [model, *([compare] if compare else [])]
    self._run = run
    self._number = num_samples
    self._turn = threading.Lock()

  @property
  def name(self) -> str:
    """The model's name."""
    return self._models[0].name

  @property
  def compared(self) -> str:
    """The other model's name, or ''."""
    return self._models[1].name if len(self._models) > 1 else ''

  @property
  def question(self) -> str:
    """The default question about an image."""
    return self._models[0].question

  def warm(self):
    """Answers once, so that the programs are compiled before the first user arrives."""
    self.draw('a red disc')
    picture = Image.new('RGB', (64, 64), 'white')
    self._answer(self._described, picture, '', 42, self._temperature(OWN))

  # The buttons.

  def draw(
    self,
    prompt: str,
    seed: float = 42,
    temperature: str = OWN,
    guidance: str = OWN,
  ) -> str:
    """A prompt's images with both rewards, the best of n, and where the rewards come from."""
    return self._answer(
      self._drawn, prompt, seed, self._temperature(temperature), GUIDANCES.get(guidance)
    )

  def describe(
    self,
    file: str | None,
    question: str = '',
    seed: float = 42,
    temperature: str = OWN,
  ) -> str:
    """Texts about an image file, best by R_U first, or answers to a question."""
    return self._answer(self._described_file, file, question, seed, self._temperature(temperature))

  def step(self, step: int | None) -> str:
    """The candidates of a run's step."""
    return self._answer(self._candidates, step)

  def steps(self) -> list[int]:
    """The steps of the run whose candidates were kept."""
    found = glob.glob(os.path.join(glob.escape(self._run), 'samples', '*.png'))
    names = [os.path.splitext(os.path.basename(path))[0] for path in found]
    return sorted(int(name) for name in names if name.isdecimal())

  def _answer(self, show, *arguments) -> str:
    try:
      with self._turn:
        return show(*arguments)
    except InputError as e:
      return html.render('message.html.j2', PACKAGE, message=str(e))

  def _temperature(self, choice: str) -> float:
    chosen = TEMPERATURES.get(choice)
    return self._models[0].temperature if chosen is None else chosen

  # Draw.

  def _drawn(self, prompt, seed, temperature, guidance) -> str:
    prompt = _text('prompt', prompt)
    seed = _seed(seed)
    rows = []
    for model in self._models:
      weight = self._models[0].guidance if guidance is None else guidance
      drawn = model.generate(
        prompt,
        num_samples=self._number,
        seed=seed,
        temperature=temperature,
        cfg_weight=weight,
      )
      rows.append(drawn)
    first = rows[0]
    return html.render(
      'draw.html.j2',
      PACKAGE,
      prompt=prompt,
      rows=[
        (model.name, [_picture(d, i, len(drawn)) for i, d in enumerate(drawn)])
        for model, drawn in zip(self._models, rows)
      ],
      best_of=_best_of(first),
      pairs=self._pairs(prompt, rows),
      heats=[self._heat(prompt, d, name) for name, d in _ends(first)],
    )

  def _pairs(self, prompt, rows):
    """Before and after by candidate: pairs of images, scored by the first model, which stays fixed;
    and the mean change. None if there is only one model.
    """
    if len(rows) < 2:
      return None
    judge = self._models[0]
    names = (self.name, self.compared)
    by_seed = [sorted(drawn, key=lambda d: d.candidate) for drawn in rows]
    scores = [[judge.score(prompt, d.image).reward_generation for d in row] for row in by_seed]
    pairs = []
    for i, drawings in enumerate(zip(*by_seed)):
      values = [row[i] for row in scores]
      pairs.append(
        [
          Picture(
            _src(drawing.image),
            f'candidate {i} of {name}',
            [f'R_G {value:.3f}'],
            '' if values[0] == values[1] else 'up' if value == max(values) else 'down',
          )
          for drawing, name, value in zip(drawings, names, values)
        ]
      )
    change = float(np.mean(scores[1]) - np.mean(scores[0]))
    return {'pairs': pairs, 'names': names, 'change': html.signed(change)}

  def _heat(self, prompt, drawing, title) -> Heat:
    return _heat(title, self._models[0].explain(prompt, drawing), drawing.image)

  # Describe.

  def _described_file(self, file, question, seed, temperature) -> str:
    return self._described(_read(file), question, seed, temperature)

  def _described(self, image, question, seed, temperature) -> str:
    question = _text('question', question) if question and question.strip() else ''
    seed = _seed(seed)
    rows = []
    for model in self._models:
      rows.append(
        model.describe(
          image,
          num_samples=self._number,
          question=question or self.question,
          seed=seed,
          temperature=temperature,
        )
      )
    best = rows[0][0]
    square = self._models[0].as_seen(image)
    return html.render(
      'describe.html.j2',
      PACKAGE,
      question=question or self.question,
      picture=Picture(_src(square), 'the picture as the model sees it', []),
      rows=[(model.name, _texts_of(described)) for model, described in zip(self._models, rows)],
      heat=self._heat_of_text(best.text, image, square),
    )

  def _heat_of_text(self, text, image, square) -> Heat | None:
    """None for a text that cannot be read back: an empty one, or noise with too many tokens."""
    try:
      return _heat(text, self._models[0].explain(text, image), square)
    except InputError:
      return None

  # A step.

  def _candidates(self, step) -> str:
    if step not in self.steps():
      raise InputError(
        f'there are no candidates of step {step}; choose a step from the list: the run keeps '
        'candidates every system.samples_every steps'
      )
    shown = _inputs(rows_lib.read(self._run, step))
    src = ''
    if not shown:  # an older run, without rows
      image = images.load_image(os.path.join(self._run, 'samples', f'{step:06d}.png'))
      src = html.data_uri(images.png(image))
    line = next((x for x in metrics.repeatable(self._run) if x.get('step') == step), {})
    numbers = [(name, value) for name, value in sorted(line.items()) if '/reward' in name]
    return html.render('step.html.j2', PACKAGE, step=step, inputs=shown, src=src, numbers=numbers)


# What is shown.


def _src(image: Image.Image) -> str:
  """An image as a data URL; a small one is enlarged with its pixels as squares."""
  times = -(-SMALLEST // image.width)
  if times > 1:
    size = (image.width * times, image.height * times)
    image = image.resize(size, Image.Resampling.NEAREST)
  return html.data_uri(images.png(image))


def _picture(drawing: api.Drawing, rank: int, number: int) -> Picture:
  mark = 'up' if rank == 0 else 'down' if rank == number - 1 else ''
  lines = [
    f'R_G {drawing.reward_generation:.3f}',
    f'R_U {drawing.reward_understanding:.3f}',
    f'candidate {drawing.candidate}',
  ]
  return Picture(_src(drawing.image), f'candidate {drawing.candidate}', lines, mark)


def _inputs(rows: list[dict]) -> list[Input]:
  """The first inputs of each task in a step's rows."""
  found = []
  for (task, number), group in itertools.groupby(rows, key=lambda r: (r['task'], r['input'])):
    if number >= INPUTS:
      continue
    group = list(group)
    pictures = [_row_picture(row) for row in (group if task == 'generation' else group[:1])]
    texts = []
    if task == 'understanding':
      texts = [(row['text'] or '(empty)', f'R_U {row["reward"]:.3f}', _mark(row)) for row in group]
    found.append(Input(group[0]['prompt'], pictures, texts))
  return found


def _row_picture(row: dict) -> Picture:
  image = images.load_image(io.BytesIO(row['picture']['bytes']))
  if row['text'] is not None:
    return Picture(_src(image), 'the picture', [])
  lines = [f'R_G {row["reward"]:.3f}', *(key for key in ('chosen', 'rejected') if row[key])]
  return Picture(_src(image), f'candidate {row["candidate"]}', lines, _mark(row))


def _mark(row: dict) -> str:
  return 'up' if row['chosen'] else 'down' if row['rejected'] else ''


def _best_of(drawn: list[api.Drawing]) -> list[Picture]:
  """The best of the first n candidates; `drawn` is sorted by R_G."""
  found = []
  for number in [n for n in BEST_OF if n <= len(drawn)]:
    best = next(d for d in drawn if d.candidate < number)
    lines = [f'best of {number}', f'R_G {best.reward_generation:.3f}']
    found.append(Picture(_src(best.image), f'the best of {number}', lines))
  return found


def _ends(drawn: list[api.Drawing]) -> list[tuple[str, api.Drawing]]:
  """The best and the worst image, with their titles."""
  ends = [('The best picture', drawn[0])]
  return ends + [('The worst picture', drawn[-1])] * (len(drawn) > 1)


def _heat(title: str, found: api.Explanation, image: Image.Image) -> Heat:
  words = [html.Word(w.text, w.value, html.signed(w.value, 1)) for w in found.words]
  return Heat(title, words, html.patches(np.asarray(image), np.ravel(found.patches)))


def _texts_of(described: list[api.Description]) -> list[tuple[str, str]]:
  """Texts with their captions; a text that was sampled several times appears once."""
  times = collections.Counter(d.text for d in described)
  first = {d.text: d for d in reversed(described)}
  return [(d.text or '(empty)', _said(d, times[d.text])) for d in described if first[d.text] is d]


def _said(described: api.Description, times: int) -> str:
  lines = []
  if described.reward_understanding is None:
    lines.append('no reward')
  else:
    lines.append(f'R_U {described.reward_understanding:.3f}')
    lines.append(f'R_G {described.reward_generation:.3f}')
  if not described.ended:
    lines.append('cut off')
  if times > 1:
    lines.append(f'{times} times')
  return ', '.join(lines)


# What is asked.


def _text(name: str, text) -> str:
  """A prompt or a question, checked: not empty and not too long."""
  if not isinstance(text, str) or not text.strip():
    raise InputError(f'the {name} is empty; write a few words')
  if len(text) > MAX_PROMPT:
    raise InputError(f'the {name} has {len(text)} characters; shorten it to at most {MAX_PROMPT}')
  return ' '.join(text.split())


def _seed(seed) -> int:
  if seed is None or not 0 <= seed < 2**32 or seed != int(seed):
    raise InputError(f'the seed is {seed}; set it to a whole number from 0 to {2**32 - 1}')
  return int(seed)


def _read(file) -> Image.Image:
  """An uploaded image; checks its header first."""
  if not file:
    raise InputError('the picture is missing; drop a file into the field')
  name = 'the uploaded file'
  size = os.path.getsize(file)
  if size > MAX_FILE:
    raise InputError(f'{name} has {size / 2**20:.0f} MiB; reduce it to at most {MAX_FILE >> 20}')
  with open(file, 'rb') as opened:
    _, (width, height) = images.header(opened, name)
    if width * height > MAX_PIXELS:
      raise InputError(
        f'{name} has {width} x {height} pixels; reduce it to at most {MAX_PIXELS // 10**6} million'
      )
    opened.seek(0)
    return images.load_image(opened, name)
