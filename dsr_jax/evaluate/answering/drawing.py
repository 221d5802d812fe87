"""Draws the prompts of a benchmark into the folders of its official scorer."""

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
  """The prompts that are drawn."""

  def group(prompt):
    return prompt.group

  def identity(prompt):
    return prompt.id

  return limited(benchmark.prompts(), limit, group, identity)


def paths_of(benchmark: protocol.Drawable, prompts) -> list[str]:
  """The paths of all their images, below the benchmark's folder."""
  return [benchmark.picture_path(p, i) for p in prompts for i in range(benchmark.samples)]


def draw(
  name: str, subject: Subject, benchmark: protocol.Drawable, folder: str, limit: int, team: Team
) -> None:
  """Draws what is not there yet. In several processes all must call together; the first writes.

  Errors: InputError if the folder is another model's.
  """
  prompts = prompts_of(benchmark, limit)
  if team.lead:
    folders.claim(folder, manifest.of(name, subject, benchmark, limit))
    folders.recover(folder)
    _write_side_files(benchmark, prompts, folder)
  shown = {first.id for first in _first_of_each_group(prompts)}
  # Padded to the longest of all: the same program, and so the same last bits, for any limit.
  every = benchmark.prompts()
  row_of = {prompt.id: row for row, prompt in enumerate(every)}
  encoded = subject.prompts([prompt.text for prompt in every])

  def launch(chunk):
    """Starts a chunk; its last rows are filled up with its first."""
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
  """Places of the prompts that lack an image or what is recorded of it, whatever they were drawn
  beside: another number of devices, or another chunk, draws the rest in other chunks.
  """
  recorded = rewards_of(folder)

  def is_there(path):
    return path in recorded and os.path.isfile(os.path.join(folder, path))

  return [
    i for i, prompt in enumerate(prompts) if not all(map(is_there, paths_of(benchmark, [prompt])))
  ]


def _rewards_path(prompts) -> str:
  """Of a chunk's rewards: chunks of other members have other names."""
  return f'{REWARDS}/{_file_name(prompts[0].id)}-{folders.digest_of(p.id for p in prompts)}.json'


def _file_name(identity: str) -> str:
  return identity.replace('/', '_')


def candidate_paths(prompt: protocol.Prompt, best_of: int) -> list[str]:
  """Where the candidates of a shown prompt's first sample lie."""
  return [f'{CANDIDATES}/{_file_name(prompt.id)}/{k}.png' for k in range(best_of)]


def _first_of_each_group(prompts) -> list[protocol.Prompt]:
  found = {}
  for prompt in prompts:
    found.setdefault(prompt.group, prompt)
  return list(found.values())


def _write_side_files(benchmark, prompts, folder):
  """What the official scorer reads beside the images, where images will be."""
  tops = {os.path.dirname(path).split('/')[0] for path in paths_of(benchmark, prompts)}
  for path, text in benchmark.side_files().items():
    target = os.path.join(folder, path)
    if path.split('/')[0] in tops and not os.path.isfile(target):
      files.write_text(target, text)


def _files_of(benchmark, prompts, drawn: Drawn, best_of, shown) -> dict[str, bytes]:
  """The files of a chunk. drawn: of B prompts; candidate k of sample i is i best_of + k.

  Codes are kept beside the rewards: they are the same on any number of devices, where a pixel may
  be rounded the other way.
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
  """{path: {'rewards', 'chosen', 'codes'}} of all drawn images."""
  return folders.read_all(os.path.join(folder, REWARDS))
