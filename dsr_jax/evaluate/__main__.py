"""Evaluates models on the paper's benchmarks or the lists of Scenes, and compares them.

  python -m dsr_jax.evaluate --model=MODEL --benchmarks=geneval,pope,scenes/geneval --output=OUT
  python -m dsr_jax.evaluate --model=BEFORE,AFTER --benchmarks=t2i_compbench --output=OUT --limit=10
  python -m dsr_jax.evaluate --model=RUN@all --benchmarks=geneval,mmbench --output=OUT

There are two stages: the model draws and answers (--stage=answer), then evaluators and rules score
(--stage=score). By default, both run. OUT/MODEL/BENCHMARK has the layout of the official scorer.
Run the same command again to resume. Writes OUT/results.{json,md,tex} and OUT/page.html, and
sheets for Scenes.

Several processes can draw and answer together: run the same command in each, with --coordinator,
--processes and --process as in training.
"""

import contextlib
import dataclasses
import errno
import os
from typing import Any, NamedTuple

from absl import flags
import jax

from dsr_jax import cli, config_loading, families, files, flag_types, images
from dsr_jax.convert import locate
from dsr_jax.data import folders as data_folders
from dsr_jax.errors import InputError
from dsr_jax.evaluate import (
  benchmarks,
  evaluator_choice,
  page,
  protocol,
  registry,
  results,
  scoring,
)
from dsr_jax.evaluate.answering import asking, drawing, folders, subject
from dsr_jax.evaluate.sampler import ListSampler
from dsr_jax.evaluate.vlmeval import judge, llavabench, tsv
from dsr_jax.runtime import checkpoints, distributed
from dsr_jax.scenes import world

SCENES = 'scenes'
DEFAULT_CONFIG = 'scenes'
STAGES = ('answer', 'score')
ALL_STEPS = '@all'
JUDGE_CACHE = 'judge.jsonl'
OUTPUTS = (
  *('results.json', 'results.md', 'results.tex', 'page.html'),
  *('pictures.png', 'texts.png'),  # of Scenes
)


class Asked(NamedTuple):
  """Names of benchmarks: the lists of Scenes, without their prefix, and the paper's benchmarks."""

  scenes: tuple[str, ...]
  official: tuple[str, ...]


def check_benchmarks(names) -> Asked:
  """The requested benchmarks; all lists of Scenes if none is given. The InputError for an unknown
  name lists those that exist.
  """
  asked = list(dict.fromkeys(name.strip() for name in names if name.strip())) or [SCENES]
  scenes, official = [], []
  for name in asked:
    if name == SCENES:
      scenes += benchmarks.BENCHMARKS
    elif name.startswith(f'{SCENES}/') and name.removeprefix(f'{SCENES}/') in benchmarks.BENCHMARKS:
      scenes.append(name.removeprefix(f'{SCENES}/'))
    elif name in registry.NAMES:
      official.append(name)
    else:
      raise InputError(
        f'unknown benchmark {name!r} in --benchmarks; choose from {", ".join(known_names())}'
      )
  return Asked(tuple(dict.fromkeys(scenes)), tuple(official))


def known_names() -> list[str]:
  """All names that --benchmarks accepts."""
  return [*registry.NAMES, SCENES, *(f'{SCENES}/{name}' for name in benchmarks.BENCHMARKS)]


# The models.


class Models(NamedTuple):
  """names: the model to compare with comes first. steps: of a run's checkpoints, or None."""

  names: tuple[str, ...]
  steps: tuple[int, ...] | None


