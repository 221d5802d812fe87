"""Our CLIP against transformers' CLIPModel, its directory, its reward, and the small one of
Scenes.
"""

import json
import subprocess
import sys

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from places import ROOT
import pytest
from run_command import run
import tiny_step

from dsr_jax import config as config_lib
from dsr_jax import images
from dsr_jax.convert import clip as files
from dsr_jax.errors import InputError
from dsr_jax.models import clip
from dsr_jax.models.janus.processor import Processor
from dsr_jax.study import clip as study_clip

SIZES = dict(
  text_config=dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    vocab_size=60,
    max_position_embeddings=11,
    bos_token_id=57,
    pad_token_id=0,
    projection_dim=20,
  ),
  vision_config=dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=20,
    patch_size=5,
    projection_dim=20,
  ),
  projection_dim=20,
)


def write_model(directory, eos=58, act='quick_gelu'):
  """A random CLIPModel of transformers with logits that tell things apart; returns it."""
  import torch  # noqa: PLC0415 - takes seconds
  from transformers import CLIPConfig, CLIPModel  # noqa: PLC0415

  torch.set_num_threads(1)
  text = dict(SIZES['text_config'], eos_token_id=eos, hidden_act=act)
  config = CLIPConfig(
    text_config=text, vision_config=dict(SIZES['vision_config'], hidden_act=act), projection_dim=20
  )
  model = CLIPModel(config).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for value in model.parameters():
      if value.ndim:
        value.copy_(
          torch.randn(value.shape, generator=generator)
          * (value[0].numel() ** -0.5 if value.ndim > 1 else 0.2)
          + (value.ndim == 1)
        )
  model.save_pretrained(directory)
  return model


@pytest.mark.parametrize('eos, act', [(58, 'quick_gelu'), (2, 'gelu')])
def test_both_towers_and_the_cosine_are_transformers(tmp_path, eos, act):
  import torch  # noqa: PLC0415

  theirs = write_model(tmp_path, eos, act)
  config, params = files.read_config(tmp_path), files.load(tmp_path)
  rng = np.random.default_rng(0)
  ids = rng.integers(3, 57, (4, 11))
  for row, end in zip(ids, (3, 10, 5, 7)):
    row[end:] = 58
  pixels = rng.uniform(-1, 1, (4, 20, 20, 3)).astype('f4')
  model = nnx.merge(clip.graphdef_of(config), jax.tree.map(jnp.asarray, params))
  with torch.no_grad():
    normal = torch.tensor(np.asarray(model.normalised(jnp.asarray(pixels)))).permute(0, 3, 1, 2)
    out = theirs(input_ids=torch.tensor(ids), pixel_values=normal)
  np.testing.assert_allclose(model.texts(jnp.asarray(ids)), out.text_embeds.numpy(), atol=1e-4)
  np.testing.assert_allclose(
    model.pictures(jnp.asarray(pixels)), out.image_embeds.numpy(), atol=1e-4
  )
  grouped = jnp.asarray(pixels).reshape(2, 2, 20, 20, 3)
  cosine = clip.similarity(config, params, grouped, jnp.asarray(ids[:2]))
  expected = np.einsum(
    'bgd,bd->bg', out.image_embeds.numpy().reshape(2, 2, -1), out.text_embeds.numpy()[:2]
  )
  np.testing.assert_allclose(cosine, expected, atol=1e-4)
  assert np.ptp(expected) > 1e-2
  np.testing.assert_allclose(params['logit_scale'], theirs.logit_scale.item())


def test_pictures_are_resized_and_normalised_as_the_files_say(tmp_path):
  write_model(tmp_path)
  (tmp_path / 'preprocessor_config.json').write_text(
    json.dumps(dict(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]))
  )
  files.read_config.cache_clear()
  config = files.read_config(tmp_path)
  picture = np.asarray(
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 6, 3), dtype='u1')).resize(
      (40, 40), Image.BICUBIC
    )
  )
  model = nnx.merge(clip.graphdef_of(config), jax.tree.map(jnp.asarray, files.load(tmp_path)))
  ours = model.normalised(images.to_float(jnp.asarray(picture[None])))
  pil = np.asarray(Image.fromarray(picture).resize((20, 20), Image.BICUBIC)) / 255
  np.testing.assert_allclose(ours[0], (pil - [0.1, 0.2, 0.3]) / [0.4, 0.5, 0.6], atol=0.02)
  # transformers 5 saves the same in another place
  settings = json.loads((tmp_path / 'preprocessor_config.json').read_text())
  (tmp_path / 'processor_config.json').write_text(json.dumps(dict(image_processor=settings)))
  (tmp_path / 'preprocessor_config.json').unlink()
  files.read_config.cache_clear()
  assert files.read_config(tmp_path) == config


