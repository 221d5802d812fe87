"""What the original scorers gave for made-up inputs; see golden/benchmarks/README.md."""

import gzip
import json

from places import ROOT

FOLDER = ROOT / 'tests' / 'golden' / 'benchmarks'


def lines(name):
  """The cases of a file of JSON lines."""
  with gzip.open(FOLDER / f'{name}.gz', 'rt', encoding='utf-8') as f:
    return [json.loads(line) for line in f if line.strip()]


def content(name):
  """The value of a JSON file."""
  with gzip.open(FOLDER / f'{name}.gz', 'rt', encoding='utf-8') as f:
    return json.load(f)


def tokens(case, make):
  """The tokens of a case."""
  return [make(text, pos, bool(blank)) for text, pos, blank in case['tokens']]
