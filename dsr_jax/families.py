"""The backbones by the type of their configuration. A new one is a folder in models/, a reader
of its directories in convert/, and a line here (docs/extending.md).
"""

import dataclasses
from typing import Any

from dsr_jax.models.janus.family import JANUS
from dsr_jax.models.showo.family import SHOWO
from dsr_jax.models.unified import Family, Spec

FAMILIES = (JANUS, SHOWO)


@dataclasses.dataclass
class Model:
  """A loaded model.

  Attributes:
    graphdef: its structure; `nnx.merge(graphdef, params)` is a `UnifiedModel`.
    params: parameters, nested dicts by part.
    config: its sizes, of the family's `config_type`.
    processor: its tokenizer and templates.
    source: {'name', 'fingerprint'} of where it came from.
    family, spec: see `models.unified`.
  """

  graphdef: Any
  params: Any
  config: Any
  processor: Any
  source: dict[str, str]
  family: Family
  spec: Spec


def family_of(config) -> Family:
  """The family of a model's configuration."""
  for family in FAMILIES:
    if isinstance(config, family.config_type):
      return family
  raise TypeError(f'no family for {type(config).__name__}: add one to families.FAMILIES')


def model_of(bundle, name: str) -> Model:
  """What `convert.load` gives -> a `Model`."""
  family = family_of(bundle.config)
  return Model(
    graphdef=family.graphdef(bundle.config),
    params=bundle.params,
    config=bundle.config,
    processor=bundle.processor,
    source={'name': name, 'fingerprint': bundle.source['hash']},
    family=family,
    spec=family.spec(bundle.config),
  )
