"""Tables of every candidate of a step, for inspection: one Parquet file per step.

  WORKDIR/rows/STEP.parquet       all candidates of a training step (`system.samples_every`)
  WORKDIR/watched/STEP.parquet    a step's model on the fixed list (`eval.watched`)

Both have the same columns, so pandas and `datasets` read a folder of them as one table. Files are
written atomically, and a repeated step writes the same file again.

Axes: B inputs, G candidates, T tokens, N image codes, H W pixels.
"""

from concurrent import futures
import glob
import json
import os
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image
import pyarrow as pa
import pyarrow.parquet as pq

from dsr_jax import files, images
from dsr_jax import state as state_lib
from dsr_jax.inference import Sampler
from dsr_jax.runtime import run_files

FOLDER = 'rows'
WATCHED = 'watched'
PAGE_BYTES = 8 << 20  # an image that several rows share is stored about once per page

PICTURE = pa.struct([('bytes', pa.binary()), ('path', pa.string())])  # as in `datasets.Image`
COLUMNS = pa.schema(
  [
    ('step', pa.int32()),
    ('task', pa.string()),
    ('input', pa.int32()),
    ('candidate', pa.int32()),
    ('prompt', pa.string()),  # of the drawn image, or the question about the image
    ('text', pa.string()),  # written about the image; null if the candidate is an image
    ('tokens', pa.list_(pa.int32())),  # of the text
    ('codes', pa.list_(pa.int32())),  # of the image
    ('picture', PICTURE),
    ('length', pa.int32()),  # codes drawn, or tokens written, without the end-of-text token
    ('reward', pa.float32()),  # nats per token; in `watched` from the initial model
    ('frozen_reward', pa.float32()),  # from the initial model; null if it did not score
    ('chosen', pa.bool_()),  # the best of its group; none in a group of equal rewards
    ('rejected', pa.bool_()),
    ('right', pa.bool_()),  # according to the judge; null without one
    ('reason', pa.string()),  # the rules that a wrong candidate fails
  ]
)
# Tells `datasets` to decode the images.
_FEATURES = {'picture': {'_type': 'Image'}}


class Candidates(NamedTuple):
  """A task's candidates on the host; a field that does not apply is None.

  codes: (B, G, N), or (B, N) of the images that texts describe. pixels uint8: (B, G, H, W, 3), or
  (B, H, W, 3). tokens: B lists of G lists of the texts' ids. rewards, frozen, right: (B, G).
  chosen, rejected: (B,), -1 for none. reasons: B lists of G.
  """

  task: str
  prompts: list[str]
  codes: np.ndarray
  pixels: np.ndarray
  rewards: np.ndarray | None
  frozen: np.ndarray | None = None
  chosen: np.ndarray | None = None
  rejected: np.ndarray | None = None
  texts: list[list[str]] | None = None
  tokens: list[list[list[int]]] | None = None
  right: np.ndarray | None = None
  reasons: list[list[str]] | None = None


class StepRows:
  """Brings a step's candidates to the host, from its records (`tasks.Task.record`).

  model: `families.Model`; the parameters come from the state. With several processes, all must
  call it.
  """

  def __init__(self, config, model):
    self._question = config.method.question
    self._family = model.family
    self._eos = model.spec.eos_id
    self._sampler = Sampler(model.graphdef, model.processor, chunk=1, seed=0)

  def __call__(self, state, records) -> list[Candidates]:
    """(state after the step, records) -> the candidates of each of its tasks."""
    found = []
    if 'generation' in records:
      record = jax.device_get(records['generation'])
      params = state_lib.policy_params(state, self._family)
      found.append(
        Candidates(
          task='generation',
          prompts=self._sampler.words(record['prompt_ids'], record['prompt_mask']),
          codes=record['codes'],
          pixels=self._sampler.decode(params, record['codes']),
          **verdicts(record),
        )
      )
    if 'understanding' in records:
      record = jax.device_get(records['understanding'])
      written = record['text_mask'] & (record['text_ids'] != self._eos)
      groups = list(zip(record['text_ids'], written))
      found.append(
        Candidates(
          task='understanding',
          prompts=[self._question] * len(record['text_ids']),
          codes=record['codes'],
          pixels=record['pixels'],
          texts=[self._sampler.words(ids, mask) for ids, mask in groups],
          tokens=[[row[keep].tolist() for row, keep in zip(*group)] for group in groups],
          **verdicts(record),
        )
      )
    return found


def verdicts(record) -> dict:
  """A step's rewards and its chosen and rejected candidates; -1 (none) if all rewards are equal."""
  tied = record['chosen'] == record['rejected']
  return {
    'rewards': record['rewards'],
    'frozen': record['frozen_rewards'],
    'chosen': np.where(tied, -1, record['chosen']),
    'rejected': np.where(tied, -1, record['rejected']),
  }


