"""The model card: where a model comes from, and what was done to it."""

import json
import pathlib

from dsr_jax import saved_config
from dsr_jax.convert import sidefiles

METHOD = 'dual self-rewards (https://arxiv.org/abs/2506.07963)'


def body(located, layout, zeros=()):
  """Markdown of a card.

  Args:
    located: `model_source.Located`.
    layout: of the directory the card is for.
    zeros: tensors that the source does not have and that were made as zeros.
  """
  about = located.about
  name = about['model']['name'] if about else located.name
  lines = [
    f'# {pathlib.Path(name).name}' + (', reinforced with its own rewards' if about else ''),
    '',
    f'{sidefiles.READERS[layout]} Written by dsr_jax.',
    '',
  ]
  lines += ['## Source', '', f'- model: {_shown(name)}']
  if about:
    lines += [
      f'- sha256 of its weights: {about["model"]["fingerprint"]}',
      f'- step of the run: {located.step}',
    ]
  if zeros:
    lines += [
      '',
      f'{len(zeros)} tensors that the source does not have, and that no forward pass reads, are '
      'zeros: '
      f'{", ".join(zeros)}.',
    ]
  if about:
    lines += [
      '',
      '## Method',
      '',
      f'Reinforced with {METHOD}.',
      '',
      '| setting | value |',
      '|---|---|',
    ]
    method = saved_config.flat(saved_config.completed(about)['method'])
    lines += [f'| {key} | {_cell(value)} |' for key, value in method.items()]
    lines += ['', '## Data', '', '| setting | value |', '|---|---|']
    lines += [f'| {key} | {_cell(value)} |' for key, value in about['data'].items()]
    lines += _results(pathlib.Path(located.workdir))
  lines += ['', '## Licence', '', 'The weights are under the licence of the model they come from.']
  return '\n'.join(lines) + '\n'


def _results(workdir):
  """Tables of summary.json, which a run writes at its end."""
  try:
    summary = json.loads((workdir / 'summary.json').read_text(encoding='utf-8'))
    rows = list(summary['evaluation'].items())
  except (OSError, ValueError, KeyError, AttributeError):
    return []
  lines = [
    '',
    '## Results',
    '',
    f'After {summary.get("step")} of {summary.get("steps")} steps of the run, on its fixed '
    'lists, the same items before and after; rewards are in nats a token.',
    '',
    '| score | before | after |',
    '|---|---:|---:|',
  ]
  return lines + [
    f'| {name} | {_number(row.get("before"))} | {_number(row.get("after"))} |' for name, row in rows
  ]


def _shown(name):
  """A Hub id as it is, a path by its last part: a card is read elsewhere."""
  return name if not pathlib.Path(name).exists() else pathlib.Path(name).name


def _cell(value):
  text = _shown(value) if isinstance(value, str) and value else str(value)
  return text.replace('|', '\\|').replace('\n', ' ')


def _number(value):
  return '' if value is None else f'{value:.4f}'
