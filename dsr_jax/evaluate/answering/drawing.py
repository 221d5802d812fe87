"""Draws the prompts of a benchmark, in the folder layout of its official scorer."""

from concurrent import futures
import json
import os

import numpy as np
from PIL import Image

from dsr_jax import cli, files, images, sharding
from dsr_jax.evaluate import protocol
from dsr_jax.evaluate.answering import folders, manifest
from dsr_jax.evaluate.answering.limits import limited
from dsr_jax.evaluate.answering.subject import Drawn, Subject, word
from dsr_jax.evaluate.overlap import one_ahead, parts_of
from dsr_jax.inference import check_numbers
from dsr_jax.models.unified import Text
from dsr_jax.runtime.distributed import Team

REWARDS, CANDIDATES = 'rewards', 'candidates'


def prompts_of(benchmark: protocol.Drawable, limit: int) -> list[protocol.Prompt]:
  """The prompts to draw."""

  def group(prompt):
    return prompt.group

  def identity(prompt):
    return prompt.id

  return limited(benchmark.prompts(), limit, group, identity)


def paths_of(benchmark: protocol.Drawable, prompts) -> list[str]:
  """The paths of all images for the prompts, below the benchmark's folder."""
  return [benchmark.picture_path(p, i) for p in prompts for i in range(benchmark.samples)]


def draw(
  name: str, subject: Subject, benchmark: protocol.Drawable, folder: str, limit: int, team: Team
) -> None:
  """Draws the missing images. All processes must call it together; the first one writes.

  Errors: InputError if the folder belongs to another model.
  """
  prompts = prompts_of(benchmark, limit)
  if team.lead:
    folders.claim(folder, manifest.of(name, subject, benchmark, limit))
    folders.recover(folder)
    _write_side_files(benchmark, prompts, folder)
  shown = {first.id for first in _first_of_each_group(prompts)}
  # Padded to the longest of all prompts, so that any limit has the same program and last bits.
  every = benchmark.prompts()
  row_of = {prompt.id: row for row, prompt in enumerate(every)}
  encoded = subject.prompts([prompt.text for prompt in every])

  def launch(chunk):
    """Starts a chunk, filled up with copies of its first row."""
    drawn = [prompts[i].id for i in chunk + [chunk[0]] * (rows - len(chunk))]
    words = np.array([word(benchmark.about.name, identity) for identity in drawn], np.uint32)
    here = [row_of[identity] for identity in drawn]
    return subject.draw(Text(encoded.ids[here], encoded.mask[here]), words, group)

  group = benchmark.samples * subject.how.best_of
  rows = subject.rows(group)
  missing = team.shared(_missing(benchmark, prompts, folder) if team.lead else None)
  done = len(prompts) - len(missing)
  for chunk, drawn in one_ahead(parts_of(missing, rows), launch):
    drawn = Drawn(*(sharding.fetch(x)[: len(chunk)] for x in drawn))
    check_numbers(drawn)
    if team.lead:
      here = [prompts[i] for i in chunk]
      folders.write_all(folder, _files_of(benchmark, here, drawn, subject.how.best_of, shown))
      done += len(chunk)
      cli.log(f'drawn        {name}: {done} of {len(prompts)} prompts')


def _missing(benchmark, prompts, folder) -> list[int]:
  """Indices of the prompts that lack an image or its record. Works for any earlier division into
  chunks: with other devices, or another chunk size, the rest is drawn in other chunks.
  """
  recorded = rewards_of(folder)

  def is_there(path):
    return path in recorded and os.path.isfile(os.path.join(folder, path))

  return [
    i for i, prompt in enumerate(prompts) if not all(map(is_there, paths_of(benchmark, [prompt])))
  ]


def _rewards_path(prompts) -> str:
  """The path of a chunk's rewards; chunks with other members have other names."""
  return f'{REWARDS}/{_file_name(prompts[0].id)}-{folders.digest_of(p.id for p in prompts)}.json'


def _file_name(identity: str) -> str:
  return identity.replace('/', '_')


def candidate_paths(prompt: protocol.Prompt, best_of: int) -> list[str]:
  """The paths of the candidates for a shown prompt's first sample."""
  return [f'{CANDIDATES}/{_file_name(prompt.id)}/{k}.png' for k in range(best_of)]


def _first_of_each_group(prompts) -> list[protocol.Prompt]:
  found = {}
  for prompt in prompts:
    found.setdefault(prompt.group, prompt)
  return list(found.values())


def _write_side_files(benchmark, prompts, folder):
  """Writes the other files that the official scorer reads, next to the images to be drawn."""
  tops = {os.path.dirname(path).split('/')[0] for path in paths_of(benchmark, prompts)}
  for path, text in benchmark.side_files().items():
    target = os.path.join(folder, path)
    if path.split('/')[0] in tops and not os.path.isfile(target):
      files.write_text(target, text)


def _files_of(benchmark, prompts, drawn: Drawn, best_of, shown) -> dict[str, bytes]:
  """The files of a chunk. drawn: for B prompts; candidate k of sample i has the index
  i * best_of + k.

  Codes are saved with the rewards because they are the same on any number of devices, while a pixel
  may be rounded differently.
  """
  rewards = drawn.rewards.reshape(len(prompts), benchmark.samples, best_of)
  codes = drawn.codes.reshape(*rewards.shape, -1)
  pixels = drawn.pixels.reshape(*rewards.shape, *drawn.pixels.shape[2:])
  chosen = np.argmax(rewards, axis=-1)
  wanted, records = {}, {}
  for b, prompt in enumerate(prompts):
    for i in range(benchmark.samples):
      path = benchmark.picture_path(prompt, i)
      best = int(chosen[b, i])
      wanted[path] = pixels[b, i, best]
      records[path] = {
        'rewards': cli.rounded(rewards[b, i]),
        'chosen': best,
        'codes': codes[b, i, best].tolist(),
      }
    if best_of > 1 and prompt.id in shown:
      wanted |= zip(candidate_paths(prompt, best_of), pixels[b, 0])
  with futures.ThreadPoolExecutor() as pool:
    contents = dict(zip(wanted, pool.map(_png, wanted.values())))
  contents[_rewards_path(prompts)] = (json.dumps(records) + '\n').encode()
  return contents


def _png(pixels) -> bytes:
  return images.png(Image.fromarray(images.to_uint8(pixels)))


def rewards_of(folder: str) -> dict[str, dict]:
  """{path: {'rewards', 'chosen', 'codes'}} for all drawn images."""
  return folders.read_all(os.path.join(folder, REWARDS))
