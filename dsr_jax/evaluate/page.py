"""The page that compares models: tables, curves, images for the same prompts and seeds, candidates
with their rewards, and answers.
"""

from collections.abc import Mapping
import os
from typing import Any

from PIL import Image

from dsr_jax.evaluate import comparison, paper, protocol, registry, results
from dsr_jax.evaluate.answering import asking, drawing, folders
from dsr_jax.reporting import html as page_lib
from dsr_jax.reporting.charts import Series, chart

PROMPTS = 6  # shown for a benchmark of images, one per category
SAMPLES = 4  # shown for a prompt
QUESTIONS = 4  # shown for a benchmark of questions
TILE = 192


def page(
  made: results.Results, places: Mapping[str, str], questions: Mapping[str, protocol.Asking]
) -> str:
  """One self-contained page.

  Args:
    made: what was scored.
    places: {model: its folder}.
    questions: {benchmark: its questions}, for benchmarks of questions.
  """
  shown = [made.after] if made.before is None else [made.before, made.after]
  head, rows = made.overview()
  tables = made.tables()
  sections = []
  for name, scored in made.scored.items():
    about = results.about_of(name)
    section: dict[str, Any] = {
      'title': about.title,
      'why_not': scored[-1].why_not,
      'counts': '',
      'notes': (),
      'table': None,
      'prompts': (),
      'candidates': (),
      'answers': (),
    }
    if name in tables:
      cells_head, cells = comparison.cells(tables[name], made.after, made.before)
      section |= {
        'table': page_lib.Table(cells_head, cells),
        'counts': ', '.join(f'{key}: {value}' for key, value in tables[name].counts.items()),
        'notes': tables[name].notes,
      }
    by_model = {model: os.path.join(places[model], name) for model in dict.fromkeys(shown)}
    if name in questions:
      section['answers'] = _answers(questions[name], name, by_model, made)
    else:
      section |= _pictures(name, by_model, made)
    sections.append(section)
  return page_lib.render(
    'evaluate.html.j2',
    title=f'Evaluation of {made.after}',
    lead=f'Compared with {made.before}: differences are paired.' if made.before else '',
    facts=_facts(made, places),
    overview=_overview(head, rows) if len(head) > 1 else None,
    charts=_charts(made),
    sections=sections,
    source=paper.SOURCE,
  )


def _overview(head, rows) -> page_lib.Table:
  """Transposed if needed, so that the longer side runs down: benchmarks, or a run's checkpoints."""
  if len(rows) < len(head):
    head, *rows = (list(column) for column in zip(head, *rows))
  return page_lib.Table(head, rows)


def _facts(made, places) -> list[tuple[str, Any]]:
  facts = [('Model', made.after)]
  facts += [('Before', made.before)] if made.before else []
  for name in made.scored:
    manifest = folders.read(os.path.join(places[made.after], name))
    if manifest:
      settings = manifest['settings']
      facts += [('Weights', manifest['model']['weights'][:12])]
      facts += [
        (key.replace('_', ' '), settings[key])
        for key in ('template', 'guidance', 'temperature', 'best_of', 'seed', 'precision', 'size')
        if key in settings
      ]
      break
  if made.limit:
    facts.append(('Quick look', f'{made.limit} of each category'))
  return facts


def _charts(made) -> list:
  found = []
  for name, curve in made.curves().items():
    about = results.about_of(name)
    series = Series(
      label=about.title,
      role=about.kind,
      steps=curve['steps'],
      values=curve['values'],
      low=curve['low'],
      high=curve['high'],
      smooth=False,
    )
    found.append(chart(f'{about.title}: {curve["statistic"]}', '', [series]))
  return found


# Images.


def _pictures(name, by_model, made) -> dict[str, Any]:
  """Prompts with each model's images, and one prompt's candidates with their rewards."""
  benchmark = registry.open_drawing(name)
  prompts = _spread(drawing.prompts_of(benchmark, made.limit))
  rows, candidates = [], []
  marks = {model: _marks(made, name, model) for model in by_model}
  rewards = {model: drawing.rewards_of(folder) for model, folder in by_model.items()}
  for prompt in prompts:
    lines = []
    for model, folder in by_model.items():
      paths = [benchmark.picture_path(prompt, i) for i in range(min(SAMPLES, benchmark.samples))]
      samples = [
        page_lib.Sample(*marks[model].get(path, ('', [])), src=_tile(os.path.join(folder, path)))
        for path in paths
        if os.path.isfile(os.path.join(folder, path))
      ]
      lines.append((model, samples))
      ranked = _ranked(benchmark, prompt, folder, rewards[model])
      if ranked and len(candidates) < len(by_model):
        candidates.append((prompt.text, model, ranked))
    rows.append({'text': prompt.text, 'group': prompt.group, 'models': lines})
  return {'prompts': rows, 'candidates': candidates}


