"""Repeats a past step from the nearest checkpoint, compares it with the log, and shows its parts.

  python -m dsr_jax.replay --workdir=runs/scenes --step=7 --input=2
  python -m dsr_jax.replay --workdir=runs/scenes --step=7 --objective=grpo --scorer=frozen

On a CPU, the recomputed metrics equal the logged ones exactly (except time and memory). The page
shows the step's samples with their log-probabilities and rewards, which samples were chosen, and
what each contributed to the gradient. With another objective, scorer, reward or credit, it also
shows the update that these would have given, from the same parameters and samples. The command only
reads the run's folder, except for its output, replay.html and replay.json, by default in
WORKDIR/replays/STEP.
"""

import os

from absl import flags
import jax

from dsr_jax import cli, files, flag_types, train
from dsr_jax.convert import locate
from dsr_jax.errors import InputError
from dsr_jax.replay import look as look_lib
from dsr_jax.replay import page, past_step
from dsr_jax.runtime import cpu
from dsr_jax.runtime import workdir as workdir_lib

SHOWN = 3  # inputs of each task on the page, unless one is named
CHANGES = ('objective', 'scorer', 'reward', 'credit')
# The fields of replay.json that are printed.
SAID = ('step', 'from_checkpoint', 'exact', 'differences', 'metrics', 'gradient_by_part')
SAID_OF_WHAT_IF = ('changes', 'cosine', 'norm_ratio', 'tasks', 'metrics')


def main(argv, f=flags.FLAGS):
  """Writes the page and prints a summary as JSON."""
  cli.no_arguments(argv)
  cli.require(workdir=f.workdir, step=f.step)
  config, lines = past_step.read_run(f.workdir)
  past_step.check_step(f.step, lines, f.workdir)
  config = cpu.divide(config)
  chosen = _chosen_inputs(config, f.input)
  changes = {name: getattr(f, name) for name in CHANGES if getattr(f, name)}
  other_config = past_step.changed(config, changes) if changes else None
  output = f.output or os.path.join(f.workdir, 'replays', f'{f.step:06d}')
  files.check_output(output, lambda name: name in ('replay.html', 'replay.json'))
  if config.system.compile_cache:
    workdir_lib.use_compile_cache(config.system.compile_cache)

  builders = train.Builders()
  mesh = builders.make_mesh(config.system.mesh)
  with jax.set_mesh(mesh):
    began_with = past_step.base_of(f.workdir, config, f.base)
    model, config = train.framed(builders.load_model(began_with), config)

    # Run the step again.
    past = past_step.replay(builders, config, f.workdir, f.step, mesh, model)
    different = past_step.differences(lines[f.step], past.metrics)
    cli.log('inspecting   its samples and gradients')
    ctx = train.step_context(model, config)
    asking = train.answers_of(config, model, f.workdir, asks=False)
    seen, by_part = look_lib.look(ctx, past.before, past.batch, **asking)
    result = {
      'workdir': f.workdir,
      'step': f.step,
      'from_checkpoint': past.start,
      'exact': not different,
      'differences': different,
      'metrics': past.metrics,
      'gradient_by_part': by_part,
    }
    result |= {task: look_lib.as_json(x, model.processor, chosen) for task, x in seen.items()}

    # What if.
    other_seen = None
    if other_config:
      cli.log(f'what if      {", ".join(f"{k}={v}" for k, v in changes.items())}')
      other = past_step.what_if(builders, other_config, f.workdir, past, mesh, model)
      other_ctx = train.step_context(model, other_config)
      asking = train.answers_of(other_config, model, f.workdir, asks=False)
      other_seen, _ = look_lib.look(other_ctx, other.before, other.batch, **asking)
      result['what_if'] = {
        'changes': changes,
        'metrics': other.metrics,
        **past_step.compare(past, other, seen, other_seen),
        **{task: look_lib.as_json(x, model.processor, chosen) for task, x in other_seen.items()},
      }
    shown = page.prepare(model, past.before, past.batch, seen, other_seen, chosen)

  with files.whole_directory(output) as aside:
    files.write_json(os.path.join(aside, 'replay.json'), result, indent=1, allow_nan=False)
    files.write_text(os.path.join(aside, 'replay.html'), page.page(result, shown))
  words = 'yes, every number' if not different else 'no: ' + ', '.join(different)
  cli.log(f'exact        {words}')
  cli.print_json(_in_short(result, output), kept=output)


def _chosen_inputs(config, asked: int | None) -> list[int]:
  """The inputs of a task to show: the requested one, or the first ones."""
  number = config.method.inputs_per_task
  if asked is None:
    return list(range(min(SHOWN, number)))
  if not 0 <= asked < number:
    raise InputError(
      f'--input is {asked}; set it to a number from 0 to {number - 1}, the inputs of a task in a '
      'step of this run'
    )
  return [asked]


def _in_short(result: dict, output: str) -> dict:
  said = {'output': output, 'page': os.path.join(output, 'replay.html')}
  said |= {key: result[key] for key in SAID}
  if 'what_if' in result:
    said['what_if'] = {key: result['what_if'][key] for key in SAID_OF_WHAT_IF}
  return said


def define_flags(f=flags.FLAGS):
  flag_types.define_path('workdir', None, 'The folder of a run, which is only read.', f)
  locate.define_base_flag(f)
  flags.DEFINE_integer('step', None, 'The step to repeat, from 1.', flag_values=f)
  flags.DEFINE_integer(
    'input',
    None,
    'Index of the prompt and the image to show, from 0 (default: the first three).',
    flag_values=f,
  )
  flags.DEFINE_string(
    'objective', '', 'Recompute the update with this method.objective.', flag_values=f
  )
  flags.DEFINE_string('scorer', '', 'Recompute it with this method.scorer.', flag_values=f)
  flags.DEFINE_string('reward', '', 'Recompute it with this method.reward.', flag_values=f)
  flags.DEFINE_string('credit', '', 'Recompute it with this method.credit.', flag_values=f)
  flag_types.define_path('output', '', 'Output folder (default: WORKDIR/replays/STEP).', f)


if __name__ == '__main__':
  cli.run_main(main, define_flags)
