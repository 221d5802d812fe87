"""The benchmarks by name."""

import functools

from dsr_jax.evaluate import geneval, protocol
from dsr_jax.evaluate.t2i_compbench import benchmark as t2i_compbench
from dsr_jax.evaluate.vlmeval import choice, hallusionbench, judge, llavabench, pope, tsv

# With the two categories of T2I-CompBench++; `3d_spatial` is only drawn, not scored.
PLUS = f'{t2i_compbench.NAME}++'
DRAWINGS = {
  geneval.NAME: geneval.GenEval,
  t2i_compbench.NAME: t2i_compbench.T2ICompBench,
  PLUS: functools.partial(
    t2i_compbench.T2ICompBench, (*t2i_compbench.CATEGORIES, *t2i_compbench.EXTRA)
  ),
}
TABLES = {
  'pope': pope.Pope,
  'hallusionbench': hallusionbench.HallusionBench,
  'mmbench': choice.MMBench,
  'seedbench': choice.SEEDBench,
  'mmmu': choice.MMMU,
  'llavabench': llavabench.LLaVABench,
}
NAMES = (*DRAWINGS, *TABLES)


def open_drawing(name: str, labels: dict[str, protocol.Label] | None = None) -> protocol.Drawing:
  """A benchmark of images.

  labels: {'geneval' or a part of T2I-CompBench: how close its evaluator is to the official one}.
  """
  if not labels:
    return DRAWINGS[name]()
  if name == geneval.NAME:
    return geneval.GenEval(labels[geneval.NAME])
  return DRAWINGS[name](labels=labels)


def open_asking(
  name: str,
  data_dir: str,
  source: str | None = None,
  *,
  any_version: bool = False,
  judge_rules: str | None = None,
  ask_judge: judge.Judge | None = None,
  judge_cache: str | None = None,
) -> protocol.Asking:
  """A benchmark of questions.

  Args:
    name: a key of TABLES.
    data_dir: where downloaded tables are kept.
    source: the table, or a folder that contains it; by default `data_dir`, then the network.
    any_version: accept a table with any md5.
    judge_rules: LLaVABench: the file with the judge's rules.
    ask_judge: LLaVABench: the judge.
    judge_cache: LLaVABench: where the judge's reviews are kept.
  """
  path = tsv.locate(name, source, data_dir, any_version=any_version)
  if name != llavabench.LLaVABench.about.name:
    return TABLES[name](path)
  rules = llavabench.read_rules(judge_rules) if judge_rules else None
  return llavabench.LLaVABench(path, rules, ask_judge, judge_cache)


def abouts() -> list[protocol.About]:
  """The descriptions of all benchmarks."""
  classes = (geneval.GenEval, t2i_compbench.T2ICompBench, *TABLES.values())
  return [benchmark.about for benchmark in classes]
