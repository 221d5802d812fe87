"""A whole model directory in the Hugging Face layout, in and out."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from dsr_jax.convert import configs, table, weights
from dsr_jax.errors import InputError
from dsr_jax.models import janus
from dsr_jax.models.config import JanusConfig
from dsr_jax.processor import Processor, read_json

# What belongs to a model directory beside config.json and the weights; copied as it is where it exists.
SIDE_FILES = ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json',
              'tokenizer.model', 'chat_template.jinja', 'chat_template.json', 'processor_config.json',
              'preprocessor_config.json', 'generation_config.json', 'LICENSE', 'LICENSE.md')
_NEEDED = ('tokenizer.json', 'tokenizer_config.json', 'processor_config.json', 'preprocessor_config.json',
           'generation_config.json')


@dataclasses.dataclass(frozen=True)
class Bundle:
  """A model read from a directory.

  config: with the templates of its tokenizer. params: nested dict of float32 numpy arrays, transformer layers stacked.
  source: dict(name: the directory as given, hash: sha256 of the weight files).
  """
  config: JanusConfig
  params: Any
  processor: Processor
  source: dict[str, str]


def read_config(directory):
  """config.json and tokenizer of a model directory -> (`JanusConfig` with templates, `Processor`)."""
  directory = pathlib.Path(directory)
  if not directory.is_dir():
    raise InputError(f'found no directory {directory}; expected a model directory; check the path, or fetch the model '
                     'first (hf download NAME --local-dir DIR)')
  content = read_json(directory / 'config.json')
  config = configs.from_json(content)
  processor = Processor.from_directory(directory, config.text.vocab_size)
  image_id = content.get('image_token_id', processor.templates.image_id)
  if image_id != processor.templates.image_id:
    raise InputError(f'found image_token_id {image_id} in {directory}/config.json but {processor.templates.image_id} '
                     'in its tokenizer; expected files of one model; fetch them again')
  return dataclasses.replace(config, templates=processor.templates), processor


def load(directory):
  """Reads a model directory in the Hugging Face layout. Returns a `Bundle`; raises InputError naming every mistake."""
  directory = pathlib.Path(directory)
  config, processor = read_config(directory)
  abstract = _abstract(config)
  wanted = table.entries(abstract)
  tied = read_json(directory / 'config.json').get('tie_word_embeddings', True)
  with weights.open_checkpoint(directory) as checkpoint:
    names = {}
    found = dict(checkpoint.found)
    # A head that stands in the file is used, whatever the config says; the embedding serves only where there is none.
    if table.HEAD not in found and table.EMBED in found and tied:
      names[table.HEAD] = table.EMBED
      found[table.HEAD] = found[table.EMBED]
    if wrong := table.mistakes(wanted, found):
      raise InputError(f'found tensors in {directory} that do not fit its config.json: {"; ".join(wrong)}; expected '
                       f'exactly the {len(wanted)} tensors of this model; fetch weights and config.json of one model')
    params = table.assemble(abstract, wanted, lambda name: checkpoint.read(names.get(name, name)))
    source = dict(name=str(directory), hash=checkpoint.digest())
  return Bundle(config, params, processor, source)


def save(directory, config, params, source_dir, *, dtype='float32', guidance=None, card='',
         overwrite=False):
  """Writes a complete model directory: weights, config.json, tokenizer, processor and generation files, model card.

  It is written aside and renamed at the end, so that `directory` either is whole or does not exist.

  Args:
    directory: the target; refused if it exists and is not empty, unless `overwrite`.
    config: `JanusConfig`; its templates are taken from `source_dir`.
    params: nested dict of arrays as `load` gives.
    source_dir: where tokenizer and processor files are copied from.
    dtype: of the weights: 'float32', 'bfloat16' or 'float16'.
    guidance: the guidance weight that generation_config.json names; None keeps the source's.
    card: Markdown body of README.md; a few lines about the format if empty.
  """
  directory, source_dir = pathlib.Path(directory), pathlib.Path(source_dir)
  if directory.exists() and (not directory.is_dir() or any(directory.iterdir())) and not overwrite:
    raise InputError(f'found {directory} not empty; expected a new directory; choose another or ask to overwrite')
  lacking = [name for name in _NEEDED if not (source_dir / name).is_file()]
  if lacking:
    raise InputError(f'found {source_dir} without {", ".join(lacking)}; expected the tokenizer and processor files of '
                     'a model directory; check the path')
  templates = Processor.from_directory(source_dir, config.text.vocab_size).templates
  config = dataclasses.replace(config, templates=templates)  # the ids written are those of the tokenizer beside them
  wanted = _checked_entries(config, params)
  aside = directory.parent / f'.{directory.name}.partial-{os.getpid()}'
  try:
    aside.mkdir(parents=True)
    weights.write(aside, wanted, jax.tree.leaves(params), dtype)
    (aside / 'config.json').write_text(json.dumps(configs.to_json(config, dtype), indent=2) + '\n', encoding='utf-8')
    for name in SIDE_FILES:
      if (source_dir / name).is_file():
        shutil.copyfile(source_dir / name, aside / name)
    if guidance is not None:
      settings = dict(read_json(aside / 'generation_config.json'), guidance_scale=guidance)
      (aside / 'generation_config.json').write_text(json.dumps(settings, indent=2) + '\n', encoding='utf-8')
    (aside / 'README.md').write_text(_card(card), encoding='utf-8')
    _replace(aside, directory)
  except OSError as e:
    raise InputError(f'found {directory} not writable ({e}); expected room and permission for '
                     f'{_megabytes(params)} MB; choose another place') from e
  finally:
    shutil.rmtree(aside, ignore_errors=True)


def _abstract(config):
  """Shapes of the parameters; tracing the model costs seconds, and they do not depend on the templates."""
  return _abstract_of(dataclasses.replace(config, templates=None))


_abstract_of = functools.lru_cache(maxsize=8)(janus.abstract_params)


def _checked_entries(config, params):
  """Entries of the parameters; raises InputError where they are not this config's."""
  wanted = table.entries(_abstract(config))
  found = {entry.name: (entry.shape, 'F32') for entry in table.entries(params)}
  if wrong := table.mistakes(wanted, found):
    raise InputError(f'found parameters that do not fit the config: {"; ".join(wrong)}; expected exactly its tensors; '
                     'pass config and parameters of one model')
  return wanted


def _replace(aside, directory):
  """Renames `aside` to `directory`; an old one goes away only after the new one stands."""
  old = directory.parent / f'.{directory.name}.old-{os.getpid()}'
  if directory.exists():
    directory.rename(old)
  try:
    aside.rename(directory)
  except OSError:
    if old.exists():
      old.rename(directory)
    raise
  shutil.rmtree(old, ignore_errors=True)


def _megabytes(params):
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params)) * 4 >> 20


def _card(body):
  """README.md: the header the Hub reads, then the body."""
  header = '---\nlibrary_name: transformers\npipeline_tag: any-to-any\ntags:\n- janus\n---\n\n'
  return header + (body or '# Janus\n\nA Janus model written by dsr_jax; '
                   '`transformers.JanusForConditionalGeneration.from_pretrained` reads it.\n')
