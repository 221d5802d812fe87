"""Reads and writes a complete Show-o, in the layout that the original code reads (`parts`)."""

import dataclasses
import hashlib
import pathlib

import numpy as np

from dsr_jax import files
from dsr_jax.convert import sidefiles, table, weights, writing
from dsr_jax.convert import stored as stored_lib
from dsr_jax.convert.showo import configs, parts
from dsr_jax.errors import InputError
from dsr_jax.models.showo import magvit
from dsr_jax.models.showo import model as showo
from dsr_jax.models.showo.config import TEMPLATES
from dsr_jax.models.showo.processor import EOS, PAD, Processor

# The original loader reads these two names, from a single file.
FORMS = (
  ('pytorch_model.safetensors', 'pytorch_model.safetensors.index.json'),
  ('pytorch_model.bin', 'pytorch_model.bin.index.json'),
)
WEIGHTS = FORMS[0][0]
# Buffers in the quantizer's file that follow from the number of bits.
EMBEDDING, POWERS = 'quantize.embedding', 'quantize.power_vals'
# Copied from the text tokenizer; tokenizer.json is written with Show-o's tokens added.
_CARRIED = ('tokenizer_config.json', 'special_tokens_map.json', 'vocab.json', 'merges.txt')


class _Both:
  """The model's checkpoint and the image tokenizer's as one."""

  def __init__(self, *checkpoints):
    self._checkpoints = checkpoints
    self.directory = checkpoints[0].directory
    self.found = {name: found for c in checkpoints for name, found in c.found.items()}

  def read(self, name):
    return next(c for c in self._checkpoints if name in c.found).read(name)

  def check_finite(self, names):
    """Reads the named tensors. InputError naming those with a NaN or an infinity."""
    for checkpoint in self._checkpoints:
      checkpoint.check_finite(name for name in names if name in checkpoint.found)

  def digest(self):
    """sha256 of the digests of both."""
    digests = ''.join(c.digest() for c in self._checkpoints)
    return hashlib.sha256(digests.encode()).hexdigest()


class Stored(stored_lib.Stored):
  """A Show-o directory, including the image tokenizer's tensors."""

  layout = 'showo'

  def __init__(self, directory):
    self.directory = pathlib.Path(directory)
    self.parts = parts.find(directory)
    content = files.read_json(self.directory / 'config.json')
    own, theirs = (
      weights.Checkpoint(path, forms=FORMS) for path in (self.parts.model, self.parts.magvit)
    )
    twice = sorted(own.found.keys() & theirs.found.keys())
    if twice:
      raise InputError(
        f'the tensor {twice[0]} is in both {self.parts.model} and {self.parts.magvit}; fetch both '
        'again'
      )
    self.checkpoint = _Both(own, theirs)
    config = configs.from_json(content, own.found, theirs.found, self.directory)
    self.processor = read_processor(self.parts, content, config)
    self.config = dataclasses.replace(config, templates=self.processor.templates)
    self.abstract = showo.abstract_params(self.config)
    self.entries = table.entries(self.abstract, 'showo')
    self.kept_aside = {}
    self._check()

  def _check(self):
    want = {entry.name: entry.shape for entry in self.entries}
    found = dict(self.checkpoint.found)
    kept = {name: value.shape for name, value in buffers(self.config.vq.bits).items()}
    powers = found.get(POWERS)
    if powers is not None and powers[1] == 'I64':  # the only tensor that is not float
      found[POWERS] = (powers[0], 'F32')
    if wrong := table.mistakes(want | kept, found):
      raise InputError(
        f'the tensors in {self.parts.model} and {self.parts.magvit} do not fit a Show-o: '
        f'{"; ".join(wrong)}; fetch both again, which have exactly {len(want | kept)} tensors'
      )


def read_processor(where: parts.Parts, content, config) -> Processor:
  """The processor of a model with these sizes. InputError if the tokenizer is another model's."""
  template = (content.get('dsr_jax') or {}).get('template', TEMPLATES[0])
  if template not in TEMPLATES:
    raise InputError(
      f'the template in {where.model}/config.json is {str(template)[:60]!r}, not '
      f'{" or ".join(TEMPLATES)}; convert the model again'
    )
  processor = Processor.from_directory(where.tokenizer, template, config.prompt_tokens)
  if processor.vocab_size != config.text.vocab_size:
    raise InputError(
      f'the tokenizer in {where.tokenizer} has {processor.vocab_size} tokens, but the model in '
      f'{where.model} has {config.text.vocab_size}; fetch the tokenizer of the model again'
    )
  return processor


def buffers(bits: int) -> dict[str, np.ndarray]:
  """The quantizer's own tensors, which this project never reads."""
  codes = np.arange(2**bits)
  return {
    EMBEDDING: np.asarray(magvit.signs_of(codes, bits)),
    POWERS: 2 ** np.arange(bits - 1, -1, -1, dtype=np.int64),
  }


def write(
  directory, config, processor, read, where: parts.Parts, *, dtype=None, guidance=None, card=''
):
  """Writes everything into an empty directory.

  config, processor: with templates. read: `table.Atom` -> array. where: the parts of the source,
  for the tokenizer files and the card. dtype: NumPy dtype of all weights; None keeps each tensor's
  own. guidance: the guidance for generation_config.json; None: none.
  """
  directory = pathlib.Path(directory)
  own, theirs = [], []
  for entry in table.entries(showo.abstract_params(config), 'showo'):
    (own if entry.name.startswith('showo.') else theirs).append(entry)

  def tensors(entries):
    return [
      writing.Tensor(
        e.name,
        e.shape,
        dtype or np.dtype(read(e.atoms[0]).dtype),
        lambda e=e: [read(e.atoms[0])],
      )
      for e in entries
    ]

  kept = [
    writing.Tensor(name, value.shape, value.dtype, lambda value=value: [value])
    for name, value in buffers(config.vq.bits).items()
  ]
  model, image_tokenizer = tensors(own), tensors(theirs) + kept
  writing.check_room(directory, model + image_tokenizer)
  writing.write_file(directory / WEIGHTS, model)
  (directory / parts.MAGVIT).mkdir()
  writing.write_file(directory / parts.MAGVIT / WEIGHTS, image_tokenizer)
  files.write_json(directory / parts.MAGVIT / 'config.json', configs.magvit_json(), indent=2)
  write_tokenizer(directory, processor, where.tokenizer)
  if guidance is not None:
    files.write_json(directory / 'generation_config.json', dict(guidance_scale=guidance), indent=2)
  sidefiles.write_card(directory, 'showo', card, where.model / 'README.md')
  files.write_json(directory / 'config.json', configs.to_json(config, processor), indent=2)


def write_tokenizer(directory, processor, source):
  """Writes tokenizer.json with Show-o's tokens added, and the other tokenizer files of `source`."""
  for name in _CARRIED if source != directory else ():
    if (source / name).is_file():
      (directory / name).write_bytes((source / name).read_bytes())
  processor.tokenizer.backend_tokenizer.save(str(directory / 'tokenizer.json'))
  if not (directory / 'tokenizer_config.json').is_file():
    tokens = dict(bos_token=EOS, eos_token=EOS, unk_token=EOS, pad_token=PAD)
    own = dict(tokens, tokenizer_class='PreTrainedTokenizerFast', add_prefix_space=False)
    files.write_json(directory / 'tokenizer_config.json', own, indent=2)
