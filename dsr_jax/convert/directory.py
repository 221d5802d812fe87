"""A whole model directory, in and out, in either layout."""

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

# Tensors of the original layout that nothing reads lie here in the Hugging Face layout, so that the
# way back is exact. A folder of its own, because some programs read every *.safetensors beside
# config.json.
KEPT_ASIDE = pathlib.Path('kept_aside') / 'tensors.safetensors'
NOT_WRITABLE = (
  'found {directory} not writable ({error}); expected room and permission; choose another place'
)
DTYPES = dict(float32=np.float32, bfloat16=ml_dtypes.bfloat16, float16=np.float16)


@dataclasses.dataclass(frozen=True)
class Bundle:
  """A model read from a directory.

  config: with the templates of its tokenizer. params: nested dict of float32 leaves, transformer
  layers stacked.
  source: dict(name: the directory as given, hash: sha256 of the weight files). kept_aside: name ->
  array of the tensors of the original layout that no forward pass reads, as they were; empty where
  the source has none.
  """

  config: Any  # of its family's `config_type`
  params: Any
  processor: Any
  source: dict[str, str]
  kept_aside: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class Stored(stored_lib.Stored):
  """A Janus, in either of its layouts."""

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
    # A head that stands in the file is used, whatever the config says; the embedding serves only
    # where there is none.
    head, embed = table.HEAD[self.layout], table.EMBED[self.layout]
    if head not in found and embed in found and self._tied:
      found[head] = found[embed]
    if wrong := table.mistakes(want | unused, found):
      raise InputError(
        f'found tensors in {self.directory} that do not fit its config.json: {"; ".join(wrong)}; '
        'expected '
        f'exactly the {len(want | unused)} tensors of this model; fetch weights and config.json of '
        'one '
        'model'
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
        f'found tensors in {path} that do not fit the model: {"; ".join(wrong)}; expected those '
        'which were '
        'kept aside when the original layout was converted; convert it again, or remove that file'
      )
    return {name: value for name, (_, value) in tensors.items()}


class Reader(NamedTuple):
  """Of the directories of a family.

  is_one: whether an object of config.json is such a model's. open: a directory -> its `Stored`.
  settings: an object of config.json -> how the family's own samples were drawn and its pictures
  read, fields of `config.Method`.
  """

  is_one: Callable[[dict], bool]
  open: Callable[[Any], stored_lib.Stored]
  settings: Callable[[dict], dict]


READERS = (
  Reader(showo_parts.is_showo, showo.Stored, showo_parts.settings),
  # What is neither is refused as a Janus that lacks something. Janus-Pro's own samples were drawn
  # at 5, and its pictures padded.
  Reader(lambda content: True, Stored, lambda content: dict(guidance=5.0, crop='pad')),
)


def reader_of(content) -> Reader:
  """The reader of a model directory, by an object of its config.json."""
  return next(reader for reader in READERS if reader.is_one(content))


def open_stored(directory) -> stored_lib.Stored:
  """The `Stored` of a model directory of any family; see there."""
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
    place: function of a `placing.Leaf`, what becomes of each; by default a NumPy array. `lambda
      leaf: leaf` leaves all in the files, to be read when it is known where to; `lambda leaf:
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
  """Writes a complete model directory from parameters. See `export`; returns what it returns.

  Args:
    directory: the target.
    config: `JanusConfig`; its templates are taken from `source_dir`.
    params: nested dict of arrays as `load` gives.
    source_dir: the model directory that tokenizer and processor files come from.
    dtype: of the weights: 'float32', 'bfloat16' or 'float16'.
    kept_aside: of the `Bundle`, if any.
    guidance, card, overwrite, layout: see `export`.
  """
  leaves = jax.tree.leaves(params)
  if layout == 'showo':
    processor = showo.Processor.from_directory(source_dir, prompt_tokens=config.prompt_tokens)
  else:
    processor = Processor.from_directory(source_dir, config.text.vocab_size)
  # The ids written are those of the tokenizer beside them.
  config = dataclasses.replace(config, templates=processor.templates)
  shapes = families.family_of(config).shapes(config)
  found = {entry.name: (entry.shape, 'F32') for entry in table.entries(params, layout)}
  if wrong := table.mistakes(
    {entry.name: entry.shape for entry in table.entries(shapes, layout)}, found
  ):
    raise InputError(
      f'found parameters that do not fit the config: {"; ".join(wrong)}; expected exactly its '
      'tensors; '
      'pass config and parameters of one model'
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
  """Writes a complete model directory, a piece of a tensor at a time: weights, config, tokenizer,
  processor, card.

  It is written aside and takes its place at the end: at every moment `directory` is the old one or
  the new one, each whole. Files of other names stay (`writing.is_export`).

  Args:
    directory: the target; refused if it exists and is not empty, unless `overwrite`.
    layout: 'hf' or 'deepseek'; of a Show-o 'showo'.
    config, processor: the model's, with templates.
    read: `table.Atom` -> array.
    source_dir: the model directory, in either layout, that tokenizer and processor files come from.
    kept_aside: name -> array of tensors that only the original layout has; where they are lacking
      it gets zeros.
    dtype: of the weights: 'float32', 'bfloat16' or 'float16'; None keeps that of each.
    guidance: the guidance weight that generation_config.json names; None keeps the source's.
    card: Markdown body of README.md, or all of it; a line about the format if empty.
    beside: {name: bytes} of further files, which the card shows.
  Returns:
    The names of the tensors made as zeros.
  """
  directory, source_dir = pathlib.Path(directory), pathlib.Path(source_dir)
  check_target(directory, overwrite)
  if dtype is not None and dtype not in DTYPES:
    raise InputError(f'found dtype {dtype!r}; expected one of {sorted(DTYPES)}; choose one')
  kind = None if dtype is None else np.dtype(DTYPES[dtype])
  if layout == 'showo':
    # With the source's own file of generation settings, where nobody says another guidance.
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
  if processor.template != 'tokens':  # whoever reads the directory asks in the same words
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

  Of one that is overwritten only what an export makes is replaced.
  """
  files.check_place(directory, '--target')
  directory = pathlib.Path(directory)
  if not overwrite and directory.exists() and any(directory.iterdir()):
    raise InputError(
      f'found {directory} not empty; expected a new directory; choose another, or add --overwrite'
    )


def _tensor(entry, read, kind):
  """The `writing.Tensor` of an entry; kind: numpy dtype, or None for that of its atoms."""
  if kind is None:
    kind = _widest(read(atom).dtype for atom in entry.atoms)
  return writing.Tensor(entry.name, entry.shape, kind, lambda: [read(atom) for atom in entry.atoms])


def _widest(dtypes):
  """The type that holds every one of these exactly; float32 for float16 with bfloat16, which NumPy
  cannot say.
  """
  return np.dtype(functools.reduce(jax.numpy.promote_types, set(dtypes)))


def _unused(config, layout, kept_aside, kind, widest):
  """(tensors that the model does not use, names of those which had to be made as zeros)."""
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
      f'found no directory {directory}; expected a model directory; check the path, or fetch the '
      'model '
      'first (hf download NAME --local-dir DIR)'
    )
  return files.read_json(directory / 'config.json')


def _with_templates(directory, content, config):
  processor = Processor.from_directory(directory, config.text.vocab_size)
  image_id = content.get('image_token_id', processor.templates.image_id)
  if image_id != processor.templates.image_id:
    raise InputError(
      f'found image_token_id {image_id} in {directory}/config.json but '
      f'{processor.templates.image_id} '
      'in its tokenizer; expected files of one model; fetch them again'
    )
  return dataclasses.replace(config, templates=processor.templates), processor
