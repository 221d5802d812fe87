"""The probe's page: one self-contained HTML file. Every number in it is in probe.json too.

Axes: n inputs shown, G samples, T text tokens, N image codes, H W pixels.
"""

import html

import numpy as np

from dsr_jax import images
from dsr_jax.probe import words
from dsr_jax.reporting import html as page_lib
from dsr_jax.reporting import sheets
from dsr_jax.reporting.charts import chart


def page(numbers: dict, shown: dict) -> str:
  """numbers: probe.json. shown: {task: what `tasks.Result` keeps for the page}."""
  about = numbers['about']
  facts = [
    ('Model', about['model']),
    ('Prompts', about['prompts']),
    ('Pictures', about['images']),
    ('Inputs', f'{about["inputs"]} × {about["candidates"]} candidates'),
    ('Temperature', f'{about["temperature"]:g}'),
    ('Guidance', f'{about["guidance"]:g}'),
    ('Seed', about['seed']),
    ('Device', about['device']),
    ('Date', about['date']),
  ]
  facts = ''.join(f'<span>{key} <b>{html.escape(str(value))}</b></span>' for key, value in facts)
  body = [
    f'<h1>Probe {_verdict(numbers["go"])}</h1><p class="lead">Does the model\'s own reversed '
    'likelihood order its samples well? Measured before any training.</p>'
    f'<div class="facts">{facts}</div>'
  ]
  if 'generation' in numbers:
    body.append(_generation(numbers['generation'], shown['generation']))
  if 'understanding' in numbers:
    body.append(_understanding(numbers['understanding'], shown['understanding']))
  return page_lib.whole(f'Probe of {about["model"]}', ''.join(body))


def _generation(n, shown):
  out = [
    f'<h2>Text to picture: R_G {_verdict(n["verdict"]["go"])}</h2>',
    _tiles(n, 'right', 'share of right pictures, by the judge'),
    _gates(n),
  ]
  out.append(_charts(n, 'Right pictures', 'pictures'))
  if 'categories' in n:
    rows = [
      (name, *(e[key]['value'] for key in ('best', 'mean', 'worst', 'best_there_is')))
      for name, e in n['categories'].items()
    ]
    out.append(
      page_lib.table(
        'By sort of prompt', ('', 'best by R_G', 'mean', 'worst by R_G', 'any right'), rows
      )
    )
  out.append(page_lib.table('Other numbers', ('', 'value', '95 %'), _rows(n)))
  none = [-1] * len(shown['texts'])
  best, worst = shown['rewards'].argmax(1), shown['rewards'].argmin(1)
  sheet = sheets.candidates(shown['texts'], shown['pixels'], shown['rewards'], best, worst)
  out.append(
    '<h2>Candidates</h2>'
    + page_lib.figure(
      images.png(sheet), 'Pictures with R_G, nats a token; the best and the worst marked.'
    )
  )
  if shown['right'] is not None:
    sheet = sheets.candidates(shown['texts'], shown['pixels'], shown['right'], none, none)
    out.append(
      page_lib.figure(images.png(sheet), 'The same pictures: 1 is right by the judge, 0 wrong.')
    )
  note = (
    "Words: log p(word | picture) − log p(word | other prompts' pictures). Patches of the best "
    'picture: log p(code | prompt) − '
    'log p(code | no prompt). Green is supported, red is not; nats.'
  )
  out.append(f'<h2>Where the reward comes from</h2><p class="lead">{note}</p>')
  for i, text in enumerate(shown['texts']):
    lines = []
    for name, j in (('best', best[i]), ('worst', worst[i])):
      where = words.words_of(text)
      values = words.by_word(shown['spans'][i], shown['heat'][i, j], where)
      right = '' if shown['right'] is None else (', right' if shown['right'][i, j] else ', wrong')
      lines.append(
        f'<p class="lead">under the {name} picture (R_G {shown["rewards"][i, j]:.2f}{right})</p>'
        + page_lib.heat([(text.strip()[a:b], v, False) for (a, b), v in zip(where, values)])
      )
    under = [page_lib.picture(shown['pixels'][i, j]) for j in (best[i], worst[i])]
    patches = page_lib.picture(page_lib.patches(shown['pixels'][i, best[i]], shown['patches'][i]))
    out.append(f'<div class="row">{under[0]}{patches}{under[1]}<div>{"".join(lines)}</div></div>')
  return ''.join(out)


