"""The study's results as JSON and Markdown, and its figures, from all existing cells."""

import os
import shutil

from dsr_jax import files
from dsr_jax.runtime.progress import say
from dsr_jax.scenes import grammar
from dsr_jax.study import claims as claims_lib
from dsr_jax.study import evaluate as study_evaluate
from dsr_jax.study import figures
from dsr_jax.study import law as law_lib
from dsr_jax.study import variants as variants_lib
from dsr_jax.study.scores import MEASURES, Results

MAIN = (
  'generation',
  'generation_any',
  'description/f1',
  'description/hallucination',
  'description_greedy/f1',
  'description_greedy/hallucination',
  'yesno/f1',
)
CATEGORIES = tuple(f'generation/{task}' for task in grammar.GENEVAL)
FAILED = tuple(f'failure/{name}' for name in study_evaluate.FAILURES[1:])
NOVELTY = ('novelty/seen', 'novelty/reinforced', 'novelty/new')
OTHERS = (
  'generation_one',
  'generation_strict',
  'generation_graded',
  'extras',
  'pebbles',
  'description/words',
  'yesno/accuracy',
)
SCORER_VARIANTS = ('unified', 'separate', 'generation', 'understanding')


def write(study, cells, records) -> str:
  """Rewrites DIR/results from finished cells; returns its path. records: one per cell, or None."""
  done = [cell for cell, record in zip(cells, records) if record and record['state'] == 'finished']
  results = Results(done)
  tree, drawn = collect(study, results, cells, records)
  target = os.path.join(study.directory, 'results')
  say(f'writing      {target}')
  with files.whole_directory(target) as aside:
    files.write_json(os.path.join(aside, 'results.json'), tree, indent=1, allow_nan=False)
    for name, figure in drawn.items():
      files.write_text(os.path.join(aside, name), figures.svg(figure))
    for path in study.demonstrations():
      shutil.copyfile(path, os.path.join(aside, os.path.basename(path)))
    with open(os.path.join(aside, 'README.md'), 'w', encoding='utf-8') as f:
      f.write(markdown(study, tree, [*drawn, *map(os.path.basename, study.demonstrations())]))
  return target


def collect(study, results: Results, cells, records):
  """(everything as JSON values, {file name: figure})."""
  tree = {
    'command': study.command,
    'settings': study.settings,
    'cells': _states(cells, records),
    'tuning': study.tuning(),
    'bases': {},
  }
  points = law_lib.law(study, results)
  tree['law'] = points
  tree['law_line'] = {task: law_lib.line(points, task) for task in law_lib.TASKS}
  drawn = {'law.svg': figures.law(points)} if points else {}
  for base in results.bases:
    if not results.seeds(base, 'base'):
      continue
    orders = {
      v: law_lib.scorers_over_training(results, base, v)
      for v in SCORER_VARIANTS
      if results.seeds(base, v)
    }
    tree['bases'][base] = {
      'variants': {
        v: _variant(results, base, v) for v in results.variants(base) if results.seeds(base, v)
      },
      'claims': claims_lib.claims_of(results, base),
      'scorers': orders,
      'error_closed': _closed(study, results, base),
    }
    drawn |= {
      f'gains_{base}.svg': figures.gains(results, base),
      f'evolution_{base}.svg': figures.evolution(results, base),
      f'categories_{base}.svg': figures.categories(results, base),
    }
    drawn |= {
      f'scorers_{v}_{base}.svg': figures.scorers(orders[v], variants_lib.VARIANTS[v].title)
      for v in ('unified', 'separate')
      if v in orders
    }
  return tree, {name: figure for name, figure in drawn.items() if figure}


def _states(cells, records):
  rows = []
  for cell, record in zip(cells, records):
    row = {
      'base': cell.base,
      'variant': cell.variant,
      'seed': cell.seed,
      'state': record['state'] if record else 'waiting',
    }
    if record:
      row |= {key: record[key] for key in ('seconds', 'device', 'error') if key in record}
    rows.append(row | {'learning_rate': cell.config.method.learning_rate, 'steps': cell.last_step})
  return rows


def _variant(results, base, variant) -> dict:
  """{measure: {'value', 'low', 'high', 'by_seed', 'difference': from the base}}."""
  out = {'seeds': results.seeds(base, variant)}
  for measure in MEASURES:
    score = results.score(base, variant, measure)
    if score is None:
      continue
    by_seed = [results.value(base, variant, measure, seed) for seed in results.seeds(base, variant)]
    out[measure] = score.json() | {'by_seed': by_seed}
    difference = results.difference(base, variant, 'base', measure) if variant != 'base' else None
    if difference is not None:
      out[measure]['difference'] = difference.json()
  return out


