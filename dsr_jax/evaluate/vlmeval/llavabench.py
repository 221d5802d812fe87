"""LLaVABench: 60 open questions about 24 images; a language model compares each answer with a
reference answer and rates both from 1 to 10.

The score is relative: the mean of the model's ratings over the mean of the reference's, in percent.
A review that cannot be parsed counts as -1 for both and stays in the means, as in VLMEvalKit. The
texts of the judge's rules belong to the benchmark and are read from a file.
"""

from collections.abc import Mapping, Sequence
import os
from typing import Any, NamedTuple

import numpy as np

from dsr_jax import files, inputs
from dsr_jax.errors import InputError
from dsr_jax.evaluate import protocol
from dsr_jax.evaluate.vlmeval import judge as judge_lib
from dsr_jax.evaluate.vlmeval import prompts, tsv
from dsr_jax.evaluate.vlmeval.table_benchmark import SOURCE, TableBenchmark, item

CATEGORIES = ('conv', 'detail', 'complex')
SYSTEM = 'You are a helpful and precise assistant for checking the quality of the answer.'
FAILED = -1.0


class Pair(NamedTuple):
  """The judge's two ratings."""

  reference: float
  model: float


def parse(review: str) -> Pair:
  """The two numbers in a review's first line, with commas read as blanks; (-1, -1) unless there are
  exactly two, separated by one blank.

  The range is not checked: 0, 100, nan and inf are accepted. Extra blanks and tabs are not.
  """
  parts = review.split('\n')[0].replace(',', ' ').split(' ')
  try:
    reference, model = (float(part) for part in parts)
  except ValueError:
    return Pair(FAILED, FAILED)
  return Pair(reference, model)


def relative_scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
  """VLMEvalKit's table, not rounded: {overall and each category: {relative score, ten times the
  model's mean, ten times the reference's mean}}.

  rows: category, gpt4_score, score.
  """
  parts = {'overall': list(rows)}
  for row in rows:
    parts.setdefault(row['category'], []).append(row)
  table = {}
  for name, members in parts.items():
    model = float(np.mean([row['score'] for row in members]))
    reference = float(np.mean([row['gpt4_score'] for row in members]))
    relative = 100 * model / reference if reference else float('nan')
    table[name] = {'relative': relative, 'model': 10 * model, 'reference': 10 * reference}
  return table


def read_rules(path: str) -> dict[str, tuple[str, str]]:
  """{category: (role, rule)} from a JSON file.

  The layout is that of LLaVA's own rule.json: {"llava_bench_conv": {"role": "Assistant", "prompt":
  ...}, ...}; a plain {"conv": "..."} is accepted too.
  """
  if not os.path.isfile(path):
    raise InputError(
      f"--judge_rules {inputs.shown(path)} does not exist; name a copy of LLaVA's rule.json"
    )
  content = files.read_json(path)
  rules = {}
  for category in CATEGORIES:
    rule = content.get(f'llava_bench_{category}', content.get(category))
    if isinstance(rule, dict):
      rules[category] = rule.get('role', 'Assistant'), rule.get('prompt')
    else:
      rules[category] = 'Assistant', rule
    if not isinstance(rules[category][1], str):
      raise InputError(
        f'{path} has no rule for {category}, but needs llava_bench_conv, llava_bench_detail and '
        "llava_bench_complex, each with a prompt; use LLaVA's rule.json"
      )
  return rules


def judge_text(row: Mapping[str, Any], answer: str, role: str, rule: str) -> str:
  """What the judge reads."""
  parts = [
    f'[Context]\n{row["caption"]}',
    f'[Question]\n{row["question"]}',
    f'[{role} 1]\n{row["gpt4_ans"]}',
    f'[End of {role} 1]',
    f'[{role} 2]\n{answer}',
    f'[End of {role} 2]',
    f'[System]\n{rule}',
  ]
  return '\n\n'.join(parts) + '\n\n'


