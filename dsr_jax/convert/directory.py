"""Reads and writes complete model directories, in either layout."""

from collections.abc import Callable
import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from dsr_jax import families, files
from dsr_jax.convert import configs, configs_deepseek, placing, sidefiles, table, weights, writing
from dsr_jax.convert import stored as stored_lib
from dsr_jax.convert.showo import directory as showo
from dsr_jax.convert.showo import parts as showo_parts
from dsr_jax.errors import InputError
from dsr_jax.models.janus import model as janus
from dsr_jax.models.janus.processor import Processor

# The Hugging Face layout keeps unused tensors of the original layout here, so that converting back
# is exact. It is a separate folder because some programs read every *.safetensors beside
# config.json.
KEPT_ASIDE = pathlib.Path('kept_aside') / 'tensors.safetensors'
NOT_WRITABLE = (
  '{directory} is not writable ({error}); it needs space and permission: choose another place'
)
DTYPES = dict(float32=np.float32, bfloat16=ml_dtypes.bfloat16, float16=np.float16)


@dataclasses.dataclass(frozen=True)
class Bundle:
  """A model read from a directory.

  config: includes the templates of its tokenizer. params: nested dict of float32 leaves, with
  transformer layers stacked.
  source: dict(name: the directory as given, hash: sha256 of the weight files). kept_aside: name ->
  array, the unchanged tensors of the original layout that no forward pass reads; empty if the
  source has none.
  """

  config: Any  # of its family's `config_type`
  params: Any
  processor: Any
  source: dict[str, str]
  kept_aside: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class Stored(stored_lib.Stored):
  """A Janus directory, in either of its layouts."""

  def __init__(self, directory):
    self.directory = pathlib.Path(directory)
    content = _read_content(self.directory)
    self.layout = configs.layout_of(content)
    self._tied = (
      content.get('tie_word_embeddings', True)
      if self.layout == 'hf'
      else configs.object_in(content, 'language_config').get('tie_word_embeddings', False)
    )
    if self.layout == 'hf':
      self.config, self.processor = _with_templates(
        self.directory, content, configs.from_json(content)
      )
    self.checkpoint = weights.Checkpoint(self.directory)
    if self.layout == 'deepseek':
      config = configs_deepseek.from_json(
        content, {name: shape for name, (shape, _) in self.checkpoint.found.items()}
      )
      self.config, self.processor = _with_templates(self.directory, content, config)
    self.abstract = janus.abstract_params(self.config)
    self.entries = table.entries(self.abstract, self.layout)
    self._check()
    self.kept_aside = self._read_kept_aside()

  def read(self, name):
    """A tensor by its name in this layout, as a view of its file."""
    head, embed = table.HEAD[self.layout], table.EMBED[self.layout]
    return self.checkpoint.read(
      embed if name == head and name not in self.checkpoint.found else name
    )

  def _check(self):
    want = {entry.name: entry.shape for entry in self.entries}
    unused = table.unused(self.config.vision, self.layout)
    found = dict(self.checkpoint.found)
    # Use the head in the file, whatever the config says; use the embedding only if there is none.
    head, embed = table.HEAD[self.layout], table.EMBED[self.layout]
    if head not in found and embed in found and self._tied:
      found[head] = found[embed]
    if wrong := table.mistakes(want | unused, found):
      raise InputError(
        f'the tensors in {self.directory} do not fit its config.json: {"; ".join(wrong)}; fetch '
        f'weights and config.json of one model, which has exactly {len(want | unused)} tensors'
      )

  def _read_kept_aside(self):
    if self.layout == 'deepseek':
      return {
        name: self.checkpoint.read(name) for name in table.unused(self.config.vision, 'deepseek')
      }
    path = self.directory / KEPT_ASIDE
    if not path.is_file():
      return {}
    tensors = weights.read_file(path)
    if wrong := table.mistakes(
      table.unused(self.config.vision, 'deepseek'), {k: v[0] for k, v in tensors.items()}
    ):
      raise InputError(
        f'the tensors in {path}, kept aside when the original layout was converted, do not fit the '
        f'model: {"; ".join(wrong)}; convert it again, or remove that file'
      )
    return {name: value for name, (_, value) in tensors.items()}


class Reader(NamedTuple):
  """Reads the directories of a family.

  is_one: whether a config.json object belongs to the family. open: a directory -> its `Stored`.
  settings: a config.json object -> the settings of the family's published samples and of its image
  reading, fields of `config.Method`.
  """

  is_one: Callable[[dict], bool]
  open: Callable[[Any], stored_lib.Stored]
  settings: Callable[[dict], dict]


READERS = (
  Reader(showo_parts.is_showo, showo.Stored, showo_parts.settings),
  # A model of no known family is refused as an incomplete Janus. Janus-Pro's published samples use
  # guidance 5, and it pads images.
  Reader(lambda content: True, Stored, lambda content: dict(guidance=5.0, crop='pad')),
)


