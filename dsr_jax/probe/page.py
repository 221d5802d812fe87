"""The probe's page: one self-contained HTML file. All its numbers are also in probe.json.

Axes: n inputs shown, G samples, T text tokens, N image codes, H W pixels.
"""

import numpy as np

from dsr_jax.probe import measures, words
from dsr_jax.reporting import html as page_lib
from dsr_jax.reporting.charts import Chart, Series, chart

# For each task: its title, the judge's measure, that measure in words, and the title and unit of
# its chart.
TASKS = {
  'generation': dict(
    title='Text to image: R_G',
    score='right',
    what='share of correct images, by the judge',
    chart=('Correct images', 'share of best of n images'),
  ),
  'understanding': dict(
    title='Image to text: R_U',
    score='f1',
    what='F1 of atoms, by the judge',
    chart=('F1 of texts', 'best of n texts'),
  ),
}
# The numbers of a task that have their own place on the page.
PLACED = ('verdict', 'categories', 'best_of', 'inputs', 'candidates')


def page(numbers: dict, shown: dict) -> str:
  """numbers: probe.json. shown: {task: what `tasks.Result` keeps for the page}."""
  about = numbers['about']
  facts = [
    ('Model', about['model']),
    ('Prompts', about['prompts']),
    ('Images', about['images']),
    ('Inputs', f'{about["inputs"]} × {about["candidates"]} candidates'),
    ('Temperature', f'{about["temperature"]:g}'),
    ('Guidance', f'{about["guidance"]:g}'),
    ('Seed', about['seed']),
    ('Device', about['device']),
    ('Date', about['date']),
  ]
  prompts = texts = None
  if 'generation' in numbers:
    prompts = [_prompt(shown['generation'], i) for i in range(len(shown['generation']['texts']))]
  if 'understanding' in numbers:
    count = len(shown['understanding']['pixels'])
    texts = [_picture(shown['understanding'], i) for i in range(count)]
  return page_lib.render(
    'probe.html.j2',
    title=f'Probe of {about["model"]}',
    verdict=_verdict(numbers['verdict']),
    facts=facts,
    sections=[_section(task, numbers[task]) for task in TASKS if task in numbers],
    prompts=prompts,
    pictures=texts,
  )


# The numbers.


def _section(task: str, n: dict) -> dict:
  """The template's values for a task's numbers."""
  about = TASKS[task]
  judged = 'judged' in n
  return {
    'task': task,
    'title': about['title'],
    'verdict': _verdict(n['verdict']['verdict']),
    'missing': n['verdict']['not_measured'],
    'lead': f'{n["inputs"]} inputs, {n["candidates"]} candidates each; '
    f'{about["what"] if judged else "there is no judge for this data"}.',
    'tiles': _judged_tiles(n['judged'][about['score']]) if judged else _reward_tiles(n['reward']),
    'gates': page_lib.Table(
      ['criterion', 'measured', 'required', '', 'reason'],
      [_gate(g) for g in n['verdict']['gates']],
      sides={'passed': 'up', 'failed': 'down'},
    ),
    'blind': n['verdict']['blind'],
    'objective': n['verdict']['objective'],
    'chart': _best_of(n, *about['chart']),
    'categories': _categories(n),
    'others': page_lib.Table(['', 'value', '95 %'], _rows(n)),
  }


def _judged_tiles(found: dict) -> list[page_lib.Tile]:
  """The judge's scores for the best, mean and worst by reward."""
  names = {
    'best': 'best by reward',
    'mean': 'mean of all',
    'worst': 'worst by reward',
    'best_there_is': 'best possible',
  }
  return [
    page_lib.Tile(
      name,
      f'{found[key]["value"]:.3f}',
      [f'95 %: {found[key]["low"]:.3f} to {found[key]["high"]:.3f}'],
    )
    for key, name in names.items()
  ]


def _reward_tiles(reward: dict) -> list[page_lib.Tile]:
  return [
    page_lib.Tile(f'{name} of a group', f'{value:.3f}', ['reward, nats per token'])
    for name, value in reward.items()
  ]


def _verdict(words: str) -> tuple[str, str]:
  """A verdict and its color."""
  return words, {measures.GO: 'up', measures.NO_GO: 'down'}.get(words, 'open')


