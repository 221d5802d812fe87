"""The configuration: every key there is, what it means, what it may be.

`configs/*.py` build a locked `ConfigDict`; here it becomes frozen dataclasses, once, at the border.
Each default stands in one place, on the line of its field. `method`, `data` and `model` decide what
is learned, so a resumed run must have the same; `system` and `eval` decide how it is computed and
what is watched, and may change.
"""

import dataclasses
import difflib
import importlib
import importlib.util
import json
import math
import os

import ml_collections

from dsr_jax.errors import InputError

TASKS = ('unified', 'generation', 'understanding')
STRATEGIES = ('unified', 'separate')
ROLES = {
  'generator': 'generation',
  'understander': 'understanding',
}  # of `separate`, and the task each learns
SCORERS = ('policy', 'frozen', 'ema', 'partner')
TRAINABLE = ('language_model+gen_head', 'language_model', 'all_but_vq', 'lora')
KL_ESTIMATORS = ('k1', 'k2', 'k3')
CROPS = ('crop', 'pad')
DTYPES = ('float32', 'bfloat16')


@dataclasses.dataclass(frozen=True)
class Method:
  """What is learned and from what. Rewards and log-probabilities are in nats a token."""

  objective: str = 'simpo'  # eq. 5; all of them: `losses.OBJECTIVES`
  task: str = 'unified'  # both tasks in every step; or 'generation', 'understanding' alone
  # one model; 'separate': a generator and an understander learn in turns, each scored by the other
  strategy: str = 'unified'
  swap_every: int = 44  # steps of a turn in 'separate'; an epoch of 5,600 inputs
  reward: str = 'dual'  # eq. 3; all of them: `rewards.REWARDS`
  # eq. 3: the live one (in 'separate' the partner); 'frozen': the initial model; 'ema': a running
  # mean
  scorer: str = 'policy'
  ema_decay: float = 0.99
  judge_accuracy: float = 1.0  # of the reward 'judge': other verdicts are turned around
  clip_model: str = (
    ''  # of the reward 'clip': a directory of a CLIPModel in the Hugging Face layout
  )
  yes_question: str = (
    'Does this image show {}? Answer yes or no.'  # of the reward 'vqa'; {} is the text
  )
  group_size: int = 8  # candidates an input
  inputs_per_step: int = 128  # prompts and pictures together, half of each in 'unified'
  # equal parts of a step's inputs, each sampled and differentiated on its own, before one update
  accumulate: int = 1
  steps: int = 438  # 5 epochs of 5,600 prompts and 5,600 pictures
  beta: float = 2.0
  gamma: float = 0.5
  inner_updates: int = (
    1  # updates on each batch of samples; more than 1 only for objectives with a ratio
  )
  ratio_low: float = 0.2  # grpo, dr_grpo, rloo: the ratio counts between 1 - low and 1 + high
  ratio_high: float = 0.28
  sequence_low: float = 3e-4  # gspo: the same, of a sequence's mean ratio
  sequence_high: float = 4e-4
  cispo_max: float = 5.0  # cispo: the largest weight of a token
  # weight of the KL to the initial model, in objectives of whole groups; 0 is none, and needs no
  # copy of it
  kl: float = 0.04
  kl_estimator: str = 'k3'
  dpo_beta: float = 0.1  # online_dpo
  min_margin: float = (
    0.0  # pairs whose rewards differ by no more than this are dropped from the loss
  )
  temperature: float = 1.0  # of sampling, and of every log-probability in the loss
  guidance: float = (
    5.0  # classifier-free guidance while sampling pictures; 1 is off. Never in rewards
  )
  cfg_interval: int = (
    0  # codes of a sampled picture, from its first, that are guided; the rest costs half; 0: all
  )
  policy_guidance: bool = (
    False  # whether the loss is about the guided mixture that sampled, not the plain conditional
  )
  max_text_tokens: int = 256
  eos_in_reward: bool = False  # whether R_G counts the end-of-text token of the prompt
  question: str = 'Describe this image in detail.'  # asked for the sampled texts
  instruction: str = 'Describe this image in detail.'  # stands before the prompt in R_G
  # of pictures: centre square, or 'pad' to a square, for the vision tower and the VQ encoder alike
  crop: str = 'crop'
  trainable: str = (
    'language_model+gen_head'  # 'lora': adapters on the language model's seven projections
  )
  lora_rank: int = 16
  learning_rate: float = 3e-6
  warmup_steps: int = 5  # then a cosine to 0 at the last step
  adam_b1: float = 0.9
  adam_b2: float = 0.999
  weight_decay: float = 0.0
  clip: float = 1.0  # norm of the whole gradient
  seed: int = 0

  @property
  def tasks(self):
    """The tasks of a step, a tuple."""
    return ('generation', 'understanding') if self.task == 'unified' else (self.task,)

  @property
  def inputs_per_task(self):
    """B: prompts in a step's generation half, and pictures in its understanding half."""
    return self.inputs_per_step // (1 if self.strategy == 'separate' else len(self.tasks))

  def role_at(self, step):
    """Who learns in step `step` (from 0) of 'separate', the generator first; None where there is
    one model.
    """
    return tuple(ROLES)[step // self.swap_every % 2] if self.strategy == 'separate' else None

  def tasks_at(self, step):
    """The tasks of step `step` (from 0), a tuple."""
    return (ROLES[self.role_at(step)],) if self.strategy == 'separate' else self.tasks


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices along each axis; -1, once at most, takes those that are left."""

  data: int = 1
  fsdp: int = -1
  tp: int = 1


@dataclasses.dataclass(frozen=True)
class System:
  """How it is computed, logged and kept. Nothing here changes what is learned, beyond rounding."""

  mesh: Mesh = Mesh()
  rollout_chunk: int = 0  # inputs sampled and scored at once; 0: all of a part
  update_chunk: int = 0  # inputs differentiated at once; 0: all of a part
  remat: bool = True  # recompute each layer in the backward pass
  compute_dtype: str = 'bfloat16'
  # of candidates' keys and values: as compute_dtype, or 'int8', for which GPUs have no kernel here
  cache_dtype: str = ''
  logprob_chunk: int = 128  # positions whose logits are held at once; 0: all
  # tokens between two growths of the cache; more make a shorter program that reads more unfilled
  # room
  decode_segment: int = 16
  # one program for all layers while decoding: large models on TPUs; elsewhere each layer would be
  # copied at each token
  decode_scan: bool = False
  # gs://BUCKET/FOLDER, or a folder all processes share: holds the checkpoints, and copies of the
  # workdir's files
  bucket: str = ''
  compile_cache: str = ''  # folder of compiled programs, spares the second start; '' is none
  log_every: int = 10  # steps between fetches of metrics; each step has its line all the same
  frozen_every: int = (
    10  # steps between scores by the frozen initial model; 0 never, and frees its copy
  )
  # steps between scores of swapped prompts and of coarse pictures, a forward pass each; 0 never
  probe_every: int = 0
  samples_every: int = 50  # steps between pictures of candidates; 0 never
  eval_every: int = 100  # steps between evaluations; 0 only before and after
  save_every: int = 50  # steps between checkpoints; the last step always has one
  keep_last: int = 2
  keep_every: int = 0  # steps whose multiples are kept for good; 0 none


@dataclasses.dataclass(frozen=True)
class Data:
  """Where inputs come from."""

  prompts: str = 'scenes'  # 'scenes', 't2i_compbench', or a file with a line a prompt
  images: str = 'scenes'  # 'scenes', or a folder of pictures
  max_prompt_tokens: int = 64  # a longer prompt is an error, not a cut


@dataclasses.dataclass(frozen=True)
class Eval:
  """The fixed lists both tasks are measured on, at the run's temperature and guidance."""

  benchmark: str = 'scenes'  # 'scenes' or 'none'
  prompts_per_task: int = 100  # before and after
  images_per_prompt: int = 4
  pictures: int = 1000  # described before and after
  quick_prompts_per_task: int = 16  # during
  quick_pictures: int = 64
  chunk: int = 50  # prompts or pictures at once
  tuned_temperature: float = (
    -1.0
  )  # the initial model is also measured at these, its best on validation; -1 is not
  tuned_guidance: float = 1.0
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole run."""

  model: str = 'scenes'  # 'scenes' is the embedded one; else a directory in the Hugging Face layout
  method: Method = Method()
  system: System = System()
  data: Data = Data()
  eval: Eval = Eval()


def defaults():
  """Every key at its default, as an unlocked ConfigDict for `configs/*.py` to change."""
  return ml_collections.ConfigDict(dataclasses.asdict(Config()))


def load(path, **overrides):
  """Reads a config file as `--config=path` does, with `method__steps=3`-like overrides; returns a
  Config.
  """
  path, _, arg = str(path).partition(':')
  if not os.path.isfile(path):
    raise InputError(
      f'found no config file at {path}; expected a Python file with get_config(); see configs/'
    )
  spec = importlib.util.spec_from_file_location('_dsr_jax_config', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(arg or None)
  for name, value in overrides.items():
    *parents, key = name.split('__')
    node = config
    for parent in parents:
      node = node[parent]
    node[key] = value
  return from_config_dict(config)


def from_config_dict(config):
  """ConfigDict (or nested dict) -> validated Config. Raises InputError on unknown, missing or
  impossible values.
  """
  if isinstance(config, ml_collections.ConfigDict):
    config = config.to_dict()
  result = _build(Config, config, 'config')
  _check_method(result.method)
  _check_system(result.system, result.method)
  _check_rest(result)
  return result


def to_json(config):
  """Config -> a nested dict of JSON values."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def completed(saved):
  """A saved configuration, or some of its parts, with keys that are newer than it at their
  defaults, which are what was done before.
  """
  known = {part: values for part, values in to_json(Config()).items() if isinstance(values, dict)}
  return {
    part: {**known[part], **values} if part in known else values for part, values in saved.items()
  }


def check_flags(argv):
  """Finds what absl would answer with a traceback: no --config, no such config file, an override of
  an unknown key.

  argv: the command's arguments without its name.
  """
  pairs = [a.lstrip('-').partition('=') for a in argv if a.startswith('-')]
  if {'help', 'helpshort', 'helpfull', 'helpxml'} & {name for name, _, _ in pairs}:
    return
  paths = [value for name, _, value in pairs if name == 'config']
  paths += [argv[i + 1] for i, a in enumerate(argv[:-1]) if a in ('--config', '-config')]
  path = next((p for p in reversed(paths) if p), None)
  if path is None:
    raise InputError(
      'found no --config; expected a config file; name one, as --config=configs/scenes.py'
    )
  known = _keys(to_json(load(path)))
  for name, _, _ in pairs:
    if name.startswith('config.') and name[len('config.') :] not in known:
      near = difflib.get_close_matches(name[len('config.') :], known, n=1, cutoff=0.5)
      raise InputError(
        f'found the unknown key {name}; expected a key of {path}; '
        f'{f"write config.{near[0]}" if near else "see dsr_jax/config.py for all of them"}'
      )


def _keys(tree, prefix=''):
  return [
    f'{prefix}{key}{rest}'
    for key, value in tree.items()
    for rest in (['.' + k for k in _keys(value)] if isinstance(value, dict) else [''])
  ]


def differences(old, new, prefix=''):
  """Lines `key: old -> new` for two nested dicts of JSON values; a key absent on one side
  counts.
  """
  lines = []
  for key in sorted(old.keys() | new.keys()):
    a, b, name = old.get(key, '(absent)'), new.get(key, '(absent)'), f'{prefix}{key}'
    if isinstance(a, dict) and isinstance(b, dict):
      lines += differences(a, b, f'{name}.')
    elif a != b:
      lines.append(f'{name}: {a!r} -> {b!r}')
  return lines


def _build(cls, values, where):
  """Consumes every key of `values` into the dataclass `cls`."""
  if not isinstance(values, dict):
    raise InputError(f'found {where}={values!r}; expected a group of keys; write {where}.KEY=VALUE')
  fields = {f.name: f for f in dataclasses.fields(cls)}
  for key in values:
    if key not in fields:
      near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
      hint = f'did you mean {where}.{near[0]}' if near else 'remove it'
      raise InputError(
        f'found the unknown key {where}.{key}; expected one of {", ".join(fields)}; {hint}'
      )
  missing = [key for key in fields if key not in values]
  if missing:
    raise InputError(
      f'found no {where}.{missing[0]}; expected every key; start from dsr_jax.config.defaults()'
    )
  made = {key: _value(field.type, values[key], f'{where}.{key}') for key, field in fields.items()}
  return cls(**made)


def _value(kind, value, name):
  """Checks one value's type; an int is fine where a float is due."""
  if dataclasses.is_dataclass(kind):
    return _build(kind, value, name)
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  if type(value) is not kind:
    raise InputError(f'found {name}={value!r}; expected a value of type {kind.__name__}; change it')
  if kind is float and not math.isfinite(value):
    raise InputError(f'found {name}={value}; expected a finite number; change it')
  return value


def _one_of(name, value, table):
  if value not in table:
    raise InputError(
      f'found config.{name}={value!r}; expected one of {", ".join(table)}; choose one of them'
    )


def _at_least(name, value, low, why=''):
  if value < low:
    raise InputError(f'found config.{name}={value}; expected at least {low}{why}; raise it')


def _above(name, value, low):
  if not value > low:
    raise InputError(f'found config.{name}={value}; expected more than {low}; raise it')


def _check_method(m):
  _one_of('method.objective', m.objective, _table('losses', 'OBJECTIVES', m.objective, 'simpo'))
  _one_of('method.reward', m.reward, _table('rewards', 'REWARDS', m.reward, 'dual'))
  _one_of('method.task', m.task, TASKS)
  _one_of('method.strategy', m.strategy, STRATEGIES)
  _one_of('method.kl_estimator', m.kl_estimator, KL_ESTIMATORS)
  _one_of('method.scorer', m.scorer, SCORERS)
  _one_of('method.trainable', m.trainable, TRAINABLE)
  _one_of('method.crop', m.crop, CROPS)
  _at_least('method.group_size', m.group_size, 2, ' (a pair is chosen from every group)')
  for key in (
    'steps',
    'inputs_per_step',
    'accumulate',
    'max_text_tokens',
    'swap_every',
    'inner_updates',
    'lora_rank',
  ):
    _at_least(f'method.{key}', getattr(m, key), 1)
  for key in (
    'warmup_steps',
    'gamma',
    'min_margin',
    'weight_decay',
    'seed',
    'adam_b1',
    'adam_b2',
    'ema_decay',
    'kl',
    'ratio_low',
    'ratio_high',
    'cfg_interval',
    'sequence_low',
    'sequence_high',
    'judge_accuracy',
  ):
    _at_least(f'method.{key}', getattr(m, key), 0)
  for key in ('beta', 'temperature', 'learning_rate', 'clip', 'dpo_beta', 'cispo_max'):
    _above(f'method.{key}', getattr(m, key), 0)
  _at_least('method.guidance', m.guidance, 1, ' (1 is off)')
  if m.judge_accuracy > 1:
    raise InputError(
      f'found config.method.judge_accuracy={m.judge_accuracy}; expected at most 1; lower it'
    )
  for key in ('adam_b1', 'adam_b2', 'ema_decay'):
    if getattr(m, key) >= 1:
      raise InputError(
        f'found config.method.{key}={getattr(m, key)}; expected less than 1; lower it'
      )
  if m.seed >= 2**32:
    raise InputError(f'found config.method.seed={m.seed}; expected less than 2**32; lower it')
  if m.warmup_steps > m.steps:
    raise InputError(
      f'found config.method.warmup_steps={m.warmup_steps} of {m.steps} steps; expected at most as '
      'many; '
      'lower it'
    )
  tasks = len(m.tasks_at(0))
  if m.inputs_per_step % (tasks * m.accumulate):
    raise InputError(
      f'found config.method.inputs_per_step={m.inputs_per_step}; expected a multiple of '
      f'{tasks * m.accumulate} ({tasks} tasks x {m.accumulate} accumulated parts); change '
      'one of them'
    )
  for key in ('question', 'instruction'):
    if not getattr(m, key).strip():
      raise InputError(f'found an empty config.method.{key}; expected a sentence; write one')
  _check_choices(m)


def _table(module, name, value, default):
  """The one list of objectives or rewards. Its module needs JAX, which a run with the default value
  is spared here.
  """
  return (
    (default,) if value == default else getattr(importlib.import_module(f'dsr_jax.{module}'), name)
  )


def _check_choices(m):
  """Choices that do not go together."""
  if m.strategy == 'separate' and m.task != 'unified':
    raise InputError(
      f'found config.method.task={m.task} with strategy=separate, whose two models learn one task '
      'each; expected '
      'task=unified; leave it at that'
    )
  if m.scorer == 'partner' and m.strategy != 'separate':
    raise InputError(
      'found config.method.scorer=partner with one model; expected policy, frozen or ema; choose '
      'one of them, or set '
      'method.strategy=separate'
    )
  if m.inner_updates > 1:
    from dsr_jax import losses

    if not losses.OBJECTIVES[m.objective].has_ratio:
      able = ', '.join(name for name, objective in losses.OBJECTIVES.items() if objective.has_ratio)
      raise InputError(
        f'found config.method.inner_updates={m.inner_updates} with objective={m.objective}, which '
        'has no ratio to the policy '
        f'that sampled; expected inner_updates=1, or one of {able}; change one of them'
      )
  if m.reward == 'clip' and not m.clip_model:
    raise InputError(
      'found config.method.reward=clip and no clip_model; expected a directory of a CLIPModel in '
      'the Hugging Face layout; '
      'name it in method.clip_model'
    )
  if m.yes_question.count('{}') != 1 or not all(
    part.strip() for part in m.yes_question.split('{}')
  ):
    raise InputError(
      f'found config.method.yes_question={m.yes_question!r}; expected a question with one {{}} '
      'inside, where the text goes; '
      'write one'
    )
  if m.reward != 'dual':
    from dsr_jax.rewards import base as rewards

    unable = [task for task in m.tasks if task not in rewards.REWARDS[m.reward].tasks]
    if unable:
      raise InputError(
        f'found config.method.reward={m.reward} with the task {unable[0]}; expected a task among '
        f'{", ".join(rewards.REWARDS[m.reward].tasks)}; set method.task to one of them'
      )


def _check_system(s, m):
  part = m.inputs_per_task // m.accumulate
  for key in ('rollout_chunk', 'update_chunk'):
    chunk = getattr(s, key)
    _at_least(f'system.{key}', chunk, 0)
    if chunk and part % chunk:
      raise InputError(
        f'found config.system.{key}={chunk}; expected a divisor of {part}, the inputs of a task in '
        'a '
        'part of the step; change it, or 0 for all at once'
      )
  _one_of('system.compute_dtype', s.compute_dtype, DTYPES)
  _one_of('system.cache_dtype', s.cache_dtype, ('', 'int8'))
  for key in (
    'logprob_chunk',
    'frozen_every',
    'probe_every',
    'samples_every',
    'eval_every',
    'keep_every',
  ):
    _at_least(f'system.{key}', getattr(s, key), 0)
  for key in ('log_every', 'save_every', 'keep_last', 'decode_segment'):
    _at_least(f'system.{key}', getattr(s, key), 1)
  axes = dataclasses.asdict(s.mesh)
  if any(n < 1 and n != -1 for n in axes.values()) or list(axes.values()).count(-1) > 1:
    raise InputError(
      f'found config.system.mesh={axes}; expected positive numbers and at most one -1; change it'
    )


def _check_rest(c):
  for key in ('model', 'data.prompts', 'data.images'):
    group, _, name = key.rpartition('.')
    if not getattr(getattr(c, group) if group else c, name).strip():
      raise InputError(f'found an empty config.{key}; expected a name or a path; set it')
  _at_least('data.max_prompt_tokens', c.data.max_prompt_tokens, 1)
  if c.method.reward == 'judge':
    read = [
      getattr(c.data, key)
      for key, task in (('prompts', 'generation'), ('images', 'understanding'))
      if task in c.method.tasks
    ]
    if set(read) != {'scenes'}:
      raise InputError(
        'found config.method.reward=judge with data of '
        f'{", ".join(sorted(set(read) - {"scenes"}))}; expected scenes, the only '
        'world that the judge can read; set data.prompts and data.images to scenes, or choose '
        'another reward'
      )
  _one_of('eval.benchmark', c.eval.benchmark, ('scenes', 'none'))
  for key in (
    'prompts_per_task',
    'images_per_prompt',
    'pictures',
    'quick_prompts_per_task',
    'quick_pictures',
    'chunk',
  ):
    _at_least(f'eval.{key}', getattr(c.eval, key), 1)
  _at_least('eval.seed', c.eval.seed, 0)