def models_of(model: str, before: str, base: str = '') -> Models:
  """--model and --before -> names. RUN@all stands for the run's source model and its checkpoints.

  Errors: InputError for a model that does not exist.
  """
  names = [name.strip() for name in model.split(',') if name.strip()]
  names = [before, *names] if before else names
  if not any(ALL_STEPS in name for name in names):
    for name in names:
      _check_exists(name)
    return Models(tuple(names), None)
  if len(names) > 1:
    raise InputError(
      f'{ALL_STEPS} cannot be combined with other models ({", ".join(names)}); give that run '
      'alone: it is compared with the model that it started from'
    )
  run, _, role = names[0].partition(ALL_STEPS)
  steps = checkpoints.steps_in(run)
  if not steps or (role and role.removeprefix(':') not in locate.ROLES):
    raise InputError(
      f'no checkpoints found for {names[0]}; give the workdir of a run that has some, such as '
      f'runs/a{ALL_STEPS}'
    )
  _, about, _ = checkpoints.load_trained(run, steps[-1])
  began_with = about['model']
  if began_with['name'] != SCENES:
    began_with = {'name': locate.base_of(began_with, run, base)}
  names = [began_with['name'], *(f'{run}@{step}{role}' for step in steps)]
  return Models(tuple(names), (0, *steps))


def _check_exists(name):
  """InputError unless the model exists. Reads no weights."""
  path, step, _ = locate.split(name)
  if not locate.is_run(path):
    locate.directory_of(path)
  elif step is not None and step not in checkpoints.steps_in(path):
    locate.locate(name)  # its error lists the steps that exist


# The command.


def main(argv, f=flags.FLAGS):
  cli.no_arguments(argv)
  cli.require(model=f.model, output=f.output)
  asked = check_benchmarks(f.benchmarks)
  _check_numbers(f)
  plain = config_loading.read(DEFAULT_CONFIG)
  named = f.config or plain
  config = config_loading.from_config_dict(named)
  given = named.to_dict() != plain.to_dict()
  cluster = distributed.find(f.coordinator, f.processes, f.process)
  if cluster and asked.scenes:
    raise InputError(
      'the lists of Scenes run in one process only, but several were requested; evaluate them '
      'with a separate command'
    )
  models = models_of(f.model, f.before, f.base)
  check_output(f.output)
  official = open_benchmarks(asked.official, f)
  evaluator_choice.check(evaluator_choice.chosen_of(f), f.blip_size)
  wishes = subject.Wishes(config if given else None, f.best_of, f.max_tokens, f.template, f.base)
  places = folders_of(f.output, models.names)

  with _room_to_write(f.output):
    parts = []
    if asked.official and f.stage != 'score':
      with distributed.together(cluster, f.wait_seconds) as team:
        _answer(models, official, places, wishes, f.limit, team)
        if not team.lead:
          return
    if asked.official and f.stage != 'answer':
      parts.append(_score(models, official, places, f))
    if asked.scenes and f.stage != 'answer':
      parts.append(_measure_scenes(models, asked.scenes, config, wishes))
    found = _write(f.output, parts)
  cli.print_json({'output': f.output, **_flat(found)}, kept=f.output)


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)


@contextlib.contextmanager
def _room_to_write(output):
  """Turns a refusal by the file system into one sentence."""
  try:
    yield
  except OSError as e:
    if e.errno not in NO_ROOM:
      raise
    raise InputError(
      f'cannot write below {output} ({e.strerror}); free space or fix its permissions, then run '
      'the same command again to resume'
    ) from e


def _check_numbers(f):
  if f.best_of < 1:
    raise InputError(f'--best_of is {f.best_of}; set it to at least 1')
  if f.limit < 0:
    raise InputError(f'--limit is {f.limit}; set it to 0 (all items) or more')
  if f.max_tokens < 1:
    raise InputError(f'--max_tokens is {f.max_tokens}; set it to at least 1')
  if f.stage not in ('', *STAGES):
    raise InputError(
      f'--stage is {f.stage}; set it to {" or ".join(STAGES)}, or omit it to run both'
    )


def check_output(output: str) -> None:
  """InputError unless `output` is new, empty, or holds earlier output of this command."""
  files.check_place(output)
  if not os.path.isdir(output):
    return
  for name in sorted(os.listdir(output)):
    place = os.path.join(output, name)
    if name.removesuffix('.new') in OUTPUTS or (os.path.isdir(place) and _is_ours(place)):
      continue
    raise InputError(
      f'--output {output} contains {name}, which this command did not write; name a new or empty '
      'folder, or an earlier output of this command'
    )