def reader_of(content) -> Reader:
  """The reader for a model directory, given its config.json object."""
  return next(reader for reader in READERS if reader.is_one(content))


def open_stored(directory) -> stored_lib.Stored:
  """The `stored.Stored` of a model directory of any family."""
  content = _read_content(pathlib.Path(directory))
  showo_parts.refuse_lone_magvit(directory, content)
  return reader_of(content).open(directory)


def read_config(directory):
  """config.json and tokenizer of a model directory -> (its family's configuration with templates,
  processor).
  """
  directory = pathlib.Path(directory)
  content = _read_content(directory)
  if showo_parts.is_showo(content):
    stored = showo.Stored(directory)
    return stored.config, stored.processor
  if configs.layout_of(content) == 'hf':
    return _with_templates(directory, content, configs.from_json(content))
  shapes = {name: shape for name, (shape, _) in weights.Checkpoint(directory).found.items()}
  return _with_templates(directory, content, configs_deepseek.from_json(content, shapes))


def load(directory, place=np.asarray):
  """Reads a model directory in either layout. Returns a `Bundle`; raises InputError naming every
  mistake.

  Args:
    directory: the model directory.
    place: function of a `placing.Leaf` that returns the array to use; by default a NumPy array.
      `lambda leaf: leaf` leaves the data in the files until the placement is known; `lambda leaf:
      leaf.placed(sharding)` puts it on devices.
  """
  stored = open_stored(directory)
  leaves = placing.leaves(stored.abstract, stored.entries, stored.read)
  return Bundle(
    stored.config, jax.tree.map(place, leaves), stored.processor, stored.source(), stored.kept_aside
  )


def save(
  directory,
  config,
  params,
  source_dir,
  *,
  dtype='float32',
  guidance=None,
  card='',
  overwrite=False,
  layout='hf',
  kept_aside=None,
):
  """Writes a complete model directory from parameters. Returns the same as `export`.

  Args:
    directory: the target.
    config: `JanusConfig`; its templates come from `source_dir`.
    params: nested dict of arrays, as from `load`.
    source_dir: the model directory that provides tokenizer and processor files.
    dtype: dtype of the weights: 'float32', 'bfloat16' or 'float16'.
    kept_aside: from the `Bundle`, if any.
    guidance, card, overwrite, layout: see `export`.
  """
  leaves = jax.tree.leaves(params)
  if layout == 'showo':
    processor = showo.Processor.from_directory(source_dir, prompt_tokens=config.prompt_tokens)
  else:
    processor = Processor.from_directory(source_dir, config.text.vocab_size)
  # Write the ids of the tokenizer in the same directory.
  config = dataclasses.replace(config, templates=processor.templates)
  shapes = families.family_of(config).shapes(config)
  found = {entry.name: (entry.shape, 'F32') for entry in table.entries(params, layout)}
  if wrong := table.mistakes(
    {entry.name: entry.shape for entry in table.entries(shapes, layout)}, found
  ):
    raise InputError(
      f'the parameters do not fit the config exactly: {"; ".join(wrong)}; pass config and '
      'parameters of one model'
    )
  return export(
    directory,
    layout,
    config,
    processor,
    lambda atom: atom.of_leaf(leaves[atom.leaf]),
    source_dir,
    kept_aside=kept_aside or {},
    dtype=dtype,
    guidance=guidance,
    card=card,
    overwrite=overwrite,
  )


