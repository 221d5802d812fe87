"""Scores a text and an image with both reversed likelihoods. Prints one JSON object on stdout.

  python -m dsr_jax.score --model=scenes --text="a red disc" --image=image.png
  python -m dsr_jax.score --model=scenes --text="a red disc" --image_codes=out/samples.json

`reward_generation` is the mean log p(text | image) over the text's tokens, `reward_understanding`
the mean log p(image | text) over the image's codes (eq. 3; nats per token, temperature 1, without
guidance). With codes from `dsr_jax.generate`, both equal the rewards in its output exactly; its PNG
files are rounded, so they give slightly different rewards.
"""

import json

from absl import flags
import numpy as np

from dsr_jax import api, cli, flag_types, inputs
from dsr_jax.convert import locate
from dsr_jax.errors import InputError
from dsr_jax.inference import Inference


def score(
  model: Inference,
  text: str,
  *,
  image: str = '',
  codes: np.ndarray | None = None,
  instruction: str | None = None,
  crop: str = '',
) -> dict:
  """Scores a text with an image file, or with codes (N,)."""
  scores = api.Model(model).score(
    text,
    image if codes is None else None,
    instruction=instruction,
    codes=codes,
    crop=crop or None,
  )
  return {
    'template': model.source.method.template,
    'reward_generation': scores.reward_generation,
    'reward_understanding': scores.reward_understanding,
    'text_tokens': scores.text_tokens,
    'text_logps': cli.rounded(scores.text_logps),
    'image_codes': scores.image_codes.tolist(),
    'image_logps': cli.rounded(scores.image_logps),
  }


def read_codes(path: str, number: int, codebook: int) -> np.ndarray:
  """The codes (number,) int32 of a JSON file: a list, or an object with `codes`, `image_codes` or
  `samples` (the best).

  Raises InputError if the file has another format or its codes do not fit the model.
  """
  try:
    with inputs.open_plain(path, 'a JSON file of image codes') as f:
      found = json.load(f)
  except (ValueError, RecursionError) as e:
    raise InputError(f'{path} is not JSON ({e}); use a JSON file of image codes') from e
  if isinstance(found, dict) and isinstance(found.get('samples'), list) and found['samples']:
    found = found['samples'][0]
  if isinstance(found, dict):
    found = found.get('codes', found.get('image_codes'))
  whole = isinstance(found, list) and all(type(code) is int for code in found)
  if not whole:
    raise InputError(
      f'{path} has no image codes; use a file with a list of {number} whole numbers, or with an '
      'object that has this list as codes or image_codes'
    )
  if len(found) != number or not all(0 <= code < codebook for code in found):
    raise InputError(
      f'{path} has {len(found)} codes from {min(found, default=0)} to {max(found, default=0)}, but '
      f'this model needs {number} codes from 0 to {codebook - 1}; use codes of this model'
    )
  return np.asarray(found, np.int32)


def main(argv, f=flags.FLAGS):
  cli.no_arguments(argv)
  cli.require(model=f.model, text=f.text)
  inputs.check_text(text=f.text, instruction=f.instruction)
  if bool(f.image) == bool(f.image_codes):
    raise InputError(
      f'--image and --image_codes: {"both" if f.image else "neither"} set; '
      f'{"remove" if f.image else "add"} one'
    )
  model = Inference(locate.resolve(f.model, template=f.template, base=f.base))
  codes = None
  if f.image_codes:
    codes = read_codes(f.image_codes, model.spec.num_codes, model.spec.codebook_size)
  cli.print_json(
    score(model, f.text, image=f.image, codes=codes, instruction=f.instruction, crop=f.crop)
  )


def define_flags(f=flags.FLAGS):
  flags.DEFINE_string(
    'instruction',
    None,
    'Question before the text when it is scored given the image. By default, the one that '
    'the model was trained with.',
    flag_values=f,
  )
  flag_types.define_path('model', None, f'The model: {locate.EXPECTED}.', f)
  locate.define_flags(f)
  locate.define_crop_flag(f)
  flags.DEFINE_string('text', None, 'The text to score.', flag_values=f)
  flag_types.define_path('image', None, 'An image file (or use --image_codes).', f)
  flag_types.define_path(
    'image_codes',
    None,
    'A JSON file of image codes: a list, or an output of this command or of '
    'dsr_jax.generate (with several samples, the first is used).',
    f,
  )


if __name__ == '__main__':
  cli.run_main(main, define_flags)
