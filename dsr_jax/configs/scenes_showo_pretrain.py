"""Trains a small Show-o on Scenes: tokenizer, image tokenizer, then both tasks jointly.

  python -m dsr_jax.pretrain --config=configs/scenes_showo_pretrain.py --workdir=runs/showo_base

The result is DIR/model, in the original's layout. A killed run resumes where it stopped.
"""

from ml_collections import ConfigDict


def get_config():
  c = ConfigDict()
  c.family = 'showo'
  c.seed = 0
  c.vocab_size = 640  # maximum number of tokens, including Show-o's ten own
  c.guidance = 3.0  # written to generation_config.json; best on validation

  c.vq = ConfigDict()
  c.vq.bits = 9
  c.vq.steps = 1500
  c.vq.batch = 32
  c.vq.learning_rate = 2e-3

  c.lm = ConfigDict()
  c.lm.steps = 10000
  c.lm.batch = 16  # captioned images, each learned in both directions
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