def export(
  directory,
  layout,
  config,
  processor,
  read,
  source_dir,
  *,
  kept_aside,
  dtype=None,
  guidance=None,
  card='',
  beside=None,
  overwrite=False,
):
  """Writes a complete model directory piece by piece: weights, config, tokenizer, processor, card.

  It is written to a temporary folder and moved into place at the end, so `directory` is always
  either the complete old one or the complete new one. Files of other names stay
  (`writing.is_export`).

  Args:
    directory: the target; refused if it exists and is not empty, unless `overwrite`.
    layout: 'hf' or 'deepseek'; for a Show-o, 'showo'.
    config, processor: the model's, with templates.
    read: `table.Atom` -> array.
    source_dir: the model directory, in either layout, that provides tokenizer and processor files.
    kept_aside: name -> array of tensors that only the original layout has; missing ones are written
      as zeros.
    dtype: dtype of the weights: 'float32', 'bfloat16' or 'float16'; None keeps each tensor's own.
    guidance: the guidance weight for generation_config.json; None keeps the source's.
    card: the Markdown body of README.md, or all of it; if empty, a line about the format.
    beside: {name: bytes} of additional files that the card shows.
  Returns:
    The names of the tensors that were written as zeros.
  """
  directory, source_dir = pathlib.Path(directory), pathlib.Path(source_dir)
  check_target(directory, overwrite)
  if dtype is not None and dtype not in DTYPES:
    raise InputError(f'dtype {dtype!r} is unknown; choose one of {sorted(DTYPES)}')
  kind = None if dtype is None else np.dtype(DTYPES[dtype])
  if layout == 'showo':
    # Copy the source's own generation settings, unless the caller sets another guidance.
    if guidance is None:
      settings = files.read_json(source_dir / 'generation_config.json', default={})
      guidance = settings.get('guidance_scale')
    where = showo_parts.Parts(source_dir, source_dir, showo_parts.tokenizer_of(source_dir))
    with files.whole_directory(directory, NOT_WRITABLE, ours=writing.is_export) as aside:
      showo.write(aside, config, processor, read, where, dtype=kind, guidance=guidance, card=card)
      _write_beside(aside, beside)
    return []
  source_layout = configs.layout_of(
    files.read_json(source_dir / 'config.json', default={'model_type': 'janus'})
  )
  sidefiles.check(source_dir, source_layout)
  tensors = [
    _tensor(entry, read, kind) for entry in table.entries(janus.abstract_params(config), layout)
  ]
  widest = _widest(tensor.dtype for tensor in tensors)
  if layout == 'deepseek':
    content = configs_deepseek.to_json(config, widest.name, processor.system_prompt)
  else:
    content = configs.to_json(config, widest.name)
  if processor.template != 'tokens':  # so that readers of the directory use the same template
    content.setdefault(configs_deepseek.OURS, {})['template'] = processor.template
  extra, zeros = _unused(config, layout, kept_aside, kind, widest)
  writing.check_room(directory, tensors + extra)
  with files.whole_directory(directory, NOT_WRITABLE, ours=writing.is_export) as aside:
    aside = pathlib.Path(aside)
    if layout == 'deepseek':
      tensors += extra
    elif extra:
      (aside / KEPT_ASIDE).parent.mkdir()
      writing.write_file(aside / KEPT_ASIDE, extra)
    writing.write(aside, tensors)
    files.write_json(aside / 'config.json', content, indent=2)
    sidefiles.write(aside, layout, source_dir, source_layout, config, processor, guidance)
    sidefiles.write_card(aside, layout, card, source_dir / 'README.md')
    _write_beside(aside, beside)
  return zeros


def _write_beside(directory, beside):
  for name, content in (beside or {}).items():
    (pathlib.Path(directory) / name).write_bytes(content)


def check_target(directory, overwrite):
  """InputError if the target cannot be written, or is not empty and may not be overwritten.

  Overwriting replaces only the files that an export writes.
  """
  files.check_place(directory, '--target')
  directory = pathlib.Path(directory)
  if not overwrite and directory.exists() and any(directory.iterdir()):
    raise InputError(f'{directory} is not empty; choose a new directory, or add --overwrite')


def _tensor(entry, read, kind):
  """The `writing.Tensor` of an entry. kind: NumPy dtype, or None for the dtype of its atoms."""
  if kind is None:
    kind = _widest(read(atom).dtype for atom in entry.atoms)
  return writing.Tensor(entry.name, entry.shape, kind, lambda: [read(atom) for atom in entry.atoms])


def _widest(dtypes):
  """The dtype that represents all of these exactly; float32 for float16 with bfloat16, a case that
  NumPy does not handle.
  """
  return np.dtype(functools.reduce(jax.numpy.promote_types, set(dtypes)))


def _unused(config, layout, kept_aside, kind, widest):
  """(tensors that the model does not use, the names of those written as zeros)."""
  if layout == 'hf' and not kept_aside:
    return [], []
  tensors, zeros = [], []
  for name, shape in table.unused(config.vision, 'deepseek').items():
    if name in kept_aside:
      value = kept_aside[name]
    else:
      value = np.zeros(shape, widest)
      zeros.append(name)
    tensors.append(
      writing.Tensor(name, shape, kind or np.dtype(value.dtype), lambda value=value: [value])
    )
  return tensors, zeros


def _read_content(directory):
  if not directory.is_dir():
    raise InputError(
      f'there is no directory {directory}; check the path, or fetch the model first (hf download '
      'NAME --local-dir DIR)'
    )
  return files.read_json(directory / 'config.json')


def _with_templates(directory, content, config):
  processor = Processor.from_directory(directory, config.text.vocab_size)
  image_id = content.get('image_token_id', processor.templates.image_id)
  if image_id != processor.templates.image_id:
    raise InputError(
      f'image_token_id is {image_id} in {directory}/config.json but '
      f'{processor.templates.image_id} in its tokenizer; fetch the files of one model again'
    )
  return dataclasses.replace(config, templates=processor.templates), processor
