"""The paper's claims as paired contrasts of the study's cells, each with a 95 % interval and a
verdict, with Holm's correction over the paper's claims and, separately, over the controls.

A claim of a direction is confirmed, or reversed, if its adjusted two-sided p is below 0.05. A claim
of equality is confirmed if both one-sided tests against 2 points are significant, and reversed if
the whole interval is beyond 2 points. Anything else is "not confirmed". A claim with several
contrasts states whether any or all of them must hold.
"""

from typing import NamedTuple

import numpy as np

from dsr_jax.scenes import grammar
from dsr_jax.study import variants as variants_lib
from dsr_jax.study.scores import MARGIN, MEASURES, Results, Score, combine

LEVEL = 0.05
BINDING = 'color_attr'
MORE, LESS, EQUAL, OPEN = 'more', 'less', 'equal', 'open'


class Contrast(NamedTuple):
  """Variant a minus variant b in a measure. sign: the direction that the claim asserts."""

  measure: str
  a: str
  b: str
  sign: int = 1


class Claim(NamedTuple):
  """kind: MORE or LESS (the contrasts' direction), EQUAL, OPEN (a question). rule: whether 'any' or
  'all' contrasts must hold.
  """

  key: str
  sentence: str
  kind: str
  contrasts: tuple[Contrast, ...]
  rule: str = 'all'


GENERATION, READING, HALLUCINATION = 'generation', 'description/f1', 'description/hallucination'


def _both(a, b):
  return (Contrast(GENERATION, a, b), Contrast(READING, a, b))


CLAIMS = (
  Claim(
    'improves_generation',
    'DSR improves generation',
    MORE,
    (Contrast(GENERATION, 'unified', 'base'),),
  ),
  Claim(
    'improves_understanding',
    'DSR improves understanding (hallucination down or F1 up)',
    MORE,
    (Contrast(HALLUCINATION, 'unified', 'base', -1), Contrast(READING, 'unified', 'base')),
    'any',
  ),
  Claim(
    'understanding_hurts_generation',
    'training only understanding hurts generation',
    LESS,
    (Contrast(GENERATION, 'understanding', 'base'),),
  ),
  Claim(
    'generation_on_understanding',
    'effect of training only generation on understanding',
    OPEN,
    (Contrast(READING, 'generation', 'base'),),
  ),
  Claim(
    'unified_is_both',
    'unified ≈ the best of each',
    EQUAL,
    (Contrast(GENERATION, 'unified', 'generation'), Contrast(READING, 'unified', 'understanding')),
  ),
  Claim(
    'separate_generation',
    'separate ≥ unified, generation',
    MORE,
    (Contrast(GENERATION, 'separate', 'unified'),),
  ),
  Claim(
    'separate_understanding',
    'separate ≥ unified, understanding',
    MORE,
    (Contrast(READING, 'separate', 'unified'),),
  ),
  Claim('simpo_groups', 'SimPO ≥ GRPO, equal groups, both tasks', MORE, _both('unified', 'grpo')),
  Claim(
    'simpo_tokens',
    'SimPO ≥ GRPO, equal tokens that learn, both tasks',
    MORE,
    _both('unified', 'grpo_tokens'),
  ),
  Claim(
    'over_clip',
    'DSR ≥ CLIP reward, generation',
    MORE,
    (Contrast(GENERATION, 'generation', 'clip'),),
  ),
)
BEYOND = (
  'base_best',
  'best_of_8',
  'random',
  'forward',
  'shuffled',
  'best_of_n',
)  # controls that DSR must beat to count as learning


def claims_of(results: Results, base: str) -> list[dict]:
  """One row per claim: sentence, verdict, adjusted p, and its contrasts with intervals. A claim
  without cells has the verdict 'no data'.
  """
  paper = [_directional(results, base, claim) for claim in CLAIMS]
  paper += [_saturation(results, base), _binding(results, base)]
  beyond = [
    _directional(
      results,
      base,
      Claim(
        f'beyond_{control}',
        f'beyond the paper: DSR ≥ {variants_lib.VARIANTS[control].title}, generation',
        MORE,
        (Contrast(GENERATION, 'unified', control),),
      ),
    )
    for control in BEYOND
  ]
  for family in (paper, beyond):
    for row, p in zip(family, holm([row['p'] for row in family])):
      row['p_adjusted'] = p
      row['verdict'] = _verdict(row)
  return paper + beyond


def holm(values) -> list[float | None]:
  """Holm's adjusted p values; None stays None and does not count."""
  known = sorted((p, i) for i, p in enumerate(values) if p is not None)
  out, highest = [None] * len(values), 0.0
  for rank, (p, i) in enumerate(known):
    highest = max(highest, min(1.0, (len(known) - rank) * p))
    out[i] = highest
  return out


