"""Is the self-reward good on this model, these prompts and pictures? Asked before any training; one
page, and its numbers.

  python -m dsr_jax.probe --model=scenes --config=configs/scenes.py --output=out

Samples candidates of a run's first inputs as the run would, and measures whether the two rewards
order them well. In Scenes the exact judge says what is well; with other prompts and pictures those
measures are left out, and the others still tell much. Writes out/probe.html, one self-contained
page, and out/probe.json.
"""

import json
import os
import time

from absl import flags
from ml_collections import config_flags

from dsr_jax import cli as commands
from dsr_jax import config as config_lib
from dsr_jax.convert import locate as model_source
from dsr_jax.errors import InputError, run_main


def main(argv, f=flags.FLAGS):
  commands.no_arguments(argv)
  commands.require(config=f.config, model=f.model, output=f.output)
  commands.check_sampling(1, 1.0, f.seed)
  if f.num_inputs < 2:
    raise InputError(
      f'found --num_inputs={f.num_inputs}; expected at least 2 (a picture is compared with those '
      'of other prompts); raise it'
    )
  config = config_lib.from_config_dict(f.config)
  commands.check_output(f.output, lambda name: name in ('probe.html', 'probe.json'))
  import jax  # after the cheap checks: it takes seconds to import

  from dsr_jax.models.janus import model as janus
  from dsr_jax.probe import measures as probe_measures
  from dsr_jax.probe import page as probe_page
  from dsr_jax.probe import tasks as probe_tasks

  bundle = model_source.resolve(f.model).bundle
  began = time.time()
  results = probe_tasks.probe(
    janus.graphdef_of(bundle.config), bundle, config, f.num_inputs, f.seed
  )
  verdict = {task: result.numbers['verdict']['go'] for task, result in results.items()}
  m = config.method
  about = {
    'model': f.model,
    'prompts': config.data.prompts,
    'images': config.data.images,
    'inputs': f.num_inputs,
    'candidates': m.group_size,
    'temperature': m.temperature,
    'guidance': m.guidance,
    'seed': f.seed,
    'data_seed': m.seed,
    'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
    'seconds': round(time.time() - began, 1),
    'date': time.strftime('%Y-%m-%d', time.gmtime()),
  }
  numbers = probe_measures.to_json(
    {'about': about, 'go': all(verdict.values()), **{t: r.numbers for t, r in results.items()}}
  )
  with commands.whole_directory(f.output) as aside:
    with open(os.path.join(aside, 'probe.json'), 'w', encoding='utf-8') as file:
      json.dump(numbers, file, indent=1, allow_nan=False)
    with open(os.path.join(aside, 'probe.html'), 'w', encoding='utf-8') as file:
      file.write(probe_page.page(numbers, {t: r.shown for t, r in results.items()}))
  commands.print_json(
    {
      'output': f.output,
      'go': numbers['go'],
      'page': os.path.join(f.output, 'probe.html'),
      **{
        task: {
          'go': go,
          'failed': [
            g['gate'] for g in results[task].numbers['verdict']['gates'] if g['passed'] is False
          ],
        }
        for task, go in verdict.items()
      },
    }
  )


def define_flags(f=flags.FLAGS):
  config_flags.DEFINE_config_file(
    'config',
    None,
    'The run that is thought of: a file of configs/, keys set by --config.key=value.',
    flag_values=f,
  )
  flags.DEFINE_string('model', None, f'The model: {model_source.EXPECTED}.', flag_values=f)
  flags.DEFINE_string(
    'output',
    None,
    'Folder to write: new, empty, or an earlier output of this command.',
    flag_values=f,
  )
  flags.DEFINE_integer(
    'num_inputs',
    64,
    'How many prompts, and how many pictures; each has method.group_size candidates.',
    flag_values=f,
  )
  flags.DEFINE_integer(
    'seed', 42, 'Candidate i of input k is sampled with (seed, k, i).', flag_values=f
  )


if __name__ == '__main__':
  define_flags()
  run_main(main, config_lib.check_flags)
