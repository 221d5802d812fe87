"""Which evaluators there are and which the user chose: all that is known of them without torch."""

from collections.abc import Sequence
import os
from typing import NamedTuple

from absl import flags

from dsr_jax import files, flag_types
from dsr_jax.errors import InputError

flags.disclaim_key_flags()  # --help lists the flags under the command, not under this module

# What the evaluators leave in a benchmark's folder.
RECORDS, ABOUT, RESULTS = 'records', 'evaluators.json', 'results.jsonl'


class Kind(NamedTuple):
  """An evaluator that the user may choose.

  Attributes:
    architecture: the class of transformers.
    default: the Hub id.
    what: in the flag's help.
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


def check_directories(chosen: dict[str, str]) -> None:
  """InputError for an evaluator's directory of another architecture; needs no torch."""
  for name, place in chosen.items():
    if not os.path.isdir(place):
      continue
    config = files.read_json(os.path.join(place, 'config.json'))
    found = (config.get('architectures') or ['none'])[0]
    if found != KINDS[name].architecture:
      raise InputError(
        f'found a {found} in --evaluator.{name}={place}; expected a {KINDS[name].architecture}; '
        'name an evaluator of that kind'
      )


def chosen_of(f) -> dict[str, str]:
  """The evaluators that flags name."""
  return {name: f[f'evaluator.{name}'].value for name in KINDS if f[f'evaluator.{name}'].value}


def as_flags(chosen: dict[str, str], blip_size: int) -> Sequence[str]:
  """The flags that `chosen_of` reads."""
  return [*(f'--evaluator.{n}={x}' for n, x in chosen.items()), f'--blip_size={blip_size}']


def define_evaluator_flags(f=flags.FLAGS):
  for name, kind in KINDS.items():
    flag_types.define_path(
      f'evaluator.{name}',
      '',
      f'{kind.what}: a directory or a Hub id of a {kind.architecture}; by default {kind.default}.',
      f,
    )
  flags.DEFINE_integer(
    'blip_size',
    0,
    "Side of BLIP's pictures: 0 is the checkpoint's own, 384; 480, the official scorer's, is "
    'interpolated.',
    flag_values=f,
  )