class LLaVABench(TableBenchmark):
  """The benchmark; see `protocol.Asking`. Without a judge there is no score, only a file to judge
  (`write_requests`).
  """

  about = protocol.About(
    name='llavabench',
    title='LLaVABench',
    kind='understanding',
    headline='relative score',
    source=SOURCE,
    license='not shipped',
  )
  dataset = 'LLaVABench'
  required = ('caption', 'gpt4_ans', 'category')

  def __init__(
    self,
    path: str,
    rules: Mapping[str, tuple[str, str]] | None = None,
    judge: judge_lib.Judge | None = None,
    cache: str | None = None,
  ):
    """rules: from `read_rules`. judge, cache: see `judge.ask_all`."""
    super().__init__(path)
    self._rules = rules
    self._judge = judge
    self.cache = cache

  @property
  def has_judge(self) -> bool:
    return self._judge is not None

  def prompt(self, row: tsv.Row) -> str:
    return prompts.bare(row)

  def requests(self, answers: Mapping[str, str]) -> list[judge_lib.Request]:
    """What the judge is asked."""
    if self._rules is None:
      raise InputError(
        "--judge_rules is missing; LLaVABench needs its judge's rules: name a copy of LLaVA's "
        'rule.json'
      )
    requests = []
    for row, answer in self.answered(answers):
      if row['category'] not in self._rules:
        raise InputError(
          f'{self.table.path} has the category {row["category"]}, which is none of '
          f'{", ".join(CATEGORIES)}; name the table of LLaVABench'
        )
      role, rule = self._rules[row['category']]
      requests.append(judge_lib.Request(row['index'], SYSTEM, judge_text(row, answer, role, rule)))
    return requests

  def write_requests(self, answers: Mapping[str, str], path: str) -> str:
    """The file to judge; returns its path."""
    return judge_lib.write_requests(self.requests(answers), path)

  def score(self, answers: Mapping[str, str]) -> protocol.Scores:
    """Clusters are images."""
    if self._judge is None:
      raise InputError(
        'LLaVABench needs a judge; set --judge_url and --judge_model, or judge the written '
        'requests elsewhere and name the file of reviews'
      )
    replies = judge_lib.ask_all(self.requests(answers), self._judge, self.cache)
    values, rated, clusters, items = [], [], [], []
    unreadable = 0
    for row, answer in self.answered(answers):
      reply = replies[row['index']]
      pair = parse(reply.review)
      unreadable += not reply.failure and pair == Pair(FAILED, FAILED)
      value = np.zeros(3 * (1 + len(CATEGORIES)))
      for place in (0, 1 + CATEGORIES.index(row['category'])):
        value[3 * place : 3 * place + 3] = pair.model, pair.reference, 1
      values.append(value)
      rated.append({**row, 'score': pair.model, 'gpt4_score': pair.reference})
      clusters.append(self.picture_of(row))
      items.append(
        item(row, answer, review=reply.review, failure=reply.failure, scores=[str(x) for x in pair])
      )
    names, sums, _ = protocol.gathered(values, clusters)
    statistics = {'relative score': _relative(0)}
    for i, category in enumerate(CATEGORIES):
      statistics[category] = _relative(1 + i)
    failed = sum(bool(reply.failure) for reply in replies.values())
    return protocol.Scores(
      clusters=names,
      sums=sums,
      statistics=statistics,
      labels=dict.fromkeys(statistics, protocol.Label.OTHER_MODEL),
      items=tuple(items),
      counts=self.counts(answers, failed=failed, unreadable=unreadable),
      breakdown=relative_scores(rated),
      notes=(
        f'judged by {getattr(self._judge, "model", "a callable")}; {failed} requests failed and '
        f'{unreadable} reviews could not be parsed: these count as -1 for both sides in the means',
      ),
    )


def _relative(place):
  """The statistic: the sum of the model's ratings over the sum of the reference's."""

  def relative(sums):
    model, reference = sums[:, 3 * place], sums[:, 3 * place + 1]
    # Failed reviews count as -1, so the reference's sum may be 0: the result is then NaN.
    with np.errstate(divide='ignore', invalid='ignore'):
      return np.where(reference != 0, model / reference, np.nan)

  return relative
