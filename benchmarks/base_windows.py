"""How a base of Scenes stands on the validation lists, for its model card.

  python -m benchmarks.base_windows --model=scenes [--settings=1:2,0.5:2] [--steps=12 --noise=1]

A setting is TEMPERATURE:GUIDANCE; the first one also gives the texts, and the best of 8 images by
the judge. Prints Markdown: 30 prompts per task x 4 images for every setting, then the texts about
300 images, and the ranges that a base for reinforcement should be in. The evaluation lists stay
unused.
"""

import dataclasses
import math

from absl import flags
import jax

from dsr_jax import cli, config_loading, families
from dsr_jax.convert import locate
from dsr_jax.errors import InputError
from dsr_jax.evaluate.evaluator import Evaluator
from dsr_jax.scenes import grammar

SPLIT = 'validation'
MANY = 8  # images per prompt for the best by the judge
# Ranges for a base: good enough to judge itself, with room to improve.
RANGES = {
  'yes/no, F1': (0.85, 0.92),
  'descriptions, sampled: precision': (0.75, 0.85),
  'drawing, mean of six tasks': (0.45, 0.60),
  'drawing, worst task': (0.25, 0.75),
  'drawing, best task': (0.25, 0.75),
  'drawing, best of 8 by the judge': (0.0, 0.92),
}


def settings_of(words) -> list[tuple[float, float]]:
  """['1:2'] -> [(temperature, guidance)]."""
  try:
    pairs = [tuple(map(float, word.split(':'))) for word in words]
    found = [(temperature, guidance) for temperature, guidance in pairs]
  except ValueError as e:
    raise InputError(f'--settings is {",".join(words)}; write TEMPERATURE:GUIDANCE,...') from e
  if not found or not all(0 <= t < math.inf and 1 <= g < math.inf for t, g in found):
    raise InputError(
      f'--settings is {",".join(words)!r}; give at least one TEMPERATURE:GUIDANCE, with a '
      'temperature of 0 or more and a guidance of 1 or more'
    )
  return found


def verdicts(numbers: dict[str, float]) -> list[str]:
  """A Markdown row per range: number, range, whether it is inside."""
  rows = []
  for name, (low, high) in RANGES.items():
    value = numbers[name]
    inside = 'yes' if low <= value <= high else 'below' if value < low else 'above'
    rows.append(f'| {name} | {value:.3f} | {low:.2f} to {high:.2f} | {inside} |')
  return rows


def main(argv, f=flags.FLAGS):
  """Prints the tables."""
  cli.no_arguments(argv)
  settings = settings_of(f.settings)
  config = config_loading.load(
    'scenes',
    model=f.model,
    method__temperature=settings[0][0],
    method__guidance=settings[0][1],
    method__sampling_steps=f.steps,
    method__sampling_noise=f.noise,
    eval__chunk=f.chunk,
  )
  model = families.model_of(locate.resolve(f.model).bundle, f.model, config.method)
  params = jax.tree.map(jax.numpy.asarray, model.params)

  def evaluator(images: int):
    lists = dataclasses.replace(config.eval, images_per_prompt=images)
    asked = dataclasses.replace(config, eval=lists)
    return Evaluator(asked, model.processor, model.graphdef, SPLIT)

  four = evaluator(4)
  tasks = grammar.GENEVAL
  print(f'| temperature, guidance | mean of six | {" | ".join(tasks)} | any of 4 |')
  print('|---' * (len(tasks) + 3) + '|')
  found = []
  for temperature, guidance in settings:
    drawn, _ = four.generation(
      params, f.prompts_per_task, temperature=temperature, guidance=guidance
    )
    found.append(drawn)
    row = [drawn[f'generation/{task}'] for task in ('mean', *tasks, 'any')]
    print(f'| {temperature:g}, {guidance:g} | {" | ".join(f"{x:.3f}" for x in row)} |', flush=True)

  texts, _ = four.understanding(params, f.pictures)
  print('\n| | precision | recall | F1 |\n|---|---:|---:|---:|')
  for name, key in (('sampled', 'description'), ('greedy', 'description_greedy')):
    row = [texts[f'{key}/{x}'] for x in ('precision', 'recall', 'f1')]
    print(f'| descriptions, {name} | {" | ".join(f"{x:.3f}" for x in row)} |')
  print(f'| yes/no questions | | | {texts["yesno/f1"]:.3f} |', flush=True)

  temperature, guidance = settings[0]
  many, _ = evaluator(MANY).generation(
    params, f.prompts_per_task, temperature=temperature, guidance=guidance
  )
  by_task = [found[0][f'generation/{task}'] for task in tasks]
  numbers = {
    'yes/no, F1': texts['yesno/f1'],
    'descriptions, sampled: precision': texts['description/precision'],
    'drawing, mean of six tasks': found[0]['generation/mean'],
    'drawing, worst task': min(by_task),
    'drawing, best task': max(by_task),
    'drawing, best of 8 by the judge': many['generation/any'],
  }
  print('\n| | measured | range | inside |\n|---|---:|---:|---|')
  print('\n'.join(verdicts(numbers)))


def define_flags(f=flags.FLAGS):
  flags.DEFINE_string('model', 'scenes', 'A model of Scenes.', flag_values=f)
  flags.DEFINE_list('settings', ['1:2'], 'TEMPERATURE:GUIDANCE, several of them.', flag_values=f)
  flags.DEFINE_integer('steps', -1, "A Show-o's steps; -1: its own.", flag_values=f)
  flags.DEFINE_float('noise', -1.0, "A Show-o's noise; -1: its own.", flag_values=f)
  flags.DEFINE_integer('prompts_per_task', 30, 'Prompts per task.', lower_bound=1, flag_values=f)
  flags.DEFINE_integer('pictures', 300, 'Images to describe.', lower_bound=2, flag_values=f)
  flags.DEFINE_integer('chunk', 50, 'Prompts or images at once.', lower_bound=1, flag_values=f)


if __name__ == '__main__':
  cli.run_main(main, define_flags)
