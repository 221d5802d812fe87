"""The embedded model, as it lies in the package, in transformers and here."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import torch
from transformers import AutoProcessor, JanusForConditionalGeneration

from dsr_jax import convert, images
from dsr_jax.convert import locate as model_source
from dsr_jax.models.janus import model as janus
from dsr_jax.models.janus.processor import ASSISTANT, BOI, IMAGE, USER
from dsr_jax.models.unified import Sampling, Text
from dsr_jax.scenes import grammar

PROMPTS = ['a red square', 'a photo of two blue rings', 'a green disc left of a yellow square']


@pytest.fixture(scope='module')
def ours():
  bundle = convert.load(model_source.EMBEDDED)
  return bundle, nnx.merge(
    janus.graphdef_of(bundle.config), jax.tree.map(jnp.asarray, bundle.params)
  )


@pytest.fixture(scope='module')
def theirs():
  torch.set_num_threads(1)
  model, info = JanusForConditionalGeneration.from_pretrained(
    model_source.EMBEDDED, dtype=torch.float32, output_loading_info=True
  )
  for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'):
    assert not info[key], (key, info[key])
  return model.eval(), AutoProcessor.from_pretrained(model_source.EMBEDDED)


def test_sizes_are_those_of_the_small_world(ours):
  config = ours[0].config
  assert (config.image_size, config.num_codes, config.vq.num_embeddings) == (32, 64, 512)


def test_guided_greedy_codes_are_those_of_transformers(ours, theirs):
  bundle, model = ours
  hf, hf_processor = theirs
  prompts = [f'{USER}: {p}\n\n{ASSISTANT}:{BOI}' for p in PROMPTS]
  batch = hf_processor.tokenizer(prompts, return_tensors='pt', padding=True)
  want = hf.generate(**batch, generation_mode='image', do_sample=False, guidance_scale=3.0).numpy()
  padded = bundle.processor.pad([bundle.processor.encode_prompt(p) for p in PROMPTS], 24)
  prompt = Text(jnp.asarray(padded.ids), jnp.asarray(padded.mask))
  keys = jax.random.split(jax.random.key(0), (len(PROMPTS), 1))
  how = Sampling(temperature=0, guidance=3.0)
  codes, _ = jax.jit(lambda: model.sample_pictures(prompt, keys, how))()
  assert want.shape == (3, 64)
  np.testing.assert_array_equal(codes[:, 0], want)
  pixels = jax.jit(model.vqmodel.decode)(codes[:, 0])
  np.testing.assert_allclose(
    pixels, hf.decode_image_tokens(torch.from_numpy(want)).detach(), atol=1e-4, rtol=0
  )


def test_text_logits_about_a_picture_are_those_of_transformers(ours, theirs):
  """The question and the answer to a picture, preprocessed by either side."""
  bundle, model = ours
  hf, hf_processor = theirs
  picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
  question, answer = grammar.QUESTION_DESCRIBE, 'a red square above a blue ring'
  text = f'{USER}: {IMAGE}\n{question}\n\n{ASSISTANT}: {answer}'
  batch = hf_processor(text=text, images=[picture], return_tensors='pt')
  content = bundle.processor.encode_answer(answer)[:-1]
  want = hf(**batch).logits[0, -len(content) - 1 :].detach().numpy()
  pixels = jnp.asarray(images.to_float(images.preprocess(images.load_image(_pil(picture)), 32)))[
    None
  ]
  asked = bundle.processor.pad([bundle.processor.encode_question(question)])

  @jax.jit
  def logits():
    prefix = model._understanding_prefix(
      pixels, Text(jnp.asarray(asked.ids), jnp.asarray(asked.mask))
    )
    ids = jnp.asarray([[model.config.templates.understanding_suffix[-1], *content]])
    return model.lm_head(
      model.language_model.extend(prefix, model.language_model.embed_tokens(ids[None])[0][:, None])
    )

  np.testing.assert_allclose(logits()[0, 0], want, atol=1e-4, rtol=0)


def test_codes_of_a_picture_are_those_of_transformers_with_a_unit_norm_codebook(ours, theirs):
  """transformers' encoder forgets to normalise the codebook, so it is handed one of unit rows."""
  _, model = ours
  hf, _ = theirs
  pixels = np.random.default_rng(1).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
  codebook = hf.model.vqmodel.quantize.embedding.weight
  kept = codebook.detach().clone()
  try:
    codebook.data = torch.nn.functional.normalize(kept, dim=-1)
    want = hf.model.vqmodel.encode(
      torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    ).image_tokens.reshape(2, -1)
  finally:
    codebook.data = kept
  np.testing.assert_array_equal(jax.jit(model.vqmodel.encode)(pixels), want)


def _pil(picture):
  return Image.fromarray(picture)