def _directional(results, base, claim: Claim) -> dict:
  scores = [results.difference(base, c.a, c.b, c.measure) for c in claim.contrasts]
  row = _row(claim.key, claim.sentence, claim.kind)
  if any(s is None for s in scores):
    return row
  row['contrasts'] = [
    _shown(c, s, results.common(base, c.a, c.b)) for c, s in zip(claim.contrasts, scores)
  ]
  toward = [
    np.sign(s.value) * c.sign * (-1 if claim.kind == LESS else 1)
    for c, s in zip(claim.contrasts, scores)
  ]
  if claim.kind == EQUAL:
    return row | {
      'p': max(s.p_outside for s in scores),
      'toward': 1,
      'outside': any(_surely_outside(s) for s in scores),
    }
  if claim.rule == 'any':
    good = [s.p for s, t in zip(scores, toward) if t > 0]
    return row | {
      'p': min(1.0, len(scores) * min(good)) if good else max(s.p for s in scores),
      'toward': 1 if good else -1,
    }
  alike = len(set(toward)) == 1
  return row | {
    'p': max(s.p for s in scores) if alike else 1.0,
    'toward': int(toward[0]) if alike else 0,
  }


def _saturation(results, base) -> dict:
  """Whether, halfway through the run, understanding has reached a larger share of its final gain
  than generation has.
  """
  row = _row(
    'saturates_earlier',
    'understanding saturates earlier than generation (share of the final gain at half of the run)',
    MORE,
  )
  steps = results.steps(base, 'unified')
  middle = [
    s
    for s in steps
    if steps and abs(s - steps[-1] / 2) <= 0.26 * steps[-1] and s not in (0, steps[-1])
  ]
  if not middle:
    return row
  half = min(middle, key=lambda s: abs(s - steps[-1] / 2))

  def gains_of(measure):
    prefix = prefix_of(results, base, 'unified', half, measure)

    def at(step):
      return results.score(base, 'unified', measure, step=step, prefix=prefix)

    return [at(half) - at(0), at(steps[-1]) - at(0)]

  gains = {measure: gains_of(measure) for measure in (GENERATION, READING)}
  finals = [gains[m][1] for m in gains]
  row['contrasts'] = [
    {'what': f'{MEASURES[m].title}: gain at step {half} of {steps[-1]}', **gains[m][0].json()}
    for m in gains
  ]
  row['contrasts'] += [
    {'what': f'{MEASURES[m].title}: gain at the end, same list', **gains[m][1].json()}
    for m in gains
  ]
  if any(f.interval[0] <= 0 for f in finals):
    return row | {
      'p': 1.0,
      'toward': 0,
      'note': 'the gain of a task is not significant, so its share is undefined',
    }
  share = combine(
    lambda u, uu, g, gg: u / uu - g / gg,
    gains[READING][0],
    gains[READING][1],
    gains[GENERATION][0],
    gains[GENERATION][1],
  )
  row['contrasts'].append(
    {'what': 'share of understanding minus share of generation', **share.json()}
  )
  return row | {'p': share.p, 'toward': int(np.sign(share.value))}


def _binding(results, base) -> dict:
  """Whether attribute binding gains more than every other task."""
  row = _row(
    'binding_gains_most', 'attribute binding gains most (its gain minus the largest other)', MORE
  )
  gains = {
    task: results.difference(base, 'unified', 'base', f'generation/{task}')
    for task in grammar.GENEVAL
  }
  if any(g is None for g in gains.values()):
    return row
  others = [g for task, g in gains.items() if task != BINDING]
  lead = combine(lambda first, *rest: first - np.max(rest, axis=0), gains[BINDING], *others)
  row['contrasts'] = [
    {'what': f'gain of {BINDING} minus the largest gain of the others', **lead.json()}
  ]
  return row | {'p': lead.p, 'toward': int(np.sign(lead.value))}


def prefix_of(results, base, variant, step, measure) -> int:
  """The length of the quick evaluation at a step: rows per task, or images."""
  rows = results.rows(base, variant, results.seeds(base, variant)[0], step)[MEASURES[measure].rows]
  return len(rows) if measure.startswith('description') else len(rows) // len(grammar.GENEVAL)


def _row(key, sentence, kind):
  return {'key': key, 'claim': sentence, 'kind': kind, 'p': None, 'toward': 0, 'contrasts': []}


def _shown(contrast, score: Score, seeds) -> dict:
  titles = [variants_lib.VARIANTS[v].title for v in (contrast.a, contrast.b)]
  return {
    'what': f'{MEASURES[contrast.measure].title}: {titles[0]} − {titles[1]}',
    **score.json(),
    'seeds': list(seeds),
    'p_equal': score.p_outside,
    'equal': score.p_outside < LEVEL,
  }


def _surely_outside(score: Score) -> bool:
  low, high = score.interval
  return low > MARGIN or high < -MARGIN


def _verdict(row) -> str:
  if row['p'] is None:
    return 'no data'
  sure = row['p_adjusted'] < LEVEL
  if row['kind'] == EQUAL:
    return 'confirmed' if sure else 'reversed' if row['outside'] else 'not confirmed'
  if row['kind'] == OPEN:
    if sure:
      return 'rises' if row['toward'] > 0 else 'falls'
    return 'within 2 points' if all(c['equal'] for c in row['contrasts']) else 'neither shown'
  if not sure or not row['toward']:
    return 'not confirmed'
  return 'confirmed' if row['toward'] > 0 else 'reversed'


# Beyond single claims.


def error_closed(results: Results, base: str, variant: str, against: str = 'base') -> Score | None:
  """The share of the base's error in generation that a variant closes."""
  seeds = results.common(base, variant, against)
  after, before = (results.score(base, v, GENERATION, seeds) for v in (variant, against))
  return (
    None
    if after is None or before is None
    else combine(lambda a, b: (a - b) / np.maximum(1 - b, 1e-9), after, before)
  )