def _is_ours(place) -> bool:
  """Whether a folder contains only folders of benchmarks."""
  names = os.listdir(place)
  return all(name in registry.NAMES for name in names)


def folders_of(output: str, names) -> dict[str, str]:
  """{model: its folder}, a different one for each model."""
  taken: dict[str, str] = {}
  for name in names:
    if name in taken:
      continue
    short = folders.short_name(name)
    number = 2
    while os.path.join(output, short) in taken.values():
      short = f'{folders.short_name(name)}-{number}'
      number += 1
    taken[name] = os.path.join(output, short)
  return taken


# The paper's benchmarks.


class Official(NamedTuple):
  """One of the paper's benchmarks. asking: None if it is drawn. table: md5 of its questions."""

  name: str
  asking: protocol.Asking | None = None
  table: str = ''


def open_benchmarks(names, f) -> list[Official]:
  """Finds and checks every question table before any work starts."""
  sources = _sources(f.data)
  asks = None
  if f.judge_reviews:
    asks = judge.Reviewed(f.judge_reviews)
  elif f.judge_url or f.judge_model:
    asks = judge.OpenAIJudge(f.judge_url, f.judge_model)
  found = []
  for name in names:
    if name in registry.DRAWINGS:
      found.append(Official(name))
      continue
    source = sources.get(name, sources.get(''))
    path = tsv.locate(name, source, tables_directory(), any_version=f.any_version)
    opened = registry.open_asking(
      name,
      tables_directory(),
      path,
      any_version=True,  # `tsv.locate` has checked it
      judge_rules=f.judge_rules or None,
      ask_judge=asks,
      judge_cache=None,
    )
    found.append(Official(name, opened, tsv.md5_of(path)))
  return found


def tables_directory() -> str:
  """Where downloaded question tables are kept."""
  return os.path.join(data_folders.cache_directory(), 'benchmarks')


def _sources(values) -> dict[str, str]:
  """--data=DIR,pope=FILE -> {'': DIR, 'pope': FILE}."""
  found = {}
  for value in values:
    name, equals, path = value.partition('=')
    if not equals:
      name, path = '', value
    elif name not in registry.TABLES:
      raise InputError(
        f'--data={value} names no known table; give a folder, or NAME=FILE where NAME is one of '
        f'{", ".join(registry.TABLES)}'
      )
    if not os.path.exists(path):
      raise InputError(f'{path} does not exist; --data needs a table, or a folder of tables')
    found[name] = path
  return found


def _answer(models, official, places, wishes, limit, team):
  """The first stage. Loads each model once."""
  mesh = subject.mesh_of(wishes)
  for name in dict.fromkeys(models.names):
    cli.log(f'loading      {name}')
    with jax.set_mesh(mesh):
      loaded = subject.load(name, wishes, mesh)
      team.agree(model=loaded.identity, how=dataclasses.asdict(loaded.how), limit=limit)
      for one in official:
        folder = os.path.join(places[name], one.name)
        if one.asking is None:
          benchmark = registry.open_drawing(one.name)
          drawing.draw(one.name, loaded, benchmark, folder, limit, team)
        else:
          asking.ask(one.name, loaded, one.asking, folder, limit, team, one.table)


