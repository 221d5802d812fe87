"""The smallest model as the commands find one: a loaded model, builders of a run, and a processor
whose words are numbers.
"""

import re
import types

import jax
import micro_model
from micro_model import MICRO, MicroConfig
import numpy as np
from PIL import Image

from dsr_jax import config as config_lib
from dsr_jax import families, train
from dsr_jax.convert import locate
from dsr_jax.data import prompts as prompts_lib
from dsr_jax.evaluate.answering import subject
from dsr_jax.inference import Inference
from dsr_jax.models.unified import Text

SIZE = micro_model.SIDE * micro_model.PATCH  # pixels
PROMPTS = 'a red circle left of a blue square\ntwo small green rings\na large striped diamond\n'
# As a user would add a backbone: one line in the table.
families.FAMILIES = (*families.FAMILIES, MICRO)


class _Tokenizer:
  def __call__(self, text, add_special_tokens, return_offsets_mapping):
    return {'offset_mapping': [m.span() for m in re.finditer(r'\s*\S+', text)]}

  def decode(self, ids):
    return ' '.join(f'w{i}' for i in ids)


class Words:
  """In the place of a `processor.Processor`: a word is a number, and back."""

  templates = types.SimpleNamespace(eos_id=micro_model.EOS, pad_id=micro_model.PAD)
  tokenizer = _Tokenizer()

  def encode_prompt(self, text):
    """What was decoded is encoded as it was; any other word becomes some number."""
    return [
      int(word[1:]) if re.fullmatch(r'w\d+', word) else 9 + sum(map(ord, word)) % 31
      for word in text.split()
    ]

  encode_question = encode_turn = encode_prompt

  def decode(self, ids):
    return self.tokenizer.decode([i for i in ids if i not in (micro_model.EOS, micro_model.PAD)])

  def pad(self, rows, length=None):
    return Text(*prompts_lib.pad(rows, length or max(map(len, rows)), micro_model.PAD))


def load(name='micro') -> families.Model:
  graphdef, params = micro_model.create(0)
  config = MicroConfig()
  return families.Model(
    graphdef=graphdef,
    params=jax.tree.map(np.asarray, params),
    config=config,
    processor=Words(),
    source={'name': name, 'fingerprint': 'f' * 64},
    family=MICRO,
    spec=MICRO.spec(config),
  )


def inference() -> Inference:
  """The same, as the commands have it."""
  model = load()
  source = {'name': 'micro', 'hash': 'f' * 64}
  bundle = types.SimpleNamespace(
    config=model.config, params=model.params, processor=model.processor, source=source
  )
  return Inference(locate.Source('micro', bundle, config_lib.Method()))


def how(wishes: subject.Wishes) -> subject.How:
  """How a command asks the micro model."""
  return subject.How(
    temperature=1.0,
    guidance=2.0,
    cfg_interval=0,
    seed=0,
    best_of=wishes.best_of,
    max_tokens=wishes.max_tokens,
    instruction='look',
    template='words',
    precision='float32',
  )


def real() -> train.Builders:
  """The builders of a real run, but for the model."""
  return train.Builders(load_model=load, estimate_memory=lambda model, config, mesh: None)


def write_inputs(folder):
  """Three prompts and three pictures of someone's own; returns the config's changes that name
  them.
  """
  (folder / 'prompts.txt').write_text(PROMPTS)
  (folder / 'pictures').mkdir()
  for i in range(3):
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (20, 30, 3), np.uint8)).save(
      folder / 'pictures' / f'{i}.png'
    )
  return dict(data__prompts=str(folder / 'prompts.txt'), data__images=str(folder / 'pictures'))
