"""The model families, by the type of their configuration. To add one, add a folder in models/, a
reader of its directories in convert/, and a line here (docs/extending.md).
"""

import dataclasses
import operator
import os
from typing import Any

from dsr_jax.errors import InputError
from dsr_jax.models.janus.family import JANUS
from dsr_jax.models.showo.family import SHOWO
from dsr_jax.models.unified import Family, Spec, named

FAMILIES = (JANUS, SHOWO)


@dataclasses.dataclass
class Model:
  """A loaded model.

  Attributes:
    graphdef: its structure; `nnx.merge(graphdef, params)` is a `UnifiedModel`.
    params: parameters, nested dicts by part.
    config: its sizes, of the family's `config_type`.
    processor: its tokenizer and templates.
    source: {'name', 'directory', 'fingerprint'} of its origin.
    family, spec: see `models.unified`.
    template: one of the family's templates, which frames its prompts; '' if the family has no
      choice.
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
  """A bundle or a `Model` whose prompts use `template`; '' leaves it unchanged.

  InputError for another family's template.
  """
  if not template:
    return bundle
  family = family_of(bundle.config)
  if template not in family.templates:
    raise InputError(
      f'method.template={template} is not a template of the family {family.name}, which has '
      f'{" or ".join(family.templates) or "none"}; change --template or method.template'
    )
  processor = bundle.processor.with_template(template)
  config = dataclasses.replace(bundle.config, templates=processor.templates)
  changes = {'config': config, 'processor': processor}
  if isinstance(bundle, Model):
    changes |= {'graphdef': family.graphdef(config), 'template': template}
  return dataclasses.replace(bundle, **changes)


def template_of(bundle) -> str:
  """The template of a bundle's prompts; '' if its family has no choice."""
  return bundle.processor.template if family_of(bundle.config).templates else ''


def model_of(bundle, name: str, method=None) -> Model:
  """The result of `convert.load` -> a `Model`.

  method: from a `locate.Source` or a run; gives the number of steps to a sampler with steps.
  """
  family = family_of(bundle.config)
  model = Model(
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
  return model if method is None else drawn_as(model, method)


# Settings that take the model's own values.


def settled(model: Model, config):
  """(model, config) with the model's own values filled into `config`, and the configured sampler
  settings in the model.

  Raises:
    InputError: for values that the model's family does not support.
  """
  check(model.config, config)
  if not model.spec.sampling_steps:
    return model, config
  model = drawn_as(model, config.method)
  return model, dataclasses.replace(config, method=named(model.spec, config.method))


def check(model_config, config):
  """InputError for configuration values that a model's family does not support."""
  family = family_of(model_config)
  spec = family.spec(model_config)
  for key in family.only:
    check_value(family, key, operator.attrgetter(key)(config), config.model)
  if config.method.credit == 'attribution' and spec.reads != 'pixels':
    raise InputError(
      f'method.credit=attribution does not fit {config.model}, a {family.name}, which does not '
      'read pixels; use another value'
    )
  if spec.prompt_tokens and config.data.max_prompt_tokens > spec.prompt_tokens:
    raise InputError(
      f'data.max_prompt_tokens is {config.data.max_prompt_tokens}, but prompts of {config.model}, '
      f'a {family.name}, have at most {spec.prompt_tokens} tokens; set it to no more than that'
    )


def check_value(family: Family, key: str, value, name: str):
  """InputError unless a family supports the value of a key. name: the model's name."""
  values, why = family.only.get(key, ((value,), ''))
  if value not in values:
    expected = values[0] if values[0] != '' else "''"
    raise InputError(
      f'{key}={value} does not fit {name}, a {family.name}, which {why}; set it to {expected}, or '
      f'leave {key} out'
    )


def sizes_as_drawn(model_config, method):
  """A model configuration whose sampler uses the steps and the noise of a `config.Method`."""
  family = family_of(model_config)
  method = named(family.spec(model_config), method)
  return family.drawn_as(model_config, method.sampling_steps, method.sampling_noise)


def drawn_as(model: Model, method) -> Model:
  """The model with a sampler that uses the steps and the noise of a `config.Method`."""
  config = sizes_as_drawn(model.config, method)
  if config == model.config:
    return model
  return dataclasses.replace(
    model,
    config=config,
    graphdef=model.family.graphdef(config),
    spec=model.family.spec(config),
  )