def _score(models, official, places, f) -> 'Part':
  """The second stage, and its tables."""
  looking = scoring.Looking(evaluator_choice.chosen_of(f), f.blip_size)
  scored = {}
  for one in official:
    by_model = {}
    for name in dict.fromkeys(models.names):
      folder = os.path.join(places[name], one.name)
      if one.asking is None:
        by_model[name] = scoring.score_drawing(one.name, folder, looking)
      else:
        if isinstance(one.asking, llavabench.LLaVABench):
          one.asking.cache = os.path.join(folder, JUDGE_CACHE)
        by_model[name] = scoring.score_asking(one.name, one.asking, folder, one.table)
      if by_model[name].why_not:
        cli.log(f'not scored   {one.name} of {name}: {by_model[name].why_not}')
    scored[one.name] = tuple(by_model[name] for name in models.names)
  manifests = [
    folders.read(os.path.join(places[models.names[-1]], one.name)) or {} for one in official
  ]
  family = next((m['family'] for m in manifests if m), '')
  limit = next((m['settings']['limit'] for m in manifests if m), f.limit)
  made = results.Results(models.names, models.steps, scored, family, limit)
  markdown = results.to_markdown(made)
  asking_by_name = {one.name: one.asking for one in official if one.asking}
  return Part(
    results.to_json(made),
    markdown,
    {
      'results.tex': results.to_latex(made).encode(),
      'page.html': page.page(made, places, asking_by_name).encode(),
    },
  )


class Part(NamedTuple):
  """The output of one kind of benchmark: JSON values, Markdown, and further files."""

  found: dict[str, Any]
  markdown: str
  others: dict[str, bytes]


def _write(output: str, parts: list[Part]) -> dict[str, Any]:
  """Writes the output of all kinds; returns the content of `results.json`."""
  found: dict[str, Any] = {}
  for part in parts:
    measured = found.get('benchmarks', {}) | part.found['benchmarks']
    found |= {**part.found, 'benchmarks': measured}
  if not parts:
    return found
  markdown = '\n'.join(part.markdown for part in parts)
  files.write_json(os.path.join(output, 'results.json'), found, indent=1, allow_nan=False)
  files.write_text(os.path.join(output, 'results.md'), markdown)
  for part in parts:
    for name, data in part.others.items():
      files.write_bytes(os.path.join(output, name), data)
  cli.log(f'\n{markdown}')
  return found


def _flat(found) -> dict[str, Any]:
  """The numbers alone, for stdout."""
  values: dict[str, Any] = {}
  for name, result in found.get('benchmarks', {}).items():
    if 'statistics' in result:
      values[name] = {key: line['after']['value'] for key, line in result['statistics'].items()}
    else:
      values[name] = {key: score['value'] for key, score in result['scores'].items()}
  if found.get('not_scored'):
    values['not_scored'] = found['not_scored']
  return values


# The lists of Scenes.


def load(name: str, config, best_of: int = 1, **how) -> benchmarks.Subject:
  """Loads a model to measure. It samples with the given configuration, not with that of its
  training.

  how: `template` and `base` for `locate.resolve`.
  """
  cli.log(f'loading      {name}')
  model = families.model_of(locate.resolve(name, config=config, **how).bundle, name, config.method)
  families.check(model.config, config)
  size = model.spec.image_size
  if size != world.IMAGE_SIZE:
    raise InputError(
      f'the model {name} draws {size} x {size} pixels, but the benchmarks of Scenes have '
      f'{world.IMAGE_SIZE} x {world.IMAGE_SIZE}; name another --model'
    )
  return benchmarks.Subject(
    name=name,
    params=jax.device_put(model.params),
    sampler=ListSampler(
      model.graphdef,
      model.processor,
      chunk=config.eval.chunk,
      max_prompt_tokens=config.data.max_prompt_tokens,
      max_text_tokens=config.method.max_text_tokens,
      seed=config.eval.seed,
      instruction=config.method.instruction,
    ),
    eval=config.eval,
    method=config.method,
    best_of=best_of,
  )