def _spread(prompts) -> list[protocol.Prompt]:
  """The first prompt of each category, up to PROMPTS."""
  found: dict[str, protocol.Prompt] = {}
  for prompt in prompts:
    found.setdefault(prompt.group, prompt)
  return list(found.values())[:PROMPTS]


def _marks(made, name, model) -> dict[str, tuple[str, list[str]]]:
  """{image: (frame, words)}: what the evaluators found."""
  scores = made.scored[name][made.models.index(model)].scores
  found: dict[str, tuple[str, list[str]]] = {}
  for item in scores.items if scores else ():
    if 'correct' in item:
      words = ['right'] if item['correct'] else [item['reason'].split('\n')[0]]
      found[item['picture']] = 'up' if item['correct'] else 'down', words
    elif item.get('score') is not None:
      found[item['picture']] = '', [f'{item["score"]:.3f}']
  return found


def _ranked(benchmark, prompt, folder, rewards) -> list[page_lib.Sample]:
  """A prompt's candidates by reward, the best and the worst framed. With --best_of these are the
  candidates for its first sample, otherwise its samples.
  """
  first = benchmark.picture_path(prompt, 0)
  record = rewards.get(first)
  if record is None:
    return []
  if len(record['rewards']) > 1:
    paths = drawing.candidate_paths(prompt, len(record['rewards']))
    values = record['rewards']
  else:
    paths = [benchmark.picture_path(prompt, i) for i in range(benchmark.samples)]
    values = [rewards[path]['rewards'][0] for path in paths if path in rewards]
  paths = [os.path.join(folder, path) for path in paths]
  if len(values) < 2 or len(paths) != len(values) or not all(map(os.path.isfile, paths)):
    return []
  order = sorted(range(len(values)), key=lambda i: -values[i])
  marks = {order[0]: 'up', order[-1]: 'down'}
  return [
    page_lib.Sample(marks.get(i, ''), [f'{values[i]:.3f} nats'], src=_tile(paths[i])) for i in order
  ]


def _tile(picture) -> str:
  """A file or a PIL image, no wider than TILE, as a data URL."""
  if isinstance(picture, str):
    with Image.open(picture) as opened:
      picture = opened.convert('RGB')
  shown = picture.copy()
  shown.thumbnail((TILE, TILE))
  return page_lib.jpeg_uri(shown)


# Answers.


def _answers(benchmark, name, by_model, made) -> list[dict[str, Any]]:
  """Questions with each model's answers; those with different answers come first."""
  records = {model: asking.records_of(folder) for model, folder in by_model.items()}
  items: dict[str, dict[str, Any]] = {}
  for model in by_model:
    scores = made.scored[name][made.models.index(model)].scores
    items[model] = {str(item['id']): item for item in scores.items} if scores else {}
  questions = [
    q
    for q in asking.questions_of(benchmark, made.limit)
    if all(q.id in found for found in records.values())
  ]
  questions.sort(key=lambda q: len({found[q.id]['answer'] for found in records.values()}) < 2)
  shown = []
  for question in questions[:QUESTIONS]:
    lines = []
    for model, found in records.items():
      record, item = found[question.id], items[model].get(question.id, {})
      mark = {True: 'up', False: 'down'}.get(item.get('right'), '')
      said = [model]
      said += [' : '.join(map(str, item['scores']))] if 'scores' in item else []
      lines.append(page_lib.Sample(mark, said, text=record['answer']))
      ranked = zip(record.get('rewards', ()), record.get('candidates', ()))
      for reward, text in sorted(ranked, reverse=True):
        lines.append(page_lib.Sample('', [f'candidate, {reward:.3f} nats'], text=text))
    shown.append(
      {
        'text': question.text.strip(),
        'pictures': [_tile(benchmark.picture(key)) for key in question.pictures[:2]],
        'answers': lines,
      }
    )
  return shown
