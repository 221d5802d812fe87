"""Times the first stage of evaluation: answers per second on this machine.

  python -m benchmarks.answers [--rounds=5 --pictures=64 --side=384]

1. The whole first stage (decodes images, tokenizes turns, writes answers to files) with one
   question per image, against the training step's own sampler on the same chunks; the embedded
   model.
2. Questions that share an image, which is read once, against the same questions with a separate
   reading each: as in POPE (6 per image) and in MMBench (4 rotations). The model is small and has
   random weights, but Janus-Pro's 576 tokens per image, which decide how much there is to share.

The variants take turns; the results are medians over the rounds. Prints one JSON object.
"""

import base64
import csv
import io
import json
import os
import pathlib
import statistics
import tempfile
import time
from unittest import mock

from absl import flags
import jax
import numpy as np
from PIL import Image

from dsr_jax import cli, families, sharding
from dsr_jax import config as config_lib
from dsr_jax.convert import locate
from dsr_jax.evaluate import registry
from dsr_jax.evaluate.answering import asking, subject
from dsr_jax.inference import Sampler
from dsr_jax.models.janus import model as janus
from dsr_jax.models.janus.config import JanusConfig, TextConfig, VisionConfig, VQConfig
from dsr_jax.models.janus.family import JANUS
from dsr_jax.models.unified import Sampling
from dsr_jax.runtime.distributed import Team

ROOM = 16  # tokens of an answer


