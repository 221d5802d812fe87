"""Draws images for a prompt, ranked by the model's own reward R_G.

  python -m dsr_jax.generate --model=scenes --prompt="a red disc left of a blue square"
  --num_samples=8 --output=out

Writes out/00.png (the best), out/01.png ..., and out/samples.json with every sample's codes,
log-probabilities and both rewards (nats per token). With --compare=MODEL2, a second model draws
with the same seeds into out/compare, and out/grid.png shows both, with one column per seed.

  python -m dsr_jax.generate --model=scenes --prompts=prompts.txt --num_samples=4 --output=out

This form draws images for many prompts on all devices. A text file has one prompt per line; each
object of a .jsonl file or row of a .csv file has a `prompt`, and optionally an `id` and a `seed`.
Writes out/ID/00.png ..., out/samples.json, out/index.html to view them, and out/manifest.json. If
the command is killed, the same command resumes.
"""

import os
import re
from typing import NamedTuple

from absl import flags
import numpy as np
from PIL import Image, ImageDraw

from dsr_jax import api, cli, files, flag_types, inputs, prompt_list
from dsr_jax.convert import locate
from dsr_jax.errors import InputError
from dsr_jax.inference import Inference

_TILE = 160  # pixels of an image in the grid, at least
_TEXT = 16  # pixels of a line of text in the grid


class Drawn(NamedTuple):
  """A model's images of the prompt, best first."""

  model: str  # its name
  cfg_weight: float
  template: str  # of its prompts; '' if its family has only one
  samples: list[dict]  # as in samples.json, without `file`
  pictures: np.ndarray  # (num_samples, H, W, 3) uint8


def generate(
  model: Inference,
  prompt: str,
  *,
  num_samples: int,
  temperature: float | None = None,
  seed: int = 42,
  cfg_weight: float | None = None,
  cfg_interval: int | None = None,
  instruction: str | None = None,
):
  """Draws and scores images of a prompt. Settings that are None come from the model.

  Returns:
    Dicts for samples.json, best first, and their images (num_samples, H, W, 3) uint8. `candidate`
    in a dict is its index among the seeds.
  """
  drawn = api.Model(model).generate(
    prompt,
    num_samples=num_samples,
    seed=seed,
    temperature=temperature,
    cfg_weight=cfg_weight,
    cfg_interval=cfg_interval,
    instruction=instruction,
  )
  return [_as_json(drawing) for drawing in drawn], np.stack([d.image for d in drawn])


def _as_json(drawing: api.Drawing) -> dict:
  return {
    'candidate': drawing.candidate,
    'reward_generation': drawing.reward_generation,
    'reward_understanding': drawing.reward_understanding,
    'sampling_logp': float(np.mean(drawing.sampling_logps)),
    'text_logps': cli.rounded(drawing.text_logps),
    'image_logps': cli.rounded(drawing.image_logps),
    'sampling_logps': cli.rounded(drawing.sampling_logps),
    'codes': drawing.codes.tolist(),
  }


def write(directory: str, prompt: str, settings: dict, results: list[Drawn]):
  """Writes the output folder. results: of one or two models."""
  with files.whole_directory(directory) as aside:
    tables = []
    for folder, drawn in zip(('', 'compare'), results):
      os.makedirs(os.path.join(aside, folder), exist_ok=True)
      digits = max(2, len(str(len(drawn.samples) - 1)))
      named = []
      for rank, (sample, picture) in enumerate(zip(drawn.samples, drawn.pictures)):
        file = os.path.join(folder, f'{rank:0{digits}d}.png')
        Image.fromarray(picture).save(os.path.join(aside, file))
        named.append({'file': file, **sample})
      table = {key: getattr(drawn, key) for key in ('model', 'cfg_weight', 'template')}
      tables.append(table | {'samples': named})
    summary = {'prompt': prompt, **settings, **tables[0]}
    if len(results) > 1:
      summary['compare'] = tables[1]
      grid(prompt, results).save(os.path.join(aside, 'grid.png'))
    path = os.path.join(aside, 'samples.json')
    files.write_json(path, summary, ensure_ascii=False, indent=1, allow_nan=False)


