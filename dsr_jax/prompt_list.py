"""Draws images for the prompts of a file into one folder, on all devices; resumes after a kill.

    manifest.json      the model, the sampling settings, the hash of the prompts; written first
    ID/00.png ...      candidates in the order of their seeds
    rewards/           {path: R_G, codes}, one file per chunk
    samples.json       all prompts with their images, best first by R_G
    index.html         the same as a page

The prompts are drawn like those of a benchmark (`evaluate.answering`).
"""

import collections
from collections.abc import Mapping
import dataclasses
import hashlib
import json
import os
import re

import jax

from dsr_jax import files, inputs
from dsr_jax.data import prompts as prompts_lib
from dsr_jax.errors import InputError
from dsr_jax.evaluate import protocol
from dsr_jax.evaluate.answering import drawing, folders, subject
from dsr_jax.reporting import html as page
from dsr_jax.runtime.distributed import Team

NAME = 'prompts'
_ID = re.compile(r'\w[\w.@-]{0,99}')
_LARGE = 128  # pixels; the page shows images of at least this size larger


@dataclasses.dataclass(frozen=True)
class Line:
  """A prompt of the file. where: 'line 3 of prompts.txt', for errors."""

  id: str
  text: str
  where: str


def read(path: str) -> list[Line]:
  """The prompts of a file, with the ids that name the folders of their images.

  An object of a .jsonl file or a row of a table may have an `id` and a `seed`; the seed is appended
  to the id. Errors: InputError names the line.
  """
  rows, name = prompts_lib.read(path), inputs.shown(os.path.basename(path))
  digits = max(4, len(str(len(rows))))
  lines = []
  for number, row in enumerate(rows):
    where = f'line {row.line} of {name}'
    if 'num_samples' in row.further:
      raise InputError(
        f'{where} has its own num_samples; remove it and set --num_samples, which applies to all'
      )
    identity = str(row.further.get('id', f'{number:0{digits}d}'))
    seed = str(row.further.get('seed', ''))
    if seed and not seed.isdecimal():
      raise InputError(f'{where} has the seed {seed!r}; set it to a whole number')
    if not _ID.fullmatch(identity):
      raise InputError(
        f'{where} has the id {identity[:120]!r}, which cannot name a folder; use at most 100 '
        'letters, digits and . _ - @, starting with a letter or digit'
      )
    lines.append(Line(f'{identity}@{seed}' if seed else identity, row.text, where))
  _check_distinct(lines)
  return lines


def _check_distinct(lines):
  by_id = collections.defaultdict(list)
  for line in lines:
    by_id[line.id.lower()].append(line.where)  # some file systems ignore case
  for identity, places in by_id.items():
    if len(places) > 1:
      raise InputError(
        f'{places[0]} and {places[1]} have the same id {identity!r}; give them different ids or '
        'seeds'
      )


class PromptList:
  """The prompts in the form of `protocol.Drawable`."""

  def __init__(self, lines: list[Line], samples: int):
    self.samples = samples
    self._lines = lines
    told = json.dumps([(line.id, line.text) for line in lines]).encode()
    self.about = protocol.About(
      name=NAME,
      title='Prompts of a file',
      kind='generation',
      headline='',
      source=f'{len(lines)} prompts, SHA-256 {hashlib.sha256(told).hexdigest()[:12]}',
      license='',
    )

  def prompts(self) -> tuple[protocol.Prompt, ...]:
    return tuple(
      protocol.Prompt(line.id, line.text, line.id, i) for i, line in enumerate(self._lines)
    )

  def picture_path(self, prompt: protocol.Prompt, sample: int) -> str:
    digits = max(2, len(str(self.samples - 1)))
    return f'{prompt.id}/{sample:0{digits}d}.png'

  def side_files(self) -> dict[str, str]:
    return {}


def draw(
  model: str, lines: list[Line], output: str, *, samples: int, settings: Mapping, template, base
) -> str:
  """Draws the images that are missing; returns the path of the page.

  settings: fields of `subject.How` that replace the model's own.

  Errors: InputError if there is no such model, a prompt is too long for it, or the folder contains
  other images.
  """
  wishes = subject.Wishes(template=template, base=base)
  mesh = subject.mesh_of(wishes)
  benchmark = PromptList(lines, samples)
  with jax.set_mesh(mesh):
    loaded = subject.load(model, wishes, mesh)
    loaded.how = dataclasses.replace(loaded.how, **settings)
    _check_lengths(loaded, lines)
    drawing.draw(NAME, loaded, benchmark, output, 0, Team())
  return write_page(benchmark, loaded, output)


def _check_lengths(loaded: subject.Subject, lines):
  family = loaded.model.family
  room = family.room and family.room(loaded.model.config)
  for line in lines:
    try:
      tokens = len(loaded.model.processor.encode_prompt(line.text))
    except InputError as e:
      raise InputError(f'{line.where}: {e}') from e
    if room is not None and tokens > room:
      raise InputError(
        f'{line.where} has {tokens} tokens, but {loaded.name} has room for at most {room}; shorten '
        'it'
      )


def write_page(benchmark: PromptList, loaded: subject.Subject, output: str) -> str:
  """Writes samples.json and index.html; returns the path of the page."""
  rewards = drawing.rewards_of(output)
  table = []
  for prompt in benchmark.prompts():
    paths = [benchmark.picture_path(prompt, i) for i in range(benchmark.samples)]
    pictures = [
      {'file': path, 'candidate': i, 'reward_generation': rewards[path]['rewards'][0]}
      for i, path in enumerate(paths)
    ]
    pictures.sort(key=lambda one: -one['reward_generation'])
    table.append({'id': prompt.id, 'prompt': prompt.text, 'pictures': pictures})
  how = {key: getattr(loaded.how, key) for key in ('temperature', 'guidance', 'seed', 'precision')}
  content = {'model': loaded.name, **how, 'prompts': table}
  files.write_json(os.path.join(output, 'samples.json'), content, ensure_ascii=False, indent=1)
  text = page.render(
    'prompts.html.j2',
    title=f'{len(table)} prompts by {loaded.name}',
    facts=[('Model', loaded.name), *((key.capitalize(), value) for key, value in how.items())],
    is_large=loaded.model.spec.image_size >= _LARGE,
    prompts=table,
  )
  return files.write_text(os.path.join(output, 'index.html'), text)


def check_output(output: str):
  """InputError, before any work, for a folder that cannot be written or has other contents."""
  files.check_place(output)
  if os.path.isdir(output) and folders.read(output) is None and os.listdir(output):
    raise InputError(
      f'{output} contains files but no {folders.MANIFEST}; set --output to a new folder, or to an '
      'earlier output of --prompts'
    )