def _gate(gate: dict) -> list:
  measured = gate['missing'] or page_lib.number(gate['value'])
  relation = '≥' if gate['relation'] == '>=' else '≤'
  passed = {True: 'passed', False: 'failed', None: ''}[gate['passed']]
  return [gate['gate'], measured, f'{relation} {gate["threshold"]:g}', passed, gate['reason']]


def _best_of(n: dict, title: str, unit: str) -> Chart | None:
  if 'best_of' not in n:
    return None
  steps = list(range(1, n['candidates'] + 1))
  return chart(
    title,
    unit,
    [
      Series('best by the reward', 'other', steps, n['best_of']['by_reward']),
      Series('best by the judge', 'judge', steps, n['best_of']['by_judge']),
    ],
    x_title='n',
  )


def _categories(n: dict) -> page_lib.Table | None:
  if 'categories' not in n:
    return None
  keys = ('best', 'mean', 'worst', 'best_there_is')
  return page_lib.Table(
    ['', 'best by R_G', 'mean', 'worst by R_G', 'any correct'],
    [[name, *(e[key]['value'] for key in keys)] for name, e in n['categories'].items()],
  )


def _rows(n: dict) -> list[list]:
  """All other numbers: name, value, interval."""
  rows = []

  def walk(name, tree):
    if isinstance(tree, dict) and {'value', 'low', 'high'} <= tree.keys():
      cases = f' ({tree["cases"]} cases)' if 'cases' in tree else ''
      interval = f'{page_lib.number(tree["low"])} to {page_lib.number(tree["high"])}'
      rows.append([name.replace('_', ' ') + cases, tree['value'], interval])
    elif isinstance(tree, dict):
      for key, value in tree.items():
        walk(f'{name}, {key}' if name else key, value)
    elif isinstance(tree, (int, float)) and not isinstance(tree, bool):
      rows.append([name.replace('_', ' '), tree, ''])

  walk('', {key: value for key, value in n.items() if key not in PLACED})
  return rows


# Some inputs.


def _prompt(shown: dict, i: int) -> dict:
  """A prompt with its images, best first, and what contributes to the best and the worst reward."""
  text, rewards, right = shown['texts'][i], shown['rewards'][i], shown['right']
  order = np.argsort(-rewards, kind='stable')
  best, worst = order[0], order[-1]

  def judged(j):
    return '' if right is None else 'right' if right[i, j] else 'wrong'

  samples = []
  for j in order:
    mark = 'up' if j == best else 'down' if j == worst else ''
    lines = [f'{rewards[j]:.2f}', judged(j)]
    samples.append(
      page_lib.Sample(mark, [x for x in lines if x], src=page_lib.picture(shown['pixels'][i, j]))
    )
  where = words.words_of(text)
  heats = []
  for name, j in (('best', best), ('worst', worst)):
    values = words.by_word(shown['spans'][i], shown['heat'][i, j], where)
    parts = [
      page_lib.Word(text.strip()[a:b], float(v), page_lib.signed(v, 1))
      for (a, b), v in zip(where, values)
    ]
    said = ', '.join(x for x in (f'R_G {rewards[j]:.2f}', judged(j)) if x)
    heats.append((f'given the {name} image ({said})', parts))
  return {
    'text': text,
    'samples': samples,
    'patches': page_lib.patches(shown['pixels'][i, best], shown['patches'][i]),
    'heats': heats,
  }


def _picture(shown: dict, i: int) -> dict:
  """An image with its texts, best first, and the support of each clause."""
  texts = []
  for j in np.argsort(-shown['rewards'][i], kind='stable'):
    said = [f'R_U {shown["rewards"][i, j]:.3f}']
    if shown['scores'] is not None:
      said.append(f'F1 {shown["scores"][i, j]:.2f}')
    clauses = [
      page_lib.Word(text, value / 4, page_lib.signed(value, 1), bool(wrong))
      for text, value, wrong in shown['clauses'][i][j]
    ]
    sample = page_lib.Sample('', [', '.join(said)], text=shown['texts'][i][j])
    texts.append((sample, clauses))
  return {'src': page_lib.picture(shown['pixels'][i]), 'texts': texts}
