"""The backbones by the type of their configuration. A new one is a folder in models/, a reader
of its directories in convert/, and a line here (docs/extending.md).
"""

import dataclasses
import os
from typing import Any

from dsr_jax.errors import InputError
from dsr_jax.models.janus.family import JANUS
from dsr_jax.models.unified import Family, Spec

FAMILIES = (JANUS,)


@dataclasses.dataclass
class Model:
  """A loaded model.

  Attributes:
    graphdef: its structure; `nnx.merge(graphdef, params)` is a `UnifiedModel`.
    params: parameters, nested dicts by part.
    config: its sizes, of the family's `config_type`.
    processor: its tokenizer and templates.
    source: {'name', 'directory', 'fingerprint'} of where it came from.
    family, spec: see `models.unified`.
    template: what frames its prompts, one of the family's; '' where it has no choice.
  """

  graphdef: Any
  params: Any
  config: Any
  processor: Any
  source: dict[str, str]
  family: Family
  spec: Spec
  template: str = ''


def family_of(config) -> Family:
  """The family of a model's configuration."""
  for family in FAMILIES:
    if isinstance(config, family.config_type):
      return family
  raise TypeError(f'no family for {type(config).__name__}: add one to families.FAMILIES')


def with_template(bundle, template: str):
  """A bundle or a `Model` that frames its prompts by `template`; '' leaves it as it is.

  Errors: InputError for another family's template.
  """
  if not template:
    return bundle
  family = family_of(bundle.config)
  if template not in family.templates:
    raise InputError(
      f'found method.template={template} with a model of the family {family.name}; expected '
      f'{" or ".join(family.templates) or "none"}; change --template or method.template'
    )
  processor = bundle.processor.with_template(template)
  config = dataclasses.replace(bundle.config, templates=processor.templates)
  changes = {'config': config, 'processor': processor}
  if isinstance(bundle, Model):
    changes |= {'graphdef': family.graphdef(config), 'template': template}
  return dataclasses.replace(bundle, **changes)


def template_of(bundle) -> str:
  """What frames the prompts of a bundle; '' where its family has no choice."""
  return bundle.processor.template if family_of(bundle.config).templates else ''


def model_of(bundle, name: str) -> Model:
  """What `convert.load` gives -> a `Model`."""
  family = family_of(bundle.config)
  return Model(
    graphdef=family.graphdef(bundle.config),
    params=bundle.params,
    config=bundle.config,
    processor=bundle.processor,
    source={
      'name': name,
      'directory': os.path.abspath(bundle.source['name']),
      'fingerprint': bundle.source['hash'],
    },
    family=family,
    spec=family.spec(bundle.config),
    template=template_of(bundle),
  )
