"""Which evaluators exist and which ones the user chose. Needs no torch."""

from collections.abc import Sequence
import os
from typing import NamedTuple

from absl import flags

from dsr_jax import files, flag_types, inputs
from dsr_jax.errors import InputError

flags.disclaim_key_flags()  # --help lists the flags under the command, not under this module

# What the evaluators write into a benchmark's folder.
RECORDS, ABOUT, RESULTS = 'records', 'evaluators.json', 'results.jsonl'
BLIP_PATCH = 16  # pixels


class Kind(NamedTuple):
  """An evaluator that the user may choose.

  Attributes:
    architecture: its class in transformers.
    default: its Hub id.
    what: its use, for the flag's help.
  """

  architecture: str
  default: str
  what: str


KINDS = {
  'mask2former': Kind(
    'Mask2FormerForUniversalSegmentation',
    'facebook/mask2former-swin-small-coco-instance',
    "GenEval's detector",
  ),
  'clip_colors': Kind('CLIPModel', 'openai/clip-vit-large-patch14', "GenEval's colors"),
  'blip': Kind(
    'BlipForQuestionAnswering',
    'Salesforce/blip-vqa-capfilt-large',
    'T2I-CompBench: color, shape, texture, complex',
  ),
  'clip': Kind('CLIPModel', 'openai/clip-vit-base-patch32', 'T2I-CompBench: non_spatial, complex'),
  'owlv2': Kind(
    'Owlv2ForObjectDetection',
    'google/owlv2-base-patch16-ensemble',
    'T2I-CompBench: spatial, numeracy, complex',
  ),
}


def check(chosen: dict[str, str], blip_size: int) -> None:
  """InputError for a missing evaluator, for a directory with another architecture, and for a size
  that BLIP cannot take. Needs no torch.
  """
  if blip_size < 0 or blip_size % BLIP_PATCH:
    raise InputError(
      f'--blip_size is {blip_size}; set it to 0 or a multiple of {BLIP_PATCH}, such as 480'
    )
  for name, place in chosen.items():
    if not os.path.isdir(place):
      if inputs.is_hub_id(place):
        continue
      raise InputError(
        f'--evaluator.{name}={inputs.shown(place)} is neither a directory nor a Hub id; give one '
        'of these (a Hub id is OWNER/NAME)'
      )
    config = files.read_json(os.path.join(place, 'config.json'))
    found = (config.get('architectures') or ['none'])[0]
    if found != KINDS[name].architecture:
      raise InputError(
        f'--evaluator.{name}={place} holds a {found}; name a directory with a '
        f'{KINDS[name].architecture}'
      )


def chosen_of(f) -> dict[str, str]:
  """The evaluators that the flags name."""
  return {name: f[f'evaluator.{name}'].value for name in KINDS if f[f'evaluator.{name}'].value}


def as_flags(chosen: dict[str, str], blip_size: int) -> Sequence[str]:
  """The flags that `chosen_of` reads."""
  return [*(f'--evaluator.{n}={x}' for n, x in chosen.items()), f'--blip_size={blip_size}']


def define_evaluator_flags(f=flags.FLAGS):
  for name, kind in KINDS.items():
    flag_types.define_path(
      f'evaluator.{name}',
      '',
      f'{kind.what}: directory or Hub id of a {kind.architecture} (default: {kind.default}).',
      f,
    )
  flags.DEFINE_integer(
    'blip_size',
    0,
    "Side of BLIP's input images. 0: the checkpoint's own, 384. 480: the official scorer's, with "
    'interpolated position embeddings.',
    flag_values=f,
  )