def _measure_scenes(models, names, config, wishes) -> Part:
  """Measures the last model and, if there are several, compares it with the first."""

  def loaded(name):
    base = locate.base_for(name, wishes.base, several=True)
    return load(name, config, wishes.best_of, template=wishes.template, base=base)

  after = loaded(models.names[-1])
  before = loaded(models.names[0]) if len(models.names) > 1 else None
  measured = {f'{SCENES}/{name}': benchmarks.measure(name, after, before) for name in names}
  about = {
    'model': after.name,
    'before': before.name if before else None,
    'settings': {
      'temperature': config.method.temperature,
      'guidance': config.method.guidance,
      'cfg_interval': config.method.cfg_interval,
      'best_of': wishes.best_of,
      'seed': config.eval.seed,
      'prompts_per_task': config.eval.prompts_per_task,
      'images_per_prompt': config.eval.images_per_prompt,
      'pictures': config.eval.pictures,
    },
  }
  subjects = [one for one in (before, after) if one]
  return Part(
    {**about, 'benchmarks': measured},
    benchmarks.markdown(about, measured),
    {
      'pictures.png': images.png(benchmarks.picture_sheet(subjects)),
      'texts.png': images.png(benchmarks.text_sheet(subjects)),
    },
  )


# Flags.


def define_flags(f=flags.FLAGS):
  config_loading.define_config_flag(
    'config',
    'Config file for sampling and computing (only method.temperature, method.guidance, '
    'method.cfg_interval, eval and system are used); set its keys with --config.key=value. By '
    f'default, the lists of Scenes use {DEFAULT_CONFIG}; unless you change a key, all other '
    "benchmarks use the model's own settings, in float32 on a CPU and bfloat16 elsewhere.",
    f,
    default=DEFAULT_CONFIG,
  )
  flag_types.define_path(
    'model',
    None,
    f'The model: {locate.EXPECTED}. BEFORE,AFTER compares the second with the first; '
    f'RUN{ALL_STEPS} evaluates all checkpoints of a run.',
    f,
  )
  flag_types.define_path(
    'before',
    '',
    'A model to compare with. It uses the same seeds, so that differences are paired.',
    f,
  )
  flags.DEFINE_list(
    'benchmarks', [], f'Any of {", ".join(known_names())} (default: {SCENES}).', flag_values=f
  )
  flag_types.define_path(
    'output',
    None,
    'Output folder: new, empty, or an earlier output of this command, which is then resumed.',
    f,
  )
  flags.DEFINE_string(
    'stage',
    '',
    'answer: only draw and answer. score: only score existing answers. By default, both.',
    flag_values=f,
  )
  flags.DEFINE_integer(
    'limit',
    0,
    'For a quick look: this many items of each category, the same for every model; 0: all.',
    flag_values=f,
  )
  flags.DEFINE_integer(
    'best_of',
    1,
    "Each sampled image or text is the best of this many, by the model's own reward.",
    flag_values=f,
  )
  flags.DEFINE_integer(
    'max_tokens', subject.MAX_TOKENS, 'Maximum length of an answer, in tokens.', flag_values=f
  )
  locate.define_flags(f)
  flag_types.define_paths(
    'data',
    [],
    'Question tables: a folder, or NAME=FILE. By default, they are downloaded to '
    f'~/.cache/dsr_jax/benchmarks, or below {data_folders.CACHE_VARIABLE}.',
    f,
  )
  flags.DEFINE_bool('any_version', False, 'Accept question tables with any md5.', flag_values=f)
  flags.DEFINE_string(
    'judge_url',
    '',
    'LLaVABench: URL of an API compatible with https://api.openai.com/v1.',
    flag_values=f,
  )
  flags.DEFINE_string('judge_model', '', "LLaVABench: the judge's name at that URL.", flag_values=f)
  flag_types.define_path(
    'judge_rules', '', "LLaVABench: the judge's prompts, LLaVA's rule.json.", f
  )
  flag_types.define_path('judge_reviews', '', 'LLaVABench: a file of existing reviews.', f)
  evaluator_choice.define_evaluator_flags(f)
  flags.DEFINE_string(
    'coordinator', None, 'HOST:PORT of the first process, for several processes.', flag_values=f
  )
  flags.DEFINE_integer('processes', None, 'Number of processes.', flag_values=f)
  flags.DEFINE_integer('process', None, 'Index of this process, from 0.', flag_values=f)
  flags.DEFINE_float('wait_seconds', 120, 'Seconds to wait for the other processes.', flag_values=f)


if __name__ == '__main__':
  cli.run_main(main, define_flags)
