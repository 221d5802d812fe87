"""Configurations as JSON: writes them, reads those of earlier versions, and compares them.

Of the package, it imports only `config` and `errors`, so checkpoints and model files can use it.
"""

import copy
import dataclasses
import difflib
import json
import math

from dsr_jax import config as config_lib
from dsr_jax.errors import InputError

MOST = 2**32  # the limit of whole numbers

# Keys of earlier versions, as in saved runs -> current keys.
RENAMED = {
  'method.ratio_low': 'method.grpo.ratio_low',
  'method.ratio_high': 'method.grpo.ratio_high',
  'method.sequence_low': 'method.gspo.ratio_low',
  'method.sequence_high': 'method.gspo.ratio_high',
  'method.cispo_max': 'method.cispo.ratio_max',
  'method.dpo_beta': 'method.dpo.beta',
  'method.lora_rank': 'method.lora.rank',
  'method.swap_every': 'method.separate.swap_every',
  'method.clip_model': 'method.clip_reward.model',
}
# Values of earlier versions -> current equivalents: with a partner, 'policy' means the partner.
RENAMED_VALUES = {'method.scorer': {'partner': 'policy'}}


def to_json(config):
  """`Config` -> a nested dict of JSON values."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def flat(tree, prefix=''):
  """Nested dict -> {'method.grpo.ratio_low': value}."""
  out = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      out |= flat(value, f'{prefix}{key}.')
    else:
      out[f'{prefix}{key}'] = value
  return out


def completed(saved):
  """A saved configuration, or parts of one, as the current version would save it.

  Renames old keys and values. Keys newer than the run get values that reproduce it: their defaults,
  except the learning rate of adapters, which was the general one.
  """
  saved = _with_new_names(saved)
  method = saved.get('method')
  if isinstance(method, dict) and method.get('trainable') == 'lora' and 'learning_rate' in method:
    method['lora'] = {'learning_rate': method['learning_rate']} | method.get('lora', {})
  defaults = to_json(config_lib.Config())
  return {part: _over(defaults.get(part), values) for part, values in saved.items()}


def saved_method(values):
  """The part `method` of a saved configuration -> `Method`."""
  return build(config_lib.Method, of_run(values), 'config.method')


def of_run(values):
  """The part `method` of a run's saved configuration, with the current keys."""
  method = completed({'method': values})['method']
  # Runs older than this key used the only template of their time.
  return method | {'template': method['template'] or 'tokens'}


def differences(old, new, prefix=''):
  """Lines `key: old -> new` for two nested dicts of JSON values; an absent key counts."""
  lines = []
  for key in sorted(old.keys() | new.keys()):
    a = old.get(key, '(absent)')
    b = new.get(key, '(absent)')
    if isinstance(a, dict) and isinstance(b, dict):
      lines += differences(a, b, f'{prefix}{key}.')
    elif a != b:
      lines.append(f'{prefix}{key}: {a!r} -> {b!r}')
  return lines


def _over(defaults, values):
  """`values`, completed with `defaults` at every depth."""
  if not isinstance(defaults, dict) or not isinstance(values, dict):
    return values
  return defaults | {key: _over(defaults.get(key), value) for key, value in values.items()}


def _with_new_names(saved):
  tree = copy.deepcopy(saved)
  for old, new in RENAMED.items():
    _, name = old.split('.')
    group = tree.get('method', {})
    if name in group:
      _, inner, leaf = new.split('.')
      group.setdefault(inner, {})[leaf] = group.pop(name)
  for key, values in RENAMED_VALUES.items():
    part, name = key.split('.')
    group = tree.get(part, {})
    if name in group:
      group[name] = values.get(group[name], group[name])
  return tree


def refuse_renamed(key):
  """InputError for a key of an earlier version; `key` may be in a group (`run.method...`)."""
  for old, new in RENAMED.items():
    if key == old or key.endswith(f'.{old}'):
      raise InputError(f'{old} is now {new}')


def build(cls, values, where):
  """Consumes every key of `values` into the dataclass `cls`."""
  if not isinstance(values, dict):
    raise InputError(
      f'{where} is a group of keys, not a value ({values!r}); set its keys with {where}.KEY=VALUE'
    )
  fields = {f.name: f for f in dataclasses.fields(cls)}
  for key in values:
    if key in fields:
      continue
    refuse_renamed(f'{where}.{key}')
    near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
    hint = f'; did you mean {where}.{near[0]}' if near else ''
    raise InputError(f'{where}.{key} is not a key; the keys are {", ".join(fields)}{hint}')
  missing = [key for key in fields if key not in values]
  if missing:
    raise InputError(
      f'{where}.{missing[0]} is missing; set every key, starting from dsr_jax.config.defaults()'
    )
  return cls(
    **{key: _value(field.type, values[key], f'{where}.{key}') for key, field in fields.items()}
  )


def _value(kind, value, name):
  """A value of the field's type; accepts an int for a float."""
  if dataclasses.is_dataclass(kind):
    return build(kind, value, name)
  if kind is float and type(value) is int:
    value = float(value) if abs(value) < 2**1023 else math.inf
  if type(value) is not kind:
    raise InputError(f'{name} is {value!r}; set it to a value of type {kind.__name__}')
  if kind is int and abs(value) > MOST:
    raise InputError(f'{name} is {str(value)[:30]}; set it to at most {MOST}')
  if kind is float and not math.isfinite(value):
    raise InputError(f'{name} is {value}; set it to a finite number')
  return value