def write_table(path, pictures: int, each: int, side: int):
  """A table like POPE's: `pictures` images of noise, with `each` questions about each."""
  rows = []
  for i in range(pictures):
    pixels = np.random.default_rng(i).integers(0, 256, (12, 12, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(out, 'PNG')
    image = base64.b64encode(out.getvalue()).decode()
    for q in range(each):
      index = i * each + q
      question = f'Is there a {("red", "blue", "green")[q % 3]} disc in the image?'
      rows.append([index, question, image if not q else i * each, 'Yes', 'random'])
  with open(path, 'w', encoding='utf-8', newline='') as f:
    table = csv.writer(f, delimiter='\t')
    table.writerows([['index', 'question', 'image', 'answer', 'category'], *rows])


def subject_of(model: families.Model, chunk: int) -> subject.Subject:
  """A model on this machine's mesh, float32."""
  how = subject.How(
    temperature=1.0,
    guidance=1.0,
    cfg_interval=0,
    seed=0,
    best_of=1,
    max_tokens=ROOM,
    instruction='',
    template='tokens',
    precision='float32',
  )
  identity = {'name': 'benchmark', 'weights': '', 'trained': ''}
  mesh = sharding.make_mesh(config_lib.Mesh())
  return subject.Subject('benchmark', model, how, identity, chunk, mesh)


def first_stage(made, benchmark) -> float:
  """Seconds of the whole stage, with output in a new folder."""
  with tempfile.TemporaryDirectory() as folder:
    start = time.perf_counter()
    with mock.patch.object(cli, 'log'):
      asking.ask('pope', made, benchmark, os.path.join(folder, 'pope'), 0, Team())
    return time.perf_counter() - start


def own_sampler(made, benchmark) -> float:
  """Seconds of the step's sampler on the same images and questions, already in memory."""
  questions = benchmark.questions()
  pixels = np.stack([made.square(benchmark.picture(q.pictures[0])) for q in questions])
  sampler = Sampler(made.model.graphdef, made.model.processor, chunk=made.chunk, seed=0)
  turns = made.turns([q.text for q in questions])
  longest = max(len(turn) for turn in turns)
  turns = made.model.processor.pad(turns, -(-longest // asking.LEAST_TURN) * asking.LEAST_TURN)
  how = Sampling(temperature=0.0, max_tokens=ROOM, segment=subject.SHORT_SEGMENT)
  start = time.perf_counter()
  sampler.sample_texts(made.model.params, pixels, turns, group=1, how=how)
  return time.perf_counter() - start


def by_turns(rounds: int, **functions) -> dict[str, list[float]]:
  """Seconds of each function, called in turn; the first round only compiles."""
  found = {name: [] for name in functions}
  for number in range(rounds + 1):
    for name, call in functions.items():
      seconds = call()
      if number:
        found[name].append(seconds)
      cli.log(f'{name}: {seconds:.2f} s')
  return found


def janus_of_576(embedded: families.Model) -> families.Model:
  """A model with random weights and small widths, and 576 tokens per 384 x 384 image, as in
  Janus-Pro.
  """
  processor = embedded.processor
  config = JanusConfig(
    text=TextConfig(embedded.config.text.vocab_size, 128, 352, 4, 4, 32),
    vision=VisionConfig(96, 384, 2, 4, image_size=384, patch_size=16),
    vq=VQConfig(64, latent_channels=32, base_channels=32, num_res_blocks=1),
    templates=processor.templates,
  )
  graphdef, params = janus.create(config)
  return families.Model(
    graphdef=graphdef,
    params=params,
    config=config,
    processor=processor,
    source={'name': 'random', 'fingerprint': ''},
    family=JANUS,
    spec=JANUS.spec(config),
  )


def main(argv, f=flags.FLAGS):
  """Prints rates and ratios, as JSON."""
  cli.no_arguments(argv)
  embedded = families.model_of(locate.resolve('scenes').bundle, 'scenes')
  embedded.params = jax.device_put(embedded.params)
  result = {'rounds': f.rounds, 'device': jax.devices()[0].device_kind, 'cores': os.cpu_count()}
  with tempfile.TemporaryDirectory() as folder:

    def table(name, pictures, each, side):
      path = str(pathlib.Path(folder, name))
      write_table(path, pictures, each, side)
      return registry.open_asking('pope', folder, path, any_version=True)

    made = subject_of(embedded, 32)
    benchmark = table('one.tsv', f.pictures * 4, 1, 64)
    seconds = by_turns(
      f.rounds,
      first_stage=lambda: first_stage(made, benchmark),
      own_sampler=lambda: own_sampler(made, benchmark),
    )
    result['first stage'] = _compared(
      seconds, len(benchmark.questions()), 'own_sampler', 'first_stage'
    )

    made = subject_of(janus_of_576(embedded), 8)
    for name, each in (('6 questions a picture', 6), ('4 rotations', 4)):
      benchmark = table(f'{each}.tsv', max(f.pictures // each, 1), each, f.side)

      def alone(benchmark=benchmark):
        with mock.patch.object(asking, 'QUESTIONS', 1):
          return first_stage(made, benchmark)

      seconds = by_turns(
        f.rounds, shared=lambda b=benchmark: first_stage(made, b), one_by_one=alone
      )
      result[name] = _compared(seconds, len(benchmark.questions()), 'one_by_one', 'shared')
  result['load'] = [round(x, 1) for x in os.getloadavg()]
  result['date'] = time.strftime('%Y-%m-%d', time.gmtime())
  print(json.dumps(result, indent=2))


def _compared(seconds, answers: int, slow: str, fast: str) -> dict:
  """Answers per second of both, and the ratio of `fast` to `slow`."""
  rates = {name: round(answers / statistics.median(x), 2) for name, x in seconds.items()}
  return {**rates, 'ratio': round(rates[fast] / rates[slow], 3), 'answers': answers}


def define_flags(f=flags.FLAGS):
  flags.DEFINE_integer(
    'rounds', 5, 'Timed rounds, after one that compiles.', lower_bound=1, flag_values=f
  )
  flags.DEFINE_integer('pictures', 64, 'Images per table.', lower_bound=1, flag_values=f)
  flags.DEFINE_integer(
    'side', 384, 'Side of the images that questions share, in pixels.', flag_values=f
  )


if __name__ == '__main__':
  cli.run_main(main, define_flags)
