"""The study's variants: each is a few changes to one configuration, so that two entries here show
how two variants differ.

Every training variant has the same prompts and images in the same order, as many updates of each
task, and groups of the same size; where that is impossible, its entry says what is equal.
"""

from collections.abc import Callable
import copy
from typing import NamedTuple

from dsr_jax import config_loading, saved_config

TRAINED, UNTOUCHED, BEST_SETTINGS, BEST_OF = (
  'trained',
  'untouched',
  'best settings',
  'best of',
)  # what a variant does with the base
PAPER, CONTROL, LAW = 'paper', 'control', 'law'
INFERENCE_BEST_OF = 8  # candidates of the control that only selects by reward, without training


class Variant(NamedTuple):
  """title: in tables. group: PAPER, CONTROL or LAW. changes: {dotted key of the run: value, or a
  function of the run}.

  self_rewarded: learns from the model's own likelihood of the input; "the best self-rewarded
  variant" is one of these. rate_of: the variant whose learning rate it uses, without tuning of its
  own.
  """

  title: str
  group: str
  changes: dict[str, object | Callable]
  kind: str = TRAINED
  self_rewarded: bool = False
  rate_of: str = ''


# A variant with one task, or one model per task, has the inputs that `unified` has for that task:
# half of the inputs in a step.
_HALF = {'method.inputs_per_step': lambda c: c.method.inputs_per_step // 2}
_GENERATION = {'method.task': 'generation', **_HALF}
_SEPARATE = {
  'method.strategy': 'separate',
  'method.steps': lambda c: 2 * c.method.steps,
  'system.eval_every': lambda c: 2 * c.system.eval_every,
  'system.save_every': lambda c: 2 * c.system.save_every,
  **_HALF,
}


def _judge(accuracy):
  return Variant(
    f'judge as reward, {100 * accuracy:.0f} % of verdicts right',
    LAW,
    {'method.reward': 'judge', 'method.judge_accuracy': accuracy},
    rate_of='judge',
  )  # points of the law differ only in accuracy


VARIANTS = {
  'base': Variant('base', PAPER, {}, UNTOUCHED),
  'unified': Variant('unified, SimPO', PAPER, {}, self_rewarded=True),
  'generation': Variant('generation only, SimPO', PAPER, _GENERATION, self_rewarded=True),
  'understanding': Variant(
    'understanding only, SimPO',
    PAPER,
    {'method.task': 'understanding', **_HALF},
    self_rewarded=True,
  ),
  'grpo': Variant(
    'unified, GRPO, equal groups', PAPER, {'method.objective': 'grpo'}, self_rewarded=True
  ),
  # SimPO trains on one pair of a group and GRPO on the whole group: with proportionally fewer
  # groups, both train on the same number of tokens.
  'grpo_tokens': Variant(
    'unified, GRPO, equal tokens that learn',
    PAPER,
    {
      'method.objective': 'grpo',
      'method.inputs_per_step': lambda c: 2 * c.method.inputs_per_step // c.method.group_size,
    },
    self_rewarded=True,
  ),
  'separate': Variant('separate, SimPO', PAPER, _SEPARATE, self_rewarded=True),
  'clip': Variant('generation only, CLIP reward', PAPER, {'method.reward': 'clip', **_GENERATION}),
  'base_best': Variant('base at its best temperature and guidance', CONTROL, {}, BEST_SETTINGS),
  'best_of_8': Variant('base, best of 8 by its own reward', CONTROL, {}, BEST_OF),
  'grpo_rate': Variant(
    "unified, GRPO, SimPO's learning rate",
    CONTROL,
    {'method.objective': 'grpo'},
    self_rewarded=True,
    rate_of='unified',
  ),
  'random': Variant('random pair', CONTROL, {'method.reward': 'random'}),
  'forward': Variant('forward likelihood as reward', CONTROL, {'method.reward': 'forward'}),
  'shuffled': Variant(
    "another input's likelihood as reward", CONTROL, {'method.reward': 'shuffled'}
  ),
  'best_of_n': Variant(
    'fine-tuning on the best of 8', CONTROL, {'method.objective': 'best_of_n'}, self_rewarded=True
  ),
  'judge': Variant('judge as reward', CONTROL, {'method.reward': 'judge'}),
  'judge_90': _judge(0.9),
  'judge_80': _judge(0.8),
  'judge_70': _judge(0.7),
  'judge_60': _judge(0.6),
}


def reward_key(method) -> str:
  """The name of a reward, so that variants with the same reward share its measurement."""
  accuracy = f'_{100 * method.judge_accuracy:g}' if method.reward == 'judge' else ''
  return f'{method.reward}{accuracy}'


def run_config(
  run,
  variant: str,
  *,
  model: str,
  seed: int,
  learning_rate: float | None = None,
  clip_model: str = '',
  **more,
):
  """The validated `config.Config` of one cell.

  run: `config.Config` that all variants change. learning_rate: the tuned one, or None for the
  run's. clip_model: directory, for the CLIP reward. more: further keys, such as
  `system__compile_cache` for `system.compile_cache`. Errors: InputError for an impossible
  combination.
  """
  tree = copy.deepcopy(saved_config.to_json(run))
  changes = {
    key: value(run) if callable(value) else value
    for key, value in VARIANTS[variant].changes.items()
  }
  changes |= {
    'model': model,
    'method.seed': seed,
    **{key.replace('__', '.'): value for key, value in more.items()},
  }
  if learning_rate is not None:
    changes['method.learning_rate'] = learning_rate
  if changes.get('method.reward') == 'clip':
    changes['method.clip_reward.model'] = clip_model
  for key, value in changes.items():
    *parents, last = key.split('.')
    node = tree
    for parent in parents:
      node = node[parent]
    node[last] = value
  return config_loading.from_config_dict(tree)
