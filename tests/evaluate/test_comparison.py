"""Tables of before and after, beside the paper's rows."""

import json

import numpy as np
import pytest

from dsr_jax.errors import InputError
from dsr_jax.evaluate import comparison, geneval, paper, protocol, registry, stats
from dsr_jax.evaluate.t2i_compbench import benchmark as t2i


def drawn(rate, seed, benchmark=None, prompts=slice(0, None, 9)):
  """GenEval records of a coin."""
  rng = np.random.default_rng(seed)
  benchmark = benchmark or geneval.GenEval()
  records = {
    benchmark.picture_path(prompt, sample): {'correct': bool(rng.random() < rate)}
    for prompt in benchmark.prompts()[prompts]
    for sample in range(4)
  }
  return benchmark.score(records)


def test_every_benchmark_has_a_name_and_its_headline_is_a_column_of_the_paper():
  names = [name for name in registry.NAMES if name != registry.PLUS]
  assert [about.name for about in registry.abouts()] == names
  for about in registry.abouts():
    if about.name != 't2i_compbench':  # the paper has its six categories
      assert paper.rows_of(about.name, about.headline)['Janus-Pro-7B']
  for category in t2i.CATEGORIES:
    assert len(paper.rows_of('t2i_compbench', category)) >= 3


def test_the_papers_numbers():
  assert paper.rows_of('t2i_compbench', 'color')['Janus-Pro-7B+DSR'] == 0.7824
  assert paper.rows_of('geneval', 'overall')['Janus-Pro-1B'] == 0.73
  assert paper.rows_of('mmmu', 'accuracy')['Janus-Pro-7B'] == 41.1
  assert paper.rows_of('geneval', 'any sample') == {}
  assert {n.table for n in paper.numbers()} == set(range(1, 8))


def test_differences_are_paired_and_the_order_of_the_lists_does_not_matter():
  after, before = drawn(0.8, 1), drawn(0.5, 2)
  table = comparison.table(geneval.GenEval.about, after, before)
  first = table.lines[0]
  assert first.name == 'overall'
  assert first.difference.value == pytest.approx(first.after.value - first.before.value)
  assert first.difference.low < first.difference.value < first.difference.high
  again = comparison.table(geneval.GenEval.about, after, after)
  assert again.lines[0].difference == stats.Estimate(0, 0, 0)
  turned = before._replace(
    clusters=before.clusters[::-1], sums=before.sums[::-1], strata=before.strata[::-1]
  )
  assert comparison.table(geneval.GenEval.about, after, turned).lines[0].difference == (
    first.difference
  )


def test_other_lists_have_no_difference():
  with pytest.raises(InputError, match='evaluate both models on it'):
    comparison.table(geneval.GenEval.about, drawn(0.8, 1), drawn(0.8, 1, prompts=slice(0, 50)))


def test_what_is_not_comparable_never_stands_beside_the_paper():
  benchmark = t2i.T2ICompBench()
  records = {
    benchmark.picture_path(prompt, 0): {part: 0.6 for part in t2i.PARTS[prompt.group]}
    for prompt in benchmark.prompts()[::50]
  }
  table = comparison.table(benchmark.about, benchmark.score(records))
  beside = {line.name: bool(line.paper) for line in table.lines}
  assert beside['color'] and beside['non_spatial']
  assert not beside['spatial'] and not beside['complex'] and not beside['mean']


def test_formats():
  benchmark = geneval.GenEval(protocol.Label.OTHER_MODEL)
  table = comparison.table(benchmark.about, drawn(0.8, 1), drawn(0.5, 2), notes=['limit 10'])
  text = comparison.to_markdown([table], 'new', 'old')
  rows = [line for line in text.split('\n') if line.startswith('|')]
  assert len({line.count('|') for line in rows}) == 1
  assert 'paper: Janus-Pro-7B+DSR' in rows[0] and '| 0.84 |' in text and '- limit 10' in text
  values = json.loads(json.dumps(comparison.to_json([table]), allow_nan=False))
  assert values['geneval']['statistics']['overall']['label'] == 'official rules, other model'
  latex = comparison.to_latex([table], 'new_1', 'old')
  assert r'new\_1' in latex and latex.count(r'\\') == len(table.lines) + 1
  nothing = table.lines[0]._replace(after=stats.Estimate(float('nan'), 0, 0))
  values = comparison.to_json([table._replace(lines=(nothing,))])
  assert values['geneval']['statistics']['overall']['after']['value'] is None


def test_the_interval_covers_a_known_share():
  """A coin of 553 prompts: the interval of the mean of tasks has about the width of theory."""
  scores = drawn(0.5, 3, prompts=slice(0, None))
  line = comparison.table(geneval.GenEval.about, scores).lines[0]
  sizes = np.array([80, 99, 80, 94, 100, 100]) * 4
  wanted = 2 * 1.96 * np.sqrt(np.sum(0.25 / sizes)) / 6
  assert line.after.high - line.after.low == pytest.approx(wanted, rel=0.15)
