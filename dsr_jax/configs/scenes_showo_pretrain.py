"""Makes a small Show-o of Scenes from nothing: tokenizer, image tokenizer, then both tasks jointly.

  python -m dsr_jax.pretrain --config=configs/scenes_showo_pretrain.py --workdir=runs/showo_base

The result is DIR/model, in the original's layout. A killed run continues where it was.
"""

from ml_collections import ConfigDict


def get_config():
  c = ConfigDict()
  c.family = 'showo'
  c.seed = 0
  c.vocab_size = 640  # tokens at most, Show-o's ten words included
  c.guidance = 2.0  # what generation_config.json names

  c.vq = ConfigDict()
  c.vq.bits = 9
  c.vq.steps = 1500
  c.vq.unquantised_steps = 100  # a plain autoencoder first, so that signs mean something
  c.vq.batch = 32
  c.vq.learning_rate = 2e-3

  c.lm = ConfigDict()
  c.lm.steps = 10000
  c.lm.batch = 16  # captioned pictures; each is learned in both directions
  c.lm.learning_rate = 3e-3
  c.lm.prompt_dropout = 0.1  # what guidance needs
  # pictures of one thing are all at first and fewer with each step until this one
  c.lm.single_until = 800
  c.lm.question_share = 0.25  # of the texts about pictures, the rest are captions
  c.lm.question_weight = 4.0  # of an answer's token against a caption's
  c.lm.text_weight = 1.0  # of a text's mean loss against a picture's

  c.save_every = 100
  c.lock()
  return c