def _understanding(n, shown):
  out = [
    f'<h2>Picture to text: R_U {_verdict(n["verdict"]["go"])}</h2>',
    _tiles(n, 'f1', 'F1 of atoms, by the judge'),
    _gates(n),
  ]
  out.append(_charts(n, 'F1 of texts', 'texts'))
  out.append(page_lib.table('Other numbers', ('', 'value', '95 %'), _rows(n)))
  note = (
    'Texts, best by R_U first. Behind each clause its support: log p(picture | with it) − log '
    'p(picture | without), nats a picture. '
    'Underlined: wrong, by the judge.'
  )
  out.append(f'<h2>Texts and the support of their clauses</h2><p class="lead">{note}</p>')
  for i, pixels in enumerate(shown['pixels']):
    lines = []
    for j in np.argsort(-shown['rewards'][i], kind='stable'):
      score = '' if shown['scores'] is None else f', F1 {shown["scores"][i, j]:.2f}'
      parts = page_lib.heat(
        [
          (text, value / 4, bool(bad), f'{value:+.1f}')
          for text, value, bad in shown['clauses'][i][j]
        ]
      )
      reward, text = shown['rewards'][i, j], html.escape(shown['texts'][i][j])
      lines.append(f'<div class="heat"><small>R_U {reward:.3f}{score}</small>{text}</div>{parts}')
    out.append(f'<div class="row">{page_lib.picture(pixels)}<div>{"".join(lines)}</div></div>')
  return ''.join(out)


# Parts.


def _verdict(go):
  return f'<span class="verdict {"go" if go else "nogo"}">{"go" if go else "no-go"}</span>'


def _tiles(n, score, what):
  """Best, mean, worst by the judge where there is one, else of the reward itself."""
  if 'judged' in n:
    found = n['judged'][score]
    cells = [
      (f'{label} by reward' if label != 'mean' else 'mean of all', found[label])
      for label in ('best', 'mean', 'worst')
    ]
    cells.append(('best there is', found['best_there_is']))
    tiles = [
      (name, f'{e["value"]:.3f}', f'95 %: {e["low"]:.3f} to {e["high"]:.3f}') for name, e in cells
    ]
  else:
    tiles = [
      (f'{name} of a group', f'{value:.3f}', 'reward, nats a token')
      for name, value in n['reward'].items()
    ]
    what = 'no judge for this data'
  cells = ''.join(
    f'<div class="tile"><div class="name">{name}</div><div class="value">{value}</div><div '
    f'class="was">{below}</div></div>'
    for name, value, below in tiles
  )
  lead = f'{n["inputs"]} inputs, {n["candidates"]} candidates each; {what}.'
  return f'<p class="lead">{lead}</p><div class="tiles">{cells}</div>'


def _gates(n):
  rows = []
  for g in n['verdict']['gates']:
    value = 'not measured' if g['value'] is None else page_lib.number(g['value'])
    mark = {
      True: '<span class="up">passed</span>',
      False: '<span class="down">failed</span>',
      None: '',
    }[g['passed']]
    rows.append(
      f'<tr><td>{html.escape(g["gate"])}</td><td '
      f'class="n">{value}</td><td>{"≥" if g["relation"] == ">=" else "≤"} '
      f'{g["threshold"]:g}</td><td>{mark}</td><td>{html.escape(g["reason"])}</td></tr>'
    )
  blind = ''.join(f'<li>{html.escape(line)}</li>' for line in n['verdict']['blind'])
  blind = (
    f'<p class="lead">What this reward is blind to, or works against:</p><ul>{blind}</ul>'
    if blind
    else ''
  )
  return (
    '<h2>Go or no-go</h2><div class="scroll"><table><tr><th>what</th><th '
    'class="n">measured</th><th>asked for</th><th></th>'
    f'<th>because</th></tr>{"".join(rows)}</table></div>' + blind
  )


def _charts(n, title, things):
  if 'best_of' not in n:
    return ''
  steps = list(range(1, n['candidates'] + 1))
  curves = [
    ('best by the reward', steps, n['best_of']['by_reward']),
    ('best by the judge', steps, n['best_of']['by_judge']),
  ]
  return (
    f'<h2>Best of n</h2><div class="charts">{chart(title, f"best of n {things}", curves)}</div>'
  )


def _rows(n):
  """Every number that is no gate's, tile's or chart's: (name, value, interval)."""
  rows = []

  def walk(name, tree):
    if isinstance(tree, dict) and {'value', 'low', 'high'} <= tree.keys():
      rows.append(
        (
          name + (f' ({tree["cases"]} cases)' if 'cases' in tree else ''),
          tree['value'],
          (tree['low'], tree['high']),
        )
      )
    elif isinstance(tree, dict):
      for key, value in tree.items():
        walk(f'{name}, {key}' if name else key, value)
    elif isinstance(tree, (int, float)) and not isinstance(tree, bool):
      rows.append((name, tree, None))

  skipped = ('verdict', 'categories', 'best_of', 'inputs', 'candidates')
  walk('', {k: v for k, v in n.items() if k not in skipped})
  return [
    (
      name.replace('_', ' '),
      value,
      '' if e is None else f'{page_lib.number(e[0])} to {page_lib.number(e[1])}',
    )
    for name, value, e in rows
  ]
