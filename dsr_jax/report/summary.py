"""A run's result: `summary.json` for programs, a table for the terminal.

Numbers before and after are for the same items (`same_items`).
"""

import json
import os

from dsr_jax import files
from dsr_jax.report import same_items
from dsr_jax.report.same_items import Compared
from dsr_jax.runtime import metrics as metrics_lib
from dsr_jax.runtime import run_files

# {prefix of a score's name: heading of its part of the table}.
GROUPS = {
  'watched': 'fixed list, rewards by the initial model',
  'generation': 'drawing',
  'description': 'describing, sampled',
  'description_greedy': 'describing, greedy',
  'yesno': 'yes or no',
}
NAMES = {
  'watched/reward_generation': 'R_G, nats per token',
  'watched/reward_understanding': 'R_U, nats per token',
  'watched/entropy_generation': 'entropy of drawing, nats per code',
  'watched/entropy_understanding': 'entropy of describing, nats per token',
  'watched/similarity_generation': 'similar images for a prompt, share of codes',
  'watched/similarity_understanding': 'same text about two images, share',
  'watched/text_length': 'length of texts, tokens',
  'generation/mean': 'correct images, mean of tasks',
  'generation/any': 'any sample of a prompt correct',
  'generation/strict': 'correct and nothing else',
}


def write(workdir, step, steps, parameters_sha256, reporting_seconds=None):
  """Writes summary.json; returns its path.

  reporting_seconds: {part: host seconds spent on reporting}.
  """
  curves = metrics_lib.read(workdir)
  evaluation = {}
  for one in same_items.compare(workdir, steps):
    evaluation[one.name] = {'before': one.before, 'after': one.after, 'step': one.step}
    if one.low is not None:
      evaluation[one.name] |= {'change_low': one.low, 'change_high': one.high, 'items': one.items}
  content = {
    'step': step,
    'steps': steps,
    'finished': step == steps,
    'parameters_sha256': parameters_sha256,
    'training_seconds': sum(curves.get('time/step_seconds', ([], []))[1]),
    'reporting_seconds': reporting_seconds or {},
    'evaluation': evaluation,
    'report': os.path.join(os.path.abspath(workdir), 'report.html'),
  }
  path = os.path.join(workdir, 'summary.json')
  with run_files.writing(path):
    return files.write_json(path, content, indent=2, sort_keys=True)


def table(workdir) -> str:
  """The summary for people: scores before and after, by group, the best gain first; the interval is
  that of the change, over the same items.
  """
  with open(os.path.join(workdir, 'summary.json'), encoding='utf-8') as f:
    summary = json.load(f)
  groups = {}
  for name, v in summary['evaluation'].items():
    one = Compared(
      name,
      v['before'],
      v['after'],
      v['step'],
      v.get('change_low'),
      v.get('change_high'),
      v.get('items', ''),
    )
    groups.setdefault(name.partition('/')[0], []).append(one)
  order = [*GROUPS, *sorted(groups.keys() - GROUPS.keys())]
  width = max((len(title_of(one.name)) for found in groups.values() for one in found), default=0)
  lines = ['', f'{"":{width + 2}}    before     after    change   95 % of the change']
  for group in order:
    if group in groups:
      lines.append(GROUPS.get(group, group))
      lines += [_line(one, width) for one in sorted(groups[group], key=_rank)]
  if not groups:
    lines = ['', 'nothing was evaluated (eval.benchmark, eval.watched)']
  return '\n'.join([*lines, '', f'report       {summary["report"]}'])


def title_of(name: str) -> str:
  """A score in words, without its group."""
  words = name.partition('/')[2] or name
  return NAMES.get(name, words.replace('_', ' ').replace('f1', 'F1'))


def _rank(one: Compared):
  """The sort key: the chief score of a group first, then from the largest gain to the largest loss;
  scores without a better or worse, and scores without a change, last.
  """
  chief = one.name in NAMES and not one.name.endswith(same_items.NEUTRAL)
  chief = chief or one.name.endswith('/f1')
  neutral = one.change is None or one.name.endswith(same_items.NEUTRAL)
  return not chief, neutral, -one.gain, one.name


def _line(one: Compared, width: int) -> str:
  cells = [_number(one.before), _number(one.after), _number(one.change, '+.4f')]
  line = f'  {title_of(one.name):{width}} ' + ' '.join(f'{cell:>9}' for cell in cells)
  if one.low is not None:
    line += f'   {_number(one.low, "+.4f")} to {_number(one.high, "+.4f")}, {one.items}'
  return line.rstrip()


def _number(value, form='.4f') -> str:
  if value is None:
    return ''
  text = format(value, form)
  return text if float(text) else text.replace('+', '±').replace('-', '±')