def grid(prompt: str, results: list[Drawn]) -> Image.Image:
  """One row per model and one column per seed, with R_G under each image."""
  side = results[0].pictures.shape[1]
  side *= max(1, -(-_TILE // side))  # whole multiples keep small images' pixels square
  number = len(results[0].samples)
  cell, gap = side + _TEXT, 4
  width = max(number * (side + gap), 320)
  sheet = Image.new('RGB', (width, _TEXT + len(results) * (cell + _TEXT + gap)), 'white')
  pen = ImageDraw.Draw(sheet)
  pen.text((2, 2), _plain(prompt), fill='black')
  for row, drawn in enumerate(results):
    top = _TEXT + row * (cell + _TEXT + gap)
    pen.text((2, top + 2), _plain(drawn.model), fill='black')
    for sample, picture in zip(drawn.samples, drawn.pictures):
      left = sample['candidate'] * (side + gap)
      tile = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
      sheet.paste(tile, (left, top + _TEXT))
      reward = f'R_G {sample["reward_generation"]:.3f}'
      pen.text((left + 2, top + _TEXT + side + 2), reward, fill='black')
  return sheet


def _plain(text):
  """The text with only characters that Pillow's built-in font can draw."""
  return text.encode('latin-1', 'replace').decode('latin-1')


def _ours(name):
  return bool(re.fullmatch(r'\d+\.png|grid\.png|samples\.json|compare', name))


def main(argv, f=flags.FLAGS):
  cli.no_arguments(argv)
  if f.prompt and f.prompts:
    raise InputError('--prompt and --prompts are both set; leave one out')
  cli.require(model=f.model, output=f.output)
  cli.require(**({'prompts': f.prompts} if f.prompts else {'prompt': f.prompt}))
  inputs.check_text(prompt=f.prompt, instruction=f.instruction)
  temperature = 1.0 if f.temperature is None else f.temperature
  cli.check_sampling(f.num_samples, temperature, f.seed, f.cfg_weight)
  if f.prompts:
    _draw_many(f)
    return
  files.check_output(f.output, _ours)

  settings, results = {}, []
  for name in (f.model, *([f.compare] if f.compare else [])):
    cli.log(f'loading {name}')
    base = locate.base_for(name, f.base, several=bool(f.compare))
    model = Inference(locate.resolve(name, template=f.template, base=base))
    # Both models use the settings of the first: only the models should differ.
    method = model.source.method
    settings = settings or {
      'temperature': method.temperature if f.temperature is None else f.temperature,
      'cfg_weight': method.guidance if f.cfg_weight is None else f.cfg_weight,
      'cfg_interval': method.cfg_interval,
    }
    said = ', '.join(f'{key} {value:g}' for key, value in settings.items())
    cli.log(f'drawing {f.num_samples} images, {said}')
    samples, pictures = generate(
      model,
      f.prompt,
      num_samples=f.num_samples,
      seed=f.seed,
      instruction=f.instruction,
      **settings,
    )
    results.append(Drawn(name, settings['cfg_weight'], method.template, samples, pictures))
  write(f.output, f.prompt, {**settings, 'seed': f.seed}, results)

  best = results[0].samples[0]
  keys = ('candidate', 'reward_generation', 'reward_understanding')
  summary = {'output': f.output, 'best': {key: best[key] for key in keys}}
  cli.print_json(summary, kept=f.output)


def _draw_many(f):
  if f.compare:
    raise InputError(
      '--compare does not work with --prompts; draw with the other model into its own folder: the '
      'seeds are the same'
    )
  lines = prompt_list.read(f.prompts)
  prompt_list.check_output(f.output)
  given = {
    'temperature': f.temperature,
    'guidance': f.cfg_weight,
    'instruction': f.instruction,
    'seed': f.seed,
  }
  cli.log(f'drawing {f.num_samples} images for each of {len(lines)} prompts with {f.model}')
  page = prompt_list.draw(
    f.model,
    lines,
    f.output,
    samples=f.num_samples,
    settings={key: value for key, value in given.items() if value is not None},
    template=f.template,
    base=f.base,
  )
  summary = {'output': f.output, 'prompts': len(lines), 'page': page}
  cli.print_json(summary, kept=f.output)


def define_flags(f=flags.FLAGS):
  flags.DEFINE_string(
    'instruction',
    None,
    'Question before the prompt when it is scored given the image. By default, the one that '
    'the model was trained with.',
    flag_values=f,
  )
  flag_types.define_path('model', None, f'The model: {locate.EXPECTED}.', f)
  locate.define_flags(f)
  flags.DEFINE_string('prompt', None, 'The prompt.', flag_values=f)
  flag_types.define_path(
    'prompts',
    None,
    'A file of many prompts: one per line, or .jsonl or .csv with a column prompt.',
    f,
  )
  flags.DEFINE_integer('num_samples', 8, 'Number of images per prompt.', flag_values=f)
  flag_types.define_path(
    'output',
    None,
    'Output folder: new, empty, or an earlier output of this command.',
    f,
  )
  flags.DEFINE_float(
    'cfg_weight',
    None,
    'Classifier-free guidance; 1 is off. By default, the value used in training, else the one in '
    'generation_config.json.',
    flag_values=f,
  )
  flags.DEFINE_float(
    'temperature',
    None,
    'Sampling temperature; 0 is greedy. By default, the one used in training, else 1.',
    flag_values=f,
  )
  flags.DEFINE_integer('seed', 42, 'Sample i of every model uses the key (seed, i).', flag_values=f)
  flag_types.define_path(
    'compare', None, 'A second model with the same seeds, shown side by side.', f
  )


if __name__ == '__main__':
  cli.run_main(main, define_flags)
