"""One forward pass of the full-size 1B against transformers: text and image head, float32 and
bfloat16. Run by hand:

  python -m benchmarks.weights make --size=1b --directory=/tmp/dsr_1b_hf --format=hf
  python -m benchmarks.parity_1b --directory=/tmp/dsr_1b_hf

The weights are random (logits with a standard deviation of about 2). The text head reads a prompt
around an image of 576 vectors, the image head a prompt and 64 codes. Each model in each dtype runs
in a separate process, so that only one model is in memory at a time: 8.3 GB in float32. Prints a
JSON object; docs/weights.md has the result.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import JanusForConditionalGeneration

from dsr_jax import convert
from dsr_jax.models.janus import model as janus

ROOT = pathlib.Path(__file__).resolve().parent.parent
BEFORE, AFTER, PROMPT, CODES = 6, 24, 20, 64  # tokens


def inputs():
  """Token ids, codes, and an image (1, 384, 384, 3) in [-1, 1]: the same for all models."""
  rng = np.random.default_rng(1)

  def ids(n):
    return rng.integers(0, 100000, (1, n))

  smooth = rng.uniform(-1, 1, (1, 24, 24, 3)).repeat(16, 1).repeat(16, 2)
  return (
    ids(BEFORE),
    ids(AFTER),
    ids(PROMPT),
    rng.integers(0, 16384, (1, CODES)),
    smooth.astype(np.float32),
  )


def of_transformers(directory, dtype):
  model = JanusForConditionalGeneration.from_pretrained(
    directory, dtype=getattr(torch, dtype)
  ).eval()
  before, after, prompt, codes, pixels = inputs()
  embed = model.get_input_embeddings()
  with torch.no_grad():
    picture = model.model.get_image_features(
      torch.from_numpy(pixels.transpose(0, 3, 1, 2)).to(model.dtype)
    ).pooler_output
    text = torch.cat([embed(torch.from_numpy(before)), picture, embed(torch.from_numpy(after))], 1)
    hidden = model.model.language_model(inputs_embeds=text).last_hidden_state
    text_logits = model.lm_head(hidden[:, -AFTER:])
    drawn = model.prepare_embeddings_for_image_generation(torch.from_numpy(codes))
    image = torch.cat([embed(torch.from_numpy(prompt)), drawn], 1)
    hidden = model.model.language_model(inputs_embeds=image).last_hidden_state
    image_logits = model.model.generation_head(hidden[:, -CODES:])
  return text_logits.float().numpy()[0], image_logits.float().numpy()[0]


def ours(directory, dtype):
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  bundle = convert.load(directory, lambda leaf: leaf)

  def placed(leaves, dtype):
    return jax.tree.map(lambda leaf: leaf.placed(here).astype(dtype), leaves)

  params = {
    part: placed(leaves, 'float32' if part == 'vqmodel' else dtype)
    for part, leaves in bundle.params.items()
  }
  graphdef = janus.graphdef_of(bundle.config)

  @jax.jit
  def run(params, before, after, prompt, codes, pixels):
    model = nnx.merge(graphdef, params)
    embed = model.language_model.embed_tokens

    def states(embeds, last):  # the last tokens continue a prefix, as in scoring
      first = embeds.shape[1] - last
      prefix = model.language_model.prefill(embeds[:, :first], jnp.array([first], jnp.int32))
      return model.language_model.extend(prefix, embeds[:, None, first:])[0, 0]

    text = jnp.concatenate([embed(before), model.image_features(pixels), embed(after)], 1)
    image = jnp.concatenate([embed(prompt), model.code_embeddings(codes)], 1)
    return model.lm_head(states(text, AFTER)), model.generation_head(states(image, CODES))

  return [np.asarray(x, np.float32) for x in run(params, *(jnp.asarray(x) for x in inputs()))]


def compare(directory):
  found = {}
  for side in ('transformers', 'ours'):
    for dtype in ('float32', 'bfloat16'):
      with tempfile.TemporaryDirectory() as folder:
        file = f'{folder}/logits.npz'
        subprocess.run(
          [
            sys.executable,
            '-m',
            'benchmarks.parity_1b',
            f'--directory={directory}',
            f'--side={side}',
            f'--dtype={dtype}',
            f'--output={file}',
          ],
          check=True,
          cwd=ROOT,
        )
        with np.load(file) as logits:
          found[side, dtype] = [logits['text'], logits['image']]
  result = {}
  for i, head in enumerate(('text', 'image')):
    truth = found['transformers', 'float32'][i]

    def error(key, i=i, truth=truth):
      return float(np.linalg.norm(found[key][i] - truth) / np.linalg.norm(truth))

    # Each bfloat16 model against the same implementation in float32.
    own = float(
      np.linalg.norm(found['ours', 'bfloat16'][i] - found['ours', 'float32'][i])
      / np.linalg.norm(truth)
    )
    theirs = error(('transformers', 'bfloat16'))
    result[head] = dict(
      logits_std=float(truth.std()),
      float32_relative=error(('ours', 'float32')),
      float32_largest=float(
        np.abs(found['ours', 'float32'][i] - truth).max() / np.abs(truth).max()
      ),
      bfloat16_ours=own,
      bfloat16_transformers=theirs,
      bfloat16_ratio=own / theirs,
    )
  return result


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--directory', required=True)
  parser.add_argument('--side', choices=('transformers', 'ours'))
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'))
  parser.add_argument('--output')
  a = parser.parse_args()
  if not a.side:
    print(json.dumps(compare(a.directory), indent=1))
    return
  text, image = (of_transformers if a.side == 'transformers' else ours)(a.directory, a.dtype)
  np.savez(a.output, text=text, image=image)


if __name__ == '__main__':
  main()