def table(step: int, found: list[Candidates]) -> pa.Table:
  """The rows of the tasks' candidates: by input, then by candidate."""
  parts = [_table(step, one) for one in found]
  joined = pa.concat_tables(parts) if parts else COLUMNS.empty_table()
  about = {'info': {'features': {name: _feature(name) for name in COLUMNS.names}}}
  return joined.replace_schema_metadata({'huggingface': json.dumps(about)})


def _table(step: int, one: Candidates) -> pa.Table:
  drawn = one.texts is None
  inputs = len(one.codes)
  group = one.codes.shape[1] if drawn else len(one.texts[0])
  places = [(i, j) for i in range(inputs) for j in range(group)]

  def numbers(values):
    """(B, G) -> one value per row; NaN becomes null."""
    if values is None:
      return [None] * len(places)
    return [None if np.isnan(x) else x for x in np.asarray(values).reshape(-1).tolist()]

  def is_at(index):
    if index is None:
      return [None] * len(places)
    return [bool(index[i] == j) for i, j in places]

  # Compression releases the GIL: one thread per core.
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    shown = [one.pixels[place] for place in places] if drawn else one.pixels
    of_input = list(pool.map(_png, shown))
  if drawn:
    pictures = of_input
    lengths = [one.codes.shape[-1]] * len(places)
  else:
    pictures = [of_input[i] for i, _ in places]
    lengths = [len(one.tokens[i][j]) for i, j in places]
  values = {
    'step': [step] * len(places),
    'task': [one.task] * len(places),
    'input': [i for i, _ in places],
    'candidate': [j for _, j in places],
    'prompt': [one.prompts[i] for i, _ in places],
    'text': [None if drawn else one.texts[i][j] for i, j in places],
    'tokens': [None if drawn else one.tokens[i][j] for i, j in places],
    'codes': [one.codes[place if drawn else place[0]].tolist() for place in places],
    'picture': [{'bytes': png, 'path': None} for png in pictures],
    'length': lengths,
    'reward': numbers(one.rewards),
    'frozen_reward': numbers(one.frozen),
    'chosen': is_at(one.chosen),
    'rejected': is_at(one.rejected),
    'right': [None if one.right is None else bool(one.right[place]) for place in places],
    'reason': [None if one.reasons is None else one.reasons[i][j] for i, j in places],
  }
  return pa.table(values, schema=COLUMNS)


def _png(pixels) -> bytes:
  return images.png(Image.fromarray(np.asarray(pixels, np.uint8)))


def _feature(name: str) -> dict:
  """How `datasets` should read a column."""
  kind = COLUMNS.field(name).type
  if name in _FEATURES:
    return _FEATURES[name]
  if pa.types.is_list(kind):
    return {'feature': {'dtype': str(kind.value_type), '_type': 'Value'}, '_type': 'List'}
  named = {'float': 'float32'}
  return {'dtype': named.get(str(kind), str(kind)), '_type': 'Value'}


# Files.


def path_of(workdir: str, step: int, folder: str = FOLDER) -> str:
  """The path of a step's rows."""
  return os.path.join(workdir, folder, f'{step:06d}.parquet')


def write(workdir: str, step: int, rows: pa.Table, folder: str = FOLDER):
  """Writes a step's rows atomically."""
  path = path_of(workdir, step, folder)
  out = pa.BufferOutputStream()
  pq.write_table(rows, out, compression='zstd', data_page_size=PAGE_BYTES)
  with run_files.writing(path):
    files.write_bytes(path, out.getvalue().to_pybytes())


def read(workdir: str, step: int, folder: str = FOLDER) -> list[dict]:
  """A step's rows as dicts; empty if there is no file."""
  path = path_of(workdir, step, folder)
  if not os.path.isfile(path):
    return []
  with run_files.reading(path):
    try:
      return pq.read_table(path).to_pylist()
    except pa.ArrowInvalid as e:
      raise run_files.damaged(path, 'it is not a Parquet file') from e


def steps_of(workdir: str, folder: str = FOLDER) -> list[int]:
  """The steps that have rows, ascending."""
  names = glob.glob('*.parquet', root_dir=os.path.join(workdir, folder))
  return sorted(int(stem) for stem in (name[:-8] for name in names) if stem.isdigit())


def cut(workdir: str, last_step: int | None):
  """Removes the files of steps after `last_step` (all if it is None): the run will write them
  again.
  """
  for folder in (FOLDER, WATCHED):
    for step in steps_of(workdir, folder):
      if last_step is None or step > last_step:
        path = path_of(workdir, step, folder)
        with run_files.writing(path):
          os.unlink(path)
