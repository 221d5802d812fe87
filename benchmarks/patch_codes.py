"""How much an image tokenizer's code depends on more than its own patch, on images of Scenes.

  python -m benchmarks.patch_codes --model=scenes [--images=128]

The code of a patch may depend on what stands around it; a language model must then learn that too.
Prints a JSON object: codes in use, and the conditional entropy of a code given the pixels of its
patch, in nats: for all patches, for empty ground (a patch that occurs at least 1,000 times) and for
things (the rest that occur at least 6 times).
Axes: B images, M patches in all.
"""

import collections
import json

from absl import flags
from flax import nnx
import jax
import numpy as np

from dsr_jax import cli, families, images
from dsr_jax.convert import locate
from dsr_jax.scenes import render, sets

FIRST = 10_000_000  # of the examples; pretraining uses smaller numbers
GROUND, FEW = 1000, 6


def code_entropy(patches, codes, least: int = 1, most: float = float('inf')) -> float:
  """H(code | patch) in nats, over the patches that occur `least` to `most` times; NaN if none does.

  patches: (M, ...) uint8. codes: (M,) int.
  """
  found = collections.defaultdict(collections.Counter)
  for patch, code in zip(patches, codes):
    found[patch.tobytes()][int(code)] += 1
  kept = [counts for counts in found.values() if least <= counts.total() <= most]
  total = sum(counts.total() for counts in kept)
  surprise = sum(n * np.log(counts.total() / n) for counts in kept for n in counts.values())
  return float(surprise / total) if total else float('nan')


def main(argv, f=flags.FLAGS):
  """Prints the numbers, as JSON."""
  cli.no_arguments(argv)
  model = families.model_of(locate.resolve(f.model).bundle, f.model)
  pixels = np.stack([sets.pretraining_example(0, FIRST + i, 0.0)[0] for i in range(f.images)])

  @jax.jit
  def encode(params, pixels):
    return nnx.merge(model.graphdef, params).picture_from_pixels(images.to_float(pixels)).codes

  codes = np.asarray(encode(model.params, pixels)).ravel()
  patches = render.patches(pixels).reshape(len(codes), -1)
  result = {
    'model': f.model,
    'images': f.images,
    'codes_used': len(np.unique(codes)),
    'entropy': round(code_entropy(patches, codes), 3),
    'entropy_ground': round(code_entropy(patches, codes, least=GROUND), 3),
    'entropy_things': round(code_entropy(patches, codes, least=FEW, most=GROUND - 1), 3),
  }
  print(json.dumps(result, indent=2))


def define_flags(f=flags.FLAGS):
  flags.DEFINE_string('model', 'scenes', 'A model of Scenes.', flag_values=f)
  flags.DEFINE_integer('images', 128, 'Number of images.', lower_bound=1, flag_values=f)


if __name__ == '__main__':
  cli.run_main(main, define_flags)
