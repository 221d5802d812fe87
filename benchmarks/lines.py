"""How much code each part had and has, after libraries replaced some of it.

  python -m benchmarks.lines [--before=fa85948 --after=HEAD]

There are two measures, because the code was reformatted in between. Lines: all lines, with Python
formatted by the project's `ruff format` on both sides. Words: names, numbers and symbols of the
code, without comments and docstrings; the text of pages counts the same in Python and in a
template. Prints a table in Markdown.
"""

import ast
import pathlib
import re
import subprocess
import sys

from absl import flags

from dsr_jax import cli
from dsr_jax.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Part -> (its files before, its files after), in dsr_jax except those of the tests.
PARTS = {
  'metrics and TensorBoard': (['events.py', 'metrics.py'], ['runtime/metrics.py']),
  "the study's figures": (['study_svg.py', 'study_figures.py'], ['study/figures.py']),
  'pages': (
    ['charts.py', 'page.py', 'report.py', 'probe_page.py', 'replay_page.py'],
    [
      *('reporting/charts.py', 'reporting/html.py', 'report/page.py'),
      *('probe/page.py', 'replay/page.py'),
      *(f'reporting/templates/{name}.html.j2' for name in ('page', 'parts', 'run')),
      *(f'reporting/templates/{name}.html.j2' for name in ('probe', 'replay')),
      'reporting/templates/style.css',
    ],
  ),
  'several processes': (
    ['processes.py'],
    ['runtime/distributed.py', 'runtime/coordination_log.py'],
  ),
  'the compiled step': (['programs.py'], ['runtime/compiled.py']),
  'workdir and buckets': (
    ['workdir.py'],
    ['runtime/workdir.py', 'runtime/run_files.py', 'report/summary.py'],
  ),
  'checkpoints': (['checkpoints.py'], ['runtime/checkpoints.py', 'runtime/checksums.py']),
  'plan': (
    ['plan.py', 'plan_costs.py', 'plan_memory.py', 'plan_program.py', 'plan_sizes.py'],
    [f'plan/{name}.py' for name in ('__main__', 'costs', 'memory', 'program', 'report', 'sizes')],
  ),
  'reading HLO': (['plan_hlo.py'], ['../tests/support/hlo.py']),
}


def text(commit: str, path: str) -> str:
  """The content of a file in a commit."""
  place = path.removeprefix('../') if path.startswith('../') else f'dsr_jax/{path}'
  shown = subprocess.run(
    ['git', 'show', f'{commit}:{place}'], cwd=ROOT, capture_output=True, text=True
  )
  if shown.returncode:
    raise InputError(
      f'{commit} has no {place} ({shown.stderr.strip()}); name another commit in --before or '
      '--after'
    )
  return shown.stdout


def lines(path: str, content: str) -> int:
  """The number of lines, with Python formatted as now."""
  if path.endswith('.py'):
    command = [sys.executable, '-m', 'ruff', 'format', '--stdin-filename', f'{ROOT}/part.py', '-']
    done = subprocess.run(
      command, cwd=ROOT, input=content, capture_output=True, text=True, check=True
    )
    content = done.stdout
  return len(content.splitlines())


def words(path: str, content: str) -> int:
  """The number of names, numbers and symbols, without comments and docstrings."""
  if path.endswith('.py'):
    tree = ast.parse(content)
    for node in ast.walk(tree):
      body = getattr(node, 'body', None)
      if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
        if isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str):
          body[0] = ast.Pass()
    content = ast.unparse(tree)
  else:
    content = re.sub(r'\{#.*?#\}|/\*.*?\*/', '', content, flags=re.DOTALL)
  return len(re.findall(r'\w+|[^\w\s]', content))


def main(argv, f=flags.FLAGS):
  """Prints the table."""
  cli.no_arguments(argv)
  totals = [0, 0, 0, 0]
  print('| part | lines before | after | words before | after |')
  print('|---|---:|---:|---:|---:|')
  for part, (before, after) in PARTS.items():
    old = [(path, text(f.before, path)) for path in before]
    new = [(path, text(f.after, path)) for path in after]
    row = [sum(count(*file) for file in side) for count in (lines, words) for side in (old, new)]
    totals = [total + number for total, number in zip(totals, row)]
    print(f'| {part} | {" | ".join(f"{number:,}" for number in row)} |')
  print(f'| all | {" | ".join(f"{number:,}" for number in totals)} |')


def define_flags(f=flags.FLAGS):
  flags.DEFINE_string('before', 'fa85948', 'A commit.', flag_values=f)
  flags.DEFINE_string('after', 'HEAD', 'A commit.', flag_values=f)


if __name__ == '__main__':
  cli.run_main(main, define_flags)