def _closed(study, results, base) -> dict | None:
  """The self-rewarded variant with the best validation score, and the share of the base's error in
  generation that it closes.
  """
  tuned = {
    v: t['score']
    for v, t in study.tuning(task='generation').items()
    if variants_lib.VARIANTS[v].self_rewarded and results.seeds(base, v)
  }
  if not tuned:
    return None
  best = max(tuned, key=tuned.get)
  out = {'variant': best, 'validation': tuned}
  for against in ('base', 'base_best'):
    closed = claims_lib.error_closed(results, base, best, against)
    if closed is not None:
      out[f'of {against}'] = closed.json()
  return out


# Markdown.


def markdown(study, tree, files) -> str:
  """The page of results."""
  counts = {
    state: sum(c['state'] == state for c in tree['cells'])
    for state in ('finished', 'failed', 'waiting')
  }
  finished = [c for c in tree['cells'] if c['state'] == 'finished' and c['steps']]
  seconds = sum(c['seconds'] for c in finished) / max(len(finished), 1)
  devices = sorted({c['device'] for c in tree['cells'] if 'device' in c})
  lines = [
    '# Results of the study',
    '',
    f'    {tree["command"]}',
    '',
    f'{counts["finished"]} cells finished, {counts["failed"]} failed, {counts["waiting"]} waiting. '
    'A training cell took '
    f'{seconds / 60:.1f} minutes on {", ".join(devices) or "nothing yet"}. Points are hundredths. '
    'Differences are paired: both sides have the same '
    'prompts, images and keys. Intervals are 95 % bootstraps over prompts or images and, with '
    'several seeds, over seeds. All scores are those of the last '
    'checkpoint.',
  ]
  failed = [c for c in tree['cells'] if c['state'] == 'failed']
  if failed:
    lines += ['', 'Failed cells, left out of everything below:', '']
    lines += [
      f'- {c["base"]} {c["variant"]} seed {c["seed"]}: {c["error"].splitlines()[0]}' for c in failed
    ]
  if tree['tuning']:
    lines += [
      '',
      '## Learning rates, chosen on validation',
      '',
      '| variant | ' + ' | '.join(f'{r:g}' for r in study.tune.learning_rates) + ' | chosen |',
      '|---|' + '---:|' * (len(study.tune.learning_rates) + 1),
    ]
    for variant, t in tree['tuning'].items():
      scores = [
        f'{100 * t["scores"][f"{r:g}"]:.1f}' if f'{r:g}' in t['scores'] else ''
        for r in study.tune.learning_rates
      ]
      lines.append(f'| {variant} | {" | ".join(scores)} | {t["learning_rate"]:g} |')
  lines += replicates(tree['bases'])
  for base, found in tree['bases'].items():
    lines += _base_lines(base, found, files)
  lines += _figure('law.svg', files, 'Gain against the pairwise accuracy of the reward')
  return '\n'.join(lines) + '\n'


def replicates(bases):
  """The claims side by side if there are several bases: the difference, its interval, and the
  verdict for each base.
  """
  if len(bases) < 2:
    return []
  skills = [
    f'{base} ({100 * found["variants"]["base"]["generation"]["value"]:.0f})'
    for base, found in bases.items()
  ]
  lines = [
    '',
    '## Claims on every base',
    '',
    "The number after a base's name is its own score in generation. Each cell has the verdict and "
    'its differences, in the '
    'order of the contrasts.',
    '',
    '| claim | ' + ' | '.join(skills) + ' |',
    '|---|' + '---|' * len(bases),
  ]
  for rows in zip(*(found['claims'] for found in bases.values())):
    if any(row['contrasts'] for row in rows[1:]):
      numbers = [
        ', '.join(
          f'{100 * c["value"]:+.1f} ({100 * c["low"]:+.1f} … {100 * c["high"]:+.1f})'
          for c in row['contrasts']
        )
        for row in rows
      ]
      lines.append(
        f'| {rows[0]["claim"]} | '
        + ' | '.join(
          f'{row["verdict"]}: {text}' if text else row['verdict']
          for row, text in zip(rows, numbers)
        )
        + ' |'
      )
  return lines


