"""What R_G still knows about the images of a trained model: does it order them as the judge does?

  python -m benchmarks.reward_order --models=scenes,runs/a,runs/b [--temperature=0.5]

Every model draws 8 images for each prompt of the validation or evaluation lists, with the same
keys, and one scorer, by default the embedded model, gives them R_G. Prints Markdown, by model and
task: correct images, the mean R_G and its standard deviation within a group, the share of pairs of
a right and a wrong image of one prompt that R_G orders rightly, with its 95 % interval, and
correct images if R_G chooses the best of 8.

Axes: P prompts, G samples.
"""

from typing import NamedTuple

from absl import flags
import jax
import numpy as np

from dsr_jax import cli, config_loading, families, flag_types
from dsr_jax.convert import locate
from dsr_jax.evaluate import ranking, stats
from dsr_jax.evaluate import scores as scores_lib
from dsr_jax.inference import Sampler
from dsr_jax.models.unified import Sampling, Scoring
from dsr_jax.scenes import sets

SPLITS = 'validation', 'evaluation'
CHUNK = 8  # prompts at once


class Task(NamedTuple):
  """The numbers of one model and task. ordered: None if no prompt has right and wrong images."""

  right: float
  reward: float
  spread: float
  ordered: stats.Estimate | None
  best: float


def of_task(rewards, correct) -> Task:
  """rewards (P, G) in nats per token, correct (P, G) bool."""
  chosen = correct[np.arange(len(rewards)), np.argmax(rewards, axis=1)]
  return Task(
    right=float(np.mean(correct)),
    reward=float(np.mean(rewards)),
    spread=float(np.mean(np.std(rewards, axis=1))),
    ordered=ranking.pairwise_accuracy(rewards, correct)['accuracy'],
    best=float(np.mean(chosen)),
  )


def of_all(rewards, correct, tasks) -> dict[str, Task]:
  """'mean of six', and every task by name. The mean is that of the tasks, but its `ordered` is the
  share of all pairs: some tasks have few. tasks: (P,).
  """
  found = {
    name: of_task(rewards[tasks == name], correct[tasks == name]) for name in dict.fromkeys(tasks)
  }
  means = {
    name: float(np.mean([getattr(task, name) for task in found.values()]))
    for name in ('right', 'reward', 'spread', 'best')
  }
  return {'mean of six': of_task(rewards, correct)._replace(**means), **found}


def line(model: str, name: str, task: Task) -> str:
  """A row of the table."""
  ordered = ''
  if task.ordered is not None:
    value, low, high = (100 * x for x in task.ordered)
    ordered = f'{value:.1f} ({low:.1f} … {high:.1f})'
  return (
    f'| {model} | {name} | {100 * task.right:.1f} | {task.reward:.2f} | {task.spread:.2f} | '
    f'{ordered} | {100 * task.best:.1f} |'
  )


def main(argv, f=flags.FLAGS):
  """Prints the table."""
  cli.no_arguments(argv)
  cli.require(models=f.models)
  config = config_loading.load('scenes', method__temperature=f.temperature)
  method = config.method

  def load(name):
    model = families.model_of(locate.resolve(name).bundle, name, method)
    return model, jax.tree.map(jax.numpy.asarray, model.params)

  scorer, reading = load(f.scorer)
  sampler = Sampler(scorer.graphdef, scorer.processor, chunk=CHUNK, seed=f.seed)
  prompts = sets.evaluation_prompts(f.prompts_per_task, f.split)
  prompt = sampler.prompts([p.text for p in prompts])
  instruction = jax.tree.map(lambda x: x[0], sampler.questions([method.instruction]))
  tasks = np.array([p.category for p in prompts])
  best = f'best of {f.samples} by R_G'
  print(f'| images of | task | right | R_G | spread | pairs ordered | {best} |')
  print('|---|---|---:|---:|---:|---:|---:|')
  for name in f.models:
    drawn = sampler.sample_pictures(
      load(name)[1],
      prompt,
      group=f.samples,
      how=Sampling(temperature=method.temperature, guidance=method.guidance),
    )
    rewards, _ = sampler.read_prompts(reading, prompt, drawn.codes, instruction, Scoring())
    correct = scores_lib.judge_pictures(prompts, drawn.pixels)['geneval']
    for task, numbers in of_all(rewards, correct, tasks).items():
      print(line(name, task, numbers), flush=True)


def define_flags(f=flags.FLAGS):
  flag_types.define_paths('models', [], 'Models of Scenes or runs.', f)
  flags.DEFINE_string('scorer', 'scenes', 'The model that scores.', flag_values=f)
  flags.DEFINE_enum('split', SPLITS[0], SPLITS, 'The lists of prompts.', flag_values=f)
  flags.DEFINE_float('temperature', 0.5, 'Of the samples.', lower_bound=0.0, flag_values=f)
  flags.DEFINE_integer('prompts_per_task', 40, 'Prompts per task.', lower_bound=1, flag_values=f)
  flags.DEFINE_integer('samples', 8, 'Images per prompt.', lower_bound=2, flag_values=f)
  flags.DEFINE_integer('seed', 5, 'Of the samples.', lower_bound=0, flag_values=f)


if __name__ == '__main__':
  cli.run_main(main, define_flags)
