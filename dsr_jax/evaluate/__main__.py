"""Measures both tasks on the fixed lists of Scenes: pictures are judged, descriptions and yes/no
answers parsed.

  python -m dsr_jax.evaluate --config=configs/scenes.py --model=runs/scenes
  --benchmarks=geneval,pope --output=out

Writes out/results.json and out/results.md (every score with its 95 % interval) and sheets of
pictures and texts drawn with common seeds. With --before=MODEL2 that model is measured too and
every difference is paired.
"""

import os

from absl import flags
import jax

from dsr_jax import cli, config_loading, families, files, flag_types, images
from dsr_jax.convert import locate
from dsr_jax.errors import InputError
from dsr_jax.evaluate import benchmarks
from dsr_jax.evaluate.sampler import ListSampler
from dsr_jax.scenes import world

OUTPUTS = ('results.json', 'results.md', 'pictures.png', 'texts.png')


def check_benchmarks(names) -> tuple[str, ...]:
  """The benchmarks that are asked for, all of them if none is. InputError lists those that
  exist.
  """
  asked = [name.strip() for name in names if name.strip()]
  for name in asked:
    if name not in benchmarks.BENCHMARKS:
      raise InputError(
        f'found the benchmark {name!r}; expected some of {", ".join(benchmarks.BENCHMARKS)}; '
        'name those in --benchmarks'
      )
  return tuple(dict.fromkeys(asked or benchmarks.BENCHMARKS))


def load(name: str, config, best_of: int = 1) -> benchmarks.Subject:
  """A model to be measured. It samples as the configuration says, whatever it was trained with."""
  cli.log(f'loading      {name}')
  model = families.model_of(locate.resolve(name).bundle, name)
  size = model.spec.image_size
  if size != world.IMAGE_SIZE:
    raise InputError(
      f'found the model {name} of {size} x {size} pixels; expected one of {world.IMAGE_SIZE} x '
      f'{world.IMAGE_SIZE}, as the benchmarks of Scenes have them; name another --model'
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


def main(argv, f=flags.FLAGS):
  cli.no_arguments(argv)
  cli.require(config=f.config, model=f.model, output=f.output)
  if f.best_of < 1:
    raise InputError(f'found --best_of={f.best_of}; expected at least 1; raise it')
  names = check_benchmarks(f.benchmarks)
  config = config_loading.from_config_dict(f.config)
  files.check_output(f.output, lambda name: name in OUTPUTS)

  after = load(f.model, config, f.best_of)
  before = load(f.before, config, f.best_of) if f.before else None
  results = {name: benchmarks.measure(name, after, before) for name in names}
  about = {
    'model': f.model,
    'before': f.before or None,
    'settings': {
      'temperature': config.method.temperature,
      'guidance': config.method.guidance,
      'cfg_interval': config.method.cfg_interval,
      'best_of': f.best_of,
      'seed': config.eval.seed,
      'prompts_per_task': config.eval.prompts_per_task,
      'images_per_prompt': config.eval.images_per_prompt,
      'pictures': config.eval.pictures,
    },
  }
  table = benchmarks.markdown(about, results)
  subjects = [subject for subject in (before, after) if subject]
  with files.whole_directory(f.output) as aside:
    results_json = {**about, 'benchmarks': results}
    files.write_json(os.path.join(aside, 'results.json'), results_json, indent=1, allow_nan=False)
    files.write_text(os.path.join(aside, 'results.md'), table)
    for name, sheet in (
      ('pictures.png', benchmarks.picture_sheet(subjects)),
      ('texts.png', benchmarks.text_sheet(subjects)),
    ):
      files.write_bytes(os.path.join(aside, name), images.png(sheet))
  cli.log(f'\n{table}')

  values = {
    name: {key: score['value'] for key, score in result['scores'].items()}
    for name, result in results.items()
  }
  cli.print_json({'output': f.output, **values}, kept=f.output)


def define_flags(f=flags.FLAGS):
  config_loading.define_config_flag(
    'config',
    'The lists, and how to sample: a config file (its eval, method.temperature, method.guidance '
    'and method.cfg_interval), keys set by --config.key=value.',
    f,
  )
  flag_types.define_path('model', None, f'The model: {locate.EXPECTED}.', f)
  flag_types.define_path(
    'before',
    '',
    'A model to compare with: measured with the same seeds, differences are paired.',
    f,
  )
  flags.DEFINE_list(
    'benchmarks',
    [],
    f'Some of {", ".join(benchmarks.BENCHMARKS)}; all by default.',
    flag_values=f,
  )
  flags.DEFINE_integer(
    'best_of',
    1,
    "Every sampled picture or text is the best of so many by the model's own reward.",
    flag_values=f,
  )
  flag_types.define_path(
    'output',
    None,
    'Folder to write: new, empty, or an earlier output of this command.',
    f,
  )


if __name__ == '__main__':
  cli.run_main(main, define_flags)