def _base_lines(base, found, files):
  variants = found['variants']
  lines = ['', f'## Base {base}', '', '### Variants', '']
  lines += _table(variants, MAIN)
  lines += _figure(f'gains_{base}.svg', files, 'Gains of every variant')
  lines += [
    '',
    '### Claims',
    '',
    '| claim | contrast | difference | 95 % | p, Holm | within ±2 | verdict |',
    '|---|---|---:|---|---:|---|---|',
  ]
  for row in found['claims']:
    if not row['contrasts']:
      lines.append(f'| {row["claim"]} | | | | | | {row["verdict"]} |')
    for i, c in enumerate(row['contrasts']):
      head, tail = (
        (row['claim'], f'{row["verdict"]}{": " + row["note"] if "note" in row else ""}')
        if i == 0
        else ('', '')
      )
      p = f'{row["p_adjusted"]:.3f}' if i == 0 else ''
      equal = '' if 'equal' not in c else 'yes' if c['equal'] else 'no'
      numbers = f'{100 * c["value"]:+.1f} | {100 * c["low"]:+.1f} … {100 * c["high"]:+.1f}'
      lines.append(f'| {head} | {c["what"]} | {numbers} | {p} | {equal} | {tail} |')
  closed = found['error_closed']
  if closed:
    for against in ('base', 'base_best'):
      if f'of {against}' in closed:
        c = closed[f'of {against}']
        lines += [
          '',
          'The best self-rewarded variant by validation, '
          f'*{variants_lib.VARIANTS[closed["variant"]].title}*, closes '
          f'{100 * c["value"]:.0f} % ({100 * c["low"]:.0f} … {100 * c["high"]:.0f}) of the error '
          'in generation of: '
          f'{variants_lib.VARIANTS[against].title}.',
        ]
  lines += (
    ['', '### By task', '']
    + _table(variants, CATEGORIES)
    + _figure(f'categories_{base}.svg', files, 'Gains by task')
  )
  lines += ['', '### Failures by kind', ''] + _table(variants, FAILED)
  lines += ['', '### Combinations seen and unseen', ''] + _table(variants, NOVELTY)
  lines += ['', '### Other measures', ''] + _table(variants, OTHERS)
  lines += ['', '### Over training', ''] + _figure(
    f'evolution_{base}.svg', files, 'Both tasks over training'
  )
  for v in SCORER_VARIANTS:
    lines += _figure(f'scorers_{v}_{base}.svg', files, f'Scorers of {v} over training')
  lengths = {v: o['length'] for v, o in found['scorers'].items() if 'length' in o}
  if lengths:
    lines += [
      '',
      'Slope of R_U on the length of a text at equal correctness, in nats per token, at the first '
      'and last evaluation:',
      '',
    ]
    lines += [
      f'- {v}: {o[0]["value"]:+.4f} ({o[0]["low"]:+.4f} … {o[0]["high"]:+.4f}), then '
      f'{o[-1]["value"]:+.4f} '
      f'({o[-1]["low"]:+.4f} … {o[-1]["high"]:+.4f})'
      for v, o in lengths.items()
    ]
  pictures = [f for f in files if f.endswith(f'_{base}.png')]
  if pictures:
    lines += ['', '### Shown', '']
    for name in pictures:
      lines += _figure(name, files, name[:-4].replace('_', ' '))
  return lines


def _table(variants, measures):
  titles = [MEASURES[m].title for m in measures]
  lines = [
    '| variant | seeds | ' + ' | '.join(titles) + ' |',
    '|---|---:|' + '---|' * len(measures),
  ]
  for name, scores in variants.items():
    cells = []
    for m in measures:
      if m not in scores:
        cells.append('')
        continue
      scale, s = MEASURES[m].scale, scores[m]
      digits = 1 if scale == 100 else 2
      text = f'{scale * s["value"]:.{digits}f}'
      if 'difference' in s:
        d = s['difference']
        value, low, high = (f'{scale * d[key]:+.{digits}f}' for key in ('value', 'low', 'high'))
        text += f' ({value}: {low} … {high})'
      cells.append(text)
    lines.append(
      f'| {variants_lib.VARIANTS[name].title} | {len(scores["seeds"])} | '
      + ' | '.join(cells)
      + ' |'
    )
  return lines


def _figure(name, files, words):
  return ['', f'![{words}]({name})'] if name in files else []
