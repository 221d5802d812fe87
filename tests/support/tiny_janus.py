"""A tiny random Janus in the Hugging Face layout, made with transformers."""

import torch
from transformers import JanusConfig, JanusForConditionalGeneration

from dsr_jax.convert import tokenizer_files
from dsr_jax.models.janus.processor import BOS, EOS, IMAGE, PAD, SPECIALS

TEXTS = [
  'a red circle left of a blue square',
  'two small green rings and 3 dotted stars.',
  'Is there a red disc?',
  'yes',
  'no',
  'a large striped diamond',
]

HEADS = ('lm_head.weight', 'model.generation_head.vision_head.weight')


def tiny_hf_config(ids):
  """Sizes that differ wherever they may, so that a swapped axis shows; ids: special token -> id."""
  return JanusConfig(
    text_config=dict(
      model_type='llama',
      vocab_size=360,
      hidden_size=48,
      intermediate_size=80,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=4,
      head_dim=16,
      rms_norm_eps=1e-6,
      max_position_embeddings=256,
      pad_token_id=ids[PAD],
      bos_token_id=ids[BOS],
      eos_token_id=ids[EOS],
    ),
    vision_config=dict(
      hidden_size=32,
      num_hidden_layers=2,
      num_attention_heads=2,
      mlp_ratio=3.0,
      image_size=16,
      patch_size=4,
      num_image_tokens=16,
      projection_dim=48,
    ),
    vq_config=dict(
      num_embeddings=40,
      embed_dim=8,
      latent_channels=24,
      base_channels=32,
      channel_multiplier=[1, 1, 2],
      num_res_blocks=2,
      projection_dim=48,
      image_token_embed_dim=48,
    ),
    image_token_id=ids[IMAGE],
    tie_word_embeddings=False,
  )


def randomise(model, seed=0):
  """Weights that make every part matter: heads with logits of std about 2, a non-zero pad row, a
  unit-norm codebook.
  """
  generator = torch.Generator().manual_seed(seed)

  def normal(shape):
    return torch.randn(shape, generator=generator)

  with torch.no_grad():
    for name, value in model.named_parameters():
      if name.endswith('bias'):
        value.copy_(0.1 * normal(value.shape))
      elif value.ndim == 1:  # norms
        value.copy_(1 + 0.1 * normal(value.shape))
      elif 'embed' in name and value.ndim == 2:
        value.copy_(normal(value.shape))  # the pad row too
      else:
        gain = 2.0 if name in HEADS else 1.0
        value.copy_(gain * normal(value.shape) * value[0].numel() ** -0.5)
    codebook = model.model.vqmodel.quantize.embedding.weight
    # transformers' encoder does not normalise.
    codebook.copy_(torch.nn.functional.normalize(codebook, dim=-1))
  return model


def write_hf_directory(directory, seed=0):
  """Writes the tiny model, complete; returns the transformers model."""
  side = dict(texts=TEXTS * 20, vocab_size=330, directory=directory, image_size=16, patch_size=4)
  tokenizer = tokenizer_files.make_tokenizer(**side).tokenizer
  ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIALS}
  model = JanusForConditionalGeneration(tiny_hf_config(ids)).eval()
  randomise(model, seed).save_pretrained(directory)
  # Again, for save_pretrained wrote a generation_config.json of its own.
  tokenizer_files.make_tokenizer(**side)
  return model
