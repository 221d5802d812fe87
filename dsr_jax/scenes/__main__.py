"""Shows Scenes, the small synthetic world, and its judge.

  python -m dsr_jax.scenes --show=16 --output=scenes.png                    images with captions
  python -m dsr_jax.scenes --judge=FILE --prompt="a photo of a red disc"    the verdict
  python -m dsr_jax.scenes --entropy=200                                    the grammar's entropy

The last two print JSON on stdout.
"""

import textwrap

from absl import flags
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dsr_jax import cli as commands
from dsr_jax import files, flag_types, images
from dsr_jax.errors import InputError
from dsr_jax.scenes import entropy, grammar, judge, render, sets, world

SCALE = 6  # screen pixels per image pixel
TEXT_HEIGHT, MARGIN = 64, 8
MAX_SHOWN = 1024
MAX_TEXTS = 100_000


def contact_sheet(pictures, captions, columns: int = 4) -> Image.Image:
  """A sheet of enlarged images (N, 32, 32, 3) with a caption below each."""
  side = SCALE * world.IMAGE_SIZE
  columns = min(columns, len(captions))
  rows = -(-len(captions) // columns)
  sheet = Image.new(
    'RGB',
    (columns * (side + MARGIN) + MARGIN, rows * (side + TEXT_HEIGHT + MARGIN) + MARGIN),
    'white',
  )
  draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
  for i, (picture, caption) in enumerate(zip(pictures, captions)):
    x = MARGIN + i % columns * (side + MARGIN)
    y = MARGIN + i // columns * (side + TEXT_HEIGHT + MARGIN)
    sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST), (x, y))
    draw.multiline_text(
      (x, y + side + 4), '\n'.join(textwrap.wrap(caption, 29)), 'black', font, spacing=2
    )
  return sheet


def show(number: int, output: str, seed: int = 0):
  """Writes a sheet of pretraining images and captions to the PNG file `output`."""
  files.check_output_file(output)
  examples = [sets.pretraining_example(seed, i) for i in range(number)]
  sheet = contact_sheet(*zip(*examples))
  files.write_bytes(output, images.png(sheet))
  pixels = np.stack([sets.pretraining_example(seed, i)[0] for i in range(2000)])
  coverage = render.patch_coverage(pixels)
  commands.log(
    f'wrote {output}; 2000 images have {coverage["patches"]} patches that are not ground, '
    f'{coverage["distinct"]} of them distinct; the 512 commonest cover {coverage["share"]:.1%}'
  )


def read_picture(path: str) -> np.ndarray:
  """Reads an image file as (32, 32, 3) uint8; averages whole multiples of that size down."""
  image = images.load_image(path)
  width, height = image.size
  if width != height or width % world.IMAGE_SIZE:
    raise InputError(
      f'{path} has {width} x {height} pixels; use an image of Scenes, of 32 x 32 pixels or a whole '
      'multiple of that'
    )
  return np.asarray(image.resize((world.IMAGE_SIZE,) * 2, Image.Resampling.BOX))


def judge_file(path: str, text: str) -> dict:
  """What the judge sees in an image file, and its verdicts on a prompt."""
  atoms = judge.parse(text)
  if atoms is None:
    raise InputError(
      f'the prompt {text!r} is not in the grammar of Scenes; write one like "a photo of a red '
      'disc" or "two small squares and a ring"'
    )
  reading = judge.read(read_picture(path))[0]

  def prompt(category):
    return grammar.Prompt(text, atoms, category)

  verdict = judge.verdict(prompt('complex'), reading)
  return {
    'prompt': text,
    'readable': reading.scene is not None,
    'unreadable_parts': reading.blobs,
    'things': [{'name': t.name, 'box': t.box} for t in reading.things],
    'right': verdict['geneval'],
    'right_and_counted': judge.verdict(prompt('counting'), reading)['geneval'],
    'strict': verdict['strict'],
    'graded': round(verdict['graded'], 4),
  }


def main(argv, f=flags.FLAGS):
  commands.no_arguments(argv)
  if f.judge is not None:
    commands.require(judge=f.judge, prompt=f.prompt)
    commands.print_json(judge_file(f.judge, f.prompt))
  elif f.entropy is not None:
    commands.check_range(1, MAX_TEXTS, entropy=f.entropy)
    commands.print_json(
      {
        name: entropy.conditional_entropy(f.entropy, f.seed, noisy=noisy)._asdict()
        for name, noisy in (('captions', False), ('pretraining_captions', True))
      }
    )
  elif f.show is not None:
    commands.require(output=f.output)
    commands.check_range(1, MAX_SHOWN, show=f.show)
    files.check_output_file(f.output)
    show(f.show, f.output, f.seed)
  else:
    raise InputError(
      'there is nothing to do; add --show=16 --output=FILE, --judge=FILE --prompt=TEXT, or '
      '--entropy=200'
    )


def define_flags(f=flags.FLAGS):
  flags.DEFINE_integer('show', None, 'Number of images to show.', flag_values=f)
  flag_types.define_path('output', None, 'PNG file for --show.', f)
  flag_types.define_path('judge', None, 'Image file to judge.', f)
  flags.DEFINE_string('prompt', None, 'The prompt of the judged image.', flag_values=f)
  flags.DEFINE_integer(
    'entropy',
    None,
    'Print the conditional entropy of the grammar over this many texts.',
    flag_values=f,
  )
  flags.DEFINE_integer('seed', 0, 'Selects the images for --show.', lower_bound=0, flag_values=f)


if __name__ == '__main__':
  commands.run_main(main, define_flags)
