"""The judge on true pictures that went through the embedded model's picture tokenizer."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax import convert
from dsr_jax.convert import locate as model_source
from dsr_jax.models.janus import model as janus
from dsr_jax.scenes import judge, sets, world

NUMBER, CHUNK = 2048, 128


@pytest.fixture(scope='module')
def scenes():
  rng = np.random.default_rng(5)
  return [world.random_scene(rng, skewed=False, held_out='include') for _ in range(NUMBER)]


@pytest.fixture(scope='module')
def readings(scenes):
  bundle = convert.load(model_source.EMBEDDED)
  graphdef = janus.graphdef_of(bundle.config)

  @jax.jit
  def round_trip(params, pixels):
    model = nnx.merge(graphdef, params)
    codes = model.picture_from_pixels(pixels.astype(jnp.float32) / 127.5 - 1).codes
    return jnp.clip((model.picture_from_codes(codes).pixels + 1) * 127.5, 0, 255).astype(jnp.uint8)

  pixels = sets.pictures(scenes)
  params = jax.tree.map(jnp.asarray, bundle.params)
  return judge.read(
    np.concatenate([round_trip(params, pixels[i : i + CHUNK]) for i in range(0, NUMBER, CHUNK)])
  )


@pytest.mark.parametrize('field', world.Thing._fields)
def test_attributes_are_read_through_the_tokenizer(scenes, readings, field):
  right = []
  for scene, reading in zip(scenes, readings):
    at = {(t.row, t.col): t for t in reading.things}
    right += [
      (t.row, t.col) in at and getattr(at[t.row, t.col], field) == getattr(t, field)
      for t in scene.things
    ]
  assert len(right) >= 2000 and np.mean(right) >= 0.99


def test_things_are_counted_through_the_tokenizer(scenes, readings):
  assert (
    np.mean([len(s.things) == len(r.things) and not r.blobs for s, r in zip(scenes, readings)])
    >= 0.99
  )
