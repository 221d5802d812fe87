"""Measures, before any training, how good the self-reward is for a model and its prompts and
images. Writes a page and its numbers.

  python -m dsr_jax.probe --model=scenes --config=configs/scenes.py --output=out

Samples for the run's first inputs as the run would, and measures how well the two rewards rank the
samples. For Scenes, the exact judge is the ground truth; for other prompts and images, the measures
that need the judge are omitted. Writes out/probe.html, a self-contained page, and out/probe.json.
"""

import os
import time

from absl import flags
import jax

from dsr_jax import cli, config_loading, families, files, flag_types
from dsr_jax.convert import locate
from dsr_jax.probe import measures, tasks
from dsr_jax.probe import page as page_lib

OUTPUTS = ('probe.html', 'probe.json')


def main(argv, f=flags.FLAGS):
  cli.no_arguments(argv)
  cli.require(config=f.config, model=f.model, output=f.output)
  cli.check_sampling(1, 1.0, f.seed)
  cli.check_range(2, 100_000, num_inputs=f.num_inputs)  # images are compared with other prompts'
  config = config_loading.from_config_dict(f.config)
  files.check_output(f.output, lambda name: name in OUTPUTS)

  source = locate.resolve(f.model, template=f.template, base=f.base, config=config)
  model = families.model_of(source.bundle, f.model, config.method)
  families.check(model.config, config)
  began = time.time()
  results = tasks.probe(model, config, f.num_inputs, f.seed)
  verdicts = {task: result.numbers['verdict'] for task, result in results.items()}
  about = {
    'model': f.model,
    'prompts': config.data.prompts,
    'images': config.data.images,
    'inputs': f.num_inputs,
    'candidates': config.method.group_size,
    'temperature': config.method.temperature,
    'guidance': config.method.guidance,
    'template': model.template,
    'seed': f.seed,
    'data_seed': config.method.seed,
    'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
    'seconds': round(time.time() - began, 1),
    'date': time.strftime('%Y-%m-%d', time.gmtime()),
  }
  numbers = measures.to_json(
    {
      'about': about,
      'go': all(verdict['go'] for verdict in verdicts.values()),
      'verdict': measures.overall([verdict['verdict'] for verdict in verdicts.values()]),
      **{task: result.numbers for task, result in results.items()},
    }
  )
  page = page_lib.page(numbers, {task: result.shown for task, result in results.items()})
  with files.whole_directory(f.output) as aside:
    files.write_json(os.path.join(aside, 'probe.json'), numbers, indent=1, allow_nan=False)
    files.write_text(os.path.join(aside, 'probe.html'), page)

  summary = {}
  for task, verdict in verdicts.items():
    failed = [gate['gate'] for gate in verdict['gates'] if gate['passed'] is False]
    summary[task] = {
      'go': verdict['go'],
      'verdict': verdict['verdict'],
      'failed': failed,
      'not_measured': verdict['not_measured'],
    }
  cli.print_json(
    {
      'output': f.output,
      'go': numbers['go'],
      'verdict': numbers['verdict'],
      'page': os.path.join(f.output, 'probe.html'),
      **summary,
    },
    kept=f.output,
  )


def define_flags(f=flags.FLAGS):
  config_loading.define_config_flag(
    'config', 'Config file of the planned run; set its keys with --config.key=value.', f
  )
  flag_types.define_path('model', None, f'The model: {locate.EXPECTED}.', f)
  locate.define_flags(f)
  flag_types.define_path(
    'output',
    None,
    'Output folder: new, empty, or an earlier output of this command.',
    f,
  )
  flags.DEFINE_integer(
    'num_inputs',
    64,
    'Number of prompts, and number of images; each gets method.group_size samples.',
    flag_values=f,
  )
  flags.DEFINE_integer('seed', 42, 'Sample i of input k uses the key (seed, k, i).', flag_values=f)


if __name__ == '__main__':
  cli.run_main(main, define_flags)
