"""Trains the embedded model from scratch: tokenizer, image tokenizer, then both tasks jointly.

  python -m dsr_jax.pretrain --config=configs/scenes_pretrain.py --workdir=DIR

The result is DIR/model, a directory in the Hugging Face layout. A killed run resumes where
it stopped.
"""

from ml_collections import ConfigDict


def get_config():
  c = ConfigDict()
  c.seed = 0
  c.vocab_size = 640  # rows of the text embedding; the tokenizer fills fewer
  c.guidance = 2.0  # written to generation_config.json; best at temperature 1 on validation

  c.vq = ConfigDict()
  # steps of each warm restart: cosine to 0, then the codebook is spread out again
  c.vq.cycles = (500, 600, 400)
  # a plain autoencoder first, so that the codebook starts from meaningful latents
  c.vq.unquantised_steps = 60
  c.vq.polish_steps = 400  # of the decoder alone, on the final codes
  c.vq.batch = 32
  c.vq.learning_rate = 2e-3

  c.lm = ConfigDict()
  c.lm.steps = 10000
  c.lm.batch = 32  # captioned images, each learned in both directions
  c.lm.learning_rate = 3e-3
  c.lm.prompt_dropout = 0.1  # needed for guidance
  # at first all images show a single object; their share falls with each step until this one
  c.lm.single_until = 800
  c.lm.question_share = 0.25  # of the texts about images; the rest are captions
  c.lm.question_weight = 4.0  # of an answer's token relative to a caption's
  c.lm.text_weight = 1.0  # of a text's mean loss relative to an image's

  c.save_every = 100
  c.lock()
  return c