def test_what_is_saved_loads_in_transformers_and_here_alike(tmp_path, hf_directory):
  from transformers import CLIPModel  # noqa: PLC0415

  config = clip.ClipConfig(
    clip.TowerConfig(16, 24, 1, 2, act='gelu'),
    clip.TowerConfig(24, 32, 2, 2),
    12,
    340,
    9,
    321,
    8,
    4,
  )
  params = clip.create(config, 3)
  files.save(tmp_path / 'clip', config, params, hf_directory)
  again = files.load(tmp_path / 'clip')
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(a, b)
  assert files.read_config(tmp_path / 'clip') == config
  _, info = CLIPModel.from_pretrained(tmp_path / 'clip', output_loading_info=True)
  assert not info['missing_keys'] and not info['unexpected_keys'], info


def test_texts_end_where_the_model_looks(tmp_path, hf_directory):
  config = clip.ClipConfig(
    clip.TowerConfig(16, 24, 1, 2), clip.TowerConfig(24, 32, 1, 2), 12, 340, 9, 0, 8, 4
  )
  files.save(tmp_path / 'clip', config, clip.create(config), hf_directory)
  eos = Processor.from_directory(hf_directory).templates.eos_id
  ids = files.encode(
    tmp_path / 'clip',
    ['a red circle', 'a red circle left of a blue square and two small green rings'],
  )
  assert (
    ids.shape == (2, 9)
    and np.all(ids[:, -1] == eos)
    and (ids[0] == eos).sum() > (ids[1] == eos).sum() == 1
  )


@pytest.mark.parametrize(
  'break_it, words',
  [
    (lambda d: (d / 'config.json').write_text('{"model_type": "janus"}'), "type 'janus'"),
    (lambda d: (d / 'model.safetensors').unlink(), 'no weights'),
    (
      lambda d: (d / 'config.json').write_text(
        json.dumps(
          dict(
            model_type='clip',
            projection_dim=21,
            text_config=SIZES['text_config'],
            vision_config=SIZES['vision_config'],
          )
        )
      ),
      'text_projection.weight',
    ),
  ],
)
def test_a_directory_that_is_no_clip_is_refused_in_one_sentence(tmp_path, break_it, words):
  write_model(tmp_path)
  break_it(tmp_path)
  files.read_config.cache_clear()
  with pytest.raises(InputError, match=words) as e:
    files.load(tmp_path)
  assert '\n' not in str(e.value)
  with pytest.raises(InputError, match='there is no directory'):
    files.read_config(tmp_path / 'nowhere')


def test_the_step_runs_under_the_clip_reward(tmp_path):
  write_model(tmp_path)
  files.read_config.cache_clear()
  method = tiny_step.method(
    reward='clip',
    clip_reward=config_lib.ClipReward(model=str(tmp_path)),
    task='generation',
    inputs_per_step=4,
  )
  ids = np.random.default_rng(0).integers(3, 57, (4, 11)).astype('i4')
  ids[:, -2:] = 58
  state, metrics, records, _ = tiny_step.run(
    method=method,
    batches=lambda _: tiny_step.batch(('generation',), extra={'generation': {'clip_ids': ids}}),
  )
  model = nnx.merge(*tiny_step.model())
  pixels = model.picture_from_codes(jnp.asarray(records['generation']['codes'])).pixels
  expected = clip.similarity(
    files.read_config(tmp_path), files.load(tmp_path), pixels, jnp.asarray(ids)
  )
  np.testing.assert_allclose(records['generation']['rewards'], expected, atol=1e-4)
  assert -1 <= metrics['generation/reward_mean'] <= 1 and state.reward_params is not None


def test_the_small_clip_of_scenes_is_trained_and_measured_by_its_command(tmp_path):
  facts = run(study_clip, output=tmp_path / 'clip', steps=3, batch=4)
  assert facts['steps'] == 3 and facts['captions'] == 12
  assert 1e6 < facts['parameters'] < 3e6 and np.isfinite(facts['loss'])
  found = run(study_clip, compare=tmp_path / 'clip', prompts_per_task=1, num_samples=2)
  assert found['prompts'] == 6 and set(found) >= {'R_G', 'clip', 'right'}


def test_the_commands_former_name_still_runs_it():
  call = [sys.executable, '-m', 'dsr_jax.scenes.clip']
  done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 2
  assert done.stderr.startswith('error: exactly one of --output and --compare is needed')
