"""The record of how a benchmark was answered: by which model, how, and with which versions."""

import dataclasses
import importlib.metadata
from typing import Any

import jax

from dsr_jax import __version__
from dsr_jax.evaluate import protocol
from dsr_jax.evaluate.answering.subject import CROP, Subject

PACKAGES = ('jax', 'jaxlib', 'flax', 'numpy', 'pillow', 'tokenizers')
OF_PICTURES = (
  *('temperature', 'guidance', 'cfg_interval', 'instruction'),
  *('sampling_steps', 'sampling_noise'),
)


def of(
  name: str,
  subject: Subject,
  benchmark: protocol.Drawable | protocol.Asking,
  limit: int,
  table: str = '',
) -> dict[str, Any]:
  """The manifest of a benchmark's folder.

  Args:
    name: of the benchmark, as the user gave it.
    subject: the model.
    benchmark: the benchmark.
    limit: groups per category; 0: all.
    table: md5 of the question table.
  """
  about = benchmark.about
  how = dataclasses.asdict(subject.how)
  settings = {'size': subject.model.spec.image_size, 'limit': limit}
  if isinstance(benchmark, protocol.Drawable):
    how.pop('max_tokens')
    settings |= {'samples': benchmark.samples}
  else:
    if subject.how.best_of == 1:
      how = {key: value for key, value in how.items() if key not in OF_PICTURES}
    settings |= {'table_md5': table, 'crop': CROP, 'max_pictures': subject.model.spec.max_pictures}
  return {
    'benchmark': {'name': name, 'rules': about.source},
    'model': subject.identity,
    'settings': settings | how,
    'role_strings': subject.roles(),
    'family': subject.model.family.name,
    'versions': {
      **{package: importlib.metadata.version(package) for package in PACKAGES},
      'dsr_jax': __version__,
      'device': jax.devices()[0].device_kind,
    },
  }
